//! [`Fused`]: combines several sources of dirty pages.

use limosa_protocol::feature::DmaLoggingRange;

use super::{DirtySource, all_dirty};
use crate::{Device, Result};

/// Several sources as one. A page is dirty if one of the sources reports it. If the report of a source fails, its
/// whole range is dirty.
pub struct Fused<'a> {
    name: String,
    sources: Vec<&'a dyn DirtySource>,
}

impl<'a> Fused<'a> {
    /// Combines these sources. Without any, no page is dirty and no device is seen.
    pub fn new(sources: Vec<&'a dyn DirtySource>) -> Fused<'a> {
        let names: Vec<_> = sources.iter().map(|source| source.name()).collect();
        Fused { name: names.join(" and "), sources }
    }
}

impl DirtySource for Fused<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn sees(&self, device: &dyn Device) -> bool {
        self.sources.iter().any(|source| source.sees(device))
    }

    /// Starts all sources. Returns the largest page size. If a source does not start, those before it are stopped
    /// again.
    fn start(&self, page_size_hint: u64, ranges: &[DmaLoggingRange]) -> Result<u64> {
        let mut coarsest = page_size_hint;
        for (at, source) in self.sources.iter().enumerate() {
            match source.start(page_size_hint, ranges) {
                Ok(page_size) => coarsest = coarsest.max(page_size),
                Err(error) => {
                    for source in &self.sources[..at] {
                        if let Err(error) = source.stop() {
                            tracing::warn!("{}: logging goes on: {error}", source.name());
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(coarsest)
    }

    /// Never fails. A source that fails makes the range dirty, and is named in a warning.
    fn report(&self, iova: u64, length: u64, page_size: u64, words: &mut [u64]) -> Result<()> {
        for source in &self.sources {
            if let Err(error) = source.report(iova, length, page_size, words) {
                tracing::warn!("{}: the dirty log is lost, all is dirty: {error}", source.name());
                all_dirty(length, page_size, words);
            }
        }
        Ok(())
    }

    /// Stops all sources. Returns the first failure.
    fn stop(&self) -> Result<()> {
        // All are stopped before the first failure is returned.
        let stopped: Vec<_> = self.sources.iter().map(|source| source.stop()).collect();
        stopped.into_iter().collect()
    }
}

impl std::fmt::Debug for Fused<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Fused").field(&self.name).finish()
    }
}
