//! The log of the device's DMA writes (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_START` to `_REPORT`).
//!
//! The log belongs to addresses, not to mappings: what was written before an unmap can still be reported after it.
//! A START that names ranges logs these; what lies between them is never reported as dirty, for the client said that
//! it does not ask. A START without ranges logs everything (`vfio-user.rst`): all that is mapped, and all that is
//! mapped later.
//!
//! Bitmaps are allocated zeroed and lazily, so that a log costs memory only where the device wrote, and their sum is
//! bounded by [`PAGES_MAX`].

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use limosa_protocol::Errno;
use limosa_protocol::bitmap::{DirtyBitmap, Grid, words_for};
use limosa_protocol::feature::DmaLoggingRange;

use super::export::{DirtyWords, ExportedLog};

/// How many pages a log can have: 8 TiB at 4 KiB, 256 MiB of bitmap when the device has written everywhere.
pub const PAGES_MAX: u64 = 1 << 31;

/// The page size of a log whose hint cannot be kept, in bytes.
const PAGE_SIZE: u64 = 4096;

/// The largest hint that is kept, in bytes.
const PAGE_SIZE_MAX: u64 = 1 << 30;

/// When everything is logged, bitmaps come in multiples of so many pages, so that many small mappings side by side
/// do not have one each.
const WINDOW_PAGES: u64 = 4096;

/// A log is exported in pieces of so many pages, without those that are clean.
const EXPORTED_PAGES: u64 = 1 << 18;

pub(super) struct Log {
    page_size: u64,
    everything: bool,
    /// By address, apart from each other.
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
    /// A clean log of ranges, given as first and last address. `everything` says that more of them may come. E2BIG
    /// beyond [`PAGES_MAX`], ENOMEM.
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

    /// Makes the log, if it is one of everything, cover a range that is mapped now. Errors as for [`Log::new`]; then
    /// nothing has changed.
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

    /// The whole pages, or windows of pages, of these ranges: in order, and apart from each other.
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

    /// Marks the pages of `bytes` bytes, at least one, that the device wrote, the last of them at most at 2^64. Not
    /// while a report is made: both are for the holders of a lock, this one of a shared lock. `hint` is the segment that was
    /// marked last.
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

    /// Sets the bits of the pages in a range that are marked, and takes the marks away.
    pub(super) fn report(&mut self, first: u64, last: u64, to: Grid, words: &mut [u64]) {
        let at = self.first_ending_at(first);
        for segment in self.segments[at..].iter_mut().take_while(|segment| segment.grid.iova <= last) {
            let (first, last) = (first.max(segment.grid.iova), last.min(segment.last));
            segment.bitmap.report_exclusive(segment.grid, words, to, first, last - first + 1);
        }
    }

    /// The log as it is.
    pub(super) fn export(&self) -> ExportedLog {
        let range = |segment: &Segment| DmaLoggingRange {
            iova: segment.grid.iova,
            // A segment does not have all 2^64, for its pages would be too many.
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

    /// A log as it was. EINVAL for one that cannot be; else errors as for [`Log::new`].
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

    /// The range of whole pages, or windows of pages, round a range.
    fn rounded(&self, first: u64, last: u64) -> (u64, u64) {
        let unit = if self.everything { self.page_size * WINDOW_PAGES } else { self.page_size };
        (first & !(unit - 1), last | (unit - 1))
    }

    /// The index of the first segment that ends at or after an address.
    fn first_ending_at(&self, iova: u64) -> usize {
        self.segments.partition_point(|segment| segment.last < iova)
    }

    /// Adds segments for ranges of whole pages that are in order and apart from each other and from those there are.
    fn add(&mut self, ranges: Vec<(u64, u64)>) -> Result<(), Errno> {
        let shift = self.page_size.trailing_zeros();
        let pages = |first: u64, last: u64| ((last - first) >> shift) + 1;
        let there = self.segments.iter().map(|segment| segment.bitmap.pages());
        // Neither sum overflows: ranges that are apart have at most 2^52 pages together.
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
