//! Guest memory of a move: its regions, and the logs of dirty pages.

mod dirty;
mod file_pages;
mod fingerprint;
mod prints;

use std::io;
use std::ops::Range;

pub(crate) use dirty::{DirtyLogs, DirtyPages};
pub use file_pages::FilePages;
pub use fingerprint::{FingerprintKey, FingerprintLog, Fingerprinted};
use limosa_client::DirtySource;
use limosa_clockwork::catch;
use limosa_guest_memory::PinnedBytes;
use limosa_protocol::bitmap::DirtyBitmap;

use crate::Error;
use limosa_stream::MemoryFacts;

/// The engine's page size in bytes. Guest memory consists of whole pages.
pub const PAGE_BYTES: u64 = 4096;

/// Reads and writes pages of guest memory. Offsets are in bytes from the start of the region.
///
/// The engine calls these from several threads at once.
pub trait GuestPages: Sync {
    /// Reads all of `into`.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes all of `from`.
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()>;

    /// The first part of the range that may hold anything but zeroes; `None` when all of the range is zero. The engine
    /// does not read the rest, so that untouched memory stays untouched. The default treats the whole range as data.
    ///
    /// The engine calls it after it has taken the dirty marks of the range, and before it reads. A page that is written
    /// meanwhile is dirty again. The pages before the data, or the whole range, are then sent as zeroes.
    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok((!range.is_empty()).then_some(range))
    }

    /// All parts of the range that may hold anything but zeroes, in ascending order, appended to `found`: what [`GuestPages::data`]
    /// finds one after the other. An implementation that can tell many parts at once saves the search for each.
    fn data_runs(&self, range: Range<u64>, found: &mut Vec<DataRun>) -> io::Result<()> {
        let mut from = range.start;
        while let Some(data) = self.data(from..range.end)? {
            if data.end <= from {
                break;
            }
            from = data.end;
            found.push(DataRun { range: data, has_holes: false });
        }
        Ok(())
    }

    /// Reads all of `into`, within a part that [`GuestPages::data_runs`] has found and that has no holes. The default is
    /// [`GuestPages::read`].
    fn read_data(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read(offset, into)
    }

    /// The address of a range, for system calls that read from it, or write to it with `to_write`. `None`, the default,
    /// means that there is no such address: the engine then calls [`GuestPages::read`] and [`GuestPages::write`].
    ///
    /// A range to be read lies within a part that [`GuestPages::data_runs`] has found and that has no holes. Such reads
    /// and writes bypass this trait, so an implementation that has to see them returns `None`.
    fn pin(&self, range: Range<u64>, to_write: bool) -> Option<PinnedBytes> {
        let _ = (range, to_write);
        None
    }

    /// Makes the range zero. The default does not touch pages that are zero already, so that untouched memory takes no
    /// room.
    ///
    /// The engine calls it for at most 64 MiB at a time, in whole pages, so that it can answer its peer between two
    /// calls.
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        const PIECE_BYTES: u64 = 256 << 10;
        let zeroes = [0; PAGE_BYTES as usize];
        let end = offset.saturating_add(bytes);
        let mut found = Vec::new();
        let mut from = offset;
        while let Some(data) = self.data(from..end)? {
            // An implementation may give more than it was asked for, or nothing.
            let data = data.start.max(from)..data.end.min(end);
            if data.is_empty() {
                break;
            }
            for at in (data.start..data.end).step_by(PIECE_BYTES as usize) {
                found.resize(PIECE_BYTES.min(data.end - at) as usize, 0);
                self.read(at, &mut found)?;
                for (page, at) in found.chunks(zeroes.len()).zip((at..).step_by(zeroes.len())) {
                    if !is_zero(page) {
                        self.write(at, &zeroes[..page.len()])?;
                    }
                }
            }
            from = data.end;
        }
        Ok(())
    }
}

impl<P: GuestPages + ?Sized> GuestPages for &P {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        (**self).read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        (**self).write(offset, from)
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        (**self).data(range)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        (**self).zero(offset, bytes)
    }

    fn data_runs(&self, range: Range<u64>, found: &mut Vec<DataRun>) -> io::Result<()> {
        (**self).data_runs(range, found)
    }

    fn read_data(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        (**self).read_data(offset, into)
    }

    fn pin(&self, range: Range<u64>, to_write: bool) -> Option<PinnedBytes> {
        (**self).pin(range, to_write)
    }
}

/// A part of memory that may hold anything but zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataRun {
    /// Where it is, in bytes from the start of the region.
    pub range: Range<u64>,
    /// Whether there may be untouched memory in it, which an access to its address would touch.
    pub has_holes: bool,
}

/// A region of guest memory.
#[derive(Clone, Copy)]
pub struct MemoryRegion<'a> {
    /// The region's number, the same on both sides.
    pub id: u32,
    /// Its first address as devices see it (IOVA), a multiple of [`PAGE_BYTES`]. The region should be mapped to the
    /// devices as one piece or several, but not in one piece with another region.
    pub iova: u64,
    /// Its size in bytes, a multiple of [`PAGE_BYTES`].
    pub size: u64,
    /// Its pages.
    pub pages: &'a dyn GuestPages,
}

impl std::fmt::Debug for MemoryRegion<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryRegion {} ({:#x} bytes at {:#x})", self.id, self.size, self.iova)
    }
}

impl MemoryRegion<'_> {
    pub(crate) fn facts(&self) -> MemoryFacts {
        MemoryFacts { id: self.id, address: self.iova, bytes: self.size, page_bytes: PAGE_BYTES }
    }

    /// The first whole pages of a range of whole pages that may hold anything but zeroes.
    pub(crate) fn data(&self, range: Range<u64>) -> Result<Option<Range<u64>>, Error> {
        let found = self.call("data", range.start, || self.pages.data(range.clone()))?;
        Ok(whole_pages(found, &range))
    }

    /// All whole pages of a range of whole pages that may hold anything but zeroes, in ascending order.
    pub(crate) fn data_runs(&self, range: Range<u64>, found: &mut Vec<DataRun>) -> Result<(), Error> {
        found.clear();
        self.call("data", range.start, || self.pages.data_runs(range.clone(), found))?;
        let mut end = range.start;
        found.retain_mut(|run| {
            let Some(pages) = whole_pages(Some(run.range.clone()), &(end..range.end)) else { return false };
            end = pages.end;
            run.range = pages;
            true
        });
        Ok(())
    }

    /// Reads from a part that was found.
    pub(crate) fn read_run(&self, run: &DataRun, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        match run.has_holes {
            true => self.read(offset, into),
            false => self.call("read", offset, || self.pages.read_data(offset, into)),
        }
    }

    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.call("read", offset, || self.pages.read(offset, into))
    }

    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.call("write", offset, || self.pages.write(offset, from))
    }

    pub(crate) fn zero(&self, offset: u64, bytes: u64) -> Result<(), Error> {
        self.call("zero", offset, || self.pages.zero(offset, bytes))
    }

    /// The memory of a range by its address, if it has one and all of the range is there.
    pub(crate) fn pin(&self, range: Range<u64>, to_write: bool) -> Result<Option<PinnedBytes>, Error> {
        let bytes = (range.end - range.start) as usize;
        let pinned = self.call("pin", range.start, || Ok(self.pages.pin(range.clone(), to_write)))?;
        Ok(pinned.filter(|pinned| pinned.len() == bytes))
    }

    /// Calls the pages. A panic is an error that names the call and the address.
    fn call<T>(&self, name: &str, offset: u64, call: impl FnOnce() -> io::Result<T>) -> Result<T, Error> {
        match catch(call) {
            Ok(done) => done.map_err(|error| self.failed(offset, error)),
            Err(panic) => {
                let address = self.iova.saturating_add(offset);
                Err(Error::panicked(&format!("GuestPages::{name} at {address:#x}"), &panic))
            }
        }
    }

    pub(crate) fn failed(&self, offset: u64, error: io::Error) -> Error {
        Error::Memory { address: self.iova.saturating_add(offset), error }
    }
}

/// Why an access to mapped memory fails.
pub(crate) fn cut_short() -> io::Error {
    let why = "beyond the end of the memory, or its file was truncated or has no more room on its disk";
    io::Error::new(io::ErrorKind::UnexpectedEof, why)
}

/// What [`GuestPages::data`] found in a range of whole pages, as whole pages within the range. An implementation may
/// return more than the range, or an empty range.
fn whole_pages(found: Option<Range<u64>>, range: &Range<u64>) -> Option<Range<u64>> {
    let found = found?;
    let start = found.start / PAGE_BYTES * PAGE_BYTES;
    let end = found.end.min(range.end).checked_next_multiple_of(PAGE_BYTES).unwrap_or(range.end);
    let pages = start.max(range.start)..end.min(range.end);
    (!pages.is_empty()).then_some(pages)
}

/// The caller's own log of dirty pages: the pages that vCPUs write. The engine reads devices' own logs itself;
/// [`Memory::with_sources`] adds other logs of device writes.
///
/// Bit *n* of a bitmap stands for page *n* of the region, of [`PAGE_BYTES`].
pub trait DirtyLog: Send {
    /// Starts logging, with all pages clean. If this fails, the engine calls [`DirtyLog::stop`], which has to undo what
    /// was started.
    fn start(&mut self) -> io::Result<()>;

    /// Moves the marks of a region to `dirty`. `region` is its index among the regions of the move. When this fails,
    /// all of the region is taken as dirty.
    fn harvest(&mut self, region: usize, dirty: &DirtyBitmap) -> io::Result<()>;

    /// Returns pages to the log after a move was undone: all pages of a region that were harvested in the move, from
    /// this log, from devices and from other sources. A log that has other readers passes the pages on to them.
    fn give_back(&mut self, region: usize, dirty: &DirtyBitmap) {
        let _ = (region, dirty);
    }

    /// Whether the log has readers besides the engine, so that [`DirtyLog::give_back`] is of use. A log that returns
    /// false is not harvested again when a move is undone, which can save the time of reading all memory while the
    /// guest stands still.
    fn has_other_readers(&self) -> bool {
        true
    }

    /// Stops logging: the move is over, or [`DirtyLog::start`] has failed.
    fn stop(&mut self);

    /// Whether the log sees what devices write as well, so that devices without DMA logging are covered.
    fn covers_devices(&self) -> bool {
        false
    }
}

/// The guest memory of a move, at the source.
///
/// Every page that is written during the move has to be logged, or the destination gets an old copy. So memory always comes
/// with a decision about its writers: [`Memory::logged`] has a log of what vCPUs write, and with
/// [`Memory::stopped`] the caller promises that they write nothing.
#[derive(Default)]
pub struct Memory<'a> {
    pub(crate) regions: Vec<MemoryRegion<'a>>,
    /// The log of what vCPUs write.
    pub(crate) log: Option<&'a mut dyn DirtyLog>,
    /// Logs of what devices write, besides the devices' own.
    pub(crate) sources: Vec<&'a dyn DirtySource>,
}

impl<'a> Memory<'a> {
    /// No memory: only devices move.
    pub fn none() -> Memory<'a> {
        Memory::default()
    }

    /// Memory that vCPUs write while it moves, as `log` sees it.
    pub fn logged(regions: Vec<MemoryRegion<'a>>, log: &'a mut dyn DirtyLog) -> Memory<'a> {
        Memory { regions, log: Some(log), sources: Vec::new() }
    }

    /// Memory that only devices write. The caller promises that all other writers, vCPUs above all, are stopped from
    /// before the move until its end. Pages that they write meanwhile are lost, without an error.
    pub fn stopped(regions: Vec<MemoryRegion<'a>>) -> Memory<'a> {
        Memory { regions, log: None, sources: Vec::new() }
    }

    /// Adds logs of device writes besides the devices' own: an IOMMU's, a container's. All of them are used.
    ///
    /// If a device has no log of its own and no source sees it ([`DirtySource::sees`]), all memory moves after the
    /// stop. Sources are not needed for devices that log themselves, and may be coarser.
    #[must_use]
    pub fn with_sources(mut self, sources: Vec<&'a dyn DirtySource>) -> Memory<'a> {
        self.sources.extend(sources);
        self
    }
}

impl std::fmt::Debug for Memory<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sources: Vec<_> = self.sources.iter().map(|source| source.name()).collect();
        f.debug_struct("Memory")
            .field("regions", &self.regions)
            .field("log", &self.log.is_some())
            .field("sources", &sources)
            .finish()
    }
}

/// Whether all bytes are zero. The comparison is memcmp's, which has the widest registers that the processor has, also in a build
/// without optimization.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    static ZEROES: [u8; PAGE_BYTES as usize] = [0; PAGE_BYTES as usize];
    bytes.chunks(ZEROES.len()).all(|chunk| *chunk == ZEROES[..chunk.len()])
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Bytes in a vector, of which `data` gives a range that was not asked for.
    struct Careless(Mutex<Vec<u8>>, Range<u64>);

    impl GuestPages for Careless {
        fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
            into.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..into.len()]);
            Ok(())
        }
        fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
            self.0.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
            Ok(())
        }
        fn data(&self, _: Range<u64>) -> io::Result<Option<Range<u64>>> {
            Ok(Some(self.1.clone()))
        }
    }

    #[test]
    fn data_that_is_empty_or_beyond_the_range_ends_no_loop_late_and_panics_nowhere() {
        let backwards = Range { start: 4096, end: 0 };
        for data in [0..0, 8192..8192, backwards, 0..u64::MAX, u64::MAX - 1..u64::MAX, 100..101] {
            let pages = Careless(Mutex::new(vec![7; 16384]), data.clone());
            let region = MemoryRegion { id: 0, iova: 0, size: 16384, pages: &pages };
            if let Some(found) = region.data(4096..12288).unwrap() {
                assert!(
                    found.start >= 4096 && found.end <= 12288 && !found.is_empty(),
                    "{data:?}: {found:?}"
                );
            }
            pages.zero(4096, 8192).unwrap();
            let bytes = pages.0.lock().unwrap();
            assert!(bytes[..4096] == [7; 4096] && bytes[12288..] == [7; 4096], "{data:?}");
        }
    }

    #[test]
    fn memory_says_what_is_known_of_its_writers() {
        struct Log;
        impl DirtyLog for Log {
            fn start(&mut self) -> io::Result<()> {
                Ok(())
            }
            fn harvest(&mut self, _: usize, _: &DirtyBitmap) -> io::Result<()> {
                Ok(())
            }
            fn stop(&mut self) {}
        }
        let pages = Careless(Mutex::default(), 0..0);
        let region = MemoryRegion { id: 0, iova: 0, size: 4096, pages: &pages };
        let mut log = Log;
        assert!(Memory::logged(vec![region], &mut log).log.is_some());
        assert!(Memory::stopped(vec![region]).log.is_none());
        assert!(Memory::none().regions.is_empty());
    }

    #[test]
    fn one_byte_makes_a_page_not_zero() {
        for at in [0, 63, 64, 4095] {
            let mut page = [0; 4096];
            assert!(is_zero(&page));
            page[at] = 1;
            assert!(!is_zero(&page));
        }
        assert!(!is_zero(&[0; 65].map(|byte: u8| byte | 1)[64..]));
    }
}
