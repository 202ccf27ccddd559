//! The socket on which a destination listens.

use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;

use limosa_foreign_fd::Foreign;
use limosa_host::{SocketAccess, SocketPath};
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::connect::is_loopback;
use super::{SocketLink, retry};
use crate::link::{Address, LinkError, Wait};

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
        /// Connections that were not accepted are closed with it.
        listener: Foreign<UnixListener>,
    },
    Tcp(TcpListener),
}

impl Listener {
    /// Listens on this address. A UNIX socket is its owner's alone, whatever the umask (mode 0600). It replaces the
    /// socket of a process that has died, but no socket in use (`AddrInUse`) and no other file (`AlreadyExists`).
    /// Dropping the listener removes the socket, if the path still leads to it.
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

    /// Whether only this host can connect.
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
    use std::io::IoSlice;
    use std::sync::mpsc;
    use std::time::Duration;

    use limosa_host::User;

    use super::*;
    use crate::Cancel;
    use crate::link::{Connector, Link, connect};

    fn soon(cancel: Option<&Cancel>) -> Wait<'_> {
        Wait::within(Duration::from_millis(5), cancel)
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
