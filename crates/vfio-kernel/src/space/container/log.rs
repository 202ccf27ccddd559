//! [`ContainerLog`]: the dirty pages of a container (`vfio.h: VFIO_IOMMU_DIRTY_PAGES`,
//! `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`).
//!
//! The kernel returns a bitmap only for a range that contains each of its mappings whole, and for a limited number of
//! pages.

use std::fmt;
use std::sync::Arc;

use limosa_client::Result;
use limosa_protocol::Errno;

use super::super::intervals::{Intervals, Span};
use super::super::log::{DoorLog, dirty_spans};
use super::super::mappings::{Mappings, unmap_request};

/// Mappings that are farther apart are requested one by one.
const GAP_BYTES_MAX: u64 = 64 << 20;

/// The limits of a container's bitmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes for each bit, a power of two.
    pub page_size: u64,
    /// The most bits of one bitmap.
    pub pages_max: u64,
}

/// The requests to the kernel.
pub trait Type1: fmt::Debug + Send + Sync {
    /// Whether all memory is mapped through its [`AddressSpace`](crate::AddressSpace).
    fn is_ours(&self) -> bool;

    /// Whether the container has an IOMMU. It loses that with its last group.
    fn is_set(&self) -> bool;

    /// Starts logging.
    fn start_dirty(&self, name: &str) -> Result<Limits>;

    /// Stops logging.
    fn stop_dirty(&self, name: &str) -> Result<()>;

    /// The bitmap of a range that has no mapping in part, which is cleared.
    fn read_dirty(&self, name: &str, span: Span, limits: Limits) -> Result<Vec<u64>>;

    /// Unmaps the range and returns the bitmap of the writes there. A refusal by the kernel unmaps nothing.
    fn unmap_dirty(&self, name: &str, span: Span, limits: Limits) -> Result<Vec<u64>>;

    /// Unmaps what lies in the range.
    fn unmap(&self, name: &str, span: Span) -> Result<()>;
}

/// The log of a container.
#[derive(Debug)]
pub struct ContainerLog<K> {
    kernel: Arc<K>,
    /// Known once it has started.
    limits: Limits,
}

impl<K: Type1> ContainerLog<K> {
    pub fn new(kernel: Arc<K>) -> ContainerLog<K> {
        ContainerLog { kernel, limits: Limits { page_size: 1, pages_max: 0 } }
    }
}

impl<K: Type1> DoorLog for ContainerLog<K> {
    fn start(&mut self, name: &str) -> Result<u64> {
        self.limits = self.kernel.start_dirty(name)?;
        Ok(self.limits.page_size)
    }

    fn stop(&self, name: &str) -> Result<()> {
        self.kernel.stop_dirty(name)
    }

    fn spans(&self, _: &str, mappings: &Mappings, range: Span) -> Result<Vec<Span>> {
        if self.kernel.is_ours() {
            return Ok(pieces(mappings, range, self.limits));
        }
        // Whoever has mapped this knows where a range may end.
        Ok(vec![range.rounded_out(self.limits.page_size)])
    }

    fn read(&self, name: &str, span: Span) -> Result<Vec<u64>> {
        self.kernel.read_dirty(name, span, self.limits)
    }

    fn unmap(&self, name: &str, mappings: &mut Mappings, range: Span, dirty: &mut Intervals) -> Result<()> {
        let (is_ours, is_set) = (self.kernel.is_ours(), self.kernel.is_set());
        if is_ours || !is_set {
            // Known here, and where it has lost its IOMMU nobody else is left to answer.
            mappings.check_whole(name, range)?;
        }
        if !is_set {
            // The log went with the IOMMU.
            mappings.touching(range).for_each(|mapping| dirty.add(mapping.span()));
            mappings.remove(range);
            return Ok(());
        }
        let pieces = if is_ours { pieces(mappings, range, self.limits) } else { vec![range] };
        for piece in pieces {
            match self.kernel.unmap_dirty(name, piece, self.limits) {
                Ok(words) => {
                    dirty_spans(&words, piece, self.limits.page_size).for_each(|span| dirty.add(span));
                }
                Err(error) => {
                    let unmapped = self.kernel.unmap(name, piece);
                    // The kernel may have forgotten what was written there even if both requests failed.
                    if !unmapped.as_ref().is_err_and(|error| error.is_refused(Errno::ENOENT)) {
                        tracing::warn!("{name}: {}, all is dirty: {error}", unmap_request(piece));
                        dirty.add(piece);
                    }
                    unmapped?;
                }
            }
            mappings.remove(piece);
        }
        Ok(())
    }
}

/// Divides a range into pieces that contain each mapping whole: neighbours together, as many as fit in one bitmap.
fn pieces(mappings: &Mappings, range: Span, limits: Limits) -> Vec<Span> {
    let mut pieces: Vec<Span> = Vec::new();
    for span in mappings.touching(range).map(|mapping| mapping.span()) {
        if let Some(piece) = pieces.last_mut() {
            let both = Span { last: span.last, ..*piece };
            if span.first - piece.last <= GAP_BYTES_MAX && both.pages(limits.page_size) <= limits.pages_max {
                *piece = both;
                continue;
            }
        }
        pieces.push(span);
    }
    pieces
}

#[cfg(test)]
mod tests;
