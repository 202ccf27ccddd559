//! [`DirtySource`]: a log of the pages that devices write by DMA. The log may be a device's own ([`DeviceLog`]), the
//! page tables of an IOMMU or a container. [`Fused`] combines several of them.

mod device;
mod fused;
mod ranges;

use limosa_protocol::bitmap::{set_range, words_for};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::logging::{REPORT_PAGE_SIZE_MIN, check_report};

use crate::{Device, Error, Result};

pub use device::{DeviceLog, StartedLog};
pub use fused::Fused;
pub use ranges::merge_nearest;

/// A log of the pages that devices write by DMA.
///
/// **No page is lost.** A page that is written between [`DirtySource::start`] and [`DirtySource::stop`] is in the first
/// report of its range that is requested after the write was done. It may be in later reports as well, and a report may
/// have pages that were not written. Memory that is unmapped meanwhile is still in the next report. If a report fails,
/// its whole range must be treated as dirty.
///
/// A log has one reader: a report clears the pages that it returns, so a second reader would miss them.
pub trait DirtySource: Send + Sync {
    /// The source's name, for messages.
    fn name(&self) -> &str;

    /// Whether the reports contain the writes of this device. Devices are identified by [`Device::identity`], never
    /// by their names, which need not be unique.
    ///
    /// A device that no source sees must be assumed to have written everything. So a wrong `false` costs time, and a
    /// wrong `true` loses pages: a source returns `true` only for a device that it knows.
    fn sees(&self, device: &dyn Device) -> bool;

    /// Starts logging, with all pages clean. Returns the page size of the log in bytes: a power of two, as near to
    /// `page_size_hint` as the source can. More than these ranges may be logged.
    ///
    /// # Errors
    ///
    /// After an error nothing is logged.
    fn start(&self, page_size_hint: u64, ranges: &[DmaLoggingRange]) -> Result<u64>;

    /// Reads and clears the log of a range. Bit *n* of `words` is set when one of the `page_size` bytes from
    /// `iova + n * page_size` on was written. Bits that are already set stay set, including those of pages beyond the
    /// range.
    ///
    /// The page size is a power of two from 4096 on; it may differ from the one that [`DirtySource::start`] returned. The
    /// range lies within one that was given to `start`, and its ends are multiples of 4096.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] when the log is off, and when [`check`] returns it. After any error the source may have lost
    /// writes: treat the whole range as dirty. Logging continues.
    fn report(&self, iova: u64, length: u64, page_size: u64, words: &mut [u64]) -> Result<()>;

    /// Stops logging. Does nothing when the log is off.
    fn stop(&self) -> Result<()>;
}

/// Marks a whole range as dirty, as a caller has to do if [`DirtySource::report`] fails.
pub fn all_dirty(length: u64, page_size: u64, words: &mut [u64]) {
    set_range(words, 0, length.div_ceil(page_size.max(1)));
}

/// Checks the arguments of a report. [`Error::Usage`] for a page size that is not a power of two from 4096 on, for a
/// range that is empty or ends beyond 2^64, and for a bitmap that is too short. `name` is for the message.
pub fn check(name: &str, iova: u64, length: u64, page_size: u64, words: &[u64]) -> Result<()> {
    let usage = |what| Err(Error::Usage { device: name.into(), what });
    if check_report(iova, length, page_size).is_err() {
        return usage(format!(
            "a report of {length:#x} bytes at {iova:#x} in pages of {page_size} bytes, expected a range and a power \
             of two from {REPORT_PAGE_SIZE_MIN}"
        ));
    }
    let pages = length.div_ceil(page_size);
    if words.len() < words_for(pages) {
        return usage(format!("a bitmap of {} words is too short for {pages} pages", words.len()));
    }
    Ok(())
}
