//! `limosa verify`: whether a snapshot is whole, and which.

use limosa_migrate::{Options, verify};
use serde::Serialize;

use super::moving::cancel_on_signal;
use crate::args;
use crate::exit::{self, Code};
use crate::output::{self, Output};
use crate::snapshot_location::SnapshotLocation;

#[derive(Serialize)]
struct Verified {
    place: String,
    whole: bool,
    bytes: u64,
    sealed: bool,
    /// Of all but the SEAL.
    blake3: String,
    id: String,
}

pub fn run(args: &args::Verify, out: &Output) -> anyhow::Result<()> {
    let (place, cancel) = (SnapshotLocation::saved(&args.file)?, cancel_on_signal()?);
    let found = verify(place.source(), Options::default().silence_max, Some(&cancel))?;
    let found = Verified {
        place: place.source().name(),
        whole: true,
        bytes: found.bytes,
        sealed: found.sealed,
        blake3: found.blake3.iter().map(|byte| format!("{byte:02x}")).collect(),
        id: found.id.to_string(),
    };
    if let Some(expected) = &args.blake3
        && !expected.eq_ignore_ascii_case(&found.blake3)
    {
        let Verified { place, blake3, .. } = &found;
        let what = format!("{place}: whole, but another snapshot: blake3 {blake3}, expected {expected}");
        return Err(exit::error(Code::Damaged, what));
    }
    out.result(&found, |to| {
        let sealed = if found.sealed { "sealed" } else { "not sealed: saved by an older version" };
        let size = output::bytes(found.bytes);
        writeln!(to, "{}: whole, {size}, {sealed}", found.place)?;
        writeln!(to, "blake3 {}", found.blake3)?;
        writeln!(to, "move   {}", found.id)
    })
}
