//! Accesses of the VMM that wait while another client moves its device, and those of the next one until the device is its own.
//!
//! The guest knows nothing of the move: a write that is refused would be lost, and a VMM that waits too long for a reply gives
//! the device up (QEMU after 5 s). So what cannot be done now is kept, in its order, and done when the device runs again; after
//! [`Options::park_limit`](super::Options::park_limit) the move is ended for it. Configuration space, mappings and interrupts are
//! answered meanwhile. When so much is kept that there is no room for more, the VMM's requests stay in its socket.

use std::collections::VecDeque;
use std::time::Instant;

use crate::codec::Header;

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
    pub(super) since: Option<Instant>,
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

    pub(super) fn is_full(&self) -> bool {
        self.accesses.len() >= COUNT_MAX || self.bytes >= BYTES_MAX
    }

    pub(super) fn take_first(&mut self) -> Option<Access> {
        let access = self.accesses.pop_front()?;
        self.bytes -= access.body.len();
        Some(access)
    }
}
