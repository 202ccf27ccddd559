//! What is no snapshot is not read for longer than it takes to see that.

use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use crate::common::{Ends, world};
use limosa_migrate::{
    AfterLoad, AfterSave, Cancel, Error, Outcome, Received, SnapshotFile, inspect, inspect_snapshot, verify,
};
use limosa_protocol::MigrationFlags;
use limosa_stream::Damage;
use rustix::fs::{FileType, Mode, mknodat};

const LONG: Duration = Duration::from_secs(60);

fn fifo(path: &Path) {
    mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

#[track_caller]
fn is_no_stream(error: &Error) {
    let is_one = matches!(error, Error::Stream { damage: Damage::NotAStream, .. });
    assert!(is_one, "{error:?}");
}

#[test]
fn what_has_no_end_was_read_without_end() {
    let place = SnapshotFile::new("/dev/zero");
    let found = inspect_snapshot(&place, LONG, None).unwrap();
    assert!(!found.whole && found.version.is_none());
    is_no_stream(&verify(&place, LONG, None).unwrap_err());
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 100);
    let ends = Ends::new(vec![source], vec![destination]);
    let loaded = ends.with_destination(|destination| destination.load(&place, AfterLoad::AsFound));
    let Received::Discarded { why, .. } = loaded else { panic!("{loaded:?}") };
    is_no_stream(&why);
    assert!(!inspect(std::io::repeat(7)).unwrap().whole);
}

#[test]
fn a_file_of_terabytes_that_is_no_snapshot_was_read_to_its_end() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 43).unwrap();
    let found = inspect_snapshot(&SnapshotFile::new(file.path()), LONG, None).unwrap();
    assert!(!found.whole && found.bytes <= 1 << 20, "{}", found.bytes);
}

#[test]
fn a_pipe_into_which_nobody_writes_is_not_waited_for_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    fifo(&path);
    let place = SnapshotFile::new(&path);
    let error = verify(&place, Duration::from_millis(20), None).unwrap_err();
    let Error::Snapshot { error, .. } = error else { panic!("{error:?}") };
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    let cancel = Cancel::new().unwrap();
    cancel.cancel();
    let error = inspect_snapshot(&place, LONG, Some(&cancel)).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error:?}");
}

#[test]
fn a_snapshot_that_comes_through_a_pipe_is_verified() {
    let folder = tempfile::tempdir().unwrap();
    let (file, pipe) = (folder.path().join("file"), folder.path().join("fifo"));
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 300_000);
    let ends = Ends::new(vec![source], vec![destination]);
    let saved = ends.with_source(|source| source.save(&SnapshotFile::new(&file), AfterSave::Run));
    assert!(matches!(saved, Outcome::Moved(_)), "{saved:?}");
    fifo(&pipe);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut bytes = Vec::new();
            std::fs::File::open(&file).unwrap().read_to_end(&mut bytes).unwrap();
            std::fs::OpenOptions::new().write(true).open(&pipe).unwrap().write_all(&bytes).unwrap();
        });
        assert!(verify(&SnapshotFile::new(&pipe), LONG, None).unwrap().sealed);
        writer.join().unwrap();
    });
}
