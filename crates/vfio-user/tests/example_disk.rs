//! The PCI device of `docs/device.md`, in processes of its own: it moves while it works, and loses nothing.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use limosa_client::{Chunk, Device, DeviceExt, DmaMap, DmaMemory, DmaTarget, IrqAction};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{State, pci_index};
use limosa_testing::{LIMIT, Process, built_example, memfd};
use limosa_vfio_user::client::{Client, Options};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

const ADDRESS: u64 = 0x00;
const OFFSET: u64 = 0x08;
const BYTES: u64 = 0x10;
const DONE: u64 = 0x18;
const FAILED: u64 = 0x20;

const FILE_BYTES: u64 = 8 << 20;
const MEMORY_BYTES: u64 = 128 << 20;

/// The guest: its memory, its interrupt, and the disks that it may have, one at a time.
struct Guest {
    memory: File,
    interrupt: std::os::fd::OwnedFd,
    file: File,
    folder: tempfile::TempDir,
    servers: Vec<Process>,
}

impl Guest {
    fn new() -> Guest {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create_new(folder.path().join("file")).unwrap();
        let content: Vec<u8> = (0..FILE_BYTES / 8)
            .flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        file.write_all_at(&content, 0).unwrap();
        let file = File::open(folder.path().join("file")).unwrap();
        let interrupt = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        Guest { memory: memfd(MEMORY_BYTES), interrupt, file, folder, servers: Vec::new() }
    }

    /// A disk of a server of its own, with memory and interrupt, which is left to be waited for.
    fn disk(&mut self) -> Client {
        let path: PathBuf = self.folder.path().join(format!("disk{}", self.servers.len()));
        let mut command = Command::new(built_example("limosa-vfio-user", "disk"));
        self.servers.push(Process::start(command.arg(&path).arg(self.folder.path().join("file"))));
        let begun = Instant::now();
        let client = loop {
            match Client::connect(&path, Options::default()) {
                Ok(client) => break client,
                Err(error) => assert!(begun.elapsed() < LIMIT, "{error}"),
            }
            std::thread::yield_now();
        };
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        let memory = DmaMemory::File { fd: self.memory.as_fd(), offset: 0 };
        client.dma_map(&DmaMap { iova: 0, size: MEMORY_BYTES, flags, memory }).unwrap();
        let wire = IrqAction::Wire(&[Some(self.interrupt.as_fd())]);
        client.set_irqs(pci_index::IRQ_MSIX, 0, wire).unwrap();
        client
    }

    /// Waits for an interrupt, and takes it.
    #[track_caller]
    fn wait(&self) {
        let limit = Timespec::try_from(LIMIT).unwrap();
        let mut fds = [PollFd::new(&self.interrupt, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&limit)), Ok(1), "no interrupt comes");
        rustix::io::read(&self.interrupt, &mut [0; 8]).unwrap();
    }

    fn has(&self, address: u64, offset: u64, bytes: u64) -> bool {
        let (mut there, mut expected) = (vec![0; bytes as usize], vec![0; bytes as usize]);
        self.memory.read_exact_at(&mut there, address).unwrap();
        self.file.read_exact_at(&mut expected, offset).unwrap();
        there == expected
    }
}

fn master(disk: &Client) {
    disk.region_write(pci_index::CONFIG, 4, &6u16.to_le_bytes()).unwrap();
}

fn register(disk: &Client, at: u64) -> u64 {
    let mut value = [0; 8];
    disk.region_read(0, at, &mut value).unwrap();
    u64::from_le_bytes(value)
}

fn request(disk: &Client, address: u64, offset: u64, bytes: u64) {
    for (at, value) in [(ADDRESS, address), (OFFSET, offset), (BYTES, bytes)] {
        disk.region_write(0, at, &value.to_le_bytes()).unwrap();
    }
}

fn move_between(from: &Client, to: &Client) {
    let mut source = from.set_state(State::StopCopy).unwrap().expect("a session");
    let mut target = to.set_state(State::Resuming).unwrap().expect("a session");
    let mut chunk = [0; 1000];
    loop {
        match source.read(&mut chunk).unwrap() {
            Chunk::Data(bytes) => target.write(&chunk[..bytes]).unwrap(),
            Chunk::End => break,
            Chunk::NothingForNow => unreachable!("the device is stopped"),
        }
    }
    drop((source, target));
    to.set_state(State::Stop).unwrap();
}

#[test]
fn the_disk_moves_ten_times_while_it_works_and_loses_nothing() {
    const REQUESTS: u64 = 60;
    const EACH: u64 = 2 << 20;
    let mut guest = Guest::new();
    let (mut here, mut there) = (guest.disk(), guest.disk());
    master(&here);
    // Not at whole pages, neither in memory nor in the file.
    let slot = |request: u64| (request * EACH + request * 24, request * 4099);
    for at in 0..REQUESTS {
        let (address, offset) = slot(at);
        request(&here, address, offset, EACH);
    }
    let mut carried = 0;
    for _ in 0..10 {
        move_between(&here, &there);
        // Neither of both works now.
        let done = register(&there, DONE);
        carried += u64::from(done < REQUESTS);
        assert_eq!(register(&here, DONE), done);
        there.set_state(State::Running).unwrap();
        here.reset().unwrap();
        (here, there) = (there, here);
        // As a driver does: it is interrupted, takes that back, and looks what is done.
        guest.wait();
        here.region_write(0, DONE, &0u64.to_le_bytes()).unwrap();
    }
    assert!(carried > 0, "the device was never moved while it worked");
    while register(&here, DONE) < REQUESTS {
        guest.wait();
    }
    assert_eq!((register(&here, DONE), register(&here, FAILED)), (REQUESTS, 0));
    for at in 0..REQUESTS {
        let (address, offset) = slot(at);
        assert!(guest.has(address, offset, EACH), "request {at}");
    }
}

#[test]
fn what_cannot_be_done_fails_and_is_told() {
    let mut guest = Guest::new();
    let disk = guest.disk();
    let mut failed = 0;
    let mut fails = |address: u64, offset: u64, bytes: u64| {
        request(&disk, address, offset, bytes);
        guest.wait();
        failed += 1;
        assert_eq!((register(&disk, DONE), register(&disk, FAILED)), (failed, failed));
    };
    fails(0, 0, 4096); // It may not write memory yet.
    master(&disk);
    fails(0, 0, 0);
    fails(u64::MAX, 0, 2);
    fails(0, u64::MAX, 2);
    fails(MEMORY_BYTES, 0, 1);
    fails(0, FILE_BYTES, 1);
    request(&disk, 5, 7, 100);
    guest.wait();
    assert_eq!(register(&disk, FAILED), failed);
    assert!(guest.has(5, 7, 100));
    // More than it takes: none is lost, and each is answered.
    let before = register(&disk, DONE);
    disk.set_state(State::Stop).unwrap();
    for _ in 0..300 {
        request(&disk, 0, 0, 64);
    }
    assert_eq!(register(&disk, FAILED), failed + 300 - 256);
    disk.set_state(State::Running).unwrap();
    while register(&disk, DONE) < before + 300 {
        guest.wait();
    }
    // What is under way ends with a reset.
    (0..50).for_each(|_| request(&disk, 0, 0, FILE_BYTES));
    disk.reset().unwrap();
    assert_eq!((register(&disk, DONE), register(&disk, BYTES)), (0, 0));
}

#[test]
fn memory_that_cannot_be_pinned_is_written_by_messages() {
    let mut guest = Guest::new();
    let disk = guest.disk();
    master(&disk);
    disk.dma_unmap(0, MEMORY_BYTES, None).unwrap();
    struct Target(File);
    impl DmaTarget for Target {
        fn read(&self, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
            self.0.read_exact_at(data, offset)
        }
        fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
            self.0.write_all_at(data, offset)
        }
    }
    let target: Arc<dyn DmaTarget> = Arc::new(Target(guest.memory.try_clone().unwrap()));
    let memory = DmaMemory::Messages(&target);
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    disk.dma_map(&DmaMap { iova: 0, size: MEMORY_BYTES, flags, memory }).unwrap();
    request(&disk, 1000, 3, 200_000);
    guest.wait();
    assert_eq!((register(&disk, DONE), register(&disk, FAILED)), (1, 0));
    assert!(guest.has(1000, 3, 200_000));
}
