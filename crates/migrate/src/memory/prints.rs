//! [`Prints`]: the fingerprints of a region's pages. A page of zeroes takes a bit, so that a machine that never touched most
//! of its memory needs next to nothing for it.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use limosa_protocol::bitmap::DirtyBitmap;

/// The fingerprint of a page; `None` of a page of zeroes.
pub(super) type Print = Option<[u64; 2]>;

/// The fingerprints of this number of pages are allocated together, when the first one is stored that is not of zeroes.
const CHUNK_PAGES: u64 = 512;
/// Pages that are looked at together.
const SOME_PAGES: u64 = 64 * 64;

/// The fingerprint of each page when it was read last. A page that was never read equals none.
pub(super) struct Prints {
    /// The pages that were zero when they were read last.
    zero: DirtyBitmap,
    /// The fingerprints of the others.
    chunks: Vec<OnceLock<Chunk>>,
}

type Chunk = Box<[[AtomicU64; 2]]>;

impl Prints {
    /// For this number of pages, none of which was read. Fails when there is no memory for that.
    pub(super) fn new(pages: u64) -> io::Result<Prints> {
        let zero = DirtyBitmap::new(pages).map_err(|_| no_memory())?;
        let count = usize::try_from(pages.div_ceil(CHUNK_PAGES)).map_err(|_| no_memory())?;
        let mut chunks = Vec::new();
        chunks.try_reserve_exact(count).map_err(|_| no_memory())?;
        chunks.resize_with(count, OnceLock::new);
        Ok(Prints { zero, chunks })
    }

    /// How many pages there are.
    #[cfg(test)]
    pub(super) fn pages(&self) -> u64 {
        self.zero.pages()
    }

    /// How many chunks were allocated.
    #[cfg(test)]
    pub(super) fn chunks(&self) -> usize {
        self.chunks.iter().filter(|chunk| chunk.get().is_some()).count()
    }

    /// Stores a page's fingerprint. Fails when there is no memory for it.
    pub(super) fn set(&self, page: u64, print: Print) -> io::Result<()> {
        let Some(sums) = print else {
            self.set_zero(page..page + 1);
            return Ok(());
        };
        if page >= self.zero.pages() {
            return Ok(());
        }
        let stored = &self.chunk(page)?[(page % CHUNK_PAGES) as usize];
        stored.iter().zip(sums).for_each(|(stored, sum)| stored.store(sum, Ordering::Relaxed));
        self.zero.harvest(page, 1, &mut [0]);
        Ok(())
    }

    /// Stores that these pages are zero. Pages that there are not are left out.
    pub(super) fn set_zero(&self, pages: Range<u64>) {
        let end = pages.end.min(self.zero.pages());
        if pages.start < end {
            self.zero.set_range(pages.start, end - pages.start);
        }
    }

    /// Whether this is the fingerprint that a page had when it was read last.
    pub(super) fn is(&self, page: u64, print: Print) -> bool {
        if page >= self.zero.pages() {
            return false;
        }
        match (self.zero.get(page), print) {
            (is_zero, None) => is_zero,
            (true, Some(_)) => false,
            (false, Some(sums)) => {
                let chunk = self.chunks[(page / CHUNK_PAGES) as usize].get();
                chunk.is_some_and(|chunk| {
                    let stored = &chunk[(page % CHUNK_PAGES) as usize];
                    stored.each_ref().map(|sum| sum.load(Ordering::Relaxed)) == sums
                })
            }
        }
    }

    /// Marks those of these pages, which are zero now, that were not when they were read last.
    pub(super) fn mark_others(&self, pages: Range<u64>, dirty: &DirtyBitmap) {
        let mut words = [0; (SOME_PAGES / 64) as usize];
        let mut at = pages.start;
        while at < pages.end {
            let count = SOME_PAGES.min(pages.end - at);
            words.fill(0);
            self.zero.read(at, count, &mut words);
            words.iter_mut().for_each(|word| *word = !*word);
            dirty.or_words(at, &words, count);
            at += count;
        }
    }

    fn chunk(&self, page: u64) -> io::Result<&Chunk> {
        let chunk = &self.chunks[(page / CHUNK_PAGES) as usize];
        if let Some(made) = chunk.get() {
            return Ok(made);
        }
        let mut new = Vec::new();
        new.try_reserve_exact(CHUNK_PAGES as usize).map_err(|_| no_memory())?;
        new.resize_with(CHUNK_PAGES as usize, Default::default);
        // Another thread may have been faster.
        Ok(chunk.get_or_init(|| new.into_boxed_slice()))
    }
}

fn no_memory() -> io::Error {
    io::ErrorKind::OutOfMemory.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_what_it_was_stored_as_last() {
        let prints = Prints::new(2 * CHUNK_PAGES + 3).unwrap();
        let last = prints.pages() - 1;
        for page in [0, CHUNK_PAGES - 1, CHUNK_PAGES, last] {
            assert!(!prints.is(page, None) && !prints.is(page, Some([1, 2])), "never read");
            prints.set(page, Some([1, 2])).unwrap();
            assert!(
                prints.is(page, Some([1, 2])) && !prints.is(page, Some([1, 3])) && !prints.is(page, None)
            );
            prints.set(page, None).unwrap();
            assert!(prints.is(page, None) && !prints.is(page, Some([1, 2])));
            prints.set(page, Some([3, 4])).unwrap();
            assert!(prints.is(page, Some([3, 4])) && !prints.is(page, None));
        }
        assert!(!prints.is(last + 1, None), "there is no such page");
        prints.set(last + 1, Some([1, 2])).unwrap();
        prints.set_zero(last..last + 5);
        assert!(prints.is(last, None));
    }

    #[test]
    fn pages_that_are_zero_now_and_were_not_are_marked() {
        let prints = Prints::new(10_000).unwrap();
        prints.set_zero(0..10_000);
        for page in [0, 63, 64, 4095, 4096, 9_999] {
            prints.set(page, Some([5, 6])).unwrap();
        }
        let dirty = DirtyBitmap::new(10_000).unwrap();
        prints.mark_others(1..4096, &dirty);
        prints.mark_others(4096..10_000, &dirty);
        let marked: Vec<_> = dirty.runs().collect();
        assert_eq!(marked, [(63, 2), (4095, 2), (9_999, 1)]);
    }
}
