//! Snapshots in files: their rights, earlier versions, and files that are there already.

use super::*;

/// Not a test: what [`files_that_hold_a_guest_were_readable_by_all`] runs under each umask.
#[test]
#[ignore = "a part of another test"]
fn creator() {
    let Ok(folder) = std::env::var("LIMOSA_TEST_FOLDER") else { return };
    let folder = Path::new(&folder);
    let (mut ends, _) = ends();
    let old = folder.join("old");
    for file in [SnapshotFile::new(folder.join("new")), SnapshotFile::new(&old).replacing(true)] {
        let outcome = ends.with_source(|source| source.save(&file, AfterSave::Run));
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    }
    let wait = Wait::within(std::time::Duration::from_secs(10), None);
    let unpublished = SnapshotFile::new(folder.join("unpublished")).create(wait).unwrap();
    // A saver that dies leaves its temporary file.
    std::mem::forget(unpublished);
    ends.ledger = Ledger::open(&folder.join("state/moves")).unwrap();
    let moved = ends.run_plain();
    assert!(matches!(moved, (Outcome::Moved(_), Received::Runs(_))), "{moved:?}");
}

#[test]
fn files_that_hold_a_guest_were_readable_by_all() {
    use std::os::unix::fs::PermissionsExt;
    for umask in ["000", "022", "077"] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("old"), "an older one").unwrap();
        std::fs::set_permissions(folder.path().join("old"), std::fs::Permissions::from_mode(0o644)).unwrap();
        let creator = this_test("places::files::creator");
        let status = std::process::Command::new("/bin/sh")
            .args(["-c", "umask \"$1\"; shift; exec \"$@\"", "sh", umask])
            .arg(creator.get_program())
            .args(creator.get_args())
            .env("LIMOSA_TEST_FOLDER", folder.path())
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{umask}: {status}");
        let (mut folders, mut files) = (vec![folder.path().to_owned()], Vec::new());
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(next).unwrap().map(Result::unwrap) {
                let (path, mode) = (entry.path(), entry.metadata().unwrap().permissions().mode() & 0o7777);
                let is_folder = path.is_dir();
                let expected = if is_folder { 0o700 } else { 0o600 };
                assert_eq!(mode, expected, "{umask}: {}: {mode:o}", path.display());
                if is_folder { &mut folders } else { &mut files }.push(path);
            }
        }
        let has = |part: &str| files.iter().any(|path| path.to_str().unwrap().contains(part));
        let expected = ["/new", "/old", "/.unpublished.", "/state/moves/"];
        assert!(files.len() == 4 && expected.iter().all(|part| has(part)), "{umask}: {files:?}");
    }
}

#[test]
fn streams_of_version_1_without_a_seal_are_loaded() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/streams/version-1-memory");
    let (ends, there) = ends();
    let verified = verify(&SnapshotFile::new(&file), ends.options.silence_max, None).unwrap();
    assert!(!verified.sealed);
    assert_eq!((verified.bytes, verified.covered_bytes), (5171, 5171));
    let received =
        ends.with_destination(|destination| destination.load(&SnapshotFile::new(&file), AfterLoad::Stop));
    assert!(matches!(received, Received::Stopped(_)), "{received:?}");
    assert!(ends.destination[0].holds_guest());
    let there = there.0.lock().unwrap();
    let expected: Vec<u8> = (0..100).collect();
    assert!(there[12288..12388] == expected[..] && there[12388..].iter().all(|byte| *byte == 0));
}

#[test]
fn sealed_streams_of_version_1_are_loaded() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/streams/version-1-sealed");
    let (ends, there) = ends();
    let verified = verify(&SnapshotFile::new(&file), ends.options.silence_max, None).unwrap();
    assert!(verified.sealed);
    let hash = blake3::Hash::from_bytes(verified.blake3).to_string();
    assert_eq!(hash, HASH_OF_SEALED);
    let received =
        ends.with_destination(|destination| destination.load(&SnapshotFile::new(&file), AfterLoad::Run));
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert!(there.0.lock().unwrap()[12288..12388].iter().all(|byte| *byte == 0x77));
}

const HASH_OF_SEALED: &str = "6f8ca0a8847bbdd78b3bb09f4967202542d6aac6f3b7b5b025db35f831b7ec09";

#[test]
fn a_file_that_is_there_gives_way_only_where_that_was_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    std::fs::write(&path, "an older one").unwrap();
    let (ends, _) = ends();
    let save = |to: SnapshotFile| ends.with_source(|source| source.save(&to, AfterSave::Run));
    let outcome = save(SnapshotFile::new(&path));
    let Outcome::Undone { why: Error::Snapshot { error, .. }, .. } = &outcome else { panic!("{outcome:?}") };
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"an older one");
    assert!(matches!(save(SnapshotFile::new(&path).replacing(true)), Outcome::Moved(_)));
    assert!(verify(&SnapshotFile::new(&path), ends.options.silence_max, None).unwrap().sealed);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn a_file_that_comes_while_a_snapshot_is_written_is_not_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let file = SnapshotFile::new(&path);
    let wait = Wait::within(std::time::Duration::from_secs(10), None);
    let mut writer = file.create(wait).unwrap();
    assert_eq!(writer.write(b"mine", wait).unwrap(), 4);
    std::fs::write(&path, "somebody else's").unwrap();
    let Publication::NotPublished(LinkError::Io(error)) = writer.publish(wait) else { panic!("not refused") };
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"somebody else's");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing of it is left");
}

#[test]
fn a_load_can_be_called_off_while_it_reads() {
    let (bytes, ends) = saved();
    let cancel = Cancel::new().unwrap();
    let place = Handle(Arc::new(Place { cancel: Some(cancel.clone()), ..Place::of(&bytes) }));
    let received = ends
        .with_destination(|destination| destination.with_cancel(Some(&cancel)).load(&place, AfterLoad::Run));
    assert!(matches!(received, Received::Discarded { why: Error::Cancelled, .. }), "{received:?}");
    assert!(!ends.destination[0].holds_guest());
}
