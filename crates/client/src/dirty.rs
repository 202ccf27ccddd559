//! [`DirtySource`]: who tells which pages were written by DMA, whatever logs them: a device itself
//! ([`DeviceLog`]), the page tables of an IOMMU, a container. Several together are [`Fused`].

mod device;
mod fused;
mod ranges;

use limosa_protocol::bitmap::{set_range, words_for};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::logging::{REPORT_PAGE_SIZE_MIN, check_report};

use crate::{Error, Result};

pub use device::DeviceLog;
pub use fused::Fused;
pub use ranges::merge_nearest;

/// A log of the pages that devices write by DMA.
///
/// **No page is lost.** A page that is written between [`DirtySource::start`] and [`DirtySource::stop`] is in
/// the first report of its range that is asked for after the write was done. It may be in later ones too, and
/// pages may be in them that nobody wrote. What is unmapped meanwhile comes out of the next report all the same.
/// When a report fails, all of its range must be taken as dirty.
///
/// A log has one reader: a page that one of two has been told of, the other is not.
pub trait DirtySource: Send + Sync {
    /// What is named in messages.
    fn name(&self) -> &str;

    /// Whether what the device of this name ([`Device::name`](crate::Device::name)) writes is in the reports. A
    /// device that no source sees must be taken to have written everything.
    fn sees(&self, device: &str) -> bool;

    /// Starts logging, all clean, and returns how large the pages are that it tells apart, in bytes: a power
    /// of two, as near to `page_size_hint` as the source can. More than these ranges may be logged.
    ///
    /// # Errors
    ///
    /// Nothing is logged then.
    fn start(&self, page_size_hint: u64, ranges: &[DmaLoggingRange]) -> Result<u64>;

    /// Reads and clears the log of a range: bit *n* of `words` is set when the `page_size` bytes from
    /// `iova + n * page_size` on were written. Bits that are set already stay so, those of pages beyond the
    /// range too.
    ///
    /// The page size is a power of two from 4096 on, whatever [`DirtySource::start`] returned. The range lies in
    /// one that was given to `start`, and its ends are multiples of 4096.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] when the log is off, or when [`check`] says so. Whatever the error, what was written may
    /// be forgotten: all of the range must be taken as dirty. Logging goes on.
    fn report(&self, iova: u64, length: u64, page_size: u64, words: &mut [u64]) -> Result<()>;

    /// Stops logging. Nothing happens when it is off.
    fn stop(&self) -> Result<()>;
}

/// Takes all of a range as dirty, as is due when [`DirtySource::report`] fails.
pub fn all_dirty(length: u64, page_size: u64, words: &mut [u64]) {
    set_range(words, 0, length.div_ceil(page_size.max(1)));
}

/// What a source refuses in a report ([`Error::Usage`]): a page size that is no power of two from 4096 on, a range
/// that is empty or ends beyond 2^64, and a bitmap without room for its pages. `name` is for the message.
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
