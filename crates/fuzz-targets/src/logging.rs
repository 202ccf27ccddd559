//! What START and REPORT of DMA logging refuse.
//!
//! Input: the control structure of a START, then its ranges; the first of these is a REPORT's range
//! too.

use limosa_protocol::feature::{DmaLoggingRange, FeatureDmaLoggingControl};
use limosa_protocol::logging::{bitmap_bytes, check_report, read_start};
use zerocopy::IntoBytes;

use crate::input::Input;

const RANGES_MAX: usize = 16;

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let FeatureDmaLoggingControl { page_size, num_ranges, .. } = input.take();
    if let Ok(mut ranges) = read_start(page_size, num_ranges, input.0, RANGES_MAX) {
        assert!(ranges.len() == num_ranges as usize && (1..=RANGES_MAX).contains(&ranges.len()));
        ranges.sort_by_key(|range| range.iova);
        let mut end = 0;
        for DmaLoggingRange { iova, length } in ranges {
            assert!(iova >= end && length > 0 && iova % page_size == 0 && length % page_size == 0);
            end = iova.checked_add(length).expect("ranges that overflow are refused");
        }
    }
    let DmaLoggingRange { iova, length } = input.take();
    if check_report(iova, length, page_size).is_ok() {
        let bytes = bitmap_bytes(length, page_size);
        assert!(
            bytes.is_multiple_of(8)
                && bytes / 8 >= length / page_size / 64
                && bytes <= length / page_size / 8 + 8
        );
        assert!(iova.checked_add(length).is_some());
    }
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let start = |page_size, num_ranges, ranges: &[(u64, u64)]| {
        let control = FeatureDmaLoggingControl { page_size, num_ranges, reserved: 0 };
        let mut bytes = control.as_bytes().to_vec();
        for (iova, length) in ranges {
            bytes.extend(DmaLoggingRange { iova: *iova, length: *length }.as_bytes());
        }
        bytes
    };
    vec![
        ("two", start(4096, 2, &[(0x100000, 0x1000000), (0, 0xa0000)])),
        ("overlap", start(4096, 2, &[(0, 0x2000), (0x1000, 0x1000)])),
        ("overflow", start(4096, 1, &[(u64::MAX - 4095, 4096)])),
        ("counts_too_many", start(4096, u32::MAX, &[(0, 4096)])),
        ("cut", start(4096, 2, &[(0, 4096)])),
        ("odd_page_size", start(5000, 1, &[(0, 5000)])),
    ]
}
