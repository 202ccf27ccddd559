//! The features beyond the specification's: pre-copy info, and a session's data over a socket of
//! its own (docs/vfio-user-extensions.md).

#[macro_use]
mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::Served;
use common::device::*;
use common::raw::*;
use limosa_vfio_user::server::Options;

const PRECOPY_INFO: u32 = 0xfe00;
const DATA_FD: u32 = 0xfe01;
const EAGAIN: u32 = 11;
const ETIMEDOUT: u32 = 110;

fn state_of(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| ((i as u32).wrapping_mul(2654435761) >> 13) as u8).collect()
}

fn data_fd(raw: &mut Raw) -> UnixStream {
    let reply = raw.feature(GET | DATA_FD, &[], 16).ok();
    assert_eq!(reply.body, bytes![16u32, GET | DATA_FD, 0u64]);
    let [fd]: [_; 1] = reply.fds.try_into().unwrap();
    let stream = UnixStream::from(fd);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Asks until the server is not writing any more, and takes what it wrote.
fn take_all(raw: &mut Raw, stream: &mut UnixStream) -> Vec<u8> {
    let mut data = Vec::new();
    stream.set_nonblocking(true).unwrap();
    loop {
        let reply = raw.mig_read(1);
        let all = reply.flags & ERROR == 0;
        if all {
            assert_eq!(reply.ok().body, bytes![8u32, 0u32]);
        } else {
            assert_eq!(reply.refused(), EAGAIN);
            // It said that more is coming: there must be something to wait for.
            stream.set_nonblocking(false).unwrap();
            let mut byte = [0];
            assert_eq!(stream.read(&mut byte).unwrap(), 1);
            data.push(byte[0]);
            stream.set_nonblocking(true).unwrap();
        }
        match stream.read_to_end(&mut data) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        if all {
            return data;
        }
    }
}

#[test]
fn pre_copy_info_is_a_feature() {
    let served = Served::device(TestDevice::new().state_bytes(10_000));
    let mut raw = served.peer();
    raw.feature(PROBE | GET | PRECOPY_INFO, &[], 8).ok();
    assert_eq!(raw.feature(PROBE | SET | PRECOPY_INFO, &[], 8).refused(), EINVAL);
    assert_eq!(raw.feature(GET | PRECOPY_INFO, &[], 32).refused(), EINVAL, "in RUNNING");
    raw.set_state(PRE_COPY).ok();
    assert_eq!(raw.feature(GET | PRECOPY_INFO, &[], 31).refused(), EINVAL, "argsz");
    let info = raw.feature(GET | PRECOPY_INFO, &[], 32).ok();
    assert_eq!(info.body, bytes![32u32, GET | PRECOPY_INFO, 24u32, 0u32, 5_000u64, 0u64]);
    raw.set_state(STOP_COPY).ok();
    assert_eq!(raw.feature(GET | PRECOPY_INFO, &[], 32).refused(), EINVAL, "in STOP_COPY");
}

#[test]
fn a_data_fd_is_given_once_and_only_to_a_session_that_moved_nothing() {
    let served = Served::new();
    let mut raw = served.peer();
    raw.feature(PROBE | GET | DATA_FD, &[], 8).ok();
    assert_eq!(raw.feature(GET | DATA_FD, &[], 16).refused(), ENODEV);
    raw.set_state(STOP_COPY).ok();
    assert_eq!(raw.feature(GET | DATA_FD, &[], 15).refused(), EINVAL);
    let _stream = data_fd(&mut raw);
    assert_eq!(raw.feature(GET | DATA_FD, &[], 16).refused(), EBUSY);
    raw.set_state(STOP).ok();
    raw.set_state(STOP_COPY).ok();
    raw.mig_read(10).ok();
    assert_eq!(raw.feature(GET | DATA_FD, &[], 16).refused(), EBUSY, "data moved by messages");
    raw.set_state(STOP).ok();
    raw.set_state(STOP_COPY).ok();
    drop(raw);
    let mut next = served.peer();
    assert_eq!(next.feature(GET | DATA_FD, &[], 16).refused(), EBUSY, "a session of a client before");
}

#[test]
fn the_state_is_read_from_the_socket_and_its_end_confirmed() {
    let served = Served::device(TestDevice::new().state_bytes(5_000_003));
    let mut raw = served.peer();
    raw.set_state(STOP_COPY).ok();
    let mut stream = data_fd(&mut raw);
    // The socket cannot take all of it.
    assert_eq!(raw.mig_read(1).refused(), EAGAIN);
    assert_eq!(raw.mig_write(b"x").refused(), EBADF);
    let mut data = Vec::new();
    stream.read_to_end(&mut data).unwrap();
    assert!(data == state_of(5_000_003));
    assert_eq!(raw.mig_read(1).ok().body, bytes![8u32, 0u32]);
    raw.set_state(RUNNING).ok();
}

#[test]
fn pre_copy_data_comes_before_the_rest_on_one_socket() {
    let served = Served::device(TestDevice::new().state_bytes(3_000_001).lend_max(100_000));
    let mut raw = served.peer();
    raw.set_state(PRE_COPY).ok();
    let mut stream = data_fd(&mut raw);
    let mut data = take_all(&mut raw, &mut stream);
    assert_eq!(data.len(), 1_500_000);
    assert!(take_all(&mut raw, &mut stream).is_empty(), "nothing for now stays nothing");
    raw.set_state(STOP_COPY).ok();
    stream.set_nonblocking(false).unwrap();
    stream.read_to_end(&mut data).unwrap();
    assert!(data == state_of(3_000_001));
    assert_eq!(raw.mig_read(1).ok().u32(4), 0);
}

#[test]
fn the_state_is_written_to_the_socket_and_finished_by_its_end() {
    for lends in [true, false] {
        let mut device = TestDevice::new().state_bytes(3_000_001);
        if !lends {
            device = device.lends_no_space();
        }
        let served = Served::device(device);
        let mut raw = served.peer();
        raw.set_state(RESUMING).ok();
        let mut stream = data_fd(&mut raw);
        assert_eq!(raw.mig_read(1).refused(), EBADF);
        assert_eq!(raw.mig_write(b"x").refused(), EBUSY);
        let state: Vec<u8> = state_of(3_000_001).into_iter().map(|byte| !byte).collect();
        stream.write_all(&state).unwrap();
        raw.mig_write(b"").ok();
        stream.shutdown(Shutdown::Write).unwrap();
        raw.set_state(STOP).ok();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the server closed its end");
        raw.set_state(STOP_COPY).ok();
        let mut saved = Vec::new();
        data_fd(&mut raw).read_to_end(&mut saved).unwrap();
        assert!(saved == state);
    }
}

#[test]
fn a_state_without_its_end_is_not_taken_for_whole() {
    // The second attempt has to succeed within the limit by which the first one fails.
    let options = Options { message_limit: Duration::from_secs(2), ..Options::default() };
    let served = Served::with(TestDevice::new().state_bytes(1000).machine(), options);
    let mut raw = served.peer();
    raw.set_state(RESUMING).ok();
    let mut stream = data_fd(&mut raw);
    stream.write_all(&state_of(1000)).unwrap();
    assert_eq!(raw.set_state(RUNNING).refused(), ETIMEDOUT);
    assert_eq!(raw.state(), RESUMING);
    raw.set_state(RESUMING).ok();
    stream.shutdown(Shutdown::Write).unwrap();
    raw.set_state(RUNNING).ok();
}

#[test]
fn data_that_the_device_refuses_ends_the_socket_with_its_errno() {
    let served = Served::device(TestDevice::new().state_bytes(1000).lends_no_space());
    let mut raw = served.peer();
    raw.set_state(RESUMING).ok();
    let mut stream = data_fd(&mut raw);
    let error = loop {
        if let Err(error) = stream.write_all(&[0; 5000]) {
            break error;
        }
    };
    assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
    assert_eq!(raw.mig_write(b"").refused(), EINVAL);
    assert_eq!(raw.set_state(STOP).refused(), EINVAL);
    assert_eq!(raw.state(), RESUMING);
    raw.call(RESET, &[]).ok();
    raw.assert_usable();
}

#[test]
fn states_are_driven_while_the_client_takes_no_data() {
    let served = Served::device(TestDevice::new().state_bytes(3_000_000));
    let mut raw = served.peer();
    for (from, to) in [(PRE_COPY, RUNNING), (STOP_COPY, STOP), (PRE_COPY, STOP_COPY), (RESUMING, RUNNING)] {
        raw.set_state(from).ok();
        let mut stream = data_fd(&mut raw);
        if from == RESUMING {
            raw.call(RESET, &[]).ok();
        } else {
            raw.set_state(to).ok();
        }
        assert_eq!(raw.state(), to);
        raw.assert_usable();
        raw.call(RESET, &[]).ok();
        // The session is over: so is the socket.
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
}

#[test]
fn the_socket_ends_with_its_client() {
    // More than the socket holds.
    let served = Served::device(TestDevice::new().state_bytes(40_000_000));
    let mut raw = served.peer();
    raw.set_state(STOP_COPY).ok();
    let mut stream = data_fd(&mut raw);
    drop(raw);
    let mut data = Vec::new();
    stream.read_to_end(&mut data).unwrap();
    assert!(data.len() < 40_000_000);
    let mut raw = served.peer();
    assert_eq!(raw.state(), STOP_COPY);
    raw.set_state(RUNNING).ok();
    raw.set_state(STOP_COPY).ok();
    data.clear();
    data_fd(&mut raw).read_to_end(&mut data).unwrap();
    assert!(data == state_of(40_000_000));
}
