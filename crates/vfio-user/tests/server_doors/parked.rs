//! Accesses of the VMM while a control client has stopped the device.

use super::*;

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

/// It was taken for the first message of a client that speaks another protocol.
#[test]
fn a_reply_that_came_while_an_access_waited_ended_the_connection_of_its_vmm() {
    let served = Served::new();
    let (mut vmm, mut control) = (served.peer(), Raw::control(served.path()));
    control.set_state(STOP).ok();
    let parked = parked_read(&mut vmm);
    vmm.send(&message(0xffff, DMA_WRITE, REPLY, &bytes![0u64, 1u32]), &[]);
    assert_eq!(vmm.region_read(CONFIG, 0, 4).ok().body[16..], [0, 1, 2, 3]);
    // Nor is what is too long a reason to end it.
    assert_eq!(vmm.call(DMA_UNMAP, &vec![0; 3 << 20]).refused(), EMSGSIZE);
    assert_eq!(vmm.region_read(CONFIG, 0, 4).ok().body[16..], [0, 1, 2, 3]);
    control.set_state(RUNNING).ok();
    is_answered(&vmm, parked);
    vmm.assert_usable();
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
