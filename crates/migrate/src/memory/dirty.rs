//! [`DirtyLogs`]: the logs of dirty pages of a source, and the pages that are still to be sent.

use std::io;
use std::sync::Arc;

use limosa_client::dirty::{DeviceLog, DirtySource, Fused};
use limosa_protocol::bitmap::{DirtyBitmap, words_for};
use limosa_protocol::feature::DmaLoggingRange;

use super::{Memory, PAGE_BYTES};
use crate::devices::{MovedDevice, failed};
use crate::error::{check_cancel, guard};
use crate::vmm;
use crate::{Cancel, Error, Result};

/// Which pages are still to be sent, and which were ever harvested, by region.
#[derive(Debug, Default)]
pub(crate) struct DirtyPages {
    pub(crate) pending: Vec<DirtyBitmap>,
    harvested: Vec<DirtyBitmap>,
}

impl DirtyPages {
    /// Takes every page as dirty.
    pub(crate) fn everything(&self) {
        self.pending.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
    }

    /// Bytes that are still to be sent.
    pub(crate) fn bytes(&self) -> u64 {
        self.pending.iter().map(|bitmap| bitmap.count() * PAGE_BYTES).sum()
    }
}

/// The logs of a move, and how far each was started.
#[derive(Default)]
pub(crate) struct DirtyLogs {
    pub(crate) pages: Arc<DirtyPages>,
    /// For each device the page size of its log, in bytes, where it logs.
    device_page_bytes: Vec<Option<u64>>,
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
        self.device_page_bytes = vec![None; devices.len()];
        let mut pages = DirtyPages::default();
        for region in &memory.regions {
            let bitmap = || {
                let bitmap = DirtyBitmap::new(region.size / PAGE_BYTES);
                bitmap.map_err(|_| region.failed(0, io::ErrorKind::OutOfMemory.into()))
            };
            pages.pending.push(bitmap()?);
            pages.harvested.push(bitmap()?);
        }
        pages.everything();
        self.pages = Arc::new(pages);
        if memory.regions.is_empty() {
            return Ok(());
        }
        if let Some(log) = &mut memory.log {
            // One that fails half-way has to be stopped as well.
            self.log_asked = true;
            guard("DirtyLog::start", || log.start().map_err(|error| memory.regions[0].failed(0, error)))?;
            self.log_started = true;
        }
        let regions = memory.regions.iter();
        let ranges: Vec<_> =
            regions.map(|region| DmaLoggingRange { iova: region.iova, length: region.size }).collect();
        for source in &memory.sources {
            start_source(*source, &ranges)?;
            self.sources_started += 1;
        }
        for (at, device) in devices.iter().enumerate() {
            check_cancel(cancel)?;
            let device = device.device;
            let log = DeviceLog::new(device);
            if log.is_supported().map_err(|error| failed(device, STARTING, error))? {
                self.device_page_bytes[at] = Some(start_source(&log, &ranges)?);
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
        Ok(())
    }

    /// Collects the pages that were written since the last harvest. If a log fails, its region is dirty, and the result says
    /// why. After an error, as of a log that panics, every page counts as harvested: what the other logs had reported by
    /// then is lost.
    pub(crate) fn harvest(
        &mut self,
        devices: &[MovedDevice<'_>],
        memory: &mut Memory<'_>,
    ) -> Result<Option<String>> {
        let harvested = guard("the source's logs of dirty pages", || self.collect(devices, memory));
        if harvested.is_err() {
            self.pages.harvested.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
        }
        harvested
    }

    fn collect(&self, devices: &[MovedDevice<'_>], memory: &mut Memory<'_>) -> Result<Option<String>> {
        let mut lost = None;
        let logs: Vec<_> = (devices.iter().zip(&self.device_page_bytes))
            .filter_map(|(device, page_bytes)| Some(DeviceLog::started(device.device, (*page_bytes)?)))
            .collect();
        let started = memory.sources.iter().take(self.sources_started).copied();
        let sources = Fused::new(logs.iter().map(|log| log as &dyn DirtySource).chain(started).collect());
        for (at, region) in memory.regions.iter().enumerate() {
            let Ok(fresh) = DirtyBitmap::new(region.size / PAGE_BYTES) else {
                return Err(region.failed(0, io::ErrorKind::OutOfMemory.into()));
            };
            let everything = || fresh.set_range(0, fresh.pages());
            let mut words = vec![0; words_for(fresh.pages())];
            match sources.report(region.iova, region.size, PAGE_BYTES, &mut words) {
                Ok(()) => fresh.or_words(0, &words, fresh.pages()),
                Err(error) => {
                    lost.get_or_insert(format!("{region:?}: {error}"));
                    everything();
                }
            }
            if let Some(log) = &mut memory.log
                && self.log_started
                && let Err(error) = guard("DirtyLog::harvest", || Ok(log.harvest(at, &fresh)))?
            {
                lost.get_or_insert(format!("{region:?}: the log of dirty pages: {error}"));
                everything();
            }
            self.pages.pending[at].or(&fresh);
            self.pages.harvested[at].or(&fresh);
        }
        Ok(lost)
    }

    /// Ends all logs. With `give_back`, harvests once more and hands the caller's log everything that was harvested, if
    /// anybody else lives by it. What could not be done is told. A panic of one log does not keep the others on.
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
            notes.extend(error.map(|error| format!("DMA logging goes on: {error}")));
        };
        for (device, page_bytes) in devices.iter().zip(&mut self.device_page_bytes) {
            if let Some(page_bytes) = page_bytes.take() {
                stop(&DeviceLog::started(device.device, page_bytes));
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

/// Starts a source and returns its page size.
fn start_source(source: &dyn DirtySource, ranges: &[DmaLoggingRange]) -> Result<u64> {
    source.start(PAGE_BYTES, ranges).map_err(|error| Error::Device {
        device: source.name().into(),
        doing: STARTING.into(),
        error,
    })
}
