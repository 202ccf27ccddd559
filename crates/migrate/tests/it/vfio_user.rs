//! Moves between two device servers over real vfio-user sockets, and servers that go away in the
//! middle of one.

use std::sync::{Arc, Mutex};

use crate::common::{TestDevice, options, world};
use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory};
use limosa_migrate::{
    Destination, Error, FilePages, GuestPages, Ledger, Memory, MemoryRegion, MovedDevice, Nobody, Observer,
    Outcome, PAGE_BYTES, Phase, Received, Source, move_local,
};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{MigrationFlags, State};
use limosa_testing::memfd;
use limosa_vfio_user::client::{Client, Options};
use limosa_vfio_user::server::{self, Server, ShutdownHandle};
use rustix::fd::AsFd;

const PAGES: u64 = 300;

type Serving = Arc<Mutex<Option<std::thread::JoinHandle<()>>>>;

/// Shuts the server down and waits until it is.
fn shut_down(handle: &ShutdownHandle, serving: &Serving) {
    handle.shut_down();
    if let Some(serving) = serving.lock().unwrap().take() {
        serving.join().unwrap();
    }
}

/// A device behind a socket, and a client of it.
struct Served {
    device: TestDevice,
    client: Client,
    shutdown: ShutdownHandle,
    serving: Serving,
    _directory: tempfile::TempDir,
}

impl Served {
    fn new(device: TestDevice) -> Served {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let machine = Arc::clone(device.client.inner.machine());
        let server = Server::bind(&path, machine, server::Options::default()).unwrap();
        let shutdown = server.shutdown_handle();
        let serving = std::thread::spawn(move || server.serve().unwrap());
        let serving = Arc::new(Mutex::new(Some(serving)));
        let client = Client::connect(&path, Options::default()).unwrap();
        Served { device, client, shutdown, serving, _directory: directory }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        shut_down(&self.shutdown, &self.serving);
    }
}

fn map(client: &Client, file: &std::fs::File) {
    let (iova, size) = (0, PAGES * PAGE_BYTES);
    let memory = DmaMemory::File { fd: file.as_fd(), offset: 0 };
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    client.dma_map(&DmaMap { iova, size, flags, memory }).unwrap();
}

/// A move of a device with memory between two servers.
fn run(
    source: &Served,
    destination: &Served,
    observers: (&dyn Observer, &dyn Observer),
) -> (Outcome, Received, bool) {
    let (here, there) = (memfd(PAGES * PAGE_BYTES), memfd(PAGES * PAGE_BYTES));
    map(&source.client, &here);
    map(&destination.client, &there);
    let (here, there) = (FilePages::new(here, 0), FilePages::new(there, 0));
    here.write(7 * PAGE_BYTES + 5, b"guest").unwrap();
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: PAGES * PAGE_BYTES, pages };
    let (ours, theirs) = ([MovedDevice::new(&source.client)], [MovedDevice::new(&destination.client)]);
    let (options, ledger) = (options(), Ledger::new());
    let destination_memory = [region(&there)];
    let (outcome, received) = move_local(
        Source::new(&ours, &options)
            .with_memory(Memory::stopped(vec![region(&here)]))
            .with_observer(observers.0),
        Destination::new(&theirs, &ledger, &options)
            .with_memory(&destination_memory)
            .with_observer(observers.1),
    );
    let read = |pages: &FilePages| {
        let mut all = vec![0; (PAGES * PAGE_BYTES) as usize];
        pages.read(0, &mut all).unwrap();
        all
    };
    (outcome, received, read(&here) == read(&there))
}

#[test]
fn a_device_of_every_flag_set_moves_between_servers() {
    for flags in MigrationFlags::SETS {
        let (source, destination) = world("dev", flags, 5 << 20);
        let (source, destination) = (Served::new(source), Served::new(destination));
        let (outcome, received, same) = run(&source, &destination, (&Nobody, &Nobody));
        assert!(matches!(received, Received::Runs(_)), "{flags}: {received:?}");
        let Outcome::Moved(report) = outcome else { panic!("{flags}: {outcome:?}") };
        assert_eq!(report.bytes.device_bytes, (5 << 20) + 20);
        assert!(same, "memory");
        assert_eq!(source.client.state().unwrap(), State::Stop);
        assert_eq!(destination.client.state().unwrap(), State::Running);
        assert_eq!(destination.device.data(), source.device.data());
        assert_eq!((source.device.guest.most(), source.device.guest.running()), (1, 1));
    }
}

/// Shuts a server down when a phase begins.
struct ShutDownAt(Phase, ShutdownHandle, Serving);

impl ShutDownAt {
    fn new(phase: Phase, served: &Served) -> ShutDownAt {
        ShutDownAt(phase, served.shutdown.clone(), Arc::clone(&served.serving))
    }
}

impl Observer for ShutDownAt {
    fn phase(&self, phase: Phase) {
        if phase == self.0 {
            shut_down(&self.1, &self.2);
        }
    }
}

#[test]
fn a_destination_s_server_that_goes_away_leaves_the_source_running() {
    for phase in [Phase::PreCopy, Phase::StopCopy, Phase::Load, Phase::Commit, Phase::Start] {
        let (source, destination) = world("dev", MigrationFlags::SETS[3], 5 << 20);
        let (source, destination) = (Served::new(source), Served::new(destination));
        let gone = ShutDownAt::new(phase, &destination);
        let (outcome, received, _) = run(&source, &destination, (&Nobody, &gone));
        assert!(matches!(received, Received::Discarded { .. }), "{phase:?}: {received:?}");
        let Outcome::Undone { why, .. } = &outcome else { panic!("{phase:?}: {outcome:?}") };
        assert!(matches!(why, Error::Aborted { .. } | Error::Incompatible { .. }), "{phase:?}: {why}");
        assert_eq!(source.client.state().unwrap(), State::Running, "{phase:?}");
        assert!(source.device.holds_guest());
    }
}

#[test]
fn a_source_s_server_that_goes_away_is_named_and_the_destination_is_empty() {
    for phase in [Phase::PreCopy, Phase::Stop, Phase::StopCopy] {
        let (source, destination) = world("dev", MigrationFlags::SETS[3], 5 << 20);
        let (source, destination) = (Served::new(source), Served::new(destination));
        let gone = ShutDownAt::new(phase, &source);
        let (outcome, received, _) = run(&source, &destination, (&gone, &Nobody));
        // A server that goes when all of its data has been read does not hinder the move.
        if phase == Phase::StopCopy && matches!(outcome, Outcome::Moved(_)) {
            assert!(matches!(received, Received::Runs(_)), "{received:?}");
            assert!(destination.device.holds_guest());
            continue;
        }
        let Outcome::Undone { why: Error::Device { device, .. }, .. } = &outcome else {
            panic!("{outcome:?}")
        };
        assert!(device.ends_with("socket"), "{device}");
        assert!(matches!(received, Received::Discarded { .. }), "{received:?}");
        assert_eq!(destination.client.state().unwrap(), State::Running, "{phase:?}");
        assert!(!destination.device.holds_guest());
    }
}
