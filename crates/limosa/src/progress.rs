//! A move's progress: a line on a terminal, nothing elsewhere.

mod view;

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use limosa_migrate::{Estimate, Observer, Phase, Round};
use limosa_stream::Totals;

use crate::output::Output;
use crate::terminal::{self, Bar};
use view::View;

/// The time over which the rate is measured.
const WINDOW: Duration = Duration::from_secs(3);
/// The columns before the text: the spinner, the time, and their spaces.
const BEFORE: usize = 11;

/// Watches one side of a move.
pub struct Progress {
    bar: Option<Bar>,
    seen: Mutex<Seen>,
}

/// The observed progress so far.
#[derive(Default)]
struct Seen {
    view: View,
    /// The bytes moved, each with its time.
    samples: VecDeque<(Instant, u64)>,
}

impl Seen {
    fn moved(&mut self, bytes: u64, now: Instant) {
        // A later call may report slightly less.
        self.view.moved_bytes = self.view.moved_bytes.max(bytes);
        self.samples.push_back((now, self.view.moved_bytes));
        while self.samples.len() > 2 && now.duration_since(self.samples[1].0) > WINDOW {
            self.samples.pop_front();
        }
        let (since, before) = self.samples[0];
        let took = now.duration_since(since).as_secs_f64();
        if took > 0.1 {
            self.view.bytes_per_second = Some(((self.view.moved_bytes - before) as f64 / took) as u64);
        }
    }
}

impl Progress {
    /// A line, if results go to people and standard error is a terminal. `total_bytes` returns the amount to move, if
    /// that is known before; it is called only for a line.
    pub fn new(out: &Output, total_bytes: impl FnOnce() -> Option<u64>) -> Progress {
        let bar = out
            .progress()
            .then(|| Bar::show(ProgressBar::new_spinner(), "{spinner} {elapsed_precise} {wide_msg}"));
        let total_bytes = bar.as_ref().and_then(|_| total_bytes());
        let view = View { total_bytes, ..View::default() };
        Progress { bar, seen: Mutex::new(Seen { view, samples: VecDeque::new() }) }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, see: impl FnOnce(&mut Seen)) {
        if let Some(bar) = &self.bar {
            let mut seen = self.seen();
            see(&mut seen);
            bar.bar().set_message(seen.view.line(terminal::columns().saturating_sub(BEFORE)));
        }
    }
}

impl Observer for Progress {
    fn phase(&self, phase: Phase) {
        self.show(|seen| {
            seen.view.phase = phase.name();
            // Samples of another phase say nothing about the rate of this one.
            seen.samples.clear();
        });
    }

    fn moved(&self, totals: Totals) {
        let bytes = totals.device_bytes + totals.memory_bytes + totals.zero_bytes;
        self.show(|seen| seen.moved(bytes, Instant::now()));
    }

    fn round(&self, round: &Round) {
        self.show(|seen| {
            seen.view.round = round.round;
            seen.view.left_bytes = Some(round.memory_dirty_bytes);
        });
    }

    fn estimate(&self, estimate: &Estimate) {
        self.show(|seen| {
            seen.view.left_bytes = Some(estimate.left_bytes);
            seen.view.estimate = Some(*estimate);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds_and_never_goes_back() {
        let (mut seen, began) = (Seen::default(), Instant::now());
        let at = |seconds: u64| began + Duration::from_secs(seconds);
        for second in 0..10 {
            seen.moved(second * 1000, at(second));
        }
        assert_eq!(seen.view.bytes_per_second, Some(1000));
        for second in 10..20 {
            seen.moved(9000 + (second - 9) * 10, at(second));
        }
        assert_eq!(seen.view.bytes_per_second, Some(10));
        seen.moved(5, at(20));
        assert_eq!(seen.view.moved_bytes, 9100);
        assert!(seen.samples.len() < 6, "{}", seen.samples.len());
    }
}
