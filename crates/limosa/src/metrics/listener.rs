//! The address for scrapes of metrics, a port or a UNIX socket, and the thread that answers there.

use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::str::FromStr;
use std::thread::JoinHandle;

use anyhow::Context;
use limosa_host::{SocketAccess, SocketPath};
use limosa_migrate::link;
use rustix::event::{EventfdFlags, eventfd};

use super::{Source, Text, http};
use crate::exit::{self, Code};

/// Where to listen: HOST:PORT, tcp:HOST:PORT or unix:PATH.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(link::Address);

impl Address {
    /// The path of a UNIX socket.
    pub fn path(&self) -> Option<&Path> {
        match &self.0 {
            link::Address::Unix(path) => Some(path),
            _ => None,
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        let is_named = ["unix:", "tcp:"].iter().any(|kind| text.starts_with(kind));
        let parsed = if is_named { text.parse() } else { format!("tcp:{text}").parse() };
        match parsed {
            Ok(address @ (link::Address::Tcp(..) | link::Address::Unix(_))) => Ok(Address(address)),
            _ => Err("expected HOST:PORT, such as 127.0.0.1:9100, or unix:PATH".into()),
        }
    }
}

/// A socket that listens.
pub(super) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Tcp(listener) => listener.as_fd(),
            Socket::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Socket {
    /// A connection, which is non-blocking.
    pub(super) fn accept(&self) -> io::Result<Box<dyn http::Stream>> {
        Ok(match self {
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Box::new(stream)
            }
            Socket::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Box::new(stream)
            }
        })
    }
}

/// A listening socket whose clients are not answered yet.
pub struct Listener {
    socket: Socket,
    /// Removed with it.
    path: Option<SocketPath>,
    address: String,
}

impl Listener {
    /// Listens at the address. Only its owner can connect to a UNIX socket.
    pub fn bind(Address(address): &Address) -> anyhow::Result<Listener> {
        let failed = |error: io::Error| {
            let hint = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    "something else listens there; end it, or choose another address (port 0 is any)"
                }
                io::ErrorKind::NotFound => "make its folder first",
                _ => "choose another address",
            };
            let what = format!("--metrics: cannot listen on {address}: {error}; {hint}");
            exit::error(Code::Unreachable, what)
        };
        let (socket, path, address) = match address {
            link::Address::Tcp(host, port) => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let at = listener.local_addr().map_err(failed)?;
                (Socket::Tcp(listener), None, format!("http://{at}/metrics"))
            }
            link::Address::Unix(path) => {
                let (path, listener) = limosa_host::listen(path, &SocketAccess::default()).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                (Socket::Unix(listener), Some(path), address.to_string())
            }
            link::Address::File(_) => return Err(failed(io::ErrorKind::Unsupported.into())),
        };
        Ok(Listener { socket, path, address })
    }

    /// Answers scrapes with the values of this source, on a thread of its own.
    pub(super) fn answer(self, command: &'static str, source: impl Source) -> anyhow::Result<Exposition> {
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let end = end.context("--metrics: cannot make an eventfd")?;
        let told = end.try_clone().context("--metrics: no file descriptor left")?;
        let Listener { socket, path, address } = self;
        let text = Text::new(command, source);
        let thread = std::thread::Builder::new()
            .name("metrics".into())
            .spawn(move || http::serve(&socket, &told, &|| text.write()))
            .context("--metrics: cannot start a thread")?;
        Ok(Exposition { end, thread: Some(thread), address, _path: path })
    }
}

/// Answers until it is dropped.
pub struct Exposition {
    end: OwnedFd,
    thread: Option<JoinHandle<()>>,
    address: String,
    _path: Option<SocketPath>,
}

impl Exposition {
    /// Where: an address for a browser, or `unix:PATH`.
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl fmt::Debug for Exposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exposition").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Drop for Exposition {
    fn drop(&mut self) {
        // It fails only if the counter would overflow, and then it is signalled.
        let _ = rustix::io::write(&self.end, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_other_options_and_host_and_port() {
        let of = |text: &str| text.parse::<Address>();
        assert_eq!(of("127.0.0.1:9100"), of("tcp:127.0.0.1:9100"));
        assert!(of("[::1]:0").is_ok() && of("unix:/run/metrics").is_ok() && of("localhost:1").is_ok());
        for wrong in
            ["", "9100", ":9100", "127.0.0.1", "127.0.0.1:x", "::1:9100", "unix:", "file:x", "h:70000"]
        {
            assert!(of(wrong).unwrap_err().contains("127.0.0.1:9100"), "{wrong}");
        }
    }
}
