//! Clients beside each other (`docs/vfio-user-extensions.md: The control role`): who gets which role, and what becomes of the
//! VMM's accesses while a control client moves its device.

#[macro_use]
mod common;

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::device::*;
use common::fds::*;
use common::lingering::in_time;
use common::raw::*;
use common::{Served, as_another};
use limosa_client::{Device, DeviceExt, Error};
use limosa_protocol::{Errno, State};
use limosa_vfio_user::client::{self, Client, Role};
use limosa_vfio_user::server::{Options, Server, SocketAccess};
use rustix::net::SendFlags;

const DATA_FD: u32 = 0xfe01;
const STAY: u32 = 0xfe03;
const ECHO: u32 = 0xfe04;
const KICK: u32 = 0xfe05;
const LOGGING_START: u32 = 6;
const LOGGING_STOP: u32 = 7;
const LOGGING_REPORT: u32 = 8;

const ID: [u8; 16] = [7; 16];

fn json(reply: &Message) -> String {
    String::from_utf8(reply.body[4..reply.body.len() - 1].to_vec()).unwrap()
}

fn stay(raw: &mut Raw, id: [u8; 16], flags: u32) -> Message {
    let data = [&id[..], &bytes![flags, 0u32]].concat();
    raw.feature(SET | STAY, &data, 32)
}

/// The state as it is once it is this one.
#[track_caller]
fn reaches(raw: &mut Raw, state: u32) {
    let begun = Instant::now();
    while raw.state() != state {
        assert!(begun.elapsed() < PATIENCE, "it never is in {state}");
    }
}

/// A VMM whose read of BAR0 waits: the id of that read.
#[track_caller]
fn parked_read(vmm: &mut Raw) -> u16 {
    let parked = vmm.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]);
    // Requests are handled in order: when this one is answered, the one before it waits.
    let config = vmm.region_read(CONFIG, 0, 2).ok();
    assert_eq!(config.body.len(), 18);
    parked
}

#[track_caller]
fn is_answered(vmm: &Raw, parked: u16) {
    assert_eq!(vmm.receive().ok().id, parked);
}

fn log(control: &mut Raw) -> Message {
    let data = bytes![4096u64, 1u32, 0u32, 0u64, 1u64 << 20];
    control.feature(SET | LOGGING_START, &data, 8 + data.len() as u32)
}

#[test]
fn a_control_client_comes_beside_a_vmm() {
    let served = Served::new();
    let mut vmm = served.peer();
    let mut control = Raw::connect(served.path());
    assert!(json(&control.ask_role("control").ok()).contains(r#""role":"control""#));
    for _ in 0..10 {
        control.assert_usable();
        vmm.assert_usable();
    }
    control.set_state(STOP_COPY).ok();
    assert_eq!(vmm.state(), STOP_COPY);
    assert_eq!(control.mig_read(1024).ok().u32(4), 1024);
    control.set_state(RUNNING).ok();
    vmm.region_write(BAR0, 0, b"on").ok();
}

#[test]
fn each_client_is_told_its_role_if_it_asked() {
    let served = Served::new();
    let mut first = Raw::connect(served.path());
    assert!(json(&first.ask_role("either").ok()).contains(r#""role":"vmm""#), "there was no VMM");
    let mut second = Raw::connect(served.path());
    assert!(json(&second.ask_role("either").ok()).contains(r#""role":"control""#));
    drop(first);
    // The control client is none that others wait for.
    let mut silent = Raw::connect(served.path());
    assert!(!json(&silent.negotiate()).contains("role"));
    let mut unknown = Raw::connect(served.path());
    assert_eq!(unknown.ask_role("operator").refused(), EINVAL);
    second.assert_usable();
    // Without a VMM as well.
    drop(silent);
    let mut third = Raw::connect(served.path());
    assert!(json(&third.ask_role("control").ok()).contains(r#""role":"control""#));
}

#[test]
fn the_client_learns_its_role() {
    let served = Served::new();
    let either = || client::Options { role: Role::Either, ..client::Options::default() };
    let vmm = Client::connect(served.path(), either()).unwrap();
    assert_eq!(vmm.role(), Role::Vmm);
    let control = Client::connect(served.path(), either()).unwrap();
    assert_eq!(control.role(), Role::Control);
    let mut stream = control.set_state(State::StopCopy).unwrap().expect("a session");
    assert!(matches!(vmm.set_state(State::Running), Err(Error::Refused { errno: Errno::EBUSY, .. })));
    vmm.reset().unwrap();
    let mut data = [0; 16];
    assert!(matches!(stream.read(&mut data), Err(Error::Refused { errno: Errno::ENODEV, .. })));
    assert!(matches!(
        control.region_read(BAR0, 0, &mut data),
        Err(Error::Refused { errno: Errno::EPERM, .. })
    ));
    control.region_read(CONFIG, 0, &mut data).unwrap();
}

#[test]
fn the_claim_alone_makes_no_control_client() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: it needs a second user, and so root");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let (path, control_path) = (directory.path().join("vmm"), directory.path().join("control"));
    let open = SocketAccess { mode: 0o666, ..SocketAccess::default() };
    let options = Options { socket: open, ..Options::default() };
    let server = Server::bind(&path, TestDevice::new().machine(), options).unwrap();
    let server = server.with_control(&control_path, &open).unwrap();
    let shutdown = server.shutdown_handle();
    let thread = std::thread::spawn(move || server.serve());
    let mut vmm = as_another(|| Raw::connect(&path));
    assert_eq!(vmm.ask_role("control").refused(), EACCES);
    // The refused client may go on as what anybody may be.
    assert!(json(&vmm.ask_role("either").ok()).contains(r#""role":"vmm""#));
    let mut next = as_another(|| Raw::connect(&path));
    let mut body = bytes![0u16, 0u16];
    body.extend_from_slice(b"{\"capabilities\":{\"role\":\"either\"}}\0");
    next.ask(VERSION, &body);
    vmm.assert_usable();
    assert!(!next.has_something(), "it waits for the VMM's place");
    // Whoever may connect to the other socket may move the device.
    let mut control = as_another(|| Raw::connect(&control_path));
    control.negotiate();
    control.set_state(STOP).ok();
    assert_eq!(control.region_read(BAR0, 0, 4).refused(), EPERM);
    drop(vmm);
    next.receive().ok();
    shutdown.shut_down();
    thread.join().unwrap().unwrap();
    assert!(!path.exists() && !control_path.exists());
}

#[test]
fn what_a_control_client_may_not_is_refused_with_eperm() {
    let served = Served::new();
    let mut vmm = served.peer();
    let mut control = Raw::control(served.path());
    let memory = memory(4096);
    let write = [&bytes![0u64, BAR0, 1u32][..], &[1]].concat();
    let config = [&bytes![0u64, CONFIG, 1u32][..], &[1]].concat();
    let multi = bytes![1u64, 0u64, BAR0, 4u32, 1u64];
    for state in [RUNNING, STOP, STOP_COPY] {
        control.set_state(state).ok();
        assert_eq!(control.dma_map(0, 4096, 0, Some(memory.as_fd())).refused(), EPERM);
        assert_eq!(control.call(DMA_UNMAP, &bytes![24u32, 0u32, 0u64, 4096u64]).refused(), EPERM);
        assert_eq!(control.call(GET_REGION_IO_FDS, &bytes![96u32, 0u32, BAR0, 0u32]).refused(), EPERM);
        assert_eq!(control.call(SET_IRQS, &bytes![20u32, 0x21u32, MSI, 0u32, 1u32]).refused(), EPERM);
        for region in [BAR0, BAR1, BAR2, BAR3, BAR4, 99] {
            assert_eq!(control.region_read(region, 0, 4).refused(), EPERM, "region {region}");
        }
        assert_eq!(control.call(REGION_WRITE, &write).refused(), EPERM);
        assert_eq!(control.call(REGION_WRITE, &config).refused(), EPERM);
        assert_eq!(control.call(REGION_WRITE_MULTI, &multi).refused(), EPERM);
        assert_eq!(control.call(RESET, &[]).refused(), EPERM);
        assert_eq!(control.call(DMA_READ, &bytes![0u64, 4u64]).refused() & !(ENOSYS | EINVAL), 0);

        control.assert_usable();
        let region = control.call(GET_REGION_INFO, &bytes![256u32, 0u32, BAR1, 0u32, 0u64, 0u64]).ok();
        assert!(region.fds.is_empty(), "memory of the device is the VMM's");
        control.call(GET_IRQ_INFO, &bytes![16u32, 0u32, MSI, 0u32]).ok();
        control.feature(GET | 1, &[], 16).ok();
    }
    assert_eq!(control.mig_read(100).ok().u32(4), 100);
    control.set_state(RESUMING).ok();
    control.mig_write(b"part").ok();
    // A load of its own it may end.
    control.call(RESET, &[]).ok();
    assert_eq!(control.state(), RUNNING);
    vmm.assert_usable();
}

#[test]
fn a_session_has_one_owner() {
    let served = Served::new();
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    let mut other = Raw::control(served.path());
    for state in [STOP, STOP_COPY, PRE_COPY, RESUMING] {
        control.set_state(state).ok();
        for to in [STOP, RUNNING, STOP_COPY, RESUMING] {
            assert_eq!(vmm.set_state(to).refused(), EBUSY, "from {state} to {to}");
            assert_eq!(other.set_state(to).refused(), EBUSY, "from {state} to {to}");
        }
        assert_eq!(vmm.mig_read(16).refused(), ENODEV);
        assert_eq!(other.feature(GET | DATA_FD, &[], 16).refused(), ENODEV);
        assert_eq!(control.state(), state);
        if state == RESUMING {
            control.call(RESET, &[]).ok();
        } else {
            control.set_state(RUNNING).ok();
        }
    }
    for state in [STOP, STOP_COPY, PRE_COPY] {
        vmm.set_state(state).ok();
        assert_eq!(control.set_state(RUNNING).refused(), EBUSY);
        assert_eq!(stay(&mut control, ID, 1).refused(), EBUSY);
        // What the VMM itself stopped answers it, as ever.
        vmm.region_write(BAR0, 0, b"mine").ok();
        vmm.set_state(RUNNING).ok();
    }
    // Back in RUNNING it is nobody's.
    control.set_state(STOP).ok();
    control.set_state(RUNNING).ok();
    other.set_state(STOP).ok();
}

#[test]
fn a_dirty_log_has_one_owner() {
    let served = Served::new();
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    log(&mut control).ok();
    let report = bytes![0u64, 1u64 << 20, 4096u64];
    assert_eq!(vmm.feature(GET | LOGGING_REPORT, &report, 8 + 24 + 32).refused(), EBUSY);
    assert_eq!(vmm.feature(SET | LOGGING_STOP, &[], 8).refused(), EBUSY);
    control.feature(SET | LOGGING_STOP, &[], 8).ok();
    log(&mut vmm).ok();
    assert_eq!(control.feature(SET | LOGGING_STOP, &[], 8).refused(), EBUSY);
    drop(vmm);
    let mut next = served.peer();
    log(&mut next).ok();
}

#[test]
fn a_reset_by_the_vmm_ends_the_session() {
    let served = Served::new();
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    for state in [PRE_COPY, STOP_COPY] {
        control.set_state(state).ok();
        control.mig_read(16).ok();
        vmm.call(RESET, &[]).ok();
        assert_eq!(control.mig_read(16).refused(), ENODEV);
        assert_eq!(stay(&mut control, ID, 1).refused(), EBUSY);
        assert_eq!(control.state(), RUNNING);
    }
    control.set_state(RESUMING).ok();
    control.mig_write(b"some").ok();
    vmm.call(RESET, &[]).ok();
    assert_eq!(control.mig_write(b"more").refused(), ENODEV);
    // A session of the VMM's own is not the control client's.
    vmm.set_state(STOP_COPY).ok();
    assert_eq!(control.mig_read(16).refused(), ENODEV);
}

#[test]
fn accesses_wait_in_order_while_the_device_is_moved() {
    let served = Served::new();
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    let memory = memory(4096);
    for state in [STOP, STOP_COPY] {
        control.set_state(state).ok();
        let write = |value: u32| [bytes![0u64, BAR0, 4u32], value.to_ne_bytes().to_vec()].concat();
        let mut ids = Vec::new();
        ids.push(vmm.ask(REGION_WRITE, &write(1)));
        ids.push(vmm.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]));
        vmm.post(REGION_WRITE, &write(2));
        ids.push(vmm.ask(REGION_READ, &bytes![0u64, BAR0, 4u32]));
        ids.push(vmm.ask(REGION_WRITE_MULTI, &bytes![2u64, 0u64, BAR0, 4u32, 3u64, 4u64, BAR0, 4u32, 4u64]));
        ids.push(vmm.ask(REGION_READ, &bytes![0u64, BAR0, 8u32]));
        // Nothing else waits.
        assert_eq!(vmm.region_read(CONFIG, 0, 4).ok().body[16..], [0, 1, 2, 3]);
        vmm.region_write(CONFIG, 200, &[9]).ok();
        vmm.dma_map(0, 4096, 0, Some(memory.as_fd())).ok();
        vmm.call(DMA_UNMAP, &bytes![24u32, 0u32, 0u64, 4096u64]).ok();
        vmm.call_fds(SET_IRQS, &bytes![20u32, 0x24u32, MSI, 0u32, 1u32], &[event().as_fd()]).ok();
        assert_eq!(vmm.state(), state);
        assert_eq!(control.state(), state);
        control.set_state(RUNNING).ok();
        let replies: Vec<_> = ids.iter().map(|_| vmm.receive().ok()).collect();
        assert_eq!(replies.iter().map(|reply| reply.id).collect::<Vec<_>>(), ids);
        assert_eq!(replies[1].u32(16), 1);
        assert_eq!(replies[2].u32(16), 2);
        assert_eq!(replies[3].body, bytes![2u64]);
        assert_eq!((replies[4].u32(16), replies[4].u32(20)), (3, 4));
        vmm.assert_usable();
    }
    // While it runs nothing waits.
    control.set_state(PRE_COPY).ok();
    vmm.region_write(BAR0, 0, b"runs").ok();
}

#[test]
fn a_device_that_is_loaded_holds_accesses_back_too() {
    let served = Served::device(TestDevice::new().state_bytes(100));
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    control.set_state(RESUMING).ok();
    let parked = parked_read(&mut vmm);
    control.mig_write(&[5; 100]).ok();
    control.set_state(STOP).ok();
    assert!(!vmm.has_something());
    control.set_state(RUNNING).ok();
    is_answered(&vmm, parked);
}

#[test]
fn a_vmm_that_uses_its_device_for_too_long_gets_it_back() {
    let options = Options { park_limit: Duration::from_millis(200), ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    for state in [STOP, STOP_COPY, RESUMING] {
        control.set_state(state).ok();
        let begun = Instant::now();
        let parked = parked_read(&mut vmm);
        is_answered(&vmm, parked);
        assert!(begun.elapsed() >= Duration::from_millis(200), "it waited");
        assert_eq!(control.state(), RUNNING);
        assert_eq!(control.mig_read(16).refused(), ENODEV);
        assert_eq!(stay(&mut control, ID, 1).refused(), EBUSY, "so no COMMIT follows");
        vmm.region_write(BAR0, 0, b"mine").ok();
    }
    // The next move is one of its own.
    control.set_state(STOP_COPY).ok();
    control.mig_read(16).ok();
}

#[test]
fn thousands_of_posted_writes_wait_and_arrive_in_order() {
    let served = Served::new();
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    control.set_state(STOP).ok();
    let post = |vmm: &mut Raw, from: u32, to: u32| {
        let mut all = Vec::new();
        for i in from..to {
            let body = [bytes![u64::from(i % 500) * 4, BAR0, 4u32], i.to_ne_bytes().to_vec()].concat();
            all.extend(message(vmm.next_id(), REGION_WRITE, NO_REPLY, &body));
        }
        vmm.send(&all, &[]);
    };
    post(&mut vmm, 0, 1000);
    vmm.region_read(CONFIG, 0, 2).ok();
    // More than is kept: the rest stays in the socket.
    post(&mut vmm, 1000, 2000);
    assert_eq!(control.state(), STOP);
    control.set_state(RUNNING).ok();
    let reply = vmm.region_read(BAR0, 0, 2000).ok();
    for i in 0..500 {
        assert_eq!(reply.u32(16 + i * 4), 1500 + i as u32);
    }
}

#[test]
fn a_full_house_of_waiting_accesses_holds_up_neither_control_nor_the_end() {
    let options = Options { park_limit: Duration::from_secs(3600), ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    control.set_state(STOP).ok();
    let mut all = Vec::new();
    for _ in 0..1500 {
        all.extend(message(vmm.next_id(), REGION_READ, 0, &bytes![0u64, BAR0, 4u32]));
    }
    vmm.send(&all, &[]);
    control.set_state(STOP_COPY).ok();
    control.mig_read(1 << 20).ok();
    in_time("the server's end", move || drop(served));
    vmm.expect_end();
    control.expect_end();
}

#[test]
fn a_control_clients_death_leads_back_to_running() {
    let served = Served::new();
    let mut vmm = served.peer();
    for state in [PRE_COPY, STOP_COPY, STOP, RESUMING] {
        let mut control = Raw::control(served.path());
        control.set_state(state).ok();
        if state == RESUMING {
            control.mig_write(b"part").ok();
        }
        let parked = (state != PRE_COPY).then(|| parked_read(&mut vmm));
        drop(control);
        if let Some(parked) = parked {
            is_answered(&vmm, parked);
        }
        reaches(&mut vmm, RUNNING);
        vmm.set_state(STOP_COPY).ok();
        vmm.set_state(RUNNING).ok();
    }
}

#[test]
fn a_vmm_that_goes_leaves_the_move_to_its_control_client() {
    let served = Served::new();
    let (vmm, mut control) = (served.peer(), Raw::control(served.path()));
    control.set_state(STOP_COPY).ok();
    control.mig_read(16).ok();
    drop(vmm);
    let mut next = served.peer();
    let parked = parked_read(&mut next);
    control.mig_read(16).ok();
    control.set_state(RUNNING).ok();
    is_answered(&next, parked);
}

/// Waits until the server has forgotten a control client that has gone, when all others that it takes are there.
fn is_forgotten(served: &Served) -> Raw {
    let begun = Instant::now();
    loop {
        let mut next = Raw::connect(served.path());
        let reply = next.ask_role("control");
        if reply.flags & ERROR == 0 {
            return next;
        }
        assert_eq!(reply.refused(), EBUSY);
        assert!(begun.elapsed() < PATIENCE, "a control client's place is not free again");
    }
}

#[test]
fn a_device_that_was_told_to_stay_never_runs_again_by_itself() {
    let options = Options { park_limit: Duration::from_millis(200), ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    // All places of control clients are taken, so that one that is free again tells that a client is forgotten.
    let mut others: Vec<_> = (0..7).map(|_| Raw::control(served.path())).collect();
    assert_eq!(Raw::connect(served.path()).ask_role("control").refused(), EBUSY);
    for state in [RUNNING, PRE_COPY] {
        control.set_state(state).ok();
        assert_ne!(stay(&mut control, ID, 1).refused(), 0);
    }
    control.set_state(STOP_COPY).ok();
    assert_eq!(stay(&mut others[0], ID, 1).refused(), EBUSY);
    assert_eq!(stay(&mut vmm, ID, 1).refused(), EBUSY);
    for flags in [0, 3, 4] {
        assert_eq!(stay(&mut control, ID, flags).refused(), EINVAL);
    }
    assert_eq!(stay(&mut control, ID, 2).refused(), ENOENT);
    assert_eq!(control.feature(GET | STAY, &[], 32).ok().body[8..], [0; 24]);
    stay(&mut control, ID, 1).ok();
    stay(&mut control, ID, 1).ok();
    assert_eq!(stay(&mut control, [8; 16], 1).refused(), EEXIST);
    let told = [&ID[..], &bytes![1u32, 0u32]].concat();
    assert_eq!(others[0].feature(GET | STAY, &[], 32).ok().body[8..], told);

    let nothing_leads_out = |vmm: &mut Raw, control: &mut Raw| {
        let parked = parked_read(vmm);
        assert_eq!(vmm.call(RESET, &[]).refused(), EBUSY);
        for to in [RUNNING, RESUMING] {
            assert_eq!(vmm.set_state(to).refused(), EBUSY, "the VMM to {to}");
            assert_eq!(control.set_state(to).refused(), EBUSY, "control to {to}");
        }
        assert_eq!(stay(control, [8; 16], 2).refused(), ENOENT);
        assert_eq!(vmm.state(), STOP_COPY);
        assert!(!vmm.has_something(), "its access still waits");
        parked
    };
    nothing_leads_out(&mut vmm, &mut control);
    drop(vmm);
    let mut vmm = served.peer();
    let first_parked = nothing_leads_out(&mut vmm, &mut control);
    drop(control);
    let mut control = is_forgotten(&served);
    let parked = nothing_leads_out(&mut vmm, &mut control);
    drop(control);
    let mut control = is_forgotten(&served);
    assert_eq!(control.state(), STOP_COPY);
    assert_eq!(stay(&mut control, ID, 2).ok().flags, REPLY);
    assert_eq!(control.state(), STOP_COPY, "it stays as it is");
    control.set_state(RUNNING).ok();
    // Both that waited, in order.
    assert_eq!(vmm.receive().ok().id, first_parked);
    is_answered(&vmm, parked);
}

/// A VMM that announces what QEMU does.
fn qemu(served: &Served) -> Raw {
    let mut raw = Raw::connect(served.path());
    let json = concat!(
        r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "#,
        r#""max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "#,
        r#""write_multiple": true}}"#
    );
    raw.version(json).ok();
    raw
}

#[test]
fn echo_marks_the_logged_pages_in_the_vmms_own_log() {
    for is_qemu in [true, false] {
        let served = Served::new();
        let mut vmm = if is_qemu { qemu(&served) } else { served.peer() };
        let mut control = Raw::control(served.path());
        let memory = memory(1 << 20);
        vmm.dma_map(0, 1 << 20, 0, Some(memory.as_fd())).ok();
        let echo = |pages: u64| bytes![0u64, 1u64 << 20, 4096u64, pages];
        let refused = |control: &mut Raw| control.feature(SET | ECHO, &echo(0), 40).refused();
        assert_eq!(refused(&mut control), EBUSY, "it does not drive the device");
        log(&mut control).ok();
        rustix::io::pwrite(&memory, &[0xa1], 0x1000).unwrap();
        rustix::io::pwrite(&memory, &[0xa3], 0x3000).unwrap();
        rustix::io::pwrite(&memory, &[0xff], 0xff000).unwrap();
        for page in [0x1010u64, 0x3010, 0xff010] {
            vmm.region_write(BAR2, 0, &bytes![DMA_WRITE_NOW, page, 8u64]).ok();
        }
        control.set_state(PRE_COPY).ok();
        assert_eq!(refused(&mut control), EINVAL, "the device runs");
        control.set_state(STOP_COPY).ok();
        // An access that waits, and then the reply to the echo: the access must not be forgotten over it.
        let parked = parked_read(&mut vmm);
        let id = control.ask(FEATURE, &[bytes![40u32, SET | ECHO], echo(0)].concat());
        for (at, (address, value)) in
            [(0x1000u64, 0xa1u8), (0x3000, 0xa3), (0xff000, 0xff)].into_iter().enumerate()
        {
            let write = vmm.receive();
            let expected = if is_qemu { bytes![address, 1u32, value] } else { bytes![address, 1u64, value] };
            assert_eq!((write.command, write.body), (DMA_WRITE, expected));
            assert_eq!(write.flags, if at < 2 { NO_REPLY } else { 0 });
            if at == 2 {
                vmm.send(&message(write.id, DMA_WRITE, REPLY, &bytes![address, 1u32]), &[]);
            }
        }
        let reply = control.receive().ok();
        assert_eq!((reply.id, reply.body), (id, [bytes![40u32, SET | ECHO], echo(3)].concat()));
        // What was told is not told again.
        let reply = control.feature(SET | ECHO, &echo(0), 40).ok();
        assert_eq!(reply.body[8..], echo(0));
        assert_eq!(
            control.feature(SET | ECHO, &bytes![0u64, 1u64 << 20, 4095u64, 0u64], 40).refused(),
            EINVAL
        );
        control.set_state(RUNNING).ok();
        is_answered(&vmm, parked);
        vmm.assert_usable();
    }
}

#[test]
fn kick_fires_what_is_wired_while_nothing_runs() {
    let served = Served::new();
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    let (wired, other) = (event(), event());
    vmm.call_fds(SET_IRQS, &bytes![20u32, 0x24u32, MSI, 1u32, 1u32], &[wired.as_fd()]).ok();
    vmm.call_fds(SET_IRQS, &bytes![20u32, 0x24u32, MSIX, 7u32, 1u32], &[other.as_fd()]).ok();
    let kick = |raw: &mut Raw| raw.feature(SET | KICK, &[], 8);
    assert_eq!(kick(&mut control).refused(), EBUSY);
    control.set_state(PRE_COPY).ok();
    assert_eq!(kick(&mut control).refused(), EINVAL);
    for state in [STOP_COPY, STOP] {
        control.set_state(state).ok();
        assert_eq!(kick(&mut vmm).refused(), EBUSY);
        assert_eq!((count(&wired), count(&other)), (0, 0));
        kick(&mut control).ok();
        assert_eq!((count(&wired), count(&other)), (1, 1));
    }
    control.set_state(RESUMING).ok();
    assert_eq!(kick(&mut control).refused(), EINVAL);
}

#[test]
fn the_features_of_control_are_probed() {
    let served = Served::new();
    let mut control = Raw::control(served.path());
    for (index, ops) in [(STAY, GET), (STAY, SET), (STAY, GET | SET), (ECHO, SET), (KICK, SET)] {
        control.feature(PROBE | ops | index, &[], 8).ok();
    }
    for (index, ops) in [(ECHO, GET), (KICK, GET), (ECHO, GET | SET)] {
        assert_eq!(control.feature(PROBE | ops | index, &[], 8).refused(), EINVAL);
    }
    assert_eq!(control.feature(SET | STAY, &[0; 23], 32).refused(), EINVAL);
}

#[test]
fn a_second_vmm_waits_and_inherits_nothing() {
    let served = Served::new();
    let mut first = served.peer();
    let (memory, wired) = (memory(4096), event());
    first.dma_map(0, 4096, 0, Some(memory.as_fd())).ok();
    first.call_fds(SET_IRQS, &bytes![20u32, 0x24u32, MSI, 0u32, 1u32], &[wired.as_fd()]).ok();
    log(&mut first).ok();
    let mut second = Raw::connect(served.path());
    let mut body = bytes![0u16, 0u16];
    body.extend_from_slice(b"{}\0");
    let id = second.ask(VERSION, &body);
    for _ in 0..100 {
        first.assert_usable();
    }
    assert!(!second.has_something(), "no reply while there is a VMM");
    drop(first);
    assert_eq!(second.receive().ok().id, id);
    second.dma_map(0, 4096, 0, Some(memory.as_fd())).ok();
    log(&mut second).ok();
    second.call(SET_IRQS, &bytes![20u32, 0x21u32, MSI, 0u32, 1u32]).ok();
    assert_eq!(count(&wired), 0);
}

#[test]
fn more_than_sixteen_waiting_vmms_are_refused_and_control_gets_in() {
    let served = Served::new();
    let mut vmm = served.peer();
    let mut body = bytes![0u16, 0u16];
    body.extend_from_slice(b"{}\0");
    let mut waiting: Vec<_> = (0..17).map(|_| Raw::connect(served.path())).collect();
    waiting.iter_mut().for_each(|raw| _ = raw.ask(VERSION, &body));
    let begun = Instant::now();
    let refused = loop {
        if let Some(at) = waiting.iter().position(Raw::has_something) {
            break waiting.swap_remove(at);
        }
        assert!(begun.elapsed() < PATIENCE, "seventeen wait");
        vmm.assert_usable();
    };
    assert_eq!(refused.receive().refused(), EBUSY);
    Raw::control(served.path()).set_state(STOP).ok();
    let mut either = Raw::connect(served.path());
    assert!(json(&either.ask_role("either").ok()).contains("control"));
    // One after the other gets its turn.
    drop((vmm, refused));
    for _ in 0..16 {
        let begun = Instant::now();
        let at = loop {
            if let Some(at) = waiting.iter().position(Raw::has_something) {
                break at;
            }
            assert!(begun.elapsed() < PATIENCE, "nobody got the place");
            either.state();
        };
        let mut next = waiting.swap_remove(at);
        next.receive().ok();
        next.assert_usable();
    }
}

#[test]
fn a_silent_client_holds_up_nobody() {
    let served = Served::new();
    let silent: Vec<_> = (0..40).map(|_| Raw::connect(served.path())).collect();
    served.peer().assert_usable();
    served.peer().assert_usable();
    Raw::control(served.path()).assert_usable();
    drop(silent);
}

#[test]
fn a_client_that_says_nothing_takes_no_place_from_others() {
    let options =
        Options { socket: SocketAccess { mode: 0o666, ..SocketAccess::default() }, ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    std::fs::set_permissions(served.path().parent().unwrap(), std::fs::Permissions::from_mode(0o755))
        .unwrap();
    let is_root = rustix::process::geteuid().is_root();
    // Of another user, who is as slow to say something.
    let slow = is_root.then(|| as_another(|| Raw::connect(served.path())));
    let mut vmm = served.peer();
    let mut waiting = Raw::connect(served.path());
    waiting.ask(VERSION, &[bytes![0u16, 0u16], b"{}\0".to_vec()].concat());
    vmm.assert_usable();
    let silent: Vec<_> = (0..300).map(|_| Raw::connect(served.path())).collect();
    // Those that came last have places, and who has said something keeps its own.
    let mut control = Raw::control(served.path());
    control.set_state(STOP).ok();
    control.set_state(RUNNING).ok();
    vmm.assert_usable();
    silent[0].expect_end();
    assert!(!waiting.has_something());
    drop(vmm);
    waiting.receive().ok();
    waiting.assert_usable();
    drop(waiting);
    if let Some(mut slow) = slow {
        slow.negotiate();
        slow.assert_usable();
    }
    drop(silent);
}

#[test]
fn silent_clients_at_one_door_kept_control_out_at_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let (path, control_path) = (directory.path().join("vmm"), directory.path().join("control"));
    let server = Server::bind(&path, TestDevice::new().machine(), Options::default()).unwrap();
    let server = server.with_control(&control_path, &SocketAccess::default()).unwrap();
    let shutdown = server.shutdown_handle();
    let thread = std::thread::spawn(move || server.serve());
    let mut vmm = Raw::negotiated(&path);
    let silent: Vec<_> = (0..80).map(|_| Raw::connect(&path)).collect();
    let mut control = Raw::connect(&control_path);
    control.negotiate();
    control.set_state(STOP).ok();
    vmm.assert_usable();
    drop(silent);
    shutdown.shut_down();
    thread.join().unwrap().unwrap();
}

#[test]
fn a_control_client_that_takes_no_reply_stalls_nothing() {
    let served = Served::device(TestDevice::new().state_bytes(64 << 20));
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    control.set_state(STOP_COPY).ok();
    // Far more than the socket holds.
    for _ in 0..16 {
        control.ask(MIG_DATA_READ, &bytes![8u32 + (1 << 20), 1u32 << 20]);
    }
    let begun = Instant::now();
    while !control.has_something() {
        assert!(begun.elapsed() < PATIENCE, "no data comes");
    }
    for _ in 0..100 {
        vmm.assert_usable();
    }
    let parked = parked_read(&mut vmm);
    let mut other = Raw::control(served.path());
    assert_eq!(other.state(), STOP_COPY);
    let reset = vmm.ask(RESET, &[]);
    let refused = vmm.receive();
    assert_eq!(
        (refused.id, refused.refused()),
        (parked, EBUSY),
        "what came before the reset is not done after it"
    );
    assert_eq!(vmm.receive().ok().id, reset);
    other.set_state(STOP).ok();
}

/// Sends a byte out of band; `false` where the system has none for UNIX sockets.
fn send_out_of_band(socket: &std::os::unix::net::UnixStream) -> bool {
    match rustix::net::send(socket, b"!", SendFlags::OOB | SendFlags::NOSIGNAL) {
        Err(rustix::io::Errno::OPNOTSUPP) => false,
        sent => sent == Ok(1) || panic!("{sent:?}"),
    }
}

#[test]
fn an_out_of_band_byte_neither_hangs_the_server_nor_keeps_it_busy() {
    for (state, interruptible) in [(RESUMING, false), (STOP_COPY, false), (RESUMING, true)] {
        let served =
            Served::with(TestDevice::new().machine(), Options { interruptible, ..Options::default() });
        let mut vmm = served.peer();
        let mut control = Raw::control(served.path());
        control.set_state(state).ok();
        let reply = control.feature(GET | DATA_FD, &[], 16).ok();
        let [fd]: [_; 1] = reply.fds.try_into().unwrap();
        let data = std::os::unix::net::UnixStream::from(fd);
        if !send_out_of_band(&data) || !send_out_of_band(&control.socket) || !send_out_of_band(&vmm.socket) {
            println!("skipped: this system's UNIX sockets have no out-of-band data");
            return;
        }
        vmm.assert_usable();
        control.assert_usable();
        assert_eq!(control.state(), state);
        assert!(cpu_time_of(Duration::from_millis(300)) < Duration::from_millis(250), "a thread spins");
        in_time("the server's end", move || drop(served));
        control.expect_end();
        drop(data);
    }
}

/// What this process computes at least in this long. Other tests of this file run beside this one, so the least of some counts.
fn cpu_time_of(sleep: Duration) -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    let now = || {
        let now = clock_gettime(ClockId::ProcessCPUTime);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    };
    let mut least = Duration::MAX;
    for _ in 0..20 {
        let begun = now();
        std::thread::sleep(sleep);
        least = least.min(now() - begun);
        if least < sleep / 3 {
            break;
        }
    }
    least
}

#[test]
fn what_a_client_that_died_has_loaded_is_no_complete_state() {
    let served = Served::device(TestDevice::new().state_bytes(100));
    let mut vmm = served.peer();
    vmm.set_state(RESUMING).ok();
    vmm.mig_write(&[5; 100]).ok();
    drop(vmm);
    let mut next = served.peer();
    assert_eq!(next.state(), RESUMING);
    for to in [STOP, RUNNING] {
        assert_eq!(next.set_state(to).refused(), EIO);
    }
    next.call(RESET, &[]).ok();
    next.set_state(RESUMING).ok();
    next.mig_write(&[5; 100]).ok();
    next.set_state(RUNNING).ok();
}

#[test]
fn many_threads_of_both_sides_never_lose_an_access() {
    let served = Arc::new(Served::new());
    let mover = {
        let served = Arc::clone(&served);
        std::thread::spawn(move || {
            let mut control = Raw::control(served.path());
            for _ in 0..200 {
                control.set_state(PRE_COPY).ok();
                control.set_state(STOP_COPY).ok();
                control.mig_read(4096).ok();
                control.set_state(RUNNING).ok();
            }
        })
    };
    let mut vmm = served.peer();
    let mut value = 0u32;
    while !mover.is_finished() {
        value += 1;
        let body = [bytes![0u64, BAR0, 4u32], value.to_ne_bytes().to_vec()].concat();
        vmm.post(REGION_WRITE, &body);
        assert_eq!(vmm.region_read(BAR0, 0, 4).ok().u32(16), value);
    }
    mover.join().unwrap();
}
