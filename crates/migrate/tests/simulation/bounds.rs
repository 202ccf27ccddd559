//! What the engine's buffers may hold (`docs/failure.md: Limits`), against what its reports say that they held.

use limosa_migrate::{Outcome, Received, Report, Side};
use limosa_stream::DATA_BYTES_MAX;

use crate::plan::Plan;

/// The most that one reads from a device at once, and behind what seems to be its last data; both less where windows are small.
const READ_BYTES_MAX: u64 = 512 << 10;
const BEHIND_BYTES: u64 = 4 << 10;
/// The most spare buffers for windows of up to four times as much.
const SPARE_BYTES: u64 = 8 << 20;
const SPARE_BYTES_MAX: u64 = 32 << 20;

pub fn of_source(outcome: &Outcome) -> &Report {
    match outcome {
        Outcome::Moved(report) | Outcome::Undone { report, .. } => report,
        Outcome::InDoubt(doubt) => &doubt.report,
    }
}

pub fn of_destination(received: &Received) -> Option<&Report> {
    match received {
        Received::Runs(report)
        | Received::Stopped(report)
        | Received::Discarded { report, .. }
        | Received::Broken { report, .. } => Some(report),
        Received::Answered { .. } => None,
    }
}

/// What became of the windows of a side.
#[derive(Clone, Copy, Debug, Default)]
pub struct Windows {
    /// One was filled, but for a piece.
    pub filled: bool,
    /// One was larger than at first.
    pub grew: bool,
}

/// An error when more was held than may be.
pub fn check(plan: &Plan, report: &Report) -> Result<Windows, String> {
    let (first, side) = (plan.window_bytes(), report.side.name());
    // One device can have all by which windows grow.
    let window = first + plan.windows_bytes_max() - plan.windows_bytes();
    // A side that loads a snapshot takes a whole frame.
    let window = if plan.saves.is_some() { window.max(READ_BYTES_MAX) } else { window };
    let most = report.devices.iter().map(|device| device.waiting_bytes_max).max().unwrap_or_default();
    if most > window {
        return Err(format!(
            "{most} bytes of a device were on their way to or at the {side} at once, not {window}"
        ));
    }
    let frame = DATA_BYTES_MAX as u64;
    let (links, devices) = (u64::from(plan.links_taken), plan.devices.len() as u64);
    // A window is as large from the start as it may become, where a device says that it has so much.
    let first_max = first.max(plan.windows_bytes_max() / devices.max(1));
    // A save has no peer that gives a window.
    let read = if plan.saves.is_some() { READ_BYTES_MAX } else { READ_BYTES_MAX.min(first_max / 2) };
    // What a compression puts into may have to be a little longer than a frame.
    let packed = (links + devices) * (frame + frame / 64);
    let is_compressed = plan.compression().is_some();
    let limit = match report.side {
        Side::Source => {
            let behind = BEHIND_BYTES.min(read);
            links * frame + devices * (read + behind) + if is_compressed { packed } else { 0 }
        }
        Side::Destination => {
            let windows = if plan.saves.is_some() { devices * window } else { plan.windows_bytes_max() };
            let spare = (windows / 4).clamp(SPARE_BYTES, SPARE_BYTES_MAX).min(windows);
            links * (frame + read) + if is_compressed { links * frame } else { 0 } + windows * 5 / 4 + spare
        }
    };
    // Of the first link also what belongs to the handshake.
    if report.buffer_bytes_max > limit + frame / 4 {
        return Err(format!(
            "the {side}'s buffers held {} bytes at once, not {limit}",
            report.buffer_bytes_max
        ));
    }
    Ok(Windows { filled: most > first / 2, grew: most > first && plan.saves.is_none() })
}
