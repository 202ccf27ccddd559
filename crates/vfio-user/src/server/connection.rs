//! One connection: its requests in the order in which they come, each with one reply
//! (`vfio-user.rst: Commands, Socket Disconnection Behavior`).

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use limosa_device::{ClientId, Machine, Released, SessionId};
use limosa_foreign_fd::{Foreign, ForeignFd};
use limosa_protocol::Errno;
use zerocopy::IntoBytes;

use super::Options;
use super::buffer::Buffer;
use super::dma::Twin;
use super::doors::{self, ConnectionId, Doors, Role};
use super::link::{Fits, Incoming, Link, Something};
use super::parked::Parked;
use super::stream::DataSocket;
use crate::codec::{Command, Header, Kind, Request, VersionMessage};
use crate::connection::{ConnectionError, Receiver};
use crate::version::{
    self, Capabilities, DATA_XFER_BYTES_MAX, Limits, MSG_FDS_MAX, MigrationCapability, REPLY_BYTES_MAX,
    TwinSocket, VERSION,
};

/// A connection being served.
pub(super) struct Connection<'a> {
    pub(super) machine: &'a Arc<Machine>,
    pub(super) options: &'a Options,
    /// The most bytes of data that a command may ask for or carry.
    pub(super) data_bytes_max: u32,
    pub(super) link: Arc<Link>,
    /// What was agreed on; `None` before VERSION.
    pub(super) limits: Option<Limits>,
    /// Where replies are made, and data gathered.
    pub(super) reply: Buffer,
    /// Where data goes that the model has no place for.
    pub(super) spare: Vec<u8>,
    /// The session's own socket, when the client asked for one.
    pub(super) data_socket: Option<DataSocket>,
    /// The session whose data has moved by messages, or may have.
    pub(super) moved: Option<SessionId>,
    /// When the version must have been negotiated.
    version_until: Instant,
    pub(super) doors: &'a Doors,
    id: ConnectionId,
    /// It came by the door for control clients.
    by_control_door: bool,
    /// `None` before VERSION.
    pub(super) role: Option<Role>,
    /// What the machine knows it as, once it has a role.
    pub(super) client: ClientId,
    pub(super) parked: Parked,
    /// Wakes this connection when accesses are held back no more.
    _released: Option<Arc<Released>>,
}

/// What became of a request.
pub(super) enum Outcome {
    /// Its reply was sent, or it wanted none.
    Replied,
    /// It is refused.
    Refused(Errno),
    /// It waits until the device runs again.
    Held,
}

/// The outcome, or the connection's end.
pub(super) type Handled = Result<Outcome, ConnectionError>;

impl From<Result<(), Errno>> for Outcome {
    fn from(result: Result<(), Errno>) -> Outcome {
        result.map_or_else(Outcome::Refused, |()| Outcome::Replied)
    }
}

/// A command as its handler sees it.
pub(super) struct Job {
    pub(super) header: Header,
    pub(super) fds: Vec<ForeignFd>,
    /// For data that is still on the socket.
    pub(super) receiver: Option<Box<Receiver>>,
}

impl Job {
    /// Whether the client waits for a reply.
    pub(super) fn wants_reply(&self) -> bool {
        self.header.kind() != Ok(Kind::Posted)
    }
}

impl<'a> Connection<'a> {
    pub(super) fn new(
        stream: Foreign<UnixStream>,
        machine: &'a Arc<Machine>,
        options: &'a Options,
        doors: &'a Doors,
        by_control_door: bool,
    ) -> Result<Connection<'a>, ConnectionError> {
        let data_bytes_max = options.data_bytes_max.clamp(4096, DATA_XFER_BYTES_MAX);
        let link =
            Arc::new(Link::new(stream, data_bytes_max as usize, options.message_limit, options.dma_limit)?);
        let id = doors.enter(&link, by_control_door);
        Ok(Connection {
            machine,
            options,
            data_bytes_max,
            link,
            limits: None,
            reply: Buffer::default(),
            spare: Vec::new(),
            data_socket: None,
            moved: None,
            version_until: Instant::now() + options.version_limit,
            doors,
            id,
            by_control_door,
            role: None,
            client: ClientId::VMM,
            parked: Parked::default(),
            _released: None,
        })
    }

    pub(super) fn link(&self) -> Arc<Link> {
        Arc::clone(&self.link)
    }

    /// Serves until the end, and lets go of all that the client gave.
    pub(super) fn serve(&mut self) -> ConnectionError {
        let span = tracing::debug_span!("vfio_user_connection");
        let _entered = span.enter();
        tracing::debug!("connected");
        let mut request = Buffer::default();
        let end = loop {
            // A mistake in here costs the connection and not the device.
            match catch_unwind(AssertUnwindSafe(|| self.serve_one(&mut request))) {
                Ok(Ok(())) => {}
                Ok(Err(end)) => break end,
                Err(_) => break ConnectionError::Broken("a request that the server failed on"),
            }
        };
        if end == ConnectionError::Given {
            return end;
        }
        self.link.end();
        self.data_socket = None;
        if self.role.is_some() {
            self.machine.client_gone(self.client);
        }
        tracing::debug!(%end, "disconnected");
        end
    }

    /// Stops here while connections are paused, which only those are that can be handed over.
    fn pause_here(&self) -> Result<(), ConnectionError> {
        if !self.options.interruptible {
            return Ok(());
        }
        self.link.flush()?;
        if self.doors.is_open() && self.link.is_busy() {
            return Ok(());
        }
        self.doors.pause_here(self.id, &|| self.state(Vec::new()))
    }

    /// What another process needs to go on with this connection, beside its link.
    fn state(&self, unanswered: Vec<u8>) -> doors::State {
        doors::State {
            limits: self.limits,
            by_control_door: self.by_control_door,
            unanswered,
            parked: self.parked.iter().cloned().collect(),
        }
    }

    /// Goes on with a connection that another process has served.
    pub(super) fn adopt(mut self, state: doors::State) -> Connection<'a> {
        self.limits = state.limits;
        state.parked.into_iter().for_each(|access| self.parked.keep(access));
        self.doors.agreed(self.id, self.limits);
        if self.limits.is_some() {
            self.doors.adopt(self.id, Role::Vmm);
            self.be_vmm();
        }
        self
    }

    fn be_vmm(&mut self) {
        self.role = Some(Role::Vmm);
        let link = self.link();
        let released: Arc<Released> = Arc::new(move || link.wake());
        self.machine.on_release(&released);
        self._released = Some(released);
        // What was there before this client cannot be moved by its socket.
        self.moved = self.machine.session();
    }

    fn serve_one(&mut self, request: &mut Buffer) -> Result<(), ConnectionError> {
        self.pause_here()?;
        if !self.parked.is_empty() {
            return self.serve_while_parked(request);
        }
        // An idle client may be idle for ever.
        let until = if self.limits.is_some() { None } else { Some(self.version_until) };
        if self.options.interruptible {
            match self.link.wait_for_something(until, true)? {
                Something::Command => {}
                Something::Woken => return Ok(()),
                Something::Late => return Err(ConnectionError::Silent),
            }
        }
        match self.link.next(request, until)? {
            Some(incoming) => self.handle(incoming, request),
            None => Err(ConnectionError::Silent),
        }
    }

    pub(super) fn handle(&mut self, incoming: Incoming, request: &mut Buffer) -> Result<(), ConnectionError> {
        let Incoming { header, fds, body_bytes, held, receiver, fits } = incoming;
        let mut job = Job { header, fds: fds.fds, receiver };
        tracing::debug!(
            command = %header.command, id = header.id, size = header.size, posted = !job.wants_reply(),
            fds = job.fds.len(), "request"
        );
        let outcome = if fits == Fits::Late {
            Ok(Outcome::Refused(Errno::ETIMEDOUT))
        } else if fits != Fits::Yes {
            Ok(Outcome::Refused(Errno::EMSGSIZE))
        } else if fds.truncated || header.kind().is_err() || header.body_bytes().is_err() {
            Ok(Outcome::Refused(Errno::EINVAL))
        } else {
            match Request::decode(header.command, request.held(held), body_bytes) {
                Ok(_) if job.fds.len() > fds_max(header.command) => Ok(Outcome::Refused(Errno::EINVAL)),
                Ok(decoded) => self.dispatch(&mut job, decoded),
                Err(error) => {
                    tracing::debug!(command = %header.command, %error, "malformed request");
                    Ok(Outcome::Refused(error.errno()))
                }
            }
        };
        // Whatever the handler left of the body.
        if let Some(mut receiver) = job.receiver.take() {
            let skipped = receiver.skip(None);
            self.link.give_back(receiver);
            skipped?;
        }
        match outcome? {
            Outcome::Replied => {}
            Outcome::Refused(errno) => self.refuse(&job, errno)?,
            Outcome::Held => self.park(&job, request.held(held)),
        }
        if fits == Fits::Ends {
            return Err(ConnectionError::Broken("a message that is too long to be drained"));
        }
        Ok(())
    }

    fn refuse(&self, job: &Job, errno: Errno) -> Result<(), ConnectionError> {
        let header = &job.header;
        tracing::debug!(command = %header.command, id = header.id, %errno, "refused");
        if !job.wants_reply() {
            return Ok(());
        }
        self.link.send(&mut [IoSlice::new(header.refusal(errno).as_bytes())], &[])
    }

    fn dispatch(&mut self, job: &mut Job, request: Request<'_>) -> Handled {
        if self.limits.is_none() != (job.header.command == Command::VERSION) {
            tracing::debug!(command = %job.header.command, "VERSION comes first, and once");
            return Ok(Outcome::Refused(Errno::EINVAL));
        }
        if let Err(errno) = self.check_role(&request) {
            return Ok(Outcome::Refused(errno));
        }
        match request {
            Request::Version(version, data) => self.version(job, version, data),
            Request::DmaMap(map) => self.dma_map(job, map),
            Request::DmaUnmap(unmap, bitmap) => self.dma_unmap(job, unmap, bitmap),
            Request::GetInfo { argsz } => self.get_info(job, argsz),
            Request::GetRegionInfo { argsz, index } => self.get_region_info(job, argsz, index),
            Request::GetRegionIoFds { argsz, index } => self.get_region_io_fds(job, argsz, index),
            Request::GetIrqInfo { argsz, index } => self.get_irq_info(job, argsz, index),
            Request::SetIrqs(set) => self.set_irqs(job, set),
            Request::RegionRead(access) => self.region_read(job, access),
            Request::RegionWrite(access, data) => self.region_write(job, access, data),
            Request::RegionWriteMulti(writes) => self.region_write_multi(job, writes),
            Request::Reset => self.reset(job),
            Request::Feature(header, data) => self.feature(job, header, data),
            Request::MigDataRead(read) => self.mig_data_read(job, read),
            Request::MigDataWrite(write, data) => self.mig_data_write(job, write, data),
        }
    }

    fn reset(&mut self, job: &Job) -> Handled {
        let reset = self.machine.reset();
        self.follow_session();
        if reset.is_ok() {
            // What came before it would be done after it.
            for header in self.parked.clear() {
                self.refuse(&Job { header, fds: Vec::new(), receiver: None }, Errno::EBUSY)?;
            }
        }
        match reset {
            Ok(()) => self.reply(job, &[]),
            Err(errno) => Ok(Outcome::Refused(errno)),
        }
    }

    /// `vfio-user.rst: VFIO_USER_VERSION`. A refused version may be followed by another.
    fn version(&mut self, job: &Job, version: VersionMessage, data: &[u8]) -> Handled {
        let theirs = match Capabilities::decode(data) {
            Ok(_) if version.major != VERSION.0 => {
                tracing::warn!(major = version.major, "an unknown major version");
                return Ok(Outcome::Refused(Errno::EINVAL));
            }
            Ok(theirs) => theirs,
            Err(error) => {
                tracing::warn!(%error, "VERSION refused");
                return Ok(Outcome::Refused(Errno::EINVAL));
            }
        };
        if let Err(errno) = self.admit(&theirs, job, version, data)? {
            return Ok(Outcome::Refused(errno));
        }
        let mut answer = self.capabilities().answer(&theirs);
        let twin = match answer.twin_socket {
            _ if self.role == Some(Role::Control) => None,
            // The socket goes with the reply.
            Some(_) if job.wants_reply() && theirs.max_msg_fds != Some(0) => self.make_twin(),
            _ => None,
        };
        if twin.is_none() {
            answer.twin_socket = None;
        }
        let minor = version.minor.min(VERSION.1);
        let limits = Limits::agree(minor, &theirs, &answer, &theirs);
        let fixed = VersionMessage { major: VERSION.0, minor };
        // QEMU receives the reply into the buffer of its request.
        let room = REPLY_BYTES_MAX.max(job.header.size as usize) - Header::BYTES - VersionMessage::BYTES;
        let json = answer.encode(room.min(JSON_ROOM));
        tracing::debug!(?theirs, ?limits, "version agreed");
        self.limits = Some(limits);
        self.doors.agreed(self.id, self.limits);
        self.link.foreign_dma.store(theirs.are_qemus(), Relaxed);
        let fds: Vec<BorrowedFd<'_>> = twin.iter().map(AsFd::as_fd).collect();
        self.reply_pieces(job, &[fixed.as_bytes(), &json], &fds)
    }

    /// Gives the client its role, for which it may have to wait.
    fn admit(
        &mut self,
        theirs: &Capabilities,
        job: &Job,
        version: VersionMessage,
        data: &[u8],
    ) -> Result<Result<(), Errno>, ConnectionError> {
        use version::Role as Asked;
        let asked = if self.by_control_door { Some(Asked::Control) } else { theirs.role };
        let may_control = || self.by_control_door || doors::may_control(&self.link);
        let control = match asked {
            Some(Asked::Control) if !may_control() => {
                tracing::warn!("a control client is refused: expected root or this server's own user");
                return Ok(Err(Errno::EACCES));
            }
            Some(Asked::Control) => true,
            // One that has gone, and is only not forgotten yet, is no VMM to be beside of.
            Some(Asked::Either) => self.doors.vmm().is_some_and(|vmm| !vmm.has_hung_up()) && may_control(),
            Some(Asked::Vmm) | None => false,
        };
        let admitted = match control {
            true => self.doors.be_control(self.id),
            false => {
                let message = || [job.header.as_bytes(), version.as_bytes(), data].concat();
                self.doors.be_vmm(self.id, &self.link, &|| self.state(message()))?
            }
        };
        if admitted.is_err() {
            return Ok(admitted);
        }
        if control {
            self.role = Some(Role::Control);
            self.client = self.machine.new_client();
        } else {
            self.be_vmm();
        }
        tracing::debug!(role = ?self.role, "admitted");
        Ok(Ok(()))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            role: Some(if self.role == Some(Role::Control) {
                version::Role::Control
            } else {
                version::Role::Vmm
            }),
            max_msg_fds: Some(MSG_FDS_MAX as u64),
            max_data_xfer_size: Some(self.data_bytes_max.into()),
            max_dma_maps: Some(65535),
            pgsizes: Some(4096),
            write_multiple: Some(true),
            twin_socket: self
                .options
                .twin_socket
                .then_some(TwinSocket { supported: true, fd_index: Some(0) }),
            migration: Some(MigrationCapability {
                pgsize: Some(4096),
                max_bitmap_size: Some(super::feature::BITMAP_BYTES_MAX),
            }),
        }
    }

    /// Makes the socket for the device's DMA messages and returns the client's end.
    fn make_twin(&self) -> Option<UnixStream> {
        let made =
            UnixStream::pair().map_err(|error| error.to_string()).and_then(|(ours, theirs)| match Twin::new(
                Foreign::new(ours),
                self.options.message_limit,
            ) {
                Ok(twin) => Ok((twin, theirs)),
                Err(error) => Err(error.to_string()),
            });
        match made {
            Ok((twin, theirs)) => self.link.twin.set(twin).ok().map(|()| theirs),
            Err(error) => {
                tracing::warn!(%error, "no twin socket");
                None
            }
        }
    }

    /// Replies with this body, if a reply is wanted.
    pub(super) fn reply(&self, job: &Job, body: &[u8]) -> Handled {
        self.reply_pieces(job, &[body], &[])
    }

    /// Replies with a body of up to three pieces, and fds.
    pub(super) fn reply_pieces(&self, job: &Job, body: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Handled {
        if job.wants_reply() {
            let header = reply_header(&job.header, body.iter().map(|piece| piece.len()).sum())?;
            let mut pieces = [IoSlice::new(&[]); 4];
            pieces[0] = IoSlice::new(header.as_bytes());
            for (to, from) in pieces[1..].iter_mut().zip(body) {
                *to = IoSlice::new(from);
            }
            self.link.send(&mut pieces[..=body.len()], fds)?;
        }
        Ok(Outcome::Replied)
    }
}

/// The header of a reply; its size is bounded by what a request may ask for.
pub(super) fn reply_header(header: &Header, body_bytes: usize) -> Result<Header, ConnectionError> {
    header.reply(body_bytes).ok_or(ConnectionError::Broken("a reply above 4 GiB"))
}

impl Drop for Connection<'_> {
    /// Last: whoever waits for the VMM's place finds the device without what was this client's.
    fn drop(&mut self) {
        self.doors.leave(self.id);
    }
}

/// Version data has room for all that this server ever says.
const JSON_ROOM: usize = 1024;

/// The most fds that a command may come with.
fn fds_max(command: Command) -> usize {
    match command {
        Command::DMA_MAP => 1,
        Command::DEVICE_SET_IRQS => usize::MAX,
        _ => 0,
    }
}
