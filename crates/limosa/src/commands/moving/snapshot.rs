//! `limosa save` and `limosa load`: devices to a file or an object store, and from there.

use limosa_migrate::{AfterLoad, AfterSave, Error, Ledger, Options, Received};
use limosa_stream::Damage;

use super::ended::{Ending, Notes, broken, started};
use super::{cancel_on_signal, destination, memory, source};
use crate::args;
use crate::guest::Guest;
use crate::hold::{self, Leaves};
use crate::open::Opening;
use crate::output::Output;
use crate::place::Place;
use crate::progress::Progress;
use crate::side::Side;

pub fn save(args: &args::Save, opening: Opening, out: &Output) -> anyhow::Result<()> {
    let side = Side::source(opening, &args.devices.names(), &args.memory.memory, &args.stopping)?;
    let leaves = if args.stop { Leaves::State } else { Leaves::Nothing };
    let done = to_file(&side, args, out);
    hold::end(done, side.devices(), args.hold.hold, leaves, out)
}

fn to_file(side: &Side, args: &args::Save, out: &Output) -> anyhow::Result<()> {
    let (cancel, progress) = (cancel_on_signal()?, Progress::new(out));
    let options = Options::default().with_compress(args.compress);
    let (moved, ending) = (side.moved(), Ending::new(&args.reporting, out)?);
    let after = if args.stop { AfterSave::Stop } else { AfterSave::Run };
    let (guest, pages) = (Guest::source(&args.stopping, None)?, side.source_pages(&args.stopping)?);
    let mut log = pages.log();
    let memory = memory(side, &pages, &mut log);
    let place = Place::new(&args.file, args.replace)?;
    let outcome = source(&moved, memory, &guest, &progress, &options, &cancel).save(place.target(), after);
    drop(progress);
    ending.settled(outcome, &guest)
}

pub fn load(args: &args::Load, opening: Opening, out: &Output) -> anyhow::Result<()> {
    let side = Side::destination(opening, &args.devices.names(), &args.memory.memory)?;
    let done = from_file(&side, args, out);
    hold::end(done, side.devices(), args.hold.hold, Leaves::State, out)
}

fn from_file(side: &Side, args: &args::Load, out: &Output) -> anyhow::Result<()> {
    let (cancel, progress, options, ledger) =
        (cancel_on_signal()?, Progress::new(out), Options::default(), Ledger::new());
    let (moved, place) = (side.moved(), Place::new(&args.file, false)?);
    let ending = Ending::new(&args.reporting, out)?;
    let after = if args.stop { AfterLoad::Stop } else { AfterLoad::Run };
    let (guest, pages) = (Guest::destination(&args.starting), side.destination_pages()?);
    let regions = pages.regions(side.memory());
    let destination = destination(&moved, &regions, &guest, &progress, &options, &cancel, &ledger);
    let received = destination.load(place.source(), after);
    drop(progress);
    match received {
        Received::Runs(report) => ending.print(&report).and(started(&guest)),
        Received::Stopped(report) => ending.print(&report),
        Received::Discarded { why, report } => {
            ending.failed(&report);
            let (hint, notes) = (what_to_do_with(&why), Notes(&report.notes).to_string());
            Err(anyhow::Error::from(why)
                .context(format!("{} was not loaded{hint}{notes}", args.file.display())))
        }
        Received::Broken { why, report } => {
            ending.failed(&report);
            Err(broken(&side.name(), why))
        }
        Received::Answered { .. } => {
            Err(anyhow::anyhow!("{}: it is not a saved stream", args.file.display()))
        }
    }
}

/// What a person can do with a file that cannot be loaded.
fn what_to_do_with(why: &Error) -> &'static str {
    match why {
        Error::Stream { damage: Damage::NotAStream, .. } => "; expected a file that `limosa save` wrote",
        Error::Stream { damage: Damage::Newer { .. }, .. } => "; load it with a newer limosa",
        Error::Stream { .. } => " (`limosa inspect` tells more); save it anew",
        Error::Incompatible { .. } => "; load it into a device like the one that was saved",
        _ => "",
    }
}
