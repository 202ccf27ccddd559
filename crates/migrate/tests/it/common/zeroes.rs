//! Memory that takes no room and costs nothing.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use limosa_migrate::GuestPages;

/// Memory of zeroes, of any size.
#[derive(Default)]
pub struct Zeroes {
    pub pieces: AtomicU32,
    pub largest: AtomicU64,
    /// Called for each piece that is made zero, with its number.
    pub zeroed: Option<Box<dyn Fn(u32) + Send + Sync>>,
}

impl GuestPages for Zeroes {
    fn read(&self, _: u64, into: &mut [u8]) -> std::io::Result<()> {
        into.fill(0);
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
        Ok(())
    }
    fn data(&self, _: Range<u64>) -> std::io::Result<Option<Range<u64>>> {
        Ok(None)
    }
    fn zero(&self, _: u64, bytes: u64) -> std::io::Result<()> {
        self.largest.fetch_max(bytes, Ordering::SeqCst);
        let number = self.pieces.fetch_add(1, Ordering::SeqCst);
        if let Some(zeroed) = &self.zeroed {
            zeroed(number);
        }
        Ok(())
    }
}
