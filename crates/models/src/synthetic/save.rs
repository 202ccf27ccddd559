//! A saving session: which blocks are still to be read, and what is lent next.

use limosa_device::Save;
use limosa_protocol::feature::{PrecopyFlags, PrecopyInfo};

use super::blocks::Blocks;
use super::faults::ScriptedFault;
use super::records::{RECORD_BYTES, Record};

/// What is to be done with a block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pending {
    /// It was read as it is.
    No,
    /// It is to be read for the first time.
    Initial,
    /// It changed after it had been read.
    Dirty,
}

pub(super) struct Saver {
    pending: Vec<Pending>,
    /// Blocks that are [`Pending::Initial`] and [`Pending::Dirty`] within the pre-copy share.
    initial: usize,
    dirty: usize,
    /// How many blocks, from the first on, are read in pre-copy.
    share: usize,
    /// Where to look for the next run.
    cursor: usize,
    /// What of a run of blocks is still to be lent, in bytes of the state.
    run: std::ops::Range<usize>,
    /// A record, or a section with its record, that is being lent.
    small: Vec<u8>,
    small_at: usize,
    rest_done: bool,
    /// Bytes of the stream that were lent.
    lent: u64,
    truncate: Option<u64>,
    corrupt: Vec<u64>,
    /// A chunk with a byte made wrong.
    wrong: Vec<u8>,
    /// The initial blocks were made pending anew, and that was not reported yet.
    reinit: bool,
}

impl Saver {
    pub(super) fn new(blocks: &Blocks, share: usize, identity: Vec<u8>, faults: &[ScriptedFault]) -> Saver {
        let mut truncate = None;
        let mut corrupt = Vec::new();
        for fault in faults {
            match fault {
                ScriptedFault::Truncate(bytes) => truncate = Some(*bytes),
                ScriptedFault::Corrupt(offset) => corrupt.push(*offset),
                _ => {}
            }
        }
        Saver {
            pending: vec![Pending::Initial; blocks.count()],
            initial: share,
            dirty: 0,
            share,
            cursor: 0,
            run: 0..0,
            small: identity,
            small_at: 0,
            rest_done: false,
            lent: 0,
            truncate,
            corrupt,
            wrong: Vec::new(),
            reinit: false,
        }
    }

    /// The block that was lent in part and must not change until it was lent whole.
    pub(super) fn in_flight(&self, blocks: &Blocks) -> Option<usize> {
        let inside = !self.run.is_empty() && !self.run.start.is_multiple_of(blocks.block_bytes());
        inside.then(|| self.run.start / blocks.block_bytes())
    }

    /// A block changed.
    pub(super) fn changed(&mut self, index: usize) {
        if self.pending[index] == Pending::No {
            self.pending[index] = Pending::Dirty;
            self.dirty += usize::from(index < self.share);
        }
    }

    /// Reports the pre-copy share anew, as if nothing of it had been read.
    pub(super) fn reinit(&mut self) {
        self.pending[..self.share].fill(Pending::Initial);
        (self.initial, self.dirty, self.reinit) = (self.share, 0, true);
    }

    pub(super) fn info(&mut self, block_bytes: usize, flags: bool) -> PrecopyInfo {
        let bytes = |count: usize| (count * block_bytes) as u64;
        if !flags {
            // Who does not know of re-initialization sees no initial bytes that grow.
            let initial = if self.reinit { 0 } else { self.initial };
            let dirty = self.initial + self.dirty - initial;
            return PrecopyInfo {
                initial_bytes: bytes(initial),
                dirty_bytes: bytes(dirty),
                ..Default::default()
            };
        }
        let flags = if std::mem::take(&mut self.reinit) { PrecopyFlags::REINIT.bits() } else { 0 };
        PrecopyInfo { argsz: 0, flags, initial_bytes: bytes(self.initial), dirty_bytes: bytes(self.dirty) }
    }

    /// Bytes of blocks that are still to be read.
    pub(super) fn left_bytes(&self, block_bytes: usize) -> u64 {
        let waiting = self.pending[self.share..].iter().filter(|pending| **pending != Pending::No).count();
        ((self.initial + self.dirty + waiting) * block_bytes) as u64
    }

    /// Whether all blocks were lent, so that the rest comes next.
    pub(super) fn rest_is_next(&self) -> bool {
        let over = self.small_at == self.small.len() && self.run.is_empty() && !self.rest_done;
        over && self.initial + self.dirty == 0 && self.pending.iter().all(|pending| *pending == Pending::No)
    }

    /// Lends the next bytes. `rest` is the last section, with its record; it is looked at only
    /// when [`Saver::rest_is_next`].
    pub(super) fn save<'a>(
        &'a mut self,
        blocks: &'a Blocks,
        bytes_max: usize,
        stopped: bool,
        rest: Vec<u8>,
    ) -> Save<'a> {
        let none = if stopped { Save::End } else { Save::NothingForNow };
        let bytes_max = match self.truncate.map(|bytes| bytes.saturating_sub(self.lent)) {
            Some(0) => return none,
            Some(left) => bytes_max.min(usize::try_from(left).unwrap_or(usize::MAX)),
            None => bytes_max,
        };
        if self.small_at == self.small.len() && self.run.is_empty() && !self.next(blocks, stopped, rest) {
            return none;
        }
        let data = if self.small_at < self.small.len() {
            let from = self.small_at;
            self.small_at = self.small.len().min(from + bytes_max);
            &self.small[from..self.small_at]
        } else {
            let range = self.take(blocks.block_bytes(), bytes_max);
            &blocks.bytes()[range]
        };
        let from = self.lent;
        self.lent += data.len() as u64;
        let hit = |offset: &&u64| (from..from + data.len() as u64).contains(offset);
        if self.corrupt.iter().any(|offset| hit(&offset)) {
            self.wrong = data.to_vec();
            for offset in self.corrupt.iter().filter(hit) {
                self.wrong[(offset - from) as usize] ^= 1;
            }
            return Save::Data(&self.wrong);
        }
        Save::Data(data)
    }

    /// Prepares what is lent next; `false` when there is nothing.
    fn next(&mut self, blocks: &Blocks, stopped: bool, rest: Vec<u8>) -> bool {
        let bound = if stopped { blocks.count() } else { self.share };
        let waits = |index: &usize| self.pending[*index] != Pending::No;
        let first = (self.cursor.min(bound)..bound).find(waits).or_else(|| (0..bound).find(waits));
        if let Some(first) = first {
            let end = (first..bound).find(|index| !waits(index)).unwrap_or(bound);
            let block_bytes = blocks.block_bytes();
            let record = Record::Blocks { first: first as u32, count: (end - first) as u32 };
            self.small.clear();
            self.small.extend_from_slice(&record.encode());
            debug_assert_eq!(self.small.len(), RECORD_BYTES);
            (self.small_at, self.cursor) = (0, end);
            self.run = first * block_bytes..end * block_bytes;
            true
        } else if stopped && !self.rest_done {
            (self.small, self.small_at, self.rest_done) = (rest, 0, true);
            true
        } else {
            false
        }
    }

    /// Takes the next part of the run, and the blocks that begin in it off the list. As much as is
    /// asked for, though that ends within a block: a transport sends a reply without a copy when
    /// one piece fills it.
    fn take(&mut self, block_bytes: usize, bytes_max: usize) -> std::ops::Range<usize> {
        let start = self.run.start;
        let end = self.run.end.min(start.saturating_add(bytes_max));
        self.run.start = end;
        for index in start.div_ceil(block_bytes)..end.div_ceil(block_bytes) {
            let within = usize::from(index < self.share);
            match std::mem::replace(&mut self.pending[index], Pending::No) {
                Pending::No => {}
                Pending::Initial => self.initial -= within,
                Pending::Dirty => self.dirty -= within,
            }
        }
        start..end
    }
}
