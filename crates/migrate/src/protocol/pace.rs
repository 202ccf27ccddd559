//! [`Pace`]: how fast the link and the destination are, and how long a stop would take at that pace.

use std::time::Duration;

/// A sample of fewer bytes tells nothing about the rate.
const SAMPLE_BYTES_MIN: u64 = 64 << 10;
/// A sample of fewer bytes tells the rate only if the link was busy for [`SAMPLE_TIME_MIN`].
const SAMPLE_BYTES_LONG: u64 = 1 << 20;
const SAMPLE_TIME_MIN: Duration = Duration::from_millis(100);
/// A sample of this many bytes, or of this duration, weighs as much as all samples before it. A shorter one weighs less.
const SAMPLE_BYTES_FULL: f64 = (16 << 20) as f64;
const SAMPLE_TIME_FULL: Duration = Duration::from_secs(1);
/// The arcs of a stop: to PRE_COPY_P2P and to STOP_COPY at the source, to STOP, RUNNING_P2P and RUNNING at the destination.
const ARCS: u32 = 5;
/// The rate, in bytes per second, that is assumed until one was measured.
const ASSUMED: f64 = (1 << 30) as f64;

/// The bytes that the destination handled in a period.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// How many bytes.
    pub(crate) bytes: u64,
    /// In which time.
    pub(crate) took: Duration,
    /// For how much of it at least the link had something to send.
    pub(crate) busy: Duration,
    /// Whether a device had nothing to give after that. Such a sample shows how much the devices had, and not what the link
    /// can do.
    pub(crate) ran_dry: bool,
}

/// Measured times and rates of one move.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// The time from a question to its answer.
    latency: Duration,
    /// How long all devices take for one arc.
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

    /// Takes a sample of the rate. Returns whether it was long enough to tell.
    pub(crate) fn measured(&mut self, sample: Sample) -> bool {
        let Sample { bytes, took, busy, ran_dry } = sample;
        if bytes < SAMPLE_BYTES_MIN || bytes < SAMPLE_BYTES_LONG && busy < SAMPLE_TIME_MIN {
            return false;
        }
        let seconds = took.saturating_sub(self.latency).max(took / 16).as_secs_f64().max(1e-9);
        let rate = bytes as f64 / seconds;
        let known = self.bytes_per_second;
        let weight = (bytes as f64 / SAMPLE_BYTES_FULL).max(took.div_duration_f64(SAMPLE_TIME_FULL));
        self.bytes_per_second = match ran_dry {
            _ if !self.is_measured() => rate,
            true => known.max(rate),
            false => known + (rate - known) * weight.min(1.0) / 2.0,
        };
        true
    }

    /// All devices did an arc in this time, once more.
    pub(crate) fn arc_took(&mut self, took: Duration) {
        self.arc = self.arc.min(took);
    }

    /// How much of a stop the arcs are.
    pub(crate) fn arcs(&self) -> Duration {
        self.arc.saturating_mul(ARCS)
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
        self.transfer(bytes).saturating_add(words).saturating_add(self.arcs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(bytes: u64, took: Duration) -> Sample {
        Sample { bytes, took, busy: took, ran_dry: false }
    }

    fn pace() -> Pace {
        Pace::new(Duration::ZERO, Duration::ZERO, Duration::ZERO)
    }

    #[test]
    fn small_samples_tell_no_rate_and_answers_tell_the_latency() {
        let mut pace = Pace::new(Duration::from_millis(2), Duration::ZERO, Duration::ZERO);
        assert_eq!(pace.downtime(1 << 30), Duration::from_millis(1004), "a rate is assumed");
        assert!(!pace.measured(busy(1 << 10, Duration::from_millis(2))));
        assert!(!pace.measured(busy(24, Duration::from_secs(9))), "a few bytes, and a slow device");
        assert_eq!(pace.bytes_per_second(), 0, "not known yet");
        assert!(pace.measured(busy(100 << 20, Duration::from_millis(102))));
        assert_eq!(pace.bytes_per_second(), 1000 << 20);
        pace.answered(Duration::from_millis(1));
        pace.answered(Duration::from_millis(9));
        assert_eq!(pace.downtime(10 << 20), Duration::from_millis(12));
        pace.measured(busy(100 << 20, Duration::from_millis(201)));
        assert_eq!(pace.bytes_per_second(), 750 << 20);
        assert_eq!(
            Pace::new(Duration::ZERO, Duration::from_millis(3), Duration::from_millis(1)).downtime(0),
            Duration::from_millis(19),
            "arcs, and hand-offs between threads"
        );
        pace.measured(busy(u64::MAX, Duration::ZERO));
        assert!(pace.downtime(u64::MAX) > Duration::ZERO);
    }

    #[test]
    fn one_short_slow_sample_does_not_undo_what_long_ones_told() {
        let mut pace = pace();
        pace.measured(busy(1000 << 20, Duration::from_secs(1)));
        pace.measured(busy(1 << 20, Duration::from_millis(100)));
        assert!(pace.bytes_per_second() > 900 << 20, "{}", pace.bytes_per_second());
        // A link that has become slow is noticed all the same.
        for _ in 0..20 {
            pace.measured(busy(1 << 20, Duration::from_secs(1)));
        }
        assert!(pace.bytes_per_second() < 2 << 20, "{}", pace.bytes_per_second());
    }

    #[test]
    fn a_device_that_has_little_to_give_does_not_make_the_link_slow() {
        let mut pace = pace();
        pace.measured(busy(1000 << 20, Duration::from_secs(1)));
        let dry = |sample: Sample| Sample { ran_dry: true, ..sample };
        for _ in 0..100 {
            pace.measured(dry(busy(2 << 20, Duration::from_secs(1))));
        }
        assert_eq!(pace.bytes_per_second(), 1000 << 20);
        pace.measured(dry(busy(2000 << 20, Duration::from_secs(1))));
        assert_eq!(pace.bytes_per_second(), 2000 << 20, "it can do that at least");
    }

    #[test]
    fn a_slow_link_is_measured_with_less_than_a_mib() {
        let mut pace = pace();
        let (bytes, took) = (300 << 10, Duration::from_millis(310));
        assert!(!pace.measured(Sample { busy: Duration::from_millis(1), ..busy(bytes, took) }));
        assert!(pace.measured(Sample {
            busy: Duration::from_millis(300),
            ran_dry: true,
            ..busy(bytes, took)
        }));
        assert!(pace.bytes_per_second() < 1 << 20);
    }
}
