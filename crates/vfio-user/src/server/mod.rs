//! The server: a [`Machine`] behind a socket (`vfio-user.rst`, the server's side of every message).
//!
//! One client at a time is the VMM. Others that want to be the VMM wait until it is gone. A client that dies in any
//! state leaves state and session behind, and the device answers every message of the next client. Mappings, interrupt
//! wiring and DMA logging end with their client. A client whose process was named prepares to become the next VMM, and
//! gets the device in one step. Control clients move the device while the VMM is connected. Each connection has its own
//! thread.
//!
//! Nothing that a client sends uses memory beyond fixed bounds, and a refused message is received completely, so that
//! the connection stays in sync.

mod accept;
mod access;
mod admission;
mod buffer;
mod connection;
mod control;
mod counts;
mod data;
mod dma;
mod doors;
mod feature;
mod handover;
mod info;
mod interrupts;
mod job;
mod link;
mod mapping;
mod next;
mod parked;
mod peer;
mod stream;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use limosa_device::Machine;
use limosa_foreign_fd::Foreign;
use limosa_host::SocketPath;
pub use limosa_host::{Group, SocketAccess};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use accept::Come;
use connection::Connection;
pub use counts::{Clients, Statistics};
use doors::Doors;
use handover::Adopted;
pub use handover::{DEVICES_MAX, NewDevice, Replaced, Replacing, SwitchOver};

use crate::connection::ConnectionError;

/// How a server deals with its clients.
#[derive(Clone, Debug)]
pub struct Options {
    /// The most bytes of data in one message, announced as `max_data_xfer_size`. From 4096 to
    /// [`DATA_XFER_BYTES_MAX`](crate::version::DATA_XFER_BYTES_MAX); 1 MiB.
    pub data_bytes_max: u32,
    /// Time limit for a message from its first byte to its last, and for the client to read a reply once its socket
    /// is full; after that the connection ends. Default 20 s. A client may be idle without a limit.
    pub message_limit: Duration,
    /// Time limit for VERSION after the connection was made, so that a silent client does not keep others out.
    /// Default 30 s.
    pub version_limit: Duration,
    /// How long the device waits for memory that it reaches by messages. 3 s: less than QEMU waits
    /// for a reply, so that a request which needs memory that QEMU does not give fails, and not
    /// the connection.
    pub dma_limit: Duration,
    /// Whether a client that supports it gets a separate socket for the device's DMA messages. Default: yes.
    pub twin_socket: bool,
    /// Mode and group of the socket that [`Server::bind`] creates. Default: mode 0600, whatever the umask.
    pub socket: SocketAccess,
    /// Whether a client may map any regular file for DMA. Default: no; only memfds and files on tmpfs and hugetlbfs
    /// are mapped, and others are refused with ENOTSUP. An access to another file, or even stat(), may wait for its
    /// file system: a client that can mount one, or its daemon or server, can hang this server for good. Files directly
    /// on FUSE are always refused with EINVAL.
    pub any_file: bool,
    /// How long an access of the VMM waits while another client moves the device. Then the move is ended, and the device
    /// runs again. 4 s: QEMU waits 5 s for a reply, and never connects again.
    pub park_limit: Duration,
    /// Whether connections can be handed over to another process at any time. Threads then wait for commands in
    /// poll(2), which costs each access one more system call. Default: no.
    pub interruptible: bool,
    /// The kind of device, such as the name of its model. A switch-over to a device of another kind is refused,
    /// with both names in the message. Default: none.
    pub model: Option<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            data_bytes_max: crate::version::DATA_XFER_BYTES_DEFAULT,
            message_limit: Duration::from_secs(20),
            version_limit: Duration::from_secs(30),
            dma_limit: Duration::from_secs(3),
            twin_socket: true,
            socket: SocketAccess::default(),
            any_file: false,
            park_limit: Duration::from_secs(4),
            interruptible: false,
            model: None,
        }
    }
}

/// Ends a server from any thread. It may be cloned, and its fd written to from a signal handler.
#[derive(Clone, Debug)]
pub struct ShutdownHandle(Arc<OwnedFd>);

impl ShutdownHandle {
    /// A handle of no server yet, for [`serve_connection`].
    pub fn new() -> io::Result<ShutdownHandle> {
        Ok(ShutdownHandle(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Ends the server: the request being handled is finished, the client disconnected, the socket removed. Cannot be
    /// undone.
    pub fn shut_down(&self) {
        // Fails only when the counter is full, that is, signalled.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Whether [`ShutdownHandle::shut_down`] was called.
    pub fn is_shut_down(&self) -> bool {
        let ready = poll(&mut [PollFd::new(&*self.0, PollFlags::IN)], Some(&Timespec::default()));
        ready.is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for ShutdownHandle {
    /// The eventfd: 1 written to it shuts down.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A device that listens for its clients.
pub struct Server {
    door: Door,
    control: Option<Door>,
    machine: Arc<Machine>,
    options: Options,
    shutdown: ShutdownHandle,
    doors: Arc<Doors>,
    /// Connections that another process has served, until they are served here.
    adopted: Mutex<Vec<Adopted>>,
    /// Threads of those that are served already.
    started: Started,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("door", &self.door)
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

/// A listening socket.
#[derive(Debug)]
struct Door {
    /// Its path, if it was created here.
    name: Option<PathBuf>,
    /// Dropped before the listener, so that the path is removed while the server is still alive. `None` once
    /// another process has it.
    path: Mutex<Option<SocketPath>>,
    /// Connections that were not accepted are closed with it, including their data.
    listener: Foreign<UnixListener>,
}

impl Door {
    fn bind(path: &Path, access: &SocketAccess) -> io::Result<Door> {
        let (path, listener) = limosa_host::listen(path, access)?;
        Door::new(Some(path), listener)
    }

    fn new(path: Option<SocketPath>, listener: UnixListener) -> io::Result<Door> {
        listener.set_nonblocking(true)?;
        let name = path.as_ref().map(|path| path.path().to_owned());
        Ok(Door { name, path: Mutex::new(path), listener: Foreign::new(listener) })
    }
}

impl Server {
    /// Listens at a path, with the mode and group of [`Options::socket`]. The socket of a dead server is replaced;
    /// `AddrInUse` if a server listens there, `AlreadyExists` for anything that is not a socket, `InvalidInput` for an
    /// invalid mode, otherwise the system's error. The socket is removed when the server is dropped, if the path still
    /// leads to it.
    pub fn bind(path: impl AsRef<Path>, machine: Arc<Machine>, options: Options) -> io::Result<Server> {
        let door = Door::bind(path.as_ref(), &options.socket)?;
        Server::new(door, machine, options)
    }

    /// Serves a socket that is already listening: for socket activation, or a socket created with other rights. It
    /// is not removed.
    pub fn from_listener(
        listener: UnixListener,
        machine: Arc<Machine>,
        options: Options,
    ) -> io::Result<Server> {
        Server::new(Door::new(None, listener)?, machine, options)
    }

    fn new(door: Door, machine: Arc<Machine>, options: Options) -> io::Result<Server> {
        Server::with_doors(door, machine, options, Arc::default())
    }

    /// The same with doors at which connections come already.
    fn with_doors(
        door: Door,
        machine: Arc<Machine>,
        options: Options,
        doors: Arc<Doors>,
    ) -> io::Result<Server> {
        let started = Started { doors: Arc::clone(&doors), threads: Mutex::default() };
        let (control, adopted, shutdown) = (None, Mutex::default(), ShutdownHandle::new()?);
        Ok(Server { door, control, machine, options, shutdown, doors, adopted, started })
    }

    /// Also listens for control clients at another path: any client that may connect there may move the device.
    /// Fails as [`Server::bind`] does.
    pub fn with_control(self, path: impl AsRef<Path>, access: &SocketAccess) -> io::Result<Server> {
        Ok(Server { control: Some(Door::bind(path.as_ref(), access)?), ..self })
    }

    /// The path at which it listens, if it created the socket.
    pub fn path(&self) -> Option<&Path> {
        self.door.name.as_deref()
    }

    /// Where it listens, as an absolute path; `None` for a socket without one.
    pub fn socket(&self) -> Option<PathBuf> {
        let bound =
            || self.door.listener.local_addr().ok().and_then(|at| at.as_pathname().map(Path::to_owned));
        let path = self.path().map(Path::to_owned).or_else(bound)?;
        std::path::absolute(path).ok()
    }

    /// The path at which it listens for control clients, if it created that socket.
    pub fn control_path(&self) -> Option<&Path> {
        self.control.as_ref()?.name.as_deref()
    }

    /// Its clients and requests, for metrics. The view stays true for as long as this server serves.
    pub fn statistics(&self) -> Statistics {
        Statistics::new(&self.machine, &self.doors, self.socket())
    }

    /// Ends [`Server::serve`].
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        self.shutdown.clone()
    }

    /// Serves clients until shut down, or until another process serves them ([`Server::is_given`]). Fails if
    /// connections can no longer be accepted, never because of a client.
    pub fn serve(&self) -> io::Result<()> {
        std::thread::scope(|scope| {
            let adopted = std::mem::take(&mut *self.adopted.lock().unwrap_or_else(PoisonError::into_inner));
            let _device = self.span().entered();
            for adopted in adopted {
                self.start(scope, Come::Adopted(Box::new(adopted)));
            }
            let served = self.accept(scope);
            if !self.doors.is_given() {
                end_connections(&self.doors);
            }
            self.started.join();
            served
        })
    }

    /// Names the device in log lines, since a process may serve many.
    fn span(&self) -> tracing::Span {
        device_span(self.socket().as_deref())
    }

    /// Whether another process serves the device now.
    pub fn is_given(&self) -> bool {
        self.doors.is_given()
    }
}

/// A log's word for the device at this socket.
fn device_span(socket: Option<&Path>) -> tracing::Span {
    match socket {
        Some(socket) => tracing::info_span!("device", at = %socket.display()),
        None => tracing::Span::none(),
    }
}

/// Threads that serve connections taken over from another process. They are started before the switch-over is
/// decided, so that no client waits for them.
struct Started {
    doors: Arc<Doors>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Started {
    /// Waits until they have ended.
    fn join(&self) {
        for thread in std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner)) {
            // A panicked thread has printed its panic.
            let _ = thread.join();
        }
    }
}

impl Drop for Started {
    /// Of a server that never served.
    fn drop(&mut self) {
        if !self.threads.get_mut().unwrap_or_else(PoisonError::into_inner).is_empty() {
            self.doors.expect_no_vmm();
            self.doors.links_to_end().iter().for_each(|link| link.end());
            self.join();
        }
    }
}

/// Ends all connections: first stops receiving requests; then, for a client that does not read its reply, closes
/// the connection.
fn end_connections(doors: &Doors) {
    doors.links_to_end().iter().for_each(|link| link.end_receiving());
    doors.wait_for_none(GRACE);
    doors.links_to_end().iter().for_each(|link| link.end());
}

/// How long a client has to take its last reply from a server that ends.
const GRACE: Duration = Duration::from_secs(2);

/// Serves one connection on this thread until it ends or the handle is shut down, and returns the reason. Fails if
/// the socket cannot be set up.
pub fn serve_connection(
    stream: UnixStream,
    machine: &Arc<Machine>,
    options: &Options,
    shutdown: &ShutdownHandle,
) -> io::Result<ConnectionError> {
    let doors = Doors::default();
    let stream = Foreign::new(stream);
    let mut connection =
        Connection::new(stream, machine, options, &doors, false, None).map_err(io::Error::other)?;
    let done = ShutdownHandle::new()?;
    std::thread::scope(|scope| {
        let watch = Watch { doors: &doors, shutdown, done: done.clone() };
        std::thread::Builder::new()
            .name("vfio-user-shutdown".into())
            .spawn_scoped(scope, move || watch.run())?;
        let end = connection.serve();
        drop(connection);
        done.shut_down();
        Ok(end)
    })
}

/// Ends a connection when its server is to end.
struct Watch<'a> {
    doors: &'a Doors,
    shutdown: &'a ShutdownHandle,
    /// The connection is over.
    done: ShutdownHandle,
}

impl Watch<'_> {
    fn run(self) {
        let mut fds = [PollFd::new(&self.done, PollFlags::IN), PollFd::new(self.shutdown, PollFlags::IN)];
        while matches!(poll(&mut fds, None), Err(rustix::io::Errno::INTR)) {}
        if !self.done.is_shut_down() {
            end_connections(self.doors);
        }
    }
}
