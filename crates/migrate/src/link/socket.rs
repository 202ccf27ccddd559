//! Links over stream sockets, UNIX and TCP. A frame's header and payload go out in one `sendmsg`; waits use `poll`.
//!
//! A peer can send fds over a UNIX socket. None is due on a link: one that comes fails it. Closing it may block, so that
//! is done where nobody waits, and likewise with what a socket still holds when it is closed.

use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use limosa_foreign_fd::{Foreign, ForeignFd, receive_bytes};
use limosa_host::{SocketAccess, SocketPath};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_error;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketFlags, SocketType, socket_with,
};

use super::{Address, Link, LinkError, Wait};
use crate::cancel::timespec;

/// The shortest time that one connection attempt may take.
const CONNECT_MIN: Duration = Duration::from_millis(1);

/// A connected stream socket.
#[derive(Debug)]
pub struct SocketLink {
    fd: ForeignFd,
    peer: String,
}

impl SocketLink {
    /// Wraps a connected stream socket; `peer` names the other end in messages.
    pub fn new(socket: impl Into<OwnedFd>, peer: impl Into<String>) -> SocketLink {
        SocketLink { fd: Foreign::new(socket.into()), peer: peer.into() }
    }

    /// A TCP connection of this process' own. It brings no fds, and closing it never blocks: it needs no thread for that, of
    /// which strangers who connect again and again would take many.
    fn tcp(socket: TcpStream, peer: String) -> SocketLink {
        SocketLink { fd: Foreign::harmless(socket.into()), peer }
    }

    /// Both ends of a link within this process.
    pub fn pair() -> std::io::Result<(SocketLink, SocketLink)> {
        let (one, other) = UnixStream::pair()?;
        Ok((SocketLink::new(one, "the destination"), SocketLink::new(other, "the source")))
    }

    /// Shuts down both directions for both ends. Threads that wait on the link return.
    pub fn cut(&self) {
        // Refused only when the connection is gone already.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }
}

/// Calls `attempt` until it returns something other than EAGAIN, and waits for the events between the calls.
fn retry<T>(
    fd: &impl AsFd,
    events: PollFlags,
    wait: Wait<'_>,
    mut attempt: impl FnMut() -> Result<T, Errno>,
) -> Result<T, LinkError> {
    loop {
        if wait.cancel.is_some_and(crate::Cancel::is_cancelled) {
            return Err(LinkError::Cancelled);
        }
        match attempt() {
            Err(Errno::AGAIN) => {}
            Err(Errno::INTR) => continue,
            done => return Ok(done?),
        }
        poll_for(fd, events, wait)?;
    }
}

/// Waits for the events. Returns whether there are any: a cancel, a signal and the deadline end the wait too.
pub(crate) fn poll_for(fd: &impl AsFd, events: PollFlags, wait: Wait<'_>) -> Result<bool, LinkError> {
    let left = timespec(wait.left()?);
    let mut fds = [PollFd::new(fd, events), PollFd::new(fd, events)];
    let mut watched = 1;
    if let Some(cancel) = wait.cancel {
        (fds[1], watched) = (PollFd::new(cancel, PollFlags::IN), 2);
    }
    match poll(&mut fds[..watched], Some(&left)) {
        Ok(_) => Ok(!fds[0].revents().is_empty()),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

impl AsFd for SocketLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Link for SocketLink {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        retry(&self.fd, PollFlags::OUT, wait, || {
            rustix::net::sendmsg(&self.fd, slices, &mut SendAncillaryBuffer::default(), flags)
        })
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        let got =
            retry(&self.fd, PollFlags::IN, wait, || receive_bytes(&self.fd, into, RecvFlags::DONTWAIT))?;
        if got == 0 && !into.is_empty() { Err(LinkError::Closed) } else { Ok(got) }
    }

    fn finish(&self) {
        // Refused only when the connection is gone already.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }

    fn peer(&self) -> &str {
        &self.peer
    }
}

/// Connects to a listening destination. `within` bounds the whole call. All addresses of a TCP host are tried in turn,
/// each for its share of the time that is left.
///
/// The resolver cannot be interrupted. When the lookup of a host's name exceeds the limit, its thread stays behind until
/// the resolver's own time limit, and its answer is dropped.
pub fn connect(address: &Address, within: Duration) -> std::io::Result<SocketLink> {
    connect_to(address, false, Wait::within(within, None)).map_err(into_io)
}

/// As [`connect`], until the end of the wait. With `within_host` it refuses a TCP host that is not this one.
pub(super) fn connect_to(
    address: &Address,
    within_host: bool,
    wait: Wait<'_>,
) -> Result<SocketLink, LinkError> {
    match address {
        Address::Unix(path) => {
            let socket = limosa_host::connect(path, wait.left()?)?;
            Ok(SocketLink::new(socket.into_inner(), address.to_string()))
        }
        Address::Tcp(host, port) => {
            let addresses = look_up(host, *port, wait)?;
            if within_host && !addresses.iter().all(is_loopback) {
                let what = "it is not within this host, and the link is to be";
                return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, what).into());
            }
            let mut failed =
                std::io::Error::new(std::io::ErrorKind::NotFound, "the host has no address").into();
            for (at, socket_address) in addresses.iter().enumerate() {
                let left = wait.deadline.saturating_duration_since(Instant::now());
                let share = left / u32::try_from(addresses.len() - at).unwrap_or(u32::MAX);
                match connect_tcp(socket_address, Wait::within(share.max(CONNECT_MIN), wait.cancel)) {
                    Ok(stream) => {
                        stream.set_nodelay(true)?;
                        unpaced_at_home(&stream);
                        return Ok(SocketLink::tcp(stream, address.to_string()));
                    }
                    Err(LinkError::Cancelled) => return Err(LinkError::Cancelled),
                    Err(error) => failed = error,
                }
            }
            Err(failed)
        }
        Address::File(_) => Err(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            "a file is not listening; save to it or load from it instead",
        )
        .into()),
    }
}

/// One attempt.
fn connect_tcp(to: &SocketAddr, wait: Wait<'_>) -> Result<TcpStream, LinkError> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&fd, to) {
        Ok(()) => return Ok(fd.into()),
        Err(Errno::INPROGRESS | Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let connected = retry(&fd, PollFlags::OUT, wait, || {
        socket_error(&fd)??;
        match rustix::net::getpeername(&fd) {
            // It is still connecting.
            Err(Errno::NOTCONN) => Err(Errno::AGAIN),
            named => named.map(drop),
        }
    });
    match connected {
        Ok(()) => Ok(fd.into()),
        Err(LinkError::TimedOut) => {
            let what = format!("{to} does not answer");
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, what).into())
        }
        Err(error) => Err(error),
    }
}

/// Whether links to this address, or to a listener on it, stay within this host: it is a UNIX socket, or a TCP host all of
/// whose addresses are those of the loopback.
pub fn stays_within_host(address: &Address, within: Duration) -> std::io::Result<bool> {
    let Address::Tcp(host, port) = address else { return Ok(true) };
    let addresses = look_up(host, *port, Wait::within(within, None)).map_err(into_io)?;
    Ok(addresses.iter().all(is_loopback))
}

fn is_loopback(address: &SocketAddr) -> bool {
    // An IPv4 address in the form of IPv6 is what it stands for.
    address.ip().to_canonical().is_loopback()
}

fn into_io(error: LinkError) -> std::io::Error {
    match error {
        LinkError::Io(error) => error,
        error => std::io::Error::other(error.to_string()),
    }
}

/// The addresses of a host.
fn look_up(host: &str, port: u16, wait: Wait<'_>) -> Result<Vec<SocketAddr>, LinkError> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let host = host.to_owned();
    in_time(wait, move || Ok((host.as_str(), port).to_socket_addrs()?.collect()))
}

/// Does something that cannot be interrupted in a thread of its own, and leaves that thread behind at the end of the wait.
fn in_time<T: Send + 'static>(
    wait: Wait<'_>,
    act: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, LinkError> {
    let left = wait.left()?;
    let (sender, receiver) = mpsc::sync_channel(2);
    let cancelled = sender.clone();
    let _watch = wait.cancel.map(|cancel| {
        cancel.watch(move || {
            // Refused when nobody waits any more.
            let _ = cancelled.try_send(None);
        })
    });
    std::thread::Builder::new().name("limosa: name lookup".into()).spawn(move || {
        // Refused when the caller has given up.
        let _ = sender.send(Some(act()));
    })?;
    match receiver.recv_timeout(left) {
        Ok(Some(done)) => Ok(done?),
        Ok(None) => Err(LinkError::Cancelled),
        Err(_) => {
            let what = format!("the lookup of the host's name did not end within {left:?}");
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, what).into())
        }
    }
}

/// Chooses Reno for a connection within this host. There is no network to be congested: a congestion control that the
/// system chose for networks, such as BBR with its timer for every burst, would only cost time. Every kernel has Reno.
fn unpaced_at_home(stream: &TcpStream) {
    if let (Ok(here), Ok(there)) = (stream.local_addr(), stream.peer_addr())
        && here.ip() == there.ip()
    {
        // If it is refused the system's choice remains.
        let _ = rustix::net::sockopt::set_tcp_congestion(stream, "reno");
    }
}

/// A listening socket of a destination.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
}

#[derive(Debug)]
enum Socket {
    Unix {
        /// Goes first, while the socket is known to be a live destination's.
        _path: SocketPath,
        /// Connections that nobody accepted are closed with it.
        listener: Foreign<UnixListener>,
    },
    Tcp(TcpListener),
}

impl Listener {
    /// Listens on this address. A UNIX socket is its owner's alone, whatever the umask (mode 0600). That of a process that
    /// has died is replaced; one that is in use is not (`AddrInUse`), and neither is another file (`AlreadyExists`). It is
    /// removed when the listener is dropped, if the path still leads to it.
    pub fn bind(address: &Address) -> std::io::Result<Listener> {
        match address {
            Address::Unix(path) => {
                let (path, listener) = limosa_host::listen(path, &SocketAccess::default())?;
                listener.set_nonblocking(true)?;
                let socket = Socket::Unix { _path: path, listener: Foreign::new(listener) };
                Ok(Listener { socket, address: address.clone() })
            }
            Address::Tcp(host, port) => {
                let listener = TcpListener::bind((host.as_str(), *port))?;
                listener.set_nonblocking(true)?;
                let port = listener.local_addr()?.port();
                Ok(Listener { socket: Socket::Tcp(listener), address: Address::Tcp(host.clone(), port) })
            }
            Address::File(_) => Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                "a file cannot be listened on; load from it instead",
            )),
        }
    }

    /// The address that it listens on. For port 0 it has the port that the system chose.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Whether nobody beyond this host can connect.
    pub fn stays_within_host(&self) -> bool {
        match &self.socket {
            Socket::Unix { .. } => true,
            Socket::Tcp(listener) => listener.local_addr().is_ok_and(|address| is_loopback(&address)),
        }
    }

    /// Accepts the next connection.
    pub fn accept(&self, wait: Wait<'_>) -> Result<SocketLink, LinkError> {
        let errno = |error: std::io::Error| {
            match Errno::from_raw_os_error(error.raw_os_error().unwrap_or(Errno::IO.raw_os_error())) {
                // The client gave up before it was accepted: wait for the next one.
                Errno::CONNABORTED => Errno::AGAIN,
                errno => errno,
            }
        };
        match &self.socket {
            Socket::Unix { listener, .. } => {
                let (stream, _) = retry(listener, PollFlags::IN, wait, || listener.accept().map_err(errno))?;
                Ok(SocketLink::new(stream, format!("the source at {}", self.address)))
            }
            Socket::Tcp(listener) => {
                let (stream, from) =
                    retry(listener, PollFlags::IN, wait, || listener.accept().map_err(errno))?;
                stream.set_nodelay(true)?;
                Ok(SocketLink::tcp(stream, format!("tcp:{from}")))
            }
        }
    }
}

impl AsFd for Listener {
    /// Readable when a client has connected.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix { listener, .. } => listener.as_fd(),
            Socket::Tcp(listener) => listener.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use limosa_host::User;

    use rustix::net::SocketAddrUnix;

    use super::*;
    use crate::Cancel;
    use crate::link::Connector;

    fn soon(cancel: Option<&Cancel>) -> Wait<'_> {
        Wait::within(Duration::from_millis(5), cancel)
    }

    #[test]
    fn waits_end_at_the_deadline_at_a_cancel_and_at_the_close() {
        let (one, other) = SocketLink::pair().unwrap();
        let mut byte = [0];
        assert!(matches!(one.read(&mut byte, soon(None)), Err(LinkError::TimedOut)));
        let cancel = Cancel::new().unwrap();
        cancel.cancel();
        let long = Wait::within(Duration::from_secs(60), Some(&cancel));
        assert!(matches!(one.read(&mut byte, long), Err(LinkError::Cancelled)));
        let full = [0; 1 << 16];
        let stuck = loop {
            if let Err(error) = one.write(&[IoSlice::new(&full)], soon(None)) {
                break error;
            }
        };
        assert!(matches!(stuck, LinkError::TimedOut));
        drop(other);
        assert!(matches!(one.write(&[IoSlice::new(&full)], soon(None)), Err(LinkError::Closed)));
        assert!(matches!(one.read(&mut byte, soon(None)), Err(LinkError::Closed)));
    }

    /// Each connection of a stranger took a thread to be closed, and a few at once were reported as files that cannot be closed.
    #[test]
    fn a_tcp_link_waits_for_no_file_of_a_peer_to_be_closed() {
        let limit = Duration::from_secs(60);
        let listener = Listener::bind(&Address::Tcp("127.0.0.1".into(), 0)).unwrap();
        let connected = || {
            let near = connect(listener.address(), limit).unwrap();
            (near, listener.accept(Wait::within(limit, None)).unwrap())
        };
        // More than there are threads to close files of peers.
        let held: Vec<_> = (0..20).map(|_| mpsc::channel::<()>()).collect();
        let (release, waiting): (Vec<_>, Vec<_>) = held.into_iter().unzip();
        waiting.into_iter().for_each(|waiting| drop(Foreign::new(Waits(waiting))));
        for (dropped, stays) in [connected(), {
            let (near, far) = connected();
            (far, near)
        }] {
            drop(dropped);
            let got = stays.read(&mut [0], Wait::within(limit, None));
            assert!(matches!(got, Err(LinkError::Closed)), "{got:?}");
        }
        drop(release);
    }

    /// Blocks while it is dropped.
    struct Waits(mpsc::Receiver<()>);

    impl Drop for Waits {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    #[test]
    fn listeners_accept_and_clean_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        for address in [Address::Unix(path.clone()), Address::Tcp("127.0.0.1".into(), 0)] {
            let listener = Listener::bind(&address).unwrap();
            assert!(matches!(listener.accept(soon(None)), Err(LinkError::TimedOut)));
            let limit = Duration::from_secs(10);
            let one = connect(listener.address(), limit).unwrap();
            let other = listener.accept(Wait::within(limit, None)).unwrap();
            assert_eq!(one.write(&[IoSlice::new(b"a"), IoSlice::new(b"bc")], soon(None)).unwrap(), 3);
            let mut got = [0; 8];
            assert_eq!(other.read(&mut got, Wait::within(limit, None)).unwrap(), 3);
            one.finish();
            assert!(matches!(other.read(&mut got, Wait::within(limit, None)), Err(LinkError::Closed)));
        }
        assert!(!path.exists());
        assert!(connect(&Address::Unix(path), Duration::from_secs(1)).is_err());
    }

    #[test]
    fn a_listener_that_does_not_accept_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&fd, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&fd, 0).unwrap();
        let address = Address::Unix(path);
        let mut queued = Vec::new();
        let error = loop {
            match connect(&address, Duration::from_millis(5)) {
                Ok(link) => queued.push(link),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "after {}", queued.len());
    }

    #[test]
    fn a_name_lookup_that_does_not_end_is_not_waited_for() {
        let cancel = Cancel::new().unwrap();
        let (end, ended) = mpsc::channel::<()>();
        let stuck = move || ended.recv().map_err(std::io::Error::other);
        let error = into_io(in_time(soon(Some(&cancel)), stuck).unwrap_err());
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
        drop(end);
        let whole = Wait::within(Duration::MAX, Some(&cancel));
        assert_eq!(in_time(whole, || Ok(7)).unwrap(), 7);
        let (end, ended) = mpsc::channel::<()>();
        let cancels = cancel.clone();
        let stuck = move || {
            cancels.cancel();
            ended.recv().map_err(std::io::Error::other)
        };
        assert!(matches!(in_time(whole, stuck), Err(LinkError::Cancelled)));
        drop(end);
    }

    #[test]
    fn a_host_is_connected_to_by_its_name_without_a_limit() {
        let listener = Listener::bind(&Address::Tcp("localhost".into(), 0)).unwrap();
        let link = connect(listener.address(), Duration::MAX).unwrap();
        assert_eq!(link.peer(), listener.address().to_string());
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&Address::Unix(dir.path().join("socket"))).unwrap();
        connect(listener.address(), Duration::MAX).unwrap();
    }

    #[test]
    fn a_host_that_does_not_answer_is_waited_for_until_a_cancel() {
        // A listener whose queue is full drops what comes.
        let fd = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&fd, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        rustix::net::listen(&fd, 0).unwrap();
        let listener = TcpListener::from(fd);
        let address = Address::Tcp("127.0.0.1".into(), listener.local_addr().unwrap().port());
        let mut queued = Vec::new();
        let error = loop {
            match connect(&address, Duration::from_millis(20)) {
                Ok(link) => queued.push(link),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut, "after {}", queued.len());
        let cancel = Cancel::new().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| cancel.cancel());
            let wait = Wait::within(Duration::from_secs(60), Some(&cancel));
            assert!(matches!(connect_to(&address, true, wait), Err(LinkError::Cancelled)));
        });
    }

    #[test]
    fn what_stays_within_this_host_is_told_from_what_does_not() {
        let limit = Duration::from_secs(10);
        for (address, stays) in [
            ("unix:/run/socket", true),
            ("tcp:127.0.0.1:1", true),
            ("tcp:127.8.9.10:1", true),
            ("tcp:[::1]:1", true),
            ("tcp:[::ffff:127.0.0.1]:1", true),
            ("tcp:localhost:1", true),
            ("tcp:0.0.0.0:1", false),
            ("tcp:[::]:1", false),
            ("tcp:192.0.2.1:1", false),
            ("tcp:[::ffff:192.0.2.1]:1", false),
            ("tcp:[2001:db8::1]:1", false),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(stays_within_host(&address, limit).unwrap(), stays, "{address}");
            if !stays {
                let error = connect_to(&address, true, Wait::within(limit, None)).err().map(into_io);
                let error = error.expect("nobody is connected to");
                assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{address}: {error}");
            }
        }
        for (address, stays) in [("tcp:127.0.0.1:0", true), ("tcp:0.0.0.0:0", false)] {
            let listener = Listener::bind(&address.parse().unwrap()).unwrap();
            assert_eq!(listener.stays_within_host(), stays, "{address}");
        }
    }

    #[test]
    fn a_destination_removed_the_socket_that_another_had_put_in_the_place_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        std::fs::remove_file(&path).unwrap();
        let other = Listener::bind(&Address::Unix(path.clone())).unwrap();
        drop(listener);
        assert!(path.exists());
        drop(other);
        assert!(!path.exists());
    }

    #[test]
    fn a_destination_of_another_user_is_not_spoken_to() {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&Address::Unix(dir.path().join("socket"))).unwrap();
        let connector = Connector::new(listener.address().clone());
        let limit = || Wait::within(Duration::from_secs(10), None);
        connector.clone().with_server_users(vec![User(4242), User::current()]).connect(limit()).unwrap();
        let refused = connector.with_server_users(vec![User(4242)]).connect(limit());
        let Err(LinkError::Io(error)) = refused.map(drop) else { panic!("it is not refused") };
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains(&User::current().to_string()), "{error}");
    }
}
