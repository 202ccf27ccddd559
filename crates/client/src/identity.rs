//! [`DeviceIdentity`]: distinguishes device objects, independent of their names.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

/// The identity of a device object in this process ([`Device::identity`](crate::Device::identity)). It is never reused,
/// even after the device is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceIdentity(NonZeroU64);

impl DeviceIdentity {
    /// An identity that no other device has.
    #[must_use]
    pub fn unique() -> DeviceIdentity {
        static LAST: AtomicU64 = AtomicU64::new(0);
        // 2^64 devices are not made.
        DeviceIdentity(NonZeroU64::MIN.saturating_add(LAST.fetch_add(1, Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_identities_differ() {
        let (one, other) = (DeviceIdentity::unique(), DeviceIdentity::unique());
        assert_ne!(one, other);
        let copy = one;
        assert_eq!(one, copy);
    }
}
