//! Dirty pages of a source: the logs that tell them, and the rounds in which they are sent.

use std::io;

use limosa_client::dirty::{DeviceLog, DirtySource, Fused};
use limosa_clockwork::Monitor;
use limosa_protocol::bitmap::{DirtyBitmap, words_for};
use limosa_protocol::feature::DmaLoggingRange;

use crate::cancel::check;
use crate::devices::{MovedDevice, failed};
use crate::memory::{Memory, MemoryRegion, PAGE_BYTES};
use crate::report::Recorder;
use crate::transfer::ram as pages;
use crate::transfer::sending::Sending;
use crate::{Cancel, Error, Result};

/// A further link is used for each so many bytes: below that, waking its thread costs more than it saves.
const LINK_BYTES_MIN: u64 = 4 << 20;

/// Which pages are still to be sent, and which were ever harvested.
#[derive(Default)]
pub(crate) struct Dirty {
    pending: Vec<DirtyBitmap>,
    harvested: Vec<DirtyBitmap>,
    /// For each device the page size of its log, in bytes, where it logs.
    device_page_bytes: Vec<Option<u64>>,
    /// So many of the caller's sources are on, from the first.
    sources_started: usize,
    log_started: bool,
    /// A device whose writes nobody sees: memory is dirty as long as it runs.
    pub(crate) blind: bool,
}

impl Dirty {
    /// Starts all logs and takes every page as dirty.
    pub(crate) fn start(
        &mut self,
        devices: &[MovedDevice<'_>],
        memory: &mut Memory<'_>,
        recorder: &Recorder<'_>,
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        self.device_page_bytes = vec![None; devices.len()];
        for region in &memory.regions {
            let bitmap = || {
                let bitmap = DirtyBitmap::new(region.size / PAGE_BYTES);
                bitmap.map_err(|_| region.failed(0, io::ErrorKind::OutOfMemory.into()))
            };
            let all = bitmap()?;
            all.set_range(0, all.pages());
            self.pending.push(all);
            self.harvested.push(bitmap()?);
        }
        if memory.regions.is_empty() {
            return Ok(());
        }
        if let Some(log) = &mut memory.log {
            log.start().map_err(|error| memory.regions[0].failed(0, error))?;
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
            check(cancel)?;
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
                recorder.note(format!("nobody logs the DMA of {name}: all memory moves after the stop"));
            }
        }
        Ok(())
    }

    /// Collects what was written since the last time. A log that fails makes its region dirty.
    pub(crate) fn harvest(&mut self, devices: &[MovedDevice<'_>], memory: &mut Memory<'_>) -> Result<()> {
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
                    tracing::warn!("{region:?}: {error}");
                    everything();
                }
            }
            if let Some(log) = &mut memory.log
                && self.log_started
                && let Err(error) = log.harvest(at, &fresh)
            {
                tracing::warn!("the dirty log is lost, all is dirty: {error}");
                everything();
            }
            self.pending[at].or(&fresh);
            self.harvested[at].or(&fresh);
        }
        Ok(())
    }

    /// Takes every page as dirty.
    pub(crate) fn everything(&self) {
        self.pending.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
    }

    /// Bytes that are still to be sent.
    pub(crate) fn bytes(&self) -> u64 {
        self.pending.iter().map(|bitmap| bitmap.count() * PAGE_BYTES).sum()
    }

    /// Ends all logs. With `give_back`, harvests once more and hands the caller's log everything that
    /// was harvested. A log that cannot be stopped is a note.
    pub(crate) fn stop(
        &mut self,
        devices: &[MovedDevice<'_>],
        memory: &mut Memory<'_>,
        give_back: bool,
        notes: &mut Vec<String>,
    ) {
        let has_readers = memory.log.as_ref().is_some_and(|log| log.has_other_readers());
        if give_back && self.log_started && has_readers {
            if let Err(error) = self.harvest(devices, memory) {
                notes.push(format!("the last dirty pages are not known: {error}"));
                self.harvested.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
            }
            if let Some(log) = &mut memory.log {
                self.harvested.iter().enumerate().for_each(|(at, bitmap)| log.give_back(at, bitmap));
            }
        }
        let mut stop = |source: &dyn DirtySource| {
            if let Err(error) = source.stop() {
                notes.push(format!("DMA logging goes on: {error}"));
            }
        };
        for (device, page_bytes) in devices.iter().zip(&mut self.device_page_bytes) {
            if let Some(page_bytes) = page_bytes.take() {
                stop(&DeviceLog::started(device.device, page_bytes));
            }
        }
        let started = std::mem::take(&mut self.sources_started);
        memory.sources.iter().take(started).for_each(|source| stop(*source));
        if let Some(log) = &mut memory.log
            && std::mem::take(&mut self.log_started)
        {
            log.stop();
        }
    }

    /// Sends every pending page, over as many links as that is worth. Pages that could not be sent when this fails are
    /// among the harvested ones, or were pending from the start.
    pub(crate) fn send(
        &self,
        regions: &[MemoryRegion<'_>],
        sending: &Sending<'_, '_>,
        recorder: &Recorder<'_>,
    ) -> Result<()> {
        let links = (self.bytes() / LINK_BYTES_MIN + 1).min(sending.writers.len() as u64) as usize;
        sending.link_count.lock().pause();
        let chunks = Monitor::new(pages::chunks(regions, &self.pending));
        limosa_clockwork::scope(|scope| {
            let chunks = &chunks;
            let others: Vec<_> = (1..links)
                .map(|link| {
                    scope.spawn(format!("limosa: link {link}"), move || {
                        pages::send(link, chunks, sending, recorder).inspect_err(|_| pages::end(chunks))
                    })
                })
                .collect();
            let sent = pages::send(0, chunks, sending, recorder).inspect_err(|_| pages::end(chunks));
            let joined = others
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            // All of them are waited for; what went wrong first is passed on.
            joined.collect::<Vec<_>>().into_iter().fold(sent, Result::and)
        })?;
        self.pending.iter().for_each(DirtyBitmap::clear);
        Ok(())
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
