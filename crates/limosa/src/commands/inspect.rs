//! `limosa inspect`: the contents of a saved stream.

use std::io::Write;

use limosa_migrate::{Inspection, Options, inspect_snapshot};
use limosa_protocol::MigrationFlags;

use super::moving::cancel_on_signal;
use crate::args;
use crate::exit::{self, Code};
use crate::output::{self, Output};
use crate::snapshot_location::SnapshotLocation;

pub fn run(args: &args::Inspect, out: &Output) -> anyhow::Result<()> {
    let (place, cancel) = (SnapshotLocation::saved(&args.file)?, cancel_on_signal()?);
    let found = inspect_snapshot(place.source(), Options::default().silence_max, Some(&cancel))?;
    let document = document(&found)?;
    if found.whole {
        return out.result(&document, |to| print(&found, to));
    }
    out.text(|to| print(&found, to))?;
    let first = found
        .damage
        .first()
        .map_or("it ends too early".into(), |damage| format!("at byte {}: {}", damage.at, damage.what));
    let what = format!("{}: not a whole saved stream: {first}", args.file.display());
    Err(exit::reported(exit::error(Code::Damaged, what), &document))
}

/// The document, in which flags are names as in all others. In the stream they are a number.
fn document(found: &Inspection) -> anyhow::Result<serde_json::Value> {
    let mut document = serde_json::to_value(found)?;
    if let Some(devices) = document["offer"]["devices"].as_array_mut() {
        for device in devices {
            let flags = MigrationFlags::from_bits_retain(device["flags"].as_u64().unwrap_or_default());
            device["flags"] = output::flag_names(flags).into();
        }
    }
    Ok(document)
}

fn print(found: &Inspection, to: &mut dyn Write) -> std::io::Result<()> {
    match (found.version, &found.id) {
        (Some(version), Some(id)) => {
            let kind = if found.stored { "saved stream" } else { "live stream" };
            writeln!(to, "{kind}, version {version}, {}, move {id}", output::bytes(found.bytes))?;
        }
        _ => return writeln!(to, "no stream: it does not begin like one, and was not read any further"),
    }
    for device in &found.devices {
        let state = if device.complete { "whole" } else { "NOT WHOLE" };
        writeln!(
            to,
            "  device {}  {:<24} {:>10}  {state}",
            device.id,
            device.name,
            output::bytes(device.bytes)
        )?;
    }
    for region in &found.memory {
        let (bytes, zero) = (output::bytes(region.bytes), output::bytes(region.zero_bytes));
        writeln!(to, "  memory {}  {:<24} {bytes:>10}, and {zero} of zeroes", region.id, region.name)?;
    }
    for frames in &found.frames {
        let bytes = output::bytes(frames.bytes);
        writeln!(to, "  {:<14} {:>8} frames {bytes:>12}", frames.kind, frames.frames)?;
    }
    let sealed = if found.sealed { "sealed" } else { "not sealed" };
    writeln!(to, "  {sealed}, blake3 {}", found.blake3)?;
    for damage in &found.damage {
        writeln!(to, "  damaged at byte {}: {}", damage.at, damage.what)?;
    }
    writeln!(to, "{}", if found.whole { "whole: it can be loaded" } else { "NOT whole: it cannot be loaded" })
}
