//! [`Suite`]: a run of the suite, and each check of it in a thread of its own.

use std::sync::Arc;
use std::time::Instant;

use limosa_client::{Error, Result};

use super::Limits;
use super::within::{Done, GRACE, within};
use crate::check::{Check, Needs, Outcome, Stop, Verdict};
use crate::recorder::{Record, Recorded};
use crate::report::Checked;
use crate::survey::{self, Facts};
use crate::target::Target;
use crate::trial::Trial;

/// A run: the device, as long as it answers, and why the run ended before its last check.
pub(super) struct Suite {
    pub(super) target: Arc<Target>,
    pub(super) limits: Limits,
    pub(super) until: Instant,
    pub(super) record: Arc<Record>,
    pub(super) device: Option<Arc<Recorded>>,
    /// How many checks in a row the device did not answer.
    pub(super) silent: u32,
    pub(super) ended: Option<End>,
}

/// The end of a run before its last check.
pub(super) struct End {
    pub(super) why: String,
}

impl Suite {
    pub(super) fn silence(&self, request: &str) -> Error {
        Error::Timeout {
            device: self.target.name.clone(),
            request: request.into(),
            limit: self.limits.check + GRACE,
        }
    }

    pub(super) fn survey(&mut self) -> Result<Arc<Facts>> {
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

    pub(super) fn check(&mut self, check: &Arc<Check>, facts: &Arc<Facts>, destructive: bool) -> Checked {
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
            // The check passed, but the device cannot be brought back from it.
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
                // The thread keeps the device: it is opened again, if possible.
                self.device = None;
                // The hanging thread keeps writing to the old record.
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

    /// Counts a check that got no answer; after several in a row the suite ends.
    pub(super) fn count_silence(&mut self, id: &str) {
        self.silent += 1;
        if self.silent >= self.limits.silent_max {
            let why = format!("the device has not answered in {} checks, {id} the last of them", self.silent);
            self.ended = Some(End { why });
        }
    }
}
