//! Connecting to a destination, within a limit, whatever the resolver and the network do.

use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::sockopt::socket_error;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{SocketLink, retry};
use crate::link::{Address, LinkError, Wait};

/// The shortest time that one connection attempt may take.
const CONNECT_MIN: Duration = Duration::from_millis(1);

/// Connects to a listening destination. `within` bounds the whole call. All addresses of a TCP host are tried in turn,
/// each for its share of the time that is left.
///
/// The resolver cannot be interrupted. When the lookup of a host's name exceeds the limit, its thread stays behind until
/// the resolver's own time limit, and its answer is dropped.
pub fn connect(address: &Address, within: Duration) -> std::io::Result<SocketLink> {
    connect_to(address, false, Wait::within(within, None)).map_err(into_io)
}

/// As [`connect`], until the end of the wait. With `within_host` it refuses a TCP host that is not this one.
pub(in crate::link) fn connect_to(
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
                let what = "it is not on this host, and the link must not leave this host";
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

pub(super) fn is_loopback(address: &SocketAddr) -> bool {
    // An IPv4-mapped IPv6 address counts as the IPv4 address.
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
            // Refused if the caller no longer waits.
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
            let what = format!("the lookup of the host name did not finish within {left:?}");
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

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rustix::net::SocketAddrUnix;

    use super::*;
    use crate::Cancel;
    use crate::link::{Link, Listener};

    fn soon(cancel: Option<&Cancel>) -> Wait<'_> {
        Wait::within(Duration::from_millis(5), cancel)
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
}
