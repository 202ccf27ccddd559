//! A link that sends no faster than it is told to.

use std::io::IoSlice;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::{Link, LinkError, Wait};
use crate::lock::lock;

/// How long a burst may be that follows a pause, as time at the full rate.
const BURST: Duration = Duration::from_millis(20);
/// A burst is never shorter than this: small writes cost more than they carry.
const BURST_BYTES_MIN: u64 = 4 << 10;

/// What may be sent when: a token bucket whose tokens are bytes. It has no clock of its own.
#[derive(Clone, Debug)]
struct Bucket {
    bytes_per_second: u64,
    burst_bytes: u64,
    /// When all that has been sent is paid for. The bucket is full when this is a burst ago.
    paid_at: Option<Instant>,
}

impl Bucket {
    fn new(bytes_per_second: u64) -> Bucket {
        let bytes_per_second = bytes_per_second.max(1);
        let burst_bytes = bytes_in(BURST, bytes_per_second).max(BURST_BYTES_MIN);
        Bucket { bytes_per_second, burst_bytes, paid_at: None }
    }

    /// How much of this may be sent now, at least one byte; or how long to wait. Waits are for as much as is wanted,
    /// up to half a burst.
    fn allows(&self, wanted: usize, now: Instant) -> Result<usize, Duration> {
        let wanted = wanted as u64;
        let Some(paid_at) = self.paid_at else { return Ok(size(wanted.min(self.burst_bytes))) };
        let saved = now.saturating_duration_since(paid_at);
        let there = bytes_in(saved, self.bytes_per_second).min(self.burst_bytes);
        let enough = wanted.min(self.burst_bytes / 2);
        if there >= enough {
            return Ok(size(wanted.min(there)));
        }
        let due = paid_at + time_for(enough, self.bytes_per_second);
        Err(due.saturating_duration_since(now))
    }

    /// That much was sent.
    fn sent(&mut self, bytes: usize, now: Instant) {
        let burst = time_for(self.burst_bytes, self.bytes_per_second);
        let full = now.checked_sub(burst).unwrap_or(now);
        let from = self.paid_at.map_or(full, |paid_at| paid_at.max(full));
        self.paid_at = Some(from + time_for(bytes as u64, self.bytes_per_second));
    }

    /// So much of what was counted as sent was not.
    fn unsent(&mut self, bytes: usize) {
        // Rounded down: what was rounded up before is not given back.
        let time = Duration::from_nanos(
            u64::try_from(u128::from(bytes as u64) * 1_000_000_000 / u128::from(self.bytes_per_second))
                .unwrap_or(u64::MAX),
        );
        self.paid_at = self.paid_at.and_then(|paid_at| paid_at.checked_sub(time));
    }
}

fn bytes_in(time: Duration, bytes_per_second: u64) -> u64 {
    let bytes = time.as_nanos().saturating_mul(bytes_per_second.into()) / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Rounded up: never faster than the rate.
fn time_for(bytes: u64, bytes_per_second: u64) -> Duration {
    let nanos = (u128::from(bytes) * 1_000_000_000).div_ceil(bytes_per_second.into());
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// What may be sent in a second, by all the links together that have it. Clones are the same bandwidth.
#[derive(Clone, Debug)]
pub struct Bandwidth(Arc<Mutex<Bucket>>);

impl Bandwidth {
    /// This many bytes a second. A frame of the stream has to fit into the time that the other side may be silent.
    pub fn new(bytes_per_second: u64) -> Bandwidth {
        Bandwidth(Arc::new(Mutex::new(Bucket::new(bytes_per_second))))
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        lock(&self.0)
    }

    /// Takes what may be sent now of this, at least one byte, once there is something.
    fn take(&self, wanted: usize, wait: Wait<'_>) -> Result<usize, LinkError> {
        loop {
            let mut bucket = self.lock();
            let now = limosa_clockwork::now();
            match bucket.allows(wanted, now) {
                Ok(allowed) => {
                    bucket.sent(allowed, now);
                    return Ok(allowed);
                }
                Err(time) => {
                    drop(bucket);
                    pause(time, wait)?;
                }
            }
        }
    }
}

/// A link that keeps to a bandwidth in what it sends. What it receives is the other side's to limit.
#[derive(Debug)]
pub struct LimitedLink<L: Link> {
    inner: L,
    bandwidth: Option<Bandwidth>,
}

impl<L: Link> LimitedLink<L> {
    /// Sends no more than that; `None` for no limit.
    pub fn new(inner: L, bandwidth: Option<Bandwidth>) -> LimitedLink<L> {
        LimitedLink { inner, bandwidth }
    }
}

/// Waits that long, or less when the deadline is sooner or the move is called off.
fn pause(time: Duration, wait: Wait<'_>) -> Result<(), LinkError> {
    let time = time.min(wait.left()?);
    match wait.cancel {
        Some(cancel) if cancel.wait(time) => Err(LinkError::Cancelled),
        Some(_) => Ok(()),
        None => {
            // There is nothing that could end it early.
            limosa_clockwork::sleep(time);
            Ok(())
        }
    }
}

impl<L: Link> Link for LimitedLink<L> {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let Some(bandwidth) = &self.bandwidth else { return self.inner.write(slices, wait) };
        let taken = bandwidth.take(slices.iter().map(|slice| slice.len()).sum(), wait)?;
        let mut allowed = taken;
        let mut parts = Vec::with_capacity(slices.len());
        for slice in slices {
            let part = &slice[..slice.len().min(allowed)];
            allowed -= part.len();
            parts.push(IoSlice::new(part));
        }
        let sent = self.inner.write(&parts, wait);
        bandwidth.lock().unsent(taken - sent.as_ref().map_or(0, |sent| *sent));
        sent
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.inner.read(into, wait)
    }

    fn finish(&self) {
        self.inner.finish();
    }

    fn part(&self, wait: Wait<'_>) {
        self.inner.part(wait);
    }

    fn peer(&self) -> &str {
        self.inner.peer()
    }

    fn has_peer(&self) -> bool {
        self.inner.has_peer()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Cancel;
    use crate::link::SocketLink;

    #[test]
    fn a_bucket_gives_a_burst_and_then_the_rate() {
        let mut bucket = Bucket::new(1 << 20);
        let burst = bucket.burst_bytes as usize;
        assert_eq!(burst, (1 << 20) / 50);
        let now = Instant::now();
        assert_eq!(bucket.allows(1 << 30, now), Ok(burst));
        bucket.sent(burst, now);
        let wait = bucket.allows(1 << 30, now).unwrap_err();
        assert_eq!(wait, time_for(burst as u64 / 2, 1 << 20));
        assert_eq!(bucket.allows(1 << 30, now + wait), Ok(burst / 2));
        let short = bucket.allows(1, now).unwrap_err();
        assert_eq!(bucket.allows(1, now + short), Ok(1));
        assert_eq!(bucket.allows(1 << 30, now + Duration::from_secs(3600)), Ok(burst), "no more is saved up");
    }

    proptest! {
        #[test]
        fn no_span_of_time_sees_more_than_the_rate_and_a_burst(
            rate in 1_u64..=1 << 40,
            steps in prop::collection::vec((0_u64..50_000_000, 1_usize..4 << 20, 1_usize..=100), 1..200),
        ) {
            let mut bucket = Bucket::new(rate);
            let began = Instant::now();
            let mut now = began;
            let mut sent: u128 = 0;
            for (nanos, wanted, percent) in steps {
                now += Duration::from_nanos(nanos);
                let allowed = match bucket.allows(wanted, now) {
                    Ok(allowed) => allowed,
                    Err(wait) => {
                        prop_assert!(wait > Duration::ZERO);
                        now += wait;
                        // The wait that it asks for is enough.
                        bucket.allows(wanted, now).unwrap()
                    }
                };
                prop_assert!(allowed >= 1 && allowed <= wanted);
                // A link may take less than it is given.
                let taken = (allowed * percent).div_ceil(100);
                bucket.sent(allowed, now);
                bucket.unsent(allowed - taken);
                sent += taken as u128;
                let most = u128::from(bytes_in(now - began, rate)) + u128::from(bucket.burst_bytes);
                prop_assert!(sent <= most + 1, "{sent} > {most}");
            }
        }
    }

    #[test]
    fn a_wait_for_the_bucket_ends_at_the_deadline_and_at_a_cancel() {
        let (one, other) = SocketLink::pair().unwrap();
        let one = LimitedLink::new(one, Some(Bandwidth::new(1)));
        let long = |cancel| Wait::within(Duration::from_secs(60), cancel);
        let bytes = [7; 8192];
        let slices = [IoSlice::new(&bytes[..100]), IoSlice::new(&bytes)];
        let sent = one.write(&slices, long(None)).unwrap();
        assert_eq!(sent, BURST_BYTES_MIN as usize);
        let mut got = [0; 10_000];
        assert_eq!(other.read(&mut got, long(None)).unwrap(), sent);
        let none = Wait { deadline: Instant::now(), cancel: None };
        assert!(matches!(one.write(&slices, none), Err(LinkError::TimedOut)));
        let soon = Wait::within(Duration::from_millis(5), None);
        assert!(matches!(one.write(&slices, soon), Err(LinkError::TimedOut)));
        let cancel = Cancel::new().unwrap();
        let from_another = cancel.clone();
        let thread = std::thread::spawn(move || from_another.cancel());
        assert!(matches!(one.write(&slices, long(Some(&cancel))), Err(LinkError::Cancelled)));
        thread.join().unwrap();
        one.finish();
        assert!(matches!(other.read(&mut got, long(None)), Err(LinkError::Closed)), "nothing more was sent");
    }
}
