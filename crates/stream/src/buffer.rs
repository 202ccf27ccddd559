//! Buffers for payloads on their way between devices, memory and links. A [`Gauge`] counts the memory of all buffers of
//! one side, so that its report can say how much memory a move took.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The number of bytes that buffers hold, and its maximum.
#[derive(Debug, Default)]
pub struct Gauge {
    held: AtomicU64,
    most: AtomicU64,
}

impl Gauge {
    /// A buffer that held `before` bytes holds `now` bytes.
    pub fn change(&self, before: u64, now: u64) {
        let change = now.wrapping_sub(before);
        let held = self.held.fetch_add(change, Ordering::Relaxed).wrapping_add(change);
        self.most.fetch_max(held, Ordering::Relaxed);
    }

    /// This many bytes are held.
    pub fn set(&self, held: u64) {
        self.held.store(held, Ordering::Relaxed);
        self.most.fetch_max(held, Ordering::Relaxed);
    }

    /// The maximum so far.
    pub fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }
}

/// Bytes on the heap whose allocation, used or not, a [`Gauge`] counts.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
    gauge: Arc<Gauge>,
}

impl Buffer {
    /// An empty buffer that this gauge counts.
    pub fn new(gauge: &Arc<Gauge>) -> Buffer {
        Buffer { bytes: Vec::new(), gauge: Arc::clone(gauge) }
    }

    /// A copy of these bytes, without spare capacity.
    pub fn copy(gauge: &Arc<Gauge>, bytes: &[u8]) -> Buffer {
        gauge.change(0, bytes.len() as u64);
        Buffer { bytes: bytes.to_vec(), gauge: Arc::clone(gauge) }
    }

    /// The size of the allocation in bytes.
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Whether the allocation is more than a quarter larger than this many bytes.
    pub fn is_wide_for(&self, bytes: usize) -> bool {
        self.bytes.capacity().saturating_sub(bytes) > bytes / 4
    }

    /// Makes it at least this long. Added bytes are zero.
    pub fn grow(&mut self, length: usize) {
        self.change(|bytes| {
            if bytes.len() < length {
                // Exactly: it does not grow in steps.
                bytes.reserve_exact(length - bytes.len());
                bytes.resize(length, 0);
            }
        });
    }

    /// Makes it at most this long. The allocation stays.
    pub fn truncate(&mut self, length: usize) {
        self.bytes.truncate(length);
    }

    /// Appends bytes. The allocation is then at most a quarter larger than the content.
    pub fn extend(&mut self, more: &[u8]) {
        self.change(|bytes| {
            if bytes.capacity() - bytes.len() < more.len() {
                bytes.reserve_exact(more.len().max(bytes.len() / 4));
            }
            bytes.extend_from_slice(more);
        });
    }

    /// Calls a function that may change the allocation, and counts the change.
    pub fn change<R>(&mut self, act: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        let before = self.bytes.capacity();
        let result = act(&mut self.bytes);
        let now = self.bytes.capacity();
        if now != before {
            self.gauge.change(before as u64, now as u64);
        }
        result
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.gauge.change(self.bytes.capacity() as u64, 0);
    }
}

/// Empty buffers that are kept for reuse, up to a number of bytes.
#[derive(Debug)]
pub struct Spares {
    buffers: Vec<Buffer>,
    bytes: usize,
    bytes_max: usize,
}

/// Smaller ones are not worth keeping.
const SPARE_BYTES_MIN: usize = 16 << 10;

impl Spares {
    /// Keeps buffers of up to this many bytes in all.
    pub fn new(bytes_max: usize) -> Spares {
        Spares { buffers: Vec::new(), bytes: 0, bytes_max }
    }

    /// Adds this many bytes, in buffers of that length whose memory is touched.
    pub fn fill(&mut self, bytes: usize, length: usize, gauge: &Arc<Gauge>) {
        for _ in 0..bytes / length {
            let mut buffer = Buffer::new(gauge);
            buffer.grow(length);
            self.keep(buffer);
        }
    }

    /// The buffer that was kept last.
    pub fn take(&mut self) -> Option<Buffer> {
        let buffer = self.buffers.pop()?;
        self.bytes -= buffer.capacity();
        Some(buffer)
    }

    /// Keeps a buffer, if the limit allows.
    pub fn keep(&mut self, buffer: Buffer) {
        let bytes = buffer.capacity();
        if bytes >= SPARE_BYTES_MIN && self.bytes + bytes <= self.bytes_max {
            self.bytes += bytes;
            self.buffers.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zeroed(gauge: &Arc<Gauge>, bytes: usize) -> Buffer {
        Buffer::copy(gauge, &vec![0; bytes])
    }

    #[test]
    fn what_buffers_hold_is_counted_until_they_are_gone() {
        let gauge = Arc::default();
        let mut first = zeroed(&gauge, 1000);
        let second = Buffer::copy(&gauge, &[1; 500]);
        assert_eq!(gauge.most(), 1500);
        first.truncate(10);
        drop(second);
        first.grow(1200);
        assert_eq!(gauge.held.load(Ordering::Relaxed), 1200, "what is not used is held as well");
        drop(first);
        assert_eq!((gauge.held.load(Ordering::Relaxed), gauge.most()), (0, 1500));
    }

    #[test]
    fn spares_of_any_sizes_keep_within_their_limit() {
        let gauge = Arc::default();
        let mut spares = Spares::new(1 << 20);
        for size in [512 << 10, 20 << 10, 1 << 10, 400 << 10, 512 << 10, 64 << 10] {
            (0..40).for_each(|_| spares.keep(zeroed(&gauge, size)));
            let kept: usize = spares.buffers.iter().map(Buffer::capacity).sum();
            assert!(kept == spares.bytes && kept <= 1 << 20, "{kept}");
        }
        while spares.take().is_some() {}
        assert_eq!(spares.bytes, 0);
    }
}
