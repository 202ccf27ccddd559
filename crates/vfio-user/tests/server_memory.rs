//! What a client claims costs the server no memory: the process that serves is this one, and this is its
//! only test.

#[macro_use]
mod common;

use std::os::fd::AsFd;

use common::Served;
use common::raw::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// The most that this process ever had in memory, in bytes (proc(5): VmHWM).
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn claims_of_a_client_cost_the_server_no_memory() {
    let served = Served::new();
    // Warm: what an ordinary client costs.
    Raw::negotiated(served.path()).assert_usable();
    let before = peak_bytes();

    let mut raw = Raw::connect(served.path());
    let json = r#"{"capabilities":{"max_msg_fds":9007199254740991,"max_data_xfer_size":9007199254740991}}"#;
    raw.version(json).ok();

    // Mappings of nearly all addresses, by message and by a file of 16 TiB that has no page.
    let sparse = memfd_create("sparse", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&sparse, 1 << 44).unwrap();
    raw.dma_map(0, 1 << 44, 0, Some(sparse.as_fd())).ok();
    raw.dma_map(1 << 60, 1 << 60, 0, None).ok();

    // A log of as many pages as there can be, and one beyond that.
    let start =
        |raw: &mut Raw, bytes: u64| raw.feature(SET | 6, &bytes![4096u64, 1u32, 0u32, 0u64, bytes], 40);
    start(&mut raw, 1 << 43).ok();
    raw.feature(SET | 7, &[], 8).ok();
    start(&mut raw, 1 << 52).refused();

    // Lengths of all kinds.
    raw.region_read(0, 0, u32::MAX).refused();
    raw.mig_read(u32::MAX).refused();
    raw.feature(GET | 8, &bytes![0u64, 1u64 << 62, 4096u64], u32::MAX).refused();
    raw.call(8, &bytes![20u32, 0b100001u32, 0u32, 0u32, u32::MAX]).refused();
    raw.call(15, &bytes![u64::MAX]).refused();
    // What is announced for a reply is room, and not a reason to fill it.
    raw.call(5, &bytes![u32::MAX, 0u32, 0u32, 0u32, 0u64, 0u64]).ok();
    raw.assert_usable();
    drop(raw);

    // Messages that announce much and never come.
    for command in [2, 8, 10, 15, 16, 18] {
        let raw = Raw::negotiated(served.path());
        raw.send(&header(7, command, 60 << 20, 0), &[]);
    }
    Raw::negotiated(served.path()).assert_usable();

    let grown = peak_bytes() - before;
    assert!(grown < 8 << 20, "{grown} bytes more than before");
}
