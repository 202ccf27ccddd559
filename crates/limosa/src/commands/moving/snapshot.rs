//! `limosa save` and `limosa load`: devices to a file or an object store, and from there.

use std::path::Path;
use std::time::Instant;

use limosa_migrate::{
    AfterLoad, AfterSave, Cancel, Decision, Error, InDoubt, Ledger, Options, Outcome, Received, published,
};
use limosa_stream::Damage;

use super::ended::{Ending, Notes, STAYS_STOPPED, Work, note_ways_back};
use super::{ASK_EVERY, cancel_on_signal, destination, memory, source};
use crate::args;
use crate::endpoint::Endpoint;
use crate::found;
use crate::guest::Guest;
use crate::keep_open::{self, Leaves};
use crate::loaded::Outcome as Loaded;
use crate::moves::Moves;
use crate::noting::{Noting, Target};
use crate::open::Opening;
use crate::output::Output;
use crate::progress::Progress;
use crate::snapshot_location::SnapshotLocation;

pub fn save(args: &args::Save, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    let cancel = cancel_on_signal()?;
    let place = SnapshotLocation::to_save(args.names.file(), args.replace)?;
    let endpoint = Endpoint::source(opening, &args.names.devices(), &args.memory.memory, &args.stopping)?;
    found::check_source(
        endpoint.devices(),
        args.stopping.stopped,
        &Moves::new(args.moves.folder.as_deref()),
    )?;
    found::check_stop_with(&args.stopping, endpoint.devices().iter())?;
    let leaves = if args.stop { Leaves::State } else { Leaves::Nothing };
    let done = to_file(&endpoint, &place, args, &cancel, out);
    keep_open::end(done, endpoint.devices(), args.keep_open.keep_open, leaves, out)
}

fn to_file(
    endpoint: &Endpoint,
    place: &SnapshotLocation,
    args: &args::Save,
    cancel: &Cancel,
    out: &Output,
) -> anyhow::Result<()> {
    let progress = Progress::new(out, || endpoint.total_bytes());
    let options = args.stop_limits.limit(Options::default().with_compress(args.compress));
    let (moved, ending) = (endpoint.moved(), Ending::new(Work::Save, &args.reporting, out)?);
    let after = if args.stop { AfterSave::Stop } else { AfterSave::Run };
    let moves = Moves::new(args.moves.folder.as_deref());
    // A save is in doubt only where the guest stays stopped.
    let noting = match after {
        AfterSave::Run if !args.stopping.stops_the_guest() => None,
        _ => Some(Noting::new(&moves, endpoint, Target::Snapshot(noted_name(args.names.file())?))?),
    };
    let (guest, pages) =
        (Guest::source(&args.stopping, endpoint.devices(), noting)?, endpoint.source_pages(&args.stopping)?);
    let mut log = pages.log();
    let saved = source(&moved, memory(endpoint, &pages, &mut log), &guest, &progress, &options, cancel);
    let mut outcome = saved.save(place.target(), after);
    if let Outcome::InDoubt(doubt) = outcome {
        outcome = settle(doubt, place, &options, cancel, |decision, doubt| {
            let mut log = pages.log();
            let settled =
                source(&moved, memory(endpoint, &pages, &mut log), &guest, &progress, &options, cancel);
            settled.decide(decision, doubt)
        });
    }
    drop(progress);
    if let Outcome::InDoubt(doubt) = &outcome {
        return Err(ending.saved_in_doubt(&endpoint.name(), place.target(), doubt, &guest));
    }
    ending.settled(outcome, &guest)
}

/// Looks, for as long as a place may make no progress, whether the snapshot was published.
fn settle(
    mut doubt: InDoubt,
    place: &SnapshotLocation,
    options: &Options,
    cancel: &Cancel,
    decide: impl FnOnce(Decision, InDoubt) -> Outcome,
) -> Outcome {
    let began = Instant::now();
    loop {
        tracing::warn!("in doubt: {}; looking again", doubt.why);
        match published(place.source(), doubt.id, options.silence_max, Some(cancel)) {
            Ok(Decision::NotCommitted) => {
                doubt.why = match doubt.why {
                    Error::PublicationUnknown { name, error } => {
                        Error::Snapshot { name, doing: "publishing it", error }
                    }
                    why => why,
                };
                return decide(Decision::NotCommitted, doubt);
            }
            Ok(Decision::Committed) => return decide(Decision::Committed, doubt),
            Ok(Decision::Unknown) => {}
            Err(why) => tracing::warn!("{why}"),
        }
        if began.elapsed() >= options.silence_max || cancel.wait(ASK_EVERY) {
            return Outcome::InDoubt(doubt);
        }
    }
}

/// The place's name, for a process with another working directory.
fn noted_name(place: &Path) -> anyhow::Result<String> {
    let path = match place.to_str() {
        Some(url) if url.starts_with("s3://") => place.to_owned(),
        _ => std::path::absolute(place)?,
    };
    // A note is JSON. A place whose name is not Unicode can be looked at by a person alone.
    Ok(path.to_string_lossy().into_owned())
}

pub fn load(args: &args::Load, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    let cancel = cancel_on_signal()?;
    let endpoint = Endpoint::destination(opening, &args.devices.names(), &args.memory.memory)?;
    found::check_destination(endpoint.devices(), &Moves::new(None))?;
    let done = from_file(&endpoint, args, &cancel, out);
    keep_open::end(done, endpoint.devices(), args.keep_open.keep_open, Leaves::State, out)
}

fn from_file(endpoint: &Endpoint, args: &args::Load, cancel: &Cancel, out: &Output) -> anyhow::Result<()> {
    let (progress, ledger) = (Progress::new(out, || None), Ledger::new());
    let options = args.state.limit(Options::default());
    let (moved, place) = (endpoint.moved(), SnapshotLocation::saved(&args.file)?);
    let ending = Ending::new(Work::Load, &args.reporting, out)?;
    let after = if args.stop { AfterLoad::Stop } else { args.starting.after() };
    let (guest, pages) = (Guest::destination(&args.starting), endpoint.destination_pages()?);
    let regions = pages.regions(endpoint.memory());
    let destination = destination(&moved, &regions, &guest, &progress, &options, cancel, &ledger);
    let received = destination.load(place.source(), after);
    drop(progress);
    if let Received::Runs(report) | Received::Stopped(report) = &received {
        let from = args.file.to_string_lossy();
        Moves::new(None).loaded(&report.id, endpoint, &from, Loaded::Loaded);
    }
    match received {
        Received::Runs(report) => ending.done(&report, guest.failures()),
        Received::Stopped(mut report) => {
            report.notes.extend((!args.stop).then(|| STAYS_STOPPED.into()));
            ending.done(&report, guest.failures())
        }
        Received::Discarded { why, mut report } => {
            note_ways_back(&mut report);
            let (hint, notes) = (what_to_do_with(&why), Notes(&report.notes));
            let what = format!("{} was not loaded{hint}{notes}", args.file.display());
            Err(ending.failed(&report, anyhow::Error::from(why).context(what)))
        }
        Received::Broken { why, report } => Err(ending.broken(&endpoint.name(), why, &report)),
        Received::Answered { .. } => {
            Err(anyhow::anyhow!("{}: it is not a saved stream", args.file.display()))
        }
    }
}

/// Advice about a file that cannot be loaded.
fn what_to_do_with(why: &Error) -> &'static str {
    match why {
        Error::Stream { damage: Damage::NotAStream, .. } => "; expected a file that `limosa save` wrote",
        Error::Stream { damage: Damage::Newer { .. }, .. } => "; load it with a newer limosa",
        Error::Stream { .. } => " (`limosa inspect` tells more); save it anew",
        Error::Incompatible { .. } => "; load it into a device like the one that was saved",
        _ => "",
    }
}
