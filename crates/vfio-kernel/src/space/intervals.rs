//! Addresses as [`Span`]s, and sets of them ([`Intervals`]).

use std::collections::BTreeMap;

use limosa_protocol::range::{self, align_down};

/// The addresses from `first` to `last`, both included. A span is never empty, and may end with the last address there
/// is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub first: u64,
    pub last: u64,
}

impl Span {
    /// `None` for an empty range, and for one that runs beyond 2^64.
    pub fn of(iova: u64, size: u64) -> Option<Span> {
        let last = range::last(iova, size).ok()?;
        Some(Span { first: iova, last })
    }

    /// Bytes. Of the whole address space, which nobody can map, it is one less.
    pub fn size(self) -> u64 {
        (self.last - self.first).saturating_add(1)
    }

    /// How many pages of so many bytes there are from the first address on.
    pub fn pages(self, page_size: u64) -> u64 {
        (self.last - self.first) / page_size + 1
    }

    pub fn contains(self, inner: Span) -> bool {
        self.first <= inner.first && inner.last <= self.last
    }

    pub fn overlap(self, other: Span) -> Option<Span> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (first <= last).then_some(Span { first, last })
    }

    /// Wide enough that both ends are multiples of the alignment, a power of two.
    pub fn rounded_out(self, alignment: u64) -> Span {
        Span { first: align_down(self.first, alignment), last: self.last | (alignment - 1) }
    }

    /// The parts of this span that lie before and after another one.
    pub fn beside(self, other: Span) -> impl Iterator<Item = Span> {
        let before = other.first.checked_sub(1).map(|last| Span { first: 0, last });
        let after = other.last.checked_add(1).map(|first| Span { first, last: u64::MAX });
        before.into_iter().chain(after).filter_map(move |side| self.overlap(side))
    }
}

/// A set of addresses: spans that are apart, the last address of each by its first.
#[derive(Debug, Default)]
pub(super) struct Intervals(BTreeMap<u64, u64>);

impl Intervals {
    /// Adds addresses, joined with what they touch.
    pub fn add(&mut self, Span { mut first, mut last }: Span) {
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

    /// What lies in a range, the highest addresses first.
    pub fn within(&self, range: Span) -> impl Iterator<Item = Span> {
        let below = self.0.range(..=range.last).rev().map(|(&first, &last)| Span { first, last });
        below.map_while(move |span| span.overlap(range))
    }

    /// Removes what lies in a range and returns it, the highest addresses first.
    pub fn take(&mut self, range: Span) -> Vec<Span> {
        let taken: Vec<Span> = self.within(range).collect();
        for span in &taken {
            // The first and the last of them may be parts.
            let from = self.0.range(..=span.first).next_back().map(|(&from, _)| from);
            if let Some((from, to)) = from.and_then(|from| self.0.remove_entry(&from)) {
                for rest in (Span { first: from, last: to }).beside(*span) {
                    self.0.insert(rest.first, rest.last);
                }
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first: u64, last: u64) -> Span {
        Span { first, last }
    }

    fn spans(of: &[(u64, u64)]) -> Vec<Span> {
        of.iter().map(|&(first, last)| span(first, last)).collect()
    }

    #[test]
    fn neighbours_are_one_and_what_is_taken_is_gone() {
        let mut set = Intervals::default();
        for at in [0x1000, 0x3000, 0x2000, 0x8000] {
            set.add(span(at, at + 0xfff));
        }
        set.add(span(0x1800, 0x1801));
        let all = span(0, u64::MAX);
        assert_eq!(set.within(all).collect::<Vec<_>>(), spans(&[(0x8000, 0x8fff), (0x1000, 0x3fff)]));
        assert_eq!(set.take(span(0, 0xfff)), []);
        assert_eq!(set.take(span(0x2000, 0x8000)), spans(&[(0x8000, 0x8000), (0x2000, 0x3fff)]));
        assert_eq!(set.take(span(0x2000, 0x8000)), []);
        assert_eq!(set.take(span(0x1100, 0x11ff)), spans(&[(0x1100, 0x11ff)]));
        assert_eq!(set.take(all), spans(&[(0x8001, 0x8fff), (0x1200, 0x1fff), (0x1000, 0x10ff)]));
        assert!(set.0.is_empty());
    }

    #[test]
    fn the_ends_of_the_address_space_are_addresses() {
        let mut set = Intervals::default();
        set.add(span(0, 0));
        set.add(span(u64::MAX - 1, u64::MAX));
        set.add(span(u64::MAX, u64::MAX));
        assert_eq!(set.take(span(1, u64::MAX)), spans(&[(u64::MAX - 1, u64::MAX)]));
        set.add(span(0, u64::MAX));
        assert_eq!(set.take(span(5, 5)), spans(&[(5, 5)]));
        assert_eq!(set.take(span(0, u64::MAX)), spans(&[(6, u64::MAX), (0, 4)]));
    }

    #[test]
    fn spans_are_rounded_and_cut_to_the_ends_of_the_address_space() {
        assert_eq!(Span::of(u64::MAX, 1), Some(span(u64::MAX, u64::MAX)));
        assert_eq!((Span::of(u64::MAX, 2), Span::of(7, 0)), (None, None));
        assert_eq!(span(0x1800, 0x1800).rounded_out(0x1000), span(0x1000, 0x1fff));
        assert_eq!(span(1, u64::MAX - 1).rounded_out(0x1000), span(0, u64::MAX));
        let beside = |span: Span, other| span.beside(other).collect::<Vec<_>>();
        assert_eq!(beside(span(0, 99), span(10, 19)), spans(&[(0, 9), (20, 99)]));
        assert_eq!(beside(span(0, u64::MAX), span(0, u64::MAX)), []);
        assert_eq!(beside(span(5, 9), span(9, 9)), spans(&[(5, 8)]));
        assert_eq!(beside(span(5, 9), span(20, 29)), spans(&[(5, 9)]));
        assert_eq!((span(0, 4095).pages(4096), span(1, 4097).pages(4096)), (1, 2));
    }
}
