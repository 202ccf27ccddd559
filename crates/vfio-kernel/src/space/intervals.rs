//! Sets of addresses, as intervals: the pages that were dirty when they were unmapped, until they are reported.

use std::collections::BTreeMap;

/// Intervals that are apart, by first address, with the last address of each.
#[derive(Debug, Default)]
pub(super) struct Intervals(BTreeMap<u64, u64>);

impl Intervals {
    /// Adds addresses, joined with what they touch.
    pub fn add(&mut self, mut first: u64, mut last: u64) {
        let beyond = last.saturating_add(1);
        while let Some((&from, &to)) = self.0.range(..=beyond).next_back()
            && to >= first.saturating_sub(1)
        {
            first = first.min(from);
            last = last.max(to);
            self.0.remove(&from);
        }
        self.0.insert(first, last);
    }

    /// Removes what lies between two addresses and returns it as (first, last).
    pub fn take(&mut self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let mut taken = Vec::new();
        while let Some((&from, &to)) = self.0.range(..=last).next_back()
            && to >= first
        {
            self.0.remove(&from);
            if from < first {
                self.0.insert(from, first - 1);
            }
            if to > last {
                self.0.insert(last + 1, to);
            }
            taken.push((from.max(first), to.min(last)));
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_and_what_is_taken_is_gone() {
        let mut set = Intervals::default();
        set.add(0x1000, 0x1fff);
        set.add(0x3000, 0x3fff);
        set.add(0x2000, 0x2fff);
        set.add(0x8000, 0x8fff);
        set.add(0x1800, 0x1801);
        assert_eq!(
            set.0.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>(),
            [(0x1000, 0x3fff), (0x8000, 0x8fff)]
        );
        assert_eq!(set.take(0, 0xfff), []);
        assert_eq!(set.take(0x2000, 0x8000), [(0x8000, 0x8000), (0x2000, 0x3fff)]);
        assert_eq!(set.take(0x2000, 0x8000), []);
        assert_eq!(set.take(0, u64::MAX), [(0x8001, 0x8fff), (0x1000, 0x1fff)]);
        assert!(set.0.is_empty());
    }

    #[test]
    fn the_ends_of_the_address_space_are_addresses() {
        let mut set = Intervals::default();
        set.add(0, 0);
        set.add(u64::MAX - 1, u64::MAX);
        set.add(u64::MAX, u64::MAX);
        assert_eq!(set.take(1, u64::MAX), [(u64::MAX - 1, u64::MAX)]);
        set.add(0, u64::MAX);
        assert_eq!(set.take(5, 5), [(5, 5)]);
        assert_eq!(set.take(0, u64::MAX), [(6, u64::MAX), (0, 4)]);
    }
}
