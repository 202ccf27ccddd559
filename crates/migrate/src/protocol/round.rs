//! The findings at the end of a round of pre-copy.

use std::time::Duration;

/// The findings at the end of a round, or at a look at devices between rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Round {
    /// The number of the look, from 1.
    pub round: u32,
    /// Bytes of memory that are dirty.
    pub memory_dirty_bytes: u64,
    /// Bytes that devices would still have to give if they were stopped now, as far as that is known.
    pub device_bytes: u64,
    /// How many devices do not say how much they would give.
    pub devices_unknown: u32,
    /// Bytes that devices dirtied after they had been read, as far as they say.
    pub device_dirty_bytes: u64,
    /// Bytes of initial pre-copy data that are still to be read or loaded, as far as devices say. Can grow again
    /// (`VFIO_PRECOPY_INFO_REINIT`).
    pub device_initial_bytes: u64,
    /// The measured rate of bytes that the destination has handled, in a second; 0 before enough were moved to tell.
    pub bytes_per_second: u64,
    /// The predicted downtime if the stop came now, as far as sizes are known. It is a lower bound when
    /// [`Round::devices_unknown`] is not 0.
    pub predicted_downtime: Duration,
}
