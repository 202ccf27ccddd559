//! Ranges of addresses given as first address and length (`vfio.h: struct
//! vfio_device_feature_dma_logging_range` and many others), without overflow.

use crate::Errno;

/// The first address after the range, [`Errno::EOVERFLOW`] when it is 2^64 or more. A range that
/// ends with the last byte of the address space is refused too, as Linux does for logging.
pub const fn end(start: u64, length: u64) -> Result<u64, Errno> {
    match start.checked_add(length) {
        Some(end) => Ok(end),
        None => Err(Errno::EOVERFLOW),
    }
}

/// The last address of the range: [`Errno::EINVAL`] for an empty one, [`Errno::EOVERFLOW`] when it
/// runs beyond 2^64. A range may end with the last byte of the address space.
pub const fn last(start: u64, length: u64) -> Result<u64, Errno> {
    match length.checked_sub(1) {
        None => Err(Errno::EINVAL),
        Some(more) => match start.checked_add(more) {
            Some(last) => Ok(last),
            None => Err(Errno::EOVERFLOW),
        },
    }
}

/// The part that two ranges have in common, as (first address, bytes); `None` when there is none or
/// one of them is empty. What runs beyond 2^64 is cut there.
pub fn overlap(a: (u64, u64), b: (u64, u64)) -> Option<(u64, u64)> {
    let last = |(start, length): (u64, u64)| Some(start.saturating_add(length.checked_sub(1)?));
    let (start, last) = (a.0.max(b.0), last(a)?.min(last(b)?));
    // Two ranges of which both are the whole address space would have a length of 2^64.
    (start <= last).then(|| (start, (last - start).saturating_add(1)))
}

/// Whether the inner range lies wholly in the outer one. Neither may run beyond 2^64.
pub fn contains(outer: (u64, u64), inner: (u64, u64)) -> bool {
    match (last(outer.0, outer.1), last(inner.0, inner.1)) {
        (Ok(outer_last), Ok(inner_last)) => outer.0 <= inner.0 && inner_last <= outer_last,
        _ => false,
    }
}

/// Whether the address is a multiple of the alignment, a power of two.
pub const fn is_aligned(address: u64, alignment: u64) -> bool {
    address & (alignment - 1) == 0
}

/// The highest multiple of the alignment, a power of two, that is not above the address.
pub const fn align_down(address: u64, alignment: u64) -> u64 {
    address & !(alignment - 1)
}

/// The lowest multiple of the alignment, a power of two, that is not below the address; `None`
/// when that is 2^64.
pub const fn align_up(address: u64, alignment: u64) -> Option<u64> {
    match address.checked_add(alignment - 1) {
        Some(above) => Some(align_down(above, alignment)),
        None => None,
    }
}

/// How many pages, a power of two bytes each and aligned by address, a range touches.
pub const fn pages(start: u64, length: u64, page_size: u64) -> u64 {
    match length.checked_sub(1) {
        None => 0,
        Some(more) => start.saturating_add(more) / page_size - start / page_size + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOP: u64 = u64::MAX;

    #[test]
    fn ends_are_checked() {
        assert_eq!(end(4096, 4096), Ok(8192));
        assert_eq!(end(TOP, 1), Err(Errno::EOVERFLOW));
        assert_eq!(last(TOP, 1), Ok(TOP));
        assert_eq!(last(TOP, 2), Err(Errno::EOVERFLOW));
        assert_eq!(last(7, 0), Err(Errno::EINVAL));
    }

    #[test]
    fn overlaps_are_the_common_part() {
        assert_eq!(overlap((0, 10), (5, 10)), Some((5, 5)));
        assert_eq!(overlap((5, 10), (0, 10)), Some((5, 5)));
        assert_eq!(overlap((0, 10), (10, 10)), None);
        assert_eq!(overlap((0, 10), (3, 0)), None);
        assert_eq!(overlap((TOP - 1, 9), (0, TOP)), Some((TOP - 1, 1)));
        assert!(contains((0, 10), (3, 7)) && !contains((0, 10), (3, 8)) && !contains((0, 10), (TOP, 2)));
        assert!(contains((TOP - 9, 10), (TOP, 1)) && !contains((0, 10), (3, 0)));
    }

    #[test]
    fn alignment_goes_down_and_up() {
        assert!(is_aligned(8192, 4096) && !is_aligned(8193, 4096) && is_aligned(3, 1));
        assert_eq!((align_down(8193, 4096), align_up(8193, 4096)), (8192, Some(12288)));
        assert_eq!((align_up(8192, 4096), align_up(TOP, 4096)), (Some(8192), None));
        assert_eq!((pages(4095, 2, 4096), pages(0, 4096, 4096), pages(9, 0, 4096)), (2, 1, 0));
        assert_eq!(pages(0, TOP, 1 << 63), 2);
    }
}
