//! Queued accesses: of the VMM while another client moves its device, and of the next client until it gets the
//! device.
//!
//! The guest is not aware of the move: a refused write would be lost, and a VMM that waits too long for a reply gives
//! up the device (QEMU after 5 s). So accesses are queued in order, and performed when the device runs again; after
//! [`Options::park_limit`](super::Options::park_limit) the move is ended. Requests for configuration space, mappings
//! and interrupts are answered meanwhile. If the queue is full, the VMM's requests stay in its socket.

use std::collections::VecDeque;
use std::time::Instant;

use crate::codec::Header;

/// Limit on queued accesses.
const COUNT_MAX: usize = 1024;
/// The most bytes of theirs.
const BYTES_MAX: usize = 4 << 20;

/// The queue of accesses.
#[derive(Default)]
pub(super) struct Parked {
    accesses: VecDeque<Access>,
    bytes: usize,
    /// When the first one arrived, or its time limit began.
    pub(super) since: Option<Instant>,
    /// The queued accesses are being performed.
    pub(super) replays: bool,
    /// Of the REGION_WRITE_MULTI being handled: how many of its writes are done.
    pub(super) writes_done: usize,
}

/// A queued request.
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

    /// All queued accesses, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Access> {
        self.accesses.iter()
    }

    /// Queues an access behind the others, or puts it back in front.
    pub(super) fn keep(&mut self, access: Access) {
        self.since.get_or_insert_with(Instant::now);
        self.bytes += access.body.len();
        if self.replays { self.accesses.push_front(access) } else { self.accesses.push_back(access) }
    }

    pub(super) fn is_full(&self) -> bool {
        self.accesses.len() >= COUNT_MAX || self.bytes >= BYTES_MAX
    }

    pub(super) fn take_first(&mut self) -> Option<Access> {
        let access = self.accesses.pop_front()?;
        self.bytes -= access.body.len();
        Some(access)
    }
}
