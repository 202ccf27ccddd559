//! When pre-copy stops.

/// The limits of pre-copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convergence {
    /// The most rounds.
    pub rounds_max: u32,
    /// Stop when no more than this is left of memory and device data, in bytes, as far as devices say.
    pub left_bytes_max: u64,
}

impl Default for Convergence {
    fn default() -> Convergence {
        Convergence { rounds_max: 30, left_bytes_max: 4 << 20 }
    }
}

/// What is known at the end of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Its number, from 1.
    pub round: u32,
    /// Bytes of memory that are dirty.
    pub memory_dirty_bytes: u64,
    /// Bytes that devices dirtied after they had been read, as far as they say.
    pub device_dirty_bytes: u64,
    /// Bytes of initial pre-copy data that devices still want to be read before the stop, as far as
    /// they say. Can grow again (`VFIO_PRECOPY_INFO_REINIT`).
    pub device_initial_bytes: u64,
}

impl Convergence {
    /// Whether to stop the devices now, rather than begin another round.
    pub fn stops(&self, round: &Round) -> bool {
        let left = round.memory_dirty_bytes.saturating_add(round.device_dirty_bytes);
        round.round >= self.rounds_max || (round.device_initial_bytes == 0 && left <= self.left_bytes_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_bytes_hold_the_stop_back_until_the_last_round() {
        let limits = Convergence { rounds_max: 3, left_bytes_max: 100 };
        let round =
            Round { round: 1, memory_dirty_bytes: 50, device_dirty_bytes: 50, device_initial_bytes: 0 };
        assert!(limits.stops(&round));
        assert!(!limits.stops(&Round { device_initial_bytes: 1, ..round }));
        assert!(!limits.stops(&Round { memory_dirty_bytes: 51, ..round }));
        assert!(!limits.stops(&Round { device_dirty_bytes: u64::MAX, ..round }));
        assert!(limits.stops(&Round { round: 3, device_initial_bytes: 1, ..round }));
    }
}
