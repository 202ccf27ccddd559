//! [`Report`]: the results of the suite, and its formats.

mod junit;
mod markdown;
mod table;
mod tap;

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use crate::check::{Family, Outcome};
use crate::clause::CLAUSES;
use crate::families;
use crate::survey::Facts;

/// One check, done.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    /// Its id.
    pub id: String,
    /// Its family.
    pub family: Family,
    /// Its clauses.
    pub clauses: Vec<String>,
    /// Its outcome.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The requests that led to a failure, one a line with its answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<String>,
    /// How long it took, in milliseconds; in JSON in nanoseconds.
    #[serde(rename = "duration_ns", serialize_with = "milliseconds_as_ns")]
    pub milliseconds: f64,
}

/// Seconds as whole nanoseconds.
pub(crate) fn seconds_as_ns<S: Serializer>(seconds: &f64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64((seconds * 1e9) as u64)
}

fn milliseconds_as_ns<S: Serializer>(milliseconds: &f64, to: S) -> Result<S::Ok, S::Error> {
    seconds_as_ns(&(milliseconds / 1e3), to)
}

/// The number of checks by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Passed.
    pub pass: usize,
    /// Failed.
    pub fail: usize,
    /// Skipped.
    pub skip: usize,
    /// Not run without `--destructive`.
    #[serde(rename = "unsafe")]
    pub not_safe: usize,
}

/// The results of the suite.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The suite and its version.
    pub suite: String,
    /// The device, as the user named it.
    pub device: String,
    /// Facts about the device.
    pub facts: Facts,
    /// The checks, in the order in which they ran.
    pub checks: Vec<Checked>,
    /// For each clause the checks that were selected for it.
    pub clauses: BTreeMap<String, Vec<String>>,
    /// How long it took, in seconds; in JSON in nanoseconds.
    #[serde(rename = "duration_ns", serialize_with = "seconds_as_ns")]
    pub seconds: f64,
    /// Why the suite ended before its last check, if it did.
    pub ended_early: Option<String>,
    /// The state in which the device was left.
    pub left_in: String,
}

impl Report {
    /// The number of checks by outcome.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for check in &self.checks {
            match check.outcome {
                Outcome::Pass => counts.pass += 1,
                Outcome::Fail(_) => counts.fail += 1,
                Outcome::Skip(_) => counts.skip += 1,
                Outcome::Unsafe => counts.not_safe += 1,
            }
        }
        counts
    }

    /// The checks that failed.
    pub fn failed(&self) -> impl Iterator<Item = &Checked> {
        self.checks.iter().filter(|check| matches!(check.outcome, Outcome::Fail(_)))
    }

    /// Whether a check of this clause passed or failed in this run.
    fn decides(&self, clause: &str) -> bool {
        self.checks.iter().any(|check| {
            check.clauses.iter().any(|cited| cited == clause)
                && matches!(check.outcome, Outcome::Pass | Outcome::Fail(_))
        })
    }

    /// The clauses for which no check passed or failed in this run, with the reason. Clauses of vfio-user are left out if no
    /// check of that family was run.
    pub fn unchecked_clauses(&self) -> Vec<(&'static str, String)> {
        let has_wire = self.checks.iter().any(|check| check.family == Family::VfioUser);
        let checks = families::checks();
        let is_of_wire = |id: &str| {
            let mut citing = checks.iter().filter(|check| check.clauses.contains(&id)).peekable();
            citing.peek().is_some() && citing.all(|check| check.family == Family::VfioUser)
        };
        let why = |id: &str| {
            let skipped = self.checks.iter().find(|check| check.clauses.iter().any(|cited| cited == id));
            skipped.map_or("no check of it was selected".into(), |check| check.outcome.detail().to_owned())
        };
        CLAUSES
            .iter()
            .filter(|clause| !self.decides(clause.id) && (has_wire || !is_of_wire(clause.id)))
            .map(|clause| match clause.unchecked {
                "" => (clause.id, why(clause.id)),
                reason => (clause.id, reason.to_owned()),
            })
            .collect()
    }
}

/// Text on one line.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
