//! [`LinkCount`]: how many links to use. Another link is added as long as it makes the transfer faster.

use std::time::{Duration, Instant};

/// The minimum bytes and time of a measurement.
const SAMPLE_BYTES: u64 = 32 << 20;
const SAMPLE_TIME: Duration = Duration::from_millis(20);
/// The factor by which one more link has to raise the rate.
const GAIN: f64 = 1.08;

/// Follows the throughput of a move from link to link.
#[derive(Debug)]
pub(crate) struct LinkCount {
    most: usize,
    used: usize,
    /// The number of links and the bytes per second of the best measurement.
    best: (usize, f64),
    settled: bool,
    sample: Option<(Instant, u64)>,
}

impl LinkCount {
    /// Begins with all links, or with one if the number is to be measured.
    pub(crate) fn new(most: usize, measured: bool) -> LinkCount {
        let used = if measured { 1 } else { most };
        LinkCount { most, used, best: (used, 0.0), settled: !measured || most == 1, sample: None }
    }

    /// How many links to use now.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// A round begins. The current measurement is dropped, since there was a pause.
    pub(crate) fn pause(&mut self) {
        self.sample = None;
    }

    /// This many bytes were sent in all, up to now. Returns whether the number of links changes.
    pub(crate) fn sent(&mut self, bytes: u64, now: Instant) -> bool {
        if self.settled {
            return false;
        }
        let Some((began, before)) = self.sample else {
            self.sample = Some((now, bytes));
            return false;
        };
        let (moved, took) = (bytes.saturating_sub(before), now.saturating_duration_since(began));
        if moved < SAMPLE_BYTES || took < SAMPLE_TIME {
            return false;
        }
        self.sample = Some((now, bytes));
        let rate = moved as f64 / took.as_secs_f64();
        if rate <= self.best.1 * GAIN {
            self.settled = true;
            self.used = self.best.0;
            return true;
        }
        self.best = (self.used, rate);
        self.settled = self.used == self.most;
        self.used = (self.used + 1).min(self.most);
        !self.settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The links in the end, when `rate` tells how many MiB a second a number of links carries.
    fn settle(most: usize, rate: impl Fn(usize) -> u64) -> usize {
        let mut link_count = LinkCount::new(most, true);
        let (mut now, mut bytes) = (Instant::now(), 0);
        for _ in 0..1000 {
            link_count.sent(bytes, now);
            now += Duration::from_millis(10);
            bytes += rate(link_count.used()) * (1 << 20) / 100;
        }
        assert!(link_count.settled);
        link_count.used()
    }

    #[test]
    fn links_are_added_as_long_as_they_make_it_faster() {
        assert_eq!(settle(4, |links| 1000 * links as u64), 4, "each carries as much");
        assert_eq!(settle(16, |links| 1000 * links.min(3) as u64), 3, "three fill the way");
        assert_eq!(settle(4, |_| 1000), 1, "one fills it");
        assert_eq!(settle(4, |links| 1000 / links as u64), 1, "more are slower");
        assert_eq!(settle(1, |_| 1000), 1);
        assert_eq!(LinkCount::new(5, false).used(), 5, "not measured");
    }
}
