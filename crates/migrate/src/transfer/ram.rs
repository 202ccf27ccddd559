//! [`Ram`]: dirty pages on their way to the links. A thread for each link takes chunks from one queue, copies them, and sends
//! pages that are not zero as data and the others as runs of zeroes.

use limosa_clockwork::now;
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_stream::buffer::Buffer;
use limosa_stream::{DATA_BYTES_MAX, Kind};

use super::sending::Sending;
use super::team::Shared;
use crate::Result;
use crate::memory::{MemoryRegion, PAGE_BYTES, is_zero};
use crate::protocol::link_count::LinkCount;
use crate::wire::Frame;

/// How much is copied and sent at once: a frame of the maximum length. Each frame costs the receiver a wake-up or two, which
/// outweighs that a chunk of this size does not stay in the nearest cache.
const CHUNK_BYTES: u64 = DATA_BYTES_MAX as u64;
/// A round uses one further link for each multiple of this: for fewer bytes, waking its thread costs more than it saves.
const LINK_BYTES_MIN: u64 = 4 << 20;
/// A run of zeroes that has reached this length is sent, and the next frame begins another.
const ZERO_BYTES_MAX: u64 = 1 << 30;

/// The memory of a source, and the round in which its threads send it.
pub(crate) struct Ram<'m> {
    regions: &'m [MemoryRegion<'m>],
    /// The pages to send, by region.
    pending: &'m [DirtyBitmap],
    round: Shared<RoundState>,
}

struct RoundState {
    number: u64,
    /// The region of the next chunk, the next page of its run of dirty pages, and the length of the rest of the run.
    region: usize,
    page: u64,
    pages: u64,
    exhausted: bool,
    /// Pages that were sent in it still count as pending.
    is_under_way: bool,
    /// How many links take part in the round.
    links: usize,
    /// How many further links' threads have not finished the round.
    active: usize,
    /// How many of these links are used.
    link_count: LinkCount,
}

/// A run of dirty pages of one region.
#[derive(Clone, Copy)]
struct Chunk<'m> {
    region: &'m MemoryRegion<'m>,
    at: u64,
    bytes: u64,
}

impl<'m> Ram<'m> {
    pub(crate) fn new(
        regions: &'m [MemoryRegion<'m>],
        pending: &'m [DirtyBitmap],
        sending: &Sending<'_, '_>,
    ) -> Ram<'m> {
        let link_count = LinkCount::new(sending.writers.len(), sending.options().links_measured);
        let state = RoundState {
            number: 0,
            region: 0,
            page: 0,
            pages: 0,
            exhausted: true,
            is_under_way: false,
            links: 0,
            active: 0,
            link_count,
        };
        Ram { regions, pending, round: sending.team.share(state) }
    }

    /// How many bytes are to be sent.
    pub(crate) fn bytes(&self) -> u64 {
        self.pending.iter().map(|bitmap| bitmap.count() * PAGE_BYTES).sum()
    }

    /// How many bytes are to be sent, without those that a thread has taken in this round.
    pub(crate) fn left(&self) -> u64 {
        let round = self.round.lock();
        if !round.is_under_way {
            return self.bytes();
        }
        if round.exhausted {
            return 0;
        }
        let rest = self.pending.iter().enumerate().skip(round.region).map(|(at, pending)| {
            let from = if at == round.region { round.page + round.pages } else { 0 };
            pending.runs_from(from).map(|(_, pages)| pages).sum::<u64>()
        });
        (round.pages + rest.sum::<u64>()) * PAGE_BYTES
    }

    /// Sends every pending page, over as many links as pay. The calling thread sends over the first one.
    pub(crate) fn send_round(&self, sending: &Sending<'_, '_>) -> Result<()> {
        let links = (self.bytes() / LINK_BYTES_MIN + 1).min(sending.writers.len() as u64) as usize;
        {
            let mut round = self.round.lock();
            round.number += 1;
            (round.region, round.page, round.pages) = (0, 0, 0);
            (round.exhausted, round.is_under_way) = (false, true);
            (round.links, round.active) = (links, links - 1);
            round.link_count.pause();
        }
        self.round.notify_all();
        self.send_chunks(0, sending)?;
        drop(sending.team.wait(&self.round, self.round.lock(), None, |round| round.active == 0)?);
        self.pending.iter().for_each(DirtyBitmap::clear);
        self.round.lock().is_under_way = false;
        sending.end_round();
        Ok(())
    }

    /// The body of a further link's thread.
    pub(crate) fn work(&self, link: usize, sending: &Sending<'_, '_>) -> Result<()> {
        let mut seen = 0;
        loop {
            let takes_part = |round: &RoundState| round.number != seen && link < round.links;
            let (round, _) = sending.team.wait(&self.round, self.round.lock(), None, takes_part)?;
            seen = round.number;
            drop(round);
            self.send_chunks(link, sending)?;
            self.round.lock().active -= 1;
            self.round.notify_all();
        }
    }

    /// Sends chunks over one link until none is left.
    fn send_chunks(&self, link: usize, sending: &Sending<'_, '_>) -> Result<()> {
        let recorder = sending.recorder();
        let mut buffer = Buffer::new(recorder.buffers());
        let mut zeroes = Zeroes { link, sending, run: None };
        while let Some(Chunk { region, at, bytes }) = self.next(link, sending)? {
            let end = at + bytes;
            let mut from = at;
            // Memory that is known to be zero is not read, so that untouched memory stays untouched.
            while let Some(data) = region.data(from..end)? {
                zeroes.add(region.id, from, data.start - from)?;
                buffer.grow(CHUNK_BYTES as usize);
                let piece = &mut buffer[..(data.end - data.start) as usize];
                region.read(data.start, piece)?;
                let mut offset = data.start;
                for run in (Runs { bytes: piece }) {
                    if run.zero {
                        zeroes.add(region.id, offset, run.bytes.len() as u64)?;
                    } else {
                        let frame = Frame::of(region.id, Kind::MEMORY_DATA, run.bytes).at(offset);
                        sending.send_memory(link, &frame)?;
                        recorder.memory_data(run.bytes.len() as u64);
                    }
                    offset += run.bytes.len() as u64;
                }
                from = data.end;
            }
            zeroes.add(region.id, from, end - from)?;
        }
        zeroes.flush()
    }

    /// The next chunk for a link. A link that is not used now waits until it is, or until all chunks are taken.
    fn next(&self, link: usize, sending: &Sending<'_, '_>) -> Result<Option<Chunk<'m>>> {
        let is_wanted = |round: &RoundState| round.exhausted || link < round.link_count.used();
        let (mut round, _) = sending.team.wait(&self.round, self.round.lock(), None, is_wanted)?;
        let chunk = if round.exhausted { None } else { self.take(&mut round) };
        round.exhausted |= chunk.is_none();
        let moved = sending.recorder().totals().memory_bytes;
        let changed = link == 0 && round.link_count.sent(moved, now());
        drop(round);
        if changed || chunk.is_none() {
            self.round.notify_all();
        }
        Ok(chunk)
    }

    fn take(&self, round: &mut RoundState) -> Option<Chunk<'m>> {
        while round.pages == 0 {
            let pending = self.pending.get(round.region)?;
            match pending.runs_from(round.page).next() {
                Some(run) => (round.page, round.pages) = run,
                None => (round.region, round.page) = (round.region + 1, 0),
            }
        }
        let region = self.regions.get(round.region)?;
        let (first, pages) = (round.page, round.pages.min(CHUNK_BYTES / PAGE_BYTES));
        (round.page, round.pages) = (first + pages, round.pages - pages);
        Some(Chunk { region, at: first * PAGE_BYTES, bytes: pages * PAGE_BYTES })
    }
}

/// Consecutive pages that are all zero, or all not zero.
struct Run<'b> {
    bytes: &'b [u8],
    zero: bool,
}

/// Splits pages into such runs.
struct Runs<'b> {
    bytes: &'b [u8],
}

impl<'b> Iterator for Runs<'b> {
    type Item = Run<'b>;

    fn next(&mut self) -> Option<Run<'b>> {
        let mut pages = self.bytes.chunks(PAGE_BYTES as usize);
        let zero = is_zero(pages.next()?);
        let more = pages.take_while(|page| is_zero(page) == zero).count();
        let (bytes, rest) = self.bytes.split_at(((more + 1) * PAGE_BYTES as usize).min(self.bytes.len()));
        self.bytes = rest;
        Some(Run { bytes, zero })
    }
}

/// The current run of zeroes, which the next chunk may continue.
struct Zeroes<'s, 'w, 'a> {
    link: usize,
    sending: &'s Sending<'w, 'a>,
    /// Region, offset and bytes.
    run: Option<(u32, u64, u64)>,
}

impl Zeroes<'_, '_, '_> {
    fn add(&mut self, region: u32, at: u64, bytes: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        if let Some((same, begin, length)) = &mut self.run
            && *same == region
            && *begin + *length == at
            && *length + bytes <= ZERO_BYTES_MAX
        {
            *length += bytes;
            return Ok(());
        }
        self.flush()?;
        self.run = Some((region, at, bytes));
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if let Some((region, at, bytes)) = self.run.take() {
            let length = bytes.to_le_bytes();
            self.sending.post(self.link, &Frame::of(region, Kind::MEMORY_ZERO, &length).at(at))?;
            self.sending.recorder().memory_zero(bytes);
        }
        Ok(())
    }
}
