//! A guest that runs in KVM moves while it writes to its memory, with each of both logs; and memory as the engine sees it.

#[cfg(target_arch = "x86_64")]
#[path = "../examples/kvm_guest/guest.rs"]
mod guest;
#[cfg(target_arch = "x86_64")]
#[path = "../examples/kvm_guest/moving.rs"]
mod moving;

use std::fs::File;
use std::sync::{Arc, Mutex};

use limosa_kvm::Regions;
use limosa_migrate::{
    Destination, Ledger, Memory, MemoryChecksums, Options, Outcome, Received, Source, move_local,
};
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

#[cfg(target_arch = "x86_64")]
fn moves_there_and_back(has_rings: bool) {
    if let Err(error) = guest::has_kvm() {
        println!("not tested: /dev/kvm: {error}");
        return;
    }
    let [here, there] = [(); 2].map(|()| guest::Guest::new(has_rings).unwrap());
    here.load().unwrap();
    std::thread::scope(|_| {
        for guest in [&here, &there] {
            let guest = std::sync::Arc::clone(guest);
            std::thread::spawn(move || guest.run());
        }
        here.set_running(true);
        here.counts_beyond(5000).unwrap();
        for (from, to) in [(&here, &there), (&there, &here)] {
            // The hook `prepare` has compared every page.
            let report = moving::move_guest(from, to).unwrap();
            assert!(!report.rounds.is_empty(), "{report}");
            let count = from.check().unwrap();
            to.counts_beyond(count + 5000).unwrap();
            assert_eq!(from.registers().unwrap().rax, count, "it stands still");
        }
        here.set_running(false);
        here.check().unwrap();
    });
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_guest_of_kvm_moves_there_and_back_with_the_dirty_bitmap() {
    moves_there_and_back(false);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_guest_of_kvm_moves_there_and_back_with_a_dirty_ring_that_fills() {
    moves_there_and_back(true);
}

const BYTES: usize = 64 << 20;

fn shared(name: &str) -> GuestMemoryMmap {
    let file = File::from(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(BYTES as u64).unwrap();
    let region = (GuestAddress(0), BYTES, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([region]).unwrap()
}

fn moved(from: &GuestMemoryMmap, to: &GuestMemoryMmap) -> (u64, u64) {
    moved_with(from, to, MemoryChecksums::Always)
}

fn moved_with<B: Bitmap + Send + Sync + 'static>(
    from: &GuestMemoryMmap<B>,
    to: &GuestMemoryMmap<B>,
    checksums: MemoryChecksums,
) -> (u64, u64) {
    let (here, there) = (Regions::new(from).unwrap(), Regions::new(to).unwrap());
    let (options, ledger) = (Options::default().with_memory_checksums(checksums), Ledger::new());
    let (outcome, received) = move_local(
        Source::new(&[], &options).with_memory(Memory::stopped(here.for_engine())),
        Destination::new(&[], &ledger, &options).with_memory(&there.for_engine()),
    );
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    (report.bytes.memory_bytes, report.bytes.zero_bytes)
}

#[test]
fn the_memory_of_a_shared_file_moves_and_its_holes_stay_holes() {
    let (from, to) = (shared("from"), shared("to"));
    from.write_slice(&[7; 5000], GuestAddress(0x12_3000)).unwrap();
    // What is there at the destination has to go.
    to.write_slice(&[9; 10], GuestAddress(0x30_0000)).unwrap();
    assert_eq!(moved(&from, &to), (8192, BYTES as u64 - 8192));
    let mut found = [0; 5001];
    to.read_slice(&mut found, GuestAddress(0x12_3000)).unwrap();
    assert!(found[..5000] == [7; 5000] && found[5000] == 0);
    to.read_slice(&mut found[..10], GuestAddress(0x30_0000)).unwrap();
    assert_eq!(found[..10], [0; 10]);
}

#[test]
fn holes_between_pages_of_a_shared_file_were_filled_by_the_reads_of_a_move() {
    let (from, to) = (shared("from"), shared("to"));
    for page in (0..512).step_by(2) {
        from.write_slice(&[7; 4096], GuestAddress(page * 4096)).unwrap();
    }
    let blocks = |memory: &GuestMemoryMmap| {
        let file = memory.iter().next().and_then(|region| region.file_offset()).unwrap().arc().clone();
        std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap())
    };
    for checksums in [MemoryChecksums::Always, MemoryChecksums::Never] {
        assert_eq!(moved_with(&from, &to, checksums), (256 * 4096, BYTES as u64 - 256 * 4096));
        assert_eq!([&from, &to].map(blocks), [256 * 8; 2], "{checksums:?}");
    }
}

/// Ranges that were marked.
#[derive(Clone, Debug, Default)]
struct Marks {
    ranges: Arc<Mutex<Vec<(usize, usize)>>>,
    /// Where this slice of them starts.
    from: usize,
}

impl WithBitmapSlice<'_> for Marks {
    type S = Marks;
}

impl BitmapSlice for Marks {}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.ranges.lock().unwrap().push((self.from + offset, len));
    }
    fn dirty_at(&self, offset: usize) -> bool {
        let at = self.from + offset;
        self.ranges.lock().unwrap().iter().any(|(begin, bytes)| (*begin..begin + bytes).contains(&at))
    }
    fn slice_at(&self, offset: usize) -> Marks {
        Marks { ranges: Arc::clone(&self.ranges), from: self.from + offset }
    }
}

impl NewBitmap for Marks {
    fn with_len(_: usize) -> Marks {
        Marks::default()
    }
}

#[test]
fn pinned_pages_are_those_of_the_region_and_are_marked_once_they_are_written() {
    let memory = GuestMemoryMmap::<Marks>::from_ranges(&[(GuestAddress(0x1_0000), 0x8000)]).unwrap();
    memory.write_slice(&[5; 4096], GuestAddress(0x1_3000)).unwrap();
    let region = memory.iter().next().unwrap();
    let marks = region.bitmap().ranges;
    marks.lock().unwrap().clear();
    let regions = Regions::new(&memory).unwrap();
    let pages = regions.for_engine()[0].pages;
    let read_only = pages.pin(0x3000..0x4000, false).unwrap();
    let mut found = [0; 4096];
    read_only.read(0, &mut found).unwrap();
    assert_eq!(found, [5; 4096]);
    assert!(read_only.write(0, &[1]).is_err(), "it was not pinned to be written");
    drop(read_only);
    assert_eq!(marks.lock().unwrap()[..], [], "nothing was written");
    let pinned = pages.pin(0x2000..0x4000, true).unwrap();
    assert_eq!(pinned.as_ptr(), region.get_host_address(vm_memory::MemoryRegionAddress(0x2000)).unwrap());
    let again = pinned.clone();
    pinned.write(0x1000, &[9; 4096]).unwrap();
    drop(pinned);
    assert_eq!(marks.lock().unwrap()[..], [], "it can still be written");
    drop(again);
    assert_eq!(marks.lock().unwrap()[..], [(0x2000, 0x2000)]);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1_3fff)).unwrap(), 9);
    assert!(pages.pin(0x7000..0x9000, true).is_none(), "beyond its end");
}

#[test]
fn pinned_pages_stay_mapped_when_the_memory_is_gone() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
    memory.write_slice(&[5; 10], GuestAddress(0x1000)).unwrap();
    let pinned = Regions::new(&memory).unwrap().for_engine()[0].pages.pin(0x1000..0x2000, false).unwrap();
    drop(memory);
    let mut found = [0; 11];
    pinned.read(0, &mut found).unwrap();
    assert!(found[..10] == [5; 10] && found[10] == 0);
}

#[test]
fn anonymous_memory_moves_with_and_without_checksums_and_what_came_is_marked() {
    let memory = || GuestMemoryMmap::<Marks>::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap();
    for checksums in [MemoryChecksums::Always, MemoryChecksums::Never] {
        let (from, to) = (memory(), memory());
        // 3 MiB, and every second page of another.
        let touched: Vec<u64> = (0..768).chain((1024..1280).step_by(2)).collect();
        for page in &touched {
            from.write_slice(&[*page as u8 | 1; 4096], GuestAddress(page * 4096)).unwrap();
        }
        let pages = touched.len() as u64;
        assert_eq!(moved_with(&from, &to, checksums), (pages * 4096, (2048 - pages) * 4096));
        let marks = to.iter().next().unwrap().bitmap();
        let [mut here, mut there] = [[0; 4096], [1; 4096]];
        for page in 0..2048 {
            from.read_slice(&mut here, GuestAddress(page * 4096)).unwrap();
            to.read_slice(&mut there, GuestAddress(page * 4096)).unwrap();
            assert!(here == there, "page {page}, {checksums:?}");
            let is_marked = marks.dirty_at(page as usize * 4096);
            assert!(is_marked || !touched.contains(&page), "page {page}, {checksums:?}");
        }
    }
}

#[test]
fn a_region_that_is_not_made_of_whole_pages_is_refused() {
    let memory =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4096), (GuestAddress(0x8000), 100)]).unwrap();
    let refused = Regions::new(&memory).unwrap_err();
    assert_eq!((refused.address, refused.bytes), (0x8000, 100));
    assert!(refused.to_string().contains("0x64 bytes at 0x8000"), "{refused}");
}
