//! `limosa migrate`: from devices to others on this machine, both sides in this process.

use limosa_migrate::{Error, Ledger, Nobody, Outcome, Received, move_local};

use super::ended::{broken, settled};
use super::{cancel_on_signal, destination, options, source};
use crate::args;
use crate::hold::{self, Leaves};
use crate::open::Opening;
use crate::output::Output;
use crate::progress::Progress;
use crate::side::{self, Side};

pub fn migrate(args: &args::Migrate, opening: Opening, out: &Output) -> anyhow::Result<()> {
    let (from, to) = (args.sources(), args.destinations());
    side::all_different(&[&from[..], &to[..]].concat())?;
    let (from, to) = (Side::open(opening, &from)?, Side::open(opening, &to)?);
    let done = between(&from, &to, args, out);
    hold::end(done, to.devices(), args.hold.hold, Leaves::State, out)
}

fn between(from: &Side, to: &Side, args: &args::Migrate, out: &Output) -> anyhow::Result<()> {
    let (cancel, progress, options) = (cancel_on_signal()?, Progress::new(out), options(&args.moving));
    let (here, there) = (from.moved(), to.moved());
    let mut source = source(&here, &Nobody, &progress, &options, &cancel);
    let ledger = Ledger::new();
    let destination = destination(&there, &Nobody, &options, &cancel, &ledger);
    let (outcome, received) = move_local(&mut source, &destination);
    drop(progress);
    match (outcome, received) {
        (_, Received::Broken { why, .. }) => Err(broken(&to.name(), why)),
        (Outcome::Undone { why, mut report }, Received::Discarded { why: why_there, report: there }) => {
            report.notes.extend(there.notes);
            // What was called off there is known here at first hand.
            let why = if matches!(why, Error::Aborted { .. }) { why_there } else { why };
            settled(Outcome::Undone { why, report }, out)
        }
        (outcome, _) => settled(outcome, out),
    }
}
