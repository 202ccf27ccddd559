//! When pre-copy stops: what stopping now would cost, against what it may cost.

use std::time::Duration;

/// A round that moved less tells nothing about the rate.
const SAMPLE_BYTES_MIN: u64 = 1 << 20;
/// What is taken for the rate, in bytes a second, until a round has told it.
const ASSUMED: f64 = (1 << 30) as f64;

/// What a caller allows a move to cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convergence {
    /// How long nothing may run. Pre-copy goes on below it as long as each round still halves what a stop would
    /// cost, down to a sixteenth.
    pub downtime_max: Duration,
    /// Rounds in a row without a better prediction after which pre-copy has stalled.
    pub stalled_rounds_max: u32,
    /// The most rounds.
    pub rounds_max: u32,
    /// What to do when it has stalled, and [`Vmm::throttle`](crate::Vmm::throttle) cannot help, or after the last
    /// round.
    pub when_stalled: WhenStalled,
}

/// What to do when the limit cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenStalled {
    /// Keep trying, until somebody calls the move off or the guest becomes quieter; also beyond the last round.
    KeepTrying,
    /// Stop all the same: the move comes about, and its downtime is beyond the limit.
    SwitchOver,
    /// Call the move off ([`Error::NotConverging`](crate::Error::NotConverging)).
    Abort,
}

impl Default for Convergence {
    fn default() -> Convergence {
        Convergence {
            downtime_max: Duration::from_millis(300),
            stalled_rounds_max: 5,
            rounds_max: 100,
            when_stalled: WhenStalled::SwitchOver,
        }
    }
}

/// What is known at the end of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Its number, from 1.
    pub round: u32,
    /// Bytes of memory that are dirty.
    pub memory_dirty_bytes: u64,
    /// Bytes that devices would still have to give if they were stopped now, as far as they say.
    pub device_bytes: u64,
    /// Bytes that devices dirtied after they had been read, as far as they say.
    pub device_dirty_bytes: u64,
    /// Bytes of initial pre-copy data that devices still want to be read before the stop, as far as
    /// they say. Can grow again (`VFIO_PRECOPY_INFO_REINIT`).
    pub device_initial_bytes: u64,
    /// The measured rate, of bytes that the destination has handled; 0 before enough were moved to tell.
    pub bytes_per_second: u64,
    /// How long nothing would run if the stop came now.
    pub predicted_downtime: Duration,
}

impl Round {
    /// Whether another round could move something that would else be moved in the stop.
    fn can_gain(&self) -> bool {
        self.memory_dirty_bytes > 0 || self.device_dirty_bytes > 0 || self.device_initial_bytes > 0
    }
}

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another round.
    Round,
    /// Stop the devices.
    Stop,
    /// More rounds lead nowhere.
    Stalled,
}

/// Follows the rounds of one move.
#[derive(Debug)]
pub(crate) struct StopPolicy {
    allowed: Convergence,
    best: Duration,
    last: Duration,
    stalled_rounds: u32,
}

impl StopPolicy {
    pub(crate) fn new(allowed: Convergence) -> StopPolicy {
        StopPolicy { allowed, best: Duration::MAX, last: Duration::MAX, stalled_rounds: 0 }
    }

    /// After this round.
    pub(crate) fn next(&mut self, round: &Round) -> Next {
        let Convergence { downtime_max, stalled_rounds_max, rounds_max, .. } = self.allowed;
        let cost = round.predicted_downtime;
        let shrinks = cost < self.last / 2;
        self.last = cost;
        // A little better is no progress that leads anywhere.
        if cost < self.best - self.best / 20 {
            self.best = cost;
            self.stalled_rounds = 0;
        } else {
            self.stalled_rounds += 1;
        }
        let may_shrink = shrinks && cost > downtime_max / 16;
        let another_helps = may_shrink && round.can_gain();
        if round.device_initial_bytes == 0 && cost <= downtime_max && !another_helps {
            return Next::Stop;
        }
        let stalled = self.stalled_rounds >= stalled_rounds_max || !round.can_gain();
        match stalled || round.round >= rounds_max {
            true => Next::Stalled,
            false => Next::Round,
        }
    }

    /// The guest was slowed down: what was seen before does not count.
    pub(crate) fn throttled(&mut self) {
        (self.best, self.last, self.stalled_rounds) = (Duration::MAX, Duration::MAX, 0);
    }
}

/// How fast the link and the destination are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// From a question to its answer.
    latency: Duration,
    /// How long all devices take for an arc, as far as one was walked. A stop is five: to PRE_COPY_P2P, to STOP_COPY,
    /// and at the destination to STOP, to RUNNING_P2P and to RUNNING.
    arc: Duration,
    /// What it takes to have another thread do something. Beside those around arcs the stop has four such passings:
    /// once all is loaded, to READY, to COMMIT and to RUNNING.
    passing: Duration,
    /// 0 as long as it is not known.
    bytes_per_second: f64,
}

impl Pace {
    pub(crate) fn new(latency: Duration, arc: Duration, passing: Duration) -> Pace {
        Pace { latency, arc, passing, bytes_per_second: 0.0 }
    }

    /// So many bytes were handled by the other side in this time.
    pub(crate) fn measured(&mut self, bytes: u64, took: Duration) {
        self.latency = self.latency.min(took);
        if bytes < SAMPLE_BYTES_MIN {
            return;
        }
        let seconds = took.saturating_sub(self.latency).max(took / 16).as_secs_f64().max(1e-9);
        let rate = bytes as f64 / seconds;
        let known = self.bytes_per_second > 0.0;
        self.bytes_per_second = if known { (self.bytes_per_second + rate) / 2.0 } else { rate };
    }

    pub(crate) fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second as u64
    }

    /// How long so many bytes take, the arcs around them, and the words that come after: READY, COMMIT and RUNNING.
    pub(crate) fn downtime(&self, bytes: u64) -> Duration {
        let rate = if self.bytes_per_second > 0.0 { self.bytes_per_second } else { ASSUMED };
        let moved = Duration::try_from_secs_f64(bytes as f64 / rate).unwrap_or(Duration::MAX);
        let words = self.latency.saturating_mul(2).saturating_add(self.passing.saturating_mul(4));
        moved.saturating_add(words).saturating_add(self.arc.saturating_mul(5))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Convergence = Convergence {
        downtime_max: Duration::from_millis(100),
        stalled_rounds_max: 3,
        rounds_max: 50,
        when_stalled: WhenStalled::Abort,
    };

    fn rounds(policy: &mut StopPolicy, costs_ms: &[u64]) -> Vec<Next> {
        let round = |(at, cost): (usize, &u64)| Round {
            round: at as u32 + 1,
            memory_dirty_bytes: *cost,
            predicted_downtime: Duration::from_millis(*cost),
            ..Round::default()
        };
        costs_ms.iter().enumerate().map(|it| policy.next(&round(it))).collect()
    }

    #[test]
    fn the_stop_comes_below_the_limit_when_no_round_helps_much_any_more() {
        use Next::*;
        let run = |costs: &[u64]| rounds(&mut StopPolicy::new(LIMITS), costs);
        assert_eq!(run(&[1000, 300, 90, 40, 35]), [Round, Round, Round, Round, Stop]);
        assert_eq!(run(&[1000, 300, 90, 40, 5]), [Round, Round, Round, Round, Stop], "a sixteenth");
        assert_eq!(run(&[0]), [Stop], "nothing is left");
        let mut policy = StopPolicy::new(LIMITS);
        let costly = super::Round {
            round: 1,
            device_bytes: 1,
            predicted_downtime: Duration::from_secs(1),
            ..Default::default()
        };
        assert_eq!(policy.next(&costly), Stalled, "and no round makes it cheaper");
        assert_eq!(run(&[1000, 101, 100]), [Round, Round, Stop]);
    }

    #[test]
    fn rounds_that_do_not_get_better_stall_until_the_guest_is_slowed_down() {
        use Next::*;
        let mut policy = StopPolicy::new(LIMITS);
        assert_eq!(rounds(&mut policy, &[500, 490, 495, 510]), [Round, Round, Round, Stalled]);
        policy.throttled();
        assert_eq!(rounds(&mut policy, &[600, 300, 90]), [Round, Round, Round]);
        let last =
            super::Round { round: 50, predicted_downtime: Duration::from_secs(1), ..Default::default() };
        let last = super::Round { memory_dirty_bytes: 1, ..last };
        assert_eq!(StopPolicy::new(LIMITS).next(&last), Stalled, "the last round");
    }

    #[test]
    fn initial_bytes_hold_the_stop_back() {
        let mut policy = StopPolicy::new(LIMITS);
        let round = Round { round: 1, device_initial_bytes: 1, ..Round::default() };
        assert_eq!(policy.next(&round), Next::Round);
        assert_eq!(policy.next(&Round { device_initial_bytes: 0, ..round }), Next::Stop);
    }

    #[test]
    fn small_rounds_tell_of_latency_and_large_ones_of_the_rate() {
        let mut pace = Pace::new(Duration::from_millis(2), Duration::ZERO, Duration::ZERO);
        assert_eq!(pace.downtime(1 << 30), Duration::from_millis(1004), "a rate is assumed");
        pace.measured(1 << 10, Duration::from_millis(2));
        assert_eq!(pace.bytes_per_second(), 0, "not known yet");
        pace.measured(100 << 20, Duration::from_millis(102));
        assert_eq!(pace.bytes_per_second(), 1000 << 20);
        pace.measured(1000, Duration::from_millis(1));
        assert_eq!(pace.bytes_per_second(), 1000 << 20);
        assert_eq!(pace.downtime(10 << 20), Duration::from_millis(12));
        pace.measured(100 << 20, Duration::from_millis(201));
        assert_eq!(pace.bytes_per_second(), 750 << 20);
        assert_eq!(
            Pace::new(Duration::ZERO, Duration::from_millis(3), Duration::from_millis(1)).downtime(0),
            Duration::from_millis(19),
            "arcs, and threads that wait for each other"
        );
        pace.measured(0, Duration::ZERO);
        pace.measured(u64::MAX, Duration::ZERO);
        assert!(pace.downtime(u64::MAX) > Duration::ZERO);
    }
}
