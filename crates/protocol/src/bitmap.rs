//! Dirty bitmaps (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`, the log behind a report):
//! [`DirtyBitmap`], which many threads mark pages in, and functions over plain words, which is what
//! reports and the wire carry.

mod regranulate;
mod words;

use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use zerocopy::FromZeros;

use crate::Errno;
use regranulate::report;
pub use regranulate::{Grid, regranulate};
use words::{Runs, Span, load, or_at};
pub use words::{
    any, clear_range, count, get, is_empty, or_into, or_range, runs, runs_in, set_range, words_for,
};

/// A bitmap of pages that any number of threads mark while others harvest.
///
/// Memory is taken as it is touched: a bitmap of a terabyte of which no page was ever marked costs
/// address space only, and a harvest of it touches nothing.
///
/// **No mark is lost.** A device writes memory first and marks the page afterwards. A mark that
/// [`DirtyBitmap::set_range`] made is then in the harvest that it comes before, and whoever
/// harvested it and reads the page sees what was written, or it is in a later one.
/// [`DirtyBitmap::set_range_locked`] is cheaper on pages that are marked already and needs a lock
/// for the same promise.
///
/// Ranges that do not fit are a mistake of the caller and panic, as an index into a slice does.
pub struct DirtyBitmap {
    words: Vec<AtomicU64>,
    pages: u64,
}

impl DirtyBitmap {
    /// A bitmap of `pages` pages, all clean. [`Errno::ENOMEM`] when there is no address space for
    /// it.
    pub fn new(pages: u64) -> Result<DirtyBitmap, Errno> {
        let words = AtomicU64::new_vec_zeroed(words_for(pages)).map_err(|_| Errno::ENOMEM)?;
        Ok(DirtyBitmap { words, pages })
    }

    /// How many pages it has.
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
    /// An atomic OR for a part of a word and a store for a whole one, both releasing: what the
    /// thread wrote before is seen by the one that harvests the mark.
    #[inline]
    pub fn set_range(&self, start: u64, len: u64) {
        let Some(span) = Span::of(start, len, self.pages) else { return };
        if span.first == span.last {
            self.words[span.first].fetch_or(span.mask(span.first), Release);
            return;
        }
        for (at, word) in self.words[span.first..=span.last].iter().enumerate() {
            match span.mask(span.first + at) {
                u64::MAX => word.store(!0, Release),
                mask => drop(word.fetch_or(mask, Release)),
            }
        }
    }

    /// Marks `len` pages from `start` on, with no atomic operation where they are marked already.
    ///
    /// To be called only while holding a lock that every harvest takes exclusively (or that makes
    /// `&mut self` of it). Otherwise a page can be lost: the thread's write may still be on its way
    /// to memory when it finds the mark there and leaves it, and a harvest takes that mark and
    /// reads the page without the write. With the lock, the write is seen before the harvest
    /// begins.
    #[inline]
    pub fn set_range_locked(&self, start: u64, len: u64) {
        let Some(span) = Span::of(start, len, self.pages) else { return };
        for (at, word) in self.words[span.first..=span.last].iter().enumerate() {
            let mask = span.mask(span.first + at);
            if word.load(Relaxed) & mask != mask {
                word.fetch_or(mask, Release);
            }
        }
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
        let take = |word: &mut AtomicU64, mask: u64| {
            let word = word.get_mut();
            let bits = *word & mask;
            if bits != 0 {
                *word &= !mask;
            }
            bits
        };
        let shift = start % 64;
        if shift != 0 {
            for (at, word) in self.words[span.first..=span.last].iter_mut().enumerate() {
                put(out, at as u64 * 64, shift, take(word, span.mask(span.first + at)));
            }
            return;
        }
        // Whole cache lines, so that the compiler can use the widest registers there are.
        const LINE: usize = 8;
        let (whole, tail) = self.words[span.first..=span.last].split_at_mut(span.last - span.first);
        let mut lines = whole.chunks_exact_mut(LINE);
        let mut outs = out.chunks_exact_mut(LINE);
        for (line, out) in (&mut lines).zip(&mut outs) {
            if line.iter_mut().fold(0, |all, word| all | *word.get_mut()) != 0 {
                for (word, out) in line.iter_mut().zip(out) {
                    *out |= core::mem::take(word.get_mut());
                }
            }
        }
        let done = whole.len() / LINE * LINE;
        for (at, word) in whole[done..].iter_mut().enumerate() {
            out[done + at] |= take(word, !0);
        }
        out[span.last - span.first] |= take(&mut tail[0], span.mask(span.last));
    }

    /// Sets in `out`, whose bit 0 is page `start`, the marks of `len` pages from `start` on, and
    /// keeps them here.
    pub fn read(&self, start: u64, len: u64, out: &mut [u64]) {
        self.each(start, len, out, |word, mask| word.load(Acquire) & mask);
    }

    /// Answers a report: sets in `out`, whose bits are `to`'s pages, what is marked between `iova`
    /// and `iova + length`, and clears it here, where bits are `log`'s pages. Both grids may lie
    /// and be sized as they please, see [`regranulate`], which also says what panics.
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

    /// ORs what `take` makes of each word of a range, and of the bits that count in it, into `out`.
    fn each(&self, start: u64, len: u64, out: &mut [u64], take: impl Fn(&AtomicU64, u64) -> u64) {
        let Some(span) = Span::of(start, len, self.pages) else { return };
        let out = &mut out[..words_for(len)];
        for (at, word) in self.words[span.first..=span.last].iter().enumerate() {
            put(out, at as u64 * 64, start % 64, take(word, span.mask(span.first + at)));
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
            }
        }
    }

    /// Marks every page that is marked in `other`, which must have as many pages.
    pub fn or(&self, other: &DirtyBitmap) {
        assert_eq!(self.pages, other.pages, "bitmaps of different sizes");
        for (word, other) in self.words.iter().zip(&other.words) {
            let bits = other.load(Acquire);
            if bits != 0 {
                word.fetch_or(bits, Release);
            }
        }
    }

    /// Removes every mark. Words without one are not written.
    pub fn clear(&self) {
        for word in &self.words {
            if word.load(Relaxed) != 0 {
                word.store(0, Relaxed);
            }
        }
    }

    /// How many pages are marked.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Relaxed).count_ones())).sum()
    }

    /// Whether no page is marked.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| word.load(Relaxed) == 0)
    }

    /// The runs of marked pages, in order, as (first page, pages), each word as it is when the
    /// iterator comes to it.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs_from(0)
    }

    /// The runs of marked pages from this page on, as [`DirtyBitmap::runs`] gives them.
    pub fn runs_from(&self, page: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = usize::try_from(page / 64).unwrap_or(usize::MAX).min(self.words.len());
        let mut mask = u64::MAX << (page % 64);
        let words = self.words[first..]
            .iter()
            .map(move |word| word.load(Acquire) & core::mem::replace(&mut mask, u64::MAX));
        Runs::new(first as u64 * 64, words)
    }
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
