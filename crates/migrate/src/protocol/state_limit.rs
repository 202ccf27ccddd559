//! [`StateLimit`]: how much data one device may send, so that a device whose data never ends, or that reports no size,
//! fills no disk and no memory.
//!
//! The standard does not limit the data that is sent again before the stop, so that data has a limit of its own, apart from the
//! data that is sent in the stop.

use limosa_stream::DEVICE_BYTES_MAX;

use crate::Options;
use crate::options::WhenStalled;

/// In the stop a device may give this many times the size that it announced...
const TIMES_SAID: u64 = 4;
/// ... and at least this much.
const STOP_BYTES_MIN: u64 = 1 << 30;
/// Before the stop it may give at least this much.
const PRECOPY_BYTES_MIN: u64 = 2 << 30;

/// Follows the data of one device.
#[derive(Clone, Debug)]
pub(crate) struct StateLimit {
    /// The caller's limit for the whole state.
    max: Option<u64>,
    /// The limit before the stop as a multiple of the limit in the stop; `None` for no limit.
    times: Option<u64>,
    /// The largest size that it has reported.
    said: u64,
    bytes: u64,
    before_stop: Option<u64>,
}

impl StateLimit {
    pub(crate) fn new(options: &Options) -> StateLimit {
        let convergence = &options.convergence;
        let times = match convergence.when_stalled {
            WhenStalled::KeepTrying => None,
            _ => Some(convergence.rounds_max.into()),
        };
        StateLimit { max: options.state_max, times, said: 0, bytes: 0, before_stop: None }
    }

    /// For a device that is loaded: the source decides how long it gives data before the stop.
    pub(crate) fn for_load(options: &Options) -> StateLimit {
        StateLimit { times: None, ..StateLimit::new(options) }
    }

    /// The device announced this number of bytes.
    pub(crate) fn said(&mut self, bytes: u64) {
        self.said = self.said.max(bytes);
    }

    /// It is stopped, and gives the rest from now on.
    pub(crate) fn stopped(&mut self) {
        self.before_stop.get_or_insert(self.bytes);
    }

    /// Counts bytes that it gave. The error is the limit that they exceed.
    pub(crate) fn give(&mut self, bytes: u64) -> Result<(), u64> {
        self.bytes = self.bytes.saturating_add(bytes);
        let has = self.said.saturating_mul(TIMES_SAID);
        let limit = match (self.max, self.before_stop, self.times) {
            (Some(max), ..) => max,
            (None, Some(before), _) => before.saturating_add(has.max(STOP_BYTES_MIN)),
            (None, None, Some(times)) => has.saturating_mul(times).max(PRECOPY_BYTES_MIN),
            (None, None, None) => DEVICE_BYTES_MAX,
        };
        let limit = limit.min(DEVICE_BYTES_MAX);
        if self.bytes > limit { Err(limit) } else { Ok(()) }
    }
}

impl Default for StateLimit {
    fn default() -> StateLimit {
        StateLimit::new(&Options::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Convergence;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_device_that_says_nothing_gives_a_gib_in_the_stop() {
        let mut limit = StateLimit::new(&Options::default());
        limit.stopped();
        assert_eq!(limit.give(GIB), Ok(()));
        assert_eq!(limit.give(1), Err(GIB));
    }

    #[test]
    fn a_device_gives_several_times_the_most_that_it_said() {
        let mut limit = StateLimit::new(&Options::default());
        [5, 3 * GIB, 7].into_iter().for_each(|bytes| limit.said(bytes));
        limit.stopped();
        assert_eq!(limit.give(12 * GIB), Ok(()));
        assert_eq!(limit.give(1), Err(12 * GIB));
    }

    #[test]
    fn what_is_sent_again_before_the_stop_is_bounded_by_rounds() {
        let convergence = Convergence::default().with_rounds_max(10);
        let options = Options::default().with_convergence(convergence);
        let mut limit = StateLimit::new(&options);
        limit.said(GIB);
        assert_eq!(limit.give(40 * GIB), Ok(()));
        limit.stopped();
        // Asked once more in the stop, it is the same stop.
        limit.stopped();
        assert_eq!(limit.give(4 * GIB), Ok(()), "the rest is counted apart");
        assert_eq!(limit.give(1), Err(44 * GIB));
        let mut limit = StateLimit::new(&options);
        limit.said(GIB);
        assert_eq!(limit.give(40 * GIB + 1), Err(40 * GIB));
        let mut silent = StateLimit::new(&options);
        assert_eq!(silent.give(2 * GIB), Ok(()));
        assert_eq!(silent.give(1), Err(2 * GIB));
        let patient =
            options.clone().with_convergence(convergence.with_when_stalled(WhenStalled::KeepTrying));
        for mut limit in [StateLimit::new(&patient), StateLimit::for_load(&options)] {
            assert_eq!(limit.give(500 * GIB), Ok(()));
            assert_eq!(limit.give(600 * GIB), Err(DEVICE_BYTES_MAX));
        }
    }

    #[test]
    fn a_limit_that_was_chosen_is_for_all_of_the_data() {
        let mut limit = StateLimit::new(&Options::default().with_state_max(Some(100)));
        limit.said(u64::MAX);
        assert_eq!(limit.give(60), Ok(()));
        limit.stopped();
        assert_eq!(limit.give(40), Ok(()));
        assert_eq!(limit.give(1), Err(100));
    }
}
