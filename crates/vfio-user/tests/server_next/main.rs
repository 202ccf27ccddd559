//! The client that gets the device when its VMM has gone (`docs/vfio-user-extensions.md: NEXT`): who may be it, what it may until
//! then, and that it gets all of the device and nothing of the former VMM.

#[macro_use]
#[path = "../common/mod.rs"]
mod common;
mod admission;
mod deaths;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::device::*;
use common::fds::*;
use common::lingering::in_time;
use common::raw::*;
use common::{Served, as_another};
use limosa_client::{Device, DeviceExt, DmaMap, DmaMemory, Error, IrqAction};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{Errno, State};
use limosa_testing::{Process, this_test};
use limosa_vfio_user::client::{Client, NextVmm, Options as ClientOptions, Role};
use limosa_vfio_user::server::{Options, SocketAccess};

const STAY: u32 = 0xfe03;

const NEXT: u32 = 0xfe06;

const ESRCH: u32 = 3;

const ENOTCONN: u32 = 107;

const THERE: u32 = 1;

const THIS: u32 = 2;

fn this_process() -> i32 {
    std::process::id() as i32
}

fn name(raw: &mut Raw, pid: i32) -> Message {
    raw.feature(SET | NEXT, &bytes![pid, 0u32], 16)
}

/// Who is named, and the flags.
fn named(raw: &mut Raw) -> (i32, u32) {
    let reply = raw.feature(GET | NEXT, &[], 16).ok();
    (reply.u32(8) as i32, reply.u32(12))
}

/// A VMM that has named this process, and the next client.
fn both(served: &Served) -> (Raw, Raw) {
    let mut first = served.peer();
    name(&mut first, this_process()).ok();
    let next = served.peer();
    assert_eq!(named(&mut first), (this_process(), THERE));
    (first, next)
}

fn version() -> Vec<u8> {
    [bytes![0u16, 0u16], b"{}\0".to_vec()].concat()
}

/// Asks until the answer is this one.
#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "never: {what}");
        std::thread::yield_now();
    }
}

fn wire(raw: &mut Raw, index: u32, vector: u32, fd: &OwnedFd) {
    raw.call_fds(SET_IRQS, &bytes![20u32, 0x24u32, index, vector, 1u32], &[fd.as_fd()]).ok();
}

/// A process that does nothing until it is dropped.
struct Other(Child);

impl Other {
    fn start() -> Other {
        Other(Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn the_next_client_gets_a_device_that_works_all_the_while() {
    const BYTES: u64 = 1 << 20;
    let served = Served::new();
    let first = Client::connect(served.path(), ClientOptions::default()).unwrap();
    let map = |client: &Client, memory: &OwnedFd| {
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        let memory = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
        client.dma_map(&DmaMap { iova: 0, size: BYTES, flags, memory }).unwrap();
    };
    let (memories, events) = ([memory(BYTES), memory(BYTES)], [event(), event()]);
    map(&first, &memories[0]);
    first.set_irqs(MSI, 0, IrqAction::Wire(&[Some(events[0].as_fd())])).unwrap();
    first.name_next(Some(this_process())).unwrap();
    assert_eq!(
        first.next_vmm().unwrap(),
        NextVmm { pid: Some(this_process()), is_there: false, is_this: false }
    );
    let second = Client::connect(served.path(), ClientOptions::default()).unwrap();
    assert!(second.next_vmm().unwrap().is_this && first.next_vmm().unwrap().is_there);
    assert_eq!(second.role(), Role::Vmm, "what it will be");

    let (done, bus) = (AtomicBool::new(false), served.machine.bus());
    let word = |memory: &OwnedFd| {
        let mut word = [0; 8];
        rustix::io::pread(memory, &mut word, 0x1000).unwrap();
        u64::from_ne_bytes(word)
    };
    std::thread::scope(|scope| {
        let works = scope.spawn(|| {
            for number in 1u64.. {
                bus.memory.write(0x1000, &number.to_ne_bytes()).expect("no instant without memory");
                bus.interrupts.raise(MSI, 0);
                if done.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        map(&second, &memories[1]);
        second.set_irqs(MSI, 0, IrqAction::Wire(&[Some(events[1].as_fd())])).unwrap();
        let mut written = word(&memories[0]);
        until("the first VMM's memory is written", || word(&memories[0]) > written);
        assert_eq!((word(&memories[1]), count(&events[1])), (0, 0), "nothing before the device is its own");
        let reads = scope.spawn(|| second.region_read(BAR0, 0, &mut [0; 4]));
        drop(first);
        reads.join().unwrap().unwrap();
        until("the second VMM's memory is written", || word(&memories[1]) > 0);
        until("the second VMM is interrupted", || count(&events[1]) > 0);
        written = word(&memories[0]);
        count(&events[0]);
        let now = word(&memories[1]);
        until("the second VMM's memory is written", || word(&memories[1]) > now + 100);
        assert_eq!((word(&memories[0]), count(&events[0])), (written, 0), "nothing of the first is left");
        done.store(true, Ordering::Relaxed);
        works.join().unwrap();
    });
    assert_eq!(second.next_vmm().unwrap(), NextVmm::default(), "the name has done its work");
    second.set_state(State::Stop).unwrap();
    second.set_state(State::Running).unwrap();
    second.reset().unwrap();
}

#[test]
fn what_would_touch_or_drive_the_device_waits_or_is_refused() {
    let served = Served::new();
    let (mut first, mut next) = both(&served);
    assert_eq!(named(&mut next), (this_process(), THERE | THIS));
    // What the device is, it is told; config space it may look at.
    next.assert_usable();
    next.call(GET_IRQ_INFO, &bytes![16u32, 0u32, MSI, 0u32]).ok();
    let region = next.call(GET_REGION_INFO, &bytes![256u32, 0u32, BAR1, 0u32, 0u64, 0u64]).ok();
    assert!(region.fds.is_empty(), "memory of the device would reach it");
    for get in [1, 2, 9, 0xfe02, STAY] {
        next.feature(GET | get, &[], 64).ok();
    }
    next.feature(PROBE | SET | 2, &[], 8).ok();
    let refused = |next: &mut Raw| {
        assert_eq!(next.call(RESET, &[]).refused(), EBUSY);
        for state in [RUNNING, STOP, STOP_COPY, RESUMING] {
            assert_eq!(next.set_state(state).refused(), EBUSY);
        }
        assert_eq!(next.call(GET_REGION_IO_FDS, &bytes![96u32, 0u32, BAR0, 0u32]).refused(), EBUSY);
        assert_eq!(next.mig_read(16).refused(), EBUSY);
        assert_eq!(next.mig_write(b"data").refused(), EBUSY);
        for get in [8, 0xfe00, 0xfe01] {
            assert_eq!(next.feature(GET | get, &[0; 24], 64).refused(), EBUSY, "GET {get:#x}");
        }
        for set in [6, 7, 12, STAY, 0xfe04, 0xfe05, NEXT] {
            assert_eq!(next.feature(SET | set, &[0; 32], 64).refused(), EBUSY, "SET {set:#x}");
        }
    };
    refused(&mut next);
    first.set_state(STOP_COPY).ok();
    refused(&mut next);
    first.set_state(RUNNING).ok();

    first.region_write(BAR0, 0, b"mine").ok();
    let write = |data: &[u8; 4]| [bytes![0u64, BAR0, 4u32], data.to_vec()].concat();
    let mut ids = vec![next.ask(REGION_WRITE, &write(b"his1"))];
    ids.push(next.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]));
    ids.push(next.ask(REGION_WRITE, &[bytes![100u64, CONFIG, 1u32], vec![0x55]].concat()));
    ids.push(next.ask(REGION_READ, &bytes![100u64, CONFIG, 1u32]));
    next.post(REGION_WRITE, &write(b"his2"));
    ids.push(next.ask(REGION_WRITE_MULTI, &bytes![2u64, 8u64, BAR0, 4u32, 3u64, 12u64, BAR0, 4u32, 4u64]));
    ids.push(next.ask(REGION_READ, &bytes![0u64, BAR0, 16u32]));
    // Whatever it is told of the device is answered all the same, and not what waits.
    next.call(GET_INFO, &bytes![16u32, 0u32, 0u32, 0u32]).ok();
    assert_eq!(next.state(), RUNNING);
    assert_eq!(&first.region_read(BAR0, 0, 4).ok().body[16..], b"mine");
    assert_eq!(first.region_read(CONFIG, 100, 1).ok().body[16], 100);
    drop(first);
    let replies: Vec<_> = ids.iter().map(|_| next.receive().ok()).collect();
    assert_eq!(
        replies.iter().map(|reply| reply.id).collect::<Vec<_>>(),
        ids,
        "in the order in which they came"
    );
    assert_eq!(&replies[1].body[16..], b"his1");
    assert_eq!(replies[3].body[16], 0x55);
    assert_eq!(replies[4].body, bytes![2u64]);
    assert_eq!((&replies[5].body[16..20], replies[5].u32(24), replies[5].u32(28)), (&b"his2"[..], 3, 4));
    next.set_state(STOP).ok();
    next.set_state(RUNNING).ok();
    next.call(RESET, &[]).ok();
}

#[test]
fn what_it_prepares_does_not_touch_the_device() {
    let served = Served::new();
    let (mut first, mut next) = both(&served);
    let (theirs, its) = (memory(1 << 20), memory(1 << 20));
    let (event_of_first, masked, other) = (event(), event(), event());
    first.dma_map(0, 1 << 20, 0, Some(theirs.as_fd())).ok();
    wire(&mut first, MSI, 0, &event_of_first);
    // The same addresses and vectors, and others.
    next.dma_map(0, 1 << 20, 0, Some(its.as_fd())).ok();
    next.dma_map(1 << 30, 4096, 0, Some(its.as_fd())).ok();
    assert_eq!(next.dma_map(0, 4096, 0, Some(its.as_fd())).refused(), EEXIST);
    next.dma_map(1 << 31, 4096, 0, Some(its.as_fd())).ok();
    next.call(DMA_UNMAP, &bytes![24u32, 0u32, 1u64 << 31, 4096u64]).ok();
    wire(&mut next, MSI, 0, &masked);
    wire(&mut next, MSI, 2, &other);
    next.call(SET_IRQS, &bytes![20u32, 0x09u32, MSI, 0u32, 1u32]).ok();
    // A trigger is for its own eventfds.
    next.call(SET_IRQS, &bytes![20u32, 0x21u32, MSI, 2u32, 1u32]).ok();
    assert_eq!((count(&other), count(&event_of_first)), (1, 0));
    let bus = served.machine.bus();
    bus.memory.write(16, b"first").unwrap();
    assert_eq!(bus.memory.write(1 << 30, b"x"), Err(Errno::EFAULT));
    (0..3).for_each(|vector| bus.interrupts.raise(MSI, vector));
    assert_eq!((count(&event_of_first), count(&masked), count(&other)), (1, 0, 0));
    assert!(!bus.interrupts.is_wired(MSI, 2));
    drop(first);
    until("the device is its own", || served.machine.bus().interrupts.is_wired(MSI, 2));
    assert_eq!(next.region_read(BAR0, 0, 4).ok().body.len(), 20);
    bus.memory.write(1 << 30, b"second").unwrap();
    let mut found = [0; 6];
    rustix::io::pread(&its, &mut found, 0).unwrap();
    assert_eq!(&found, b"second");
    // What was raised on a vector without an eventfd, and once more for what the first VMM may not have read.
    assert!(count(&other) >= 1);
    assert_eq!(count(&masked), 0, "its mask holds");
    next.call(SET_IRQS, &bytes![20u32, 0x11u32, MSI, 0u32, 1u32]).ok();
    assert_eq!(count(&masked), 1);
    wire(&mut next, MSI, 1, &event_of_first);
    assert_eq!(count(&event_of_first), 1, "what nobody was told of is pending for whoever wires it");
    assert_eq!(bus.memory.write((1 << 31) + 1, b"x"), Err(Errno::EFAULT));
    // The memory of the next client is the device's now, and can be unmapped.
    let all = next.call(DMA_UNMAP, &bytes![24u32, 2u32, 0u64, 0u64]).ok();
    assert_eq!(all.u64(16), (1 << 20) + 4096);
}

#[test]
fn memory_by_messages_is_that_of_the_next_client() {
    let served = Served::new();
    let (mut first, mut next) = both(&served);
    first.dma_map(0, 4096, 0, None).ok();
    next.dma_map(0, 4096, 0, None).ok();
    drop(first);
    until("the name has done its work", || named(&mut next) == (0, 0));
    next.ask(REGION_WRITE, &[bytes![0u64, BAR2, 24u32], bytes![DMA_READ_NOW, 0u64, 4u64]].concat());
    let read = next.receive();
    assert_eq!((read.command, &read.body), (DMA_READ, &bytes![0u64, 4u64]));
    next.send(&message(read.id, DMA_READ, REPLY, &[bytes![0u64, 4u64], b"here".to_vec()].concat()), &[]);
    next.receive().ok();
    assert_eq!(&next.region_read(BAR2, 64 << 10, 4).ok().body[16..], b"here");
}

#[test]
fn vmms_follow_each_other_without_an_end() {
    let served = Served::new();
    let mut vmm = served.peer();
    for round in 0u32..50 {
        name(&mut vmm, this_process()).ok();
        let mut next = served.peer();
        next.post(REGION_WRITE, &bytes![0u64, BAR0, 4u32, round]);
        // Both go at once now and then: nobody is left with a device that is nobody's.
        if round % 7 == 6 {
            let both = [vmm, next].map(|raw| std::thread::spawn(move || drop(raw)));
            both.into_iter().for_each(|drops| drops.join().unwrap());
            vmm = served.peer();
            // It may have come as the next client of the one that goes.
            until("the device is its own", || named(&mut vmm) == (0, 0));
            continue;
        }
        drop(vmm);
        assert_eq!(next.region_read(BAR0, 0, 4).ok().u32(16), round);
        vmm = next;
    }
}

#[test]
fn a_device_that_stays_stays_for_the_next_client_too() {
    let served = Served::new();
    let (first, mut next) = both(&served);
    let mut control = Raw::control(served.path());
    control.set_state(STOP_COPY).ok();
    let stay = |flags: u32| [vec![5; 16], bytes![flags, 0u32]].concat();
    control.feature(SET | STAY, &stay(1), 32).ok();
    let parked = next.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]);
    drop(first);
    until("the device is its own", || named(&mut next) == (0, 0));
    assert_eq!(next.set_state(RUNNING).refused(), EBUSY);
    assert_eq!(next.call(RESET, &[]).refused(), EBUSY);
    assert!(!next.has_something());
    assert_eq!(control.state(), STOP_COPY);
    control.feature(SET | STAY, &stay(2), 32).ok();
    control.set_state(RUNNING).ok();
    assert_eq!(next.receive().ok().id, parked);
}

#[test]
fn a_move_by_control_goes_on_while_the_vmm_is_replaced() {
    let served = Served::new();
    let (mut first, mut next) = both(&served);
    let mut control = Raw::control(served.path());
    let (theirs, its) = (memory(1 << 20), memory(1 << 20));
    first.dma_map(0, 1 << 20, 0, Some(theirs.as_fd())).ok();
    next.dma_map(0, 2 << 20, 0, Some(its.as_fd())).ok();
    // A log of everything: it covers what the next client brings.
    control.feature(SET | 6, &bytes![4096u64, 0u32, 0u32], 24).ok();
    control.set_state(PRE_COPY).ok();
    let bus = served.machine.bus();
    bus.memory.write(0x3000, b"first").unwrap();
    drop(first);
    until("the device is its own", || named(&mut next) == (0, 0));
    bus.memory.write(0x5000, b"second").unwrap();
    let report = control.feature(GET | 8, &bytes![0u64, 1u64 << 20, 4096u64], 8 + 24 + 32).ok();
    assert_eq!(report.u64(32), 1 << 3 | 1 << 5);
    control.set_state(STOP_COPY).ok();
    let parked = next.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]);
    next.region_read(CONFIG, 0, 2).ok();
    assert!(!next.has_something());
    control.mig_read(4096).ok();
    control.set_state(RUNNING).ok();
    assert_eq!(next.receive().ok().id, parked);
}

#[test]
fn a_server_ends_with_a_next_client_there() {
    let served = Served::new();
    let (first, mut next) = both(&served);
    next.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]);
    in_time("the server's end", move || drop(served));
    first.expect_end();
    next.expect_end();
}
