//! The refusals of DMA logging (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_START`,
//! `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`), stated once for clients, servers and devices.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use zerocopy::FromBytes;

use crate::feature::{DmaLoggingRange, FeatureDmaLoggingReport};
use crate::{Errno, range};

/// The smallest page size of a report, in bytes.
pub const REPORT_PAGE_SIZE_MIN: u64 = 4096;

/// Linux's limit on the ranges of one START: as many as fit into a page of 4 KiB.
pub const RANGES_MAX: usize = 4096 / size_of::<DmaLoggingRange>();

/// Checks a START, range after range in their order, as Linux does. Errors:
///
/// - [`Errno::EINVAL`]: no range at all; a page size that is no power of two; a range that is
///   empty, that the page size does not divide, or that overlaps an earlier one.
/// - [`Errno::E2BIG`]: more than `ranges_max` ranges.
/// - [`Errno::EOVERFLOW`]: a range that ends at 2^64 or beyond.
///
/// In vfio-user, a START without ranges logs all writes (`vfio-user.rst: VFIO_DEVICE_FEATURE_DMA_LOGGING_START`); a
/// server has to handle that case before.
pub fn check_start(page_size: u64, ranges: &[DmaLoggingRange], ranges_max: usize) -> Result<(), Errno> {
    if ranges.is_empty() || !page_size.is_power_of_two() {
        return Err(Errno::EINVAL);
    }
    if ranges.len() > ranges_max {
        return Err(Errno::E2BIG);
    }
    let mut accepted = BTreeMap::new();
    for DmaLoggingRange { iova, length } in ranges {
        if !range::is_aligned(*iova, page_size) || !range::is_aligned(*length, page_size) || *length == 0 {
            return Err(Errno::EINVAL);
        }
        let end = range::end(*iova, *length)?;
        // Accepted ranges do not overlap, so only the last one that begins before this one's end can overlap it.
        if accepted.range(..end).next_back().is_some_and(|(_, other_end)| other_end > iova) {
            return Err(Errno::EINVAL);
        }
        accepted.insert(*iova, end);
    }
    Ok(())
}

/// Reads the ranges that follow a START's control structure, and checks them ([`check_start`]). Nothing is
/// allocated before the count is known to be in the limit. [`Errno::EINVAL`] when `bytes` ends before the last range;
/// bytes after it are ignored.
pub fn read_start(
    page_size: u64,
    num_ranges: u32,
    bytes: &[u8],
    ranges_max: usize,
) -> Result<Vec<DmaLoggingRange>, Errno> {
    let count = num_ranges as usize;
    if count > ranges_max {
        return Err(Errno::E2BIG);
    }
    let ranges = bytes.as_chunks::<{ size_of::<DmaLoggingRange>() }>().0.get(..count).ok_or(Errno::EINVAL)?;
    let ranges: Result<Vec<_>, _> =
        ranges.iter().map(|bytes| DmaLoggingRange::read_from_bytes(bytes)).collect();
    let ranges = ranges.map_err(|_| Errno::EINVAL)?;
    check_start(page_size, &ranges, ranges_max)?;
    Ok(ranges)
}

/// Checks a REPORT. Errors:
///
/// - [`Errno::EINVAL`]: a page size that is no power of two or below [`REPORT_PAGE_SIZE_MIN`], or
///   an empty range.
/// - [`Errno::EOVERFLOW`]: a range that ends at 2^64 or beyond.
///
/// Neither end of the range need be aligned: bit *n* stands for the `page_size` bytes from
/// `iova + n * page_size` on ([`Grid`](crate::bitmap::Grid)).
pub fn check_report(iova: u64, length: u64, page_size: u64) -> Result<(), Errno> {
    if page_size < REPORT_PAGE_SIZE_MIN || !page_size.is_power_of_two() || length == 0 {
        return Err(Errno::EINVAL);
    }
    range::end(iova, length).map(drop)
}

impl FeatureDmaLoggingReport {
    /// [`check_report`].
    pub fn check(&self) -> Result<(), Errno> {
        check_report(self.iova, self.length, self.page_size)
    }

    /// The bytes of the bitmap that answers it: whole 64-bit words. Meaningful once
    /// [`FeatureDmaLoggingReport::check`] passed.
    pub fn bitmap_bytes(&self) -> u64 {
        bitmap_bytes(self.length, self.page_size)
    }
}

/// The bytes of a report's bitmap: a bit for each page that begins in the range, in whole 64-bit
/// words. 0 for a page size of 0.
pub const fn bitmap_bytes(length: u64, page_size: u64) -> u64 {
    if page_size == 0 { 0 } else { length.div_ceil(page_size).div_ceil(64) * 8 }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec;
    use std::vec::Vec;

    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn range(iova: u64, length: u64) -> DmaLoggingRange {
        DmaLoggingRange { iova, length }
    }

    #[test]
    fn a_start_is_refused_as_linux_refuses_it() {
        let ok = range(0x1000, 0x1000);
        let check = |page_size, ranges: &[_]| check_start(page_size, ranges, 3);
        assert_eq!(check(4096, &[ok]), Ok(()));
        assert_eq!(check(4096, &[]), Err(Errno::EINVAL), "no ranges");
        assert_eq!(check(4096, &[ok; 4]), Err(Errno::E2BIG));
        assert_eq!(check(0, &[ok]), Err(Errno::EINVAL));
        assert_eq!(check(5000, &[ok]), Err(Errno::EINVAL));
        assert_eq!(check(8192, &[ok]), Err(Errno::EINVAL), "not aligned");
        assert_eq!(check(4096, &[range(0x1000, 0x800)]), Err(Errno::EINVAL), "length not aligned");
        assert_eq!(check(4096, &[range(0x1000, 0)]), Err(Errno::EINVAL), "empty");
        let top = u64::MAX - 4095;
        assert_eq!(check(4096, &[range(top, 4096)]), Err(Errno::EOVERFLOW));
        assert_eq!(check(4096, &[range(top, 8192)]), Err(Errno::EOVERFLOW));
        assert_eq!(check(4096, &[range(top - 4096, 4096)]), Ok(()));
        assert_eq!(check(4096, &[ok, range(0x2000, 0x1000), range(0, 0x1000)]), Ok(()), "neighbours");
        assert_eq!(check(4096, &[ok, range(0, 0x2000)]), Err(Errno::EINVAL), "overlap");
        assert_eq!(check(4096, &[range(0, 0x4000), ok]), Err(Errno::EINVAL), "contained");
    }

    #[test]
    fn the_first_faulty_range_decides_the_errno() {
        let overflow = range(u64::MAX - 4095, 8192);
        assert_eq!(check_start(4096, &[range(1, 4096), overflow], 8), Err(Errno::EINVAL));
        assert_eq!(check_start(4096, &[overflow, range(1, 4096)], 8), Err(Errno::EOVERFLOW));
    }

    #[test]
    fn counts_are_checked_against_limit_and_bytes() {
        let ranges = [range(0, 4096), range(4096, 4096)];
        let bytes = ranges.as_bytes();
        assert_eq!(read_start(4096, 2, bytes, 2), Ok(ranges.to_vec()));
        assert_eq!(read_start(4096, 1, bytes, 2), Ok(vec![ranges[0]]));
        assert_eq!(read_start(4096, 2, &bytes[..31], 2), Err(Errno::EINVAL));
        assert_eq!(read_start(4096, 3, bytes, 2), Err(Errno::E2BIG));
        assert_eq!(read_start(4096, u32::MAX, bytes, usize::MAX), Err(Errno::EINVAL));
        assert_eq!(read_start(4096, 0, bytes, 2), Err(Errno::EINVAL));
    }

    #[test]
    fn a_report_is_refused_as_linux_refuses_it() {
        assert_eq!(check_report(0x1000, 0x1000, 4096), Ok(()));
        assert_eq!(check_report(0x1001, 1, 1 << 40), Ok(()), "need not be aligned");
        for page_size in [0, 1, 2048, 4097, 12288] {
            assert_eq!(check_report(0, 0x1000, page_size), Err(Errno::EINVAL), "{page_size}");
        }
        assert_eq!(check_report(0x1000, 0, 4096), Err(Errno::EINVAL));
        assert_eq!(check_report(u64::MAX, 1, 4096), Err(Errno::EOVERFLOW));
        assert_eq!(check_report(1, u64::MAX, 4096), Err(Errno::EOVERFLOW));
        assert_eq!(check_report(0, u64::MAX, 4096), Ok(()));
    }

    #[test]
    fn bitmaps_are_whole_words() {
        assert_eq!(bitmap_bytes(64 << 30, 4096), 2 << 20);
        assert_eq!(
            (bitmap_bytes(1, 4096), bitmap_bytes(64 * 4096, 4096), bitmap_bytes(64 * 4096 + 1, 4096)),
            (8, 8, 16)
        );
        assert_eq!((bitmap_bytes(u64::MAX, 1), bitmap_bytes(9, 0)), (1 << 61, 0));
    }

    proptest! {
        /// Against the plain statement: every pair compared with every other.
        #[test]
        fn overlaps_are_found_whatever_the_order(at in prop::collection::vec((0u64..60, 1u64..6), 1..12)) {
            let ranges: Vec<_> = at.iter().map(|(page, pages)| range(page * 4096, pages * 4096)).collect();
            let apart = ranges.iter().enumerate().all(|(n, a)| {
                ranges[..n].iter().all(|b| a.iova + a.length <= b.iova || b.iova + b.length <= a.iova)
            });
            prop_assert_eq!(check_start(4096, &ranges, 12), if apart { Ok(()) } else { Err(Errno::EINVAL) });
        }
    }
}
