//! Whole moves to a second device and back, by the engine: how long each takes, and its downtime.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use limosa_client::{Device, DeviceExt};
use limosa_migrate::{Destination, Ledger, MovedDevice, Options, Outcome, Report, Source, move_local};
use limosa_protocol::State;

use super::{Context, Open, Step};
use crate::document::Measure;
use crate::samples::{Took, measure};

pub(super) const ID: &str = "move";

/// Limit on the downtime of a move, and the additional time that this measure may take: a move that is given up is undone within
/// that time.
const STANDSTILL_MAX: Duration = Duration::from_secs(20);
const MOVE_MAX: Duration = Duration::from_secs(180);

pub(super) fn step(peer: Open) -> Step {
    Step { id: ID.into(), more: MOVE_MAX, body: Box::new(move |context| there_and_back(context, &peer)) }
}

fn there_and_back(context: &Context, peer: &Open) -> anyhow::Result<Vec<Measure>> {
    let other = peer()?;
    let (here, there): (&dyn Device, &dyn Device) = (&*context.device, &*other);
    let (mut is_here, mut downtimes) = (true, Vec::new());
    let measured = context.sampler.run(ID, None, || {
        let report = if is_here { one(here, there)? } else { one(there, here)? };
        is_here = !is_here;
        downtimes.extend(report.downtime_ns);
        Ok(Took { time: Duration::from_nanos(report.total_ns), bytes: report.bytes.device_bytes })
    });
    // The state is restored, whatever the outcome of the last move.
    let is_back = come_back(here, there, is_here);
    let mut measured = measured?;
    is_back?;
    // The time and the bytes are shown separately; a rate would include the handshake.
    measured.note.get_or_insert_with(|| format!("{} bytes in each", measured.bytes));
    measured.bytes = 0;
    Ok(vec![measured, measure("downtime of a move".into(), 0, downtimes)])
}

fn come_back(here: &dyn Device, there: &dyn Device, is_here: bool) -> anyhow::Result<()> {
    if !is_here {
        one(there, here)?;
    }
    if there.state()? != State::Running {
        there.reset()?;
    }
    Ok(())
}

fn one(from: &dyn Device, to: &dyn Device) -> anyhow::Result<Report> {
    let mut options = Options::default();
    options.standstill_max = STANDSTILL_MAX;
    let ledger = Ledger::new();
    let (ours, theirs) = ([MovedDevice::new(from)], [MovedDevice::new(to)]);
    let began = Instant::now();
    let (outcome, _) = move_local(Source::new(&ours, &options), Destination::new(&theirs, &ledger, &options));
    match outcome {
        Outcome::Moved(report) => Ok(report),
        Outcome::Undone { why, .. } => Err(anyhow!(why).context(format!("after {:?}", began.elapsed()))),
        Outcome::InDoubt(_) => bail!("a move within one process is in doubt"),
    }
}
