//! Moves and snapshots that are compressed: everything arrives, in fewer bytes, and what cannot be read is refused.

use std::sync::Arc;

use crate::common::{Ends, Pages, VecPages, options, world};
use limosa_migrate::{AfterLoad, AfterSave, Compression, Outcome, Received, SnapshotFile, inspect_file};
use limosa_protocol::MigrationFlags;

const MEMORY_BYTES: usize = 3 << 20;

/// A device and memory, half of which becomes shorter.
fn ends(compress: Option<Compression>) -> Ends {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 300_000);
    let mut ends = Ends::new(vec![source], vec![destination]);
    let (here, there) = (VecPages::new(MEMORY_BYTES), VecPages::new(MEMORY_BYTES));
    let mut noise = 1_u32;
    for (at, byte) in here.0.lock().unwrap().iter_mut().enumerate() {
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = if at < MEMORY_BYTES / 2 { 7 } else { (noise >> 24) as u8 };
    }
    ends.memory = Some((Arc::new(here) as Pages, Arc::new(there) as Pages, MEMORY_BYTES as u64));
    ends.options = options().with_compress(compress);
    ends
}

#[test]
fn everything_arrives_that_was_compressed() {
    for compression in Compression::ALL {
        let ends = ends(Some(compression));
        let (outcome, received) = ends.run_plain();
        if let Outcome::Moved(report) = &outcome {
            assert_eq!(report.bytes.memory_bytes, MEMORY_BYTES as u64, "counted as they are in memory");
        }
        assert!(ends.check(outcome, received, compression.name()));
    }
}

#[test]
fn a_compressed_snapshot_is_shorter_is_inspected_and_loaded_and_refused_when_damaged() {
    let directory = tempfile::tempdir().unwrap();
    let mut bytes = Vec::new();
    for compress in [None, Some(Compression::Zstd), Some(Compression::Lz4)] {
        let path = directory.path().join(format!("{compress:?}"));
        let ends = ends(compress);
        let outcome = ends.with_source(|source| source.save(&SnapshotFile::new(&path), AfterSave::Stop));
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
        let inspection = inspect_file(&path).unwrap();
        assert!(inspection.damage.is_empty(), "{inspection:?}");
        assert_eq!(inspection.memory[0].bytes, MEMORY_BYTES as u64);
        bytes.push(inspection.bytes);
        // The loading side need not have chosen a compression.
        let mut loading = self::ends(None);
        loading.memory = ends.memory.clone();
        let load = |ends: &Ends| {
            ends.with_destination(|destination| destination.load(&SnapshotFile::new(&path), AfterLoad::Run))
        };
        let received = load(&loading);
        assert!(matches!(received, Received::Runs(_)), "{received:?}");
        let mut saved = std::fs::read(&path).unwrap();
        let middle = saved.len() / 3;
        saved[middle] ^= 1;
        std::fs::write(&path, saved).unwrap();
        let received = load(&self::ends(None));
        assert!(matches!(received, Received::Discarded { .. }), "{received:?}");
    }
    assert!(bytes[1] < bytes[0] * 2 / 3 && bytes[2] < bytes[0] * 2 / 3, "{bytes:?}");
}
