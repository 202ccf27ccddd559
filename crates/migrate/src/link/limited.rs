//! [`LimitedLink`]: a link that sends no faster than a [`Bandwidth`] allows. Several links can share one bandwidth.

use std::io::{IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use limosa_guest_memory::{PinnedBytes, SendPart};

use super::{Link, LinkError, Wait, forward_link};
use crate::cancel::after;
use crate::lock::lock;

/// The longest burst after a pause, as time at the full rate.
const BURST: Duration = Duration::from_millis(20);
/// The longest time that one piece takes at the full rate.
const PIECE_TIME_MAX: Duration = Duration::from_millis(20);
/// The largest piece. Links that share a bandwidth take turns after each piece.
const PIECE_BYTES_MAX: u64 = 16 << 10;
/// The smallest limit for pieces and bursts, at any rate: smaller writes cost more than they carry.
const PIECE_BYTES_MIN: u64 = 4 << 10;
/// A write of no more bytes that may not wait at all goes ahead of the budget, which still pays for it.
const AHEAD_BYTES_MAX: usize = 64;

/// A token bucket whose tokens are bytes. It hands out reservations, each with the moment from which its bytes may be
/// sent, in the order of the requests. It has no clock of its own.
#[derive(Clone, Debug)]
struct Bucket {
    bytes_per_second: u64,
    burst_bytes: u64,
    piece_bytes: u64,
    /// The moment up to which the budget is spent. It lies in the future while requests wait. The bucket is full when
    /// it lies a burst ago.
    spent_until: Option<Instant>,
}

/// Bytes of the budget that belong to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reservation {
    bytes: usize,
    /// They may be sent from this moment on.
    due: Instant,
}

impl Bucket {
    fn new(bytes_per_second: u64) -> Bucket {
        let bytes_per_second = bytes_per_second.max(1);
        let burst_bytes = bytes_in(BURST, bytes_per_second).max(PIECE_BYTES_MIN);
        let piece_bytes = bytes_in(PIECE_TIME_MAX, bytes_per_second).clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX);
        Bucket { bytes_per_second, burst_bytes, piece_bytes, spent_until: None }
    }

    /// Reserves as many of the wanted bytes as fit in one piece, behind all earlier reservations.
    fn reserve(&mut self, wanted: usize, now: Instant) -> Reservation {
        let bytes = (wanted as u64).min(self.piece_bytes);
        let burst = time_for(self.burst_bytes, self.bytes_per_second);
        let full = now.checked_sub(burst).unwrap_or(now);
        let from = self.spent_until.map_or(full, |spent_until| spent_until.max(full));
        let due = after(from, time_for(bytes, self.bytes_per_second));
        self.spent_until = Some(due);
        // Not more than was wanted, so it fits.
        Reservation { bytes: bytes as usize, due }
    }

    /// Takes back bytes that were reserved and not sent. Later reservations keep their moments.
    fn give_back(&mut self, bytes: usize) {
        // Rounded down: an earlier rounding up is not given back.
        let nanos = u128::from(bytes as u64) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.spent_until = self.spent_until.and_then(|spent_until| spent_until.checked_sub(time));
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

/// A budget of bytes per second for all links that have a clone of it.
///
/// Links take from the budget in pieces, first come, first served. A piece is what 20 ms of the rate carry, at most
/// 16 KiB, but not less than 4 KiB unless less is to be written. So a write waits for at most one piece of each link
/// that shares the bandwidth, its own included.
#[derive(Clone, Debug)]
pub struct Bandwidth(Arc<Mutex<Bucket>>);

impl Bandwidth {
    /// A budget of this many bytes per second; 0 counts as 1.
    pub fn new(bytes_per_second: u64) -> Bandwidth {
        Bandwidth(Arc::new(Mutex::new(Bucket::new(bytes_per_second))))
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        lock(&self.0)
    }

    /// Waits for a piece of the wanted bytes. Returns its size in bytes, and how long the wait was.
    fn take(&self, wanted: usize, wait: Wait<'_>) -> Result<(usize, Duration), LinkError> {
        if wait.cancel.is_some_and(crate::Cancel::is_cancelled) {
            return Err(LinkError::Cancelled);
        }
        let now = limosa_clockwork::now();
        let Reservation { bytes, due } = self.lock().reserve(wanted, now);
        let left = due.saturating_duration_since(now);
        // Links that are idle would never get a keep-alive through while others use up the budget.
        let goes_ahead = wait.deadline <= now && wanted <= AHEAD_BYTES_MAX;
        if left.is_zero() || goes_ahead {
            return Ok((bytes, Duration::ZERO));
        }
        let stopped = if wait.deadline <= now {
            Some(LinkError::TimedOut)
        } else {
            match wait.cancel {
                Some(cancel) => cancel.wait(left).then_some(LinkError::Cancelled),
                None => {
                    limosa_clockwork::sleep(left);
                    None
                }
            }
        };
        match stopped {
            Some(error) => {
                self.lock().give_back(bytes);
                Err(error)
            }
            None => Ok((bytes, limosa_clockwork::now().saturating_duration_since(now))),
        }
    }
}

/// A link that keeps to a bandwidth when it sends. Receiving is not limited: that is up to the other end.
///
/// The wait for the budget is not silence of the peer. [`Wait::deadline`] does not bound it, only [`Wait::cancel`]
/// does; the deadline bounds the wait for the inner link, and counts from when the bytes may be sent. A deadline that
/// has passed already when a write begins allows no wait for the budget either: the write fails, unless it is of 64
/// bytes or fewer. A keep-alive is, and goes ahead of the budget.
#[derive(Debug)]
pub struct LimitedLink<L: Link> {
    inner: L,
    bandwidth: Option<Bandwidth>,
}

impl<L: Link> LimitedLink<L> {
    /// Limits the bytes that are sent on `inner`; `None` is no limit.
    pub fn new(inner: L, bandwidth: Option<Bandwidth>) -> LimitedLink<L> {
        LimitedLink { inner, bandwidth }
    }
}

impl<L: Link> LimitedLink<L> {
    /// Calls `write` with as many of the wanted bytes as the budget allows. Bytes that it did not write return to the
    /// budget.
    fn within_budget(
        &self,
        wanted: usize,
        wait: Wait<'_>,
        write: impl FnOnce(usize, Wait<'_>) -> Result<usize, LinkError>,
    ) -> Result<usize, LinkError> {
        let Some(bandwidth) = self.bandwidth.as_ref().filter(|_| wanted > 0) else {
            return write(wanted, wait);
        };
        let (taken, waited) = bandwidth.take(wanted, wait)?;
        let wait = Wait { deadline: after(wait.deadline, waited), ..wait };
        let sent = write(taken, wait);
        bandwidth.lock().give_back(taken.saturating_sub(sent.as_ref().map_or(0, |sent| *sent)));
        sent
    }
}

impl<L: Link> Link for LimitedLink<L> {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let wanted = slices.iter().map(|slice| slice.len()).sum();
        self.within_budget(wanted, wait, |allowed, wait| {
            let mut left = allowed;
            let mut parts = Vec::with_capacity(slices.len());
            for slice in slices {
                let part = &slice[..slice.len().min(left)];
                left -= part.len();
                parts.push(IoSlice::new(part));
            }
            self.inner.write(&parts, wait)
        })
    }

    fn write_parts(&self, parts: &[SendPart<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let wanted = parts.iter().map(SendPart::len).sum();
        self.within_budget(wanted, wait, |allowed, wait| {
            let mut left = allowed;
            let mut some = Vec::with_capacity(parts.len());
            for part in parts {
                let part = part.within(0, left);
                left -= part.len();
                some.push(part);
            }
            self.inner.write_parts(&some, wait)
        })
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.inner.read(into, wait)
    }

    fn read_parts(&self, into: &mut [IoSliceMut<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.inner.read_parts(into, wait)
    }

    fn read_to_memory(
        &self,
        memory: &PinnedBytes,
        from: usize,
        behind: &mut [u8],
        wait: Wait<'_>,
    ) -> Result<usize, LinkError> {
        self.inner.read_to_memory(memory, from, behind, wait)
    }

    forward_link!(|this| this.inner);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Cancel;
    use crate::link::SocketLink;

    #[test]
    fn a_bucket_gives_a_burst_and_then_the_rate() {
        const RATE: u64 = 1 << 20;
        let mut bucket = Bucket::new(RATE);
        assert_eq!((bucket.burst_bytes, bucket.piece_bytes), (RATE / 50, 16 << 10));
        let now = Instant::now();
        let first = bucket.reserve(1 << 30, now);
        assert_eq!(first.bytes, 16 << 10);
        assert!(first.due <= now);
        assert!(bucket.reserve((RATE / 50 - (16 << 10)) as usize, now).due <= now, "the rest of the burst");
        let next = bucket.reserve(1 << 30, now);
        let wait = next.due.saturating_duration_since(now);
        let exact = time_for(16 << 10, RATE);
        assert!(wait >= exact && wait <= exact + Duration::from_nanos(3), "{wait:?}");
        let later = now + Duration::from_secs(3600);
        assert!(bucket.reserve(16 << 10, later).due <= later);
        assert!(bucket.reserve(16 << 10, later).due > later, "no more than a burst is saved up");
    }

    #[test]
    fn pieces_are_small_at_any_rate() {
        for (rate, piece) in [(1, 4096), (1 << 10, 4096), (500_000, 10_000), (1 << 40, 16 << 10)] {
            let mut bucket = Bucket::new(rate);
            assert_eq!(bucket.reserve(1 << 30, Instant::now()).bytes, piece, "{rate} bytes per second");
            assert_eq!(bucket.reserve(7, Instant::now()).bytes, 7);
        }
    }

    #[test]
    fn a_budget_without_end_or_of_nothing_does_not_panic() {
        for rate in [0, 1, u64::MAX] {
            let mut bucket = Bucket::new(rate);
            for _ in 0..100 {
                bucket.reserve(usize::MAX, Instant::now());
                bucket.give_back(usize::MAX);
            }
        }
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
                let Reservation { bytes, due } = bucket.reserve(wanted, now);
                now = now.max(due);
                prop_assert!(bytes >= 1 && bytes <= wanted);
                // A link may take less than it is given.
                let taken = (bytes * percent).div_ceil(100);
                bucket.give_back(bytes - taken);
                sent += taken as u128;
                let most = u128::from(bytes_in(now - began, rate)) + u128::from(bucket.burst_bytes);
                prop_assert!(sent <= most + 1, "{sent} > {most}");
            }
        }

        /// Links that always have something to write, in virtual time: each has one request at a time, of any size, and
        /// writes all, a part or nothing of its piece.
        #[test]
        fn no_link_waits_longer_than_the_pieces_of_all_links_take(
            rate in 1_u64 << 12..1 << 30,
            links in 1_usize..=16,
            sizes in prop::collection::vec(1_usize..64 << 10, 64),
            percents in prop::collection::vec(0_usize..=100, 16),
        ) {
            const REQUESTS: usize = 2000;
            let mut bucket = Bucket::new(rate);
            let began = Instant::now();
            // The moments at which each link asks next.
            let mut asks = vec![began; links];
            let mut requests = vec![0_usize; links];
            let mut sent: u128 = 0;
            let mut end = began;
            for at in 0..REQUESTS {
                let Some(link) = (0..links).min_by_key(|link| (asks[*link], requests[*link])) else { break };
                let now = asks[link];
                let Reservation { bytes, due } = bucket.reserve(sizes[at % sizes.len()], now);
                let wait = due.saturating_duration_since(now);
                let longest = time_for((links as u64 + 1) * bucket.piece_bytes, rate);
                prop_assert!(wait <= longest, "{wait:?} > {longest:?}");
                let percent = percents[at % percents.len()];
                let taken = bytes * percent / 100;
                bucket.give_back(bytes - taken);
                requests[link] += 1;
                sent += taken as u128;
                asks[link] = now.max(due);
                end = end.max(asks[link]);
            }
            let most = u128::from(bytes_in(end - began, rate)) + u128::from(bucket.burst_bytes);
            prop_assert!(sent <= most + 1, "{sent} > {most}");
        }

        /// The same where each piece is sent: then the rate is used up, and shares are equal to a piece.
        #[test]
        fn links_with_much_to_send_have_equal_shares_of_all_of_the_bandwidth(
            rate in 1_u64 << 12..1 << 30,
            links in 1_usize..=16,
            starts in prop::collection::vec(0_u64..20_000_000, 16),
        ) {
            let mut bucket = Bucket::new(rate);
            let began = Instant::now();
            let mut asks: Vec<_> = (0..links).map(|link| began + Duration::from_nanos(starts[link])).collect();
            let mut shares = vec![0_u64; links];
            let all_ask = began + Duration::from_millis(20);
            let mut sent = 0;
            for _ in 0..4000 {
                let Some(link) = (0..links).min_by_key(|link| asks[*link]) else { break };
                let now = asks[link];
                let Reservation { bytes, due } = bucket.reserve(1 << 20, now);
                if now >= all_ask {
                    shares[link] += bytes as u64;
                    sent += bytes as u64;
                }
                asks[link] = now.max(due);
            }
            let end = asks.iter().copied().max().unwrap_or(began);
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            let spread = most - least;
            prop_assert!(spread <= 2 * bucket.piece_bytes + bucket.burst_bytes, "{shares:?}");
            let could = bytes_in(end.saturating_duration_since(all_ask), rate);
            let idle = 2 * links as u64 * bucket.piece_bytes + bucket.burst_bytes;
            prop_assert!(sent + idle >= could, "{sent} of {could}");
        }
    }

    #[test]
    fn a_wait_for_the_budget_ends_at_a_cancel_and_a_passed_deadline_allows_none() {
        let (one, other) = SocketLink::pair().unwrap();
        let one = LimitedLink::new(one, Some(Bandwidth::new(1)));
        let long = |cancel| Wait::within(Duration::from_secs(60), cancel);
        let bytes = [7; 8192];
        let slices = [IoSlice::new(&bytes[..100]), IoSlice::new(&bytes)];
        let sent = one.write(&slices, long(None)).unwrap();
        assert_eq!(sent, PIECE_BYTES_MIN as usize);
        let mut got = [0; 10_000];
        assert_eq!(other.read(&mut got, long(None)).unwrap(), sent);
        let none = Wait { deadline: Instant::now(), cancel: None };
        assert!(matches!(one.write(&slices, none), Err(LinkError::TimedOut)));
        assert_eq!(one.write(&[IoSlice::new(&bytes[..40])], none).unwrap(), 40, "a keep-alive");
        assert_eq!(other.read(&mut got, long(None)).unwrap(), 40);
        let cancel = Cancel::new().unwrap();
        let from_another = cancel.clone();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            from_another.cancel();
        });
        assert!(matches!(one.write(&slices, long(Some(&cancel))), Err(LinkError::Cancelled)));
        thread.join().unwrap();
        one.finish();
        assert!(matches!(other.read(&mut got, long(None)), Err(LinkError::Closed)), "nothing more was sent");
    }

    #[test]
    fn a_link_that_waits_for_a_budget_shared_by_eight_has_not_timed_out() {
        let bandwidth = Bandwidth::new(200_000);
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                let (near, far) = SocketLink::pair().unwrap();
                let near = LimitedLink::new(near, Some(bandwidth.clone()));
                scope.spawn(move || {
                    let mut left = 8192;
                    while left > 0 {
                        // Shorter than the pieces of all links take.
                        let wait = Wait::within(Duration::from_millis(20), None);
                        left -= near.write(&[IoSlice::new(&vec![1; left])], wait).unwrap();
                    }
                    drop(far);
                });
            }
        });
        let least = time_for(8 * 8192 - PIECE_BYTES_MIN, 200_000);
        assert!(began.elapsed() >= least, "{:?} < {least:?}", began.elapsed());
    }
}
