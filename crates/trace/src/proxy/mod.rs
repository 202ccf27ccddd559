//! Forwards between a client and a server of vfio-user, byte for byte and fd for fd, and records everything with a
//! [`Recorder`](crate::recorder::Recorder).
//!
//! A connection has a thread for each direction ([`relay`]). Nothing is held back: half a message is forwarded as it
//! is.

mod direction;

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use limosa_foreign_fd::Foreign;
use limosa_host::{SocketAccess, SocketPath, User, check_server, connect, listen};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::sockopt::socket_peercred;

use crate::event::Direction;
use crate::recorder::RecorderHandle;
use crate::seen::Seen;

/// The most connections at once.
pub const CONNECTIONS_MAX: usize = 256;

/// How a proxy connects to its server.
#[derive(Clone, Debug)]
pub struct Options {
    /// The users who may connect to the proxy.
    pub access: SocketAccess,
    /// How long the server's queue of connections may stay full.
    pub connect_limit: Duration,
    /// The users to whose servers the proxy connects. Empty for all users.
    pub servers: Vec<User>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            access: SocketAccess::default(),
            connect_limit: Duration::from_secs(10),
            servers: Vec::new(),
        }
    }
}

/// A proxy that listens.
pub struct Proxy {
    listener: UnixListener,
    back: PathBuf,
    options: Options,
    recorder: RecorderHandle,
    stop: StopHandle,
    /// Connections so far.
    connections: AtomicU32,
    // Removes the socket when the proxy is dropped.
    _front: SocketPath,
}

/// Ends a proxy, from any thread.
#[derive(Clone)]
pub struct StopHandle(Arc<Stop>);

struct Stop {
    event: OwnedFd,
    /// Both ends of each connection; `None` once the proxy ends.
    connections: Mutex<Option<Connections>>,
}

/// By their numbers.
type Connections = Vec<(u32, Arc<Connection>)>;

struct Connection {
    client: Foreign<UnixStream>,
    server: Foreign<UnixStream>,
}

impl StopHandle {
    fn new() -> io::Result<StopHandle> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(StopHandle(Arc::new(Stop { event, connections: Mutex::new(Some(Vec::new())) })))
    }

    /// Stops listening, and ends all connections.
    pub fn stop(&self) {
        let connections = self.connections().take();
        connections.into_iter().flatten().for_each(|(_, connection)| connection.shut_down());
        // It fails only if it would overflow, and then it is set.
        let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
    }

    fn connections(&self) -> std::sync::MutexGuard<'_, Option<Connections>> {
        self.0.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a connection, unless the proxy ends or has too many.
    fn add(&self, number: u32, connection: &Arc<Connection>) -> Result<(), &'static str> {
        match &mut *self.connections() {
            None => Err("the proxy ends"),
            Some(all) if all.len() >= CONNECTIONS_MAX => Err("there are too many connections"),
            Some(all) => {
                all.push((number, Arc::clone(connection)));
                Ok(())
            }
        }
    }

    fn remove(&self, number: u32) {
        if let Some(all) = &mut *self.connections() {
            all.retain(|(other, _)| *other != number);
        }
    }
}

impl Connection {
    fn shut_down(&self) {
        // A socket that is not connected any more need not be shut down.
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
    }
}

impl Proxy {
    /// Listens at `front` for clients of the server that listens at `back`. Errors are those of [`listen`], and `NotFound` or
    /// `InvalidInput` when no socket is at `back`.
    pub fn bind(front: &Path, back: &Path, options: Options, recorder: RecorderHandle) -> io::Result<Proxy> {
        use std::os::unix::fs::FileTypeExt;
        if !std::fs::metadata(back)?.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected the socket of a server"));
        }
        let (place, listener) = listen(front, &options.access)?;
        listener.set_nonblocking(true)?;
        Ok(Proxy {
            listener,
            back: back.into(),
            options,
            recorder,
            stop: StopHandle::new()?,
            connections: AtomicU32::new(0),
            _front: place,
        })
    }

    /// The handle that ends the proxy.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Serves clients until [`StopHandle::stop`], and returns when all connections have ended.
    pub fn serve(&self) -> io::Result<()> {
        // Several proxies may record the same trace.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        std::thread::scope(|scope| {
            let served = loop {
                let client = match self.accept() {
                    Ok(Some(client)) => client,
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                };
                let number = NUMBER.fetch_add(1, Ordering::Relaxed) + 1;
                let connection = match self.connect(client, number) {
                    Ok(connection) => connection,
                    Err(reason) => {
                        self.note(format!("a client was sent away: {}: {reason}", self.back.display()));
                        continue;
                    }
                };
                let of_thread = Arc::clone(&connection);
                let serve = move || {
                    self.relay(number, &of_thread);
                    self.stop.remove(number);
                };
                let thread = std::thread::Builder::new().name("trace relay".into());
                if let Err(error) = thread.spawn_scoped(scope, serve) {
                    self.note(format!("a client was sent away: no thread for it: {error}"));
                    connection.shut_down();
                    self.stop.remove(number);
                }
            };
            self.stop.stop();
            served
        })
    }

    /// The next client; `None` when the proxy is to end.
    fn accept(&self) -> io::Result<Option<Foreign<UnixStream>>> {
        loop {
            let mut fds =
                [PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&self.stop.0.event, PollFlags::IN)];
            rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
            if !fds[1].revents().is_empty() {
                return Ok(None);
            }
            match self.listener.accept() {
                Ok((client, _)) => {
                    client.set_nonblocking(false)?;
                    return Ok(Some(Foreign::new(client)));
                }
                // The client is gone, or there is no room for another fd until a connection ends.
                Err(error) => match rustix::io::Errno::from_io_error(&error) {
                    Some(
                        rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR,
                    ) => {}
                    Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => {
                        let limit = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                        let mut stop = [PollFd::new(&self.stop.0.event, PollFlags::IN)];
                        rustix::io::retry_on_intr(|| poll(&mut stop, Some(&limit)))?;
                    }
                    _ => return Err(error),
                },
            }
        }
    }

    fn connect(&self, client: Foreign<UnixStream>, number: u32) -> Result<Arc<Connection>, String> {
        let server = connect(&self.back, self.options.connect_limit).map_err(|errno| errno.to_string())?;
        if !self.options.servers.is_empty() {
            check_server(&server, &self.options.servers).map_err(|error| error.to_string())?;
        }
        let connection = Arc::new(Connection { client, server });
        self.stop.add(number, &connection)?;
        Ok(connection)
    }

    fn relay(&self, number: u32, connection: &Connection) {
        let name = self.back.file_name().unwrap_or(self.back.as_os_str()).to_string_lossy();
        let name = match self.connections.fetch_add(1, Ordering::Relaxed) {
            0 => name.into_owned(),
            before => format!("{name}#{}", before + 1),
        };
        relay(number, &connection.client, &connection.server, &name, &self.recorder);
    }

    fn note(&self, text: String) {
        self.recorder.record(Seen::Note { time_ns: self.recorder.now_ns(), pid: None, text });
    }
}

/// Forwards between a client and a server until both directions have ended. Then both sockets are shut down.
///
/// `number` is that of the connection in this trace, `name` the device's.
pub fn relay(number: u32, client: &UnixStream, server: &UnixStream, name: &str, recorder: &RecorderHandle) {
    let pid =
        socket_peercred(client).ok().and_then(|peer| u32::try_from(peer.pid.as_raw_nonzero().get()).ok());
    let opened = Seen::Opened {
        time_ns: recorder.now_ns(),
        conversation: number,
        name: crate::event::printable(name),
        pid,
        is_whole: true,
    };
    recorder.record(opened);
    let pass = |from, to, direction| direction::pass_on(number, from, to, direction, recorder);
    std::thread::scope(|scope| {
        let back = std::thread::Builder::new()
            .name("trace relay".into())
            .spawn_scoped(scope, || pass(server, client, Direction::FromDevice));
        if back.is_ok() {
            pass(client, server, Direction::ToDevice);
        }
    });
    for end in [client, server] {
        // The peer may have ended already.
        let _ = end.shutdown(Shutdown::Both);
    }
    recorder.record(Seen::Closed { time_ns: recorder.now_ns(), conversation: number });
}
