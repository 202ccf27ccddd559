//! What is printed of a move that has ended, and how the command ends with it.

use std::fmt;

use limosa_migrate::{Error, InDoubt, Outcome, Report};
use serde::Serialize;

use crate::exit::{self, Code};
use crate::guest::Guest;
use crate::output::Output;

#[derive(Serialize)]
struct Moved<'a> {
    outcome: &'a str,
    #[serde(flatten)]
    report: &'a Report,
}

pub fn print(out: &Output, outcome: &str, report: &Report) -> anyhow::Result<()> {
    out.result(&Moved { outcome, report }, |to| write!(to, "{report}"))
}

/// What an ended move gives.
pub fn settled(outcome: Outcome, guest: &Guest<'_>, out: &Output) -> anyhow::Result<()> {
    match outcome {
        // After a save the guest runs on.
        Outcome::Moved(report) => print(out, "moved", &report).and(started(guest)),
        Outcome::Undone { why, mut report } => {
            report.notes.extend(guest.failures());
            let notes = Notes(&report.notes).to_string();
            let source = match notes.as_str() {
                "" => "the source is as it was before",
                _ => "the move was undone, but not all is as it was before",
            };
            Err(anyhow::Error::from(why).context(format!("{source}{notes}")))
        }
        Outcome::InDoubt(doubt) => Err(in_doubt("the source", &doubt, guest)),
    }
}

/// Whether the guest goes on as asked where its devices do.
pub fn started(guest: &Guest<'_>) -> anyhow::Result<()> {
    match guest.failures().as_slice() {
        [] => Ok(()),
        failures => Err(exit::error(Code::Failed, failures.join("; "))),
    }
}

/// What a person should know of a move that failed.
pub struct Notes<'a>(pub &'a [String]);

impl fmt::Display for Notes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|note| write!(f, "; {note}"))
    }
}

pub fn in_doubt(device: &str, doubt: &InDoubt, guest: &Guest<'_>) -> anyhow::Error {
    let processes = guest.what_stays_stopped();
    exit::error(
        Code::InDoubt,
        format!(
            "{device} is stopped and in doubt: {}. The destination may run move {}; `limosa resolve` asks it again. \
             Look there if nobody can answer: if it runs, leave this device stopped; only if it does not, \
             and never will, set this one to RUNNING (`limosa resolve --decide` does either){processes}",
            doubt.why, doubt.id
        ),
    )
}

pub fn broken(device: &str, why: Error) -> anyhow::Error {
    anyhow::Error::from(why).context(format!(
        "{device}: the move was committed, but the device could neither be started nor stopped; reset it, or restart \
         its server, and start the guest anew"
    ))
}
