//! Counting what may be had only so often.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use limosa_protocol::Errno;

/// So many of something of which there is a limit, until it is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    count: Arc<AtomicU64>,
    amount: u64,
}

impl Counted {
    /// E2BIG when there would be more than the limit.
    pub(crate) fn new(count: &Arc<AtomicU64>, amount: u64, max: u64) -> Result<Counted, Errno> {
        let more = |count: u64| count.checked_add(amount).filter(|count| *count <= max);
        match count.fetch_update(Relaxed, Relaxed, more) {
            Ok(_) => Ok(Counted { count: Arc::clone(count), amount }),
            Err(_) => Err(Errno::E2BIG),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.count.fetch_sub(self.amount, Relaxed);
    }
}
