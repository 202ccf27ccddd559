//! Streams at rest: saved, inspected, loaded; and refused, with the device untouched, when anything is
//! wrong with them.

use std::path::Path;
use std::sync::Arc;

use crate::common::{Ends, Step, TestDevice, VecPages, world};
use limosa_device::Fault;
use limosa_migrate::{
    AfterLoad, AfterSave, Cancel, Error, Observer, Outcome, Phase, Received, SnapshotFile, inspect,
    inspect_file,
};
use limosa_protocol::{Errno, MigrationFlags, State};

const FLAGS: MigrationFlags = MigrationFlags::SETS[3];

fn ends() -> Ends {
    let (source, destination) = world("dev", FLAGS, 300);
    Ends::new(vec![source], vec![destination])
}

fn save(ends: &Ends, path: &Path, after: AfterSave) -> Outcome {
    ends.with_source(|source| source.save(&SnapshotFile::new(path).replacing(true), after))
}

fn load(ends: &Ends, path: &Path, after: AfterLoad) -> Received {
    ends.with_destination(|destination| destination.load(&SnapshotFile::new(path), after))
}

/// A saved stream's bytes, and an idle device to load it into.
fn saved() -> (Vec<u8>, Ends) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    let ends = ends();
    assert!(matches!(save(&ends, &path, AfterSave::Stop), Outcome::Moved(_)));
    (std::fs::read(path).unwrap(), ends)
}

fn files(directory: &Path) -> Vec<String> {
    let names = std::fs::read_dir(directory).unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_saved_device_is_loaded_with_its_memory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    for flags in MigrationFlags::SETS {
        let (source, destination) = world("dev", flags, 100_000);
        let data = source.data();
        let mut ends = Ends::new(vec![source], vec![destination]);
        let (here, there) = (VecPages::new(1 << 16), VecPages::new(1 << 16));
        here.0.lock().unwrap()[12345] = 0x77;
        there.0.lock().unwrap()[54321] = 0x77;
        let there = Arc::new(there);
        ends.memory = Some((Arc::new(here), there.clone(), 1 << 16));
        let outcome = save(&ends, &path, AfterSave::Stop);
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
        assert_eq!(ends.source[0].state(), State::Stop);
        let received = load(&ends, &path, AfterLoad::Run);
        assert!(matches!(received, Received::Runs(_)), "{received:?}");
        assert_eq!(ends.destination[0].data(), data);
        assert!(there.0.lock().unwrap()[12345] == 0x77 && there.0.lock().unwrap()[54321] == 0);
        assert!(ends.check(outcome, received, "save and load"));
        let inspection = inspect_file(&path).unwrap();
        assert!(inspection.whole && inspection.stored);
        assert_eq!(inspection.devices[0].bytes, 100_020);
        assert!(inspection.devices[0].complete);
        let text = inspection.to_string();
        assert!(text.contains("device 0 dev-source: 100020 bytes, complete"), "{text}");
        assert!(text.ends_with("whole\n"), "{text}");
        assert_eq!(files(directory.path()), ["stream"]);
    }
}

#[test]
fn a_load_that_is_called_off_at_its_very_end_is_discarded() {
    /// Calls it off when everything is loaded.
    struct AtTheEnd(Cancel);
    impl Observer for AtTheEnd {
        fn phase(&self, phase: Phase) {
            if phase == Phase::Commit {
                self.0.cancel();
            }
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    for after in [AfterLoad::Run, AfterLoad::Stop] {
        let ends = ends();
        assert!(matches!(save(&ends, &path, AfterSave::Stop), Outcome::Moved(_)));
        let cancel = Cancel::new().unwrap();
        let observer = AtTheEnd(cancel.clone());
        let received = ends.with_destination(|destination| {
            let observed = destination.with_observer(&observer).with_cancel(Some(&cancel));
            observed.load(&SnapshotFile::new(&path), after)
        });
        assert!(matches!(received, Received::Discarded { why: Error::Cancelled, .. }), "{received:?}");
        assert!(!ends.destination[0].holds_guest());
    }
}

#[test]
fn a_source_can_go_on_after_a_save_and_a_load_can_stay_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    let ends = ends();
    let outcome = save(&ends, &path, AfterSave::Run);
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    assert!(report.downtime_ns.is_some());
    assert_eq!(ends.source[0].state(), State::Running);
    assert!(ends.source[0].holds_guest());
    assert!(matches!(load(&ends, &path, AfterLoad::Stop), Received::Stopped(_)));
    assert_eq!(ends.destination[0].state(), State::Stop);
    assert_eq!(ends.destination[0].data(), ends.source[0].data());
}

#[test]
fn a_save_that_fails_leaves_no_file_and_the_old_one_as_it_was() {
    for step in [Step::Stop, Step::Save, Step::SaveBegin, Step::Quiesce] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stream");
        std::fs::write(&path, "what was there before").unwrap();
        let ends = ends();
        ends.source[0].fail(step, 0, Fault::Refused(Errno::EIO));
        let outcome = save(&ends, &path, AfterSave::Stop);
        assert!(matches!(outcome, Outcome::Undone { .. }), "{step:?}: {outcome:?}");
        assert_eq!(ends.source[0].state(), State::Running);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "what was there before");
        assert_eq!(files(directory.path()), ["stream"]);
    }
    let ends = ends();
    let outcome = save(&ends, Path::new("/nowhere/stream"), AfterSave::Run);
    let Outcome::Undone { why: Error::Snapshot { .. }, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!(ends.source[0].state(), State::Running);
}

/// Loading this is refused, and the device has not noticed.
fn refused(ends: &Ends, bytes: &[u8], what: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    std::fs::write(&path, bytes).unwrap();
    ends.destination[0].fail(Step::LoadBegin, 0, Fault::Broken(Errno::EIO));
    let received = load(ends, &path, AfterLoad::Run);
    let Received::Discarded { why, .. } = received else { panic!("{what}: {received:?}") };
    assert_eq!(ends.destination[0].state(), State::Running, "{what}");
    assert!(!ends.destination[0].holds_guest(), "{what}");
    assert!(matches!(why, Error::Stream { .. } | Error::Incompatible { .. }), "{what}: {why}");
    let inspection = inspect(bytes).unwrap();
    assert!(!inspection.whole && !inspection.damage.is_empty(), "{what}: {inspection}");
    why.to_string()
}

#[test]
fn a_truncated_file_is_refused_wherever_it_ends() {
    let (bytes, ends) = saved();
    for end in 0..bytes.len() {
        let why = refused(&ends, &bytes[..end], &format!("cut at {end}"));
        assert!(why.contains("the stream ends in the middle of"), "{end}: {why}");
    }
}

#[test]
fn an_altered_file_is_refused_wherever_it_is_altered() {
    let (bytes, ends) = saved();
    for at in 0..bytes.len() {
        let mut altered = bytes.clone();
        altered[at] ^= 1 << (at % 8);
        refused(&ends, &altered, &format!("altered at {at}"));
    }
    let mut longer = bytes.clone();
    longer.push(0);
    refused(&ends, &longer, "a byte too long");
    let twice = [&bytes[..], &bytes[..]].concat();
    refused(&ends, &twice, "twice");
}

#[test]
fn an_inspection_says_where_the_damage_is_and_goes_on_behind_it() {
    let (bytes, _) = saved();
    let whole = inspect(&bytes[..]).unwrap();
    let frames: u64 = whole.frames.iter().map(|count| count.frames).sum();
    // The last byte of the offer: the frames behind it can still be counted.
    let offer_bytes = u32::from_le_bytes(bytes[48..52].try_into().unwrap()) as usize;
    let mut altered = bytes.clone();
    altered[40 + 32 + offer_bytes - 1] ^= 1;
    let inspection = inspect(&altered[..]).unwrap();
    assert_eq!(inspection.damage[0].at, 40);
    assert!(inspection.damage[0].what.contains("checksum of a frame's payload"));
    let counted: u64 = inspection.frames.iter().map(|count| count.frames).sum();
    assert_eq!(counted, frames - 1);
    let text = inspection.to_string();
    assert!(
        text.contains("damaged at byte 40") && text.ends_with("NOT whole: it cannot be loaded\n"),
        "{text}"
    );
    let json = serde_json::to_value(&inspection).unwrap();
    assert_eq!(json["whole"], false);
}

#[test]
fn a_stream_of_another_device_is_refused() {
    let (bytes, _) = saved();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    std::fs::write(&path, bytes).unwrap();
    let mut ends = ends();
    ends.kinds.1 = Some("uart".into());
    // The kind of the saved one is not known: only the number of devices differs here.
    let (_, extra): (TestDevice, TestDevice) = world("extra", FLAGS, 10);
    ends.destination.push(extra);
    let received = load(&ends, &path, AfterLoad::Run);
    let Received::Discarded { why: Error::Incompatible { reasons }, .. } = received else {
        panic!("{received:?}")
    };
    assert!(reasons[0].message.contains("the source has 1 devices, the destination 2"), "{reasons:?}");
}

#[test]
fn a_file_that_is_no_stream_is_called_so() {
    let (_, ends) = saved();
    for bytes in [&b"#!/bin/sh\n# a script of more than forty bytes, to be sure\n"[..], &[0; 100]] {
        assert!(refused(&ends, bytes, "no stream").contains("not a Limosa stream"));
    }
    assert!(inspect_file(Path::new("/nowhere")).is_err());
}
