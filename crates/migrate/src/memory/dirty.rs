//! [`DirtyLogs`]: the logs of dirty pages of a source, and the pages that are still to be sent.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::available_parallelism;

use limosa_client::Device;
use limosa_client::dirty::{DeviceLog, DirtySource, StartedLog};
use limosa_protocol::bitmap::{DirtyBitmap, Grid, runs_in, words_for};
use limosa_protocol::feature::DmaLoggingRange;

use super::{Memory, MemoryRegion, PAGE_BYTES};
use crate::devices::{MovedDevice, failed};
use crate::error::{check_cancel, guard};
use crate::lock::lock;
use crate::vmm;
use crate::{Cancel, Error, Result};

/// The most words of the bitmap in which a log reports at once: those of 16 GiB, which stay in a core's cache.
const PIECE_WORDS: usize = 64 << 10;
/// Words of a report are looked at together, as long as none has a mark.
const CLOSE_WORDS: usize = 64;

/// Which pages are still to be sent, and which were ever harvested, by region.
#[derive(Debug, Default)]
pub(crate) struct DirtyPages {
    pub(crate) pending: Vec<DirtyBitmap>,
    harvested: Vec<DirtyBitmap>,
    /// The addresses of the regions as devices see them.
    regions: Vec<DmaLoggingRange>,
    /// Clear words for reports, one for each thread that harvests at the same time.
    pieces: Mutex<Vec<Vec<u64>>>,
}

impl DirtyPages {
    fn new(regions: &[MemoryRegion<'_>]) -> Result<DirtyPages> {
        let mut pages = DirtyPages::default();
        for region in regions {
            let bitmap = || {
                let bitmap = DirtyBitmap::new(region.size / PAGE_BYTES);
                bitmap.map_err(|_| region.failed(0, io::ErrorKind::OutOfMemory.into()))
            };
            pages.pending.push(bitmap()?);
            pages.harvested.push(bitmap()?);
            pages.regions.push(DmaLoggingRange { iova: region.iova, length: region.size });
        }
        Ok(pages)
    }

    /// Takes every page as dirty.
    pub(crate) fn everything(&self) {
        self.pending.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
    }

    /// Bytes that are still to be sent.
    pub(crate) fn bytes(&self) -> u64 {
        self.pending.iter().map(|bitmap| bitmap.count() * PAGE_BYTES).sum()
    }

    /// Makes room for the reports of this many threads, so that nothing is allocated while the guest is stopped.
    fn make_room(&self, threads: usize) {
        let largest = self.pending.iter().map(|bitmap| words_for(bitmap.pages())).max().unwrap_or(0);
        lock(&self.pieces).resize_with(threads, || {
            // Written, so that it is memory and not only addresses.
            let mut piece = vec![1; largest.min(PIECE_WORDS)];
            piece.fill(0);
            piece
        });
    }

    /// Every page counts as harvested.
    fn everything_was_harvested(&self) {
        self.harvested.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
    }

    fn everything_in(&self, region: usize) {
        for bitmap in [&self.pending[region], &self.harvested[region]] {
            bitmap.set_range(0, bitmap.pages());
        }
    }

    /// Takes pages from `first` on as dirty that a report has marked, and clears the report.
    fn add(&self, region: usize, first: u64, words: &mut [u64]) {
        let pages = self.pending[region].pages();
        for (words, at) in words.chunks_mut(CLOSE_WORDS).zip((first..).step_by(CLOSE_WORDS * 64)) {
            if words.iter().fold(0, |all, word| all | word) == 0 {
                continue;
            }
            let count = (words.len() as u64 * 64).min(pages.saturating_sub(at));
            self.pending[region].or_words(at, words, count);
            self.harvested[region].or_words(at, words, count);
            words.fill(0);
        }
    }

    /// Takes pages as dirty that a report has marked in pages of any size, and clears the report. `length` is its bytes.
    fn add_coarse(&self, region: usize, from: Grid, length: u64, words: &mut [u64]) {
        let (offset, page_bytes) = (from.iova - self.regions[region].iova, from.page_size);
        for (page, pages) in runs_in(words, 0, length.div_ceil(page_bytes)) {
            let begin = offset + page * page_bytes;
            let end = offset + (page + pages).saturating_mul(page_bytes).min(length);
            let (begin, end) = (begin / PAGE_BYTES, end.div_ceil(PAGE_BYTES));
            self.pending[region].set_range(begin, end - begin);
            self.harvested[region].set_range(begin, end - begin);
        }
        words.fill(0);
    }

    /// Collects what a device has logged, on whatever thread. If that fails, all is dirty. After a panic every page counts as
    /// harvested.
    pub(crate) fn harvest_device(&self, device: &dyn Device, log: StartedLog) -> Result<()> {
        let log = DeviceLog::started(device, log);
        self.harvest_by(log.name(), |region, range, piece| {
            log.report_in_pieces(range.iova, range.length, piece, |from, length, words| {
                match from.page_size == PAGE_BYTES {
                    true => self.add(region, (from.iova - range.iova) / PAGE_BYTES, words),
                    false => self.add_coarse(region, from, length, words),
                }
            })
        })
    }

    /// Collects what another source has logged, as [`DirtyPages::harvest_device`].
    fn harvest_source(&self, source: &dyn DirtySource) -> Result<()> {
        const PIECE_BYTES: u64 = PIECE_WORDS as u64 * 64 * PAGE_BYTES;
        self.harvest_by(source.name(), |region, range, piece| {
            for done in (0..range.length).step_by(PIECE_BYTES as usize) {
                let length = PIECE_BYTES.min(range.length - done);
                let words = words_for(length / PAGE_BYTES);
                if piece.len() < words {
                    piece.resize(words, 0);
                }
                source.report(range.iova + done, length, PAGE_BYTES, &mut piece[..words])?;
                self.add(region, done / PAGE_BYTES, &mut piece[..words]);
            }
            Ok(())
        })
    }

    fn harvest_by(
        &self,
        name: &str,
        report: impl Fn(usize, DmaLoggingRange, &mut Vec<u64>) -> limosa_client::Result<()>,
    ) -> Result<()> {
        let harvested = guard(&format!("the log of dirty pages of {name}"), || {
            let mut piece = lock(&self.pieces).pop().unwrap_or_default();
            for (region, range) in self.regions.iter().enumerate() {
                if let Err(error) = report(region, *range, &mut piece) {
                    tracing::warn!("{name}: the dirty log is lost, all is dirty: {error}");
                    self.everything_in(region);
                    piece.fill(0);
                }
            }
            lock(&self.pieces).push(piece);
            Ok(())
        });
        if harvested.is_err() {
            self.everything_was_harvested();
        }
        harvested
    }
}

/// The logs of a move, and how far each was started.
#[derive(Default)]
pub(crate) struct DirtyLogs {
    pub(crate) pages: Arc<DirtyPages>,
    /// The pages that the caller's log reports, by region; clear between two harvests.
    fresh: Vec<DirtyBitmap>,
    /// For each device its log, where it logs.
    device_logs: Vec<Option<StartedLog>>,
    /// How many of the caller's sources were started, from the first on.
    sources_started: usize,
    /// The caller's log was asked to start, whether or not it did: it has to be stopped.
    log_asked: bool,
    /// The caller's log has started.
    log_started: bool,
    /// Whether there is a device whose writes no log sees: memory is dirty as long as the device runs.
    pub(crate) blind: bool,
}

impl DirtyLogs {
    /// Starts all logs and takes every page as dirty. A note names each device whose writes no log sees. After an error
    /// [`DirtyLogs::stop`] stops the logs that were started.
    pub(crate) fn start(
        &mut self,
        devices: &[MovedDevice<'_>],
        memory: &mut Memory<'_>,
        notes: &mut Vec<String>,
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        self.device_logs = vec![None; devices.len()];
        let pages = DirtyPages::new(&memory.regions)?;
        pages.everything();
        self.pages = Arc::new(pages);
        if memory.regions.is_empty() {
            return Ok(());
        }
        if let Some(log) = &mut memory.log {
            for region in &memory.regions {
                let fresh = DirtyBitmap::new(region.size / PAGE_BYTES);
                self.fresh.push(fresh.map_err(|_| region.failed(0, io::ErrorKind::OutOfMemory.into()))?);
            }
            // A log whose start fails half-way has to be stopped as well.
            self.log_asked = true;
            let failed = |error: io::Error| {
                let why = format!("the log of dirty pages cannot be started: {error}");
                memory.regions[0].failed(0, io::Error::new(error.kind(), why))
            };
            guard("DirtyLog::start", || log.start().map_err(failed))?;
            self.log_started = true;
        }
        let pages = Arc::clone(&self.pages);
        let ranges = &pages.regions;
        for source in &memory.sources {
            start_source(*source, ranges)?;
            self.sources_started += 1;
        }
        for (at, device) in devices.iter().enumerate() {
            check_cancel(cancel)?;
            let device = device.device;
            let log = DeviceLog::new(device);
            if log.is_supported().map_err(|error| failed(device, STARTING, error))? {
                start_source(&log, ranges)?;
                self.device_logs[at] = log.state();
                continue;
            }
            let name = device.name();
            let is_seen = memory.sources.iter().any(|source| source.sees(device))
                || memory.log.as_ref().is_some_and(|log| log.covers_devices());
            if !is_seen {
                self.blind = true;
                notes.push(format!("no log sees the DMA of {name}: all memory moves after the stop"));
            }
        }
        let logs = self.device_logs.iter().flatten().count();
        let threads = available_parallelism().map_or(1, |threads| threads.get()).min(logs);
        self.pages.make_room(threads.max(1));
        Ok(())
    }

    /// A device's log, if the harvest after the stop reads it.
    pub(crate) fn of_device(&self, device: usize) -> Option<StartedLog> {
        self.device_logs.get(device).copied().flatten().filter(|_| !self.blind)
    }

    /// Collects the pages that were written since the last harvest. If a log fails, its region is dirty, and the result says
    /// why. After an error, as of a log that panics, every page counts as harvested: what the other logs had reported by
    /// then is lost.
    pub(crate) fn harvest(
        &mut self,
        devices: &[MovedDevice<'_>],
        memory: &mut Memory<'_>,
    ) -> Result<Option<String>> {
        for (device, log) in devices.iter().zip(&self.device_logs) {
            if let Some(log) = log {
                self.pages.harvest_device(device.device, *log)?;
            }
        }
        self.harvest_others(memory)
    }

    /// The same, of all logs but those of devices.
    pub(crate) fn harvest_others(&mut self, memory: &mut Memory<'_>) -> Result<Option<String>> {
        for source in memory.sources.iter().take(self.sources_started) {
            self.pages.harvest_source(*source)?;
        }
        let Some(log) = memory.log.as_mut().filter(|_| self.log_started) else { return Ok(None) };
        let mut lost = None;
        for (at, (region, fresh)) in memory.regions.iter().zip(&self.fresh).enumerate() {
            match guard("DirtyLog::harvest", || Ok(log.harvest(at, fresh))) {
                Ok(Ok(())) => {
                    self.pages.pending[at].or(fresh);
                    self.pages.harvested[at].or(fresh);
                }
                Ok(Err(error)) => {
                    lost.get_or_insert(format!("{region:?}: the log of dirty pages: {error}"));
                    self.pages.everything_in(at);
                }
                Err(panic) => {
                    self.pages.everything_was_harvested();
                    return Err(panic);
                }
            }
            fresh.clear();
        }
        Ok(lost)
    }

    /// Ends all logs. With `give_back`, harvests once more and hands the caller's log everything that was harvested, if
    /// it has other readers. Failures are added to the notes. A panic of one log does not prevent the end of the others.
    pub(crate) fn stop(
        &mut self,
        devices: &[MovedDevice<'_>],
        memory: &mut Memory<'_>,
        give_back: bool,
        notes: &mut Vec<String>,
    ) {
        let has_readers = memory.log.as_ref().is_some_and(|log| log.has_other_readers());
        if give_back && self.log_started && has_readers {
            match self.harvest(devices, memory) {
                Ok(None) => {}
                Ok(Some(lost)) => notes.push(format!("the last dirty pages are not known: {lost}")),
                Err(error) => notes.push(format!("the last dirty pages are not known: {error}")),
            }
            if let Some(log) = &mut memory.log {
                let harvested = self.pages.harvested.iter().enumerate();
                let given_back = vmm::tell("DirtyLog::give_back", || {
                    harvested.for_each(|(at, bitmap)| log.give_back(at, bitmap));
                });
                notes.extend(given_back.err().map(|why| format!("dirty pages were not given back: {why}")));
            }
        }
        let mut stop = |source: &dyn DirtySource| {
            let stopped = limosa_clockwork::catch(|| source.stop());
            let error = match stopped {
                Ok(stopped) => stopped.err().map(|error| error.to_string()),
                Err(panic) => Some(panic.to_string()),
            };
            notes.extend(error.map(|error| format!("DMA logging stays on: {error}")));
        };
        for (device, log) in devices.iter().zip(&mut self.device_logs) {
            if let Some(log) = log.take() {
                stop(&DeviceLog::started(device.device, log));
            }
        }
        let started = std::mem::take(&mut self.sources_started);
        memory.sources.iter().take(started).for_each(|source| stop(*source));
        if let Some(log) = &mut memory.log
            && std::mem::take(&mut self.log_asked)
        {
            notes.extend(vmm::tell("DirtyLog::stop", || log.stop()).err());
        }
    }
}

const STARTING: &str = "starting its DMA log";

fn start_source(source: &dyn DirtySource, ranges: &[DmaLoggingRange]) -> Result<()> {
    source.start(PAGE_BYTES, ranges).map(drop).map_err(|error| Error::Device {
        device: source.name().into(),
        doing: STARTING.into(),
        error,
    })
}
