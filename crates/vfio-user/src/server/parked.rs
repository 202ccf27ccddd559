//! Accesses of the VMM that wait while another client moves its device, and those of the next one until the device is its own.
//!
//! The guest knows nothing of the move: a write that is refused would be lost, and a VMM that waits too long for a reply gives
//! the device up (QEMU after 5 s). So what cannot be done now is kept, in its order, and done when the device runs again; after
//! [`Options::park_limit`](super::Options::park_limit) the move is ended for it. Configuration space, mappings and interrupts are
//! answered meanwhile. When so much is kept that there is no room for more, the VMM's requests stay in its socket.

use std::collections::VecDeque;
use std::time::Instant;

use super::buffer::Buffer;
use super::connection::Connection;
use super::job::Job;
use super::link::{Fits, Incoming, Something};
use crate::codec::Header;
use crate::connection::{ConnectionError, Fds};

/// The most accesses that are kept.
const COUNT_MAX: usize = 1024;
/// The most bytes of theirs.
const BYTES_MAX: usize = 4 << 20;

/// What is kept.
#[derive(Default)]
pub(super) struct Parked {
    accesses: VecDeque<Access>,
    bytes: usize,
    /// When the first came, or its limit began to count.
    since: Option<Instant>,
    /// Its accesses are being made.
    pub(super) replays: bool,
    /// Of the REGION_WRITE_MULTI being handled: how many of its writes are done.
    pub(super) writes_done: usize,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(super) struct Access {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    pub(super) writes_done: usize,
}

impl Parked {
    /// Whether an access has to wait behind others.
    pub(super) fn comes_first(&self) -> bool {
        !self.replays && !self.accesses.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.accesses.is_empty()
    }

    pub(super) fn clear(&mut self) -> Vec<Header> {
        (self.bytes, self.since) = (0, None);
        self.accesses.drain(..).map(|access| access.header).collect()
    }

    /// All that is kept, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Access> {
        self.accesses.iter()
    }

    /// Keeps an access behind the others, or before them when it was taken from there.
    pub(super) fn keep(&mut self, access: Access) {
        self.since.get_or_insert_with(Instant::now);
        self.bytes += access.body.len();
        if self.replays { self.accesses.push_front(access) } else { self.accesses.push_back(access) }
    }

    fn is_full(&self) -> bool {
        self.accesses.len() >= COUNT_MAX || self.bytes >= BYTES_MAX
    }

    fn take_first(&mut self) -> Option<Access> {
        let access = self.accesses.pop_front()?;
        self.bytes -= access.body.len();
        Some(access)
    }
}

impl Connection<'_> {
    /// Keeps the access that is being handled.
    pub(super) fn park(&mut self, job: &Job, body: &[u8]) {
        let writes_done = std::mem::take(&mut self.parked.writes_done);
        if self.parked.is_empty() {
            tracing::info!(
                next = self.is_next(),
                "a VMM uses a device that is moved, or not its own yet: its accesses wait"
            );
        }
        self.parked.keep(Access { header: job.header, body: body.to_vec(), writes_done });
    }

    /// One step while accesses wait.
    pub(super) fn serve_while_parked(&mut self, request: &mut Buffer) -> Result<(), ConnectionError> {
        if !self.holds_accesses() {
            return self.replay(request);
        }
        // While the device stays, or is not this client's yet, there is no limit; it counts from when there is one.
        let until = if self.is_next() || self.machine.stays().is_some() {
            self.parked.since = None;
            None
        } else {
            Some(*self.parked.since.get_or_insert_with(Instant::now) + self.options.park_limit)
        };
        if until.is_some_and(|until| Instant::now() >= until) {
            // A device that cannot run again answers them with errors.
            self.parked.since = Some(Instant::now());
            if let Err(errno) = self.machine.take_back() {
                tracing::error!(%errno, "the device does not run again: its VMM's accesses wait on");
            }
            return Ok(());
        }
        if self.parked.is_full() {
            self.link.was_woken();
            self.look_whether_owner();
            if self.holds_accesses() {
                self.link.wait_for_wake(until)?;
            }
            return Ok(());
        }
        match self.link.wait_for_something(until, false)? {
            Something::Command => match self.link.next(request, None)? {
                Some(incoming) => self.handle(incoming, request),
                None => Ok(()),
            },
            Something::Woken | Something::Late => Ok(()),
        }
    }

    fn holds_accesses(&self) -> bool {
        self.is_next() || self.machine.holds_accesses()
    }

    /// Makes the accesses that waited, in their order, until one has to wait again.
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
            if self.machine.holds_accesses() && !self.parked.is_empty() {
                self.parked.since = since;
                return Ok(());
            }
        }
        self.parked.since = None;
        Ok(())
    }
}
