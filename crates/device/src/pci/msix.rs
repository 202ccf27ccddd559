//! The MSI-X table and its pending bits, in a BAR (`PCI Local Bus 3.0`, 6.8.2).

use std::ops::Range;

pub(super) const ENTRY_BYTES: usize = 16;
/// Offset in an entry of the byte with the mask bit.
const CONTROL: usize = 12;

/// Places of the table and the pending bits.
#[derive(Clone, Copy, Debug)]
pub(super) struct MsixLayout {
    /// Offset of the capability.
    pub(super) at: usize,
    pub(super) vectors: u16,
    /// BAR and offset.
    pub(super) table: (usize, u64),
    pub(super) pending: (usize, u64),
}

impl MsixLayout {
    pub(super) fn table_bytes(&self) -> u64 {
        u64::from(self.vectors) * ENTRY_BYTES as u64
    }

    pub(super) fn pending_bytes(&self) -> u64 {
        u64::from(self.vectors).div_ceil(64) * 8
    }
}

/// The current table.
#[derive(Clone, Debug)]
pub(super) struct MsixTable {
    layout: MsixLayout,
    pub(super) table: Vec<u8>,
    pub(super) pending: Vec<u8>,
    /// For each vector, whether the client wrote its mask: only then does the mask count.
    pub(super) written: Vec<bool>,
}

impl MsixTable {
    pub(super) fn new(layout: &MsixLayout) -> MsixTable {
        let mut table = MsixTable {
            layout: *layout,
            table: vec![0; layout.table_bytes() as usize],
            pending: vec![0; layout.pending_bytes() as usize],
            written: vec![false; usize::from(layout.vectors)],
        };
        table.reset();
        table
    }

    pub(super) fn reset(&mut self) {
        for entry in self.table.as_chunks_mut::<ENTRY_BYTES>().0 {
            *entry = [0; ENTRY_BYTES];
            entry[CONTROL] = 1;
        }
        self.pending.fill(0);
        self.written.fill(false);
    }

    pub(super) fn read(
        &self,
        bar: usize,
        offset: u64,
        data: &mut [u8],
        pending: impl FnOnce() -> Vec<u8>,
    ) -> bool {
        let mut covered = 0;
        let table = self.layout.table;
        if let Some((here, there)) = overlap(bar == table.0, table.1, self.table.len(), offset, data.len()) {
            covered += here.len();
            data[there].copy_from_slice(&self.table[here]);
        }
        let bits = self.layout.pending;
        if let Some((here, there)) = overlap(bar == bits.0, bits.1, self.pending.len(), offset, data.len()) {
            covered += here.len();
            data[there].copy_from_slice(&pending()[here]);
        }
        covered == data.len()
    }

    pub(super) fn write(&mut self, bar: usize, offset: u64, data: &[u8]) -> bool {
        let mut covered = 0;
        let (table, pending) = (self.layout.table, self.layout.pending);
        if let Some((here, _)) = overlap(bar == pending.0, pending.1, self.pending.len(), offset, data.len())
        {
            covered += here.len();
        }
        if let Some((here, there)) = overlap(bar == table.0, table.1, self.table.len(), offset, data.len()) {
            covered += here.len();
            for (at, data) in here.zip(&data[there]) {
                if at % ENTRY_BYTES == CONTROL {
                    self.written[at / ENTRY_BYTES] = true;
                }
                self.put(at, *data);
            }
        }
        covered == data.len()
    }

    /// Loads a saved table and pending bits of the right lengths; no vector counts as written yet.
    pub(super) fn load(&mut self, table: &[u8], pending: &[u8]) {
        self.reset();
        table.iter().enumerate().for_each(|(at, byte)| self.put(at, *byte));
        self.pending.copy_from_slice(pending);
    }

    /// Writes the writable bits of a byte of the table.
    fn put(&mut self, at: usize, byte: u8) {
        let mask = match at % ENTRY_BYTES {
            0 => 0xfc,
            CONTROL => 1,
            13.. => 0,
            _ => 0xff,
        };
        self.table[at] = (self.table[at] & !mask) | (byte & mask);
    }

    /// Makes a vector pending if it is masked, or if `all` vectors are; returns whether it is.
    pub(super) fn hold(&mut self, vector: u32, all: bool) -> bool {
        let vector = vector as usize;
        let Some(written) = self.written.get(vector) else { return false };
        let masked = all || (*written && self.table[vector * ENTRY_BYTES + CONTROL] & 1 != 0);
        if masked {
            self.pending[vector / 8] |= 1 << (vector % 8);
        }
        masked
    }

    /// Passes the vectors that are pending and not masked by their own bit, and clears their pending bits.
    pub(super) fn take_pending(&mut self, mut fire: impl FnMut(u32)) {
        for (at, pending) in self.pending.iter_mut().enumerate().filter(|(_, pending)| **pending != 0) {
            for vector in (at * 8..at * 8 + 8).take_while(|vector| *vector < self.written.len()) {
                let masked = self.written[vector] && self.table[vector * ENTRY_BYTES + CONTROL] & 1 != 0;
                if *pending >> (vector % 8) & 1 != 0 && !masked {
                    *pending &= !(1 << (vector % 8));
                    fire(vector as u32);
                }
            }
        }
    }
}

/// The overlap of an access of `len` bytes at `offset` with `bytes` bytes at `start`: the ranges in these bytes,
/// and in the access.
fn overlap(
    same_bar: bool,
    start: u64,
    bytes: usize,
    offset: u64,
    len: usize,
) -> Option<(Range<usize>, Range<usize>)> {
    let first = start.max(offset);
    let end = start.checked_add(bytes as u64)?.min(offset.saturating_add(len as u64));
    if !same_bar || first >= end {
        return None;
    }
    let relative = |to: u64| (first - to) as usize..(end - to) as usize;
    Some((relative(start), relative(offset)))
}
