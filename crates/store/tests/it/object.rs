//! Snapshots in a real S3 server: saved, loaded, and refused when anything is wrong with them; and whatever happens to
//! the server or the saver, nothing that is not whole can be loaded, and the source runs again.

use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{BUCKET, DENIED, End, MISSING, Server, object};
use limosa_client::DeviceExt;
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{
    AfterLoad, AfterSave, Cancel, Error, Outcome, Received, SnapshotReader, SnapshotSource, inspect_snapshot,
    verify,
};
use limosa_protocol::State;
use limosa_store::Object;
use limosa_stream::Damage;
use limosa_testing::{Process, this_test};

const SILENCE_MAX: Duration = Duration::from_secs(20);

/// What the error says, of a save that left its source running.
fn undone(source: &End, outcome: Outcome) -> (ErrorKind, String) {
    let Outcome::Undone { why, report } = outcome else { panic!("{outcome:?}") };
    assert_eq!(source.device.state().unwrap(), State::Running, "{:?}", report.notes);
    let Error::Snapshot { error, .. } = &why else { panic!("{why}") };
    (error.kind(), why.to_string())
}

/// What the error says, of a load that left its device as it was.
fn discarded(end: &End, received: Received) -> Error {
    let Received::Discarded { why, report } = received else { panic!("{received:?}") };
    assert_eq!(end.device.state().unwrap(), State::Running, "{:?}", report.notes);
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    why
}

fn save(server: &Server, key: &str) -> End {
    let source = End::new(7);
    let outcome = source.save(&object(server, key), AfterSave::Stop, None);
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    source
}

#[test]
fn devices_and_memory_are_saved_and_loaded() {
    let server = Server::start();
    let source = save(&server, "guests/17");
    assert_eq!(source.device.state().unwrap(), State::Stop);
    let object = object(&server, "guests/17");
    let verified = verify(&object, SILENCE_MAX, None).unwrap();
    assert!(verified.sealed);
    // The object is the stream and nothing else.
    let file = std::fs::read(server.file("guests/17")).unwrap();
    assert_eq!(verified.bytes, file.len() as u64);
    assert!(file.len() > 24 << 20, "more than three parts");
    assert_eq!(blake3::Hash::from_bytes(verified.blake3), blake3::hash(&file[..file.len() - 72]));
    let inspection = inspect_snapshot(&object, SILENCE_MAX, None).unwrap();
    assert!(inspection.whole && inspection.sealed, "{inspection}");
    let end = End::new(0);
    let received = end.load(&object, AfterLoad::Run);
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert_eq!(end.device.state().unwrap(), State::Running);
    assert!(end.contents() == source.contents());
    // Only what the source had touched takes room.
    let (here, there) = (source.memory.file.metadata().unwrap(), end.memory.file.metadata().unwrap());
    assert_eq!(here.blocks(), there.blocks());
    assert_eq!(server.unfinished(), 0);
}

#[test]
fn an_object_that_is_there_gives_way_only_where_that_was_asked_for() {
    let server = Server::start();
    save(&server, "one");
    let before = std::fs::read(server.file("one")).unwrap();
    let other = End::new(8);
    let (kind, why) = undone(&other, other.save(&object(&server, "one"), AfterSave::Stop, None));
    assert_eq!(kind, ErrorKind::AlreadyExists, "{why}");
    assert!(why.starts_with("s3://snapshots/one: creating it: there is an object already"), "{why}");
    assert!(std::fs::read(server.file("one")).unwrap() == before);
    let replacing = object(&server, "one").replacing(true).unwrap();
    assert!(matches!(other.save(&replacing, AfterSave::Run, None), Outcome::Moved(_)));
    assert!(std::fs::read(server.file("one")).unwrap() != before);
}

#[test]
fn an_object_that_comes_while_one_is_uploaded_is_not_overwritten() {
    let server = Server::start();
    let file = server.file("raced");
    let source = End::new(7).when_at(20 << 20, move || std::fs::write(&file, "somebody else's").unwrap());
    let (kind, why) = undone(&source, source.save(&object(&server, "raced"), AfterSave::Stop, None));
    assert_eq!(kind, ErrorKind::AlreadyExists, "{why}");
    assert!(why.contains("publishing it: there is an object already"), "{why}");
    assert_eq!(std::fs::read(server.file("raced")).unwrap(), b"somebody else's");
    assert_eq!(server.unfinished(), 0, "the upload was aborted");
}

#[test]
fn a_save_that_is_called_off_leaves_nothing() {
    let server = Server::start();
    let cancel = Cancel::new().unwrap();
    let when = cancel.clone();
    let source = End::new(7).when_at(20 << 20, move || when.cancel());
    let outcome = source.save(&object(&server, "off"), AfterSave::Run, Some(&cancel));
    assert!(matches!(outcome, Outcome::Undone { why: Error::Cancelled, .. }), "{outcome:?}");
    assert_eq!(source.device.state().unwrap(), State::Running);
    assert_eq!((server.objects().len(), server.unfinished()), (0, 0));
}

#[test]
fn a_server_that_goes_away_while_a_snapshot_is_saved_leaves_the_source_running() {
    let server = Arc::new(Mutex::new(Server::start()));
    let going = server.clone();
    let source = End::new(7).when_at(20 << 20, move || going.lock().unwrap().stop());
    let object = object(&server.lock().unwrap(), "gone");
    let (_, why) = undone(&source, source.save(&object, AfterSave::Stop, None));
    let server = server.lock().unwrap();
    assert!(why.contains(&server.address.to_string()) && why.contains("is the store up?"), "{why}");
    assert!(server.objects().is_empty());
}

#[test]
fn a_server_that_goes_away_while_a_snapshot_is_loaded_leaves_the_device_as_it_was() {
    let server = Arc::new(Mutex::new(Server::start()));
    save(&server.lock().unwrap(), "gone");
    let going = server.clone();
    let end = End::new(0).when_at(0, move || going.lock().unwrap().stop());
    let object = object(&server.lock().unwrap(), "gone");
    let why = discarded(&end, end.load(&object, AfterLoad::Run)).to_string();
    assert!(
        why.starts_with("s3://snapshots/gone: reading it: ") && why.contains("is the store up?"),
        "{why}"
    );
}

#[test]
fn a_server_that_is_not_there_is_said_before_anything_is_touched() {
    let mut server = Server::start();
    server.stop();
    let end = End::new(7);
    let (kind, why) = undone(&end, end.save(&object(&server, "one"), AfterSave::Stop, None));
    assert_eq!(kind, ErrorKind::ConnectionAborted, "{why}");
    assert!(why.contains(&server.address.to_string()) && why.contains("onnection refused"), "{why}");
    let why = discarded(&end, end.load(&object(&server, "one"), AfterLoad::Run)).to_string();
    assert!(why.starts_with("s3://snapshots/one: opening it: "), "{why}");
}

#[test]
fn an_object_that_is_missing_passed_for_an_empty_one_when_its_name_had_the_status_of_a_range() {
    let server = Server::start();
    let end = End::new(0);
    let load = |key: &str| discarded(&end, end.load(&object(&server, key), AfterLoad::Run)).to_string();
    for key in ["vm-416", "InvalidRange"] {
        let why = load(key);
        assert!(why.contains("there is no such object"), "{why}");
    }
    std::fs::write(server.file("empty"), b"").unwrap();
    let why = load("empty");
    assert!(why.contains("s3://snapshots/empty, byte 0: "), "{why}");
}

#[test]
fn what_a_bucket_refuses_is_said_before_anything_is_touched() {
    let server = Server::start();
    let with = |bucket: &str, secret: &str| {
        let mut variables = server.variables();
        variables[1].1 = secret.into();
        Object::new(&format!("s3://{bucket}/one"), variables).unwrap()
    };
    let cases = [
        (
            with(DENIED, "the-secret"),
            ErrorKind::PermissionDenied,
            "denies access to bucket `denied` (AccessDenied: by the",
        ),
        (
            with(BUCKET, "wrong"),
            ErrorKind::PermissionDenied,
            "does not accept the credentials (SignatureDoesNotMatch",
        ),
        (with(MISSING, "the-secret"), ErrorKind::NotFound, "`nowhere` at http://127."),
    ];
    for (object, expected, text) in cases {
        let end = End::new(7);
        let (kind, why) = undone(&end, end.save(&object, AfterSave::Stop, None));
        assert_eq!(kind, expected, "{why}");
        assert!(why.contains("creating it") && why.contains(text), "{why}");
        let why = discarded(&end, end.load(&object, AfterLoad::Run));
        let Error::Snapshot { error, .. } = &why else { panic!("{why}") };
        assert_eq!(error.kind(), expected, "{why}");
        assert!(why.to_string().contains(text), "{why}");
    }
    let end = End::new(0);
    let why = discarded(&end, end.load(&object(&server, "missing"), AfterLoad::Run)).to_string();
    assert!(why.contains("there is no such object in bucket `snapshots`"), "{why}");
}

#[test]
fn an_object_that_was_altered_or_cut_at_rest_is_refused_before_a_device_or_memory_is_touched() {
    let server = Server::start();
    save(&server, "old");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(server.file("old")).unwrap();
    let bytes = file.metadata().unwrap().len();
    let touched = End::new(0).when_at(0, || panic!("memory was touched"));
    for at in [3, 200, bytes / 2, bytes - 100, bytes - 10] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        let why = discarded(&touched, touched.load(&object(&server, "old"), AfterLoad::Run));
        assert!(matches!(why, Error::Stream { .. }), "{at}: {why}");
        file.write_all_at(&byte, at).unwrap();
    }
    for end in [bytes - 1, bytes - 72, bytes / 2, 10, 0] {
        file.set_len(end).unwrap();
        let why = discarded(&touched, touched.load(&object(&server, "old"), AfterLoad::Run));
        let Error::Stream { damage, .. } = &why else { panic!("{end}: {why}") };
        // What a server finds behind the end of a file that it did not cut itself is its own affair.
        assert!(matches!(damage, Damage::Truncated { .. }), "{end}: {why}");
    }
}

/// Puts another object in the place of one when that has been verified.
struct Replaced<'a> {
    object: Object,
    server: &'a Server,
}

impl SnapshotSource for Replaced<'_> {
    fn name(&self) -> String {
        SnapshotSource::name(&self.object)
    }

    fn open(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError> {
        let replacing = object(self.server, "two").replacing(true).unwrap();
        Ok(Box::new(Replacing(self.object.open(wait)?, replacing)))
    }
}

struct Replacing(Box<dyn SnapshotReader>, Object);

impl SnapshotReader for Replacing {
    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.0.read(into, wait)
    }

    fn rewind(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        let other = End::new(9);
        let outcome = other.save(&self.1, AfterSave::Run, None);
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
        self.0.rewind(wait)
    }
}

#[test]
fn an_object_that_is_replaced_between_its_verification_and_its_load_is_discarded() {
    let server = Server::start();
    save(&server, "two");
    let end = End::new(0);
    let replaced = Replaced { object: object(&server, "two"), server: &server };
    let why = discarded(&end, end.load(&replaced, AfterLoad::Run)).to_string();
    assert!(why.contains("the object was replaced while it was being read"), "{why}");
    assert!(matches!(end.load(&object(&server, "two"), AfterLoad::Run), Received::Runs(_)), "the new one");
}

/// Not a test: the saver that [`a_saver_that_is_killed_leaves_nothing_that_could_be_loaded`] kills.
#[test]
#[ignore = "a part of another test"]
fn saver() {
    let Ok(address) = std::env::var("LIMOSA_TEST_S3") else { return };
    let variables = [
        ("AWS_ACCESS_KEY_ID", "the-id"),
        ("AWS_SECRET_ACCESS_KEY", "the-secret"),
        ("AWS_ENDPOINT_URL", address.as_str()),
        ("AWS_ALLOW_HTTP", "true"),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let object = Object::new(&format!("s3://{BUCKET}/killed"), variables).unwrap();
    let source = End::new(7).when_at(20 << 20, || {
        println!("\nat 20 MiB");
        std::io::stdout().flush().unwrap();
        loop {
            std::thread::park();
        }
    });
    let _ = source.save(&object, AfterSave::Run, None);
}

#[test]
fn a_saver_that_is_killed_leaves_nothing_that_could_be_loaded() {
    let server = Server::start();
    let saver = Process::start(
        this_test("object::saver").env("LIMOSA_TEST_S3", format!("http://{}", server.address)),
    );
    saver.line("at 20 MiB");
    saver.kill();
    assert!(server.objects().is_empty(), "nothing is under any name");
    let end = End::new(0);
    let why = discarded(&end, end.load(&object(&server, "killed"), AfterLoad::Run)).to_string();
    assert!(why.contains("there is no such object"), "{why}");
    save(&server, "killed");
    assert!(matches!(end.load(&object(&server, "killed"), AfterLoad::Run), Received::Runs(_)));
}
