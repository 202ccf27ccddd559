//! The reasons for which a stop cannot be as short as its goal.

use std::time::Duration;

/// An obstacle that keeps a move from stopping within its goal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Obstacle {
    /// The guest dirties memory as fast as it is moved.
    #[error(
        "the guest dirties its memory about as fast as it is moved ({dirty_bytes} bytes are dirty); slow the guest \
         down, use a faster link or disk, or allow more downtime"
    )]
    DirtyMemory {
        /// Bytes that are dirty.
        dirty_bytes: u64,
    },
    /// A device dirties its state as fast as it is moved, or sends nothing although it reports data left.
    #[error(
        "{device} does not get ahead of its own changes in pre-copy ({left_bytes} bytes are left); make it less busy, \
         use a faster link or disk, or allow more downtime"
    )]
    DirtyDevice {
        /// The device.
        device: String,
        /// Bytes that it says are left.
        left_bytes: u64,
    },
    /// A device has more data to send in the stop than the goal allows, and pre-copy cannot reduce that.
    #[error(
        "{device} has {bytes} bytes to send once it is stopped; allow more downtime, or use a faster link or disk"
    )]
    DeviceState {
        /// The device.
        device: String,
        /// Bytes that it would give.
        bytes: u64,
    },
    /// The destination loads a device's data more slowly than the goal allows.
    #[error(
        "the destination has not loaded {bytes} bytes that {device} has sent; find out why the device there is slow, or \
         allow more downtime"
    )]
    SlowToLoad {
        /// The device.
        device: String,
        /// Bytes that are not loaded.
        bytes: u64,
    },
    /// A device's initial bytes were not read and loaded in time.
    #[error(
        "{device} still has {left_bytes} bytes of initial data to send or to load after {limit:?}; allow it more time"
    )]
    InitialData {
        /// The device.
        device: String,
        /// Bytes that are left; 0 when all are read and not all are loaded.
        left_bytes: u64,
        /// The limit that has passed ([`Convergence::initial_max`](crate::Convergence::initial_max)).
        limit: Duration,
    },
    /// A device does not report how much data it has to send in the stop.
    #[error(
        "{device} does not say how much state it has (no MIG_DATA_SIZE), so that the downtime cannot be \
         predicted; state its size (MovedDevice::stop_bytes), or allow a stop of any length"
    )]
    SizeUnknown {
        /// The device.
        device: String,
    },
    /// The log of dirty pages was lost after the guest had stopped, so that all memory would have to move in the stop.
    #[error(
        "the log of dirty pages was lost at the stop, and all memory would have to be moved while nothing runs"
    )]
    LogLost,
    /// The move of the data that is left after the stop takes longer than the guest may stand still.
    #[error("it would stand still for longer than {limit:?}, the limit for that{}", and_left(.left))]
    Standstill {
        /// The limit ([`Options::standstill_max`](crate::Options::standstill_max)).
        limit: Duration,
        /// Where most is left, as far as that is known.
        left: Option<Remaining>,
    },
    /// The data that is left would fit into the goal, and the rest of a stop does not.
    #[error(
        "the latency of the link, the devices' arcs and the last read of the dirty logs take that long, although little \
         data is left; allow more downtime"
    )]
    Latency,
}

/// Bytes of a device or of memory that are not sent yet, or that the destination has not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes of {of}")]
#[non_exhaustive]
pub struct Remaining {
    /// The device, or the guest's memory.
    pub of: String,
    /// Bytes.
    pub bytes: u64,
}

impl Remaining {
    /// The largest amount that is left, of memory or of one of these devices; `None` if nothing is left.
    pub(crate) fn most<'n>(memory: u64, devices: impl Iterator<Item = (&'n str, u64)>) -> Option<Remaining> {
        let all = std::iter::once(("the guest's memory", memory)).chain(devices);
        let (of, bytes) = all.filter(|(_, bytes)| *bytes > 0).max_by_key(|(_, bytes)| *bytes)?;
        Some(Remaining { of: of.into(), bytes })
    }
}

pub(super) fn and_left(left: &Option<Remaining>) -> String {
    left.as_ref().map_or(String::new(), |left| format!("; {left} are left to send or to load"))
}
