//! [`Estimate`]: how long pre-copy will still take, at the rates of the last round.

use std::time::Duration;

use crate::Round;

/// An estimate of more rounds than this is useless.
const ROUNDS_MAX: f64 = 1e6;

/// How long a source will still be in pre-copy. It assumes that the rate of the link and the rate at which the guest dirties
/// memory stay those of the last round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Estimate {
    /// How many bytes are left now: dirty memory, and the data that devices would give.
    pub left_bytes: u64,
    /// The rate at which the destination handles data, in bytes per second; 0 as long as it is not known.
    pub bytes_per_second: u64,
    /// The rate at which the guest dirties memory, in bytes per second.
    pub dirtied_per_second: u64,
    /// The downtime if the stop came now.
    pub predicted_downtime: Duration,
    /// How long until a stop would meet the downtime goal; zero if it would now. `None` if the guest dirties memory as fast
    /// as it is moved, so that a stop never would, and as long as the rate is not known.
    pub remaining: Option<Duration>,
}

impl Estimate {
    /// The estimate after a round that took this long, with this downtime goal.
    pub(super) fn new(round: &Round, took: Duration, downtime_goal: Duration) -> Estimate {
        let seconds = took.as_secs_f64().max(1e-9);
        let dirtied = round.memory_dirty_bytes as f64 / seconds;
        let estimate = Estimate {
            left_bytes: round.memory_dirty_bytes.saturating_add(round.device_bytes),
            bytes_per_second: round.bytes_per_second,
            dirtied_per_second: dirtied as u64,
            predicted_downtime: round.predicted_downtime,
            remaining: None,
        };
        Estimate { remaining: remaining(&estimate, dirtied, downtime_goal), ..estimate }
    }
}

/// Each round sends the memory that was dirtied in the round before. Their durations are a geometric series, up to the round
/// after which the downtime meets the goal.
fn remaining(estimate: &Estimate, dirtied: f64, downtime_goal: Duration) -> Option<Duration> {
    if estimate.predicted_downtime <= downtime_goal {
        return Some(Duration::ZERO);
    }
    let rate = estimate.bytes_per_second as f64;
    if rate <= 0.0 || dirtied >= rate {
        return None;
    }
    let shrinks = dirtied / rate;
    let (now, then) = (estimate.predicted_downtime.as_secs_f64(), downtime_goal.as_secs_f64().max(1e-6));
    let rounds = match shrinks > 0.0 {
        true => ((then / now).ln() / shrinks.ln()).ceil().max(1.0),
        false => 1.0,
    };
    if rounds > ROUNDS_MAX {
        return None;
    }
    let first = estimate.left_bytes as f64 / rate;
    Duration::try_from_secs_f64(first * (1.0 - shrinks.powf(rounds)) / (1.0 - shrinks)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const LIMIT: Duration = Duration::from_millis(100);

    /// 1000 MiB a second, and this many MiB dirty after a round of a second.
    fn after(dirty_mib: u64) -> Estimate {
        let round = Round {
            round: 1,
            memory_dirty_bytes: dirty_mib * MIB,
            bytes_per_second: 1000 * MIB,
            predicted_downtime: Duration::from_millis(dirty_mib),
            ..Round::default()
        };
        Estimate::new(&round, Duration::from_secs(1), LIMIT)
    }

    #[test]
    fn a_guest_that_dirties_half_of_what_is_moved_halves_each_round() {
        // Rounds of 500, 250 and 125 ms leave 62.5 ms.
        let took = after(500).remaining.unwrap();
        assert!((took.as_secs_f64() - 0.875).abs() < 1e-6, "{took:?}");
        assert_eq!(after(500).dirtied_per_second, 500 * MIB);
    }

    #[test]
    fn a_guest_that_dirties_as_fast_as_it_is_moved_has_no_end_in_sight() {
        assert_eq!(after(1000).remaining, None);
        assert_eq!(after(2000).remaining, None);
        let unknown = Round { predicted_downtime: Duration::from_secs(1), ..Round::default() };
        assert_eq!(Estimate::new(&unknown, Duration::ZERO, LIMIT).remaining, None, "no rate");
    }

    #[test]
    fn nothing_remains_when_the_stop_may_come_and_no_number_panics() {
        assert_eq!(after(100).remaining, Some(Duration::ZERO));
        let round = Round {
            memory_dirty_bytes: u64::MAX,
            device_bytes: u64::MAX,
            bytes_per_second: 1,
            predicted_downtime: Duration::MAX,
            ..Round::default()
        };
        assert_eq!(Estimate::new(&round, Duration::MAX, Duration::ZERO).remaining, None);
        let still = Round { memory_dirty_bytes: 0, bytes_per_second: u64::MAX, ..round };
        assert!(Estimate::new(&still, Duration::ZERO, Duration::ZERO).remaining.is_some());
    }
}
