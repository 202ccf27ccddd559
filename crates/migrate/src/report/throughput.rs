//! Bytes over time, in a bounded number of equal steps whose length grows with the move.

use std::time::Duration;

use super::Throughput;

/// The initial length of a step.
const STEP_NS: u64 = 1_000_000;
/// The maximum number of steps. When more are needed, each two are joined.
const STEPS_MAX: usize = 256;

impl Throughput {
    /// Adds bytes at this time from the move's start.
    pub(super) fn add(&mut self, at: Duration, bytes: u64) {
        let at_ns = super::record::nanoseconds(at);
        self.step_ns = self.step_ns.max(STEP_NS);
        while at_ns / self.step_ns >= STEPS_MAX as u64 {
            self.bytes = self.bytes.chunks(2).map(|two| two.iter().sum()).collect();
            self.step_ns *= 2;
        }
        let step = (at_ns / self.step_ns) as usize;
        if self.bytes.len() <= step {
            self.bytes.resize(step + 1, 0);
        }
        self.bytes[step] += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_move_makes_longer_steps_and_loses_no_byte() {
        let mut throughput = Throughput::default();
        throughput.add(Duration::ZERO, 5);
        throughput.add(Duration::from_millis(1), 7);
        throughput.add(Duration::from_millis(255), 9);
        assert_eq!((throughput.step_ns, throughput.bytes.len()), (STEP_NS, 256));
        throughput.add(Duration::from_millis(256), 11);
        assert_eq!((throughput.step_ns, throughput.bytes.len()), (2 * STEP_NS, 129));
        assert_eq!(throughput.bytes[..2], [12, 0]);
        assert_eq!(throughput.bytes[127..], [9, 11]);
        throughput.add(Duration::from_secs(86_400), 1);
        assert!(throughput.bytes.len() <= STEPS_MAX);
        assert_eq!(throughput.bytes.iter().sum::<u64>(), 5 + 7 + 9 + 11 + 1);
        throughput.add(Duration::MAX, 1);
        assert_eq!(throughput.bytes.iter().sum::<u64>(), 34);
    }
}
