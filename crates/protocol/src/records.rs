//! Arrays at the end of a structure whose fixed part counts their entries.

use core::fmt;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unalign};

/// The entries of such an array, wherever in memory they lie.
pub struct Records<'a, T>(&'a [Unalign<T>]);

impl<'a, T: FromBytes + KnownLayout + Immutable + Copy> Records<'a, T> {
    /// The first `count` entries in `bytes`; `None` when `bytes` ends before the last one. Bytes
    /// after it are ignored.
    pub fn read(bytes: &'a [u8], count: u32) -> Option<Records<'a, T>> {
        let (entries, _) = <[Unalign<T>]>::ref_from_prefix_with_elems(bytes, count as usize).ok()?;
        Some(Records(entries))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The entries in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = T> + 'a {
        self.0.iter().map(|entry| entry.get())
    }
}

impl<T> Clone for Records<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Records<'_, T> {}

impl<T: FromBytes + KnownLayout + Immutable + Copy + PartialEq> PartialEq for Records<'_, T> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<T: FromBytes + KnownLayout + Immutable + Copy + fmt::Debug> fmt::Debug for Records<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
