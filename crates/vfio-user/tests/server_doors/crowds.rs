//! Many clients, and clients that are silent or take no reply, at both sockets.

use super::*;

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

/// It was listened to for as long as a client may take for its version, or for a message.
#[test]
fn a_client_that_speaks_another_protocol_is_told_so_by_the_end_of_its_connection() {
    let long = Duration::from_secs(1000);
    // The preface of a migration stream, a reply, and a command that no message is as long as.
    let preface = [b"\x89LMSA\r\n\x1a", &[1, 0, 1, 0][..], &[0; 28]].concat();
    let reply = header(7, VERSION, 64, REPLY);
    let endless = header(7, 0x4d53, u32::MAX, 0);
    for interruptible in [false, true] {
        let options =
            Options { interruptible, message_limit: long, version_limit: long, ..Options::default() };
        let served = Served::with(TestDevice::new().machine(), options);
        for first in [&preface[..], &reply, &endless] {
            let mut client = std::os::unix::net::UnixStream::connect(served.path()).unwrap();
            client.set_read_timeout(Some(limosa_testing::LIMIT)).unwrap();
            std::io::Write::write_all(&mut client, first).unwrap();
            let mut answer = Vec::new();
            std::io::Read::read_to_end(&mut client, &mut answer).unwrap();
            assert_eq!(answer, [0; 0], "interruptible: {interruptible}, first: {first:x?}");
        }
    }
}
