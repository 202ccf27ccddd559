//! [`DeviceLog`]: the log of a device itself (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, `_STOP` and
//! `_REPORT`).

use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_protocol::bitmap::{Grid, regranulate, runs, words_for};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::logging::{RANGES_MAX, REPORT_PAGE_SIZE_MIN, check_report};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp};

use super::{DirtySource, check, merge_nearest};
use crate::{Device, DeviceExt, Error, Result};

/// Limit on the bits of one report's bitmap: 512 KiB, which fit in a message on every transport.
const REPORT_BITS: u64 = 1 << 22;

/// The pages of the log in a block that is looked at before a report.
const BLOCK_PAGES: u64 = 4096;
/// The words of one look: 256 GiB of a log of 4 KiB pages.
const LOOK_WORDS: usize = 256;
/// Up to this many blocks without a page between two with pages are reported with them. Their bits take no longer than another
/// request. Memory of no more blocks is not looked at.
const CLOSE_BLOCKS: u64 = 32;

/// The log of one device.
pub struct DeviceLog<'a> {
    device: &'a dyn Device,
    /// `None` while the log is off.
    started: Mutex<Option<StartedLog>>,
}

/// The known properties of a device's log that is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StartedLog {
    /// The log's page size in bytes.
    pub page_size: u64,
    /// Whether the device tells where its log has pages ([`DeviceExt::dirty_blocks`]), so that a report need not read all of it.
    pub has_blocks: bool,
}

impl StartedLog {
    /// A log with pages of this many bytes, of a device that does not tell where it has pages.
    pub fn new(page_size: u64) -> StartedLog {
        StartedLog { page_size, has_blocks: false }
    }
}

impl<'a> DeviceLog<'a> {
    /// The log of this device. It is off.
    pub fn new(device: &'a dyn Device) -> DeviceLog<'a> {
        DeviceLog { device, started: Mutex::new(None) }
    }

    /// The log of this device, which is on.
    pub fn started(device: &'a dyn Device, log: StartedLog) -> DeviceLog<'a> {
        DeviceLog { device, started: Mutex::new(Some(log)) }
    }

    /// The known properties of the log; `None` while it is off.
    pub fn state(&self) -> Option<StartedLog> {
        *self.lock()
    }

    /// Whether the device can log.
    pub fn is_supported(&self) -> Result<bool> {
        self.device.probe(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET)
    }

    /// Reads and clears the log of a range as [`DirtySource::report`] does, piece by piece and in the log's own pages.
    /// Calls `take` for each piece: bit *n* of the words stands for the *n*th page of the grid, of which only the given
    /// number of bytes count. `take` has to clear the words. If the device reports where its log has
    /// pages, parts without pages are left out.
    ///
    /// `piece` is a buffer for one piece, and is clear before and after, except after an error. It grows to at most 512
    /// KiB.
    ///
    /// # Errors
    ///
    /// As [`DirtySource::report`].
    pub fn report_in_pieces(
        &self,
        iova: u64,
        length: u64,
        piece: &mut Vec<u64>,
        mut take: impl FnMut(Grid, u64, &mut [u64]),
    ) -> Result<()> {
        let Some(StartedLog { page_size, has_blocks }) = self.state() else {
            return Err(Error::Usage { device: self.name().into(), what: "its log is off".into() });
        };
        if let Err(errno) = check_report(iova, length, page_size) {
            let what =
                format!("a report of {length:#x} bytes at {iova:#x} in pages of {page_size} bytes: {errno}");
            return Err(Error::Usage { device: self.name().into(), what });
        }
        let Some(block_size) = block_size(page_size, length).filter(|_| has_blocks) else {
            return self.report_range(iova, length, page_size, piece, &mut take);
        };
        let mut done = 0;
        while done < length {
            let stretch = (length - done).min(block_size.saturating_mul(LOOK_WORDS as u64 * 64));
            let mut blocks = [0; LOOK_WORDS];
            let blocks = &mut blocks[..words_for(stretch.div_ceil(block_size))];
            match self.device.dirty_blocks(iova + done, stretch, block_size, blocks) {
                Ok(()) => {}
                // Such as a server that has taken the place of another one.
                Err(Error::Refused { .. }) => blocks.fill(!0),
                Err(error) => return Err(error),
            }
            for (first, count) in close_runs(blocks) {
                let begin = first.saturating_mul(block_size);
                // A device may set bits behind the range.
                if begin >= stretch {
                    break;
                }
                let bytes = count.saturating_mul(block_size).min(stretch - begin);
                self.report_range(iova + done + begin, bytes, page_size, piece, &mut take)?;
            }
            done += stretch;
        }
        Ok(())
    }

    /// The same of all of a range.
    fn report_range(
        &self,
        iova: u64,
        length: u64,
        page_size: u64,
        piece: &mut Vec<u64>,
        take: &mut impl FnMut(Grid, u64, &mut [u64]),
    ) -> Result<()> {
        // The size of pieces depends on the log's own pages, not on those of the caller.
        let piece_max = REPORT_BITS.saturating_mul(page_size);
        let mut done = 0;
        while done < length {
            let from = Grid { iova: iova + done, page_size };
            // No page of the log is in two pieces.
            let beyond_page = from.iova % page_size;
            let piece_length = (length - done).min(piece_max - beyond_page);
            let words = words_for(piece_length.div_ceil(page_size));
            if piece.len() < words {
                piece.resize(words, 0);
            }
            self.device.dma_logging_report(from.iova, piece_length, page_size, &mut piece[..words])?;
            take(from, piece_length, &mut piece[..words]);
            done += piece_length;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<StartedLog>> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtySource for DeviceLog<'_> {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn sees(&self, device: &dyn Device) -> bool {
        let own = self.device.identity();
        own.is_some() && device.identity() == own
    }

    /// Starts the log. Devices have few registers for ranges, and refuse too many with different errnos. In that case
    /// the ranges with the smallest gaps are joined, so that the device logs more, never less. A log that was left on
    /// is restarted.
    fn start(&self, page_size_hint: u64, ranges: &[DmaLoggingRange]) -> Result<u64> {
        let mut started = self.lock();
        if started.is_some() {
            return Err(Error::Usage { device: self.name().into(), what: "its log is on already".into() });
        }
        let mut ranges = merge_nearest(ranges, RANGES_MAX);
        let mut may_be_on = true;
        let page_size = loop {
            match self.device.dma_logging_start(page_size_hint, &ranges) {
                // The log may be on: its last user may have died, or could not reach the device to stop it.
                Err(Error::Refused { errno: Errno::EINVAL, .. })
                    if std::mem::take(&mut may_be_on) && self.device.dma_logging_stop().is_ok() =>
                {
                    tracing::warn!("{}: its DMA log was left on, and is restarted", self.name());
                }
                Err(Error::Refused { errno, .. }) if ranges.len() > 1 && may_take_fewer(errno) => {
                    tracing::debug!("{}: {} ranges to log: {errno}", self.name(), ranges.len());
                    ranges = merge_nearest(&ranges, ranges.len() / 2);
                }
                answer => break answer?,
            }
        };
        if !page_size.is_power_of_two() || page_size < REPORT_PAGE_SIZE_MIN {
            let _ = self.device.dma_logging_stop();
            let what = format!(
                "it logs DMA in pages of {page_size} bytes, expected a power of two from {REPORT_PAGE_SIZE_MIN}"
            );
            return Err(Error::Misbehaved { device: self.name().into(), what });
        }
        let is_large = ranges.iter().any(|range| block_size(page_size, range.length).is_some());
        // Without an answer the log is read as a whole.
        let has_blocks =
            is_large && self.device.probe(FeatureIndex::DIRTY_BLOCKS, FeatureOp::GET).unwrap_or(false);
        *started = Some(StartedLog { page_size, has_blocks });
        Ok(page_size)
    }

    fn report(&self, iova: u64, length: u64, page_size: u64, words: &mut [u64]) -> Result<()> {
        check(self.name(), iova, length, page_size, words)?;
        let to = Grid { iova, page_size };
        self.report_in_pieces(iova, length, &mut Vec::new(), |from, length, piece| {
            regranulate(piece, from, words, to, from.iova, length);
            piece.fill(0);
        })
    }

    fn stop(&self) -> Result<()> {
        match self.lock().take() {
            Some(_) => self.device.dma_logging_stop(),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for DeviceLog<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceLog").field("device", &self.name()).field("started", &self.started).finish()
    }
}

/// The bytes of a block of a log with these pages, in which a range of this length is looked at; `None` for one that is read as a whole.
fn block_size(page_size: u64, length: u64) -> Option<u64> {
    page_size.checked_mul(BLOCK_PAGES).filter(|bytes| length / CLOSE_BLOCKS > *bytes)
}

/// The runs of blocks with pages, as (first block, blocks), where runs that are close to each other are one.
fn close_runs(blocks: &[u64]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let mut runs = runs(blocks).peekable();
    std::iter::from_fn(move || {
        let (first, count) = runs.next()?;
        let mut end = first + count;
        while let Some((next, count)) = runs.next_if(|(next, _)| next - end <= CLOSE_BLOCKS) {
            end = next + count;
        }
        Some((first, end - first))
    })
}

/// Whether the cause of a refused START may be the number of its ranges.
fn may_take_fewer(errno: Errno) -> bool {
    !matches!(errno, Errno::ENOTTY | Errno::EBUSY | Errno::ENODEV | Errno::EPERM | Errno::EACCES)
}
