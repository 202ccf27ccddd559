//! [`Idle`]: how long a peer has sent nothing but keep-alives.

use std::time::{Duration, Instant};

/// Watches the number of frames that were not keep-alives. It has no clock of its own.
#[derive(Debug)]
pub(crate) struct Idle {
    frames: u64,
    since: Instant,
}

impl Idle {
    pub(crate) fn new(now: Instant) -> Idle {
        Idle { frames: 0, since: now }
    }

    /// How long the number of frames has been the same.
    pub(crate) fn time(&mut self, frames: u64, now: Instant) -> Duration {
        if self.frames != frames {
            (self.frames, self.since) = (frames, now);
        }
        now.saturating_duration_since(self.since)
    }

    /// The peer had nothing to send: the time begins anew.
    pub(crate) fn excuse(&mut self, now: Instant) {
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_begins_anew_with_each_frame_and_with_each_excuse() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut idle = Idle::new(began);
        assert_eq!(idle.time(0, at(5)), Duration::from_secs(5));
        assert_eq!(idle.time(1, at(7)), Duration::ZERO);
        assert_eq!(idle.time(1, at(9)), Duration::from_secs(2));
        idle.excuse(at(10));
        assert_eq!(idle.time(1, at(11)), Duration::from_secs(1));
    }
}
