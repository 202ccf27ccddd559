//! Bitmaps of one page size from bitmaps of another (`vfio.h:
//! VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`: the page size of a report need not be that of the
//! log): a coarse page becomes all the fine pages in it, fine pages become the coarse pages that
//! they lie in. A page can only be added, never lost.

use core::ops::Range;

use super::words::{any, load, low, or_at, or_range, runs_in, set_range, words_for};

/// Which addresses a bitmap's bits stand for: bit *n* for the `page_size` bytes from
/// `iova + n * page_size` on. `iova` need not be a multiple of the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// The first address of bit 0's page.
    pub iova: u64,
    /// Bytes for each bit; a power of two.
    pub page_size: u64,
}

/// Where a range of addresses lies in a grid.
#[derive(Clone, Copy)]
struct Extent {
    /// Bytes from the grid's start to the range's first byte.
    first: u64,
    /// Bytes from the grid's start to the range's last byte.
    last: u64,
    /// The first page that the range touches.
    page: u64,
    /// How many pages it touches.
    pages: u64,
}

impl Extent {
    fn of(grid: Grid, iova: u64, last: u64, words: usize) -> Extent {
        assert!(grid.page_size.is_power_of_two(), "a page size of {} bytes", grid.page_size);
        assert!(iova >= grid.iova, "{iova:#x} lies before the bitmap's first page at {:#x}", grid.iova);
        let (first, last) = (iova - grid.iova, last - grid.iova);
        let (page, last_page) = (first / grid.page_size, last / grid.page_size);
        let fits = last_page / 64 < words as u64;
        assert!(fits, "page {last_page} does not fit into a bitmap of {words} words");
        Extent { first, last, page, pages: last_page - page + 1 }
    }
}

/// Sets in `dst`, whose bits are `to`'s pages, every page of which a byte between `iova` and
/// `iova + length` lies in a page that is set in `src`, whose bits are `from`'s. No bit is cleared,
/// and none outside the range is read or set; a page that lies only partly in the range counts
/// with that part.
///
/// `length` may be 0; `iova + length` may be 2^64. A caller that clears reported pages must keep those that lie only
/// partly in the range, as [`DirtyBitmap::report`](super::DirtyBitmap::report) does.
///
/// # Panics
///
/// When a page size is not a power of two, when the range begins before one of the grids or runs
/// beyond one of the bitmaps, or beyond 2^64.
///
/// ```
/// use limosa_protocol::bitmap::{Grid, regranulate};
/// // One dirty page of 8 KiB at 0x10000 is two of 4 KiB, the first of which lies before the range.
/// let mut fine = [0];
/// let (from, to) = (Grid { iova: 0x10000, page_size: 8192 }, Grid { iova: 0x11000, page_size: 4096 });
/// regranulate(&[0b1], from, &mut fine, to, 0x11000, 0x3000);
/// assert_eq!(fine, [0b001]);
/// ```
pub fn regranulate(src: &[u64], from: Grid, dst: &mut [u64], to: Grid, iova: u64, length: u64) {
    let Some(beyond_first) = length.checked_sub(1) else { return };
    let last = iova.checked_add(beyond_first).expect("the range runs beyond 2^64");
    let source = Extent::of(from, iova, last, src.len());
    let target = Extent::of(to, iova, last, dst.len());
    let finer = from.page_size.min(to.page_size);
    let ratio = from.page_size.max(to.page_size) / finer;
    if source.first % finer != target.first % finer {
        by_runs(src, from.page_size, source, dst, to.page_size, target);
    } else if ratio == 1 {
        or_range(dst, target.page, src, source.page, source.pages);
    } else if from.page_size < to.page_size {
        // The first source page, counted in pages of its size from the target grid's start.
        let at = target.first / finer;
        match ratio {
            2 => fold::<1>(src, source, dst, at),
            4 => fold::<2>(src, source, dst, at),
            8 => fold::<3>(src, source, dst, at),
            16 => fold::<4>(src, source, dst, at),
            32 => fold::<5>(src, source, dst, at),
            64 => fold::<6>(src, source, dst, at),
            _ => fold_wide(src, source, dst, target, at, ratio),
        }
    } else {
        let at = source.first / finer;
        match ratio {
            2 => spread::<1>(src, at, dst, target),
            4 => spread::<2>(src, at, dst, target),
            8 => spread::<3>(src, at, dst, target),
            16 => spread::<4>(src, at, dst, target),
            32 => spread::<5>(src, at, dst, target),
            64 => spread::<6>(src, at, dst, target),
            _ => by_runs(src, from.page_size, source, dst, to.page_size, target),
        }
    }
}

/// Answers a report from a log of `log_pages` pages; `take` moves pages of it, or with `false`
/// copies them, into words whose bit 0 is the first of them.
pub(super) fn report(
    log_pages: u64,
    log: Grid,
    out: &mut [u64],
    to: Grid,
    iova: u64,
    length: u64,
    mut take: impl FnMut(bool, u64, u64, &mut [u64]),
) {
    let Some(beyond_first) = length.checked_sub(1) else { return };
    let last = iova.checked_add(beyond_first).expect("the range runs beyond 2^64");
    let source = Extent::of(log, iova, last, words_for(log_pages));
    let target = Extent::of(to, iova, last, out.len());
    // The pages that lie wholly in the range; only these may be cleared.
    let whole = source.first.div_ceil(log.page_size)..if source.last % log.page_size == log.page_size - 1 {
        source.page + source.pages
    } else {
        source.page + source.pages - 1
    };
    let same = log.page_size == to.page_size
        && source.first.is_multiple_of(log.page_size)
        && target.first.is_multiple_of(to.page_size);
    let end = source.page + source.pages;
    let mut page = source.page;
    while page < end {
        let clear = whole.contains(&page);
        let stretch = if clear { whole.end - page } else { 1 };
        let to_page = target.page + (page - source.page);
        if same && to_page.is_multiple_of(64) {
            take(clear, page, stretch, &mut out[(to_page / 64) as usize..]);
            page += stretch;
            continue;
        }
        let mut words = [0; 256];
        let pages = stretch.min(words.len() as u64 * 64);
        take(clear, page, pages, &mut words);
        let bytes_first = (page * log.page_size).max(source.first);
        let bytes_last = ((page + pages).saturating_mul(log.page_size) - 1).min(source.last);
        let from = Grid { iova: log.iova + page * log.page_size, ..log };
        regranulate(&words, from, out, to, log.iova + bytes_first, bytes_last - bytes_first + 1);
        page += pages;
    }
}

/// Sets in `out` the pages of a range in which words of a log of `log_pages` pages lie that may have marks. `marked` names these words,
/// of those from the first to the last that it is given.
pub(super) fn look<I: Iterator<Item = Range<usize>>>(
    log_pages: u64,
    log: Grid,
    out: &mut [u64],
    to: Grid,
    iova: u64,
    length: u64,
    marked: impl FnOnce(usize, usize) -> I,
) {
    let Some(beyond_first) = length.checked_sub(1) else { return };
    let last = iova.checked_add(beyond_first).expect("the range runs beyond 2^64");
    let source = Extent::of(log, iova, last, words_for(log_pages));
    let target = Extent::of(to, iova, last, out.len());
    let page_of = |byte: u64| (byte - source.first + target.first) / to.page_size;
    for words in marked((source.page / 64) as usize, ((source.page + source.pages - 1) / 64) as usize) {
        let first = (words.start as u64 * 64 * log.page_size).max(source.first);
        let end = (words.end as u64 * 64).saturating_mul(log.page_size);
        let (first, last) = (page_of(first), page_of((end - 1).min(source.last)));
        set_range(out, first, last - first + 1);
    }
}

/// Any two grids: each run of source pages is a range of bytes, and that a range of target pages.
fn by_runs(src: &[u64], from: u64, source: Extent, dst: &mut [u64], to: u64, target: Extent) {
    for (page, pages) in runs_in(src, source.page, source.pages) {
        let first = (page * from).max(source.first) - source.first + target.first;
        let end = (page + pages).saturating_mul(from);
        let last = (end - 1).min(source.last) - source.first + target.first;
        set_range(dst, first / to, last / to - first / to + 1);
    }
}

/// Fine to coarse, 2^`BITS` source pages, at most 64, in a target page. `at` is the place of the
/// first source page in target pages' parts.
fn fold<const BITS: u32>(src: &[u64], source: Extent, dst: &mut [u64], at: u64) {
    let ratio = 1 << BITS;
    let part = at % ratio;
    let mut to = at / ratio;
    // The first word takes in as many pages less as its first target page has before the range.
    let (mut done, mut room, mut shift) = (0, 64 - part, part);
    while done < source.pages {
        let bits = load(src, source.page + done) & low(room.min(source.pages - done));
        match bits {
            0 => {}
            u64::MAX => or_at(dst, to, low(64 / ratio)),
            _ => or_at(dst, to, fold_word::<BITS>(bits << shift)),
        }
        done += room;
        to += 64 / ratio;
        (room, shift) = (64, 0);
    }
}

/// Fine to coarse, more than 64 source pages in a target page.
fn fold_wide(src: &[u64], source: Extent, dst: &mut [u64], target: Extent, at: u64, ratio: u64) {
    for to in target.page..target.page + target.pages {
        let first = (to * ratio).max(at) - at;
        let end = ((to + 1).saturating_mul(ratio) - at).min(source.pages);
        if any(src, source.page + first, end - first) {
            set_range(dst, to, 1);
        }
    }
}

/// Coarse to fine, 2^`BITS` target pages, at most 64, in a source page. `at` is the place of the
/// first target page in source pages' parts.
fn spread<const BITS: u32>(src: &[u64], at: u64, dst: &mut [u64], target: Extent) {
    let ratio = 1 << BITS;
    let mut from = at / ratio;
    let mut shift = at % ratio;
    let mut done = 0;
    while done < target.pages {
        let bits = load(src, from) & low(64 / ratio);
        if bits != 0 {
            or_at(dst, target.page + done, spread_word::<BITS>(bits) >> shift & low(target.pages - done));
        }
        done += 64 - shift;
        from += 64 / ratio;
        shift = 0;
    }
}

/// Of each 2^`step` bits, the lowest 2^(`step` - `bits`) ones.
const fn groups(step: u32, bits: u32) -> u64 {
    let group = low(1 << (step - bits));
    if step == 6 { group } else { !0 / low(1 << step) * group }
}

/// Bit *n* of the result: any bit of the *n*-th group of 2^`BITS` bits. The bits move together in
/// steps that each halve the distances.
fn fold_word<const BITS: u32>(mut word: u64) -> u64 {
    for step in 0..BITS {
        word |= word >> (1 << step);
    }
    word &= groups(BITS, BITS);
    for step in BITS..6 {
        word |= word >> ((1u64 << step) - (1 << (step - BITS)));
        word &= groups(step + 1, BITS);
    }
    word
}

/// The *n*-th group of 2^`BITS` bits of the result: bit *n*, below 64 / 2^`BITS`. The bits move
/// apart in steps that each double the distances.
fn spread_word<const BITS: u32>(mut word: u64) -> u64 {
    for step in (BITS..6).rev() {
        word |= word << ((1u64 << step) - (1 << (step - BITS)));
        word &= groups(step, BITS);
    }
    // One bit in each group: the product fills the groups and carries nowhere.
    word.wrapping_mul(low(1 << BITS))
}
