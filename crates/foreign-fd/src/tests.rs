//! What holds for fds from peers.

use std::io::IoSlice;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use limosa_testing::is_alone;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::*;

/// Far more time than anything here needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A socket whose last close blocks for an hour, or until its peer, which is returned too, is gone.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while rustix::net::send(&socket, &[0; 65536], SendFlags::NOSIGNAL).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::from_secs(3600))).unwrap();
    (socket.into(), peer)
}

fn send(to: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    rustix::net::sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn receive_all(from: &UnixStream) -> (Received, Vec<ForeignFd>) {
    let mut fds = Vec::new();
    (receive(from, &mut [0; 8], RecvFlags::empty(), &mut fds).unwrap(), fds)
}

/// Runs something on a thread of its own; fails if it hangs.
fn in_time<T: Send + 'static>(what: &str, act: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, waits) = mpsc::channel();
    std::thread::spawn(move || done.send(act()));
    waits.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{what} hangs"))
}

#[test]
fn nobody_waits_for_a_file_whose_closing_blocks() {
    let (socket, _unread) = lingering();
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&theirs, b"a", &[socket.as_fd()]);
    drop(socket);
    in_time("dropping it", move || {
        let (received, fds) = receive_all(&ours);
        assert_eq!((received.bytes, fds.len()), (1, 1));
        drop(fds);
    });
    // One that is stuck holds up no other.
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(ForeignFd::from(writer));
    in_time("another", move || assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0)));
}

#[test]
fn nobody_waits_for_what_a_socket_still_holds_when_it_is_closed() {
    let (socket, _unread) = lingering();
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&theirs, b"a", &[socket.as_fd()]);
    drop(socket);
    in_time("closing the socket", move || drop(Foreign::new(ours)));
}

#[test]
fn fds_that_are_not_due_end_the_call_and_nobody_waits_for_them() {
    let (socket, _unread) = lingering();
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(&theirs, b"a", &[socket.as_fd()]);
    drop(socket);
    let got =
        in_time("receiving bytes", move || receive_bytes(&ours, &mut [0; 8], RecvFlags::empty()).map(drop));
    assert_eq!(got, Err(Errno::PROTO));
}

#[test]
fn as_many_fds_as_the_kernel_passes_are_received() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fd = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
    send(&theirs, b"abc", &vec![fd.as_fd(); FDS_MAX]);
    let (received, fds) = receive_all(&ours);
    assert_eq!((received, fds.len()), (Received { bytes: 3, lost_fds: false }, FDS_MAX));
    for fd in &fds {
        assert!(rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }
    drop(theirs);
    assert_eq!(receive_all(&ours).0, Received { bytes: 0, lost_fds: false });
}

#[test]
fn what_a_peer_switches_on_for_a_socket_that_it_shares_costs_no_fd() {
    const SO_PASSPIDFD: i32 = 76;
    let (ours, theirs) = UnixStream::pair().unwrap();
    let on = 1i32;
    // SAFETY: the value is an int, which lives until the call has returned.
    let set = unsafe {
        libc::setsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&ours),
            libc::SOL_SOCKET,
            SO_PASSPIDFD,
            (&raw const on).cast(),
            4,
        )
    };
    rustix::net::sockopt::set_socket_passcred(&ours, true).unwrap();
    if set != 0 {
        return; // Kernels before 6.5 have no such thing.
    }
    let fd = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
    // As many messages as would fill the table of open files if each left a pidfd there.
    for _ in 0..3000 {
        send(&theirs, b"a", &[fd.as_fd()]);
        let (received, fds) = receive_all(&ours);
        assert_eq!((received, fds.len()), (Received { bytes: 1, lost_fds: false }, 1));
        assert!(fds.into_iter().all(|fd| fd.into_memory().is_ok()));
    }
}

#[test]
fn kinds_are_told_apart() {
    let foreign = |fd: OwnedFd| ForeignFd::from(fd);
    let event = || foreign(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let memory = || foreign(memfd_create("anon_inode:[eventfd]", MemfdFlags::CLOEXEC).unwrap());
    let pipe = || foreign(rustix::pipe::pipe().unwrap().0);
    let stream = || foreign(UnixStream::pair().unwrap().0.into());
    let datagram = || foreign(std::os::unix::net::UnixDatagram::unbound().unwrap().into());
    let file = || foreign(std::fs::File::open("/proc/self/status").unwrap().into());
    let path = || {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        foreign(rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty()).unwrap())
    };
    let kinds = |make: &dyn Fn() -> ForeignFd| {
        [
            make().into_eventfd().is_ok(),
            make().into_memory().is_ok(),
            make().into_unix_stream().is_ok(),
            make().is_regular_file(),
        ]
    };
    assert_eq!(kinds(&event), [true, false, false, false]);
    assert_eq!(kinds(&memory), [false, true, false, true]);
    assert_eq!(kinds(&pipe), [false; 4]);
    assert_eq!(kinds(&stream), [false, false, true, false]);
    assert_eq!(kinds(&datagram), [false; 4]);
    assert_eq!(kinds(&file), [false, false, false, true]);
    assert_eq!(kinds(&path), [false; 4]);
}

#[test]
fn a_table_of_open_files_that_is_nearly_full_takes_no_more_fds_and_nothing_hangs() {
    // In a process of its own, as the limit is one for all threads.
    if !is_alone("tests::a_table_of_open_files_that_is_nearly_full_takes_no_more_fds_and_nothing_hangs") {
        return;
    }
    let limit = rustix::process::Rlimit { current: Some(1024), maximum: Some(1024) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let memory = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
    let mut kept = Vec::new();
    loop {
        send(&theirs, b"a", &[memory.as_fd(); 100]);
        let (received, fds) = receive_all(&ours);
        if received.lost_fds {
            assert!(fds.is_empty());
            break;
        }
        kept.extend(fds);
    }
    assert!(kept.len() >= 500, "{}", kept.len());
    // There is still room for the most fds that can come, so the kernel drops none of them here.
    let mut unread = Vec::new();
    let (socket, peer) = lingering();
    unread.push(peer);
    let mut many = vec![memory.as_fd(); FDS_MAX - 1];
    many.push(socket.as_fd());
    send(&theirs, b"a", &many);
    drop(socket);
    let received = in_time("receiving what is not kept", move || receive_all(&ours).0);
    assert!(received.lost_fds);
    // All threads are stuck: what else there is waits, and is said to.
    for _ in 0..20 {
        let (socket, peer) = lingering();
        unread.push(peer);
        drop(ForeignFd::from(socket));
    }
    let pipes: Vec<_> = (0..=WAITING_MAX).map(|_| rustix::pipe::pipe().unwrap()).collect();
    let readers: Vec<_> = pipes
        .into_iter()
        .map(|(reader, writer)| {
            drop(ForeignFd::from(writer));
            reader
        })
        .collect();
    assert!(!keeps_up(Duration::ZERO));
    // The sockets have nothing to wait for any more, and all that waited is closed.
    drop(unread);
    for reader in readers {
        in_time("closing in the end", move || assert_eq!(rustix::io::read(&reader, &mut [0; 1]), Ok(0)));
    }
    assert!(keeps_up(PATIENCE));
}
