//! `limosa migrate`: from devices to others on this machine, both sides in this process.

use limosa_migrate::{Cancel, Error, Ledger, Nobody, Outcome, Received, move_local};

use super::ended::{Ending, STAYS_STOPPED, Work};
use super::{cancel_on_signal, destination, memory, options, source};
use crate::args;
use crate::endpoint::{self, Endpoint};
use crate::found;
use crate::guest::Guest;
use crate::keep_open::{self, Leaves};
use crate::loaded::{Load, Outcome as Loaded};
use crate::moved::Moved;
use crate::moves::Moves;
use crate::noting::{Noting, Target, devices_of};
use crate::open::{Opened, Opening};
use crate::output::Output;
use crate::progress::Progress;

pub fn migrate(args: &args::Migrate, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    let cancel = cancel_on_signal()?;
    let (from, to) = (args.sources(), args.destinations());
    endpoint::all_different(&[&from[..], &to[..]].concat())?;
    let (memory_from, memory_to) = (args.memory.from(), args.memory.to());
    let from = Endpoint::source(opening, &from, &memory_from, &args.stopping)?;
    let to = Endpoint::destination(opening, &to, &memory_to)?;
    crate::memory::different(from.memory(), to.memory())?;
    let moves = Moves::new(args.moves.folder.as_deref());
    found::check_source(from.devices(), args.stopping.stopped, &moves)?;
    found::check_destination(to.devices(), &moves)?;
    found::check_stop_with(&args.stopping, from.devices().iter().chain(to.devices()))?;
    let done = between(&from, &to, args, &cancel, out);
    keep_open::end(done, to.devices(), args.keep_open.keep_open, Leaves::State, out)
}

fn between(
    from: &Endpoint,
    to: &Endpoint,
    args: &args::Migrate,
    cancel: &Cancel,
    out: &Output,
) -> anyhow::Result<()> {
    let (progress, options) =
        (Progress::new(out, || from.total_bytes()), args.checksums.of(options(&args.moving)));
    let ending = Ending::new(Work::Move, &args.reporting, out)?;
    let (here, there) = (from.moved(), to.moved());
    let (pages, pages_there) = (from.source_pages(&args.stopping)?, to.destination_pages()?);
    let mut log = pages.log();
    let moves = Moves::new(args.moves.folder.as_deref());
    // A guest that this command does not stop is not left stopped either, unless its device is told to stay.
    let is_beside_vmm = from.devices().iter().any(Opened::is_beside_vmm);
    let noting = match args.stopping.stops_the_guest() || is_beside_vmm {
        true => {
            let load = Load::of(to, &from.name()).ok().map(Box::new);
            Some(Noting::new(&moves, from, Target::Here { to: to.name(), load })?)
        }
        false => None,
    };
    let halted = devices_of(from).ok();
    let guest = Guest::source(&args.stopping, from.devices(), noting)?;
    let source = source(&here, memory(from, &pages, &mut log), &guest, &progress, &options, cancel);
    let (ledger, regions) = (Ledger::new(), pages_there.regions(to.memory()));
    let guest_there = Guest::destination(&args.starting);
    let destination = destination(&there, &regions, &guest_there, &Nobody, &options, cancel, &ledger)
        .with_after(args.starting.after());
    let (outcome, received) = move_local(source, destination);
    drop(progress);
    guest.forget(&outcome);
    match (outcome, received) {
        (_, Received::Broken { why, report }) => Err(ending.broken(&to.name(), why, &report)),
        (Outcome::Undone { why, mut report }, Received::Discarded { why: why_there, report: there }) => {
            report.notes.extend(there.notes);
            // Both sides are in this process, so a cancel of the destination is known here.
            let why = if matches!(why, Error::Aborted { .. }) { why_there } else { why };
            report.why = Some(why.to_string());
            ending.settled(Outcome::Undone { why, report }, &guest)
        }
        (Outcome::Moved(mut report), received) => {
            if let Some(halted) = halted {
                moves.remember(&Moved { id: report.id.clone(), halted, to: to.name(), saved: false });
            }
            moves.loaded(&report.id, to, &from.name(), Loaded::Committed);
            let stays_stopped = matches!(received, Received::Stopped(_));
            report.notes.extend(stays_stopped.then(|| STAYS_STOPPED.into()));
            ending.done(&report, [guest.failures(), guest_there.failures()].concat())
        }
        (outcome, _) => ending.settled(outcome, &guest),
    }
}
