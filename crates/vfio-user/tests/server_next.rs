//! The client that gets the device when its VMM has gone (`docs/vfio-user-extensions.md: NEXT`): who may be it, what it may until
//! then, and that it gets all of the device and nothing of the former VMM.

#[macro_use]
mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
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
fn nobody_is_admitted_who_was_not_named() {
    let served = Served::new();
    let mut first = served.peer();
    let mut second = Raw::connect(served.path());
    let id = second.ask(VERSION, &version());
    first.assert_usable();
    let other = Other::start();
    name(&mut first, other.pid()).ok();
    assert_eq!(named(&mut first), (other.pid(), 0));
    first.assert_usable();
    assert!(!second.has_something(), "another process was named");
    // It waits already when it is named.
    name(&mut first, this_process()).ok();
    let reply = second.receive().ok();
    assert_eq!(reply.id, id);
    assert_eq!(named(&mut second), (this_process(), THERE | THIS));
    // One at a time.
    let mut third = Raw::connect(served.path());
    third.ask(VERSION, &version());
    first.assert_usable();
    assert!(!third.has_something());
    assert_eq!(name(&mut first, other.pid()).refused(), EBUSY);
    drop(first);
    until("the device is the second's", || named(&mut second) == (0, 0));
    assert!(!third.has_something(), "the name was for one");
    let ended = other.pid();
    drop(other);
    assert_eq!(name(&mut second, ended).refused(), ESRCH);
    for (pid, flags) in [(-1, 0u32), (i32::MIN, 0), (i32::MAX, 0)] {
        assert_eq!(second.feature(SET | NEXT, &bytes![pid, flags], 16).refused(), ESRCH);
    }
    assert_eq!(second.feature(SET | NEXT, &bytes![this_process(), 1u32], 16).refused(), EINVAL);
    assert_eq!(second.feature(SET | NEXT, &[0; 7], 16).refused(), EINVAL);
    drop(second);
    third.receive().ok();
}

#[test]
fn a_process_that_has_ended_keeps_nobody_out_and_lends_its_name_to_nobody() {
    let served = Served::new();
    let mut first = served.peer();
    let other = Other::start();
    name(&mut first, other.pid()).ok();
    drop(other);
    let mut second = Raw::connect(served.path());
    second.ask(VERSION, &version());
    first.assert_usable();
    assert!(!second.has_something());
    drop(first);
    second.receive().ok();
    second.assert_usable();
    assert_eq!(
        named(&mut second),
        (0, 0),
        "who was to come after the first is not who comes after the second"
    );
}

#[test]
fn control_names_the_next_client_and_takes_the_name_back() {
    let served = Served::new();
    let mut control = Raw::control(served.path());
    assert_eq!(name(&mut control, this_process()).refused(), ENOTCONN, "there is nothing to inherit");
    assert_eq!(control.feature(PROBE | GET | SET | NEXT, &[], 8).flags, REPLY);
    name(&mut control, 0).ok();
    let mut first = served.peer();
    name(&mut control, this_process()).ok();
    let next = served.peer();
    assert_eq!(named(&mut control), (this_process(), THERE));
    name(&mut control, 0).ok();
    next.expect_end();
    until("it is forgotten", || named(&mut control) == (0, 0));
    first.assert_usable();
    // By the real client.
    let client =
        Client::connect(served.path(), ClientOptions { role: Role::Control, ..ClientOptions::default() });
    let client = client.unwrap();
    client.name_next(Some(this_process())).unwrap();
    assert_eq!(client.next_vmm().unwrap().pid, Some(this_process()));
    client.name_next(None).unwrap();
    assert_eq!(client.next_vmm().unwrap(), NextVmm::default());
    let refused = client.name_next(Some(i32::MAX)).unwrap_err();
    assert!(matches!(&refused, Error::Refused { errno: Errno::ESRCH, .. }), "{refused}");
    assert!(refused.to_string().contains("no such process"), "{refused}");
}

#[test]
fn the_next_client_is_of_the_vmms_user() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: it needs a second user, and so root");
        return;
    }
    let options =
        Options { socket: SocketAccess { mode: 0o666, ..SocketAccess::default() }, ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    std::fs::set_permissions(served.path().parent().unwrap(), std::fs::Permissions::from_mode(0o755))
        .unwrap();
    let path = served.path();
    let (mut first, mut control) = (as_another(|| served.peer()), Raw::control(path));
    name(&mut control, this_process()).ok();
    // Root is not the VMM's user.
    let mut of_root = Raw::connect(path);
    of_root.ask(VERSION, &version());
    first.assert_usable();
    assert!(!of_root.has_something());
    assert_eq!(named(&mut control), (this_process(), 0));
    let mut next = as_another(|| served.peer());
    assert_eq!(named(&mut next), (this_process(), THERE | THIS));
    drop(first);
    until("the device is its own", || named(&mut next) == (0, 0));
    next.region_write(BAR0, 0, b"mine").ok();
    assert!(!of_root.has_something());
}

#[test]
fn a_next_client_that_dies_at_any_step_leaves_nothing_behind() {
    let served = Served::new();
    let mut first = served.peer();
    let (memory, wired) = (memory(1 << 20), event());
    first.dma_map(0, 1 << 20, 0, Some(memory.as_fd())).ok();
    wire(&mut first, MSI, 0, &wired);
    name(&mut first, this_process()).ok();
    let others = self::memory(1 << 20);
    for steps in 0..7 {
        let mut next = Raw::connect(served.path());
        if steps > 0 {
            next.negotiate();
            assert_eq!(named(&mut first), (this_process(), THERE), "the name still holds");
        }
        if steps > 1 {
            next.dma_map(0, 1 << 20, 0, Some(others.as_fd())).ok();
            next.dma_map(1 << 30, 1 << 20, 0, None).ok();
        }
        if steps > 2 {
            wire(&mut next, MSI, 0, &event());
        }
        if steps > 3 {
            next.post(REGION_WRITE, &[bytes![0u64, BAR0, 4u32], b"his1".to_vec()].concat());
        }
        if steps > 4 {
            next.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]);
        }
        if steps > 5 {
            next.send(&message(9, DMA_MAP, 0, &[0; 32])[..30], &[]);
        }
        drop(next);
        until("it is forgotten", || named(&mut first) == (this_process(), 0));
        assert_eq!(&first.region_read(BAR0, 0, 4).ok().body[16..], [0; 4]);
        let bus = served.machine.bus();
        bus.memory.write(0, b"its").unwrap();
        assert_eq!(bus.memory.write(1 << 30, b"x"), Err(Errno::EFAULT));
        bus.interrupts.raise(MSI, 0);
        assert_eq!(count(&wired), 1, "after {steps} steps");
    }
    // One that comes after all of them.
    let mut next = served.peer();
    drop(first);
    until("the device is its own", || named(&mut next) == (0, 0));
    next.assert_usable();
    assert_eq!(served.machine.bus().memory.write(0, b"x"), Err(Errno::EFAULT));
}

#[test]
fn a_vmm_that_dies_at_any_step_of_the_next_client_hands_the_device_over() {
    for steps in 0..6 {
        let served = Served::new();
        let mut first = served.peer();
        let wired = event();
        wire(&mut first, MSI, 0, &wired);
        first.dma_map(0, 4096, 0, Some(memory(4096).as_fd())).ok();
        name(&mut first, this_process()).ok();
        let mut next = Raw::connect(served.path());
        let (its, half) = (memory(4096), message(7, DMA_MAP, 0, &bytes![32u32, 3u32, 0u64, 0u64, 4096u64]));
        let mut parked = None;
        if steps > 0 {
            next.negotiate();
        }
        if steps > 1 {
            next.dma_map(1 << 20, 4096, 0, Some(its.as_fd())).ok();
        }
        if steps > 2 {
            wire(&mut next, MSI, 0, &wired);
        }
        if steps > 3 {
            parked = Some(next.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]));
        }
        if steps > 4 {
            next.send(&half[..20], &[its.as_fd()]);
        }
        drop(first);
        if let Some(parked) = parked {
            assert_eq!(next.receive().ok().id, parked);
        }
        if steps > 4 {
            next.send(&half[20..], &[]);
            assert_eq!(next.receive().ok().id, 7);
        }
        if steps == 0 {
            next.negotiate();
        }
        until("the device is its own", || named(&mut next) == (0, 0));
        next.assert_usable();
        next.region_write(BAR0, 0, b"mine").ok();
        next.set_state(STOP).ok();
        let bus = served.machine.bus();
        assert_eq!(bus.memory.read(1 << 20, &mut [0; 4]).is_ok(), steps > 1);
        assert_eq!(bus.memory.read(0, &mut [0; 4]).is_ok(), steps > 4);
    }
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
fn a_hostile_next_client_hurts_neither_the_vmm_nor_control() {
    let served = Served::new();
    let mut first = served.peer();
    let mut control = Raw::control(served.path());
    let theirs = memory(1 << 20);
    first.dma_map(0, 1 << 20, 0, Some(theirs.as_fd())).ok();
    let check = |first: &mut Raw, control: &mut Raw| {
        first.region_write(BAR0, 0, b"mine").ok();
        assert_eq!(&first.region_read(BAR0, 0, 4).ok().body[16..], b"mine");
        control.set_state(STOP_COPY).ok();
        control.mig_read(1024).ok();
        control.set_state(RUNNING).ok();
        served.machine.bus().memory.write(0, b"its").unwrap();
    };
    for deed in 0..6 {
        name(&mut first, this_process()).ok();
        let mut next = served.peer();
        match deed {
            // More maps than a client can have.
            0 => {
                let mut all = Vec::new();
                for at in 0..65_600u64 {
                    let map = bytes![32u32, 3u32, 0u64, at << 13, 4096u64];
                    all.extend(message(next.next_id(), DMA_MAP, NO_REPLY, &map));
                }
                next.send(&all, &[]);
                assert_eq!(next.dma_map(1 << 40, 4096, 0, None).refused(), 7, "E2BIG");
            }
            // More accesses than are kept: the server reads no further.
            1 => {
                next.socket.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
                let write =
                    message(1, REGION_WRITE, 0, &[bytes![0u64, BAR0, 4u32], b"his1".to_vec()].concat());
                let many = write.repeat(1000);
                let full = (0..1000).find_map(|_| next.try_send(&many, &[]).err());
                assert_eq!(full, Some(rustix::io::Errno::AGAIN), "it must end somewhere");
            }
            // Half a message, and silence.
            2 => next.send(&message(1, REGION_WRITE, 0, &[0; 64])[..40], &[]),
            3 => {}
            // Floods of what is answered, and of what is refused, with no reply taken.
            4 => {
                next.socket.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
                let ask = message(1, GET_INFO, 0, &bytes![16u32, 0u32, 0u32, 0u32]).repeat(1000);
                let full = (0..1000).find_map(|_| next.try_send(&ask, &[]).err());
                assert_eq!(full, Some(rustix::io::Errno::AGAIN));
            }
            _ => {
                let _ = next.try_send(&[0xff; 4096], &[]);
            }
        }
        for _ in 0..20 {
            check(&mut first, &mut control);
        }
        name(&mut control, 0).ok();
        until("it is gone", || named(&mut control).1 == 0);
        drop(next);
    }
    // Now with one that has prepared all that it may, and gets the device.
    name(&mut first, this_process()).ok();
    let mut next = served.peer();
    let mut all = Vec::new();
    for at in 0..65_535u64 {
        all.extend(message(next.next_id(), DMA_MAP, NO_REPLY, &bytes![32u32, 3u32, 0u64, at << 13, 4096u64]));
    }
    next.send(&all, &[]);
    next.assert_usable();
    drop(first);
    until("the device is its own", || named(&mut next) == (0, 0));
    assert_eq!(next.call(DMA_UNMAP, &bytes![24u32, 2u32, 0u64, 0u64]).ok().u64(16), 65_535 * 4096);
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
