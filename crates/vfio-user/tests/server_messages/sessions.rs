//! Migration data: read and written in pieces of any size.

use super::*;

/// Reads the session to its end in pieces of this size.
fn read_all(raw: &mut Raw, size: u32) -> Vec<u8> {
    let mut data = Vec::new();
    loop {
        let reply = raw.mig_read(size).ok();
        let got = reply.u32(4) as usize;
        assert_eq!(reply.u32(0) as usize, 8 + got);
        let padded = if size <= 64 << 10 { size as usize } else { got };
        assert_eq!(reply.body.len(), 8 + padded, "of {size} asked for");
        assert!(reply.body[8 + got..].iter().all(|&byte| byte == 0));
        data.extend_from_slice(&reply.body[8..8 + got]);
        if got < size as usize {
            return data;
        }
    }
}

fn state_of(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| ((i as u32).wrapping_mul(2654435761) >> 13) as u8).collect()
}

#[test]
fn state_is_read_in_pieces_of_any_size() {
    for (size, lend_max) in
        [(1024, usize::MAX), (1 << 20, usize::MAX), (1 << 20, 777), (65536, 65535), (65537, 1 << 16)]
    {
        let served = Served::device(TestDevice::new().state_bytes(2_100_003).lend_max(lend_max));
        let mut raw = served.peer();
        raw.set_state(STOP_COPY).ok();
        assert!(read_all(&mut raw, size) == state_of(2_100_003), "{size} {lend_max}");
        assert_eq!(raw.mig_read(size).ok().u32(4), 0, "the end stays the end");
        raw.set_state(STOP).ok();
        assert_eq!(raw.mig_read(size).refused(), ENODEV);
    }
}

#[test]
fn pre_copy_has_nothing_for_now_and_goes_on_in_stop_copy() {
    let served = Served::device(TestDevice::new().state_bytes(100_000));
    let mut raw = served.peer();
    raw.set_state(PRE_COPY).ok();
    let mut data = read_all(&mut raw, 4096);
    assert_eq!(data.len(), 50_000);
    assert_eq!(raw.mig_read(4096).ok().u32(4), 0);
    raw.set_state(STOP_COPY).ok();
    data.extend(read_all(&mut raw, 4096));
    assert!(data == state_of(100_000));
}

#[test]
fn state_is_written_in_pieces_of_any_size() {
    for (piece, lends) in
        [(1, true), (1000, true), (2048, true), (2049, true), (1 << 20, true), (1 << 20, false)]
    {
        let bytes = if piece == 1 { 300 } else { 2_100_003 };
        let mut device = TestDevice::new().state_bytes(bytes);
        if !lends {
            device = device.lends_no_space();
        }
        let served = Served::device(device);
        let mut raw = served.peer();
        raw.set_state(RESUMING).ok();
        let state: Vec<u8> = state_of(bytes).into_iter().map(|byte| !byte).collect();
        for chunk in state.chunks(piece) {
            assert!(raw.mig_write(chunk).ok().body.is_empty());
        }
        assert_eq!(raw.mig_read(10).refused(), EBADF);
        raw.set_state(RUNNING).ok();
        raw.set_state(STOP_COPY).ok();
        assert!(read_all(&mut raw, 1 << 20) == state, "{piece} {lends}");
        assert_eq!(raw.mig_write(b"x").refused(), EBADF);
    }
}

#[test]
fn an_incomplete_state_is_refused_and_can_be_completed() {
    let served = Served::device(TestDevice::new().state_bytes(10_000));
    let mut raw = served.peer();
    raw.set_state(RESUMING).ok();
    let state = state_of(10_000);
    raw.mig_write(&state[..9_999]).ok();
    assert_eq!(raw.set_state(STOP).refused(), EINVAL);
    assert_eq!(raw.state(), RESUMING);
    raw.mig_write(&state[9_999..]).ok();
    raw.set_state(STOP).ok();
}
