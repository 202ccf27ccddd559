//! A device that never stops changing, its state and guest memory alike, moves and goes on at the
//! other end; afterwards every block and every page proves that nothing was lost.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory};
use limosa_device::{Loopback, Machine};
use limosa_migrate::{
    Convergence, Destination, FilePages, GuestPages, Ledger, Memory, MemoryRegion, MovedDevice, Options,
    Outcome, Received, Source, move_local,
};
use limosa_models::synthetic::registers::*;
use limosa_models::synthetic::{PAGE_BYTES, Pattern, REGISTERS_REGION, Synthetic, SyntheticConfig, Window};
use limosa_protocol::State;
use limosa_protocol::info::DmaMapFlags;
use limosa_testing::memfd;

const PAGES: u64 = 1000;
const BYTES: u64 = PAGES * PAGE_BYTES as u64;

/// A device with guest memory.
struct End {
    device: Loopback,
    memory: FilePages,
}

impl End {
    fn new(name: &str, config: &str) -> End {
        let config: SyntheticConfig = config.parse().unwrap();
        let machine = Machine::simple(Synthetic::new(config).unwrap());
        let device = Loopback::new(name, Arc::clone(&machine));
        let file = memfd(BYTES);
        let memory = DmaMemory::File { fd: file.as_fd(), offset: 0 };
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        device.dma_map(&DmaMap { iova: 0, size: BYTES, flags, memory }).unwrap();
        End { device, memory: FilePages::new(file, 0) }
    }
    fn write(&self, register: u64, value: u64) {
        self.device.region_write(REGISTERS_REGION, register, &value.to_le_bytes()).unwrap();
    }
    fn read(&self, register: u64) -> u64 {
        let mut value = [0; 8];
        self.device.region_read(REGISTERS_REGION, register, &mut value).unwrap();
        u64::from_le_bytes(value)
    }
    fn region(&self) -> MemoryRegion<'_> {
        MemoryRegion { id: 0, iova: 0, size: BYTES, pages: &self.memory }
    }
}

fn run(source: &End, destination: &End) -> (Outcome, Received) {
    // A device that is to lose its data never gives all of its initial bytes.
    let convergence = Convergence::default().with_initial_max(Duration::from_secs(2));
    let options = Options::default().with_convergence(convergence);
    let ledger = Ledger::new();
    let (ours, theirs) = ([MovedDevice::new(&source.device)], [MovedDevice::new(&destination.device)]);
    let memory = [destination.region()];
    move_local(
        Source::new(&ours, &options).with_memory(Memory::stopped(vec![source.region()])),
        Destination::new(&theirs, &ledger, &options).with_memory(&memory),
    )
}

#[test]
fn a_device_that_keeps_changing_loses_nothing() {
    for pattern in ["sequential", "random", "one-page"] {
        for (p2p, pre_copy) in [("off", "off"), ("on", "off"), ("off", "on"), ("on", "on")] {
            let what = format!("{pattern}, p2p={p2p}, pre-copy={pre_copy}");
            let config =
                format!("state=2M,dirty-rate=50M,dma-pattern={pattern},p2p={p2p},pre-copy={pre_copy}");
            let source = End::new("source", &config);
            let destination = End::new("destination", &format!("{config},seed=99"));
            source.write(DMA_BASE, 0);
            source.write(DMA_PAGES, PAGES);
            source.write(DMA_RATE, 100 << 20);
            source.write(DMA_CONTROL, 1);
            let (outcome, received) = run(&source, &destination);
            assert!(matches!(outcome, Outcome::Moved(_)), "{what}: {outcome:?}");
            assert!(matches!(received, Received::Runs(_)), "{what}: {received:?}");
            assert_eq!(source.device.state().unwrap(), State::Stop);
            // It goes on where it was.
            let moved_at = source.read(DMA_SEQUENCE);
            while destination.read(DMA_SEQUENCE) < moved_at + PAGES / 10 {
                std::thread::yield_now();
            }
            destination.write(DMA_CONTROL, 0);
            let writes = destination.read(DMA_SEQUENCE);
            assert_eq!(source.read(DMA_SEQUENCE), moved_at, "{what}: the source went on");
            assert_eq!(destination.read(BAD_BLOCKS), 0, "{what}");
            assert_eq!(destination.read(SEED), 1, "{what}");
            let window = Window { seed: 1, pages: PAGES, pattern: pattern.parse::<Pattern>().unwrap() };
            let mut page = [0; PAGE_BYTES];
            for (index, expected) in (0..).zip(window.expected(writes)) {
                destination.memory.read(index * PAGE_BYTES as u64, &mut page).unwrap();
                window.check(index, expected, &page).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
            }
        }
    }
}

#[test]
fn scripted_faults_of_either_end_leave_the_source_going_on() {
    for (at_source, pre_copy, fault) in [
        (true, "on", "fail:RUNNING>PRE_COPY"),
        (true, "on", "error:RUNNING>PRE_COPY"),
        (true, "on", "fail:PRE_COPY>PRE_COPY_P2P"),
        (true, "on", "fail:PRE_COPY_P2P>STOP_COPY"),
        (true, "off", "fail:RUNNING>RUNNING_P2P"),
        (true, "off", "fail:RUNNING_P2P>STOP"),
        (true, "off", "fail:STOP>STOP_COPY"),
        (true, "on", "truncate:100000"),
        (true, "on", "corrupt:100000"),
        (false, "on", "fail:RUNNING_P2P>STOP"),
        (false, "on", "fail:STOP>RESUMING"),
        (false, "on", "fail:RESUMING>STOP"),
        (false, "on", "error:RESUMING>STOP"),
        (false, "on", "error:STOP>RUNNING_P2P"),
    ] {
        let config = |faulty: bool| match faulty {
            true => format!("state=1M,pre-copy={pre_copy},fault={fault}"),
            false => format!("state=1M,pre-copy={pre_copy}"),
        };
        let source = End::new("source", &config(at_source));
        let destination = End::new("destination", &config(!at_source));
        let (outcome, received) = run(&source, &destination);
        assert!(matches!(outcome, Outcome::Undone { .. }), "{fault}: {outcome:?}");
        assert!(matches!(received, Received::Discarded { .. }), "{fault}: {received:?}");
        assert_eq!(source.device.state().unwrap(), State::Running, "{fault}");
        assert_eq!(source.read(BAD_BLOCKS), 0, "{fault}");
        assert_eq!(destination.device.state().unwrap(), State::Running, "{fault}: as it was found");
    }
}
