//! Clients that die, stay silent or take no replies.

use super::*;

#[test]
fn a_client_that_dies_at_every_byte_of_a_request_leaves_a_usable_device() {
    let served = Served::new();
    let version = message(1, VERSION, 0, b"\0\0\0\0{\"capabilities\":{}}\0");
    for length in 0..=version.len() {
        let raw = Raw::connect(served.path());
        raw.send(&version[..length], &[]);
        drop(raw);
        if length % 8 == 0 {
            served.peer().assert_usable();
        }
    }
    let event = event();
    for (command, body, _) in well_formed() {
        let request = message(1, command, 0, &body);
        for length in 0..=request.len() {
            let raw = served.peer();
            let fds = [event.as_fd()];
            // With the fd that some of them come with.
            let with_fd = length > 0 && matches!(command, SET_IRQS | DMA_MAP);
            raw.send(&request[..length], if with_fd { &fds } else { &[] });
            drop(raw);
        }
        served.peer().assert_usable();
    }
}

#[test]
fn a_client_that_dies_in_any_state_leaves_it_to_the_next() {
    let served = Served::device(TestDevice::new().state_bytes(1000));
    for state in [STOP, STOP_COPY, RESUMING, PRE_COPY] {
        let mut raw = served.peer();
        raw.dma_map(0, 4096, 0, Some(memory().as_fd())).ok();
        raw.feature(SET | 6, &bytes![4096u64, 0u32, 0u32], 24).ok();
        raw.set_state(state).ok();
        // Dies within a message, too.
        raw.send(&header(1, REGION_WRITE, 1000, 0), &[]);
        drop(raw);
        let mut raw = served.peer();
        assert_eq!(raw.state(), state);
        raw.assert_usable();
        raw.dma_map(0, 4096, 0, Some(memory().as_fd())).ok();
        raw.feature(SET | 6, &bytes![4096u64, 0u32, 0u32], 24).ok();
        if state == STOP_COPY {
            assert_eq!(raw.mig_read(1000).ok().u32(4), 1000);
        }
        raw.call(RESET, &[]).ok();
        assert_eq!(raw.state(), RUNNING);
    }
}

#[test]
fn a_state_that_was_cut_off_cannot_be_taken_for_whole() {
    let served = Served::device(TestDevice::new().state_bytes(10_000));
    let raw = served.peer();
    let mut raw = raw;
    raw.set_state(RESUMING).ok();
    let mut cut = header(1, MIG_DATA_WRITE, 16 + 8 + 10_000, 0);
    cut.extend(bytes![10_008u32, 10_000u32]);
    cut.extend([0; 9_999]);
    raw.send(&cut, &[]);
    drop(raw);
    let mut raw = served.peer();
    assert_eq!(raw.state(), RESUMING);
    assert_ne!(raw.set_state(STOP).refused(), 0);
    raw.call(RESET, &[]).ok();
    raw.set_state(STOP_COPY).ok();
    assert_eq!(raw.mig_read(10_000).ok().u32(4), 10_000);
}

#[test]
fn half_a_message_ends_the_connection_in_time_and_idleness_does_not() {
    let options = Options { message_limit: Duration::from_millis(30), ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let mut idle = served.peer();
    let nothing = rustix::event::poll(
        &mut [rustix::event::PollFd::new(&idle.socket, rustix::event::PollFlags::IN)],
        Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 200_000_000 }),
    );
    assert_eq!(nothing, Ok(0), "an idle client was disconnected");
    idle.assert_usable();
    drop(idle);
    let large = message(1, REGION_WRITE, 0, &[bytes![0u64, BAR0, 1u32 << 20], vec![0; 1 << 20]].concat());
    for part in [1, 15, 16, 17, 31, 32, 33, 5000, 100_000] {
        let raw = served.peer();
        raw.send(&large[..part], &[]);
        raw.expect_end();
    }
    // Data on its way into the model.
    let mut raw = served.peer();
    raw.set_state(RESUMING).ok();
    raw.send(
        &message(1, MIG_DATA_WRITE, 0, &[bytes![8u32 + (1 << 20), 1u32 << 20], vec![0; 1 << 20]].concat())
            [..9000],
        &[],
    );
    raw.expect_end();
    // Byte after byte, never ending.
    let raw = served.peer();
    while raw.try_send(&[1], &[]).is_ok() {}
    served.peer().assert_usable();
}

#[test]
fn a_client_that_says_nothing_does_not_keep_others_out() {
    let options = Options {
        message_limit: Duration::from_secs(1),
        version_limit: Duration::from_secs(1),
        ..Options::default()
    };
    let served = Served::with(TestDevice::new().machine(), options);
    let silent = Raw::connect(served.path());
    let mut next = served.peer();
    next.assert_usable();
    silent.expect_end();
}

#[test]
fn a_client_that_takes_no_replies_does_not_keep_others_out() {
    let options = Options { message_limit: Duration::from_millis(30), ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let raw = served.peer();
    let read = message(1, REGION_READ, 0, &bytes![0u64, BAR0, 1u32 << 20]);
    while raw.try_send(&read, &[]).is_ok() {}
    served.peer().assert_usable();
}

#[test]
fn a_second_client_waits_for_the_first_to_go() {
    let served = Served::new();
    let mut first = served.peer();
    let mut second = Raw::connect(served.path());
    first.assert_usable();
    second.send(&message(1, VERSION, 0, &bytes![0u16, 0u16]), &[]);
    first.assert_usable();
    drop(first);
    assert_eq!(second.receive().ok().id, 1);
    second.assert_usable();
}
