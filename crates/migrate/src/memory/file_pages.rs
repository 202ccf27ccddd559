//! [`FilePages`]: guest memory in a file, mapped or not. Holes of the file are neither read nor filled.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use limosa_guest_memory::{FileMapping, PinnedBytes, has_no_swap};
use rustix::fs::{SeekFrom, fstatfs, seek};
use rustix::io::Errno;

use crate::memory::{DataRun, GuestPages, PAGE_BYTES};

/// Pages of a mapping are populated in blocks of this size, at a fraction of the cost of a fault for each page.
const BLOCK_BYTES: u64 = 64 << 10;
/// Data and holes shorter than this are close to each other.
const CLOSE_BYTES: u64 = 16 << 10;
/// After this many pieces of data that are close to each other, holes are no longer searched for between them.
const CLOSE_PIECES: u32 = 4;
/// How much is then taken as data, until the next search.
const MIXED_BYTES: u64 = 1 << 20;
const MIXED_PAGES: usize = (MIXED_BYTES / PAGE_BYTES) as usize;
/// What statfs(2) says of tmpfs, and of memfds.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Guest memory in a file: a memfd, hugetlbfs, any other.
///
/// Holes of the file (`SEEK_HOLE` in lseek(2)) count as zeroes and are not read, so that untouched memory stays
/// untouched. Where holes and data alternate every few pages, both are read, by a system call that does not fill holes: that
/// takes less time than to search for each. The search moves the file's position; reads and writes do not depend on it.
#[derive(Debug)]
pub struct FilePages {
    file: File,
    offset: u64,
    mapped: Option<Mapped>,
    found: Mutex<Found>,
}

/// What the last search found, as offsets in the file: the next one is mostly within it.
#[derive(Debug, Default)]
struct Found {
    /// Data without a hole.
    data: Range<u64>,
    /// Data and holes.
    mixed: Range<u64>,
    /// Where the last one of the two ends.
    end: u64,
    /// How many pieces of data in a row were close to the one before them.
    close_pieces: u32,
}

/// A part of the memory that was searched for.
struct Piece {
    range: Range<u64>,
    /// Whether there may be holes in it.
    is_mixed: bool,
}

#[derive(Debug)]
struct Mapped {
    mapping: FileMapping,
    /// A bit for each block whose pages were populated.
    present: Vec<AtomicU64>,
    /// Whether all that the file has is in memory or in swap.
    is_shmem: bool,
}

impl FilePages {
    /// Memory that starts at this offset of the file, in bytes. It is accessed by system calls.
    pub fn new(file: File, offset: u64) -> FilePages {
        FilePages { file, offset, mapped: None, found: Mutex::default() }
    }

    /// Memory of `bytes` bytes that starts at this offset of the file, in bytes, and is mapped, which is faster. The
    /// errors are those of mmap(2); the file must be open for reading and writing. If the file is truncated while it is
    /// mapped, accesses return an error and the process survives: a handler for SIGBUS is installed for this, see
    /// [`FileMapping`].
    pub fn mapped(file: File, offset: u64, bytes: u64) -> io::Result<FilePages> {
        let mapping = FileMapping::new(&file, offset, bytes, true, true)
            .map_err(|errno| io::Error::from_raw_os_error(errno.raw() as i32))?;
        let words = bytes.div_ceil(BLOCK_BYTES * u64::from(u64::BITS));
        let present = (0..words).map(|_| AtomicU64::new(0)).collect();
        let is_shmem = fstatfs(&file).is_ok_and(|stat| stat.f_type.cast_unsigned() == TMPFS_MAGIC);
        let mapped = Some(Mapped { mapping, present, is_shmem });
        Ok(FilePages { mapped, ..FilePages::new(file, offset) })
    }
}

impl FilePages {
    /// The position in the file of an offset in the memory.
    fn position(&self, offset: u64) -> io::Result<u64> {
        self.offset.checked_add(offset).ok_or_else(|| cut_short(limosa_protocol::Errno::EFAULT))
    }

    /// The first part of a range that may hold anything but zeroes.
    fn search(&self, range: Range<u64>) -> io::Result<Option<Piece>> {
        if range.is_empty() {
            return Ok(None);
        }
        let wanted = self.position(range.start)?..self.position(range.end)?;
        let within = |found: &Range<u64>, is_mixed| {
            let (start, end) = (found.start.max(wanted.start), found.end.min(wanted.end));
            let range = start - self.offset..end - self.offset;
            (start < end).then_some(Piece { range, is_mixed })
        };
        // Locked during the search: the file has one position for all threads.
        let mut found = crate::lock::lock(&self.found);
        if found.data.contains(&wanted.start) {
            return Ok(within(&found.data, false));
        }
        if found.mixed.contains(&wanted.start) {
            return Ok(within(&found.mixed, true));
        }
        let start = match seek(&self.file, SeekFrom::Data(wanted.start)) {
            Ok(start) => start,
            // No data up to the end of the file. A range beyond the end is no memory: it counts as data, so that the
            // read fails.
            Err(Errno::NXIO) if self.file.metadata()?.len() >= wanted.end => return Ok(None),
            Err(_) => return Ok(Some(Piece { range, is_mixed: false })),
        };
        if start >= wanted.end {
            return Ok(None);
        }
        let end = seek(&self.file, SeekFrom::Hole(start)).unwrap_or(wanted.end);
        let before = found.end;
        let is_close = end - start < CLOSE_BYTES && (before..before + CLOSE_BYTES).contains(&start);
        found.close_pieces = if is_close { found.close_pieces.saturating_add(1) } else { 0 };
        (found.data, found.end) = (start..end, end);
        if found.close_pieces < CLOSE_PIECES {
            return Ok(within(&found.data, false));
        }
        found.end = start.saturating_add(MIXED_BYTES);
        found.mixed = start..found.end;
        Ok(within(&found.mixed, true))
    }
}

impl FilePages {
    /// Appends the parts of a piece with holes, if they can be told at once. Without swap, a page of a memfd that is not in memory is
    /// a hole.
    fn split(&self, piece: &Range<u64>, found: &mut Vec<DataRun>) -> io::Result<bool> {
        let bytes = piece.end - piece.start;
        let aligned = [self.position(piece.start)?, bytes].iter().all(|at| at.is_multiple_of(PAGE_BYTES));
        let Some(mapped) = self.mapped.as_ref().filter(|mapped| mapped.is_shmem && aligned) else {
            return Ok(false);
        };
        let mut pages = [0; MIXED_PAGES];
        let Some(pages) = pages.get_mut(..(bytes / PAGE_BYTES) as usize) else { return Ok(false) };
        let is_told = rustix::param::page_size() as u64 == PAGE_BYTES
            && has_no_swap()
            && mapped.mapping.in_memory(piece.start, pages)
            && has_no_swap()
            // Beyond its end nothing is a hole: the read is to fail.
            && self.file.metadata()?.len() >= self.position(piece.end)?;
        if !is_told {
            return Ok(false);
        }
        let mut from = piece.start;
        for run in pages.chunk_by(|one, next| (one & 1) == (next & 1)) {
            let range = from..from + run.len() as u64 * PAGE_BYTES;
            from = range.end;
            if run[0] & 1 != 0 {
                found.push(DataRun { range, has_holes: false });
            }
        }
        Ok(true)
    }
}

impl Mapped {
    /// Populates the pages of a long access in one call instead of by a fault for each page.
    fn populate(&self, offset: u64, bytes: u64, to_write: bool) {
        // Blocks that lie wholly in the range; a short access may fault.
        let blocks = offset.div_ceil(BLOCK_BYTES)..offset.saturating_add(bytes) / BLOCK_BYTES;
        let mask = |block: u64| (block / u64::from(u64::BITS), 1 << (block % u64::from(u64::BITS)));
        let is_missing = |block: u64| {
            let (word, bit) = mask(block);
            self.present.get(word as usize).is_some_and(|word| word.load(Ordering::Relaxed) & bit == 0)
        };
        if !blocks.clone().any(is_missing) {
            return;
        }
        self.mapping.bring_in(offset, bytes, to_write);
        for block in blocks {
            let (word, bit) = mask(block);
            if let Some(word) = self.present.get(word as usize) {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }
}

fn cut_short(_: limosa_protocol::Errno) -> io::Error {
    crate::memory::cut_short()
}

impl GuestPages for FilePages {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.mapped {
            Some(mapped) => {
                // Reading a hole through the mapping would fill it with pages.
                let end = offset.saturating_add(into.len() as u64);
                if end > mapped.mapping.len() {
                    return Err(cut_short(limosa_protocol::Errno::EFAULT));
                }
                let (mut at, mut rest) = (offset, into);
                while let Some(Piece { range, is_mixed }) = self.search(at..end)? {
                    let (hole, more) = rest.split_at_mut((range.start - at) as usize);
                    let (piece, more) = more.split_at_mut((range.end - range.start) as usize);
                    hole.fill(0);
                    if is_mixed {
                        self.file.read_exact_at(piece, self.position(range.start)?)?;
                    } else {
                        mapped.populate(range.start, piece.len() as u64, false);
                        mapped.mapping.read(range.start, piece).map_err(cut_short)?;
                    }
                    (at, rest) = (range.end, more);
                }
                rest.fill(0);
                Ok(())
            }
            None => self.file.read_exact_at(into, self.position(offset)?),
        }
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        match &self.mapped {
            Some(mapped) => {
                mapped.populate(offset, from.len() as u64, true);
                mapped.mapping.write(offset, from).map_err(cut_short)
            }
            None => self.file.write_all_at(from, self.position(offset)?),
        }
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(self.search(range)?.map(|piece| piece.range))
    }

    fn data_runs(&self, range: Range<u64>, found: &mut Vec<DataRun>) -> io::Result<()> {
        let mut from = range.start;
        while let Some(Piece { range: piece, is_mixed }) = self.search(from..range.end)? {
            from = piece.end;
            if !is_mixed || !self.split(&piece, found)? {
                found.push(DataRun { range: piece, has_holes: is_mixed });
            }
        }
        Ok(())
    }

    fn read_data(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let Some(mapped) = &self.mapped else { return self.read(offset, into) };
        mapped.populate(offset, into.len() as u64, false);
        mapped.mapping.read(offset, into).map_err(cut_short)
    }

    fn pin(&self, range: Range<u64>, to_write: bool) -> Option<PinnedBytes> {
        let mapped = self.mapped.as_ref()?;
        let bytes = range.end - range.start;
        mapped.populate(range.start, bytes, to_write);
        mapped.mapping.pin(range.start, bytes as usize, true, to_write).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use limosa_testing::memfd;

    use super::*;
    use crate::memory::is_zero;

    const MIB: u64 = 1 << 20;

    /// Both ways to reach the same file.
    fn both(file: &File, offset: u64, bytes: u64) -> [FilePages; 2] {
        [
            FilePages::new(file.try_clone().unwrap(), offset),
            FilePages::mapped(file.try_clone().unwrap(), offset, bytes).unwrap(),
        ]
    }

    #[test]
    fn zeroes_that_arrive_in_untouched_memory_take_no_room() {
        for at in [0, 1] {
            let file = memfd(4 * MIB);
            let pages = &both(&file, MIB, 3 * MIB)[at];
            pages.write(300_000, &[7; 5]).unwrap();
            let before = file.metadata().unwrap().blocks();
            pages.zero(0, 3 * MIB).unwrap();
            assert_eq!(file.metadata().unwrap().blocks(), before, "the page that was written");
            let mut all = vec![1; MIB as usize];
            FilePages::new(file, MIB).read(0, &mut all).unwrap();
            assert!(is_zero(&all));
        }
    }

    #[test]
    fn a_huge_range_is_made_zero_in_pieces_as_the_engine_asks_for_it() {
        const PIECE_BYTES: u64 = 64 << 20;
        let (bytes, page) = (4 * PIECE_BYTES + MIB, 4096);
        for at in [0, 1] {
            let file = memfd(bytes);
            let pages = &both(&file, 0, bytes)[at];
            // On both sides of the pieces' ends.
            let touched = [0, PIECE_BYTES - page, PIECE_BYTES, 3 * PIECE_BYTES - page, bytes - page];
            touched.iter().for_each(|at| pages.write(*at, &[7; 4096]).unwrap());
            for from in (0..bytes).step_by(PIECE_BYTES as usize) {
                pages.zero(from, PIECE_BYTES.min(bytes - from)).unwrap();
            }
            for at in touched {
                let mut found = [1; 4096];
                pages.read(at, &mut found).unwrap();
                assert!(is_zero(&found), "at {at:#x}");
            }
            assert_eq!(file.metadata().unwrap().blocks(), 5 * 8, "only pages that were touched");
        }
    }

    #[test]
    fn offsets_beyond_all_files_are_errors_and_no_overflow() {
        for pages in both(&memfd(MIB), 4096, MIB - 4096) {
            for offset in [u64::MAX, u64::MAX - 4096, i64::MAX as u64] {
                assert!(pages.read(offset, &mut [0; 4096]).is_err());
                assert!(pages.write(offset, &[0; 4096]).is_err());
                let _ = pages.data(offset - 1..offset);
                let _ = pages.zero(offset, 4096);
            }
        }
    }

    #[test]
    fn what_one_writes_the_other_reads() {
        let file = memfd(4 * MIB);
        let [plain, mapped] = both(&file, MIB + 4096, 2 * MIB);
        let bytes: Vec<u8> = (0..MIB as usize + 4096).map(|at| (at / 3) as u8).collect();
        let mut got = vec![0; bytes.len()];
        mapped.write(8192, &bytes).unwrap();
        plain.read(8192, &mut got).unwrap();
        assert!(got == bytes);
        plain.write(4096, &bytes).unwrap();
        mapped.read(4096, &mut got).unwrap();
        assert!(got == bytes);
        assert!(mapped.read(2 * MIB - 1, &mut [0, 0]).is_err(), "beyond what was mapped");
    }

    #[test]
    fn memory_of_64_gib_that_was_hardly_touched_is_searched_without_being_read() {
        let bytes = 64 << 30;
        let file = memfd(bytes + 4096);
        for pages in both(&file, 4096, bytes) {
            pages.write(40 << 30, &[1; 4096]).unwrap();
            pages.write((40 << 30) + 8192, &[2; 4096]).unwrap();
            let (mut at, mut found) = (0, Vec::new());
            while let Some(data) = pages.data(at..bytes).unwrap() {
                at = data.end;
                found.push(data);
            }
            let page = |at: u64| (40 << 30) + at * 4096..(40 << 30) + (at + 1) * 4096;
            assert_eq!(found, [page(0), page(2)]);
            assert_eq!(pages.data(0..40 << 30).unwrap(), None);
            assert_eq!(
                pages.data(page(2).start + 1..page(2).start + 2).unwrap().unwrap().end,
                page(2).start + 2
            );
        }
        assert_eq!(file.metadata().unwrap().blocks(), 16, "two pages");
    }

    #[test]
    fn where_holes_and_data_alternate_few_searches_find_them_and_no_hole_is_filled() {
        let bytes = 4 * MIB;
        let file = memfd(bytes + 4096);
        for pages in both(&file, 4096, bytes) {
            for at in (0..bytes).step_by(8192) {
                pages.write(at, &[7; 4096]).unwrap();
            }
            let (mut at, mut pieces, mut read) = (0, 0, Vec::new());
            while let Some(data) = pages.data(at..bytes).unwrap() {
                read.resize((data.end - data.start) as usize, 1);
                pages.read(data.start, &mut read).unwrap();
                for (page, at) in read.chunks(4096).zip((data.start..).step_by(4096)) {
                    assert!(page.iter().all(|byte| *byte == if at % 8192 == 0 { 7 } else { 0 }), "{at:#x}");
                }
                (at, pieces) = (data.end, pieces + 1);
            }
            assert!(pieces < 16, "{pieces} searches for 512 pieces");
            assert_eq!(file.metadata().unwrap().blocks(), bytes / 2 / 512);
            // A page is found that is written where a hole was passed over.
            pages.write(MIB + 4096, &[9; 4096]).unwrap();
            let mut page = [0; 4096];
            pages.read(MIB + 4096, &mut page).unwrap();
            assert_eq!(page, [9; 4096]);
            file.set_len(0).unwrap();
            file.set_len(bytes + 4096).unwrap();
        }
    }

    #[test]
    fn the_second_search_of_memory_with_scattered_pages_looked_for_each_of_them() {
        let bytes = 4 * MIB;
        let file = memfd(bytes);
        for pages in both(&file, 0, bytes) {
            (0..bytes).step_by(8192).for_each(|at| pages.write(at, &[7; 4096]).unwrap());
            let pieces = || {
                let (mut at, mut pieces) = (0, 0);
                while let Some(data) = pages.data(at..bytes).unwrap() {
                    (at, pieces) = (data.end, pieces + 1);
                }
                pieces
            };
            for round in 0..3 {
                let pieces = pieces();
                assert!(pieces < 16, "{pieces} searches for 512 pieces in round {round}");
            }
        }
    }

    #[test]
    fn reading_untouched_memory_does_not_touch_it() {
        let file = memfd(MIB);
        for pages in both(&file, 0, MIB) {
            let mut all = vec![1; MIB as usize];
            pages.read(0, &mut all).unwrap();
            assert!(is_zero(&all));
            assert_eq!(file.metadata().unwrap().blocks(), 0);
        }
        let [plain, mapped] = both(&file, 0, MIB);
        plain.write(8192, &[7; 4096]).unwrap();
        let mut three = vec![1; 3 * 4096];
        mapped.read(4096, &mut three).unwrap();
        assert!(is_zero(&three[..4096]) && three[4096..8192] == [7; 4096] && is_zero(&three[8192..]));
        assert_eq!(file.metadata().unwrap().blocks(), 8, "one page");
    }

    #[test]
    fn a_page_that_is_written_after_it_was_found_empty_is_found() {
        let file = memfd(MIB);
        for pages in both(&file, 0, MIB) {
            assert_eq!(pages.data(0..8192).unwrap(), None);
            pages.write(4096, &[1]).unwrap();
            assert_eq!(pages.data(0..8192).unwrap(), Some(4096..8192));
            file.set_len(0).unwrap();
            file.set_len(MIB).unwrap();
        }
    }

    #[test]
    fn a_truncated_file_is_an_error_and_does_not_kill_the_process() {
        for at in [0, 1] {
            let file = memfd(MIB);
            let pages = &both(&file, 0, MIB)[at];
            pages.write(0, &[1; 4096]).unwrap();
            file.set_len(0).unwrap();
            assert!(pages.data(0..MIB).unwrap().is_some(), "so that it is read, and the error seen");
            let error = pages.read(0, &mut [0; 4096]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
