//! [`DeviceLog`]: the log of a device itself (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, `_STOP` and
//! `_REPORT`).

use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_protocol::bitmap::{Grid, regranulate, words_for};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::logging::{RANGES_MAX, REPORT_PAGE_SIZE_MIN, check_report};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp};

use super::{DirtySource, check, merge_nearest};
use crate::{Device, DeviceExt, Error, Result};

/// Limit on the bits of one report's bitmap: 512 KiB, which fit in a message on every transport.
const REPORT_BITS: u64 = 1 << 22;

/// The log of one device.
pub struct DeviceLog<'a> {
    device: &'a dyn Device,
    /// The log's page size in bytes, while the log is on.
    page_size: Mutex<Option<u64>>,
}

impl<'a> DeviceLog<'a> {
    /// The log of this device. It is off.
    pub fn new(device: &'a dyn Device) -> DeviceLog<'a> {
        DeviceLog { device, page_size: Mutex::new(None) }
    }

    /// The log of this device, which is on and has this page size in bytes.
    pub fn started(device: &'a dyn Device, page_size: u64) -> DeviceLog<'a> {
        DeviceLog { device, page_size: Mutex::new(Some(page_size)) }
    }

    /// Whether the device can log.
    pub fn is_supported(&self) -> Result<bool> {
        self.device.probe(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET)
    }

    /// Reads and clears the log of a range as [`DirtySource::report`] does, piece by piece and in the log's own pages.
    /// Calls `take` for each piece: bit *n* of the words stands for the *n*th page of the grid, of which only the given
    /// number of bytes count. `take` has to clear the words.
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
        let Some(page_size) = *self.page_size() else {
            return Err(Error::Usage { device: self.name().into(), what: "its log is off".into() });
        };
        if let Err(errno) = check_report(iova, length, page_size) {
            let what =
                format!("a report of {length:#x} bytes at {iova:#x} in pages of {page_size} bytes: {errno}");
            return Err(Error::Usage { device: self.name().into(), what });
        }
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

    fn page_size(&self) -> MutexGuard<'_, Option<u64>> {
        self.page_size.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut started = self.page_size();
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
        *started = Some(page_size);
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
        match self.page_size().take() {
            Some(_) => self.device.dma_logging_stop(),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for DeviceLog<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceLog").field("device", &self.name()).field("page_size", &self.page_size).finish()
    }
}

/// Whether the cause of a refused START may be the number of its ranges.
fn may_take_fewer(errno: Errno) -> bool {
    !matches!(errno, Errno::ENOTTY | Errno::EBUSY | Errno::ENODEV | Errno::EPERM | Errno::EACCES)
}
