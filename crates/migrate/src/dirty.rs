//! Dirty pages of a source: the logs that tell them, and the rounds in which they are sent.

use std::io;

use limosa_client::DeviceExt;
use limosa_protocol::bitmap::{DirtyBitmap, Grid, regranulate, words_for};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::{FeatureIndex, FeatureOp};

use crate::channel::Channel;
use crate::devices::{MovedDevice, failed};
use crate::memory::{Memory, MemoryRegion, PAGE_BYTES, is_zero};
use crate::report::Recorder;
use crate::stream::{DATA_BYTES_MAX, Kind};
use crate::{Error, Result};

/// After this much memory, devices in pre-copy get their turn.
const TURN_BYTES: u64 = 16 << 20;

/// Which pages are still to be sent, and which were ever harvested.
#[derive(Default)]
pub(crate) struct Dirty {
    pending: Vec<DirtyBitmap>,
    harvested: Vec<DirtyBitmap>,
    /// For each device the page size of its log, in bytes, where it logs.
    device_page_bytes: Vec<Option<u64>>,
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
        recorder: &mut Recorder<'_>,
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
        for (at, device) in devices.iter().enumerate() {
            match start_device(device, &memory.regions)? {
                Some(page_bytes) => self.device_page_bytes[at] = Some(page_bytes),
                None if memory.log.as_ref().is_some_and(|log| log.covers_devices()) => {}
                None => {
                    self.blind = true;
                    let name = device.device.name();
                    recorder.note(format!("{name} does not log its DMA: all memory moves after the stop"));
                }
            }
        }
        Ok(())
    }

    /// Collects what was written since the last time. A log that fails makes its region dirty.
    pub(crate) fn harvest(&mut self, devices: &[MovedDevice<'_>], memory: &mut Memory<'_>) -> Result<()> {
        for (at, region) in memory.regions.iter().enumerate() {
            let Ok(fresh) = DirtyBitmap::new(region.size / PAGE_BYTES) else {
                return Err(region.failed(0, io::ErrorKind::OutOfMemory.into()));
            };
            let everything = || fresh.set_range(0, fresh.pages());
            for (device, page_bytes) in devices.iter().zip(&self.device_page_bytes) {
                let Some(page_bytes) = *page_bytes else { continue };
                let mut words = vec![0; words_for(region.size.div_ceil(page_bytes)) as usize];
                match device.device.dma_logging_report(region.iova, region.size, page_bytes, &mut words) {
                    Ok(()) if page_bytes == PAGE_BYTES => fresh.or_words(0, &words, fresh.pages()),
                    Ok(()) => {
                        let mut fine = vec![0; words_for(fresh.pages()) as usize];
                        let from = Grid { iova: region.iova, page_size: page_bytes };
                        let to = Grid { iova: region.iova, page_size: PAGE_BYTES };
                        regranulate(&words, from, &mut fine, to, region.iova, region.size);
                        fresh.or_words(0, &fine, fresh.pages());
                    }
                    Err(error) => {
                        tracing::warn!(
                            "{}: its dirty log is lost, all is dirty: {error}",
                            device.device.name()
                        );
                        everything();
                    }
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
        if give_back && self.log_started {
            if let Err(error) = self.harvest(devices, memory) {
                notes.push(format!("the last dirty pages are not known: {error}"));
                self.harvested.iter().for_each(|bitmap| bitmap.set_range(0, bitmap.pages()));
            }
            if let Some(log) = &mut memory.log {
                self.harvested.iter().enumerate().for_each(|(at, bitmap)| log.give_back(at, bitmap));
            }
        }
        for (device, page_bytes) in devices.iter().zip(&mut self.device_page_bytes) {
            if page_bytes.take().is_some()
                && let Err(error) = device.device.dma_logging_stop()
            {
                notes.push(format!("DMA logging goes on: {error}"));
            }
        }
        if let Some(log) = &mut memory.log
            && std::mem::take(&mut self.log_started)
        {
            log.stop();
        }
    }

    /// Sends every pending page; `turn` is called in between. Pages that could not be sent when this
    /// fails are among the harvested ones, or were pending from the start.
    pub(crate) fn send(
        &mut self,
        regions: &[MemoryRegion<'_>],
        channel: &mut Channel<'_>,
        recorder: &mut Recorder<'_>,
        mut turn: impl FnMut(&mut Channel<'_>, &mut Recorder<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut buffer = vec![0; self.bytes().min(DATA_BYTES_MAX as u64) as usize];
        let mut since_turn = 0;
        for (region, pending) in regions.iter().zip(&self.pending) {
            let mut sender = Sender { region, channel, recorder, zeroes: (0, 0) };
            for (first, pages) in pending.runs() {
                let (mut at, end) = (first * PAGE_BYTES, (first + pages) * PAGE_BYTES);
                while at < end {
                    let piece_bytes = (end - at).min(buffer.len() as u64) as usize;
                    let piece = &mut buffer[..piece_bytes];
                    region.pages.read(at, piece).map_err(|error| region.failed(at, error))?;
                    sender.send(at, piece)?;
                    at += piece.len() as u64;
                    since_turn += piece.len() as u64;
                    if since_turn >= TURN_BYTES {
                        since_turn = 0;
                        turn(sender.channel, sender.recorder)?;
                    }
                }
            }
            sender.flush()?;
            pending.clear();
        }
        Ok(())
    }
}

/// The page size of the device's log, or `None` when it has none.
fn start_device(device: &MovedDevice<'_>, regions: &[MemoryRegion<'_>]) -> Result<Option<u64>> {
    let failed = |error| failed(device.device, "starting its DMA log", error);
    if !device.device.probe(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET).map_err(failed)? {
        return Ok(None);
    }
    let ranges: Vec<_> =
        regions.iter().map(|region| DmaLoggingRange { iova: region.iova, length: region.size }).collect();
    let started = match device.device.dma_logging_start(PAGE_BYTES, &ranges) {
        // Devices have few range registers; one range round them all is logged more coarsely, not less.
        Err(limosa_client::Error::Refused { .. }) if ranges.len() > 1 => {
            let first = regions.iter().map(|region| region.iova).min().unwrap_or(0);
            let last = regions.iter().map(|region| region.iova + (region.size - 1)).max().unwrap_or(0);
            let length = (last - first).saturating_add(1);
            device.device.dma_logging_start(PAGE_BYTES, &[DmaLoggingRange { iova: first, length }])
        }
        started => started,
    };
    let page_bytes = started.map_err(failed)?;
    if !page_bytes.is_power_of_two() || page_bytes < PAGE_BYTES {
        let _ = device.device.dma_logging_stop();
        let what =
            format!("it logs DMA in pages of {page_bytes} bytes, expected a power of two from {PAGE_BYTES}");
        return Err(Error::DeviceMisbehaved { device: device.device.name().into(), what });
    }
    Ok(Some(page_bytes))
}

/// Sends pages of one region, zeroes as runs.
struct Sender<'a, 'c, 'r> {
    region: &'a MemoryRegion<'a>,
    channel: &'a mut Channel<'c>,
    recorder: &'a mut Recorder<'r>,
    /// A run of zeroes that may go on: offset and bytes.
    zeroes: (u64, u64),
}

impl Sender<'_, '_, '_> {
    fn send(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let page_bytes = PAGE_BYTES as usize;
        let is_zero = |page: usize| is_zero(&bytes[page * page_bytes..(page + 1) * page_bytes]);
        let pages = bytes.len() / page_bytes;
        let mut page = 0;
        while page < pages {
            let first = page;
            let zero = is_zero(page);
            while page < pages && is_zero(page) == zero {
                page += 1;
            }
            let at = offset + (first * page_bytes) as u64;
            let run = &bytes[first * page_bytes..page * page_bytes];
            if zero {
                self.add_zeroes(at, run.len() as u64)?;
            } else {
                self.channel.send(Kind::MEMORY_DATA, self.region.id, at, run)?;
                self.recorder.memory_data(run.len() as u64);
            }
        }
        Ok(())
    }

    fn add_zeroes(&mut self, at: u64, bytes: u64) -> Result<()> {
        if self.zeroes.0 + self.zeroes.1 != at {
            self.flush()?;
            self.zeroes = (at, 0);
        }
        self.zeroes.1 += bytes;
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let (at, bytes) = std::mem::take(&mut self.zeroes);
        if bytes > 0 {
            self.channel.send(Kind::MEMORY_ZERO, self.region.id, at, &bytes.to_le_bytes())?;
            self.recorder.memory_zero(bytes);
        }
        Ok(())
    }
}
