//! The synthetic device as a client sees it: moves in every way, and faults on demand.

#[path = "../common/mod.rs"]
mod common;
mod dma;
mod page;
mod refusals;

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use common::{device, drain, drive, load, refused, save};
use limosa_client::{Chunk, Device, DeviceExt, DmaMap, DmaMemory, IrqAction};
use limosa_device::Loopback;
use limosa_models::synthetic::registers::*;
use limosa_models::synthetic::{PAGE_BYTES, Pattern, STATE_REGION, Synthetic, Window};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{Errno, MigrationFlags, State, fsm, pci_index};
use rustix::event::{EventfdFlags, eventfd};

fn synthetic(config: &str) -> Loopback {
    device("synthetic", Synthetic::new(config.parse().unwrap()).unwrap())
}

fn get(device: &dyn Device, register: u64) -> u64 {
    let mut value = [0; 8];
    device.region_read(0, register, &mut value).unwrap();
    u64::from_le_bytes(value)
}

fn set(device: &dyn Device, register: u64, value: u64) {
    device.region_write(0, register, &value.to_le_bytes()).unwrap();
}

const SMALL: &str = "state=256K,block=4K";

/// What makes a state, as far as a client can see.
fn fingerprint(device: &dyn Device) -> (u64, u64, Vec<u8>, Vec<u8>) {
    let mut state = vec![0; 256 << 10];
    device.region_read(STATE_REGION, 0, &mut state).unwrap();
    let mut scratch = vec![0; SCRATCH_BYTES];
    device.region_read(0, SCRATCH, &mut scratch).unwrap();
    (get(device, CHECKSUM), get(device, DIRTIED), state, scratch)
}

/// Guest memory and an interrupt, shared by both ends as on one host.
struct Guest {
    memory: OwnedFd,
    done: OwnedFd,
    window: Window,
}

const BASE: u64 = 0x10_0000;

impl Guest {
    fn new(window: Window) -> Guest {
        let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, window.pages * PAGE_BYTES as u64).unwrap();
        Guest { memory, done: eventfd(0, EventfdFlags::CLOEXEC).unwrap(), window }
    }

    fn wire(&self, device: &dyn Device) {
        device
            .dma_map(&DmaMap {
                iova: BASE,
                size: self.window.pages * PAGE_BYTES as u64,
                flags: DmaMapFlags::READ | DmaMapFlags::WRITE,
                memory: DmaMemory::File { fd: self.memory.as_fd(), offset: 0 },
            })
            .unwrap();
        device.set_irqs(pci_index::IRQ_MSI, 0, IrqAction::Wire(&[Some(self.done.as_fd())])).unwrap();
    }

    fn set_up(&self, device: &dyn Device, limit: u64) {
        set(device, DMA_BASE, BASE);
        set(device, DMA_PAGES, self.window.pages);
        set(device, DMA_PATTERN, self.window.pattern.raw());
        set(device, DMA_RATE, 0);
        set(device, DMA_LIMIT, limit);
        set(device, DMA_CONTROL, 1);
    }

    fn wait(&self) {
        rustix::io::read(&self.done, &mut [0; 8]).unwrap();
    }

    /// Every page holds what so many writes must have left there.
    fn check(&self, writes: u64) {
        let mut page = [0; PAGE_BYTES];
        for (index, expected) in (0..).zip(self.window.expected(writes)) {
            rustix::io::pread(&self.memory, &mut page, index * PAGE_BYTES as u64).unwrap();
            self.window.check(index, expected, &page).unwrap();
        }
    }
}

#[test]
fn the_registers_say_what_was_configured() {
    let device = synthetic("state=1M,block=64K,seed=77,dirty-rate=0,dma-rate=5K,dma-pattern=random");
    for (register, value) in [
        (IDENT, IDENT_VALUE),
        (STATE_BYTES, 1 << 20),
        (BLOCK_BYTES, 64 << 10),
        (SEED, 77),
        (DIRTIED, 0),
        (BAD_BLOCKS, 0),
        (DMA_RATE, 5 << 10),
        (DMA_PATTERN, Pattern::Random.raw()),
        (DMA_CONTROL, 0),
        (0xff8, 0),
    ] {
        assert_eq!(get(&device, register), value, "{register:#x}");
    }
    let mut halves = [0; 4];
    device.region_read(0, IDENT + 4, &mut halves).unwrap();
    assert_eq!(&halves, b"SASY");
    device.region_write(0, DIRTY_RATE + 4, &1_u32.to_le_bytes()).unwrap();
    assert_eq!(get(&device, DIRTY_RATE), 1 << 32);
    for (offset, bytes) in [(DIRTY_RATE + 1, 4), (DIRTY_RATE + 4, 8), (DIRTY_RATE, 2), (DIRTY_RATE, 16)] {
        assert_eq!(refused(device.region_write(0, offset, &vec![0; bytes])), Errno::EINVAL);
    }
}

#[test]
fn a_state_moves_whole_in_stop_copy_whatever_the_pieces() {
    for piece in [1, 7, 16, 4096, 5000, 1 << 20] {
        let (source, destination) = (synthetic(SMALL), synthetic("state=256K,block=4K,seed=9"));
        set(&source, DIRTY, 100);
        source.region_write(0, SCRATCH + 3, b"hello").unwrap();
        let want = fingerprint(&source);
        let mut stream = drive(&source, State::StopCopy);
        let (state, last) = drain(stream.as_mut(), piece);
        assert_eq!(last, Chunk::End);
        load(&destination, &state, piece).unwrap();
        assert_eq!(fingerprint(&destination), want);
        assert_eq!(get(&destination, BAD_BLOCKS), 0);
        // It can be moved on from there.
        destination.set_state(State::Running).unwrap();
        set(&destination, DIRTY, 1);
        let want = fingerprint(&destination);
        source.reset().unwrap();
        load(&source, &save(&destination), 1 << 20).unwrap();
        assert_eq!(fingerprint(&source), want);
    }
}

#[test]
fn a_state_that_changes_during_pre_copy_moves_whole() {
    for piece in [100, 4096, 1 << 20] {
        let (source, destination) = (synthetic(SMALL), synthetic(SMALL));
        let mut out = drive(&source, State::PreCopy);
        let mut into = drive(&destination, State::Resuming);
        let mut data = vec![0; piece];
        let mut rounds = 0;
        // Enough to go round several times; it may change as fast as it is read.
        for _ in 0..(2 << 20) / piece {
            match out.read(&mut data).unwrap() {
                Chunk::Data(bytes) => {
                    into.write(&data[..bytes]).unwrap();
                    set(&source, DIRTY, u64::from(rounds < 3 && bytes > 50));
                }
                Chunk::NothingForNow => {
                    rounds += 1;
                    set(&source, DIRTY, rounds * 7);
                }
                Chunk::End => panic!("an end in pre-copy"),
            }
        }
        source.set_state(State::PreCopyP2p).unwrap();
        assert!(source.set_state(State::StopCopy).unwrap().is_none());
        let (rest, last) = drain(out.as_mut(), piece);
        assert_eq!(last, Chunk::End);
        rest.chunks(piece).for_each(|chunk| into.write(chunk).unwrap());
        destination.set_state(State::Running).unwrap();
        assert_eq!(fingerprint(&destination), fingerprint(&source));
        assert_eq!(get(&destination, BAD_BLOCKS), 0);
    }
}

#[test]
fn a_device_that_changes_at_a_rate_moves_whole() {
    let config = "state=1M,block=4K,dirty-rate=400M";
    let (source, destination) = (synthetic(config), synthetic(config));
    let mut out = drive(&source, State::PreCopy);
    let mut into = drive(&destination, State::Resuming);
    let mut data = vec![0; 64 << 10];
    // A rate that is outrun now and then and never for long: a fixed number of reads.
    for _ in 0..200 {
        if let Chunk::Data(bytes) = out.read(&mut data).unwrap() {
            into.write(&data[..bytes]).unwrap();
        }
    }
    source.set_state(State::StopCopy).unwrap();
    let changes = get(&source, DIRTIED);
    let (rest, _) = drain(out.as_mut(), 64 << 10);
    into.write(&rest).unwrap();
    assert_eq!(get(&source, DIRTIED), changes, "a stopped device changes nothing");
    destination.set_state(State::Stop).unwrap();
    assert_eq!(get(&destination, DIRTIED), changes);
    assert_eq!(get(&destination, CHECKSUM), get(&source, CHECKSUM));
    assert_eq!(get(&destination, BAD_BLOCKS), 0);
    assert_eq!(get(&destination, DIRTY_RATE), 400 << 20);
}

/// A reply of a transport is one piece, or it is copied together.
#[test]
fn reads_are_filled_by_one_piece_once_the_blocks_have_begun() {
    let source = synthetic("state=1M,block=64K");
    let mut stream = drive(&source, State::StopCopy);
    let mut data = vec![0; 100_000];
    let mut pieces = Vec::new();
    while let Chunk::Data(bytes) = stream.read(&mut data).unwrap() {
        pieces.push(bytes);
    }
    let blocks = &pieces[2..pieces.len() - 2];
    assert!(blocks.len() == 10 && blocks.iter().all(|bytes| *bytes == data.len()), "{pieces:?}");
}

#[test]
fn pre_copy_info_counts_what_is_left() {
    let source = synthetic("state=256K,block=4K,precopy=50");
    assert!(source.mig_data_size().unwrap().unwrap() > 256 << 10);
    assert!(source.precopy_info_v2().unwrap());
    let mut stream = drive(&source, State::PreCopy);
    let left = |stream: &mut dyn limosa_client::DataStream| {
        let info = stream.precopy_info().unwrap();
        (info.initial_bytes >> 10, info.dirty_bytes >> 10, info.reinit())
    };
    assert_eq!(left(stream.as_mut()), (128, 0, false));
    let (state, _) = drain(stream.as_mut(), 1 << 20);
    assert!(state.len() > 128 << 10 && state.len() < 129 << 10);
    assert_eq!(left(stream.as_mut()), (0, 0, false));
    set(&source, DIRTY, 40);
    assert_eq!(left(stream.as_mut()), (0, 128, false), "the other 8 are not of the share");
    drain(stream.as_mut(), 1 << 20);
    set(&source, DIRTY, 64);
    set(&source, REINIT, 1);
    assert_eq!(left(stream.as_mut()), (128, 0, true));
    assert_eq!(left(stream.as_mut()), (128, 0, false), "reported once");
    source.set_state(State::StopCopy).unwrap();
    let (rest, _) = drain(stream.as_mut(), 1 << 20);
    assert!(rest.len() > 256 << 10, "all of it is new");
    assert!(source.mig_data_size().unwrap().unwrap() < 1 << 10);
}

#[test]
fn a_device_has_the_states_that_it_is_told_to_have() {
    for (config, flags) in [
        ("p2p=off,pre-copy=off", MigrationFlags::SETS[0]),
        ("pre-copy=off", MigrationFlags::SETS[1]),
        ("p2p=off", MigrationFlags::SETS[2]),
        ("", MigrationFlags::SETS[3]),
    ] {
        let config = format!("{SMALL},{config}");
        let source = synthetic(&config);
        assert_eq!(source.migration_flags().unwrap(), flags);
        let destination = synthetic(&config);
        set(&source, DIRTY, 3);
        load(&destination, &save(&source), 4096).unwrap();
        destination.set_state(State::Running).unwrap();
        assert_eq!(fingerprint(&destination), fingerprint(&source));
    }
}

#[test]
fn configuration_space_is_that_of_a_pci_function_and_moves() {
    let (source, destination) = (synthetic(SMALL), synthetic(SMALL));
    let config = pci_index::CONFIG;
    let mut ids = [0; 4];
    source.region_read(config, 0, &mut ids).unwrap();
    assert_eq!(ids, [0x4d, 0x4c, 0x59, 0x53]);
    assert_eq!(source.region(STATE_REGION).unwrap().info.size, 256 << 10);
    assert_eq!(source.irq(pci_index::IRQ_MSI).unwrap().count, 1);
    source.region_write(config, 0x10, &0xfe00_0000_u32.to_le_bytes()).unwrap();
    load(&destination, &save(&source), 4096).unwrap();
    destination.region_read(config, 0x10, &mut ids).unwrap();
    assert_eq!(u32::from_le_bytes(ids), 0xfe00_0000);
    destination.reset().unwrap();
    destination.region_read(config, 0x10, &mut ids).unwrap();
    assert_eq!(u32::from_le_bytes(ids), 0);
}

#[test]
fn the_device_runs_exactly_in_the_states_that_run_however_it_got_there() {
    let guest = Guest::new(Window { seed: 1, pages: 4, pattern: Pattern::Sequential });
    for config in ["p2p=off,pre-copy=off", "pre-copy=off", "p2p=off", ""] {
        let device = synthetic(&format!("state=8K,block=4K,{config}"));
        guest.wire(&device);
        let flags = device.migration_flags().unwrap();
        for (from, to) in State::ALL.into_iter().flat_map(|from| State::ALL.map(|to| (from, to))) {
            let Ok(path) = fsm::path(flags, from, to) else { continue };
            device.reset().unwrap();
            if path.states().contains(&State::Resuming) && to != State::Resuming {
                // Only a loaded state leads out of RESUMING.
                load(&device, &save(&synthetic("state=8K,block=4K")), 4096).unwrap();
            } else {
                device.set_state(from).unwrap();
            }
            device.set_state(to).unwrap();
            let written = device.region_write(0, SCRATCH, b"x");
            assert_eq!(written.is_ok(), to.is_running(), "{flags}: {path}");
            if to.is_running() {
                guest.set_up(&device, 4);
                guest.wait();
                guest.check(4);
            }
        }
    }
}

#[test]
fn a_stopped_device_takes_no_register_writes() {
    let device = synthetic(SMALL);
    device.set_state(State::Stop).unwrap();
    assert_eq!(refused(device.region_write(0, DIRTY, &[1; 8])), Errno::EBUSY);
    assert_eq!(refused(device.region_write(0, SCRATCH, &[1])), Errno::EBUSY);
    assert_eq!(get(&device, IDENT), IDENT_VALUE);
    device.set_state(State::Running).unwrap();
    set(&device, DIRTY, 1);
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// A device with something in all that is saved.
fn used() -> Loopback {
    let device = synthetic("state=8K,block=4K,seed=11");
    set(&device, DIRTY, 3);
    device.region_write(0, SCRATCH, b"scratch").unwrap();
    set(&device, DMA_BASE, 0x1000);
    set(&device, DMA_PAGES, 5);
    set(&device, DMA_PATTERN, Pattern::Random.raw());
    set(&device, DMA_LIMIT, 9);
    device.region_write(pci_index::CONFIG, 0x10, &0xfe00_0000_u32.to_le_bytes()).unwrap();
    device
}

#[test]
fn states_of_every_version_that_was_ever_written_can_be_loaded() {
    // Names are synthetic-VERSION.state; a new version adds a file, none ever goes.
    let device = synthetic("state=8K,block=4K");
    load(&device, &std::fs::read(golden("synthetic-1.state")).unwrap(), 4096).unwrap();
    let want = used();
    for register in
        [SEED, DIRTIED, CHECKSUM, BAD_BLOCKS, SCRATCH, DMA_BASE, DMA_PAGES, DMA_PATTERN, DMA_LIMIT]
    {
        assert_eq!(get(&device, register), get(&want, register), "{register:#x}");
    }
    assert_eq!(get(&device, BAD_BLOCKS), 0);
}

#[test]
fn what_is_written_today_is_the_newest_golden_state() {
    assert_eq!(save(&used()), std::fs::read(golden("synthetic-1.state")).unwrap());
}

/// Writes the golden state of the newest version: run it once when a version is added.
#[test]
#[ignore = "it writes a file of the source tree"]
fn write_the_newest_golden_state() {
    std::fs::write(golden("synthetic-1.state"), save(&used())).unwrap();
}
