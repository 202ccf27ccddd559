//! The server: a [`Machine`] behind a socket (`vfio-user.rst`, the server's side of every message).
//!
//! One client at a time is the VMM. Others that want to be wait until it is gone; a client that
//! dies in any state leaves state and session behind, and the one after it finds a device that answers
//! every message. Mappings, interrupt wiring and DMA logging end with their client. One client whose process was named prepares
//! to be the next VMM, and gets the device in one step. Beside the VMM, control clients move the
//! device; each connection has a thread of its own.
//!
//! Nothing that a client sends costs memory beyond fixed bounds, and a message that is refused is
//! taken off the socket whole, so that the connection stays in step.

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
    /// A message must be complete this long after its first byte, and all of a reply taken this long
    /// after the client has no more room for it; else the connection ends. 20 s. An idle client may be
    /// idle for ever.
    pub message_limit: Duration,
    /// A version must be negotiated this long after the connection was made, so that a client that
    /// says nothing does not keep others out. 30 s.
    pub version_limit: Duration,
    /// How long the device waits for memory that it reaches by messages. 3 s: less than QEMU waits
    /// for a reply, so that a request which needs memory that QEMU does not give fails, and not
    /// the connection.
    pub dma_limit: Duration,
    /// Whether a client that can is given a socket of its own for the device's DMA messages. Yes.
    pub twin_socket: bool,
    /// Who may connect to the socket that [`Server::bind`] makes. Its owner alone, whatever the umask: mode 0600.
    pub socket: SocketAccess,
    /// Whether a client may map any regular file for DMA. No: memfds, and files on tmpfs and hugetlbfs,
    /// are mapped, and others refused with ENOTSUP. An access to another file waits for its file
    /// system, and so may a look at it: a client that may mount one, or the daemon or server behind
    /// it, can hang this server for good. Files on FUSE are refused with EINVAL all the same.
    pub any_file: bool,
    /// How long an access of the VMM waits while another client moves the device. Then the move is ended, and the device
    /// runs again. 4 s: QEMU waits 5 s for a reply, and never connects again.
    pub park_limit: Duration,
    /// Whether connections can be handed over to another process at any time: then a thread that waits for a command does so
    /// in poll(2), which costs an access one more system call. No.
    pub interruptible: bool,
    /// What kind of device this is, such as the name of its model: in a switch-over a device of another kind is refused by both
    /// names. None.
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

    /// Ends the server: the request being handled is finished, the client disconnected, the socket
    /// removed. Cannot be taken back.
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

/// A socket that listens.
#[derive(Debug)]
struct Door {
    /// Where, if it was made here.
    name: Option<PathBuf>,
    /// Before the listener, so that it is removed while it is known to be a live server's. `None` once another process has it.
    path: Mutex<Option<SocketPath>>,
    /// Connections that nobody accepted are closed with it, and with them what they were sent.
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
    /// Listens at a path, open to [`Options::socket`]. The socket of a server that is gone is replaced; `AddrInUse` when one
    /// listens there, `AlreadyExists` for anything that is not a socket, `InvalidInput` for a mode that a socket cannot
    /// have, else the system's error. The socket is removed when the server is dropped, if the path still leads to it.
    pub fn bind(path: impl AsRef<Path>, machine: Arc<Machine>, options: Options) -> io::Result<Server> {
        let door = Door::bind(path.as_ref(), &options.socket)?;
        Server::new(door, machine, options)
    }

    /// Serves a socket that listens already: socket activation, or one made with other rights. It
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

    /// Listens for control clients at another path as well: whoever may connect there may move the device. Fails as
    /// [`Server::bind`] does.
    pub fn with_control(self, path: impl AsRef<Path>, access: &SocketAccess) -> io::Result<Server> {
        Ok(Server { control: Some(Door::bind(path.as_ref(), access)?), ..self })
    }

    /// Where it listens, when it made the socket.
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

    /// Where it listens for control clients, if it does so at a path that it made.
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

    /// Serves clients until shut down, or until another process serves them ([`Server::is_given`]). Fails when no connection can be accepted any more, not for what a client does.
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

    /// Says in a log which device it is about, as a process may serve many.
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

/// Threads that serve connections which another process has served. They were made before it was known that this one does, so
/// that no client waits for it.
struct Started {
    doors: Arc<Doors>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Started {
    /// Waits until they have ended.
    fn join(&self) {
        for thread in std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner)) {
            // One that panicked has said so.
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

/// Ends all connections: first no more requests; then, for a client that does not take its reply, everything.
fn end_connections(doors: &Doors) {
    doors.links_to_end().iter().for_each(|link| link.end_receiving());
    doors.wait_for_none(GRACE);
    doors.links_to_end().iter().for_each(|link| link.end());
}

/// How long a client has to take its last reply from a server that ends.
const GRACE: Duration = Duration::from_secs(2);

/// Serves one connection on this thread until it ends or the handle is shut down, and says why it
/// ended. Fails when the socket cannot be set up.
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
