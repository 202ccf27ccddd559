//! Points of a process at which a test has it killed: its named moments, and all that a thread of it traces.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Signal, getpid, kill_process};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// The variable of the environment with the name of the point, or its number, at which the process kills itself.
pub const KILL_AT: &str = "LIMOSA_TEST_KILL_AT";
/// The variable with that at which it does so at the latest.
pub const KILL_BY: &str = "LIMOSA_TEST_KILL_BY";

/// The names of those that were passed.
static PASSED: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn lock() -> MutexGuard<'static, Vec<String>> {
    PASSED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes a point, unless the process is to be killed there.
pub fn at(name: &str) {
    let number = {
        let mut passed = lock();
        passed.push(name.into());
        (passed.len() - 1).to_string()
    };
    let is_it = |variable| std::env::var(variable).is_ok_and(|kill| kill == name || kill == number);
    if is_it(KILL_AT) || is_it(KILL_BY) {
        kill_process(getpid(), Signal::KILL).expect("this process may be killed");
        unreachable!("the signal is taken before the call returns");
    }
}

/// How many were passed.
pub fn passed() -> usize {
    lock().len()
}

/// The number of the first with this name.
pub fn number_of(name: &str) -> Option<usize> {
    lock().iter().position(|passed| passed == name)
}

/// Makes a point of each event that this thread traces meanwhile, by its words.
pub fn within<R>(run: impl FnOnce() -> R) -> R {
    tracing::subscriber::with_default(Points, run)
}

struct Points;

impl Subscriber for Points {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut words = Words(String::new());
        event.record(&mut words);
        at(&words.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The words of an event.
struct Words(String);

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}
