//! Dirty bitmaps (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`, the log behind a report): [`DirtyBitmap`], in which
//! many threads mark pages, and functions over plain words, the form of reports and of the wire.

mod regranulate;
mod words;

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use zerocopy::FromZeros;

use crate::Errno;
pub use regranulate::{Grid, regranulate};
use regranulate::{look, report};
use words::{Runs, Span, load, or_at};
pub use words::{
    any, clear_range, count, get, is_empty, or_into, or_range, runs, runs_in, set_range, words_for,
};

/// A bitmap of pages that any number of threads mark while others harvest.
///
/// Memory is allocated when it is touched: a bitmap of a terabyte without marks uses only address space, and its
/// harvest touches nothing.
///
/// **No mark is lost.** A device writes memory first and marks the page afterwards. A mark of
/// [`DirtyBitmap::set_range`] is either in the current harvest, and then a thread that harvested it and reads the page
/// sees the write, or in a later one. [`DirtyBitmap::set_range_locked`] is cheaper on pages that are already marked and
/// needs a lock for the same guarantee.
///
/// A second bitmap has a bit for each block of 4096 pages that may have marks. Searches for marks skip the other
/// blocks, so that the time of a harvest depends on the number of marks, not on the size of the memory. A block counts
/// as clean again after [`DirtyBitmap::harvest_exclusive`] or [`DirtyBitmap::clear`].
///
/// Ranges outside the bitmap are a mistake of the caller and panic, like an index into a slice.
pub struct DirtyBitmap {
    words: Vec<AtomicU64>,
    /// Bit *n* is set when block *n* may have a mark. Set after the mark, and before the call that marks returns.
    blocks: Vec<AtomicU64>,
    pages: u64,
}

/// The words of a block.
const BLOCK_WORDS: usize = 64;

impl DirtyBitmap {
    /// A bitmap of `pages` pages, all clean. [`Errno::ENOMEM`] if there is no address space for it.
    pub fn new(pages: u64) -> Result<DirtyBitmap, Errno> {
        let words = AtomicU64::new_vec_zeroed(words_for(pages)).map_err(|_| Errno::ENOMEM)?;
        let blocks =
            AtomicU64::new_vec_zeroed(words.len().div_ceil(BLOCK_WORDS * 64)).map_err(|_| Errno::ENOMEM)?;
        Ok(DirtyBitmap { words, blocks, pages })
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Marks one page.
    #[inline]
    pub fn set(&self, page: u64) {
        self.set_range(page, 1);
    }

    /// Marks `len` pages from `start` on.
    ///
    /// Uses an atomic OR for a part of a word and a store for a whole one, both releasing: the thread that harvests the
    /// mark sees the earlier writes of this thread.
    #[inline]
    pub fn set_range(&self, start: u64, len: u64) {
        let Some(span) = Span::of(start, len, self.pages) else { return };
        if span.first == span.last {
            self.words[span.first].fetch_or(span.mask(span.first), Release);
        } else {
            for (at, word) in self.words[span.first..=span.last].iter().enumerate() {
                match span.mask(span.first + at) {
                    u64::MAX => word.store(!0, Release),
                    mask => drop(word.fetch_or(mask, Release)),
                }
            }
        }
        self.mark_blocks(span.first, span.last);
    }

    /// Marks `len` pages from `start` on, without atomic operations on words that are already marked.
    ///
    /// Call it only while holding a lock that every harvest takes exclusively (or that gives it `&mut self`). Otherwise
    /// a page can be lost: the thread's write may not yet be visible when it sees the existing mark and leaves it, and
    /// a harvest clears that mark and reads the page without the write. With the lock, the write is visible before the
    /// harvest begins.
    #[inline]
    pub fn set_range_locked(&self, start: u64, len: u64) {
        let Some(span) = Span::of(start, len, self.pages) else { return };
        for (at, word) in self.words[span.first..=span.last].iter().enumerate() {
            let mask = span.mask(span.first + at);
            if word.load(Relaxed) & mask != mask {
                word.fetch_or(mask, Release);
            }
        }
        self.mark_blocks(span.first, span.last);
    }

    /// Notes that these words may have marks.
    #[inline]
    fn mark_blocks(&self, first: usize, last: usize) {
        for block in first / BLOCK_WORDS..=last / BLOCK_WORDS {
            let (word, bit) = (&self.blocks[block / 64], 1 << (block % 64));
            if word.load(Relaxed) & bit == 0 {
                word.fetch_or(bit, Release);
            }
        }
    }

    /// The words from `first` to `last` whose blocks may have marks, as ranges in ascending order.
    fn marked(&self, first: usize, last: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        marked_blocks(&self.blocks, first / BLOCK_WORDS, last / BLOCK_WORDS).map(move |block| {
            let begin = block * BLOCK_WORDS;
            begin.max(first)..(begin + BLOCK_WORDS).min(last + 1)
        })
    }

    /// All words whose blocks may have marks, with their indexes.
    fn marked_words(&self) -> impl Iterator<Item = (usize, &AtomicU64)> + '_ {
        let last = self.words.len().checked_sub(1);
        let ranges = last.into_iter().flat_map(|last| self.marked(0, last));
        ranges.flat_map(|range| range.clone().zip(&self.words[range]))
    }

    /// Whether a page is marked.
    #[inline]
    pub fn get(&self, page: u64) -> bool {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.words[(page / 64) as usize].load(Acquire) >> (page % 64) & 1 != 0
    }

    /// Moves the marks of `len` pages from `start` on to `out`, whose bit 0 is page `start`: they
    /// are set there (others are kept) and cleared here. Other threads may mark meanwhile.
    ///
    /// Words without a mark are not written. Panics when `out` has fewer than
    /// [`words_for`]`(len)` words.
    pub fn harvest(&self, start: u64, len: u64, out: &mut [u64]) {
        self.each(start, len, out, |word, mask| match word.load(Relaxed) & mask {
            0 => 0,
            _ if mask == !0 => word.swap(0, Acquire),
            _ => word.fetch_and(!mask, Acquire) & mask,
        });
    }

    /// [`DirtyBitmap::harvest`] without atomic operations, at the speed of memory.
    pub fn harvest_exclusive(&mut self, start: u64, len: u64, out: &mut [u64]) {
        let Some(span) = Span::of(start, len, self.pages) else { return };
        let out = &mut out[..words_for(len)];
        let shift = start % 64;
        let DirtyBitmap { words, blocks, .. } = self;
        for block in marked_blocks(blocks, span.first / BLOCK_WORDS, span.last / BLOCK_WORDS) {
            let begin = block * BLOCK_WORDS;
            let end = (begin + BLOCK_WORDS).min(words.len());
            let range = begin.max(span.first)..end.min(span.last + 1);
            let taken = words[range.clone()].iter_mut().zip(range.clone());
            if shift == 0 && span.mask(range.start) & span.mask(range.end - 1) == !0 {
                // Without a branch for each word, so that the compiler can vectorize the loop.
                for ((word, _), out) in taken.zip(&mut out[range.start - span.first..]) {
                    *out |= core::mem::take(word.get_mut());
                }
            } else {
                for (word, at) in taken {
                    let (word, mask) = (word.get_mut(), span.mask(at));
                    put(out, (at - span.first) as u64 * 64, shift, *word & mask);
                    *word &= !mask;
                }
            }
            if words[begin..end].iter_mut().all(|word| *word.get_mut() == 0) {
                blocks[block / 64].fetch_and(!(1 << (block % 64)), Relaxed);
            }
        }
    }

    /// Sets in `out`, whose bit 0 is page `start`, the marks of `len` pages from `start` on, and
    /// keeps them here.
    pub fn read(&self, start: u64, len: u64, out: &mut [u64]) {
        self.each(start, len, out, |word, mask| word.load(Acquire) & mask);
    }

    /// Answers a report: sets in `out`, whose bits are `to`'s pages, what is marked between `iova` and `iova + length`,
    /// and clears it here, where bits are `log`'s pages. The two grids may have any offset and page size; see
    /// [`regranulate`], also for panics.
    ///
    /// A page of the log that lies only partly in the range stays marked, for the report of its
    /// other part.
    pub fn report(&self, log: Grid, out: &mut [u64], to: Grid, iova: u64, length: u64) {
        report(self.pages, log, out, to, iova, length, |clear, start, len, out| {
            if clear { self.harvest(start, len, out) } else { self.read(start, len, out) }
        });
    }

    /// [`DirtyBitmap::report`] without atomic operations.
    pub fn report_exclusive(&mut self, log: Grid, out: &mut [u64], to: Grid, iova: u64, length: u64) {
        report(self.pages, log, out, to, iova, length, |clear, start, len, out| {
            if clear { self.harvest_exclusive(start, len, out) } else { self.read(start, len, out) }
        });
    }

    /// Sets in `out`, whose bits are `to`'s pages, the pages between `iova` and `iova + length` that may be marked here, where bits are
    /// `log`'s pages, and changes nothing here. It looks at blocks of 4096 pages, and takes as long as there are blocks with marks.
    /// What panics is what [`regranulate`] says.
    pub fn look(&self, log: Grid, out: &mut [u64], to: Grid, iova: u64, length: u64) {
        look(self.pages, log, out, to, iova, length, |first, last| self.marked(first, last));
    }

    /// Calls `take` for each word of a range, with the mask of its bits in the range, and ORs the results into
    /// `out`.
    fn each(&self, start: u64, len: u64, out: &mut [u64], take: impl Fn(&AtomicU64, u64) -> u64) {
        let Some(span) = Span::of(start, len, self.pages) else { return };
        let out = &mut out[..words_for(len)];
        for range in self.marked(span.first, span.last) {
            for (word, at) in self.words[range.clone()].iter().zip(range) {
                put(out, (at - span.first) as u64 * 64, start % 64, take(word, span.mask(at)));
            }
        }
    }

    /// Marks page `start + n` for every bit *n* below `len` that is set in `words`.
    pub fn or_words(&self, start: u64, words: &[u64], len: u64) {
        let Some(span) = Span::of(start, len, self.pages) else { return };
        assert!(words.len() >= words_for(len), "{} words for {len} pages", words.len());
        let shift = start % 64;
        for (at, word) in self.words[span.first..=span.last].iter().enumerate() {
            let bits = match (at as u64 * 64).checked_sub(shift) {
                Some(from) => load(words, from),
                None => words[0] << shift,
            } & span.mask(span.first + at);
            if bits != 0 {
                word.fetch_or(bits, Release);
                self.mark_blocks(span.first + at, span.first + at);
            }
        }
    }

    /// Marks every page that is marked in `other`, which must have as many pages.
    pub fn or(&self, other: &DirtyBitmap) {
        assert_eq!(self.pages, other.pages, "bitmaps of different sizes");
        for (at, other) in other.marked_words() {
            let bits = other.load(Acquire);
            if bits != 0 {
                self.words[at].fetch_or(bits, Release);
                self.mark_blocks(at, at);
            }
        }
    }

    /// Removes every mark. Words without marks are not written. Concurrent marks of other threads may or may not
    /// remain.
    pub fn clear(&self) {
        for (_, word) in self.marked_words() {
            if word.load(Relaxed) != 0 {
                word.store(0, Relaxed);
            }
        }
        self.blocks.iter().for_each(|blocks| blocks.store(0, Relaxed));
    }

    /// Number of marked pages.
    pub fn count(&self) -> u64 {
        self.marked_words().map(|(_, word)| u64::from(word.load(Relaxed).count_ones())).sum()
    }

    /// Whether no page is marked.
    pub fn is_empty(&self) -> bool {
        self.marked_words().all(|(_, word)| word.load(Relaxed) == 0)
    }

    /// The runs of marked pages, in order, as (first page, pages), each word as it is when the
    /// iterator comes to it.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs_from(0)
    }

    /// The runs of marked pages from this page on, as in [`DirtyBitmap::runs`].
    pub fn runs_from(&self, page: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = usize::try_from(page / 64).unwrap_or(usize::MAX);
        let last = self.words.len().checked_sub(1).filter(|last| first <= *last);
        let ranges = last.into_iter().flat_map(move |last| self.marked(first, last));
        Runs::new(ranges.flat_map(|range| range.clone().zip(&self.words[range])).map(move |(at, word)| {
            let mask = if at == first { u64::MAX << (page % 64) } else { u64::MAX };
            (at, word.load(Acquire) & mask)
        }))
    }
}

/// The blocks from `first` to `last` that may have marks.
fn marked_blocks(blocks: &[AtomicU64], first: usize, last: usize) -> impl Iterator<Item = usize> + '_ {
    (first / 64..=last / 64).flat_map(move |at| {
        let head = if at == first / 64 { u64::MAX << (first % 64) } else { u64::MAX };
        let tail = if at == last / 64 { u64::MAX >> (63 - last % 64) } else { u64::MAX };
        let mut bits = blocks[at].load(Acquire) & head & tail;
        core::iter::from_fn(move || {
            let bit = bits.trailing_zeros() as usize;
            bits &= bits.checked_sub(1)?;
            Some(at * 64 + bit)
        })
    })
}

/// Sets the bits of a word, the one that begins `at` bits after the word with the range's first
/// page, in a bitmap whose bit 0 is that page, bit `shift` of its word.
fn put(out: &mut [u64], at: u64, shift: u64, bits: u64) {
    match at.checked_sub(shift) {
        Some(at) => or_at(out, at, bits),
        None => or_at(out, 0, bits >> shift),
    }
}

impl fmt::Debug for DirtyBitmap {
    /// Sizes, not bits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap").field("pages", &self.pages).field("marked", &self.count()).finish()
    }
}
