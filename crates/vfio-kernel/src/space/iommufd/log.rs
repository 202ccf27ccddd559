//! [`PageTableLog`]: the dirty pages of an IOAS, as its page tables tell them (`iommufd.h: IOMMU_HWPT_GET_DIRTY_BITMAP`).
//!
//! A bitmap may be asked for of memory that is mapped without a hole, from and to a multiple of the IOAS's alignment. Linux
//! refuses ranges that are aligned otherwise, and not those with a hole: of these it answers up to the first hole, and
//! says that all is well. Of a page of the IOMMU's that begins before the range it tells what lies in the range, or in
//! newer kernels nothing, and clears all of it; such a page may be as large as the mapping that it is in. So what is mapped must be known here, and
//! is read whole. In an IOAS of a caller's, who may have mapped memory otherwise, the kernel is asked
//! ([`PageTables::with_questions`]).

use std::fmt;
use std::sync::Arc;

use limosa_client::{Error, Result};
use limosa_protocol::bitmap::words_for;
use limosa_protocol::logging::REPORT_PAGE_SIZE_MIN;

use super::super::intervals::{Intervals, Span};
use super::super::log::{DoorLog, dirty_spans};
use super::super::mappings::Mappings;
use super::super::usage;

/// Bytes for each bit of the bitmaps that are asked for, whatever the page sizes of the IOMMU: the kernel does the
/// arithmetic.
pub const PAGE_SIZE: u64 = REPORT_PAGE_SIZE_MIN;

/// How many bytes of memory are asked for at once, which makes a bitmap of 32 MiB; iommufd knows no limit of its own. No
/// page of an IOMMU's is as large, so that none is cut by the multiples of this.
const CHUNK_BYTES: u64 = 1 << 40;

/// How often the kernel is asked what is mapped, for one report.
const QUESTIONS_MAX: usize = 10_000;

/// What is asked of the kernel.
pub trait PageTables: fmt::Debug + Send + Sync {
    /// The page tables with dirty tracking.
    fn tables(&self) -> Vec<u32>;

    /// Whether all memory is mapped through its [`AddressSpace`](crate::AddressSpace).
    fn is_ours(&self) -> bool;

    /// The alignment of addresses and sizes in bytes, a power of two. It may grow with every device that is attached.
    fn alignment(&self) -> Result<u64>;

    /// Turns the dirty tracking of a page table on or off.
    fn track(&self, name: &str, table: u32, on: bool) -> Result<()>;

    /// Sets in `words` the pages of [`PAGE_SIZE`] that were written, and forgets them unless they are to be kept.
    fn read(&self, name: &str, table: u32, span: Span, keep: bool, words: &mut [u64]) -> Result<()>;

    /// Calls `ask` with a function that tells whether a span is mapped without a hole.
    fn with_questions<T>(
        &self,
        name: &str,
        ask: impl FnOnce(&mut dyn FnMut(Span) -> Result<bool>) -> Result<T>,
    ) -> Result<T>;

    /// Unmaps what lies in a range.
    fn unmap(&self, name: &str, range: Span) -> Result<()>;
}

/// The log of an IOAS.
#[derive(Debug)]
pub struct PageTableLog<K> {
    kernel: Arc<K>,
}

impl<K: PageTables> PageTableLog<K> {
    pub fn new(kernel: Arc<K>) -> PageTableLog<K> {
        PageTableLog { kernel }
    }

    fn read_all(&self, name: &str, span: Span, keep: bool) -> Result<Vec<u64>> {
        let mut words = vec![0; words_for(span.pages(PAGE_SIZE))];
        for table in self.kernel.tables() {
            self.kernel.read(name, table, span, keep, &mut words)?;
        }
        Ok(words)
    }

    /// What was written in a range. The kernel keeps it, for as long as the memory is mapped.
    fn peek(&self, name: &str, mappings: &Mappings, range: Span) -> Result<Vec<Span>> {
        let mut written = Vec::new();
        for span in self.spans(name, mappings, range)? {
            let words = self.read_all(name, span, true)?;
            written.extend(dirty_spans(&words, span, PAGE_SIZE).filter_map(|dirty| dirty.overlap(range)));
        }
        Ok(written)
    }

    /// Turns off the tracking of these page tables, all of them, and returns the first error.
    fn untrack(&self, name: &str, tables: &[u32]) -> Result<()> {
        let off: Vec<_> = tables.iter().map(|table| self.kernel.track(name, *table, false)).collect();
        off.into_iter().collect()
    }
}

impl<K: PageTables> DoorLog for PageTableLog<K> {
    /// In all page tables or in none.
    fn start(&mut self, name: &str) -> Result<u64> {
        let tables = self.kernel.tables();
        if tables.is_empty() {
            return Err(usage(name, "no IOMMU of its devices tracks dirty pages"));
        }
        for (at, table) in tables.iter().enumerate() {
            if let Err(error) = self.kernel.track(name, *table, true) {
                if let Err(error) = self.untrack(name, &tables[..at]) {
                    tracing::warn!("dirty tracking stays on: {error}");
                }
                return Err(error);
            }
        }
        Ok(PAGE_SIZE)
    }

    fn stop(&self, name: &str) -> Result<()> {
        self.untrack(name, &self.kernel.tables())
    }

    fn spans(&self, name: &str, mappings: &Mappings, range: Span) -> Result<Vec<Span>> {
        let parts = if self.kernel.is_ours() {
            // The kernel took them as they are aligned.
            joined(mappings.touching(range).map(|mapping| mapping.span()))
        } else {
            let alignment = self.kernel.alignment()?.max(PAGE_SIZE);
            self.kernel.with_questions(name, |is_mapped| {
                let first = page_around(range.first, alignment, is_mapped)?.first;
                let last = page_around(range.last, alignment, is_mapped)?.last;
                mapped(name, Span { first, last }, alignment, is_mapped)
            })?
        };
        Ok(chunks(&parts))
    }

    fn read(&self, name: &str, span: Span) -> Result<Vec<u64>> {
        self.read_all(name, span, false)
    }

    fn unmap(&self, name: &str, mappings: &mut Mappings, range: Span, dirty: &mut Intervals) -> Result<()> {
        // As late as can be: what a device writes from here on is missed.
        let written = self.peek(name, mappings, range);
        self.kernel.unmap(name, range)?;
        mappings.remove(range);
        match written {
            Ok(written) => written.into_iter().for_each(|span| dirty.add(span)),
            Err(error) => {
                tracing::warn!("{name}: the dirty log of unmapped memory is lost, all is dirty: {error}");
                dirty.add(range);
            }
        }
        Ok(())
    }
}

/// Spans in order, those that touch as one.
fn joined(spans: impl IntoIterator<Item = Span>) -> Vec<Span> {
    let mut parts: Vec<Span> = Vec::new();
    for span in spans {
        match parts.last_mut() {
            Some(part) if part.last.checked_add(1) == Some(span.first) => part.last = span.last,
            _ => parts.push(span),
        }
    }
    parts
}

/// These spans, none of them with more than [`CHUNK_BYTES`].
fn chunks(spans: &[Span]) -> Vec<Span> {
    let mut chunks = Vec::new();
    for span in spans {
        let mut first = span.first;
        loop {
            let last = span.last.min(first | (CHUNK_BYTES - 1));
            chunks.push(Span { first, last });
            if last == span.last {
                break;
            }
            first = last + 1;
        }
    }
    chunks
}

/// The largest page of an IOMMU's that an address may lie in: it begins at a multiple of its size, and all of it is mapped.
fn page_around(
    address: u64,
    alignment: u64,
    is_mapped: &mut dyn FnMut(Span) -> Result<bool>,
) -> Result<Span> {
    let around = |bytes| Span { first: address, last: address }.rounded_out(bytes);
    let mut bytes = alignment;
    // One larger would have to be mapped here, too.
    while bytes < CHUNK_BYTES && is_mapped(around(bytes))? {
        bytes *= 2;
    }
    // This one is not mapped any more.
    Ok(around(if bytes > alignment { bytes / 2 } else { bytes }))
}

/// The parts of an aligned range that are mapped, each without a hole, by halves.
fn mapped(
    name: &str,
    range: Span,
    alignment: u64,
    is_mapped: &mut dyn FnMut(Span) -> Result<bool>,
) -> Result<Vec<Span>> {
    let mut parts = Vec::new();
    // What is still to be asked, the lowest addresses last.
    let mut open = vec![range];
    let mut questions = 0;
    while let Some(span) = open.pop() {
        questions += 1;
        if questions > QUESTIONS_MAX {
            let at = span.first;
            let what = format!("memory in too many pieces at IOVA {at:#x}; map it through its AddressSpace");
            return Err(Error::Usage { device: name.into(), what });
        }
        let units = span.pages(alignment);
        if is_mapped(span)? {
            parts.push(span);
        } else if units > 1 {
            let second = span.first + units.div_ceil(2) * alignment;
            open.push(Span { first: second, ..span });
            open.push(Span { last: second - 1, ..span });
        }
    }
    Ok(joined(parts))
}

#[cfg(test)]
mod tests;
