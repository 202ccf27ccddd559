//! `limosa resolve`: asks how a move or a save in doubt ended, and acts on the answer. A guest that a process of the
//! command left stopped before any commit goes on.

use std::path::Path;

use limosa_client::DeviceExt;
use limosa_migrate::{Decision, InDoubt, MovedDevice, Options, Outcome, Source, published};
use limosa_protocol::State;
use limosa_stream::MigrationId;
use serde::Serialize;

use crate::args;
use crate::exit::{self, Code};
use crate::guest::Guest;
use crate::links::{self, Links};
use crate::moves::{Doubt, Halted, Moves, Note, Taken};
use crate::noted_devices::NotedDevices;
use crate::open::Opening;
use crate::output::{Output, plain};
use crate::snapshot_location::SnapshotLocation;
use crate::wrong_socket;

#[derive(Serialize)]
struct Resolved<'a> {
    devices: &'a [String],
    id: String,
    outcome: &'static str,
    /// The steps that failed and are left to do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left: Vec<String>,
}

pub fn resolve(args: &args::Resolve, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    let moves = Moves::new(args.moves.folder.as_deref());
    if args.device.is_none() && args.id.is_none() {
        return super::doubts::list(&moves, out);
    }
    let found = find(args, &moves)?;
    let id: MigrationId = match (&args.id, &found) {
        (Some(id), _) => {
            id.parse().map_err(|error| exit::error(Code::Usage, format!("--id {id}: {error}")))?
        }
        (None, Some(note)) => parsed(note)?,
        (None, None) => {
            let name = args.device.as_deref().unwrap_or_default();
            // A device that cannot be opened has nothing to say of it.
            if let Some(why) = opening.open(name).ok().and_then(|device| device.why_it_stays(&moves)) {
                return Err(exit::error(Code::Refused, why));
            }
            let what = format!(
                "{name}: no move of this device is noted as in doubt; `limosa resolve` lists those that are, and --id names \
                 one that is not. If a killed command has left it in another state than RUNNING, `limosa doctor {name}` says \
                 what leads out of it"
            );
            return Err(exit::error(Code::Refused, what));
        }
    };
    if args.forget {
        return forget(id, found, &moves, out);
    }
    let taken = found.map(|note| moves.take(note)).transpose()?;
    let halted = match (&taken, &args.device) {
        (Some(taken), _) => taken.note().halted().clone(),
        (None, Some(name)) => Halted::of_one(name)?,
        (None, None) => {
            let what = format!("--id {id}: this move is not noted as in doubt; expected the device as well");
            return Err(exit::error(Code::Refused, what));
        }
    };
    let note = taken.as_ref().map(Taken::note);
    let settling = Settling { args, opening, id, note, halted: &halted, moves: &moves };
    let decision = settling.decision()?;
    if decision != Decision::Committed {
        settling.check_not_moved_since()?;
    }
    let guest = Guest::stopped_before(&halted.stopped, args.on_resume.as_deref());
    let done = settling.act(decision, &guest)?;
    // After a move its processes stay stopped.
    let stays_stopped = decision != Decision::Committed && guest.stays_stopped();
    let (is_settled, failures) = (done.left.is_empty() && !stays_stopped, guest.failures());
    if let Some(taken) = taken.filter(|_| is_settled) {
        warn_of_command(taken.note(), decision, args);
        if let Some(doubt) = taken.note().doubt() {
            if decision == Decision::Committed {
                moves.remember(&doubt.moved());
            }
            moves.settled(doubt, decision);
        }
        taken.forget()?;
    }
    let failed = match (done.left.is_empty(), failures.is_empty()) {
        (true, true) => None,
        (true, false) => Some(exit::error(Code::Failed, failures.join("; "))),
        (false, _) => {
            let left = [done.left.clone(), failures].concat().join("; ");
            let what = format!(
                "move {id}: {}, but not all of it: {left}. It stays noted: resolve it again, or drop the note with \
                 `limosa resolve --id {id} --forget`",
                done.outcome
            );
            Some(exit::error(done.code, what))
        }
    };
    print(id, &halted, &done, failed, out)
}

/// The note that is meant: of this id, or the last one of this device.
fn find(args: &args::Resolve, moves: &Moves) -> anyhow::Result<Option<Note>> {
    let mut notes = moves.notes()?.into_all();
    notes.retain(|note| match (&args.id, &args.device) {
        (Some(id), _) => note.id() == id.to_lowercase(),
        (None, Some(name)) => note.halted().is_of(name),
        (None, None) => false,
    });
    let Some(note) = notes.pop() else { return Ok(None) };
    if let Some(name) = args.device.as_ref().filter(|name| !note.halted().is_of(name)) {
        let (id, names) = (note.id(), note.halted().names());
        let what = format!("{name}: move {id} is of {names}; expected one of these");
        return Err(exit::error(Code::Usage, what));
    }
    Ok(Some(note))
}

fn parsed(note: &Note) -> anyhow::Result<MigrationId> {
    let id = note.id();
    id.parse().map_err(|error| exit::error(Code::Damaged, format!("the note of move `{id}`: {error}")))
}

/// A move that is being settled.
struct Settling<'a> {
    args: &'a args::Resolve,
    opening: Opening<'a>,
    id: MigrationId,
    note: Option<&'a Note>,
    halted: &'a Halted,
    moves: &'a Moves,
}

/// The steps that were done, and those that failed.
struct Done {
    outcome: &'static str,
    devices: NotedDevices,
    left: Vec<String>,
    code: Code,
}

impl Settling<'_> {
    /// How the move ended: as the user says, or as the other side answers.
    fn decision(&self) -> anyhow::Result<Decision> {
        let Settling { args, id, .. } = self;
        match (self.note, args.decide) {
            (Some(Note::Stop(_)), Some(args::Decided::Moved)) => {
                let what = format!("move {id} never came to its commit: it can only be undone");
                Err(exit::error(Code::Usage, what))
            }
            (Some(Note::Stop(_)), _) if args.to.is_some() => {
                let what =
                    format!("move {id} never came to its commit, and nobody need be asked; expected no --to");
                Err(exit::error(Code::Usage, what))
            }
            (Some(Note::Stop(_)), _) => Ok(Decision::NotCommitted),
            (_, Some(decided)) => Ok(decided.into()),
            (Some(Note::Doubt(doubt)), None) if doubt.saved => self.look(doubt),
            (Some(Note::Doubt(doubt)), None) if doubt.here => Err(self.unknown(&format!(
                "it went to {} on this machine, in the same process, and nobody can be asked",
                doubt.to
            ))),
            (note, None) => self.ask(note.and_then(Note::doubt)),
        }
    }

    /// Looks for the snapshot of a save.
    fn look(&self, doubt: &Doubt) -> anyhow::Result<Decision> {
        let Settling { id, .. } = self;
        let place = &doubt.to;
        if self.args.to.is_some() {
            let what =
                format!("move {id} was saved to {place}, and no destination can be asked; expected no --to");
            return Err(exit::error(Code::Usage, what));
        }
        let found = SnapshotLocation::noted(Path::new(place))?;
        let why = match published(found.source(), *id, Options::default().silence_max, None) {
            Ok(Decision::Unknown) => String::new(),
            Ok(decision) => return Ok(decision),
            Err(why) => format!(" ({why})"),
        };
        let message = format!(
            "{} stays stopped and in doubt: it is not certain whether its snapshot is at {place}{why}. Look with \
             `limosa verify {place}` for move {id}: if it is there, or was, decide with `--decide moved`; if it is \
             not and never will be, with `--decide undone`",
            self.halted.names()
        );
        Err(exit::error(Code::InDoubt, message))
    }

    /// Asks the destination. No device is touched by that.
    fn ask(&self, doubt: Option<&Doubt>) -> anyhow::Result<Decision> {
        let Settling { args, id, .. } = self;
        let name = self.halted.names();
        let Some(to) = args.to.as_ref().or(doubt.map(|doubt| &doubt.to)) else {
            return Err(exit::error(Code::Usage, format!("{name}: expected --to, where its destination is")));
        };
        let address = links::address(to)?;
        let options = Options::default().with_unauthenticated_peers(args.tls.insecure);
        if args.tls.tls_ca.is_none() && doubt.is_some_and(|doubt| doubt.tls) {
            let what = format!("move {id} went over TLS, and {to} is to be asked so");
            return Err(exit::error(
                Code::Usage,
                format!("{name}: {what}; expected --tls-ca, --tls-cert and --tls-key as for the send"),
            ));
        }
        let links = Links::to(&address, &args.tls, self.opening.servers)?;
        let hint = "`limosa answer` there answers for a `limosa receive` that has ended";
        let link = links::connect(&links.connector(&address), options.silence_max, None, hint)?;
        let commit = Doubt::commit(*id, doubt);
        match Source::new(&[], &options).resolve(InDoubt::recover(commit), &link) {
            Outcome::Moved(_) => Ok(Decision::Committed),
            Outcome::Undone { .. } => Ok(Decision::NotCommitted),
            Outcome::InDoubt(doubt) => Err(match doubt.why {
                limosa_migrate::Error::NotKnown { .. } => {
                    self.unknown("its destination does not know either")
                }
                why => {
                    let other = wrong_socket::not_a_receiver(&address).filter(|_| !links.are_tls());
                    self.unknown(&other.map_or(why.to_string(), |what| format!("{address}: {what}")))
                }
            }),
        }
    }

    fn unknown(&self, what: &str) -> anyhow::Error {
        let (name, id) = (self.halted.names(), self.id);
        let message = format!(
            "{name} stays stopped and in doubt: {what}. Look at the destination of move {id}, where `limosa doctor DEVICE` \
             says which move loaded a device: if the guest runs there, or did, decide it with `--decide moved`; if it does not and never will, with `--decide undone`"
        );
        exit::error(Code::InDoubt, message)
    }

    /// Stops the devices for good, or lets them and the guest go on. A device that is gone holds up no other one.
    fn act(&self, decision: Decision, guest: &Guest<'_>) -> anyhow::Result<Done> {
        let devices = NotedDevices::open(self.opening, self.halted, self.args.device.as_deref());
        self.check_states(decision, &devices)?;
        let is_undone = decision != Decision::Committed;
        for (_, device) in devices.open.iter().filter(|_| is_undone) {
            device.release(self.id)?;
        }
        let moved: Vec<_> = devices.open.iter().map(|(_, device)| MovedDevice::new(&**device)).collect();
        let found = devices.open.iter().map(|(at, _)| self.halted.known(*at).found()).collect();
        let doubt = InDoubt::recover(self.id).with_found(found);
        let options = Options::default();
        let source = Source::new(&moved, &options).with_vmm(guest);
        let (outcome, report) = match source.decide(decision, doubt) {
            Outcome::Moved(report) => ("moved", report),
            Outcome::Undone { report, .. } => ("undone", report),
            Outcome::InDoubt(doubt) => return Err(doubt.why.into()),
        };
        drop(moved);
        for (_, device) in devices.open.iter().filter(|(_, device)| is_undone && device.closes_with_us()) {
            tracing::warn!(
                "{}: the kernel closed it with the process that moved it, and may have reset it: see whether it is what its \
                 guest believes",
                device.given()
            );
        }
        let mut left: Vec<String> = report.notes;
        let mut code = Code::Failed;
        for (at, why) in &devices.gone {
            let name = &self.halted.devices[*at];
            match decision {
                // It cannot run the guest any more, which is all that is wanted.
                Decision::Committed => tracing::warn!("{name}: {why}; it must not run this guest again"),
                _ => left.push(format!("{name}: {why}, and what it held is lost")),
            }
        }
        for (at, error) in &devices.unreachable {
            code = exit::code(error);
            left.push(format!("{}: {}", self.halted.devices[*at], exit::message(error)));
        }
        Ok(Done { outcome, devices, left, code })
    }

    /// Refuses to let a guest run here that has moved away since: its device was set to RUNNING by hand, and another move has
    /// taken the guest away.
    fn check_not_moved_since(&self) -> anyhow::Result<()> {
        let id = self.id.to_string();
        for name in &self.halted.devices {
            let Some(later) = self.moves.last(name) else { continue };
            if later.id == id || later.halted.is_before(self.halted) {
                continue;
            }
            let how = if later.saved { "was saved to" } else { "went to" };
            let (other, to) = (later.id, later.to);
            let what = format!(
                "{name}: its guest was let run here after move {id}, and its later move {other} {how} {to}: to let it run here again \
                 would run it twice. Nothing is changed; drop the note with `limosa resolve --id {id} --forget`"
            );
            return Err(exit::error(Code::Refused, what));
        }
        Ok(())
    }

    /// Refuses devices in a state in which the move cannot have left them: another client has driven them since.
    fn check_states(&self, decision: Decision, devices: &NotedDevices) -> anyhow::Result<()> {
        let is_stop = matches!(self.note, Some(Note::Stop(_)));
        let mut wrong = Vec::new();
        for (at, device) in &devices.open {
            // The kernel has reset a device that was closed with the process that moved it.
            if device.closes_with_us() {
                continue;
            }
            // A device that does not return its state is driven anyway, and an error of that is reported.
            let Ok(state) = device.state() else { continue };
            let may_be = match state {
                State::Stop | State::StopCopy | State::Error => true,
                // An undo that was interrupted.
                State::Running | State::RunningP2p => decision == Decision::NotCommitted,
                State::PreCopy | State::PreCopyP2p => is_stop,
                _ => false,
            };
            if !may_be {
                wrong.push(format!("{} is in {state}", self.halted.devices[*at]));
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        let id = self.id;
        let what = format!(
            "{}: move {id} cannot have left it so, and nothing is changed. It was reset or driven since, or another \
             move is on its way: look which guest it runs, and drop the note with `limosa resolve --id {id} --forget`",
            wrong.join("; ")
        );
        Err(exit::error(Code::Refused, what))
    }
}

/// Prints the steps that were done, with the failure if there is one.
fn print(
    id: MigrationId,
    halted: &Halted,
    done: &Done,
    failed: Option<anyhow::Error>,
    out: &Output,
) -> anyhow::Result<()> {
    let Done { outcome, devices, left, .. } = done;
    let result = Resolved { devices: &halted.devices, id: id.to_string(), outcome, left: left.clone() };
    let text = |to: &mut dyn std::io::Write| {
        if halted.devices.is_empty() {
            return writeln!(to, "{}: {outcome}", halted.names());
        }
        halted.devices.iter().enumerate().try_for_each(|(at, name)| {
            let now = match *outcome {
                _ if devices.gone.iter().any(|gone| gone.0 == at) => "gone",
                _ if devices.unreachable.iter().any(|other| other.0 == at) => "not reached",
                "undone" => "as before the move",
                _ => "stopped",
            };
            writeln!(to, "{name}: {outcome}; it is {now}")
        })
    };
    let printed = if failed.is_some() { out.text(text) } else { out.result(&result, text) };
    match (failed, printed) {
        (Some(error), _) => Err(exit::reported(error, &result)),
        (None, printed) => {
            printed.map_err(|error| exit::but(format_args!("move {id}: {outcome}"), &[exit::message(&error)]))
        }
    }
}

/// Only its user knows how to undo a command that has stopped the guest.
fn warn_of_command(note: &Note, decision: Decision, args: &args::Resolve) {
    if decision == Decision::NotCommitted
        && args.on_resume.is_none()
        && let Some(on_stop) = &note.halted().on_stop
    {
        let on_stop = plain(on_stop);
        tracing::warn!(
            "the guest was stopped by `{on_stop}`: let it go on, which --on-resume would have done"
        );
    }
}

#[derive(Serialize)]
struct Forgotten {
    id: String,
    outcome: &'static str,
}

/// Drops a note, and does nothing else.
fn forget(id: MigrationId, found: Option<Note>, moves: &Moves, out: &Output) -> anyhow::Result<()> {
    match found {
        Some(note) => moves.take(note)?.forget()?,
        // A note that is not trusted, or cannot be read.
        None if moves.drop_note(id)? => {}
        None => {
            let what = format!("--id {id}: there is no note of this move");
            return Err(exit::error(Code::Refused, what));
        }
    }
    out.result(&Forgotten { id: id.to_string(), outcome: "forgotten" }, |to| {
        writeln!(to, "{id}: forgotten; nothing was asked, and nothing else was changed")
    })
}

impl From<args::Decided> for Decision {
    fn from(decided: args::Decided) -> Decision {
        match decided {
            args::Decided::Moved => Decision::Committed,
            args::Decided::Undone => Decision::NotCommitted,
        }
    }
}
