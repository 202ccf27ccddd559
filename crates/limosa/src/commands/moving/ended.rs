//! What is printed of a move that has ended, and how the command ends with it.

use std::fmt;

use limosa_migrate::{Error, InDoubt, Outcome, Report, SnapshotTarget};

use crate::args;
use crate::exit::{self, Code};
use crate::guest::Guest;
use crate::output::Output;
use crate::reports::Reports;

/// Where it is said how a move ended.
pub struct Ending<'a> {
    out: &'a Output,
    reports: Reports,
}

impl<'a> Ending<'a> {
    /// Opens the files for the report.
    pub fn new(reporting: &args::Reporting, out: &'a Output) -> anyhow::Result<Ending<'a>> {
        Ok(Ending { out, reports: Reports::open(reporting)? })
    }

    /// It went well.
    pub fn print(&self, report: &Report) -> anyhow::Result<()> {
        self.out.result(report, |to| write!(to, "{report}"))?;
        self.reports.write(report)
    }

    /// It did not; the error is said by who ends the command.
    pub fn failed(&self, report: &Report) {
        self.reports.write_failed(report);
    }

    /// What an ended move gives on the source.
    pub fn settled(&self, outcome: Outcome, guest: &Guest<'_>) -> anyhow::Result<()> {
        guest.forget(&outcome);
        match outcome {
            // After a save the guest runs on.
            Outcome::Moved(report) => self.print(&report).and(started(guest)),
            Outcome::Undone { why, mut report } => {
                let failures = guest.failures();
                let is_whole = report.unrecovered.is_empty() && failures.is_empty();
                report.notes.extend(failures);
                self.failed(&report);
                let notes = Notes(&report.notes).to_string();
                let source = match is_whole {
                    true => "the source is as it was before",
                    false => "the move was undone, but not all is as it was before",
                };
                Err(anyhow::Error::from(why).context(format!("{source}{notes}")))
            }
            Outcome::InDoubt(doubt) => Err(self.in_doubt("the source", &doubt, guest)),
        }
    }

    /// Nobody here knows who runs.
    pub fn in_doubt(&self, device: &str, doubt: &InDoubt, guest: &Guest<'_>) -> anyhow::Error {
        self.failed(&doubt.report);
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

    /// It is not known whether the snapshot is there.
    pub fn saved_in_doubt(
        &self,
        device: &str,
        place: &dyn SnapshotTarget,
        doubt: &InDoubt,
        guest: &Guest<'_>,
    ) -> anyhow::Error {
        self.failed(&doubt.report);
        let (place, processes) = (place.name(), guest.what_stays_stopped());
        exit::error(
            Code::InDoubt,
            format!(
                "{device} is stopped and in doubt: {}. `limosa resolve {device}` looks again for the snapshot of move {}. \
                 If nothing answers, look yourself: if the snapshot is at {place}, or was, leave the guest stopped here \
                 (`limosa resolve --decide moved`); only if it is not, and never will be, let it run \
                 (`limosa resolve --decide undone`){processes}",
                doubt.why, doubt.id
            ),
        )
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

pub fn broken(device: &str, why: Error) -> anyhow::Error {
    anyhow::Error::from(why).context(format!(
        "{device}: the move was committed, but the device could neither be started nor stopped; reset it, or restart \
         its server, and start the guest anew"
    ))
}
