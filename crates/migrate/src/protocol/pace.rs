//! [`Pace`]: how fast the link and the destination are, and how long a stop would take at that pace.

use std::time::Duration;

/// A sample of fewer bytes tells nothing about the rate.
const SAMPLE_BYTES_MIN: u64 = 1 << 20;
/// The rate, in bytes per second, that is assumed until one was measured.
const ASSUMED: f64 = (1 << 30) as f64;

/// Measured times and rates of one move.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// The time from a question to its answer.
    latency: Duration,
    /// How long all devices take for one arc. A stop has five arcs: to PRE_COPY_P2P and to STOP_COPY at the source, to STOP,
    /// RUNNING_P2P and RUNNING at the destination.
    arc: Duration,
    /// How long one hand-off to another thread takes. In addition to the hand-offs around arcs, a stop has four: when
    /// everything is loaded, and for READY, COMMIT and RUNNING.
    hand_off: Duration,
    /// 0 until the rate was measured.
    bytes_per_second: f64,
}

impl Pace {
    pub(crate) fn new(latency: Duration, arc: Duration, hand_off: Duration) -> Pace {
        Pace { latency, arc, hand_off, bytes_per_second: 0.0 }
    }

    /// The destination handled this many bytes in this time.
    pub(crate) fn measured(&mut self, bytes: u64, took: Duration) {
        if bytes < SAMPLE_BYTES_MIN {
            return;
        }
        let seconds = took.saturating_sub(self.latency).max(took / 16).as_secs_f64().max(1e-9);
        let rate = bytes as f64 / seconds;
        let known = self.is_measured();
        self.bytes_per_second = if known { (self.bytes_per_second + rate) / 2.0 } else { rate };
    }

    /// A question was answered in this time.
    pub(crate) fn answered(&mut self, took: Duration) {
        self.latency = self.latency.min(took);
    }

    /// Whether a rate was measured.
    pub(crate) fn is_measured(&self) -> bool {
        self.bytes_per_second > 0.0
    }

    pub(crate) fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second as u64
    }

    /// How long the transfer of this many bytes takes.
    pub(crate) fn transfer(&self, bytes: u64) -> Duration {
        let rate = if self.is_measured() { self.bytes_per_second } else { ASSUMED };
        Duration::try_from_secs_f64(bytes as f64 / rate).unwrap_or(Duration::MAX)
    }

    /// How long a stop takes that moves this many bytes: the transfer, the arcs, and READY, COMMIT and RUNNING.
    pub(crate) fn downtime(&self, bytes: u64) -> Duration {
        let words = self.latency.saturating_mul(2).saturating_add(self.hand_off.saturating_mul(4));
        self.transfer(bytes).saturating_add(words).saturating_add(self.arc.saturating_mul(5))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_samples_tell_no_rate_and_answers_tell_the_latency() {
        let mut pace = Pace::new(Duration::from_millis(2), Duration::ZERO, Duration::ZERO);
        assert_eq!(pace.downtime(1 << 30), Duration::from_millis(1004), "a rate is assumed");
        pace.measured(1 << 10, Duration::from_millis(2));
        assert_eq!(pace.bytes_per_second(), 0, "not known yet");
        pace.measured(100 << 20, Duration::from_millis(102));
        assert_eq!(pace.bytes_per_second(), 1000 << 20);
        pace.answered(Duration::from_millis(1));
        pace.answered(Duration::from_millis(9));
        assert_eq!(pace.downtime(10 << 20), Duration::from_millis(12));
        pace.measured(100 << 20, Duration::from_millis(201));
        assert_eq!(pace.bytes_per_second(), 750 << 20);
        assert_eq!(
            Pace::new(Duration::ZERO, Duration::from_millis(3), Duration::from_millis(1)).downtime(0),
            Duration::from_millis(19),
            "arcs, and hand-offs between threads"
        );
        pace.measured(u64::MAX, Duration::ZERO);
        assert!(pace.downtime(u64::MAX) > Duration::ZERO);
    }
}
