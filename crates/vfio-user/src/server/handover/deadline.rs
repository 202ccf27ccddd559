//! The end of a freeze as a time of the monotonic clock, which all processes of a host share.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// A deadline further away than this cannot be the end of a freeze: the other process is in another time namespace.
const FAR: Duration = Duration::from_secs(60);

/// The time of the monotonic clock at this instant, in ns.
pub(super) fn to_shared(until: Instant) -> u64 {
    now_ns().saturating_add(until.saturating_duration_since(Instant::now()).as_nanos() as u64)
}

/// The instant at which the monotonic clock shows this time; `None` if that cannot be the end of a current freeze.
pub(super) fn from_shared(ns: u64) -> Option<Instant> {
    let left = Duration::from_nanos(ns.checked_sub(now_ns())?);
    (left < FAR).then(|| Instant::now() + left)
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    (now.tv_sec as u64) * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_the_same_instant_on_the_other_side() {
        let until = Instant::now() + Duration::from_secs(2);
        let there = from_shared(to_shared(until)).unwrap();
        let apart = there.max(until) - there.min(until);
        assert!(apart < Duration::from_secs(1), "{apart:?}");
        assert_eq!(from_shared(0), None, "it is over");
        assert_eq!(from_shared(u64::MAX), None, "it is of another clock");
    }
}
