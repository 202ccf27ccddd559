//! Buffers in which payloads lie on their way between devices, memory and links. What all those of one side hold is
//! counted, so that its report can say what a move took beside the guest.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many bytes are held, and the most that ever were.
#[derive(Debug, Default)]
pub struct Gauge {
    held: AtomicU64,
    most: AtomicU64,
}

impl Gauge {
    /// Somebody holds so many bytes, and held that many before.
    pub fn change(&self, before: u64, now: u64) {
        let change = now.wrapping_sub(before);
        let held = self.held.fetch_add(change, Ordering::Relaxed).wrapping_add(change);
        self.most.fetch_max(held, Ordering::Relaxed);
    }

    /// So many are held.
    pub fn set(&self, held: u64) {
        self.held.store(held, Ordering::Relaxed);
        self.most.fetch_max(held, Ordering::Relaxed);
    }

    /// The most that ever were.
    pub fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }
}

/// Bytes on the heap that a [`Gauge`] knows of: all that is allocated for them, used or not.
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

    /// A copy that has no room for more.
    pub fn copy(gauge: &Arc<Gauge>, bytes: &[u8]) -> Buffer {
        gauge.change(0, bytes.len() as u64);
        Buffer { bytes: bytes.to_vec(), gauge: Arc::clone(gauge) }
    }

    /// How many bytes it takes, used or not.
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Whether it takes more than a quarter beyond these.
    pub fn is_wide_for(&self, bytes: usize) -> bool {
        self.bytes.capacity().saturating_sub(bytes) > bytes / 4
    }

    /// Makes it at least that long; what is added is zero.
    pub fn grow(&mut self, length: usize) {
        self.change(|bytes| {
            if bytes.len() < length {
                // No more than that: it does not grow step by step.
                bytes.reserve_exact(length - bytes.len());
                bytes.resize(length, 0);
            }
        });
    }

    /// Makes it no longer than that. What it takes stays the same.
    pub fn truncate(&mut self, length: usize) {
        self.bytes.truncate(length);
    }

    /// Appends, and takes no more than a quarter beyond what it then has.
    pub fn extend(&mut self, more: &[u8]) {
        self.change(|bytes| {
            if bytes.capacity() - bytes.len() < more.len() {
                bytes.reserve_exact(more.len().max(bytes.len() / 4));
            }
            bytes.extend_from_slice(more);
        });
    }

    /// Does something with it that may make it larger or smaller.
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

/// Emptied buffers that are kept for later, up to a number of bytes.
#[derive(Debug)]
pub struct Spares {
    buffers: Vec<Buffer>,
    bytes: usize,
    bytes_max: usize,
}

/// Smaller ones are not worth keeping.
const SPARE_BYTES_MIN: usize = 16 << 10;

impl Spares {
    /// Keeps up to this many bytes.
    pub fn new(bytes_max: usize) -> Spares {
        Spares { buffers: Vec::new(), bytes: 0, bytes_max }
    }

    /// Adds so many bytes, in touched buffers of that length.
    pub fn fill(&mut self, bytes: usize, length: usize, gauge: &Arc<Gauge>) {
        for _ in 0..bytes / length {
            let mut buffer = Buffer::new(gauge);
            buffer.grow(length);
            self.keep(buffer);
        }
    }

    /// The one that was kept last.
    pub fn take(&mut self) -> Option<Buffer> {
        let buffer = self.buffers.pop()?;
        self.bytes -= buffer.capacity();
        Some(buffer)
    }

    /// Keeps it, if there is room.
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
