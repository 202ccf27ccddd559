//! `limosa resolve`, on the side of a source that is in doubt of a move or of a save, and `limosa answer`, on the side of
//! a destination whose process has ended.

use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use limosa_migrate::Incoming;
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{Decision, InDoubt, Options, Outcome, Received, Source, published};
use limosa_stream::MigrationId;
use serde::Serialize;

use super::moving;
use crate::args;
use crate::exit::{self, Code};
use crate::guest::Guest;
use crate::links::{self, Links};
use crate::moves::{Doubt, Moves, Refused};
use crate::open::{self, Opening};
use crate::output::Output;
use crate::place::Place;
use crate::side::Side;

/// What `limosa resolve` without a device prints.
#[derive(Serialize)]
struct Doubts {
    in_doubt: Vec<Doubt>,
    /// Notes that are not believed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refused: Vec<Refused>,
}

#[derive(Serialize)]
struct Resolved<'a> {
    devices: &'a [&'a str],
    id: String,
    outcome: &'static str,
}

#[derive(Serialize)]
struct Answered {
    id: String,
    outcome: &'static str,
}

pub fn resolve(args: &args::Resolve, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    let moves = Moves::new(args.moves.folder.as_deref());
    if args.device.is_none() && args.id.is_none() {
        return list(&moves, out);
    }
    let noted = moves.notes()?.doubts.into_iter().rev().find(|doubt| match (&args.id, &args.device) {
        (Some(id), _) => doubt.id == *id,
        (None, Some(name)) => is_of(doubt, name),
        (None, None) => false,
    });
    let id: MigrationId = match (&args.id, &noted) {
        (Some(id), _) => {
            id.parse().map_err(|error| exit::error(Code::Usage, format!("--id {id}: {error}")))?
        }
        (None, Some(noted)) => noted.id()?,
        (None, None) => {
            let what = format!(
                "{}: no move of this device is noted as in doubt; `limosa resolve` lists those that are, and --id names \
                 one that is not",
                args.device.as_deref().unwrap_or_default()
            );
            return Err(exit::error(Code::Refused, what));
        }
    };
    // All of them moved as one, and only together they stop or go on.
    let names = match (&noted, &args.device) {
        (Some(noted), _) => noted.devices.iter().map(String::as_str).collect(),
        (None, Some(name)) => vec![name.as_str()],
        (None, None) => {
            let what = format!("--id {id}: this move is not noted as in doubt; expected the device as well");
            return Err(exit::error(Code::Refused, what));
        }
    };
    if let Some(name) = &args.device
        && !names.iter().any(|other| *other == name || open::same(other, name))
    {
        let what = format!("{name}: move {id} is of {}; expected one of these", names.join(", "));
        return Err(exit::error(Code::Usage, what));
    }
    let is_saved = noted.as_ref().is_some_and(|noted| noted.saved);
    let saved_to = noted.as_ref().map(|noted| noted.to.clone()).unwrap_or_default();
    if is_saved && args.to.is_some() {
        let what =
            format!("move {id} was saved to {saved_to}, and no destination can be asked; expected no --to");
        return Err(exit::error(Code::Usage, what));
    }
    let stopped = noted.as_ref().map_or(&[][..], |noted| &noted.stopped);
    let guest = Guest::stopped_before(stopped, args.on_resume.as_deref());
    let side = Side::moved_before(opening, &names)?;
    let name = side.name();
    let mut doubt = InDoubt::recover(id);
    let outcome = match args.decide {
        Some(decision) => with(&side, &guest, |source| source.decide(decision.into(), doubt)),
        None if is_saved => {
            let place = Place::new(Path::new(&saved_to), false)?;
            match published(place.source(), id, Options::default().silence_max, None) {
                Ok(decision) => with(&side, &guest, |source| source.decide(decision, doubt)),
                Err(why) => {
                    doubt.why = why;
                    Outcome::InDoubt(doubt)
                }
            }
        }
        None => {
            let Some(to) = args.to.as_ref().or(noted.as_ref().map(|noted| &noted.to)) else {
                return Err(exit::error(
                    Code::Usage,
                    format!("{name}: expected --to, where its destination is"),
                ));
            };
            let address = links::address(to)?;
            let options = Options::default();
            let links = Links::to(&address, &args.tls, opening.servers)?;
            if !links.are_tls() && noted.as_ref().is_some_and(|noted| noted.tls) {
                let what = format!("move {id} went over TLS, and {to} is to be asked so");
                return Err(exit::error(
                    Code::Usage,
                    format!("{name}: {what}; expected --tls-ca, --tls-cert and --tls-key as for the send"),
                ));
            }
            let hint = "`limosa answer` there answers for a `limosa receive` that has ended";
            let link = links::connect(&links.connector(&address), options.silence_max, None, hint)?;
            with(&side, &guest, |source| source.resolve(doubt, &link))
        }
    };
    let (outcome, report) = match outcome {
        Outcome::Moved(report) => ("moved", report),
        Outcome::Undone { report, .. } => ("undone", report),
        Outcome::InDoubt(doubt) if is_saved => {
            let why = match doubt.why {
                limosa_migrate::Error::StartedAnew => String::new(),
                why => format!(" ({why})"),
            };
            let message = format!(
                "{name} stays stopped and in doubt: it is not certain whether its snapshot is at {saved_to}{why}. Look with \
                 `limosa verify {saved_to}` for move {id}: if it is there, or was, decide with `--decide moved`; if it is \
                 not and never will be, with `--decide undone`"
            );
            return Err(exit::error(Code::InDoubt, message));
        }
        Outcome::InDoubt(doubt) => {
            let what = match doubt.why {
                limosa_migrate::Error::StartedAnew => "its destination does not know either".to_owned(),
                why => why.to_string(),
            };
            let message = format!(
                "{name} stays stopped and in doubt: {what}. Look at the destination of move {id}: if the guest runs \
                 there, or did, decide it with `--decide moved`; if it does not and never will, with `--decide undone`"
            );
            return Err(exit::error(Code::InDoubt, message));
        }
    };
    if let Some(note) = report.notes.first() {
        return Err(anyhow::anyhow!("{name}: {outcome}, but {note}"));
    }
    moves.forget(&id.to_string());
    let undone = outcome == "undone";
    out.result(&Resolved { devices: &names, id: id.to_string(), outcome }, |to| {
        let now = if undone { "as before the move" } else { "stopped" };
        if names.is_empty() {
            return writeln!(to, "{name}: {outcome}");
        }
        names.iter().try_for_each(|name| writeln!(to, "{name}: {outcome}; it is {now}"))
    })?;
    if undone
        && args.on_resume.is_none()
        && let Some(on_stop) = noted.as_ref().and_then(|noted| noted.on_stop.as_ref())
    {
        tracing::warn!(
            "the guest was stopped by `{on_stop}`: let it go on, which --on-resume would have done"
        );
    }
    moving::started(&guest)
}

/// Whether this device is among those of the move.
fn is_of(doubt: &Doubt, name: &str) -> bool {
    doubt.devices.iter().any(|device| device == name || open::same(device, name))
}

fn with(side: &Side, guest: &Guest<'_>, act: impl FnOnce(Source<'_>) -> Outcome) -> Outcome {
    act(Source::new(&side.moved(), &Options::default()).with_vmm(guest))
}

fn list(moves: &Moves, out: &Output) -> anyhow::Result<()> {
    let notes = moves.notes()?;
    let doubts = Doubts { in_doubt: notes.doubts, refused: notes.refused };
    out.result(&doubts, |to| {
        if doubts.in_doubt.is_empty() {
            return writeln!(to, "no move is in doubt");
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        doubts.in_doubt.iter().try_for_each(|doubt| {
            let minutes = now.saturating_sub(doubt.since) / 60;
            let what = match doubt.devices.as_slice() {
                [] => "the guest's memory".to_owned(),
                devices => devices.join(", "),
            };
            write!(to, "{}  {what} -> {}, {minutes} min ago", doubt.id, doubt.to)?;
            let pids: Vec<_> = doubt.stopped.iter().map(|stopped| stopped.pid.to_string()).collect();
            match pids.as_slice() {
                [] => writeln!(to),
                pids => writeln!(to, "; with process {} stopped", pids.join(", ")),
            }
        })
    })
}

pub fn answer(args: &args::Answer, out: &Output) -> anyhow::Result<()> {
    let (cancel, moves) = (moving::cancel_on_signal()?, Moves::new(args.moves.folder.as_deref()));
    let (ledger, listener) = (moves.record()?, links::listen(&args.listen)?);
    let (links, options) = (Links::new(&args.tls)?, Options::default());
    let acceptor = links.acceptor(listener, options.silence_max)?;
    out.say(&format!("listening on {}", acceptor.address()));
    let began = Instant::now();
    loop {
        let left = args.wait.saturating_sub(began.elapsed());
        let link = match acceptor.accept(Wait::within(left, Some(&cancel))) {
            Ok(Incoming::Peer(link)) => link,
            Ok(Incoming::NotAPeer { why, .. }) => {
                tracing::warn!("{why}");
                continue;
            }
            Err(LinkError::TimedOut | LinkError::Cancelled) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match ledger.answer(&link, &options, Some(&cancel)) {
            Received::Answered { id, decision } => {
                let outcome = match decision {
                    Decision::Unknown => "not known",
                    Decision::NotCommitted => "not committed",
                    Decision::Committed => "committed",
                };
                out.line(&Answered { id: id.to_string(), outcome }, |to| writeln!(to, "{id}: {outcome}"))?;
            }
            // A source that wants to send, or a client that is not a source.
            Received::Discarded { why, .. } => tracing::warn!("{why}"),
            Received::Runs(_) | Received::Stopped(_) | Received::Broken { .. } => {}
        }
    }
}

impl From<args::Decided> for Decision {
    fn from(decided: args::Decided) -> Decision {
        match decided {
            args::Decided::Moved => Decision::Committed,
            args::Decided::Undone => Decision::NotCommitted,
        }
    }
}
