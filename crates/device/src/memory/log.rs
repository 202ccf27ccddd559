//! The log of the device's DMA writes (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_START` to `_REPORT`).
//!
//! The log belongs to addresses, not to mappings: writes before an unmap can still be reported after it. A START with
//! ranges logs these; addresses between them are never reported as dirty, since the client has not asked for them. A
//! START without ranges logs everything (`vfio-user.rst`): all current and later mappings.
//!
//! Bitmaps are allocated zeroed and lazily, so that a log uses memory only for pages that the device wrote, and their
//! total size is bounded by [`PAGES_MAX`].

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use limosa_protocol::Errno;
use limosa_protocol::bitmap::{DirtyBitmap, Grid, words_for};
use limosa_protocol::feature::DmaLoggingRange;

use super::export::{DirtyWords, ExportedLog};

/// Limit on the pages of a log: 8 TiB at 4 KiB, 256 MiB of bitmap if the device has written everywhere.
pub const PAGES_MAX: u64 = 1 << 31;

/// The page size of a log whose hint cannot be followed, in bytes.
const PAGE_SIZE: u64 = 4096;

/// The largest hint that is followed, in bytes.
const PAGE_SIZE_MAX: u64 = 1 << 30;

/// If everything is logged, bitmaps have multiples of this number of pages, so that many small adjacent mappings
/// share one.
const WINDOW_PAGES: u64 = 4096;

/// A log is exported in pieces of this number of pages, without clean ones.
const EXPORTED_PAGES: u64 = 1 << 18;

pub(super) struct Log {
    page_size: u64,
    everything: bool,
    /// By address, not adjacent.
    segments: Vec<Segment>,
}

struct Segment {
    grid: Grid,
    last: u64,
    /// log2 of the page size.
    shift: u32,
    bitmap: DirtyBitmap,
}

/// The page size for a hint that is a power of two.
pub(super) fn page_size_for(hint: u64) -> u64 {
    if (PAGE_SIZE..=PAGE_SIZE_MAX).contains(&hint) { hint } else { PAGE_SIZE }
}

impl Log {
    /// A clean log of ranges, given as first and last address. `everything` says that more ranges may be added.
    /// E2BIG beyond [`PAGES_MAX`], ENOMEM.
    pub(super) fn new(
        page_size: u64,
        everything: bool,
        ranges: impl Iterator<Item = (u64, u64)>,
    ) -> Result<Log, Errno> {
        let mut log = Log { page_size, everything, segments: Vec::new() };
        let ranges = log.joined(ranges);
        log.add(ranges)?;
        Ok(log)
    }

    /// Extends a log of everything to a newly mapped range. Errors as for [`Log::new`]; then nothing has changed.
    pub(super) fn cover(&mut self, first: u64, last: u64) -> Result<(), Errno> {
        self.cover_all(std::iter::once((first, last)))
    }

    /// The same for several ranges.
    pub(super) fn cover_all(&mut self, ranges: impl Iterator<Item = (u64, u64)>) -> Result<(), Errno> {
        if !self.everything {
            return Ok(());
        }
        let gaps = self.joined(ranges).into_iter().flat_map(|(first, last)| self.gaps(first, last)).collect();
        self.add(gaps)
    }

    /// The whole pages, or windows of pages, of these ranges: in order, and not adjacent.
    fn joined(&self, ranges: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
        let mut ranges: Vec<_> = ranges.map(|(first, last)| self.rounded(first, last)).collect();
        ranges.sort_unstable();
        ranges.dedup_by(|next, former| {
            let joins = former.1.checked_add(1).is_none_or(|end| next.0 <= end);
            if joins {
                former.1 = former.1.max(next.1);
            }
            joins
        });
        ranges
    }

    /// The parts of a range that are in no segment.
    fn gaps(&self, mut first: u64, last: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        for segment in &self.segments[self.first_ending_at(first)..] {
            if segment.grid.iova > last {
                break;
            }
            if first < segment.grid.iova {
                gaps.push((first, segment.grid.iova - 1));
            }
            match segment.last.checked_add(1) {
                Some(end) if end <= last => first = end,
                _ => return gaps,
            }
        }
        gaps.push((first, last));
        gaps
    }

    /// Marks the pages of `bytes` bytes (at least one, ending at 2^64 at most) that the device wrote. Needs a
    /// shared lock; a report needs the exclusive one. `hint` is the segment that was marked last.
    #[inline]
    pub(super) fn mark(&self, first: u64, bytes: usize, hint: &AtomicUsize) {
        let last = first + (bytes as u64 - 1);
        match self.segments.get(hint.load(Relaxed)) {
            Some(segment) if segment.grid.iova <= first && last <= segment.last => segment.mark(first, last),
            _ => self.mark_far(first, last, hint),
        }
    }

    #[cold]
    fn mark_far(&self, first: u64, last: u64, hint: &AtomicUsize) {
        let at = self.first_ending_at(first);
        for segment in self.segments[at..].iter().take_while(|segment| segment.grid.iova <= last) {
            segment.mark(first.max(segment.grid.iova), last.min(segment.last));
        }
        hint.store(at, Relaxed);
    }

    /// Sets the bits of the marked pages in a range, and clears the marks.
    pub(super) fn report(&mut self, first: u64, last: u64, to: Grid, words: &mut [u64]) {
        let at = self.first_ending_at(first);
        for segment in self.segments[at..].iter_mut().take_while(|segment| segment.grid.iova <= last) {
            let (first, last) = (first.max(segment.grid.iova), last.min(segment.last));
            segment.bitmap.report_exclusive(segment.grid, words, to, first, last - first + 1);
        }
    }

    /// Sets the bits of the pages in a range that may be marked, and changes nothing.
    pub(super) fn look(&self, first: u64, last: u64, to: Grid, words: &mut [u64]) {
        let at = self.first_ending_at(first);
        for segment in self.segments[at..].iter().take_while(|segment| segment.grid.iova <= last) {
            let (first, last) = (first.max(segment.grid.iova), last.min(segment.last));
            segment.bitmap.look(segment.grid, words, to, first, last - first + 1);
        }
    }

    /// Exports the log.
    pub(super) fn export(&self) -> ExportedLog {
        let range = |segment: &Segment| DmaLoggingRange {
            iova: segment.grid.iova,
            // A segment never covers all 2^64 bytes, since it would have too many pages.
            length: segment.last - segment.grid.iova + 1,
        };
        let mut dirty = Vec::new();
        for segment in &self.segments {
            let pages = segment.bitmap.pages();
            for first in (0..pages).step_by(EXPORTED_PAGES as usize) {
                let pages = EXPORTED_PAGES.min(pages - first);
                let mut words = vec![0; words_for(pages)];
                segment.bitmap.read(first, pages, &mut words);
                if words.iter().any(|word| *word != 0) {
                    let iova = segment.grid.iova + (first << segment.shift);
                    dirty.push(DirtyWords { iova, pages, words });
                }
            }
        }
        let ranges = self.segments.iter().map(range).collect();
        ExportedLog { page_size: self.page_size, everything: self.everything, ranges, dirty }
    }

    /// A log from its export. EINVAL for an invalid one; otherwise errors as for [`Log::new`].
    pub(super) fn import(from: &ExportedLog) -> Result<Log, Errno> {
        let page_size = from.page_size;
        if !page_size.is_power_of_two() || page_size_for(page_size) != page_size {
            return Err(Errno::EINVAL);
        }
        let mut log = Log { page_size, everything: from.everything, segments: Vec::new() };
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for range in &from.ranges {
            let last = range.length.checked_sub(1).and_then(|more| range.iova.checked_add(more));
            let last = last.ok_or(Errno::EINVAL)?;
            let is_whole = range.iova.is_multiple_of(page_size) && last % page_size == page_size - 1;
            if !is_whole || ranges.last().is_some_and(|before| before.1 >= range.iova) {
                return Err(Errno::EINVAL);
            }
            ranges.push((range.iova, last));
        }
        log.add(ranges)?;
        for dirty in &from.dirty {
            let segment = log.segments.get(log.first_ending_at(dirty.iova)).ok_or(Errno::EINVAL)?;
            let from = dirty.iova.checked_sub(segment.grid.iova).ok_or(Errno::EINVAL)?;
            let first = from >> segment.shift;
            let fits = from.is_multiple_of(page_size)
                && first.checked_add(dirty.pages).is_some_and(|end| end <= segment.bitmap.pages())
                && dirty.words.len() == words_for(dirty.pages);
            if !fits {
                return Err(Errno::EINVAL);
            }
            segment.bitmap.or_words(first, &dirty.words, dirty.pages);
        }
        Ok(log)
    }

    /// The smallest range of whole pages, or windows of pages, that contains a range.
    fn rounded(&self, first: u64, last: u64) -> (u64, u64) {
        let unit = if self.everything { self.page_size * WINDOW_PAGES } else { self.page_size };
        (first & !(unit - 1), last | (unit - 1))
    }

    /// The index of the first segment that ends at or after an address.
    fn first_ending_at(&self, iova: u64) -> usize {
        self.segments.partition_point(|segment| segment.last < iova)
    }

    /// Adds segments for ranges of whole pages that are in order and not adjacent to each other or to existing
    /// segments.
    fn add(&mut self, ranges: Vec<(u64, u64)>) -> Result<(), Errno> {
        let shift = self.page_size.trailing_zeros();
        let pages = |first: u64, last: u64| ((last - first) >> shift) + 1;
        let there = self.segments.iter().map(|segment| segment.bitmap.pages());
        // Neither sum overflows: non-overlapping ranges have at most 2^52 pages together.
        if there.sum::<u64>() + ranges.iter().map(|(first, last)| pages(*first, *last)).sum::<u64>()
            > PAGES_MAX
        {
            return Err(Errno::E2BIG);
        }
        let segment = |(first, last)| {
            let grid = Grid { iova: first, page_size: self.page_size };
            Ok(Segment { grid, last, shift, bitmap: DirtyBitmap::new(pages(first, last))? })
        };
        let segments = ranges.into_iter().map(segment).collect::<Result<Vec<_>, Errno>>()?;
        self.segments.extend(segments);
        self.segments.sort_by_key(|segment| segment.grid.iova);
        Ok(())
    }
}

impl Segment {
    #[inline]
    fn mark(&self, first: u64, last: u64) {
        let page = (first - self.grid.iova) >> self.shift;
        let last_page = (last - self.grid.iova) >> self.shift;
        self.bitmap.set_range_locked(page, last_page - page + 1);
    }
}
