//! What holds for mappings of guest memory.

use std::fs::File;
use std::os::fd::AsFd;

use limosa_foreign_fd::ForeignFd;
use limosa_protocol::Errno;
use limosa_testing::{memfd, memfd_named, run_alone};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

mod faults;
mod files;
mod many_readers;

const PAGE: u64 = 65536;

#[test]
fn the_direction_of_a_mapping_is_respected() {
    let fd = memfd(PAGE);
    let read_only = FileMapping::new(&fd, 0, 8, true, false).unwrap();
    assert_eq!(read_only.write(0, &[1]), Err(Errno::EFAULT), "and does not fault");
    assert_eq!(FileMapping::new(&fd, 0, 8, false, true).unwrap().read(0, &mut [0]), Err(Errno::EFAULT));
}

/// Touches memory that is gone, where no mapping of ours is.
fn fault_elsewhere() {
    let fd = memfd(PAGE);
    let (map, share) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::SHARED);
    // SAFETY: a new mapping, where the kernel likes.
    let memory = unsafe { rustix::mm::mmap(std::ptr::null_mut(), 4096, map, share, fd.as_fd(), 0) }.unwrap();
    ftruncate(&fd, 0).unwrap();
    // SAFETY: not safe; the process is meant to end here.
    unsafe { memory.cast::<u8>().read_volatile() };
}

/// A mapping that has lost its pages and still works as one, so that the handler is in place.
fn with_the_handler_in_use(then: impl FnOnce()) {
    let fd = memfd(PAGE);
    let mapping = FileMapping::new(&fd, 0, PAGE, true, true).unwrap();
    ftruncate(&fd, 0).unwrap();
    assert_eq!(mapping.read(0, &mut [0]), Err(Errno::EFAULT));
    then();
}

#[test]
fn a_fault_elsewhere_still_ends_the_process() {
    let Some(ended) = run_alone("tests::a_fault_elsewhere_still_ends_the_process") else {
        return with_the_handler_in_use(fault_elsewhere);
    };
    assert_eq!(ended.code, -libc::SIGBUS, "{ended:?}");
}

#[test]
fn a_sigbus_that_was_sent_still_ends_the_process() {
    let Some(ended) = run_alone("tests::a_sigbus_that_was_sent_still_ends_the_process") else {
        // The standard library's own handler, which lives through the first one, is not what is asked about.
        // SAFETY: the default action needs no handler.
        assert_ne!(unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) }, libc::SIG_ERR);
        // SAFETY: raise() has no conditions.
        return with_the_handler_in_use(|| assert_eq!(unsafe { libc::raise(libc::SIGBUS) }, 0));
    };
    assert_eq!(ended.code, -libc::SIGBUS, "{ended:?}");
}

#[test]
fn a_fault_elsewhere_goes_to_the_handler_that_was_there() {
    extern "C" fn handler(_: i32) {
        // SAFETY: _exit() is async-signal-safe.
        unsafe { libc::_exit(42) }
    }
    let Some(ended) = run_alone("tests::a_fault_elsewhere_goes_to_the_handler_that_was_there") else {
        let handler: extern "C" fn(i32) = handler;
        // SAFETY: the handler only ends the process.
        assert_ne!(unsafe { libc::signal(libc::SIGBUS, handler as usize) }, libc::SIG_ERR);
        return with_the_handler_in_use(fault_elsewhere);
    };
    assert_eq!(ended.code, 42, "{ended:?}");
}

/// What the kernel knows of the mapping that begins at an address (`proc_pid_smaps.5`: VmFlags).
fn flags_at(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{address:x}-");
    let mut lines = maps.lines().skip_while(|line| !line.trim_start_matches('0').starts_with(&start));
    lines.find_map(|line| line.strip_prefix("VmFlags:")).expect("it is mapped").to_owned()
}

#[test]
fn a_core_dump_of_a_process_had_the_guests_memory_in_it() {
    let fd = memfd_named("not-dumped", 4 * PAGE);
    let mapping = FileMapping::new(&fd, PAGE + 100, PAGE, true, true).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let new = maps.lines().find(|line| line.contains("memfd:not-dumped")).unwrap();
    let address = usize::from_str_radix(new.split('-').next().unwrap(), 16).unwrap();
    assert!(flags_at(address).split(' ').any(|flag| flag == "dd"), "{}", flags_at(address));
    drop(mapping);
}

#[test]
fn pages_that_are_brought_in_hold_what_they_held() {
    let fd = memfd(PAGE);
    let mapping = FileMapping::new(&fd, 100, PAGE - 200, true, true).unwrap();
    mapping.write(4000, &[7; 200]).unwrap();
    for (offset, bytes) in [(0, 1), (3999, 4098), (PAGE - 201, 1), (0, PAGE - 200), (5, PAGE), (u64::MAX, 2)]
    {
        mapping.bring_in(offset, bytes, false);
        mapping.bring_in(offset, bytes, true);
    }
    let mut data = [0; 200];
    mapping.read(4000, &mut data).unwrap();
    assert_eq!(data, [7; 200]);
    ftruncate(&fd, 0).unwrap();
    mapping.bring_in(0, PAGE - 200, true);
    assert_eq!(mapping.read(0, &mut [0]), Err(Errno::EFAULT));
}
