//! Clients beside each other (`docs/vfio-user-extensions.md: The control role`): who gets which role, and what becomes of the
//! VMM's accesses while a control client moves its device.

#[macro_use]
#[path = "../common/mod.rs"]
mod common;
mod crowds;
mod parked;
mod roles;

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

/// A busy machine may take long between two steps of a test.
fn unhurried() -> Options {
    Options { dma_limit: Duration::from_secs(60), park_limit: Duration::from_secs(60), ..Options::default() }
}

#[test]
fn echo_marks_the_logged_pages_in_the_vmms_own_log() {
    for is_qemu in [true, false] {
        let served = Served::with(TestDevice::new().machine(), unhurried());
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
