//! Fds that hold up whoever closes them last.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc;
use std::time::Duration;

use rustix::net::SendFlags;
use rustix::net::sockopt::set_socket_linger;

use super::raw::Raw;

/// Far more time than anything needs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A socket whose last close waits for an hour, or until its other end, which is returned too, is gone.
pub fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while rustix::net::send(&socket, &[0; 65536], SendFlags::NOSIGNAL).is_ok() {}
    set_socket_linger(&socket, Some(Duration::from_secs(3600))).unwrap();
    (socket.into(), other)
}

/// Sends a message that brings an fd with its first bytes. Nobody else holds it any more when the rest comes.
pub fn send_with(peer: &Raw, message: &[u8], fd: OwnedFd) {
    peer.send(&message[..8], &[fd.as_fd()]);
    drop(fd);
    peer.send(&message[8..], &[]);
}

/// Sends a message that brings an fd, to a peer that may close it at once. This side's copy is closed on a thread of its own: if the
/// peer was first, that is the last close.
pub fn send_and_let_go(peer: &Raw, message: &[u8], fd: OwnedFd) {
    peer.send(message, &[fd.as_fd()]);
    std::thread::spawn(move || drop(fd));
}

/// Runs something on a thread of its own; fails when it does not come to its end.
#[track_caller]
pub fn in_time<T: Send + 'static>(what: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, waits) = mpsc::channel();
    let thread = std::thread::spawn(move || done.send(act()));
    match waits.recv_timeout(PATIENCE) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().map(drop).expect_err("it ended without a word"))
        }
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what} hangs"),
    }
}
