//! [`Item`]: a piece of the transfer, and the limits of a transfer. The caller defines the kinds.

use limosa_foreign_fd::ForeignFd;

/// Items of all steps of a switch-over together.
pub const ITEMS_MAX: usize = 65_536;
/// Fds of all items of a switch-over together.
pub const FDS_MAX: usize = 65_536;
/// Fds of one item. A giver splits what has more of them into several items.
pub const ITEM_FDS_MAX: usize = 128;
/// Bytes of one item. Larger state goes in a file, as one of the item's fds.
pub const ITEM_BYTES_MAX: usize = 16 << 20;
/// Bytes of all items of a switch-over together.
pub const BYTES_MAX: u64 = 1 << 30;

/// A piece of the transfer.
#[derive(Debug, Default)]
pub struct Item {
    /// Its kind, defined by the caller.
    pub kind: u16,
    /// Which device it belongs to. The caller's number.
    pub device: u16,
    /// Its bytes, [`ITEM_BYTES_MAX`] at most.
    pub bytes: Vec<u8>,
    /// Its fds, [`ITEM_FDS_MAX`] at most. The old server gives duplicates, which are closed once the new server has its
    /// own. The new server gets fds that peers of the old one may have chosen, so they are dropped in the background.
    pub fds: Vec<ForeignFd>,
}

impl Item {
    /// An item without fds.
    pub fn new(kind: u16, device: u16, bytes: Vec<u8>) -> Item {
        Item { kind, device, bytes, fds: Vec::new() }
    }

    /// The item with these fds too.
    #[must_use]
    pub fn with_fds<F: Into<ForeignFd>>(mut self, fds: impl IntoIterator<Item = F>) -> Item {
        self.fds.extend(fds.into_iter().map(Into::into));
        self
    }
}

/// What items add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Items.
    pub items: usize,
    /// Their fds.
    pub fds: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// An item, or all of them together, above a bound.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an item of kind {kind} for device {device}: {count} {what}; expected {max} at most")]
pub struct TooLarge {
    /// The item's kind.
    pub kind: u16,
    /// The item's device.
    pub device: u16,
    /// What there is too much of.
    pub what: &'static str,
    /// How much with this item.
    pub count: u64,
    /// The bound.
    pub max: u64,
}

impl Totals {
    /// Counts an item, by what its head says. An error leaves the totals unchanged.
    pub fn add(&mut self, kind: u16, device: u16, bytes: u64, fds: usize) -> Result<(), TooLarge> {
        let sum = Totals {
            items: self.items.saturating_add(1),
            fds: self.fds.saturating_add(fds),
            bytes: self.bytes.saturating_add(bytes),
        };
        let bounds = [
            ("bytes in one item", bytes, ITEM_BYTES_MAX as u64),
            ("fds in one item", fds as u64, ITEM_FDS_MAX as u64),
            ("items in all", sum.items as u64, ITEMS_MAX as u64),
            ("fds in all", sum.fds as u64, FDS_MAX as u64),
            ("bytes in all", sum.bytes, BYTES_MAX),
        ];
        match bounds.into_iter().find(|(_, count, max)| count > max) {
            Some((what, count, max)) => Err(TooLarge { kind, device, what, count, max }),
            None => {
                *self = sum;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_above_a_bound_is_refused_and_not_counted() {
        let mut totals = Totals::default();
        totals.add(1, 2, ITEM_BYTES_MAX as u64, ITEM_FDS_MAX).unwrap();
        let before = totals;
        let refused = totals.add(1, 2, ITEM_BYTES_MAX as u64 + 1, 0).unwrap_err();
        assert_eq!((refused.what, totals), ("bytes in one item", before));
        assert_eq!(totals.add(1, 2, 0, ITEM_FDS_MAX + 1).unwrap_err().what, "fds in one item");
        assert_eq!(totals.add(1, 2, u64::MAX, usize::MAX).unwrap_err().count, u64::MAX);
    }

    #[test]
    fn all_items_together_have_bounds() {
        let mut totals = Totals::default();
        let refused = (0..).find_map(|_| totals.add(0, 0, 0, ITEM_FDS_MAX).err()).unwrap();
        assert_eq!((refused.what, totals.fds), ("fds in all", FDS_MAX));
        let mut totals = Totals::default();
        let refused = (0..).find_map(|_| totals.add(0, 0, ITEM_BYTES_MAX as u64, 0).err()).unwrap();
        assert_eq!((refused.what, totals.bytes), ("bytes in all", BYTES_MAX));
        let mut totals = Totals::default();
        let refused = (0..).find_map(|_| totals.add(0, 0, 0, 0).err()).unwrap();
        assert_eq!((refused.what, totals.items), ("items in all", ITEMS_MAX));
    }
}
