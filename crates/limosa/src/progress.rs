//! A move's progress: a bar on a terminal, nothing elsewhere.

use std::sync::Mutex;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use limosa_migrate::{Observer, Phase, Round};
use limosa_stream::Totals;

use crate::output::{self, Output};

/// Watches one side of a move.
pub struct Progress {
    bar: Option<ProgressBar>,
    phase: Mutex<&'static str>,
}

impl Progress {
    /// A bar, if results go to people and standard error is a terminal.
    pub fn new(out: &Output) -> Progress {
        let bar = out.progress().then(|| {
            let style = ProgressStyle::with_template("{spinner} {elapsed_precise} {msg}");
            let bar = ProgressBar::new_spinner();
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Progress { bar, phase: Mutex::new("") }
    }

    fn show(&self, what: impl FnOnce(&str) -> String) {
        if let Some(bar) = &self.bar {
            let phase = self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            bar.set_message(what(&phase));
        }
    }
}

impl Observer for Progress {
    fn phase(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = phase.name();
        self.show(str::to_owned);
    }

    fn moved(&self, totals: Totals) {
        self.show(|phase| {
            let devices = output::bytes(totals.device_bytes);
            format!("{phase}: devices {devices}, memory {}", output::bytes(totals.memory_bytes))
        });
    }

    fn round(&self, round: &Round) {
        let (number, dirty) = (round.round, output::bytes(round.memory_dirty_bytes));
        self.show(|phase| format!("{phase}: round {number}, {dirty} dirty"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
