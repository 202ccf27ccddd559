//! A guest that runs in KVM moves while it writes to its memory, with each of both logs; and memory as the engine sees it.

#[cfg(target_arch = "x86_64")]
#[path = "../examples/kvm_guest/guest.rs"]
mod guest;
#[cfg(target_arch = "x86_64")]
#[path = "../examples/kvm_guest/moving.rs"]
mod moving;

use std::fs::File;

use limosa_kvm::Regions;
use limosa_migrate::{Destination, Ledger, Memory, Options, Outcome, Received, Source, move_local};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

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
    let (here, there) = (Regions::new(from).unwrap(), Regions::new(to).unwrap());
    let (options, ledger) = (Options::default(), Ledger::new());
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
fn a_region_that_is_not_made_of_whole_pages_is_refused() {
    let memory =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4096), (GuestAddress(0x8000), 100)]).unwrap();
    let refused = Regions::new(&memory).unwrap_err();
    assert_eq!((refused.address, refused.bytes), (0x8000, 100));
    assert!(refused.to_string().contains("0x64 bytes at 0x8000"), "{refused}");
}
