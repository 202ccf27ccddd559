//! Guest memory in a file, mapped or not: what the engine reads and writes, and where the file has data at all.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use limosa_guest_memory::FileMapping;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::memory::GuestPages;

/// Pages of a mapping are brought in by so many bytes, which costs a fraction of a fault for each.
const BLOCK_BYTES: u64 = 64 << 10;

/// Guest memory in a file: a memfd, hugetlbfs, any other.
///
/// Parts of it that have no data (`SEEK_HOLE` in lseek(2)) are known for zeroes without being read, so that memory that
/// was never touched stays so. To find them moves the file's position, which nothing else here depends on.
#[derive(Debug)]
pub struct FilePages {
    file: File,
    offset: u64,
    mapped: Option<Mapped>,
    /// Bytes of the file that have data, found last: the next question is mostly about the same.
    data: Mutex<Range<u64>>,
}

#[derive(Debug)]
struct Mapped {
    mapping: FileMapping,
    /// A bit for each block whose pages were brought in.
    present: Vec<AtomicU64>,
}

impl FilePages {
    /// Memory that starts at this offset of the file. It is read and written by system calls.
    pub fn new(file: File, offset: u64) -> FilePages {
        FilePages { file, offset, mapped: None, data: Mutex::default() }
    }

    /// The same, and `bytes` of it are mapped, which is faster. The errors are mmap(2)'s: the file has to be open for
    /// reading and writing. When the file is cut short while it is mapped, accesses fail and the process lives; for this
    /// a handler for SIGBUS is installed, see [`FileMapping`].
    pub fn mapped(file: File, offset: u64, bytes: u64) -> io::Result<FilePages> {
        let mapping = FileMapping::new(&file, offset, bytes, true, true)
            .map_err(|errno| io::Error::from_raw_os_error(errno.raw() as i32))?;
        let words = bytes.div_ceil(BLOCK_BYTES * u64::from(u64::BITS));
        let present = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(FilePages { mapped: Some(Mapped { mapping, present }), ..FilePages::new(file, offset) })
    }
}

impl Mapped {
    /// Before a long access: brings in what it will touch, at once instead of by a fault for each page.
    fn bring_in(&self, offset: u64, bytes: u64, to_write: bool) {
        // Blocks that lie wholly in the range; a short access may fault.
        let blocks = offset.div_ceil(BLOCK_BYTES)..(offset + bytes) / BLOCK_BYTES;
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
    let why = "beyond the memory's end, or the file behind it was cut short or has no more room on its disk";
    io::Error::new(io::ErrorKind::UnexpectedEof, why)
}

impl GuestPages for FilePages {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.mapped {
            Some(mapped) => {
                // To touch what has no data, be it to read, would make it.
                let end = offset.saturating_add(into.len() as u64);
                if end > mapped.mapping.len() {
                    return Err(cut_short(limosa_protocol::Errno::EFAULT));
                }
                let (mut at, mut rest) = (offset, into);
                while let Some(data) = self.data(at..end)? {
                    let (hole, more) = rest.split_at_mut((data.start - at) as usize);
                    let (piece, more) = more.split_at_mut((data.end - data.start) as usize);
                    hole.fill(0);
                    mapped.bring_in(data.start, piece.len() as u64, false);
                    mapped.mapping.read(data.start, piece).map_err(cut_short)?;
                    (at, rest) = (data.end, more);
                }
                rest.fill(0);
                Ok(())
            }
            None => self.file.read_exact_at(into, self.offset + offset),
        }
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        match &self.mapped {
            Some(mapped) => {
                mapped.bring_in(offset, from.len() as u64, true);
                mapped.mapping.write(offset, from).map_err(cut_short)
            }
            None => self.file.write_all_at(from, self.offset + offset),
        }
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        if range.is_empty() {
            return Ok(None);
        }
        let wanted = range.start + self.offset..range.end + self.offset;
        let within = |data: &Range<u64>| {
            let (start, end) = (data.start.max(wanted.start), data.end.min(wanted.end));
            (start < end).then(|| start - self.offset..end - self.offset)
        };
        // Rollback meanwhile, for the file has one position.
        let mut known = crate::lock::lock(&self.data);
        if known.contains(&wanted.start) {
            return Ok(within(&known));
        }
        let start = match seek(&self.file, SeekFrom::Data(wanted.start)) {
            Ok(start) => start,
            // Nothing until the end of the file. Beyond it there is no memory, which a read has to say.
            Err(Errno::NXIO) if self.file.metadata()?.len() >= wanted.end => return Ok(None),
            Err(_) => return Ok(Some(range)),
        };
        if start >= wanted.end {
            return Ok(None);
        }
        let end = seek(&self.file, SeekFrom::Hole(start)).unwrap_or(wanted.end);
        *known = start..end;
        Ok(within(&known))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::memory::is_zero;

    const MIB: u64 = 1 << 20;

    fn memfd(bytes: u64) -> File {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        file
    }

    /// Both ways to reach the same file.
    fn both(file: &File, offset: u64, bytes: u64) -> [FilePages; 2] {
        [
            FilePages::new(file.try_clone().unwrap(), offset),
            FilePages::mapped(file.try_clone().unwrap(), offset, bytes).unwrap(),
        ]
    }

    #[test]
    fn zeroes_that_come_to_memory_never_touched_take_no_room() {
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
    fn memory_of_64_gib_that_was_hardly_touched_is_gone_over_without_being_read() {
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
    fn to_read_memory_never_touched_does_not_touch_it() {
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
    fn a_file_that_was_cut_short_is_an_error_and_not_the_end() {
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
