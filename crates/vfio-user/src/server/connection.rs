//! One connection: its requests in the order in which they come, each with one reply
//! (`vfio-user.rst: Commands, Socket Disconnection Behavior`).

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use limosa_device::Machine;
use limosa_foreign_fd::Foreign;
use limosa_protocol::Errno;

use super::Options;
use super::access;
use super::admission;
use super::buffer::Buffer;
use super::data::SessionData;
use super::dma::ClientMemory;
use super::doors::{self, ConnectionId, Doors, Role};
use super::feature::Features;
use super::info::{self, Answer};
use super::interrupts;
use super::job::{self, Handled, Job, Outcome};
use super::link::{Fits, Incoming, Link, Something};
use super::mapping;
use super::parked::{Access, Parked};
use super::peer::Peer;
use crate::codec::{Command, Request};
use crate::connection::{ConnectionError, Fds};
use crate::version::DATA_XFER_BYTES_MAX;

/// A connection being served.
pub(super) struct Connection<'a> {
    /// Dropped first: the session's socket ends before another client gets the device.
    data: SessionData,
    peer: Peer<'a>,
    parked: Parked,
    /// Where replies are made.
    room: Buffer,
    /// When the version must have been negotiated.
    version_until: Instant,
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
        Ok(Connection {
            data: SessionData::default(),
            peer: Peer::new(machine, options, doors, link, by_control_door, adopted, data_bytes_max),
            parked: Parked::default(),
            room: Buffer::default(),
            version_until: Instant::now() + options.version_limit,
        })
    }

    /// The client's memory, by messages.
    pub(super) fn memory(&self) -> ClientMemory {
        self.peer.memory()
    }

    pub(super) fn link(&self) -> Arc<Link> {
        Arc::clone(&self.peer.link)
    }

    /// Serves until the end, and then releases everything of the client.
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
        self.peer.log_end(&end);
        self.peer.link.end();
        self.data.end();
        self.peer.leave();
        end
    }

    /// Waits here while connections are paused; only those that can be handed over are.
    fn pause_here(&self) -> Result<(), ConnectionError> {
        if !self.peer.options.interruptible {
            return Ok(());
        }
        loop {
            // Ends at once if the connection has to pause: another process sends the rest.
            self.peer.link.flush()?;
            if !(self.peer.doors.is_open() && self.peer.link.is_busy()) {
                self.peer.doors.pause_here(self.peer.id, &|| self.state(Vec::new()))?;
            }
            if !self.peer.link.keeps() {
                return Ok(());
            }
        }
    }

    /// The data that another process needs to continue this connection, other than its link.
    fn state(&self, unanswered: Vec<u8>) -> doors::State {
        doors::State {
            limits: self.peer.limits,
            by_control_door: self.peer.by_control_door,
            unanswered,
            parked: self.parked.iter().cloned().collect(),
        }
    }

    /// Continues a connection that another process has served.
    pub(super) fn adopt(mut self, state: doors::State) -> Connection<'a> {
        self.peer.limits = state.limits;
        state.parked.into_iter().for_each(|access| self.parked.keep(access));
        self.peer.doors.agreed(self.peer.id, self.peer.limits);
        if self.peer.limits.is_some() {
            self.peer.doors.adopt(self.peer.id, Role::Vmm);
            self.peer.be_vmm();
        }
        self
    }

    fn serve_one(&mut self, request: &mut Buffer) -> Result<(), ConnectionError> {
        self.pause_here()?;
        self.peer.look_whether_owner();
        if !self.parked.is_empty() {
            return self.serve_while_parked(request);
        }
        // An idle client may be idle for ever.
        let until = if self.peer.limits.is_some() { None } else { Some(self.version_until) };
        if self.peer.options.interruptible {
            match self.peer.link.wait_for_something(until, until.is_some(), true)? {
                Something::Command => {}
                Something::Woken => return Ok(()),
                Something::Late => return Err(ConnectionError::Silent),
            }
        }
        match self.peer.link.next(request, until)? {
            Some(incoming) => self.handle(incoming, request),
            None => Err(ConnectionError::Silent),
        }
    }

    fn handle(&mut self, incoming: Incoming, request: &mut Buffer) -> Result<(), ConnectionError> {
        self.peer.look_whether_owner();
        let Incoming { header, fds, body_bytes, held, receiver, fits } = incoming;
        self.peer.doors.counters.request(header.command);
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
            self.peer.link.give_back(receiver);
            skipped?;
        }
        match outcome? {
            Outcome::Replied => {}
            Outcome::Refused(errno) => {
                self.peer.doors.counters.refused.fetch_add(1, Relaxed);
                job.refuse(&self.peer.link, errno)?;
            }
            Outcome::Held => self.park(&job, request.held(held)),
        }
        if fits == Fits::Ends {
            return Err(ConnectionError::Broken("a message that is too long to be drained"));
        }
        Ok(())
    }

    fn dispatch(&mut self, job: &mut Job, request: Request<'_>) -> Handled {
        if self.peer.limits.is_none() != (job.header.command == Command::VERSION) {
            tracing::debug!(command = %job.header.command, "VERSION comes first, and once");
            return Ok(Outcome::Refused(Errno::EINVAL));
        }
        if let Err(errno) = self.peer.check(&request) {
            return Ok(Outcome::Refused(errno));
        }
        let description = self.peer.machine.description();
        match request {
            Request::Version(version, data) => admission::version(&mut self.peer, job, version, data),
            Request::DmaMap(map) => mapping::map(&self.peer, job, map),
            Request::DmaUnmap(unmap, bitmap) => mapping::unmap(&self.peer, job, unmap, bitmap),
            Request::GetInfo { argsz } => self.answer(job, info::device(description, argsz)),
            Request::GetRegionInfo { argsz, index } => {
                let file = self.peer.machine.region_file(index);
                let file = file.as_ref().map(|file| file.as_fd());
                self.answer(job, info::region(description, file, self.peer.fds_max(), argsz, index))
            }
            Request::GetRegionIoFds { argsz, index } => {
                if index as usize >= description.regions.len() {
                    return Ok(Outcome::Refused(Errno::EINVAL));
                }
                let signals = self.peer.machine.ioeventfds(index);
                self.answer(job, info::region_io_fds(&signals, self.peer.fds_max(), argsz, index))
            }
            Request::GetIrqInfo { argsz, index } => self.answer(job, info::irq(description, argsz, index)),
            Request::SetIrqs(set) => {
                let fds = std::mem::take(&mut job.fds);
                match interrupts::set_irqs(self.peer.machine, self.peer.next(), &set, fds) {
                    Ok(()) => job.reply(&self.peer.link, &[]),
                    Err(errno) => Ok(Outcome::Refused(errno)),
                }
            }
            Request::RegionRead(access) => {
                access::read(&self.peer, &self.parked, &mut self.room, job, access)
            }
            Request::RegionWrite(access, data) => access::write(&self.peer, &self.parked, job, access, data),
            Request::RegionWriteMulti(writes) => {
                access::write_multi(&self.peer, &mut self.parked, job, writes)
            }
            Request::Reset => self.reset(job),
            Request::Feature(header, data) => {
                let Connection { peer, data: session, room, .. } = self;
                Features { peer, data: session, room }.answer(job, header, data)
            }
            Request::MigDataRead(read) => self.data.read(&self.peer, job, read),
            Request::MigDataWrite(write, data) => self.data.write(&self.peer, job, write, data),
        }
    }

    fn reset(&mut self, job: &Job) -> Handled {
        let reset = self.peer.machine.reset();
        self.data.follow_session(&self.peer);
        if reset.is_ok() {
            // Requests before it would be handled after it.
            for header in self.parked.clear() {
                Job { header, fds: Vec::new(), receiver: None }.refuse(&self.peer.link, Errno::EBUSY)?;
            }
        }
        match reset {
            Ok(()) => job.reply(&self.peer.link, &[]),
            Err(errno) => Ok(Outcome::Refused(errno)),
        }
    }

    fn answer(&self, job: &Job, answer: Result<Answer<'_>, Errno>) -> Handled {
        match answer {
            Ok(answer) => job.reply_pieces(&self.peer.link, &[&answer.body], &answer.fds),
            Err(errno) => Ok(Outcome::Refused(errno)),
        }
    }

    /// Queues the access that is being handled.
    fn park(&mut self, job: &Job, body: &[u8]) {
        let writes_done = std::mem::take(&mut self.parked.writes_done);
        if self.parked.is_empty() {
            tracing::info!(
                next = self.peer.is_next(),
                "a VMM uses a device that is being moved, or does not have it yet: its accesses wait"
            );
        }
        self.parked.keep(Access { header: job.header, body: body.to_vec(), writes_done });
    }

    /// One step while accesses wait.
    fn serve_while_parked(&mut self, request: &mut Buffer) -> Result<(), ConnectionError> {
        if !self.peer.holds_accesses() {
            return self.replay(request);
        }
        // While the device stays, or is not this client's yet, there is no limit; it counts from when there is one.
        let until = if self.peer.is_next() || self.peer.machine.stays().is_some() {
            self.parked.since = None;
            None
        } else {
            Some(*self.parked.since.get_or_insert_with(Instant::now) + self.peer.options.park_limit)
        };
        if until.is_some_and(|until| Instant::now() >= until) {
            // A device that cannot run again answers them with errors.
            self.parked.since = Some(Instant::now());
            if let Err(errno) = self.peer.machine.take_back() {
                tracing::error!(%errno, "the device does not run again: its VMM's accesses wait on");
            }
            return Ok(());
        }
        if self.parked.is_full() {
            self.peer.link.was_woken();
            self.peer.look_whether_owner();
            if self.peer.holds_accesses() {
                self.peer.link.wait_for_wake(until)?;
            }
            return Ok(());
        }
        match self.peer.link.wait_for_something(until, false, false)? {
            Something::Command => match self.peer.link.next(request, None)? {
                Some(incoming) => self.handle(incoming, request),
                None => Ok(()),
            },
            Something::Woken | Something::Late => Ok(()),
        }
    }

    /// Performs the queued accesses in order, until one has to wait again.
    fn replay(&mut self, request: &mut Buffer) -> Result<(), ConnectionError> {
        let since = self.parked.since.take();
        while let Some(Access { header, body, writes_done }) = self.parked.take_first() {
            let bytes = body.len();
            request.bytes(bytes).copy_from_slice(&body);
            (self.parked.replays, self.parked.writes_done) = (true, writes_done);
            let fits = Fits::Yes;
            let incoming = Incoming {
                header,
                fds: Fds::default(),
                body_bytes: bytes,
                held: bytes,
                receiver: None,
                fits,
            };
            let handled = self.handle(incoming, request);
            self.parked.replays = false;
            handled?;
            if self.peer.machine.holds_accesses() && !self.parked.is_empty() {
                self.parked.since = since;
                return Ok(());
            }
        }
        self.parked.since = None;
        Ok(())
    }
}
