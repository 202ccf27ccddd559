//! Memory and devices that share a slow link.

use std::sync::Arc;

use limosa_client::Chunk;
use limosa_migrate::link::{Bandwidth, LimitedLink, SocketLink};
use limosa_migrate::{
    Destination, GuestPages, Ledger, Memory, MemoryRegion, MovedDevice, Outcome, PAGE_BYTES, Received, Source,
};
use limosa_protocol::MigrationFlags;
use limosa_protocol::feature::PrecopyInfo;

use crate::common::hooked::{Hooked, MadeUp};
use crate::common::{VecPages, options};

const BYTES: u64 = 16 << 20;

/// Gives the same bytes over and over until it is stopped.
struct Busy;

impl MadeUp for Busy {
    fn read(&self, stopped: bool, into: &mut [u8]) -> Chunk {
        if stopped { Chunk::End } else { Chunk::Data(into.len()) }
    }
    fn info(&self) -> PrecopyInfo {
        PrecopyInfo { dirty_bytes: 4 << 20, ..PrecopyInfo::default() }
    }
}

#[test]
fn a_small_busy_device_took_most_of_a_slow_link_from_memory() {
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: BYTES, pages };
    let (ours, theirs) = (VecPages::new(BYTES as usize), VecPages::new(BYTES as usize));
    // Frames of memory are as short as they can be.
    for page in (0..BYTES / PAGE_BYTES).step_by(2) {
        ours.write(page * PAGE_BYTES, &[1; PAGE_BYTES as usize]).unwrap();
    }
    let source = Hooked::new("busy", MigrationFlags::SETS[3], &[]).making_up(Arc::new(Busy));
    let destination = Hooked::new("there", MigrationFlags::SETS[3], &[]);
    let (here, there) = ([MovedDevice::new(&source)], [MovedDevice::new(&destination)]);
    let (options, ledger) = (options(), Ledger::new());
    let (near, far) = SocketLink::pair().unwrap();
    let near = LimitedLink::new(near, Some(Bandwidth::new(32 << 20)));
    let (outcome, received) = std::thread::scope(|scope| {
        let received = scope.spawn(|| {
            let memory = [region(&theirs)];
            Destination::new(&there, &ledger, &options).with_memory(&memory).receive(&far)
        });
        let memory = Memory::stopped(vec![region(&ours)]);
        let outcome = Source::new(&here, &options).with_memory(memory).send(&near);
        drop(near);
        (outcome, received.join().unwrap())
    });
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    let first = &report.rounds[0].bytes;
    assert_eq!(first.memory_bytes, BYTES / 2);
    // As much as memory; a machine that is busy elsewhere may make memory pause. It was ten times as much.
    assert!(first.device_bytes < 3 * first.memory_bytes, "{first:?}");
}
