//! [`run`]: the checks one after the other, each within its limit, and the device brought back after each.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use limosa_client::{Device, DeviceExt, Error, Result};
use limosa_protocol::{Errno, State};

use crate::check::{Check, Family, Needs, Outcome, Stop, Verdict};
use crate::clause::coverage;
use crate::families;
use crate::recorder::{Record, Recorded};
use crate::report::{Checked, Report};
use crate::survey::{self, Facts};
use crate::target::Target;
use crate::trial::Trial;

/// Bounds of a run.
#[derive(Clone, Debug)]
pub struct Limits {
    /// How long one check may take. 10 s.
    pub check: Duration,
    /// How long the whole suite may take; what has not run by then is skipped. 10 minutes.
    pub suite: Duration,
    /// The most bytes that are read of one session. 1 GiB.
    pub state_bytes_max: u64,
    /// The largest state that is kept to be loaded again, in bytes. 64 MiB.
    pub sample_bytes_max: u64,
    /// After so many checks in a row without an answer the suite ends. 3.
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
    /// These checks, by id or the beginning of one that ends with a dot; all of them when empty.
    pub only: Vec<String>,
    /// Checks that may cost the device its state run too.
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
    let checks: Vec<_> =
        families::checks().into_iter().filter(|check| options.selects(check)).map(Arc::new).collect();
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

struct Suite {
    target: Arc<Target>,
    limits: Limits,
    until: Instant,
    record: Arc<Record>,
    device: Option<Arc<Recorded>>,
    /// How many checks in a row the device did not answer.
    silent: u32,
    ended: Option<End>,
}

struct End {
    why: String,
}

/// What became of work in a thread of its own.
#[derive(Debug)]
pub enum Done<T> {
    /// It ended with this.
    Value(T),
    /// It panicked, with this message.
    Panicked(String),
    /// It still waits for the device.
    Hangs,
}

/// Runs work that may wait for the device for ever. A thread that hangs is left behind.
pub fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Done<T> {
    let (send, receive) = mpsc::sync_channel(1);
    let run = move || {
        let done = catch_unwind(AssertUnwindSafe(work));
        // Nobody listens any more if it came too late.
        let _ = send.send(done);
    };
    if let Err(error) = std::thread::Builder::new().name("check".into()).spawn(run) {
        return Done::Panicked(format!("no thread for the check: {error}"));
    }
    match receive.recv_timeout(limit) {
        Ok(Ok(value)) => Done::Value(value),
        Ok(Err(panic)) => Done::Panicked(said(&*panic)),
        Err(_) => Done::Hangs,
    }
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".into())
}

/// What a thread may need beyond a check's own limit, to see that it has passed.
pub(crate) const GRACE: Duration = Duration::from_secs(2);

/// How long a server that has ended has to be started again by whoever supervises it, and how often it is looked for.
pub(crate) const RESTART: Duration = Duration::from_secs(2);
pub(crate) const RETRY: Duration = Duration::from_millis(20);

/// Whether an error says that nobody is there.
fn is_gone(error: &Error) -> bool {
    matches!(error, Error::Disconnected { .. } | Error::Os { errno: Errno::ENOENT | Errno::ECONNREFUSED, .. })
}

impl Suite {
    fn silence(&self, request: &str) -> Error {
        Error::Timeout {
            device: self.target.name.clone(),
            request: request.into(),
            limit: self.limits.check + GRACE,
        }
    }

    /// Opens the device again. A server that has ended with its client may be about to be started again.
    fn reopen(&mut self) -> Result<()> {
        let until = Instant::now() + RESTART.min(self.limits.check);
        loop {
            match self.open() {
                Err(error) if is_gone(&error) && Instant::now() < until => std::thread::sleep(RETRY),
                opened => return opened,
            }
        }
    }

    /// Opens the device.
    fn open(&mut self) -> Result<()> {
        self.device = None;
        let target = Arc::clone(&self.target);
        let opened = match within(self.limits.check + GRACE, move || (target.open)()) {
            Done::Value(opened) => opened?,
            Done::Panicked(what) => {
                return Err(Error::Misbehaved { device: self.target.name.clone(), what });
            }
            Done::Hangs => return Err(self.silence("opening")),
        };
        let record = Arc::clone(&self.record);
        self.device = Some(Arc::new(Recorded { device: opened, record, prefix: "" }));
        Ok(())
    }

    /// The device runs, or may be reset.
    fn begin(&mut self, destructive: bool) -> Result<()> {
        let Some(device) = self.device.clone() else { return Ok(()) };
        let asked = device.clone();
        match within(self.limits.check + GRACE, move || asked.state()) {
            Done::Value(Ok(State::Running)) => Ok(()),
            // It has no migration, or answers what a check has to judge.
            Done::Value(Err(Error::Refused { .. })) => Ok(()),
            Done::Value(Err(error)) => Err(error),
            Done::Value(Ok(state)) if destructive => {
                match within(self.limits.check + GRACE, move || device.reset()) {
                    Done::Value(Ok(())) => Ok(()),
                    Done::Value(Err(error)) => Err(error),
                    _ => Err(Error::Misbehaved {
                        device: self.target.name.clone(),
                        what: format!("it is in {state} and does not answer a reset"),
                    }),
                }
            }
            Done::Value(Ok(state)) => Err(Error::Usage {
                device: self.target.name.clone(),
                what: format!("it is in {state}, expected RUNNING; --destructive resets it"),
            }),
            Done::Panicked(what) => Err(Error::Misbehaved { device: self.target.name.clone(), what }),
            Done::Hangs => Err(self.silence("GET MIG_DEVICE_STATE")),
        }
    }

    fn survey(&mut self) -> Result<Arc<Facts>> {
        let Some(device) = self.device.clone() else { return Err(self.silence("the survey")) };
        let (target, limits) = (Arc::clone(&self.target), self.limits.clone());
        let until = Instant::now() + limits.check;
        let surveyed = device.clone();
        let facts = match within(self.limits.check + GRACE, move || {
            survey::survey(&*surveyed, &target, &limits, until)
        }) {
            Done::Value(facts) => facts?,
            Done::Panicked(what) => return Err(Error::Misbehaved { device: self.target.name.clone(), what }),
            Done::Hangs => {
                return Err(self.silence(&self.record.pending().unwrap_or_else(|| "a request".into())));
            }
        };
        let has_migration = facts.has.contains(Needs::MIGRATION);
        drop(device);
        self.restore(has_migration, facts.has.contains(Needs::LOGGING));
        Ok(Arc::new(facts))
    }

    fn check(&mut self, check: &Arc<Check>, facts: &Arc<Facts>, destructive: bool) -> Checked {
        let begun = Instant::now();
        self.record.clear();
        let mut ran = false;
        let outcome = match (facts.lacks(check.needs), &self.ended) {
            (Some(why), _) => Outcome::Skip(why.into()),
            (None, _) if check.destructive && !destructive => Outcome::Unsafe,
            (None, Some(end)) => Outcome::Skip(format!("the suite had ended: {}", end.why)),
            (None, None) if begun >= self.until => Outcome::Skip("the suite's time was up".into()),
            (None, None) => {
                ran = true;
                self.run_one(check, facts)
            }
        };
        let record = self.record.text();
        let mut outcome = outcome;
        if ran && self.ended.is_none() {
            self.restore(facts.has.contains(Needs::MIGRATION), facts.has.contains(Needs::LOGGING));
            // What the check did has no way back.
            if let (Some(end), Outcome::Pass) = (&self.ended, &outcome) {
                outcome = Outcome::Fail(end.why.clone());
            }
        }
        let requests = if matches!(outcome, Outcome::Fail(_)) { record } else { Vec::new() };
        Checked {
            id: check.id.to_string(),
            family: check.family,
            clauses: check.clauses.iter().map(ToString::to_string).collect(),
            outcome,
            requests,
            milliseconds: begun.elapsed().as_secs_f64() * 1e3,
        }
    }

    fn run_one(&mut self, check: &Arc<Check>, facts: &Arc<Facts>) -> Outcome {
        let is_raw = check.needs.contains(Needs::WIRE);
        if is_raw {
            // Most servers serve one client at a time.
            self.device = None;
        }
        if self.device.is_none()
            && !is_raw
            && let Err(error) = self.reopen()
        {
            self.ended = Some(End { why: format!("before {}: {error}", check.id) });
            return Outcome::Fail(format!("the device cannot be opened any more: {error}"));
        }
        let mut trial = Trial {
            device: self.device.clone(),
            facts: Arc::clone(facts),
            target: Arc::clone(&self.target),
            record: Arc::clone(&self.record),
            limits: self.limits.clone(),
            until: Instant::now() + self.limits.check,
        };
        let checked = Arc::clone(check);
        let done: Done<Verdict> = within(self.limits.check + GRACE, move || (checked.body)(&mut trial));
        match done {
            Done::Value(Ok(())) => {
                self.silent = 0;
                Outcome::Pass
            }
            Done::Value(Err(Stop::Skip(why))) => Outcome::Skip(why),
            Done::Value(Err(Stop::Fail(what))) => Outcome::Fail(what),
            Done::Panicked(what) => Outcome::Fail(format!("the check panicked: {what}")),
            Done::Hangs => {
                let request = self.record.pending().unwrap_or_else(|| "a request".into());
                let limit = self.limits.check + GRACE;
                let what = format!("no answer to `{request}` within {limit:?}");
                // The thread holds the device: it is opened anew, if it can be.
                self.device = None;
                // The thread that hangs goes on to write to the old record.
                let kept: Arc<Record> = Arc::default();
                for line in self.record.text() {
                    kept.note(&line, "");
                }
                self.record = kept;
                self.count_silence(&check.id);
                Outcome::Fail(what)
            }
        }
    }

    /// Counts a check that had no answer; after several in a row the suite ends.
    fn count_silence(&mut self, id: &str) {
        self.silent += 1;
        if self.silent >= self.limits.silent_max {
            let why = format!("the device has not answered in {} checks, {id} the last of them", self.silent);
            self.ended = Some(End { why });
        }
    }

    /// Brings the device back to RUNNING: by arcs, by a reset, opened anew and by a reset. A suite whose device cannot be
    /// brought back ends.
    fn restore(&mut self, has_migration: bool, has_logging: bool) {
        for attempt in 0..2 {
            if self.device.is_none()
                && let Err(error) = self.reopen()
            {
                self.ended = Some(End { why: format!("the device cannot be opened any more: {error}") });
                return;
            }
            let Some(device) = self.device.clone() else { return };
            let restored =
                within(self.limits.check + GRACE, move || back(&*device, has_migration, has_logging));
            match restored {
                Done::Value(Ok(())) => return,
                Done::Value(Err(error)) if attempt > 0 => {
                    self.ended =
                        Some(End { why: format!("the device cannot be brought back to RUNNING: {error}") });
                    return;
                }
                Done::Value(Err(error)) if error.is_connection_lost() => {
                    if matches!(error, Error::Timeout { .. }) {
                        self.count_silence("bringing it back");
                    }
                    self.device = None;
                }
                Done::Value(Err(_)) | Done::Panicked(_) => self.device = None,
                Done::Hangs => {
                    self.device = None;
                    self.count_silence("bringing it back");
                }
            }
            if self.device.is_none()
                && let Err(error) = self.reopen()
            {
                self.ended = Some(End { why: format!("the device cannot be opened any more: {error}") });
                return;
            }
        }
        self.ended.get_or_insert(End { why: "the device cannot be brought back to RUNNING".into() });
    }

    /// Gives the device its state back, and says in which state of the machine it is left.
    fn leave(&mut self, facts: &Arc<Facts>, destructive: bool) -> String {
        if self.device.is_none() && self.reopen().is_err() {
            return "unknown: it cannot be opened any more".into();
        }
        let Some(device) = self.device.take() else { return "unknown".into() };
        if !facts.has.contains(Needs::MIGRATION) {
            return "it has no migration state".into();
        }
        let sample = facts.sample.clone().filter(|_| destructive && self.ended.is_none());
        let left = within(self.limits.check + GRACE, move || {
            let mut note = "";
            if let Some(sample) = sample {
                let loaded = (|| -> Result<()> {
                    if let Some(mut stream) = device.set_state(State::Resuming)? {
                        stream.write(&sample)?;
                    }
                    device.set_state(State::Running).map(drop)
                })();
                if loaded.is_err() {
                    note = ", reset: its state could not be given back";
                    let _ = device.reset();
                }
            }
            device.state().map(|state| format!("{state}{note}"))
        });
        match left {
            Done::Value(Ok(state)) => state,
            Done::Value(Err(error)) => format!("unknown: {error}"),
            Done::Panicked(what) => format!("unknown: {what}"),
            Done::Hangs => "unknown: it does not answer".into(),
        }
    }
}

/// Logging off and RUNNING, whatever came before: by arcs, else by a reset.
pub fn back(device: &dyn Device, has_migration: bool, has_logging: bool) -> Result<()> {
    if has_logging {
        match device.dma_logging_stop() {
            // It is off.
            Ok(()) | Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    if !has_migration {
        return Ok(());
    }
    match device.state() {
        Ok(State::Running) => return Ok(()),
        Ok(_) | Err(Error::Refused { .. }) => {}
        Err(error) => return Err(error),
    }
    match device.set_state(State::Running) {
        Ok(_) if device.state()? == State::Running => return Ok(()),
        Ok(_) | Err(Error::Refused { .. }) => {}
        Err(error) => return Err(error),
    }
    device.reset()?;
    match device.state()? {
        State::Running => Ok(()),
        state => Err(Error::Misbehaved {
            device: device.name().into(),
            what: format!("it is in {state} after a reset, expected RUNNING"),
        }),
    }
}
