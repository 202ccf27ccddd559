//! Bitmaps in plain words: bit *n* of the whole is bit *n* mod 64 of word *n* / 64, which in
//! little-endian memory is the bitmap of `vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`.
//!
//! Pages are counted from the bitmap's first bit. A range outside its bitmap is a mistake of the caller and panics,
//! like an index into a slice: check ranges of a peer before ([`crate::logging`]).

/// Number of words in a bitmap of this many pages.
pub const fn words_for(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

/// The lowest `bits` bits, 0 to 64 of them.
pub(super) const fn low(bits: u64) -> u64 {
    if bits >= 64 { !0 } else { (1 << bits) - 1 }
}

/// The words that a range of pages touches, and which bits of the first and the last one.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) first: usize,
    pub(super) last: usize,
    head: u64,
    tail: u64,
}

impl Span {
    /// `None` for an empty range. Panics when the range does not fit into `pages`.
    #[inline]
    pub(super) fn of(start: u64, len: u64, pages: u64) -> Option<Span> {
        let fits = start.checked_add(len).is_some_and(|end| end <= pages);
        assert!(fits, "pages {start}+{len} do not fit into a bitmap of {pages} pages");
        let end = (start + len).checked_sub(1).filter(|_| len > 0)?;
        Some(Span {
            first: (start / 64) as usize,
            last: (end / 64) as usize,
            head: !0 << (start % 64),
            tail: !0 >> (63 - end % 64),
        })
    }

    /// The bits of a word of the span that belong to the range.
    #[inline]
    pub(super) const fn mask(&self, word: usize) -> u64 {
        let head = if word == self.first { self.head } else { !0 };
        let tail = if word == self.last { self.tail } else { !0 };
        head & tail
    }
}

/// Number of pages in these words.
const fn room(words: &[u64]) -> u64 {
    (words.len() as u64).saturating_mul(64)
}

/// Whether a page is set.
#[inline]
pub fn get(words: &[u64], page: u64) -> bool {
    words[(page / 64) as usize] >> (page % 64) & 1 != 0
}

/// Sets `len` pages from `start` on.
pub fn set_range(words: &mut [u64], start: u64, len: u64) {
    let Some(span) = Span::of(start, len, room(words)) else { return };
    words[span.first] |= span.mask(span.first);
    if span.last > span.first {
        words[span.first + 1..span.last].fill(!0);
        words[span.last] |= span.mask(span.last);
    }
}

/// Clears `len` pages from `start` on.
pub fn clear_range(words: &mut [u64], start: u64, len: u64) {
    let Some(span) = Span::of(start, len, room(words)) else { return };
    words[span.first] &= !span.mask(span.first);
    if span.last > span.first {
        words[span.first + 1..span.last].fill(0);
        words[span.last] &= !span.mask(span.last);
    }
}

/// Whether any of `len` pages from `start` on is set.
pub fn any(words: &[u64], start: u64, len: u64) -> bool {
    let Some(span) = Span::of(start, len, room(words)) else { return false };
    words[span.first] & span.mask(span.first) != 0
        || (span.last > span.first
            && (words[span.first + 1..span.last].iter().any(|word| *word != 0)
                || words[span.last] & span.mask(span.last) != 0))
}

/// Number of pages that are set.
pub fn count(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// Whether no page is set.
pub fn is_empty(words: &[u64]) -> bool {
    words.iter().all(|word| *word == 0)
}

/// Sets in `dst` every page that is set in `src`. Panics if `dst` is shorter.
pub fn or_into(dst: &mut [u64], src: &[u64]) {
    for (dst, src) in dst[..src.len()].iter_mut().zip(src) {
        *dst |= src;
    }
}

/// Sets page `dst_start + n` of `dst` for every page `src_start + n` set in `src`, *n* below
/// `len`.
pub fn or_range(dst: &mut [u64], dst_start: u64, src: &[u64], src_start: u64, len: u64) {
    let Some(from) = Span::of(src_start, len, room(src)) else { return };
    let Some(to) = Span::of(dst_start, len, room(dst)) else { return };
    if src_start % 64 == dst_start % 64 {
        for (word, dst) in (from.first..=from.last).zip(&mut dst[to.first..=to.last]) {
            *dst |= src[word] & from.mask(word);
        }
        return;
    }
    for at in (0..len).step_by(64) {
        or_at(dst, dst_start + at, load(src, src_start + at) & low(len - at));
    }
}

/// 64 pages from page `at` on; those beyond the last word are clear.
pub(super) fn load(words: &[u64], at: u64) -> u64 {
    let (word, shift) = ((at / 64) as usize, at % 64);
    let part = |word: usize| words.get(word).copied().unwrap_or(0);
    if shift == 0 { part(word) } else { part(word) >> shift | part(word + 1) << (64 - shift) }
}

/// Sets the pages of `bits` from page `at` on.
pub(super) fn or_at(words: &mut [u64], at: u64, bits: u64) {
    if bits == 0 {
        return;
    }
    let (word, shift) = ((at / 64) as usize, at % 64);
    if bits << shift != 0 {
        words[word] |= bits << shift;
    }
    if shift != 0 && bits >> (64 - shift) != 0 {
        words[word + 1] |= bits >> (64 - shift);
    }
}

/// The runs of set pages, in order, as (first page, pages).
pub fn runs(words: &[u64]) -> impl Iterator<Item = (u64, u64)> + '_ {
    Runs::new(words.iter().copied().enumerate())
}

/// The runs of set pages among `len` pages from `start` on, in order, as (first page, pages).
/// Runs that go beyond the range are cut.
pub fn runs_in(words: &[u64], start: u64, len: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    let span = Span::of(start, len, room(words));
    let masked = span.into_iter().flat_map(|span| {
        words[span.first..=span.last]
            .iter()
            .zip(span.first..)
            .map(move |(word, at)| (at, word & span.mask(at)))
    });
    Runs::new(masked)
}

/// Finds runs in words, which are given with their indexes in ascending order. Words that are left out are clear.
pub(super) struct Runs<I> {
    words: I,
    /// What is left of the current word.
    word: u64,
    /// The page of the current word's bit 0.
    base: u64,
}

impl<I: Iterator<Item = (usize, u64)>> Runs<I> {
    pub(super) fn new(words: I) -> Runs<I> {
        Runs { words, word: 0, base: 0 }
    }

    /// Goes on to the next word; `false` after the last one.
    fn advance(&mut self) -> bool {
        let Some((at, word)) = self.words.next() else {
            self.word = 0;
            return false;
        };
        (self.word, self.base) = (word, at as u64 * 64);
        true
    }
}

impl<I: Iterator<Item = (usize, u64)>> Iterator for Runs<I> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        while self.word == 0 {
            if !self.advance() {
                return None;
            }
        }
        let from = self.word.trailing_zeros();
        let start = self.base + u64::from(from);
        let mut len = u64::from((self.word >> from).trailing_ones());
        if u64::from(from) + len < 64 {
            self.word &= !0 << (u64::from(from) + len);
            return Some((start, len));
        }
        loop {
            let end = self.base + 64;
            if !self.advance() || self.base != end {
                return Some((start, len));
            }
            if self.word != !0 {
                len += u64::from(self.word.trailing_ones());
                // Adding one carries through the ones at the bottom and clears them.
                self.word &= self.word + 1;
                return Some((start, len));
            }
            len += 64;
        }
    }
}
