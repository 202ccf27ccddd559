//! [`Ram`]: dirty pages on their way to the links. A thread for each link takes chunks from one queue and sends them.

mod page_frames;

use std::ops::Range;

use limosa_clockwork::now;
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_stream::DATA_BYTES_MAX;

use page_frames::PageFrames;

use super::sending::Sending;
use super::team::Shared;
use crate::Result;
use crate::memory::{MemoryRegion, PAGE_BYTES};
use crate::protocol::link_count::LinkCount;

/// How much a thread takes at once. Pages that follow each other make a frame of this length, which stays in the second cache of a
/// processor between the copy, the checksum and the send. Shorter ones cost the receiver more wake-ups.
const CHUNK_BYTES: u64 = DATA_BYTES_MAX as u64 / 2;
/// The most of a hole that is taken at once.
const HOLE_BYTES_MAX: u64 = 1 << 30;
/// A round uses one further link for each multiple of this: for fewer bytes, waking its thread costs more than it saves.
const LINK_BYTES_MIN: u64 = 4 << 20;

/// The memory of a source, and the round in which its threads send it.
pub(crate) struct Ram<'m> {
    regions: &'m [MemoryRegion<'m>],
    /// The pages to send, by region.
    pending: &'m [DirtyBitmap],
    round: Shared<RoundState>,
}

/// Where a chunk ends, and how many pages of its last run of dirty pages follow.
struct Rest {
    region: usize,
    page: u64,
    pages: u64,
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
        let mut frames = PageFrames::new(link, sending);
        let mut runs = Vec::new();
        while let Some(region) = self.next(link, sending, &mut runs)? {
            runs.iter().try_for_each(|run| frames.add(region, run.clone()))?;
        }
        frames.finish()
    }

    /// The next chunk for a link: runs of dirty pages of the region that is returned. A link that is not used now waits until it
    /// is, or until all chunks are taken.
    fn next(
        &self,
        link: usize,
        sending: &Sending<'_, '_>,
        runs: &mut Vec<Range<u64>>,
    ) -> Result<Option<&'m MemoryRegion<'m>>> {
        let is_wanted = |round: &RoundState| round.exhausted || link < round.link_count.used();
        let (mut round, _) = sending.team.wait(&self.round, self.round.lock(), None, is_wanted)?;
        let region = if round.exhausted { None } else { self.take(&mut round, runs) };
        round.exhausted |= region.is_none();
        let rest = Rest { region: round.region, page: round.page, pages: round.pages };
        let moved = sending.recorder().totals().memory_bytes;
        let changed = link == 0 && round.link_count.sent(moved, now());
        drop(round);
        if changed || region.is_none() {
            self.round.notify_all();
        }
        if let (Some(region), [run]) = (region, &mut runs[..]) {
            self.take_hole(region, run, &rest)?;
        }
        Ok(region)
    }

    /// Takes the rest of a hole that reaches beyond the chunk, so that no further search is needed for it.
    fn take_hole(&self, region: &MemoryRegion<'_>, run: &mut Range<u64>, rest: &Rest) -> Result<()> {
        if rest.pages == 0 {
            return Ok(());
        }
        let end = (run.end + rest.pages * PAGE_BYTES).min(run.start + HOLE_BYTES_MAX);
        let hole_end = region.data(run.start..end)?.map_or(end, |data| data.start);
        if hole_end <= run.end {
            return Ok(());
        }
        let mut round = self.round.lock();
        // Another link may have taken some of it meanwhile.
        if (round.region, round.page, round.pages) == (rest.region, rest.page, rest.pages) {
            let pages = (hole_end - run.end) / PAGE_BYTES;
            (round.page, round.pages) = (rest.page + pages, rest.pages - pages);
            run.end = hole_end;
        }
        Ok(())
    }

    fn take(&self, round: &mut RoundState, runs: &mut Vec<Range<u64>>) -> Option<&'m MemoryRegion<'m>> {
        runs.clear();
        let mut room = CHUNK_BYTES / PAGE_BYTES;
        while room > 0 {
            if round.pages == 0 {
                let pending = self.pending.get(round.region)?;
                match pending.runs_from(round.page).next() {
                    Some(run) => (round.page, round.pages) = run,
                    None if !runs.is_empty() => break,
                    None => {
                        (round.region, round.page) = (round.region + 1, 0);
                        continue;
                    }
                }
            }
            let (first, pages) = (round.page, round.pages.min(room));
            (round.page, round.pages) = (first + pages, round.pages - pages);
            runs.push(first * PAGE_BYTES..(first + pages) * PAGE_BYTES);
            room -= pages;
        }
        self.regions.get(round.region)
    }
}
