//! [`Idle`]: how long a peer has sent nothing but keep-alives.

use std::time::{Duration, Instant};

/// Watches the number of frames that were not keep-alives. It has no clock of its own.
#[derive(Debug)]
pub(crate) struct Idle {
    frames: u64,
    idle: Duration,
    looked: Instant,
    /// The most time that counts between two looks: a process that stood still in between has not listened.
    step_max: Duration,
}

impl Idle {
    pub(crate) fn new(now: Instant, step_max: Duration) -> Idle {
        Idle { frames: 0, idle: Duration::ZERO, looked: now, step_max }
    }

    /// How long the number of frames has been the same.
    pub(crate) fn time(&mut self, frames: u64, now: Instant) -> Duration {
        let step = now.saturating_duration_since(self.looked).min(self.step_max);
        self.looked = now;
        self.idle = if self.frames == frames { self.idle.saturating_add(step) } else { Duration::ZERO };
        self.frames = frames;
        self.idle
    }

    /// The peer had nothing to send: the time begins anew.
    pub(crate) fn excuse(&mut self) {
        self.idle = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_begins_anew_with_each_frame_and_with_each_excuse() {
        let began = Instant::now();
        let (at, seconds) = (|at| began + Duration::from_secs(at), Duration::from_secs);
        let mut idle = Idle::new(began, Duration::MAX);
        assert_eq!(idle.time(0, at(5)), seconds(5));
        assert_eq!(idle.time(1, at(7)), Duration::ZERO);
        assert_eq!(idle.time(1, at(9)), seconds(2));
        idle.excuse();
        assert_eq!(idle.time(1, at(11)), seconds(2));
        assert_eq!(idle.time(1, at(14)), seconds(5));
    }

    #[test]
    fn a_process_that_stood_still_took_its_own_sleep_for_the_peer_s() {
        let began = Instant::now();
        let mut idle = Idle::new(began, Duration::from_secs(30));
        assert_eq!(idle.time(0, began + Duration::from_secs(3600)), Duration::from_secs(30));
    }
}
