//! [`Log`]: what a space keeps while it logs dirty pages. How the kernel is asked for them differs with the door to it
//! ([`DoorLog`]); that no page is lost between two questions is seen to here, for every door.

use std::fmt;

use limosa_client::{DirtyBits, Result};
use limosa_protocol::bitmap::{Grid, regranulate, runs, set_range};

use super::intervals::{Intervals, Span};
use super::mappings::Mappings;

/// The kernel's log of dirty pages, through one door.
pub(super) trait DoorLog: fmt::Debug + Send {
    /// Starts logging, with all pages clean, and returns the bytes for each bit of [`DoorLog::read`]. A log that the
    /// kernel has lost is started again.
    fn start(&mut self, name: &str) -> Result<u64>;

    /// Stops logging.
    fn stop(&self, name: &str) -> Result<()>;

    /// What has to be read to know all of a range. These spans may begin before it and end after it, as far as the
    /// kernel knows no smaller ones.
    fn spans(&self, name: &str, mappings: &Mappings, range: Span) -> Result<Vec<Span>>;

    /// Reads and clears the bitmap of one of [`DoorLog::spans`]. After an error the kernel may have forgotten what was
    /// written there.
    fn read(&self, name: &str, span: Span) -> Result<Vec<u64>>;

    /// Unmaps a range, removes it from `mappings`, and adds to `dirty` what was written there, also when only a part
    /// could be unmapped. What cannot be told is dirty.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`](limosa_client::Error::Refused) with ENOENT when nothing is mapped there.
    fn unmap(&self, name: &str, mappings: &mut Mappings, range: Span, dirty: &mut Intervals) -> Result<()>;
}

/// A log that is on, and the dirty pages that the kernel has forgotten and no report has had yet.
#[derive(Debug)]
pub(super) struct Log {
    door: Box<dyn DoorLog>,
    /// Bytes for each bit of the kernel's bitmaps.
    page_size: u64,
    /// Pages that were unmapped, and pages beside a range that was reported which the kernel cleared with it.
    kept: Intervals,
}

impl Log {
    /// Starts logging.
    pub fn start(name: &str, mut door: Box<dyn DoorLog>) -> Result<Log> {
        let page_size = door.start(name)?;
        Ok(Log { door, page_size, kept: Intervals::default() })
    }

    /// Starts logging again after the kernel has lost its log. All that is mapped is dirty.
    pub fn restart(&mut self, name: &str, mappings: &Mappings) -> Result<()> {
        mappings.iter().for_each(|mapping| self.kept.add(mapping.span()));
        self.page_size = self.door.start(name)?;
        Ok(())
    }

    /// Stops logging.
    pub fn stop(self, name: &str) -> Result<()> {
        self.door.stop(name)
    }

    /// Bytes for each bit of the kernel's bitmaps.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Sets the pages of a range that were written since they were last reported, and forgets them.
    pub fn report(
        &mut self,
        name: &str,
        mappings: &Mappings,
        range: Span,
        into: &mut DirtyBits<'_>,
    ) -> Result<()> {
        for dirty in self.kept.take(range) {
            set(into, range.first, dirty);
        }
        let to = Grid { iova: range.first, page_size: into.page_size };
        for span in self.door.spans(name, mappings, range)? {
            let found = match self.door.read(name, span) {
                Ok(found) => found,
                Err(error) => {
                    // The caller takes the range as dirty, and knows nothing of what lies beside it.
                    span.beside(range).for_each(|beside| self.kept.add(beside));
                    return Err(error);
                }
            };
            if let Some(inside) = span.overlap(range) {
                let from = Grid { iova: span.first, page_size: self.page_size };
                regranulate(&found, from, into.words, to, inside.first, inside.size());
            }
            for dirty in dirty_spans(&found, span, self.page_size) {
                dirty.beside(range).for_each(|beside| self.kept.add(beside));
            }
        }
        Ok(())
    }

    /// Unmaps a range. What was written there since it was last reported is set in `bits`, and is in the next report as
    /// well.
    pub fn unmap(
        &mut self,
        name: &str,
        mappings: &mut Mappings,
        range: Span,
        bits: Option<DirtyBits<'_>>,
    ) -> Result<()> {
        self.door.unmap(name, mappings, range, &mut self.kept)?;
        if let Some(mut bits) = bits {
            // Not only what the kernel has said just now: a report of other memory may have had it say more.
            self.kept.within(range).for_each(|dirty| set(&mut bits, range.first, dirty));
        }
        Ok(())
    }
}

/// Sets the pages of a bitmap from `iova` on that have a byte in the span.
fn set(bits: &mut DirtyBits<'_>, iova: u64, span: Span) {
    let (first, last) = ((span.first - iova) / bits.page_size, (span.last - iova) / bits.page_size);
    set_range(bits.words, first, last - first + 1);
}

/// The addresses of the pages that are set in the bitmap of a span.
pub(super) fn dirty_spans(words: &[u64], span: Span, page_size: u64) -> impl Iterator<Item = Span> + '_ {
    // The kernel may have set bits beyond the span.
    runs(words).map_while(move |(page, pages)| {
        let first = page.checked_mul(page_size).and_then(|offset| span.first.checked_add(offset))?;
        let last = first.saturating_add(pages.saturating_mul(page_size) - 1);
        span.overlap(Span { first, last })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    #[test]
    fn addresses_of_pages_end_with_the_span() {
        let dirty = |words: &[u64], first, last| -> Vec<_> {
            let spans = dirty_spans(words, Span { first, last }, PAGE);
            spans.map(|span| (span.first, span.last)).collect()
        };
        assert_eq!(dirty(&[0b1011_0110], 0x1000, 0x6fff), [(0x2000, 0x3fff), (0x5000, 0x6fff)]);
        let top = u64::MAX - PAGE + 1;
        assert_eq!(dirty(&[!0], top, u64::MAX), [(top, u64::MAX)]);
        assert_eq!(dirty(&[0b10], top, u64::MAX), []);
    }
}
