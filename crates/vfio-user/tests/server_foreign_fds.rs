//! What a server does with the fds that a client sends: none of them holds up the server, its device or the next client,
//! whatever kind of file it is.

#[macro_use]
mod common;

use std::fs::File;
use std::os::fd::AsFd;

use common::Served;
use common::device::*;
use common::lingering::{in_time, lingering, send_and_let_go, send_with};
use common::raw::*;
use limosa_vfio_user::server::Options;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;

const ENOTSUP: u32 = 95;
const DATA_FD: u32 = 0xfe01;
const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_TRIGGER: u32 = 1 << 5;

/// Wires MSI vector 0.
fn wiring() -> Vec<u8> {
    bytes![20u32, DATA_EVENTFD | ACTION_TRIGGER, MSI, 0u32, 1u32]
}

#[test]
fn an_fd_whose_closing_blocks_holds_up_no_request() {
    let served = Served::new();
    let requests = [
        (REGION_READ, bytes![0u64, BAR0, 4u32], EINVAL),
        (SET_IRQS, wiring(), EINVAL),
        (DMA_MAP, bytes![32u32, 3u32, 0u64, 0u64, 4096u64], ENOTSUP),
        // Malformed, unknown, and too long.
        (DMA_MAP, bytes![32u32], EINVAL),
        (99, vec![], ENOSYS),
        (GET_INFO, vec![0; 100_000], EMSGSIZE),
    ];
    for (command, body, errno) in requests {
        let mut raw = served.peer();
        let (fd, _unread) = lingering();
        send_with(&raw, &message(9, command, 0, &body), fd);
        assert_eq!(raw.receive().refused(), errno, "command {command}");
        raw.assert_usable();
    }
    served.peer().assert_usable();
}

#[test]
fn fds_that_nobody_received_hold_up_neither_the_next_client_nor_the_end() {
    let served = Served::new();
    let mut unread = Vec::new();
    let mut put = |raw: &Raw, message: &[u8]| {
        let (fd, other) = lingering();
        unread.push(other);
        // The server may be quicker, and have closed the connection, or what is in it.
        let _ = raw.try_send(message, &[fd.as_fd()]);
        std::thread::spawn(move || drop(fd));
    };
    let raw = served.peer();
    // The connection ends at this message, and what follows is not received.
    raw.send(&header(1, GET_INFO, u32::MAX, 0), &[]);
    put(&raw, &message(2, GET_INFO, 0, &[]));
    drop(raw);
    let mut next = served.peer();
    next.assert_usable();
    // One that nobody accepts before the server ends.
    let waiting = Raw::connect(served.path());
    put(&waiting, &message(1, VERSION, 0, &[]));
    in_time("the server's end", move || drop(served));
}

#[test]
fn an_fd_on_a_session_s_own_socket_ends_the_session_and_nothing_else() {
    let served = Served::new();
    for state in [RESUMING, STOP_COPY] {
        let mut raw = served.peer();
        raw.set_state(STOP).ok();
        raw.set_state(state).ok();
        let reply = raw.feature(GET | DATA_FD, &[], 16).ok();
        let [socket]: [_; 1] = reply.fds.try_into().unwrap();
        let socket = Raw::new(socket.into());
        let (fd, _unread) = lingering();
        send_and_let_go(&socket, &[0; 16], fd);
        if state == RESUMING {
            // The server has closed its end.
            socket.expect_end();
            assert_eq!(raw.mig_write(&[]).refused(), 71, "EPROTO");
        }
        raw.call(RESET, &[]).ok();
        raw.assert_usable();
    }
}

#[test]
fn a_file_that_is_no_memory_is_mapped_only_where_any_file_is() {
    let file = File::open(std::env::current_exe().unwrap()).unwrap();
    let is_memory = rustix::fs::fcntl_get_seals(&file).is_ok();
    let map = |raw: &mut Raw, fd: std::os::fd::BorrowedFd<'_>| {
        raw.call_fds(DMA_MAP, &bytes![32u32, 1u32, 0u64, 0u64, 4096u64], &[fd])
    };
    if !is_memory {
        let served = Served::new();
        assert_eq!(map(&mut served.peer(), file.as_fd()).refused(), ENOTSUP);
    }
    let options = Options { any_file: true, ..Options::default() };
    let served = Served::with(TestDevice::new().machine(), options);
    let mut raw = served.peer();
    map(&mut raw, file.as_fd()).ok();
    let read = [bytes![0u64, BAR2, 24u32], bytes![DMA_READ_NOW, 0u64, 4u64]].concat();
    raw.call(REGION_WRITE, &read).ok();
    assert_eq!(raw.region_read(BAR2, 64 << 10, 4).ok().body[16..], *b"\x7fELF");
    raw.call(DMA_UNMAP, &bytes![24u32, 0u32, 0u64, 4096u64]).ok();
    assert_eq!(raw.call(REGION_WRITE, &read).refused(), 14, "EFAULT");
    // Files that are not regular are refused all the same.
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    let null = File::open("/dev/zero").unwrap();
    for other in [reader.as_fd(), null.as_fd(), eventfd(0, EventfdFlags::CLOEXEC).unwrap().as_fd()] {
        assert_eq!(map(&mut raw, other).refused(), ENOTSUP);
    }
    raw.assert_usable();
}

#[test]
fn a_client_that_makes_its_eventfd_block_holds_up_nobody_else() {
    let served = Served::new();
    let hold_up = |raw: &mut Raw| {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        raw.call_fds(SET_IRQS, &wiring(), &[event.as_fd()]).ok();
        rustix::fs::fcntl_setfl(&event, OFlags::empty()).unwrap();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        raw.post(SET_IRQS, &bytes![20u32, 1 | ACTION_TRIGGER, MSI, 0u32, 1u32]);
        event
    };
    let mut raw = served.peer();
    let _event = hold_up(&mut raw);
    // Not even this client.
    raw.assert_usable();
    drop(raw);
    let mut next = served.peer();
    next.assert_usable();
    // Nor does one that stays hold up the server's end.
    let _event = hold_up(&mut next);
    in_time("the server's end", move || drop(served));
}
