//! [`run`]: runs the checks one after the other, each within its limit, and returns the device to RUNNING after each.

mod recovery;
mod suite;
mod within;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use limosa_client::Result;

use crate::check::{Check, Family};
use crate::clause::coverage;
use crate::families;
use crate::report::{Checked, Report};
use crate::target::{Target, Transport};
pub use recovery::back;
pub(crate) use recovery::{RESTART, RETRY};
use suite::{End, Suite};
pub(crate) use within::GRACE;
pub use within::{Done, within};

/// Bounds of a run.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How long one check may take. 10 s.
    pub check: Duration,
    /// Time limit for the whole suite; remaining checks are skipped. Default 10 minutes.
    pub suite: Duration,
    /// The most bytes that are read of one session. 1 GiB.
    pub state_bytes_max: u64,
    /// The largest state that is kept to be loaded again, in bytes. 64 MiB.
    pub sample_bytes_max: u64,
    /// The suite ends after this number of checks in a row without an answer. 3.
    pub silent_max: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            check: Duration::from_secs(10),
            suite: Duration::from_secs(600),
            state_bytes_max: 1 << 30,
            sample_bytes_max: 64 << 20,
            silent_max: 3,
        }
    }
}

/// Which checks run, and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// These families; all of them when empty.
    pub families: Vec<Family>,
    /// These checks, by id or by a prefix that ends with a dot; all of them if empty.
    pub only: Vec<String>,
    /// Whether checks that may destroy the device's state run too.
    pub destructive: bool,
    /// The bounds.
    pub limits: Limits,
    /// Set by the caller to end the suite before its next check.
    pub cancel: Option<Arc<AtomicBool>>,
}

impl Options {
    /// Whether a check is to run.
    pub fn selects(&self, check: &Check) -> bool {
        let named =
            |name: &String| check.id == name.as_str() || (name.ends_with('.') && check.id.starts_with(name));
        (self.families.is_empty() || self.families.contains(&check.family))
            && (self.only.is_empty() || self.only.iter().any(named))
    }

    /// The same for a device with this transport: on a kernel device the family vfio-user runs only if it is asked for.
    fn selects_on(&self, check: &Check, transport: Transport) -> bool {
        let is_named = !self.families.is_empty() || !self.only.is_empty();
        self.selects(check)
            && (is_named || check.family != Family::VfioUser || transport == Transport::VfioUser)
    }

    /// Whether any of these is to run.
    pub fn selects_any(&self, checks: &[Check]) -> bool {
        checks.iter().any(|check| self.selects(check))
    }
}

/// Runs the suite. `progress` is called after each check.
///
/// An error only where the device cannot be opened, or is not in RUNNING and may not be reset: then nothing was checked.
pub fn run(target: &Target, options: &Options, mut progress: impl FnMut(&Checked)) -> Result<Report> {
    let begun = Instant::now();
    let mut suite = Suite {
        target: Arc::new(target.clone()),
        limits: options.limits.clone(),
        until: begun + options.limits.suite,
        record: Arc::default(),
        device: None,
        silent: 0,
        ended: None,
    };
    suite.open()?;
    suite.begin(options.destructive)?;
    let facts = suite.survey()?;
    let checks: Vec<_> = families::checks()
        .into_iter()
        .filter(|check| options.selects_on(check, target.transport))
        .map(Arc::new)
        .collect();
    let mut done = Vec::new();
    for check in &checks {
        if options.cancel.as_ref().is_some_and(|cancel| cancel.load(Ordering::Relaxed)) {
            suite.ended.get_or_insert(End { why: "it was called off".into() });
        }
        let checked = suite.check(check, &facts, options.destructive);
        progress(&checked);
        done.push(checked);
    }
    let left = suite.leave(&facts, options.destructive);
    Ok(Report {
        suite: format!("limosa-check {}", env!("CARGO_PKG_VERSION")),
        device: target.name.clone(),
        facts: (*facts).clone(),
        checks: done,
        clauses: coverage(&checks.iter().map(|check| &**check).collect::<Vec<_>>()),
        seconds: begun.elapsed().as_secs_f64(),
        ended_early: suite.ended.map(|end| end.why),
        left_in: left,
    })
}
