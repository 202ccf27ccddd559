//! [`PageFrames`]: makes frames of dirty pages, for one link (`docs/stream.md: MEMORY_DATA`, `MEMORY_ZERO`, `MEMORY_RUNS`). It
//! finds pages that are zero, and puts runs that are not next to each other into one frame. Pages are copied into the frame, or over a
//! link without checksums sent from where they lie.

use std::ops::Range;

use limosa_guest_memory::{PinnedBytes, SendPart};
use limosa_stream::buffer::Buffer;
use limosa_stream::{DATA_BYTES_MAX, Kind, RunningCrc, RunsTable};

use super::super::sending::Sending;
use crate::memory::{DataRun, MemoryRegion, PAGE_BYTES, cut_short, is_zero};
use crate::wire::Frame;
use crate::{Error, Result};

/// Zeroes of this length have a frame of their own, which the next zeroes can lengthen.
const LONG_ZERO_BYTES: u64 = 64 << 10;
/// Pages are copied, searched for zeroes and added to the checksum in pieces of this length, while a piece is in a near cache.
const PIECE_BYTES: usize = 64 << 10;
/// A run of zeroes that has reached this length is sent, and the next frame begins another.
const ZERO_BYTES_MAX: u64 = 1 << 30;

pub(super) struct PageFrames<'s, 'w, 'a> {
    link: usize,
    sending: &'s Sending<'w, 'a>,
    /// The region of the runs in the table, and its address.
    region: u32,
    iova: u64,
    table: RunsTable,
    /// The pages of the table's runs, one after the other. With no pages, its end.
    pages: Buffer,
    /// The checksum of the first bytes in `pages`.
    crc: PagesCrc,
    /// Whether pages are sent from where they lie.
    in_place: bool,
    /// Where the pages of the table's runs lie, if they are not in `pages`.
    pinned: Vec<(PinnedBytes, Range<usize>)>,
    /// The parts of a run that are not known to be zero.
    found: Vec<DataRun>,
    /// A long run of zeroes that is not sent yet: region, offset and bytes.
    zeroes: Option<(u32, u64, u64)>,
}

/// The checksum of the first bytes of a payload, which is computed as the payload grows.
#[derive(Default)]
struct PagesCrc {
    /// Whether frames have a checksum of these bytes.
    is_wanted: bool,
    crc: RunningCrc,
    bytes: usize,
}

impl PagesCrc {
    /// Adds the bytes that have come since the last call. These are all of them.
    fn extend(&mut self, all: &[u8]) {
        if self.is_wanted {
            self.crc.add(&all[self.bytes..]);
            self.bytes = all.len();
        }
    }

    /// The checksum of a payload that begins with the bytes of the last call, if it has no fewer. The next payload begins.
    fn end(&mut self, payload: &[u8]) -> Option<u32> {
        let is_known = self.is_wanted && self.bytes <= payload.len();
        if is_known {
            self.extend(payload);
        }
        let PagesCrc { crc, .. } =
            std::mem::replace(self, PagesCrc { is_wanted: self.is_wanted, ..PagesCrc::default() });
        is_known.then(|| crc.value())
    }
}

impl<'s, 'w, 'a> PageFrames<'s, 'w, 'a> {
    pub(super) fn new(link: usize, sending: &'s Sending<'w, 'a>) -> PageFrames<'s, 'w, 'a> {
        let pages = Buffer::new(sending.recorder().buffers());
        let table = RunsTable::new(PAGE_BYTES);
        let writer = sending.writers[link];
        PageFrames {
            link,
            sending,
            region: 0,
            iova: 0,
            table,
            pages,
            crc: PagesCrc { is_wanted: writer.sums_pages(), ..PagesCrc::default() },
            in_place: writer.sends_in_place(),
            pinned: Vec::new(),
            found: Vec::new(),
            zeroes: None,
        }
    }

    /// Adds a run of dirty pages: at most as many as a frame takes, and behind those that were added before, where these are of
    /// the same region and round. Memory that is known to be zero is not read, so that untouched memory stays untouched.
    pub(super) fn add(&mut self, region: &MemoryRegion<'_>, run: Range<u64>) -> Result<()> {
        if self.region != region.id {
            self.send()?;
            (self.region, self.iova) = (region.id, region.iova);
        }
        let mut found = std::mem::take(&mut self.found);
        region.data_runs(run.clone(), &mut found)?;
        let mut from = run.start;
        for data in &found {
            self.add_zeroes(from, data.range.start - from)?;
            // More than a frame takes only where a hole was written since it was found.
            for begin in data.range.clone().step_by(DATA_BYTES_MAX) {
                let end = data.range.end.min(begin + DATA_BYTES_MAX as u64);
                self.read(region, &DataRun { range: begin..end, ..*data })?;
            }
            from = data.range.end;
        }
        self.found = found;
        self.add_zeroes(from, run.end - from)
    }

    /// Sends the rest.
    pub(super) fn finish(&mut self) -> Result<()> {
        self.send()?;
        self.send_zeroes()
    }

    /// Adds pages to the frame. Those that are zero are dropped from it.
    fn read(&mut self, region: &MemoryRegion<'_>, data: &DataRun) -> Result<()> {
        let is_at_hand = self.in_place && !data.has_holes;
        let pinned = if is_at_hand { region.pin(data.range.clone(), false)? } else { None };
        // A frame has its pages in one place or where they lie.
        if self.table.data_bytes() > 0 && self.pinned.is_empty() == pinned.is_some() {
            self.send()?;
        }
        match pinned {
            Some(pinned) => self.add_pinned(region, &data.range, &pinned),
            None => self.copy(region, data),
        }
    }

    fn add_pinned(
        &mut self,
        region: &MemoryRegion<'_>,
        range: &Range<u64>,
        pinned: &PinnedBytes,
    ) -> Result<()> {
        let lost = |at: usize| region.failed(range.start + at as u64, cut_short());
        let is_zero = |at: usize| pinned.is_zero(at..at + PAGE_BYTES as usize).map_err(|_| lost(at));
        let mut at = 0;
        while at < pinned.len() {
            let (begin, is_zero_run) = (at, is_zero(at)?);
            at += PAGE_BYTES as usize;
            while at < pinned.len() && is_zero(at)? == is_zero_run {
                at += PAGE_BYTES as usize;
            }
            let (offset, bytes) = (range.start + begin as u64, (at - begin) as u64);
            if is_zero_run {
                self.add_zeroes(offset, bytes)?;
                continue;
            }
            while !self.table.add(offset, bytes, false) {
                self.send()?;
            }
            self.pinned.push((pinned.clone(), begin..at));
        }
        // Zeroes may be those of a page that is gone.
        pinned.check().map_err(|_| lost(0))
    }

    /// Copies pages into the frame.
    fn copy(&mut self, region: &MemoryRegion<'_>, data: &DataRun) -> Result<()> {
        let range = &data.range;
        let bytes = (range.end - range.start) as usize;
        // At worst each page is a run of its own.
        let table_bytes = self.table.tail_bytes() + RunsTable::bytes_of(bytes / PAGE_BYTES as usize);
        if self.table.data_bytes() as usize + bytes + table_bytes > DATA_BYTES_MAX {
            self.send()?;
        }
        self.pages.grow(self.table.data_bytes() as usize + bytes);
        for begin in range.clone().step_by(PIECE_BYTES) {
            self.copy_piece(region, data, begin..range.end.min(begin + PIECE_BYTES as u64))?;
        }
        Ok(())
    }

    fn copy_piece(&mut self, region: &MemoryRegion<'_>, data: &DataRun, range: Range<u64>) -> Result<()> {
        let mut at = self.table.data_bytes() as usize;
        let end = at + (range.end - range.start) as usize;
        region.read_run(data, range.start, &mut self.pages[at..end])?;
        let mut offset = range.start;
        while at < end {
            let (is_zero, bytes) = first_run(&self.pages[at..end]);
            if is_zero {
                self.add_zeroes(offset, bytes as u64)?;
            } else {
                while !self.table.add(offset, bytes as u64, false) {
                    // The table would have its place where the pages are that follow.
                    self.send_each()?;
                }
                let begin = self.table.data_bytes() as usize - bytes;
                if begin != at {
                    self.pages.copy_within(at..at + bytes, begin);
                }
            }
            at += bytes;
            offset += bytes as u64;
        }
        self.crc.extend(&self.pages[..self.table.data_bytes() as usize]);
        Ok(())
    }

    fn add_zeroes(&mut self, at: u64, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        if let Some((region, begin, length)) = &mut self.zeroes
            && *region == self.region
            && *begin + *length == at
            && *length + bytes <= ZERO_BYTES_MAX
        {
            *length += bytes;
            return Ok(());
        }
        if bytes < LONG_ZERO_BYTES && self.sending.takes_runs() && self.table.add(at, bytes, true) {
            return Ok(());
        }
        self.send_zeroes()?;
        self.zeroes = Some((self.region, at, bytes));
        Ok(())
    }

    fn send_zeroes(&mut self) -> Result<()> {
        match self.zeroes.take() {
            Some((region, at, bytes)) => self.post_zeroes(region, at, bytes),
            None => Ok(()),
        }
    }

    /// Sends the runs of the table, several of them in one frame.
    fn send(&mut self) -> Result<()> {
        if self.table.len() < 2 || !self.sending.takes_runs() {
            return self.send_each();
        }
        let pages = if self.pinned.is_empty() { self.table.data_bytes() as usize } else { 0 };
        let end = pages + self.table.tail_bytes();
        self.pages.grow(end);
        self.table.encode(&mut self.pages[pages..end]);
        let payload = &self.pages[..end];
        let frame = Frame::of(self.region, Kind::MEMORY_RUNS, payload).at(self.table.position());
        let frame = frame.with_crc(self.crc.end(payload));
        if self.pinned.is_empty() {
            self.sending.send_memory(self.link, &frame)?;
        } else {
            let all = self.pinned.len();
            self.send_pinned(&frame, 0..all, payload)?;
            self.pinned.clear();
        }
        self.sending.recorder().memory_data(self.table.data_bytes());
        self.sending.recorder().memory_zero(self.table.zero_bytes());
        self.table.clear();
        Ok(())
    }

    /// Sends the runs of the table, each in a frame of its own. Bytes behind the pages of the table stay.
    fn send_each(&mut self) -> Result<()> {
        if !self.pinned.is_empty() {
            return self.send_each_pinned();
        }
        let mut begin = 0;
        for (offset, bytes, is_zero) in self.table.runs() {
            if is_zero {
                self.post_zeroes(self.region, offset, bytes)?;
                continue;
            }
            let pages = &self.pages[begin..begin + bytes as usize];
            let crc = if begin == 0 { self.crc.end(pages) } else { None };
            let frame = Frame::of(self.region, Kind::MEMORY_DATA, pages).at(offset).with_crc(crc);
            self.sending.send_memory(self.link, &frame)?;
            self.sending.recorder().memory_data(bytes);
            begin += bytes as usize;
        }
        self.table.clear();
        Ok(())
    }

    fn send_each_pinned(&mut self) -> Result<()> {
        let mut begin = 0;
        for (offset, bytes, is_zero) in self.table.runs() {
            if is_zero {
                self.post_zeroes(self.region, offset, bytes)?;
                continue;
            }
            let (mut end, mut found) = (begin, 0);
            while found < bytes as usize {
                found += self.pinned[end].1.len();
                end += 1;
            }
            let frame = Frame::of(self.region, Kind::MEMORY_DATA, &[]).at(offset);
            self.send_pinned(&frame, begin..end, &[])?;
            self.sending.recorder().memory_data(bytes);
            begin = end;
        }
        self.pinned.clear();
        self.table.clear();
        Ok(())
    }

    /// Sends some of the pinned pages, and `tail` behind them.
    fn send_pinned(&self, frame: &Frame<'_>, which: Range<usize>, tail: &[u8]) -> Result<()> {
        let pinned = &self.pinned[which];
        let address = self.iova.saturating_add(frame.position);
        let mut parts: Vec<_> =
            pinned.iter().map(|(memory, range)| SendPart::Memory(memory, range.clone())).collect();
        parts.push(SendPart::Bytes(tail));
        self.sending.send_pinned(self.link, frame, address, &parts)?;
        let lost = |_| Error::Memory { address, error: cut_short() };
        pinned.iter().try_for_each(|(memory, _)| memory.check()).map_err(lost)
    }

    fn post_zeroes(&self, region: u32, at: u64, bytes: u64) -> Result<()> {
        let length = bytes.to_le_bytes();
        self.sending.post(self.link, &Frame::of(region, Kind::MEMORY_ZERO, &length).at(at))?;
        self.sending.recorder().memory_zero(bytes);
        Ok(())
    }
}

/// Whether the first page is zero, and the length in bytes of the pages from there on that are too, or that are not.
fn first_run(bytes: &[u8]) -> (bool, usize) {
    let mut pages = bytes.chunks(PAGE_BYTES as usize);
    let is_zero_run = pages.next().is_some_and(is_zero);
    let more = pages.take_while(|page| is_zero(page) == is_zero_run).count();
    (is_zero_run, ((more + 1) * PAGE_BYTES as usize).min(bytes.len()))
}
