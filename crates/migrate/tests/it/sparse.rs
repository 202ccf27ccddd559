//! Memory that was never touched is neither read nor made by a move.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use limosa_migrate::{
    Destination, FilePages, GuestPages, Ledger, Memory, MemoryRegion, Options, Outcome, Received, Source,
    move_local,
};
use limosa_testing::memfd;

const BYTES: u64 = 64 << 30;

#[test]
fn a_guest_of_64_gib_that_touched_three_pages_moves_as_three_pages() {
    let files = [memfd(BYTES), memfd(BYTES)];
    let pages = |file: &File| FilePages::mapped(file.try_clone().unwrap(), 0, BYTES).unwrap();
    let [here, there] = [pages(&files[0]), pages(&files[1])];
    let touched = [0, (40 << 30) + 4096, BYTES - 4096];
    touched.iter().for_each(|at| here.write(*at, &[7; 4096]).unwrap());
    // What is there and not in the source has to go.
    there.write(1 << 30, &[9; 4096]).unwrap();
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: BYTES, pages };
    let (options, ledger) = (Options::default(), Ledger::new());
    let (outcome, received) = move_local(
        Source::new(&[], &options).with_memory(Memory::stopped(vec![region(&here)])),
        Destination::new(&[], &ledger, &options).with_memory(&[region(&there)]),
    );
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert_eq!((report.bytes.memory_bytes, report.bytes.zero_bytes), (3 * 4096, BYTES - 3 * 4096));
    let mut page = [1; 4096];
    for at in touched {
        there.read(at, &mut page).unwrap();
        assert_eq!(page, [7; 4096]);
    }
    there.read(1 << 30, &mut page).unwrap();
    assert_eq!(page, [0; 4096]);
    let blocks = files.map(|file| file.metadata().unwrap().blocks());
    assert_eq!(blocks, [3 * 8, 4 * 8], "in units of 512 bytes");
}
