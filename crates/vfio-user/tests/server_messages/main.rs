//! Every message of the specification, as the server answers it, seen by a peer made of bytes.

#[macro_use]
#[path = "../common/mod.rs"]
mod common;
mod sessions;

use std::os::fd::AsFd;

use common::Served;
use common::device::*;
use common::raw::*;
use limosa_vfio_user::server::Options;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

fn memory(bytes: u64) -> std::os::fd::OwnedFd {
    let fd = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn event() -> std::os::fd::OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Takes the count of an eventfd, 0 when it was not signalled.
fn count(fd: &std::os::fd::OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

#[test]
fn version_answers_what_the_client_announced_and_no_more() {
    let served = Served::new();
    let mut raw = Raw::connect(served.path());
    let reply = raw.version(r#"{"capabilities":{"max_msg_fds":8}}"#).ok();
    assert_eq!(&reply.body[..4], &bytes![0u16, 0u16]);
    assert_eq!(reply.body.last(), Some(&0));
    let json = std::str::from_utf8(&reply.body[4..reply.body.len() - 1]).unwrap();
    assert!(json.contains("\"max_data_xfer_size\":1048576"), "{json}");
    assert!(!json.contains("twin_socket") && !json.contains("write_multiple"), "{json}");
    assert!(reply.fds.is_empty());
    raw.assert_usable();
}

#[test]
fn version_reply_fits_into_qemus_request() {
    let served = Served::new();
    let mut raw = Raw::connect(served.path());
    let json = concat!(
        r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "#,
        r#""max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "#,
        r#""write_multiple": true}}"#
    );
    let reply = raw.version(json).ok();
    assert!(reply.body.len() <= 4 + json.len() + 1, "{} bytes", reply.body.len());
    raw.assert_usable();
}

#[test]
fn version_without_data_or_with_a_minor_of_the_future() {
    let served = Served::new();
    for (body, minor) in [(bytes![0u16, 0u16], 0u16), (bytes![0u16, 0u16, 0u8], 0), (bytes![0u16, 9u16], 2)] {
        let mut raw = Raw::connect(served.path());
        let reply = raw.call(VERSION, &body).ok();
        assert_eq!(&reply.body[..4], &bytes![0u16, minor]);
        raw.assert_usable();
    }
}

#[test]
fn info_of_device_regions_and_interrupts() {
    let served = Served::new();
    let mut raw = served.peer();
    let info = raw.call(GET_INFO, &bytes![16u32, 0u32, 0u32, 0u32]).ok();
    assert_eq!(info.body, bytes![16u32, 3u32, 9u32, 5u32]);

    let region = raw.call(GET_REGION_INFO, &bytes![32u32, 0u32, BAR0, 0u32, 0u64, 0u64]).ok();
    assert_eq!(region.body, bytes![32u32, 3u32, BAR0, 0u32, 1u64 << 20, 0u64]);
    let absent = raw.call(GET_REGION_INFO, &bytes![32u32, 0u32, BAR4, 0u32, 0u64, 0u64]).ok();
    assert_eq!(absent.body, bytes![32u32, 0u32, BAR4, 0u32, 0u64, 0u64]);

    let irq = raw.call(GET_IRQ_INFO, &bytes![16u32, 0u32, MSI, 0u32]).ok();
    assert_eq!(irq.body, bytes![16u32, 3u32, MSI, 4u32]);
}

#[test]
fn a_region_that_can_be_mapped_comes_with_its_fd_and_areas() {
    let served = Served::new();
    let mut raw = served.peer();
    // Without room for the capability: how much it takes, and no flag that sends a client to look for it.
    let short = raw.call(GET_REGION_INFO, &bytes![32u32, 0u32, BAR1, 0u32, 0u64, 0u64]).ok();
    let needed = 32 + 16 + 32;
    assert_eq!(short.body, bytes![needed as u32, 0x7u32, BAR1, 0u32, 16384u64, 0u64]);
    let mut request = bytes![needed as u32, 0u32, BAR1, 0u32, 0u64, 0u64];
    // libvfio-user's client sends as many bytes as it has room for.
    request.resize(needed, 0);
    let full = raw.call(GET_REGION_INFO, &request).ok();
    let areas = bytes![1u16, 1u16, 0u32, 2u32, 0u32, 0u64, 4096u64, 8192u64, 4096u64];
    assert_eq!(&full.body[..32], &bytes![needed as u32, 0xfu32, BAR1, 32u32, 16384u64, 0u64]);
    assert_eq!(&full.body[32..], &areas);
    assert_eq!(full.fds.len(), 1);
    rustix::io::pwrite(&full.fds[0], b"mapped", 8192).unwrap();
    assert_eq!(&raw.region_read(BAR1, 8192, 6).ok().body[16..], b"mapped");
}

#[test]
fn eventfds_of_a_region_are_sent_once_each() {
    let served = Served::new();
    let mut raw = served.peer();
    let short = raw.call(GET_REGION_IO_FDS, &bytes![16u32, 0u32, BAR0, 0u32]).ok();
    assert_eq!(short.body, bytes![96u32, 0u32, BAR0, 2u32]);
    assert!(short.fds.is_empty());
    let full = raw.call(GET_REGION_IO_FDS, &bytes![96u32, 0u32, BAR0, 0u32]).ok();
    assert_eq!(&full.body[16..56], &bytes![0x100u64, 4u64, 0u32, 0u32, 0u32, 0u32, 0u64]);
    assert_eq!(&full.body[56..], &bytes![0x104u64, 4u64, 0u32, 0u32, 1u32, 0u32, 7u64]);
    assert_eq!(full.fds.len(), 1);
    let none = raw.call(GET_REGION_IO_FDS, &bytes![96u32, 0u32, BAR3, 0u32]).ok();
    assert_eq!(none.body, bytes![16u32, 0u32, BAR3, 0u32]);
}

#[test]
fn regions_are_read_and_written() {
    let served = Served::new();
    let mut raw = served.peer();
    let reply = raw.region_write(BAR0, 8, b"eight by").ok();
    assert_eq!(reply.body, bytes![8u64, BAR0, 8u32]);
    let reply = raw.region_read(BAR0, 8, 8).ok();
    assert_eq!(&reply.body[..16], &bytes![8u64, BAR0, 8u32]);
    assert_eq!(&reply.body[16..], b"eight by");
    let large: Vec<u8> = (0..1 << 20).map(|i: u32| i as u8).collect();
    raw.region_write(BAR0, 0, &large).ok();
    assert_eq!(raw.region_read(BAR0, 0, 1 << 20).ok().body[16..], large[..]);
    assert_eq!(raw.region_read(BAR0, 0, 0).ok().body.len(), 16);
}

#[test]
fn posted_writes_are_done_before_the_next_reply() {
    let served = Served::new();
    let mut raw = served.peer();
    for i in 0..500u32 {
        let mut body = bytes![u64::from(i) * 4, BAR0, 4u32];
        body.extend_from_slice(&i.to_ne_bytes());
        raw.post(REGION_WRITE, &body);
    }
    let reply = raw.region_read(BAR0, 0, 2000).ok();
    for i in 0..500 {
        assert_eq!(reply.u32(16 + i * 4), i as u32);
    }
}

#[test]
fn several_writes_in_one_message() {
    let served = Served::new();
    let mut raw = served.peer();
    let mut body = bytes![3u64];
    body.extend(bytes![0u64, BAR0, 4u32, 0x11u64]);
    body.extend(bytes![4u64, BAR0, 8u32, 0x22u64]);
    body.extend(bytes![12u64, BAR0, 1u32, 0x33u64]);
    assert_eq!(raw.call(REGION_WRITE_MULTI, &body).ok().body, bytes![3u64]);
    let data = raw.region_read(BAR0, 0, 13).ok().body[16..].to_vec();
    assert_eq!(data, [&bytes![0x11u32, 0x22u64][..], &[0x33]].concat());
    // It stops at the first that fails, and tells how far it came.
    body[8 + 24 + 8..][..4].copy_from_slice(&BAR3.to_ne_bytes());
    assert_eq!(raw.call(REGION_WRITE_MULTI, &body).ok().body, bytes![1u64]);
}

#[test]
fn memory_with_an_fd_is_read_and_written() {
    let served = Served::new();
    let mut raw = served.peer();
    let memory = memory(1 << 20);
    rustix::io::pwrite(&memory, b"from the client", 0x1000).unwrap();
    assert!(raw.dma_map(0x10_0000, 0x8000, 0x1000, Some(memory.as_fd())).ok().body.is_empty());
    raw.region_write(BAR2, 0, &bytes![DMA_READ_NOW, 0x10_0000u64, 15u64]).ok();
    assert_eq!(&raw.region_read(BAR2, 64 << 10, 15).ok().body[16..], b"from the client");
    raw.region_write(BAR2, 0, &bytes![DMA_WRITE_NOW, 0x10_4000u64, 15u64]).ok();
    let mut data = [0; 15];
    rustix::io::pread(&memory, &mut data, 0x5000).unwrap();
    assert_eq!(&data, b"from the client");

    assert_eq!(raw.dma_map(0x10_0000, 0x8000, 0x1000, Some(memory.as_fd())).refused(), EEXIST);
    let unmap = bytes![24u32, 0u32, 0x10_0000u64, 0x8000u64];
    assert_eq!(raw.call(DMA_UNMAP, &unmap).ok().body, unmap);
    let nothing = bytes![24u32, 0u32, 0x10_0000u64, 0u64];
    assert_eq!(raw.call(DMA_UNMAP, &unmap).ok().body, nothing, "as the kernel's type1 answers");
    assert_ne!(raw.region_write(BAR2, 0, &bytes![DMA_READ_NOW, 0x10_0000u64, 15u64]).refused(), 0);

    for iova in [0u64, 0x10_0000, 0x20_0000] {
        // Flags 4 and 8 are libvfio-user's.
        let map = bytes![32u32, 15u32, 0u64, iova, 4096u64];
        raw.call_fds(DMA_MAP, &map, &[memory.as_fd()]).ok();
    }
    let all = bytes![24u32, 2u32, 0u64, 0u64];
    assert_eq!(raw.call(DMA_UNMAP, &all).ok().body, bytes![24u32, 2u32, 0u64, 3 * 4096u64]);
    assert_eq!(raw.call(DMA_UNMAP, &all).ok().body, all);
}

#[test]
fn a_file_that_is_not_to_be_mapped_was_mapped_all_the_same() {
    const FILE_IO: u32 = 1 << 3;
    let maps = || std::fs::read_to_string("/proc/self/maps").unwrap().matches("by-file-io").count();
    let map = |raw: &mut Raw, flags: u32, offset: u64, fd: std::os::fd::BorrowedFd<'_>| {
        let map = bytes![32u32, 3 | flags, offset, 0u64, 4096u64];
        raw.call_fds(DMA_MAP, &map, &[fd])
    };
    let served = Served::with(TestDevice::new().machine(), Options { any_file: true, ..Options::default() });
    let mut raw = served.peer();
    let memory = memfd_create("by-file-io", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 8192).unwrap();
    map(&mut raw, FILE_IO, 4096, memory.as_fd()).ok();
    rustix::io::pwrite(&memory, b"from the client", 4096).unwrap();
    raw.region_write(BAR2, 0, &bytes![DMA_READ_NOW, 0u64, 15u64]).ok();
    assert_eq!(&raw.region_read(BAR2, 64 << 10, 15).ok().body[16..], b"from the client");
    assert_eq!(maps(), 0);
    raw.call(DMA_UNMAP, &bytes![24u32, 0u32, 0u64, 4096u64]).ok();
    // A file that cannot be mapped.
    let own = std::fs::File::options().read(true).write(true).open("/proc/self/mem").unwrap();
    let buffer =
        std::sync::Arc::new([std::sync::atomic::AtomicU64::new(0), std::sync::atomic::AtomicU64::new(0)]);
    let address = &raw const *buffer as u64;
    assert_ne!(map(&mut raw, 0, address & !4095, own.as_fd()).refused(), 0);
    map(&mut raw, FILE_IO, address & !4095, own.as_fd()).ok();
    raw.region_write(BAR2, 0, &bytes![DMA_WRITE_NOW, address & 4095, 8u64]).ok();
    assert_eq!(buffer[0].load(std::sync::atomic::Ordering::Relaxed).to_ne_bytes(), *b"from the");
    // Where only memory may be used, it is refused, and not read by a call that could wait.
    let served = Served::new();
    map(&mut served.peer(), FILE_IO, address & !4095, own.as_fd()).refused();
    map(&mut served.peer(), FILE_IO, 0, memory.as_fd()).ok();
}

#[test]
fn interrupts_are_wired_masked_triggered_and_taken_away() {
    let served = Served::new();
    let mut raw = served.peer();
    let (none, bools, eventfds) = (1u32, 2u32, 4u32);
    let (mask, unmask, trigger) = (8u32, 16u32, 32u32);
    let fds = [event(), event(), event()];
    let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    let wire = bytes![20u32, eventfds | trigger, MSI, 1u32, 3u32];
    assert!(raw.call_fds(SET_IRQS, &wire, &borrowed).ok().body.is_empty());
    raw.call(SET_IRQS, &bytes![20u32, none | trigger, MSI, 1u32, 3u32]).ok();
    assert_eq!(fds.each_ref().map(count), [1, 1, 1]);
    let mut body = bytes![23u32, bools | trigger, MSI, 1u32, 3u32];
    body.extend([1, 0, 1]);
    raw.call(SET_IRQS, &body).ok();
    assert_eq!(fds.each_ref().map(count), [1, 0, 1]);
    raw.call(SET_IRQS, &bytes![20u32, none | mask, MSI, 1u32, 1u32]).ok();
    raw.call(SET_IRQS, &bytes![20u32, none | trigger, MSI, 1u32, 2u32]).ok();
    assert_eq!(fds.each_ref().map(count), [0, 1, 0]);
    raw.call(SET_IRQS, &bytes![20u32, none | unmask, MSI, 1u32, 1u32]).ok();
    assert_eq!(fds.each_ref().map(count), [1, 0, 0]);
    // No fds: these vectors are taken away. Count 0 with no data: all.
    raw.call(SET_IRQS, &bytes![20u32, eventfds | trigger, MSI, 1u32, 1u32]).ok();
    raw.call(SET_IRQS, &bytes![20u32, none | trigger, MSI, 0u32, 4u32]).ok();
    assert_eq!(fds.each_ref().map(count), [0, 1, 1]);
    raw.call(SET_IRQS, &bytes![20u32, none | trigger, MSI, 0u32, 0u32]).ok();
    raw.call(SET_IRQS, &bytes![20u32, none | trigger, MSI, 0u32, 4u32]).ok();
    assert_eq!(fds.each_ref().map(count), [0, 0, 0]);
}

#[test]
fn reset_takes_every_state_back_to_running() {
    let served = Served::new();
    let mut raw = served.peer();
    for state in [STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY] {
        raw.set_state(state).ok();
        assert_eq!(raw.state(), state);
        assert!(raw.call(RESET, &[]).ok().body.is_empty());
        assert_eq!(raw.state(), RUNNING);
    }
}

#[test]
fn every_message_works_in_every_state() {
    let served = Served::new();
    let mut raw = served.peer();
    let memory = memory(1 << 16);
    for state in [STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY] {
        raw.set_state(state).ok();
        raw.assert_usable();
        raw.call(GET_REGION_INFO, &bytes![32u32, 0u32, BAR1, 0u32, 0u64, 0u64]).ok();
        raw.call(GET_REGION_IO_FDS, &bytes![96u32, 0u32, BAR0, 0u32]).ok();
        raw.call(GET_IRQ_INFO, &bytes![16u32, 0u32, MSI, 0u32]).ok();
        raw.call_fds(SET_IRQS, &bytes![20u32, 0x24u32, MSI, 0u32, 1u32], &[event().as_fd()]).ok();
        raw.dma_map(0, 4096, 0, Some(memory.as_fd())).ok();
        raw.region_write(BAR0, 0, b"x").ok();
        raw.call(DMA_UNMAP, &bytes![24u32, 0u32, 0u64, 4096u64]).ok();
        assert_eq!(raw.state(), state);
        raw.call(RESET, &[]).ok();
    }
}

#[test]
fn features_are_got_set_and_probed() {
    let served = Served::new();
    let mut raw = served.peer();
    assert_eq!(raw.feature(GET | 1, &[], 16).ok().body, bytes![16u32, GET | 1, 5u64]);
    // A probe is answered with what was asked.
    assert_eq!(raw.feature(PROBE | GET | 1, &[], 8).ok().body, bytes![8u32, PROBE | GET | 1]);
    assert_eq!(raw.feature(PROBE | GET | 1, &[0; 8], 16).ok().body, bytes![16u32, PROBE | GET | 1, 0u64]);
    assert_eq!(raw.feature(PROBE | SET | 1, &[], 8).refused(), EINVAL);
    assert_eq!(raw.feature(PROBE | GET | 999, &[], 8).refused(), ENOTTY);
    assert_eq!(raw.feature(GET | 2, &[], 16).ok().body, bytes![16u32, GET | 2, RUNNING, -1i32]);
    // libvfio-user's client wants the same bytes back.
    assert_eq!(raw.set_state(STOP).ok().body, bytes![16u32, SET | 2, STOP, -1i32]);
    assert_eq!(raw.set_state(STOP).ok().body, bytes![16u32, SET | 2, STOP, -1i32], "the same again");
    let echoed = raw.feature(SET | 2, &bytes![STOP, 0i32], 16).ok().body;
    assert_eq!(echoed, bytes![16u32, SET | 2, STOP, -1i32], "no fd, whatever the client sent for one");
    assert_eq!(raw.feature(13, &[], 8).refused(), ENOTTY, "an unknown feature, and no operation");
    assert_eq!(raw.feature(2, &[], 16).refused(), EINVAL, "no operation on a known one");
    assert_eq!(raw.set_state(0).refused(), EINVAL);
    assert_eq!(raw.set_state(8).refused(), EINVAL);
    assert_eq!(raw.set_state(5).refused(), EINVAL, "no P2P");
    assert_eq!(raw.state(), STOP);
    assert_eq!(raw.feature(GET | 9, &[], 16).ok().u64(8), 3 << 20);
}

#[test]
fn the_reset_count_is_got_and_probed() {
    const RESET_COUNT: u32 = 0xfe02;
    let served = Served::new();
    let mut raw = served.peer();
    for ops in [PROBE, PROBE | GET] {
        assert_eq!(raw.feature(ops | RESET_COUNT, &[], 8).ok().body, bytes![8u32, ops | RESET_COUNT]);
    }
    for ops in [PROBE | SET, PROBE | GET | SET, SET, GET | SET, 0] {
        assert_eq!(raw.feature(ops | RESET_COUNT, &[0; 8], 16).refused(), EINVAL, "{ops:#x}");
    }
    assert_eq!(raw.feature(SET | RESET_COUNT, &[], 8).refused(), EINVAL);
    for argsz in [0, 8, 15] {
        assert_eq!(raw.feature(GET | RESET_COUNT, &[], argsz).refused(), EINVAL, "argsz {argsz}");
    }
    assert_eq!(raw.feature(GET | 0xfeff, &[], 16).refused(), ENOTTY);
    let count = |raw: &mut Raw, data: &[u8], argsz| {
        let body = raw.feature(GET | RESET_COUNT, data, argsz).ok().body;
        assert_eq!(body[..8], bytes![16u32, GET | RESET_COUNT]);
        assert_eq!(body.len(), 16);
        u64::from_ne_bytes(body[8..].try_into().unwrap())
    };
    // With the room sent along or not, and with more of it than is needed.
    assert_eq!(
        [count(&mut raw, &[], 16), count(&mut raw, &[0xff; 8], 16), count(&mut raw, &[], 100)],
        [0; 3]
    );
    let mut resets = 0;
    for state in [STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY] {
        raw.set_state(state).ok();
        assert_eq!(count(&mut raw, &[], 16), resets, "on the way to {state}");
        raw.call(RESET, &[]).ok();
        resets += 1;
        assert_eq!(count(&mut raw, &[], 16), resets, "out of {state}");
    }
    // A reset that wants no reply counts as well.
    raw.post(RESET, &[]);
    assert_eq!(count(&mut raw, &[], 16), resets + 1);
    // ERROR is no reset; what leads out of it is.
    let engine = bytes![PANIC, 0u64, 0u64];
    assert_eq!(raw.region_write(BAR2, 0, &engine).refused(), EIO);
    assert_eq!(raw.state(), 0);
    assert_eq!(count(&mut raw, &[], 16), resets + 1);
    raw.call(RESET, &[]).ok();
    assert_eq!(count(&mut raw, &[], 16), resets + 2);
    // A client that dies in the middle of a session resets nothing.
    raw.set_state(RESUMING).ok();
    drop(raw);
    let mut next = served.peer();
    assert_eq!((next.state(), count(&mut next, &[], 16)), (RESUMING, resets + 2));
}
