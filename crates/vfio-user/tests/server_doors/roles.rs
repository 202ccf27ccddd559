//! The role of each client, and the requests that each role may make.

use super::*;

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
