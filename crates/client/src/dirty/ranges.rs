//! [`merge_nearest`]: reduces the number of ranges to log, for devices that have few registers for ranges.

use limosa_protocol::feature::DmaLoggingRange;

/// Returns at most `max` ranges, but at least one, that cover all of `ranges`. Ranges with the smallest gaps between
/// them are joined. The result is sorted, and its ranges neither overlap nor touch. Empty ranges are left out, and a
/// range that extends beyond 2^64 ends before its last byte.
pub fn merge_nearest(ranges: &[DmaLoggingRange], max: usize) -> Vec<DmaLoggingRange> {
    let mut spans: Vec<(u64, u64)> = ranges
        .iter()
        .filter(|range| range.length > 0)
        .map(|range| (range.iova, range.iova.saturating_add(range.length)))
        .collect();
    spans.sort_unstable();
    spans.dedup_by(|next, kept| {
        let joined = next.0 <= kept.1;
        if joined {
            kept.1 = kept.1.max(next.1);
        }
        joined
    });
    let excess = spans.len().saturating_sub(max.max(1));
    if excess > 0 {
        let mut gaps: Vec<(u64, usize)> =
            spans.windows(2).enumerate().map(|(at, pair)| (pair[1].0 - pair[0].1, at + 1)).collect();
        gaps.select_nth_unstable(excess - 1);
        let mut joined: Vec<usize> = gaps[..excess].iter().map(|(_, at)| *at).collect();
        joined.sort_unstable();
        for at in joined.into_iter().rev() {
            spans[at - 1].1 = spans[at].1;
            spans.remove(at);
        }
    }
    spans.into_iter().map(|(start, end)| DmaLoggingRange { iova: start, length: end - start }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(ranges: &[(u64, u64)], max: usize) -> Vec<(u64, u64)> {
        let ranges: Vec<_> = ranges.iter().map(|&(iova, length)| DmaLoggingRange { iova, length }).collect();
        merge_nearest(&ranges, max).into_iter().map(|range| (range.iova, range.length)).collect()
    }

    #[test]
    fn the_smallest_gaps_go_first() {
        let ranges = [(0x9000, 0x1000), (0, 0x1000), (0x3000, 0x1000), (0x5000, 0x1000)];
        assert_eq!(merged(&ranges, 4), [(0, 0x1000), (0x3000, 0x1000), (0x5000, 0x1000), (0x9000, 0x1000)]);
        assert_eq!(merged(&ranges, 3), [(0, 0x1000), (0x3000, 0x3000), (0x9000, 0x1000)]);
        assert_eq!(merged(&ranges, 2), [(0, 0x6000), (0x9000, 0x1000)]);
        assert_eq!(merged(&ranges, 1), [(0, 0xa000)]);
        assert_eq!(merged(&ranges, 0), [(0, 0xa000)], "at least one");
        assert_eq!(merged(&[], 0), []);
    }

    #[test]
    fn ranges_that_touch_or_overlap_are_one() {
        assert_eq!(merged(&[(0x1000, 0x1000), (0, 0x1000)], 9), [(0, 0x2000)]);
        assert_eq!(merged(&[(0, 0x8000), (0x1000, 0x1000), (0x7000, 0x2000)], 9), [(0, 0x9000)]);
        assert_eq!(merged(&[(0, 0), (5, 0)], 9), []);
        assert_eq!(merged(&[(u64::MAX - 4095, 4096)], 9), [(u64::MAX - 4095, 4095)]);
    }

    #[test]
    fn no_address_is_lost_however_few_are_left() {
        // Ranges and gaps of all sizes, by a plain generator.
        let mut seed = 1_u64;
        let mut next = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let ranges: Vec<_> = (0..300).map(|_| (next(5000) * 4096, (1 + next(4)) * 4096)).collect();
        for max in [1, 2, 7, 100, 256, 300] {
            let merged = merged(&ranges, max);
            assert!(merged.len() <= max, "{} of {max}", merged.len());
            assert!(merged.is_sorted_by(|a, b| a.0 + a.1 < b.0), "in order and apart");
            for (iova, length) in &ranges {
                let inside = |range: &&(u64, u64)| range.0 <= *iova && iova + length <= range.0 + range.1;
                assert!(merged.iter().any(|range| inside(&range)), "{iova:#x} with at most {max}");
            }
        }
    }
}
