//! Panics while a snapshot is saved or loaded: of a device, and of the place.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{
    AfterLoad, AfterSave, Destination, Error, Ledger, MovedDevice, Outcome, Publication, Received,
    SnapshotFile, SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter, Source,
};
use limosa_protocol::State;

use super::{FLAGS, Panicking, guest};
use crate::common::hooked::{Hooked, before_call, ends_in_time, panic_quietly};
use crate::common::options;

#[test]
fn a_panic_of_a_device_leaves_no_snapshot_and_no_half_loaded_device() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    {
        let (source, options) = (Hooked::new("source", FLAGS, &guest()), options());
        let devices = [MovedDevice::new(&source)];
        let saved = Source::new(&devices, &options).save(&SnapshotFile::new(&whole), AfterSave::Stop);
        assert!(matches!(saved, Outcome::Moved(_)), "{saved:?}");
    }
    for n in 0.. {
        let path = folder.path().join(n.to_string());
        let fired = ends_in_time("save", move || {
            let (hook, fired) = before_call(n, |_, _| panic_quietly());
            let (source, options) = (Hooked::new("source", FLAGS, &guest()).hook(hook), options());
            let devices = [MovedDevice::new(&source)];
            match Source::new(&devices, &options).save(&SnapshotFile::new(&path), AfterSave::Run) {
                Outcome::Moved(_) => assert!(path.exists(), "{n}"),
                Outcome::Undone { report, .. } => {
                    assert!(!path.exists(), "{n}");
                    assert!(source.state() == State::Running || !report.unrecovered.is_empty(), "{n}");
                }
                Outcome::InDoubt(doubt) => panic!("{n}: {doubt:?}"),
            }
            fired.load(Ordering::SeqCst)
        });
        if !fired {
            break;
        }
    }
    for n in 0.. {
        let whole = whole.clone();
        let fired = ends_in_time("load", move || {
            let (hook, fired) = before_call(n, |_, _| panic_quietly());
            let (destination, options) = (Hooked::new("destination", FLAGS, &[]).hook(hook), options());
            let (there, ledger) = ([MovedDevice::new(&destination)], Ledger::new());
            let received =
                Destination::new(&there, &ledger, &options).load(&SnapshotFile::new(&whole), AfterLoad::Run);
            match received {
                Received::Runs(_) => assert_eq!(destination.data(), guest(), "{n}"),
                Received::Discarded { report, .. } => {
                    assert!(destination.data() != guest() || !report.unrecovered.is_empty(), "{n}");
                }
                received => panic!("{n}: {received:?}"),
            }
            fired.load(Ordering::SeqCst)
        });
        if !fired {
            break;
        }
    }
}

/// A place that panics in its n-th call, over a file.
struct Place {
    file: SnapshotFile,
    panicking: Arc<Panicking<&'static str>>,
}

impl Place {
    fn new(path: &Path, panics_at: usize) -> Place {
        Place { file: SnapshotFile::new(path), panicking: Arc::new(Panicking::new(panics_at)) }
    }
    fn fired(&self) -> Option<&'static str> {
        *self.panicking.fired.lock().unwrap()
    }
}

struct Handle<T: ?Sized>(Arc<Panicking<&'static str>>, Box<T>);

impl SnapshotTarget for Place {
    fn name(&self) -> String {
        self.panicking.call("name");
        "the place".into()
    }
    fn create(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotWriter>, LinkError> {
        self.panicking.call("create");
        let inner = SnapshotTarget::create(&self.file, wait)?;
        Ok(Box::new(Handle(self.panicking.clone(), inner)))
    }
}

impl SnapshotWriter for Handle<dyn SnapshotWriter> {
    fn write(&mut self, bytes: &[u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.0.call("write");
        self.1.write(bytes, wait)
    }
    fn publish(self: Box<Self>, wait: Wait<'_>) -> Publication {
        self.0.call("publish");
        self.1.publish(wait)
    }
}

impl SnapshotSource for Place {
    fn name(&self) -> String {
        self.panicking.call("name");
        "the place".into()
    }
    fn open(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError> {
        self.panicking.call("open");
        let inner = SnapshotSource::open(&self.file, wait)?;
        Ok(Box::new(Handle(self.panicking.clone(), inner)))
    }
}

impl SnapshotReader for Handle<dyn SnapshotReader> {
    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.0.call("read");
        self.1.read(into, wait)
    }
    fn rewind(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        self.0.call("rewind");
        self.1.rewind(wait)
    }
}

#[test]
fn a_panic_of_a_snapshot_s_place_is_an_error_and_leaves_the_guest_in_doubt_only_when_it_publishes() {
    let folder = tempfile::tempdir().unwrap();
    let options = options();
    for after in [AfterSave::Run, AfterSave::Stop] {
        for n in 0.. {
            let path = folder.path().join(format!("{after:?}-{n}"));
            let place = Place::new(&path, n);
            let source = Hooked::new("source", FLAGS, &guest());
            let devices = [MovedDevice::new(&source)];
            let outcome = Source::new(&devices, &options).save(&place, after);
            let what = format!("{after:?}, call {n}, {:?}", place.fired());
            let is_named = |why: &Error| matches!(why, Error::Panicked { .. });
            match (&outcome, place.fired(), after) {
                (Outcome::Moved(_), None, _) => assert!(path.exists(), "{what}"),
                (Outcome::InDoubt(doubt), Some("publish"), AfterSave::Stop) => {
                    assert!(is_named(&doubt.why) && !source.state().is_running(), "{what}: {doubt:?}");
                }
                (Outcome::Undone { why, .. }, Some(_), _) => {
                    assert!(is_named(why) && source.state() == State::Running, "{what}: {why}");
                    assert!(!path.exists(), "{what}");
                }
                _ => panic!("{what}: {outcome:?}"),
            }
            if place.fired().is_none() {
                break;
            }
        }
    }
    let path = folder.path().join("whole");
    let source = Hooked::new("source", FLAGS, &guest());
    let devices = [MovedDevice::new(&source)];
    let saved = Source::new(&devices, &options).save(&SnapshotFile::new(&path), AfterSave::Stop);
    assert!(matches!(saved, Outcome::Moved(_)), "{saved:?}");
    for n in 0.. {
        let place = Place::new(&path, n);
        let destination = Hooked::new("destination", FLAGS, &[]);
        let (there, ledger) = ([MovedDevice::new(&destination)], Ledger::new());
        let received = Destination::new(&there, &ledger, &options).load(&place, AfterLoad::Run);
        match (received, place.fired()) {
            (Received::Runs(_), None) => break,
            (Received::Discarded { why: Error::Panicked { .. }, .. }, Some(_)) => {
                assert!(destination.data() != guest(), "{n}");
            }
            (received, fired) => panic!("call {n}, {fired:?}: {received:?}"),
        }
    }
}
