//! A vfio-user device as a VMM sees it: [`Client`], a [`limosa_client::Device`] behind a socket.

mod connect;
mod control;
mod data_socket;
mod device;
mod dma;
mod dma_log;
mod exchange;
mod feature;
mod session;
mod stream;

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use control::NextVmm;
use limosa_client::{DeviceIdentity, Error, Result};
use limosa_foreign_fd::ForeignFd;
pub use limosa_host::User;
use limosa_protocol::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::codec::{Command, IoFd, IoFdsMessage, ShadowIoFd, SingleWrite};
use crate::connection::{self, ConnectionError, Sender};
pub use crate::version::Role;
use crate::version::{DATA_XFER_BYTES_DEFAULT, Limits};
use exchange::{Answer, Ask, Exchange, Failure, Limit};
use feature::Migration;
use session::Session;

/// How a client deals with its server.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time limit for a request, from its first byte to the last byte of its reply. Default 5 s. If the server
    /// accepts an access or a write of data only in smaller pieces than [`Options::data_bytes_max`], the limit applies
    /// to each `data_bytes_max` bytes; connecting has it for each of its three steps.
    pub request_limit: Duration,
    /// How long a change of the migration state, or a reset, may take. 60 s.
    pub state_limit: Duration,
    /// The most bytes of data in one message, announced as `max_data_xfer_size`. 1 MiB.
    pub data_bytes_max: u32,
    /// Limit on the bytes of one MIG_DATA_WRITE, for servers that announce more than they accept. libvfio-user's
    /// samples need 32 KiB. Default: no separate limit.
    pub data_write_bytes_max: u32,
    /// Whether the server may use a separate socket for DMA messages. Default: yes.
    pub twin_socket: bool,
    /// Whether a session's data uses a separate socket if the server supports it, so that data and the device's
    /// other requests do not wait for each other (`docs/vfio-user-extensions.md: DATA_FD`). Default: no, since messages
    /// are as fast for a single stream. The server creates the socket: a malicious server that keeps a duplicate of it
    /// can make reads wait forever.
    pub data_socket: bool,
    /// Whether to probe DEVICE_FEATURE and its features when connecting. Without it the device has no features.
    /// Default: yes.
    pub features: bool,
    /// The users whose servers [`Client::connect`] trusts: it refuses servers of other users (SO_PEERCRED). `None`,
    /// the default, trusts every server: a VMM that chose the socket's path knows who can listen there. A program that
    /// gets paths from others should set it, as the command `limosa` does with root, its own user, and the users of its
    /// option --server-uid.
    pub server_users: Option<Vec<User>>,
    /// The requested role. Default: the VMM's, without the capability: if the server has a VMM, this client waits
    /// until that one is gone. Servers other than Limosa's do not know roles.
    pub role: Role,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            request_limit: Duration::from_secs(5),
            state_limit: Duration::from_secs(60),
            data_bytes_max: DATA_XFER_BYTES_DEFAULT,
            data_write_bytes_max: u32::MAX,
            twin_socket: true,
            data_socket: false,
            features: true,
            server_users: None,
            role: Role::Vmm,
        }
    }
}

impl Options {
    fn waits(&self) -> connection::Waits {
        connection::Waits::new(MESSAGE_LIMIT, self.request_limit.min(self.state_limit))
    }
}

/// How long a message may take from its first byte to its last.
const MESSAGE_LIMIT: Duration = Duration::from_secs(20);

/// A device behind a vfio-user socket.
///
/// Any number of threads may use it at once. The connection ends when the client and its data streams are dropped.
pub struct Client {
    shared: Arc<Shared>,
}

/// The data that a client shares with its data streams.
struct Shared {
    name: String,
    identity: DeviceIdentity,
    options: Options,
    limits: Limits,
    exchange: Arc<Exchange>,
    /// The server's socket for DMA messages.
    twin: Option<Arc<Sender>>,
    /// The process that listens.
    server: Option<i32>,
    role: Role,
    /// Features that the server has, of those that not every server has.
    features: feature::Features,
    migration: Mutex<Migration>,
    session: Session,
    /// DMA_UNMAP with a bitmap was refused once.
    plain_unmap: AtomicBool,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.exchange.shutdown();
        if let Some(twin) = &self.twin {
            twin.shutdown();
        }
    }
}

/// The eventfds of a region (`vfio-user.rst: VFIO_USER_DEVICE_GET_REGION_IO_FDS`).
#[derive(Debug, Default)]
pub struct RegionIoFds {
    /// The meaning of each; `fd_index` is an index into `fds`.
    pub entries: Vec<IoFd>,
    /// The fds; entries may share one. Those that entries name for ioeventfds are eventfds.
    pub fds: Vec<ForeignFd>,
}

impl Client {
    /// Connects to the server at a socket's path, negotiates, and probes the device's features. [`Error::Os`] with
    /// EPERM for a server of a user that [`Options::server_users`] does not name.
    pub fn connect(path: impl AsRef<Path>, options: Options) -> Result<Client> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let limit = options.request_limit;
        let failed = |errno, hint: String| Error::Os {
            device: name.clone(),
            what: "connecting".into(),
            errno,
            hint: hint.into(),
        };
        let users = options.server_users.clone();
        let open = || {
            let stream = limosa_host::connect(path, limit).map_err(|errno| match errno {
                rustix::io::Errno::AGAIN => {
                    Error::Timeout { device: name.clone(), request: "connecting".into(), limit }
                }
                errno => failed(connection::errno_of(errno), String::new()),
            })?;
            if let Some(users) = &users {
                limosa_host::check_server(&stream, users)
                    .map_err(|error| failed(Errno::EPERM, error.to_string()))?;
            }
            Ok(stream)
        };
        connect::connect(name.clone(), options, open()?, Some(&open))
    }

    /// The same on a connected socket; `name` is for messages. If the server loses sync after DEVICE_FEATURE for
    /// good, the client cannot reconnect to it: [`Options::features`] avoids the probe.
    pub fn from_stream(stream: UnixStream, name: impl Into<String>, options: Options) -> Result<Client> {
        connect::connect(name.into(), options, stream.into(), None)
    }

    /// The process that serves the device: whichever called listen(2) on the socket (`unix.7: SO_PEERCRED`). `None` if it
    /// cannot be seen from this PID namespace, or the socket is not of this family.
    pub fn server_process(&self) -> Option<i32> {
        self.shared.server
    }

    /// The role that the server gave this client: [`Role::Vmm`] or [`Role::Control`].
    pub fn role(&self) -> Role {
        self.shared.role
    }

    /// The limits that both sides agreed on.
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    /// The eventfds that replace writes to parts of a region; empty if the server has none.
    pub fn region_io_fds(&self, index: u32) -> Result<RegionIoFds> {
        let request = "DEVICE_GET_REGION_IO_FDS";
        let (mut argsz, mut asks) = (16 + 40 * 32, 1);
        loop {
            let message = IoFdsMessage { argsz, flags: 0, index, count: 0 };
            let mut body = vec![0; argsz as usize];
            let command = Command::DEVICE_GET_REGION_IO_FDS;
            let answer = self.shared.call(request, command, &[message.as_bytes()], &mut [&mut body])?;
            body.truncate(answer.body_bytes);
            let Ok((reply, entries)) = IoFdsMessage::read_from_prefix(&body) else {
                return Err(self.shared.short(request, answer.body_bytes, IoFdsMessage::BYTES));
            };
            if reply.argsz > argsz && reply.argsz <= INFO_BYTES_MAX && asks < INFO_ASKS_MAX {
                (argsz, asks) = (reply.argsz, asks + 1);
                continue;
            }
            let found = io_fds(&reply, entries, answer.fds.fds);
            return found.map_err(|what| self.shared.misbehaved(format!("{request}: {what}")));
        }
    }

    /// Writes many small pieces of regions, in order, without waiting for the device: in few messages if the server
    /// supports REGION_WRITE_MULTI, otherwise one by one.
    pub fn region_write_multi(&self, writes: &[SingleWrite]) -> Result<()> {
        let request = "REGION_WRITE_MULTI";
        if let Some(write) = writes.iter().find(|write| write.count > 8) {
            let count = write.count;
            return Err(self.shared.usage(format!("{request} of {count} bytes in one write, more than 8")));
        }
        if !self.shared.limits.write_multiple {
            return writes.iter().try_for_each(|write| {
                let data = write.data;
                let (region, offset) = (write.region, write.offset);
                limosa_client::Device::region_write_posted(
                    self,
                    region,
                    offset,
                    &data[..write.count as usize],
                )
            });
        }
        for some in writes.chunks(MULTI_WRITES_MAX) {
            let (count, limit) = (some.len() as u64, self.shared.limit());
            let body: &[&[u8]] = &[count.as_bytes(), some.as_bytes()];
            self.shared.post(limit, request, Command::REGION_WRITE_MULTI, body)?;
        }
        Ok(())
    }
}

/// The most bytes of information that are read of a region.
const INFO_BYTES_MAX: u32 = 64 << 10;

/// Limit on repeating a request with a larger buffer. A server has announced the required size by the second time.
const INFO_ASKS_MAX: u32 = 4;

/// The most writes in one REGION_WRITE_MULTI.
const MULTI_WRITES_MAX: usize = 160;

/// Checks the entries of a region's eventfds against each other.
fn io_fds(reply: &IoFdsMessage, entries: &[u8], fds: Vec<ForeignFd>) -> Result<RegionIoFds, &'static str> {
    let count = reply.count as usize;
    let mut found = RegionIoFds { entries: Vec::new(), fds };
    if count == 0 {
        return Ok(found);
    }
    // The length of an entry is not fixed; libvfio-user has longer ones.
    let length = entries.len() / count;
    if length < IoFd::BYTES {
        return Err("fewer entries than it announces");
    }
    for entry in entries.chunks_exact(length).take(count) {
        let entry = match ShadowIoFd::read_from_prefix(entry) {
            Ok((shadow, _)) => IoFd {
                offset: shadow.offset,
                size: shadow.size,
                fd_index: shadow.fd_index,
                kind: shadow.kind,
                flags: shadow.flags,
                padding: 0,
                datamatch: shadow.datamatch,
            },
            Err(_) => IoFd::read_from_prefix(entry).map_err(|_| "an entry too short")?.0,
        };
        let fd = found.fds.get(entry.fd_index as usize).ok_or("an entry for an fd that did not come")?;
        if entry.kind == IoFd::IOEVENTFD && !fd.is_eventfd() {
            return Err("an ioeventfd that is no eventfd");
        }
        found.entries.push(entry);
    }
    Ok(found)
}

impl Shared {
    /// A request within the time of ordinary requests.
    fn call(
        &self,
        request: &str,
        command: Command,
        body: &[&[u8]],
        into: &mut [&mut [u8]],
    ) -> Result<Answer> {
        self.call_within(self.limit(), request, command, body, into)
    }

    /// The same within the time of several together.
    fn call_within(
        &self,
        limit: Limit,
        request: &str,
        command: Command,
        body: &[&[u8]],
        into: &mut [&mut [u8]],
    ) -> Result<Answer> {
        let ask = Ask { command, body, fds: &[] };
        self.exchange.call(&ask, into, limit).map_err(|failure| self.error(request, failure))
    }

    /// A request whose reply has fds.
    fn call_with(
        &self,
        limit: Limit,
        request: &str,
        command: Command,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer> {
        let ask = Ask { command, body, fds };
        self.exchange.call(&ask, &mut [], limit).map_err(|failure| self.error(request, failure))
    }

    /// A request without a reply.
    fn post(&self, limit: Limit, request: &str, command: Command, body: &[&[u8]]) -> Result<()> {
        let ask = Ask { command, body, fds: &[] };
        self.exchange.post(&ask, limit).map_err(|failure| self.error(request, failure))
    }

    /// The time of an ordinary request, from now on.
    fn limit(&self) -> Limit {
        Limit::from_now(self.options.request_limit)
    }

    /// The time limit for the pieces in which the server accepts an access or data.
    fn pieces(&self) -> Pieces<'_> {
        Pieces { shared: self, bytes: 0, limit: self.limit() }
    }

    /// A failure in the words of the client's trait.
    #[cold]
    fn error(&self, request: &str, failure: Failure) -> Error {
        let mut error = error(&self.name, request, failure);
        if let (Role::Control, Error::Refused { errno, hint, .. }) = (self.role, &mut error) {
            *hint = control::hint(request, *errno).into();
        }
        error
    }

    #[cold]
    fn misbehaved(&self, what: String) -> Error {
        Error::Misbehaved { device: self.name.clone(), what }
    }

    #[cold]
    fn short(&self, request: &str, got: usize, want: usize) -> Error {
        self.misbehaved(format!("{request} answered with {got} bytes, expected {want}"))
    }

    #[cold]
    fn usage(&self, what: String) -> Error {
        Error::Usage { device: self.name.clone(), what }
    }

    #[cold]
    fn refused(&self, request: &str, errno: limosa_protocol::Errno) -> Error {
        Error::Refused { device: self.name.clone(), request: request.into(), errno, hint: "".into() }
    }
}

/// The time limit for requests that are pieces of one call: as many bytes as this client would transfer at once
/// share the limit of one request, however small the server's pieces are.
struct Pieces<'a> {
    shared: &'a Shared,
    bytes: usize,
    limit: Limit,
}

impl Pieces<'_> {
    /// The time of the next piece.
    fn next(&mut self, bytes: usize) -> Limit {
        self.bytes += bytes;
        if self.bytes > self.shared.options.data_bytes_max as usize {
            (self.bytes, self.limit) = (bytes, self.shared.limit());
        }
        self.limit
    }
}

fn error(name: &str, request: &str, failure: Failure) -> Error {
    let device = name.to_owned();
    match failure {
        Failure::Refused(errno) => Error::Refused { device, request: request.into(), errno, hint: "".into() },
        Failure::TimedOut(limit) => Error::Timeout { device, request: request.into(), limit },
        Failure::Misbehaved(what) => Error::Misbehaved { device, what },
        Failure::NoRoom => Error::Os {
            device,
            what: format!("receiving the fds of {request}"),
            errno: limosa_protocol::Errno::EMFILE,
            hint: "this process has as many open files as it may: raise its limit (ulimit -n)".into(),
        },
        Failure::Connection(error) => match error {
            ConnectionError::Broken(_) | ConnectionError::Backlog => {
                Error::Misbehaved { device, what: error.to_string() }
            }
            ConnectionError::Fds(_) => Error::Usage { device, what: format!("{request}: {error}") },
            ConnectionError::Os(errno) => Error::Os { device, what: request.into(), errno, hint: "".into() },
            other => Error::Disconnected { device, reason: other.to_string() },
        },
    }
}
