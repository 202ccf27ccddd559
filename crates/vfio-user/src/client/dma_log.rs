//! The pages that the client writes for the server (`vfio-user.rst: VFIO_USER_DMA_WRITE`), while
//! dirty logging is on.
//!
//! The specification does not say whether a server logs its writes by messages, and some do not: a server without an fd
//! of the memory has no bitmap for it. The client performs these writes, so it logs them and adds its log to each
//! report. A page may be in both logs.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Pages are logged at this size, whatever the size of those reported.
const PAGE_SHIFT: u32 = 12;
const CHUNK_WORDS: usize = 512;
const CHUNK_PAGES: u64 = CHUNK_WORDS as u64 * 64;

/// The log: by page of the address space, in chunks of which there are only those that were written
/// to, one for each 128 MiB.
type Pages = BTreeMap<u64, Box<[u64; CHUNK_WORDS]>>;

/// The pages written since the last report; off until started.
#[derive(Default)]
pub(super) struct DmaLog(Mutex<Option<Pages>>);

impl DmaLog {
    /// Turns the log on, empty, and returns whether it was off.
    pub fn start(&self) -> bool {
        let mut pages = self.lock();
        let was_off = pages.is_none();
        pages.get_or_insert_default();
        was_off
    }

    pub fn stop(&self) {
        *self.lock() = None;
    }

    /// Logs a write that was done: before it, a report in between would tell of a page too early.
    pub fn wrote(&self, iova: u64, bytes: u64) {
        let mut pages = self.lock();
        let (Some(pages), Some(last)) = (&mut *pages, last_byte(iova, bytes)) else { return };
        for page in iova >> PAGE_SHIFT..=last >> PAGE_SHIFT {
            let chunk = pages.entry(page / CHUNK_PAGES).or_insert_with(|| Box::new([0; CHUNK_WORDS]));
            chunk[(page % CHUNK_PAGES / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Moves the logged pages of a range to its bitmap with pages of `page_size` bytes.
    pub fn harvest(&self, iova: u64, length: u64, page_size: u64, bitmap: &mut [u64]) {
        let mut pages = self.lock();
        let (Some(pages), Some(last)) = (&mut *pages, last_byte(iova, length)) else { return };
        for (&number, chunk) in pages.range_mut(chunk_of(iova)..=chunk_of(last)) {
            for (at, word) in chunk.iter_mut().enumerate() {
                for (bit, start, end) in pages_of(number, at, *word, iova, last) {
                    mark(bitmap, page_size, start.max(iova) - iova, end.min(last) - iova);
                    // A page that lies in the range only in part stays in the log.
                    if start >= iova && end <= last {
                        *word &= !(1 << bit);
                    }
                }
            }
        }
        pages.retain(|_, chunk| chunk.iter().any(|word| *word != 0));
    }

    /// Adds what was logged of a range to its bitmap of pages of `page_size` bytes, and keeps it in the log.
    pub fn look(&self, iova: u64, length: u64, page_size: u64, bitmap: &mut [u64]) {
        let pages = self.lock();
        let (Some(pages), Some(last)) = (&*pages, last_byte(iova, length)) else { return };
        for (&number, chunk) in pages.range(chunk_of(iova)..=chunk_of(last)) {
            for (at, word) in chunk.iter().enumerate() {
                for (_, start, end) in pages_of(number, at, *word, iova, last) {
                    mark(bitmap, page_size, start.max(iova) - iova, end.min(last) - iova);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Pages>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn chunk_of(byte: u64) -> u64 {
    (byte >> PAGE_SHIFT) / CHUNK_PAGES
}

/// The pages of a word, the `at`-th of a chunk, that a byte from `iova` to `last` lies in: each with its bit, its first and its last byte.
fn pages_of(chunk: u64, at: usize, word: u64, iova: u64, last: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let bits = (0..64_u64).filter(move |bit| word & (1 << bit) != 0);
    let pages = bits.map(move |bit| {
        let start = (chunk * CHUNK_PAGES + at as u64 * 64 + bit) << PAGE_SHIFT;
        (bit, start, start | ((1 << PAGE_SHIFT) - 1))
    });
    pages.filter(move |(_, start, end)| *end >= iova && *start <= last)
}

/// Sets the bits of the pages from a byte to another, both counted from the first byte of the bitmap.
fn mark(bitmap: &mut [u64], page_size: u64, first: u64, last: u64) {
    for bit in first / page_size..=last / page_size {
        if let Some(word) = bitmap.get_mut((bit / 64) as usize) {
            *word |= 1 << (bit % 64);
        }
    }
}

/// `None` for an empty range; one that goes past the end of the address space ends there.
fn last_byte(iova: u64, bytes: u64) -> Option<u64> {
    Some(iova.saturating_add(bytes.checked_sub(1)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn harvest(log: &DmaLog, iova: u64, length: u64, page_size: u64) -> Vec<u64> {
        let mut bitmap = vec![0; length.div_ceil(page_size).div_ceil(64) as usize];
        log.harvest(iova, length, page_size, &mut bitmap);
        (0..bitmap.len() as u64 * 64)
            .filter(|bit| bitmap[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
            .collect()
    }

    #[test]
    fn nothing_is_logged_unless_it_is_on() {
        let log = DmaLog::default();
        log.wrote(0, 4096);
        assert!(log.start());
        assert!(harvest(&log, 0, 8192, 4096).is_empty());
        log.wrote(0, 1);
        assert!(!log.start(), "it was on");
        assert_eq!(harvest(&log, 0, 8192, 4096), [0], "and what it had stayed");
        log.wrote(0, 1);
        log.stop();
        log.start();
        assert!(harvest(&log, 0, 8192, 4096).is_empty());
    }

    #[test]
    fn a_write_is_every_page_that_it_touches_and_is_told_once() {
        let log = DmaLog::default();
        log.start();
        log.wrote(0x1fff, 0x1002);
        log.wrote(0x4000, 0);
        assert_eq!(harvest(&log, 0, 0x10000, 4096), [1, 2, 3]);
        assert!(harvest(&log, 0, 0x10000, 4096).is_empty());
    }

    #[test]
    fn a_report_has_its_own_page_size_and_range() {
        let log = DmaLog::default();
        log.start();
        let all = || {
            log.wrote(0x10_0000, 1);
            log.wrote(0x10_3000, 1);
            log.wrote(0x5000_0000, 1);
        };
        all();
        assert_eq!(harvest(&log, 0x10_0000, 0x10000, 0x2000), [0, 1]);
        all();
        assert_eq!(harvest(&log, 0x10_0000, 0x10000, 0x800), [0, 1, 6, 7]);
        all();
        assert_eq!(harvest(&log, 0x10_2000, 0x2000, 4096), [1]);
        assert_eq!(harvest(&log, 0x10_0000, 0x1000, 4096), [0], "what is outside stays");
        assert_eq!(harvest(&log, 0x5000_0000, 0x1000, 4096), [0]);
    }

    #[test]
    fn a_look_finds_what_the_next_report_has_and_leaves_it_there() {
        let log = DmaLog::default();
        log.start();
        log.wrote(0x10_0000, 1);
        log.wrote(0x5000_0000, 0x1001);
        let mut blocks = [0];
        log.look(0x10_0000, 0x8000_0000, 0x1000_0000, &mut blocks);
        assert_eq!(blocks, [0b1_0001], "in pages of 256 MiB from 0x10_0000 on, 0x5000_0000 is in the fifth");
        assert_eq!(harvest(&log, 0x10_0000, 0x1000, 4096), [0]);
        assert_eq!(harvest(&log, 0x5000_0000, 0x4000, 4096), [0, 1]);
    }

    #[test]
    fn a_page_that_is_reported_in_part_stays_logged() {
        let log = DmaLog::default();
        log.start();
        log.wrote(0x1000, 4096);
        assert_eq!(harvest(&log, 0x1800, 0x2000, 0x800), [0]);
        assert_eq!(harvest(&log, 0x1000, 0x800, 0x800), [0]);
        assert_eq!(harvest(&log, 0, 0x10000, 4096), [1]);
        assert!(harvest(&log, 0, 0x10000, 4096).is_empty());
    }

    #[test]
    fn the_last_page_of_the_address_space_is_one_too() {
        let log = DmaLog::default();
        log.start();
        log.wrote(u64::MAX, 1);
        assert_eq!(harvest(&log, u64::MAX - 0xffff, 0x10000, 4096), [15]);
    }
}
