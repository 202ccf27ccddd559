//! Regions that a client has mapped: the file goes over, and is no other client's.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use limosa_client::Device;
use limosa_device::saved::Section;
use limosa_device::{
    Bus, Description, Fault, IoEventFd, Machine, Region, RegionMapping, SimpleModel, Whole, WholeState,
};
use limosa_protocol::Errno;
use limosa_protocol::info::RegionFlags;
use limosa_vfio_user::client::{Client, Options as ClientOptions};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::{Running, memory};

const BOARD_BYTES: u64 = 8192;

/// A region in a file that its client may map, and that is its next client's no more. `adopts` says whether it goes on with the
/// file of another process.
struct Board {
    file: Arc<OwnedFd>,
    first: Arc<OwnedFd>,
    adopts: bool,
    /// It panics when it is asked for its file after it was loaded.
    is_fragile: bool,
    is_loaded: bool,
}

impl Board {
    fn new(adopts: bool, bytes: u64) -> Board {
        let file = Arc::new(memory(bytes));
        Board { first: Arc::clone(&file), file, adopts, is_fragile: false, is_loaded: false }
    }

    fn machine(adopts: bool) -> Arc<Machine> {
        Machine::simple(Whole::new(Board::new(adopts, BOARD_BYTES)))
    }
}

impl SimpleModel for Board {
    fn description(&self) -> Description {
        let mapping = RegionMapping { fd: Arc::clone(&self.first), offset: 0, areas: vec![(0, 4096)] };
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        let region = Region { flags, size: BOARD_BYTES, mapping: Some(mapping), ..Region::default() };
        Description { regions: vec![region], ..Description::default() }
    }

    fn attach(&mut self, _: Bus) {}

    fn region_read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        rustix::io::pread(&*self.file, data, offset).map(drop).map_err(|_| Errno::EIO)
    }

    fn region_write(&mut self, _: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        rustix::io::pwrite(&*self.file, data, offset).map(drop).map_err(|_| Errno::EIO)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    fn client_gone(&mut self) {
        let (fresh, mut contents) = (memory(BOARD_BYTES), vec![0; BOARD_BYTES as usize]);
        rustix::io::pread(&*self.file, &mut contents, 0).unwrap();
        rustix::io::pwrite(&fresh, &contents, 0).unwrap();
        self.file = Arc::new(fresh);
    }

    fn region_file(&self, _: u32) -> Option<Arc<OwnedFd>> {
        assert!(!(self.is_fragile && self.is_loaded), "a file that the model panics on");
        Some(Arc::clone(&self.file))
    }

    fn adopts_region_files(&self) -> bool {
        self.adopts
    }

    fn adopt_region_file(&mut self, _: u32, file: Arc<OwnedFd>) -> Result<(), Errno> {
        self.file = file;
        Ok(())
    }
}

/// All that a board is lies in its file.
#[derive(Clone, PartialEq, prost::Message)]
struct SavedBoard {}

impl WholeState for Board {
    type Saved = SavedBoard;
    const KIND: &'static str = "test.board";
    const SECTION: Section = Section::message("board", 1);

    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn to_saved(&self) -> SavedBoard {
        SavedBoard {}
    }

    fn restore(&mut self, _: SavedBoard) -> Result<(), Errno> {
        self.is_loaded = true;
        Ok(())
    }
}

#[test]
fn what_a_client_has_mapped_of_a_region_is_the_same_file_in_the_new_server_and_never_the_next_clients() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device0");
    let mut running = Running::bind(folder.path(), vec![Board::machine(true)]);
    let client = Client::connect(&path, ClientOptions::default()).unwrap();
    let region = client.region(0).unwrap();
    assert_eq!(region.mappable, [(0, 4096)]);
    let mapped = region.fd.unwrap();
    for round in 1..=3u8 {
        running = running.replaced_by(vec![Board::machine(true)]);
        rustix::io::pwrite(&*mapped, &[round], 7).unwrap();
        let mut seen = [0; 1];
        client.region_read(0, 7, &mut seen).unwrap();
        assert_eq!(seen, [round], "what the client writes is the device's");
        client.region_write(0, 8, &[round + 100]).unwrap();
        rustix::io::pread(&*mapped, &mut seen, 8).unwrap();
        assert_eq!(seen, [round + 100], "and the other way round");
    }
    drop(client);
    // Waits until the first has gone.
    let next = Client::connect(&path, ClientOptions::default()).unwrap();
    rustix::io::pwrite(&*mapped, &[99], 7).unwrap();
    let mut seen = [0; 1];
    next.region_read(0, 7, &mut seen).unwrap();
    assert_eq!(seen, [3], "a client that has gone reaches the next one");
    let its = next.region(0).unwrap().fd.unwrap();
    next.region_write(0, 7, &[5]).unwrap();
    rustix::io::pread(&*its, &mut seen, 7).unwrap();
    assert_eq!(seen, [5]);
    drop(running);
}

#[test]
fn a_client_that_comes_while_its_server_is_replaced_has_a_file_of_its_own_in_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device0");
    let running = Running::bind(folder.path(), vec![Board::machine(true)]);
    let mut first = Some(Client::connect(&path, ClientOptions::default()).unwrap());
    let mut next = None;
    let running = running.replaced_meanwhile(vec![Board::machine(true)], |round| {
        if round == 1 {
            first = None;
            let client = Client::connect(&path, ClientOptions::default()).unwrap();
            next = Some((client.region(0).unwrap().fd.unwrap(), client));
        }
        Ok(())
    });
    drop(first);
    let (mapped, client) = next.unwrap();
    rustix::io::pwrite(&*mapped, &[3], 0).unwrap();
    let mut seen = [0; 1];
    client.region_read(0, 0, &mut seen).unwrap();
    assert_eq!(seen, [3]);
    drop((client, running));
}

#[test]
fn a_region_file_that_the_new_device_cannot_go_on_with_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::bind(folder.path(), vec![Board::machine(true)]);
    let refused = running.refuses(vec![Board::machine(false)]);
    assert!(refused.contains("device 0") && refused.contains("mapped region 0"), "{refused}");
    // Its own file is larger: the region would end within the old one.
    let larger = Machine::simple(Whole::new(Board::new(true, 2 * BOARD_BYTES)));
    let refused = running.refuses(vec![larger]);
    assert!(refused.contains("region 0 has 8192 bytes"), "{refused}");
    let sealed = Board::new(true, BOARD_BYTES);
    let file = memfd_create("sealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, BOARD_BYTES).unwrap();
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::SHRINK).unwrap();
    let file = Arc::new(file);
    let sealed = Board { first: Arc::clone(&file), file, ..sealed };
    let refused = running.refuses(vec![Machine::simple(Whole::new(sealed))]);
    assert!(refused.contains("lacks the seals"), "{refused}");
    drop(running.replaced_by(vec![Board::machine(true)]));
}

#[test]
fn a_new_device_that_panicked_on_its_region_file_replaced_one_that_worked() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::bind(folder.path(), vec![Board::machine(true)]);
    let client = Client::connect(folder.path().join("device0"), ClientOptions::default()).unwrap();
    client.region_write(0, 0, b"kept").unwrap();
    let fragile = Board { is_fragile: true, ..Board::new(true, BOARD_BYTES) };
    let refused = running.refuses(vec![Machine::simple(Whole::new(fragile))]);
    assert!(refused.contains("device 0"), "{refused}");
    let mut kept = [0; 4];
    client.region_read(0, 0, &mut kept).unwrap();
    assert_eq!(&kept, b"kept");
    drop(running);
}

/// A device with two registers that a client may signal by one eventfd, and one by another. `adopts` says whether it goes on
/// with those of another process.
struct Doorbell {
    fds: [Arc<OwnedFd>; 2],
    adopts: bool,
}

impl Doorbell {
    fn machine(adopts: bool) -> Arc<Machine> {
        let fd = || Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        Machine::simple(Whole::new(Doorbell { fds: [fd(), fd()], adopts }))
    }
}

impl SimpleModel for Doorbell {
    fn description(&self) -> Description {
        let [first, second] = &self.fds;
        let signal = |offset, fd, datamatch| IoEventFd { offset, size: 4, fd: Arc::clone(fd), datamatch };
        let ioeventfds = vec![signal(0, first, None), signal(4, second, Some(7)), signal(8, first, None)];
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        let region = Region { flags, size: 16, ioeventfds, ..Region::default() };
        Description { regions: vec![region], ..Description::default() }
    }

    fn attach(&mut self, _: Bus) {}

    /// How often each eventfd was signalled since the last time.
    fn region_read(&mut self, _: u32, _: u64, data: &mut [u8]) -> Result<(), Errno> {
        for (byte, fd) in data.iter_mut().zip(&self.fds) {
            let mut count = [0; 8];
            *byte = if rustix::io::read(&**fd, &mut count).is_ok() { count[0] } else { 0 };
        }
        Ok(())
    }

    fn region_write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    fn adopts_ioeventfds(&self) -> bool {
        self.adopts
    }

    fn adopt_ioeventfds(&mut self, _: u32, fds: Vec<Arc<OwnedFd>>) -> Result<(), Errno> {
        assert!(Arc::ptr_eq(&fds[0], &fds[2]), "registers that shared an eventfd share one still");
        self.fds = [Arc::clone(&fds[0]), Arc::clone(&fds[1])];
        Ok(())
    }
}

impl WholeState for Doorbell {
    type Saved = SavedBoard;
    const KIND: &'static str = "test.doorbell";
    const SECTION: Section = Section::message("doorbell", 1);

    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn to_saved(&self) -> SavedBoard {
        SavedBoard {}
    }

    fn restore(&mut self, _: SavedBoard) -> Result<(), Errno> {
        Ok(())
    }
}

#[test]
fn eventfds_that_a_client_signals_reach_the_new_device_also_when_nobody_ran_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device0");
    let mut running = Running::bind(folder.path(), vec![Doorbell::machine(true)]);
    let refused = running.refuses(vec![Doorbell::machine(false)]);
    assert!(refused.contains("eventfds of region 0"), "{refused}");
    let client = Client::connect(&path, ClientOptions::default()).unwrap();
    let counts = |client: &Client| {
        let mut counts = [0; 2];
        client.region_read(0, 0, &mut counts).unwrap();
        counts
    };
    let signals = client.region_io_fds(0).unwrap();
    assert_eq!(signals.entries.len(), 3);
    let ring = |entry: usize| {
        let fd = signals.fds[signals.entries[entry].fd_index as usize].as_fd();
        rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
    };
    ring(0);
    assert_eq!(counts(&client), [1, 0]);
    for _ in 0..3 {
        // Nobody has read these when the device is frozen.
        [0, 1, 2].into_iter().for_each(ring);
        running = running.replaced_by(vec![Doorbell::machine(true)]);
        assert_eq!(counts(&client), [2, 1]);
        ring(1);
        assert_eq!(counts(&client), [0, 1]);
    }
    // A client that asks for them now is given the same ones.
    let again = client.region_io_fds(0).unwrap();
    rustix::io::write(again.fds[again.entries[2].fd_index as usize].as_fd(), &1u64.to_ne_bytes()).unwrap();
    assert_eq!(counts(&client), [1, 0]);
    drop((client, running));
}
