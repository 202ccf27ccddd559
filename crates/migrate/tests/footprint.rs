//! What a move takes of the heap is bounded, whatever the size of the guest. This test has a process of its own, whose
//! allocator counts; the `unsafe` is that of counting.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::num::NonZeroU32;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::channel;

use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{
    Compression, Destination, GuestPages, Ledger, Memory, MemoryRegion, Options, Outcome, Received, Source,
};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is the system's allocator, with its arguments as they came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Memory that is nowhere: all of it holds the same, and takes anything.
struct Nowhere;

impl GuestPages for Nowhere {
    fn read(&self, _: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(7);
        Ok(())
    }
    fn write(&self, _: u64, from: &[u8]) -> io::Result<()> {
        assert!(from.iter().all(|byte| *byte == 7));
        Ok(())
    }
}

/// The most bytes of heap that both sides take for a guest of this size, over four links.
fn footprint(bytes: u64, compress: Option<Compression>) -> usize {
    let options = Options::default().with_links(NonZeroU32::new(4).unwrap()).with_compress(compress);
    let region = MemoryRegion { id: 0, iova: 0, size: bytes, pages: &Nowhere };
    let (near, far) = SocketLink::pair().unwrap();
    let (connected, accepted) = channel::<SocketLink>();
    let (connected, accepted) = (Mutex::new(connected), Mutex::new(accepted));
    let ledger = Ledger::new();
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let regions = [region];
            let destination = Destination::new(&[], &ledger, &options).with_memory(&regions);
            destination.receive_over(&far, &|_: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
                Ok(Box::new(accepted.lock().unwrap().recv().map_err(|_| LinkError::Closed)?))
            })
        });
        let source = Source::new(&[], &options).with_memory(Memory::stopped(vec![region]));
        let outcome = source.send_over(&near, &|_: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
            let (near, far) = SocketLink::pair()?;
            connected.lock().unwrap().send(far).map_err(|_| LinkError::Closed)?;
            Ok(Box::new(near))
        });
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
        let received = receiving.join().unwrap();
        assert!(matches!(received, Received::Runs(_)), "{received:?}");
    });
    PEAK.load(Relaxed) - before
}

/// Four links, each with a frame at the source and one and a half at the destination, twice that where payloads are
/// compressed; and what threads, reports and sockets take.
fn bound(compress: Option<Compression>) -> usize {
    let frames = if compress.is_some() { 5 } else { 3 };
    (4 * frames + 6) << 20
}

#[test]
fn the_heap_that_a_move_takes_does_not_grow_with_the_guest() {
    for compress in [None, Some(Compression::Lz4)] {
        // How much of it is in use at once depends on the machine's load: each size is held to the same bound, and not
        // the peak of one to that of the other.
        for bytes in [32 << 20, 256 << 20] {
            let (taken, bound) = (footprint(bytes, compress), bound(compress));
            assert!(
                taken < bound,
                "{taken} bytes on both sides together for a guest of {bytes}, not {bound}"
            );
        }
    }
}
