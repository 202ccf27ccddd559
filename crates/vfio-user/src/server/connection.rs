//! One connection: its requests in the order in which they come, each with one reply
//! (`vfio-user.rst: Commands, Socket Disconnection Behavior`).

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use limosa_device::{ClientId, Machine, NextClient, Released, SessionId};
use limosa_foreign_fd::Foreign;
use limosa_protocol::Errno;
use zerocopy::IntoBytes;

use super::Options;
use super::buffer::Buffer;
use super::doors::{self, ConnectionId, Doors, Role};
use super::info::{self, Answer};
use super::interrupts;
use super::job::{self, Handled, Job, Outcome, reply_header};
use super::link::{Fits, Incoming, Link, Something};
use super::parked::Parked;
use super::stream::DataSocket;
use crate::codec::{Command, Request};
use crate::connection::ConnectionError;
use crate::version::{DATA_XFER_BYTES_MAX, Limits};

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
    pub(super) id: ConnectionId,
    /// It came by the door for control clients.
    pub(super) by_control_door: bool,
    /// `None` before VERSION.
    pub(super) role: Option<Role>,
    /// What the machine knows it as, once it has a role.
    pub(super) client: ClientId,
    pub(super) parked: Parked,
    /// What it has prepared, while it waits for the VMM's place as the next client.
    pub(super) next: Option<Arc<NextClient>>,
    /// Wakes this connection when accesses are held back no more.
    pub(super) released: Option<Arc<Released>>,
}

impl<'a> Connection<'a> {
    pub(super) fn new(
        stream: Foreign<UnixStream>,
        machine: &'a Arc<Machine>,
        options: &'a Options,
        doors: &'a Doors,
        by_control_door: bool,
        adopted: Option<ConnectionId>,
    ) -> Result<Connection<'a>, ConnectionError> {
        let data_bytes_max = options.data_bytes_max.clamp(4096, DATA_XFER_BYTES_MAX);
        let link =
            Arc::new(Link::new(stream, data_bytes_max as usize, options.message_limit, options.dma_limit)?);
        let id = doors.enter(&link, by_control_door, adopted);
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
            next: None,
            released: None,
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
        self.leave();
        tracing::debug!(%end, "disconnected");
        end
    }

    /// Lets go of what the client gave. A VMM's device goes to its next client, if there is one.
    fn leave(&mut self) {
        let is_vmm = match self.role {
            None => false,
            Some(Role::Control) => {
                self.machine.client_gone(self.client);
                false
            }
            Some(Role::Vmm) => true,
            // What it has prepared goes; or it has become the VMM, and did not know yet.
            Some(Role::Next) => self.next.as_ref().is_none_or(|next| !next.withdraw()),
        };
        if is_vmm && !self.doors.hand_over(self.id, |next| self.machine.hand_over(next)) {
            self.machine.client_gone(ClientId::VMM);
            // One that was admitted meanwhile.
            while !self.doors.leave_unless_next(self.id) {
                self.doors.hand_over(self.id, |next| self.machine.hand_over(next));
            }
        }
    }

    /// Stops here while connections are paused, which only those are that can be handed over.
    fn pause_here(&self) -> Result<(), ConnectionError> {
        if !self.options.interruptible {
            return Ok(());
        }
        loop {
            // Ends at once when the connection is to be paused: another process sends what is left.
            self.link.flush()?;
            if !(self.doors.is_open() && self.link.is_busy()) {
                self.doors.pause_here(self.id, &|| self.state(Vec::new()))?;
            }
            if !self.link.keeps() {
                return Ok(());
            }
        }
    }

    /// What another process needs to go on with this connection, beside its link.
    pub(super) fn state(&self, unanswered: Vec<u8>) -> doors::State {
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

    fn serve_one(&mut self, request: &mut Buffer) -> Result<(), ConnectionError> {
        self.pause_here()?;
        self.look_whether_owner();
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
        self.look_whether_owner();
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
                Ok(_) if job.fds.len() > job::fds_max(header.command) => Ok(Outcome::Refused(Errno::EINVAL)),
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
        let description = self.machine.description();
        match request {
            Request::Version(version, data) => self.version(job, version, data),
            Request::DmaMap(map) => self.dma_map(job, map),
            Request::DmaUnmap(unmap, bitmap) => self.dma_unmap(job, unmap, bitmap),
            Request::GetInfo { argsz } => self.answer(job, info::device(description, argsz)),
            Request::GetRegionInfo { argsz, index } => {
                let file = self.machine.region_file(index);
                let file = file.as_ref().map(|file| file.as_fd());
                self.answer(job, info::region(description, file, self.fds_max(), argsz, index))
            }
            Request::GetRegionIoFds { argsz, index } => {
                if index as usize >= description.regions.len() {
                    return Ok(Outcome::Refused(Errno::EINVAL));
                }
                let signals = self.machine.ioeventfds(index);
                self.answer(job, info::region_io_fds(&signals, self.fds_max(), argsz, index))
            }
            Request::GetIrqInfo { argsz, index } => self.answer(job, info::irq(description, argsz, index)),
            Request::SetIrqs(set) => {
                let fds = std::mem::take(&mut job.fds);
                match interrupts::set_irqs(self.machine, self.next.as_deref(), &set, fds) {
                    Ok(()) => self.reply(job, &[]),
                    Err(errno) => Ok(Outcome::Refused(errno)),
                }
            }
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

    /// The most fds that the client takes in one message. A control client maps nothing, nor does one that has not the device yet.
    fn fds_max(&self) -> usize {
        if self.role == Some(Role::Control) || self.is_next() {
            return 0;
        }
        self.limits.map_or(0, |limits| limits.msg_fds_max)
    }

    fn answer(&self, job: &Job, answer: Result<Answer<'_>, Errno>) -> Handled {
        match answer {
            Ok(answer) => self.reply_pieces(job, &[&answer.body], &answer.fds),
            Err(errno) => Ok(Outcome::Refused(errno)),
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

impl Drop for Connection<'_> {
    /// Last: whoever waits for the VMM's place finds the device without what was this client's.
    fn drop(&mut self) {
        self.doors.leave(self.id);
    }
}
