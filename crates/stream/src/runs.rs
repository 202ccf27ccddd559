//! The payload of MEMORY_RUNS (`docs/stream.md: MEMORY_RUNS`): several runs of pages of one region, some of them zeroes.
//!
//! The pages come first, so that a writer can put them where they are sent from before it knows how many there are. The
//! table of runs follows, and the number of runs.

use super::{DATA_BYTES_MAX, Damage, Kind, u32_at};

/// Bytes of one run in the table.
pub const RUN_BYTES: usize = 8;
/// Bytes of the number of runs.
pub const COUNT_BYTES: usize = 4;
/// In the number of pages of a run: they contain zeroes, and are not in the payload.
const ZEROES: u32 = 1 << 31;

/// A run of pages of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// The offset of its first byte in the region, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Its bytes; `None` if they are zeroes.
    pub data: Option<&'a [u8]>,
}

/// The table of a payload that is being put together. Runs are added in ascending order.
#[derive(Clone, Debug)]
pub struct RunsTable {
    page_bytes: u64,
    /// Where the first run starts, which is the frame's position.
    position: u64,
    /// Where the last run ends.
    end: u64,
    runs: Vec<(u32, u32)>,
    /// Bytes of the runs that are no zeroes, and of those that are.
    data_bytes: u64,
    zero_bytes: u64,
}

impl RunsTable {
    /// An empty table for a region with pages of this size.
    pub fn new(page_bytes: u64) -> RunsTable {
        RunsTable { page_bytes, position: 0, end: 0, runs: Vec::new(), data_bytes: 0, zero_bytes: 0 }
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.runs.clear();
        (self.data_bytes, self.zero_bytes) = (0, 0);
    }

    /// Adds a run of whole pages, or extends the last run if it is adjacent. Returns whether there was space: the
    /// length of a payload is limited, and so is the distance of a run from the first one. A single run of pages may
    /// fill the payload of a MEMORY_DATA, which needs no table.
    #[must_use]
    pub fn add(&mut self, offset: u64, bytes: u64, is_zero: bool) -> bool {
        if self.runs.is_empty() {
            (self.position, self.end) = (offset, offset);
        }
        let flag = if is_zero { ZEROES } else { 0 };
        let goes_on = self.end == offset && self.runs.last().is_some_and(|(_, last)| last & ZEROES == flag);
        let data_bytes = self.data_bytes + if is_zero { 0 } else { bytes };
        let runs = self.runs.len() + usize::from(!goes_on);
        let tail_bytes = if runs == 1 && !is_zero { 0 } else { RunsTable::bytes_of(runs) + COUNT_BYTES };
        if data_bytes.saturating_add(tail_bytes as u64) > DATA_BYTES_MAX as u64 {
            return false;
        }
        let first = offset.checked_sub(self.position).map(|ahead| ahead / self.page_bytes);
        let Some(first) = first.and_then(|first| u32::try_from(first).ok()) else { return false };
        let before = if goes_on { self.runs.last().map_or(0, |(_, last)| last & !ZEROES) } else { 0 };
        let pages = u32::try_from(bytes / self.page_bytes).ok().and_then(|pages| pages.checked_add(before));
        let Some(pages) = pages.filter(|pages| *pages < ZEROES) else { return false };
        match self.runs.last_mut().filter(|_| goes_on) {
            Some((_, last)) => *last = pages | flag,
            None => self.runs.push((first, pages | flag)),
        }
        self.end = offset + bytes;
        self.data_bytes = data_bytes;
        self.zero_bytes += if is_zero { bytes } else { 0 };
        true
    }

    /// The position of the frame.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes of the pages that precede the table in the payload.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Bytes of the runs of zeroes.
    pub fn zero_bytes(&self) -> u64 {
        self.zero_bytes
    }

    /// How many runs it has.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether it has no run.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Offset and length in bytes of each run, and whether it contains zeroes.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64, bool)> {
        self.runs.iter().map(|(first, pages)| {
            let offset = self.position + u64::from(*first) * self.page_bytes;
            (offset, u64::from(pages & !ZEROES) * self.page_bytes, pages & ZEROES != 0)
        })
    }

    /// The bytes that follow the pages in the payload, into a buffer of [`RunsTable::tail_bytes`].
    pub fn encode(&self, into: &mut [u8]) {
        let (table, count) = into.split_at_mut(self.runs.len() * RUN_BYTES);
        for (entry, (first, pages)) in table.as_chunks_mut::<RUN_BYTES>().0.iter_mut().zip(&self.runs) {
            entry[..4].copy_from_slice(&first.to_le_bytes());
            entry[4..].copy_from_slice(&pages.to_le_bytes());
        }
        count[..COUNT_BYTES].copy_from_slice(&(self.runs.len() as u32).to_le_bytes());
    }

    /// How many bytes follow the pages in the payload.
    pub fn tail_bytes(&self) -> usize {
        RunsTable::bytes_of(self.runs.len()) + COUNT_BYTES
    }

    /// How many bytes this many more runs take.
    pub const fn bytes_of(runs: usize) -> usize {
        runs * RUN_BYTES
    }
}

/// The runs of a payload that has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runs<'a> {
    page_bytes: u64,
    position: u64,
    data: &'a [u8],
    table: &'a [[u8; RUN_BYTES]],
    zero_bytes: u64,
}

impl<'a> Runs<'a> {
    /// Checks a payload, of a frame at this position, for a region of this size and page size in bytes.
    pub(crate) fn decode(
        payload: &'a [u8],
        position: u64,
        page_bytes: u64,
        region_bytes: u64,
    ) -> Result<Runs<'a>, Damage> {
        let refuse = |why: String| Err(Damage::Content { kind: Kind::MEMORY_RUNS, why });
        let rest = payload.len().saturating_sub(COUNT_BYTES);
        let count = u32_at(payload, rest) as usize;
        let table_bytes = count.checked_mul(RUN_BYTES).filter(|bytes| *bytes <= rest && count > 0);
        let Some(table_bytes) = table_bytes else {
            return refuse(format!("{count} runs in {} bytes", payload.len()));
        };
        let (data, table) = payload[..rest].split_at(rest - table_bytes);
        let table = table.as_chunks::<RUN_BYTES>().0;
        let runs = Runs { page_bytes, position, data, table, zero_bytes: 0 };
        if !position.is_multiple_of(page_bytes) {
            return refuse(format!("its position {position:#x} is not that of a page"));
        }
        let (mut end, mut data_bytes, mut zero_bytes) = (position, 0_u64, 0_u64);
        for (offset, bytes, is_zero) in runs.entries() {
            // Neither overflows: both are less than 2^32 pages of at most 2^20 bytes, from a position that is an offset.
            let run_end = offset.and_then(|offset| offset.checked_add(bytes));
            let Some((offset, run_end)) = offset.zip(run_end).filter(|(_, end)| *end <= region_bytes) else {
                return refuse(format!("a run of {bytes} bytes reaches beyond the region"));
            };
            if bytes == 0 || offset < end {
                return refuse(format!(
                    "the run of {bytes} bytes at {offset:#x} overlaps or precedes the one before it"
                ));
            }
            end = run_end;
            if is_zero { zero_bytes += bytes } else { data_bytes += bytes }
        }
        if data_bytes != data.len() as u64 {
            return refuse(format!("its runs have {data_bytes} bytes, it has {}", data.len()));
        }
        Ok(Runs { zero_bytes, ..runs })
    }

    /// Offset, length and whether it contains zeroes, of each entry. No offset if it overflows.
    fn entries(&self) -> impl Iterator<Item = (Option<u64>, u64, bool)> + use<'a> {
        let Runs { page_bytes, position, table, .. } = *self;
        table.iter().map(move |entry| {
            let (first, pages) = (u32_at(entry, 0), u32_at(entry, 4));
            let offset = position.checked_add(u64::from(first) * page_bytes);
            (offset, u64::from(pages & !ZEROES) * page_bytes, pages & ZEROES != 0)
        })
    }

    /// The runs, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Run<'a>> + use<'a> {
        let mut rest = self.data;
        self.entries().map(move |(offset, bytes, is_zero)| {
            let data = (!is_zero).then(|| {
                let (data, more) = rest.split_at(bytes as usize);
                rest = more;
                data
            });
            Run { offset: offset.unwrap_or_default(), bytes, data }
        })
    }

    /// Bytes of the runs that are no zeroes.
    pub fn data_bytes(&self) -> u64 {
        self.data.len() as u64
    }

    /// Bytes of the runs of zeroes.
    pub fn zero_bytes(&self) -> u64 {
        self.zero_bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;
    const REGION: u64 = 64 << 20;

    /// Gap before it in pages, its pages, whether it contains zeroes.
    fn any_runs() -> impl Strategy<Value = Vec<(u64, u64, bool)>> {
        proptest::collection::vec((0_u64..40, 1_u64..5, any::<bool>()), 1..40)
    }

    fn encode(position: u64, runs: &[(u64, u64, bool)]) -> (Vec<u8>, RunsTable) {
        let mut table = RunsTable::new(PAGE);
        let (mut at, mut payload) = (position, Vec::new());
        for (gap, pages, is_zero) in runs {
            at += gap * PAGE;
            assert!(table.add(at, pages * PAGE, *is_zero));
            if !is_zero {
                payload.extend((0..pages * PAGE).map(|byte| (byte / 7 + at) as u8));
            }
            at += pages * PAGE;
        }
        let data = payload.len();
        payload.resize(data + table.tail_bytes(), 0);
        table.encode(&mut payload[data..]);
        (payload, table)
    }

    proptest! {
        #[test]
        fn runs_round_trip(start in 0_u64..1000, runs in any_runs()) {
            let (payload, table) = encode(start * PAGE, &runs);
            let read = Runs::decode(&payload, table.position(), PAGE, REGION).unwrap();
            prop_assert_eq!((read.data_bytes(), read.zero_bytes()), (table.data_bytes(), table.zero_bytes()));
            let found: Vec<_> = read.iter().map(|run| (run.offset, run.bytes, run.data.is_none())).collect();
            prop_assert_eq!(&found, &table.runs().collect::<Vec<_>>());
            prop_assert!(read.iter().all(|run| run.data.is_none_or(|data| data.len() as u64 == run.bytes)));
            let pages: u64 = runs.iter().map(|(_, pages, _)| pages * PAGE).sum();
            prop_assert_eq!(read.data_bytes() + read.zero_bytes(), pages);
            // Within the region to the byte.
            let end = found.last().map_or(0, |(offset, bytes, _)| offset + bytes);
            prop_assert!(Runs::decode(&payload, table.position(), PAGE, end).is_ok());
            prop_assert!(Runs::decode(&payload, table.position(), PAGE, end - PAGE).is_err());
        }

        #[test]
        fn arbitrary_payloads_never_panic_and_what_is_taken_is_in_order(
            tail in proptest::collection::vec(any::<u8>(), 12..200), count in 0_u32..30, position: u64,
        ) {
            let mut payload = tail;
            let at = payload.len() - COUNT_BYTES;
            payload[at..].copy_from_slice(&count.to_le_bytes());
            if let Ok(runs) = Runs::decode(&payload, position, 1, u64::MAX) {
                let mut end = position;
                for run in runs.iter() {
                    prop_assert!(run.offset >= end && run.bytes > 0);
                    end = run.offset + run.bytes;
                }
            }
        }
    }

    #[test]
    fn a_run_that_goes_on_is_one_run() {
        let (_, table) = encode(0, &[(0, 1, false), (0, 2, false), (0, 1, true), (0, 3, true), (1, 1, true)]);
        let runs: Vec<_> = table.runs().collect();
        assert_eq!(runs, [(0, 3 * PAGE, false), (3 * PAGE, 4 * PAGE, true), (8 * PAGE, PAGE, true)]);
    }

    #[test]
    fn a_full_payload_takes_no_more() {
        let mut table = RunsTable::new(PAGE);
        let taken = (0..).take_while(|page| table.add(page * 2 * PAGE, PAGE, false)).count();
        assert_eq!(taken, 255);
        assert!(table.data_bytes() as usize + table.tail_bytes() <= DATA_BYTES_MAX);
        let mut table = RunsTable::new(PAGE);
        assert!(table.add(0, PAGE, true));
        assert!(!table.add((1 << 32) * PAGE, PAGE, true), "too far from the first");
        assert!(!table.add(PAGE, 1 << 44, true), "too long");
        assert!(table.add(2 * PAGE, PAGE, true));
        table.clear();
        assert!(table.is_empty() && table.add(1 << 44, DATA_BYTES_MAX as u64, false), "a MEMORY_DATA");
        assert!(!table.add((1 << 44) + DATA_BYTES_MAX as u64, PAGE, true));
    }

    #[test]
    fn runs_that_overlap_leave_the_region_or_lack_data_are_refused() {
        let (payload, table) = encode(8 * PAGE, &[(0, 1, false), (1, 2, true), (1, 1, false)]);
        let position = table.position();
        assert!(Runs::decode(&payload, position, PAGE, REGION).is_ok());
        assert!(Runs::decode(&payload, position + 1, PAGE, REGION).is_err());
        assert!(Runs::decode(&payload, REGION, PAGE, REGION).is_err());
        assert!(Runs::decode(&payload, u64::MAX / PAGE * PAGE, PAGE, REGION).is_err());
        assert!(Runs::decode(&payload[1..], position, PAGE, REGION).is_err(), "less data");
        let table_at = payload.len() - table.tail_bytes();
        let with = |entry: usize, value: u32| {
            let mut payload = payload.clone();
            payload[table_at + entry * 4..][..4].copy_from_slice(&value.to_le_bytes());
            Runs::decode(&payload, position, PAGE, REGION).is_err()
        };
        // The second run's begin and length, the third's begin, and how many there are.
        assert!(
            with(2, 0)
                && with(3, ZEROES)
                && with(3, 2)
                && with(4, 3)
                && with(4, u32::MAX)
                && with(3, u32::MAX)
        );
        assert!(with(6, 0) && with(6, 2) && with(6, u32::MAX));
    }
}
