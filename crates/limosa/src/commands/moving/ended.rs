//! The output and the exit code of a move that has ended.
//!
//! A failure after the commit (of `--on-start`, a report or standard output) does not undo the move. All such failures are
//! named in one message, with an exit code of their own.

use std::fmt;

use limosa_migrate::{Error, InDoubt, Loss, Made, Outcome, Report, SnapshotTarget, Unrecovered};
use limosa_protocol::State;

use crate::args;
use crate::exit::{self, Code};
use crate::guest::Guest;
use crate::log;
use crate::output::Output;
use crate::reports::Reports;
use crate::{terminal, text};

/// A message about devices that stay in STOP.
pub const STAYS_STOPPED: &str =
    "the devices stood in STOP before, and stay in STOP where they are now: nothing was started";

/// The kind of work of a command, as its messages name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Move,
    Save,
    Load,
}

impl Work {
    fn done(self) -> &'static str {
        match self {
            Work::Move => "moved",
            Work::Save => "saved",
            Work::Load => "loaded",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Work::Move => "move",
            Work::Save => "save",
            Work::Load => "load",
        }
    }
}

/// Where it is said how a move ended.
pub struct Ending<'a> {
    work: Work,
    out: &'a Output,
    reports: Reports<'a>,
}

impl<'a> Ending<'a> {
    /// Opens the files for the report.
    pub fn new(work: Work, reporting: &args::Reporting, out: &'a Output) -> anyhow::Result<Ending<'a>> {
        Ok(Ending { work, out, reports: Reports::open(reporting, out)? })
    }

    /// It went well; only what follows it may fail. `failures` is what has.
    pub fn done(&self, report: &Report, mut failures: Vec<String>) -> anyhow::Result<()> {
        let report = &with_origin(report);
        failures.extend(self.reports.write(report).err().map(|error| exit::message(&error)));
        let text = |to: &mut dyn std::io::Write| match terminal::output_columns() {
            // A picture that does not fit is cut.
            Some(columns) => write!(to, "{}", text::folded(&report.to_string(), columns)),
            None => write!(to, "{report}"),
        };
        // There is one document: the failure's where there is one.
        let printed = if failures.is_empty() { self.out.result(report, text) } else { self.out.text(text) };
        failures.extend(printed.err().map(|error| exit::message(&error)));
        match failures.is_empty() {
            true => Ok(()),
            false => Err(exit::reported(exit::but(self.work.done(), &failures), report)),
        }
    }

    /// Writes the report of a move that failed, and adds it to the error.
    pub fn failed(&self, report: &Report, error: anyhow::Error) -> anyhow::Error {
        let report = &with_origin(report);
        self.reports.write_failed(report);
        exit::reported(error, report)
    }

    /// The result of an ended move on the source.
    pub fn settled(&self, outcome: Outcome, guest: &Guest<'_>) -> anyhow::Result<()> {
        guest.forget(&outcome);
        match outcome {
            // After a save the guest runs on.
            Outcome::Moved(report) => self.done(&report, guest.failures()),
            Outcome::Undone { why, mut report } => {
                let failures = guest.failures();
                let is_whole = report.unrecovered.is_empty() && failures.is_empty();
                report.notes.extend(failures);
                report.notes.extend(guest.taken_back(&why));
                note_ways_back(&mut report);
                let notes = Notes(&report.notes).to_string();
                let source = match is_whole {
                    true => "the source is as it was before".to_owned(),
                    false => format!("the {} was undone, but not all is as it was before", self.work.name()),
                };
                let error = anyhow::Error::from(why).context(format!("{source}{notes}"));
                Err(self.failed(&report, error))
            }
            Outcome::InDoubt(doubt) => Err(self.in_doubt("the source", &doubt, guest)),
        }
    }

    /// It is not known here which side runs.
    pub fn in_doubt(&self, device: &str, doubt: &InDoubt, guest: &Guest<'_>) -> anyhow::Error {
        let processes = guest.what_stays_stopped();
        let error = exit::error(
            Code::InDoubt,
            format!(
                "{device} is stopped and in doubt: {}. The destination may run move {}; `limosa resolve` asks it again. \
                 Look there if nobody can answer (`limosa doctor DEVICE` says which move loaded a device): if it runs, leave this \
                 device stopped; only if it does not, and never will, set this one to RUNNING (`limosa resolve --decide` does either){processes}",
                doubt.why, doubt.id
            ),
        );
        self.failed(&doubt.report, error)
    }

    /// It is not known whether the snapshot is there.
    pub fn saved_in_doubt(
        &self,
        device: &str,
        place: &dyn SnapshotTarget,
        doubt: &InDoubt,
        guest: &Guest<'_>,
    ) -> anyhow::Error {
        let (place, processes) = (place.name(), guest.what_stays_stopped());
        let error = exit::error(
            Code::InDoubt,
            format!(
                "{device} is stopped and in doubt: {}. `limosa resolve {device}` looks again for the snapshot of move {}. \
                 If nothing answers, look yourself: if the snapshot is at {place}, or was, leave the guest stopped here \
                 (`limosa resolve --decide moved`); only if it is not, and never will be, let it run \
                 (`limosa resolve --decide undone`){processes}",
                doubt.why, doubt.id
            ),
        );
        self.failed(&doubt.report, error)
    }

    /// The devices were committed to this side, and do not run.
    pub fn broken(&self, device: &str, why: Error, report: &Report) -> anyhow::Error {
        let error = anyhow::Error::from(why).context(format!(
            "{device}: the {} was committed, but the device could neither be started nor stopped; reset it, or restart its \
             server, and start the guest anew",
            self.work.name()
        ));
        let error = match exit::code(&error) {
            // They would say that the source runs as before.
            Code::Failed | Code::Refused => exit::error(Code::DoneBut, exit::message(&error)),
            _ => error,
        };
        self.failed(report, error)
    }
}

/// The report with where, when and by what it was made.
fn with_origin(report: &Report) -> Report {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let mut report = report.clone();
    report.made = Some(Made {
        at: log::now(),
        host,
        version: concat!("limosa ", env!("CARGO_PKG_VERSION")).into(),
        command: words.collect::<Vec<_>>().join(" "),
    });
    report
}

/// Notes in a report what leads devices out of what the move has left them in, where it could not do so itself.
pub fn note_ways_back(report: &mut Report) {
    report.notes.extend(report.unrecovered.iter().filter_map(way_back));
}

/// The advice that brings back a device of a source, or empties one of a destination.
fn way_back(lost: &Unrecovered) -> Option<String> {
    let device = &lost.device;
    match lost.loss {
        Loss::StaysIn { found: State::Error, .. } => None,
        Loss::StaysIn { wanted, .. } => Some(format!("`limosa state {device} set {wanted}` brings it back")),
        Loss::NotReset => {
            Some(format!("if {device} answers again, `limosa state {device} reset` empties it"))
        }
        Loss::Unknown => Some(format!(
            "if {device} answers again, and is in neither RUNNING nor STOP, `limosa state {device} set RUNNING` brings it back"
        )),
        _ => None,
    }
}

/// The notes of the report of a move that failed.
pub struct Notes<'a>(pub &'a [String]);

impl fmt::Display for Notes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|note| write!(f, "; {note}"))
    }
}
