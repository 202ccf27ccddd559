//! The log of page tables over a kernel that keeps iommufd's rules, with an IOMMU of pages of 64 KiB and larger ones.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use limosa_client::DirtyBits;
use limosa_protocol::Errno;
use limosa_protocol::bitmap::{runs, set_range};

use super::super::super::log::Log;
use super::super::super::refused;
use super::*;

const PAGE: u64 = PAGE_SIZE;
/// The smallest page of the IOMMU's.
const UNIT: u64 = 16 * PAGE;

/// A kernel with an IOAS.
#[derive(Debug)]
struct Kernel {
    is_ours: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The tables, and whether each tracks.
    tables: BTreeMap<u32, bool>,
    /// The tables that refuse to be turned on or off.
    stubborn: BTreeSet<u32>,
    /// Dirty pages of the IOMMU's, which are dirty or clean as a whole, by table and first address.
    dirty: BTreeSet<(u32, u64)>,
    mapped: Vec<Span>,
    /// Pages of the IOMMU's that are larger than [`UNIT`].
    large: Vec<Span>,
    /// A reading fails once it comes to these addresses.
    fails_at: Option<u64>,
    unmap_refusal: Option<Errno>,
}

fn span(page: u64, pages: u64) -> Span {
    Span::of(page * PAGE, pages * PAGE).unwrap()
}

fn refusal(errno: Errno) -> Error {
    refused("dev", "a request", errno, "")
}

impl Kernel {
    fn new(is_ours: bool, mapped: &[Span]) -> Arc<Kernel> {
        let state = State { tables: [(1, false)].into(), mapped: mapped.into(), ..State::default() };
        Arc::new(Kernel { is_ours, state: Mutex::new(state) })
    }

    fn write(&self, table: u32, page: u64) {
        let mut state = self.state.lock().unwrap();
        let first = state.page_around(page * PAGE).first;
        state.dirty.insert((table, first));
    }

    fn tracking(&self) -> Vec<bool> {
        self.state.lock().unwrap().tables.values().copied().collect()
    }
}

impl State {
    fn page_around(&self, address: u64) -> Span {
        let address = Span { first: address, last: address };
        let large = self.large.iter().find(|large| large.contains(address));
        large.copied().unwrap_or_else(|| address.rounded_out(UNIT))
    }
}

impl PageTables for Kernel {
    fn tables(&self) -> Vec<u32> {
        self.state.lock().unwrap().tables.keys().copied().collect()
    }

    fn is_ours(&self) -> bool {
        self.is_ours
    }

    fn alignment(&self) -> Result<u64> {
        Ok(UNIT)
    }

    fn track(&self, name: &str, table: u32, on: bool) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        if state.stubborn.contains(&table) {
            return Err(refused(name, format!("tracking of {table}"), Errno::EIO, ""));
        }
        state.tables.insert(table, on);
        Ok(())
    }

    fn read(&self, _: &str, table: u32, span: Span, keep: bool, words: &mut [u64]) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        if span != span.rounded_out(UNIT) {
            return Err(refusal(Errno::EINVAL));
        }
        let mut at = span.first;
        while at < span.last {
            if !state.mapped.iter().any(|mapped| (mapped.first..=mapped.last).contains(&at)) {
                break;
            }
            if state.fails_at.is_some_and(|fails| fails <= at) {
                return Err(refusal(Errno::EFAULT));
            }
            let page = state.page_around(at);
            if state.dirty.contains(&(table, page.first)) {
                let last = page.last.min(span.last);
                let (first, last) = ((at - span.first) / PAGE, (last - span.first) / PAGE);
                set_range(words, first, last - first + 1);
                if !keep {
                    state.dirty.remove(&(table, page.first));
                }
            }
            at = page.last + 1;
        }
        Ok(())
    }

    fn with_questions<T>(
        &self,
        _: &str,
        ask: impl FnOnce(&mut dyn FnMut(Span) -> Result<bool>) -> Result<T>,
    ) -> Result<T> {
        let mapped = joined(self.state.lock().unwrap().mapped.iter().copied());
        ask(&mut |span| {
            assert_eq!(span, span.rounded_out(UNIT), "a question that has an answer");
            let before = mapped.partition_point(|mapped| mapped.first <= span.first);
            Ok(mapped[..before].last().is_some_and(|mapped| mapped.contains(span)))
        })
    }

    fn unmap(&self, _: &str, range: Span) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        if let Some(errno) = state.unmap_refusal {
            return Err(refusal(errno));
        }
        let before = state.mapped.len();
        state.mapped.retain(|mapped| !range.contains(*mapped));
        if state.mapped.len() == before { Err(refusal(Errno::ENOENT)) } else { Ok(()) }
    }
}

/// A log that is on, of memory in these pieces, as (first page, pages).
fn logged(is_ours: bool, memory: &[(u64, u64)]) -> (Arc<Kernel>, Log, Mappings) {
    let spans: Vec<Span> = memory.iter().map(|&(page, pages)| span(page, pages)).collect();
    let kernel = Kernel::new(is_ours, &spans);
    let log = Log::start("dev", Box::new(PageTableLog::new(kernel.clone()))).unwrap();
    let known: Vec<_> = spans.iter().map(|span| (span.first, span.size())).collect();
    (kernel, log, Mappings::at(if is_ours { &known } else { &[] }))
}

fn pages(words: &[u64]) -> Vec<u64> {
    runs(words).flat_map(|(page, pages)| page..page + pages).collect()
}

/// The dirty pages of a report, by their numbers in the address space.
fn report(log: &mut Log, mappings: &Mappings, page: u64, count: u64) -> Result<Vec<u64>> {
    // Room beyond the range, where nothing may be set.
    let mut words = vec![0; count.div_ceil(64) as usize + 1];
    let mut bits = DirtyBits { page_size: PAGE, words: &mut words };
    log.report("dev", mappings, span(page, count), &mut bits)?;
    Ok(pages(&words).into_iter().map(|at| at + page).collect())
}

fn unmap(log: &mut Log, mappings: &mut Mappings, page: u64, count: u64) -> Result<Vec<u64>> {
    let mut words = vec![0; count.div_ceil(64) as usize];
    let bits = DirtyBits { page_size: PAGE, words: &mut words };
    log.unmap("dev", mappings, span(page, count), Some(bits))?;
    Ok(pages(&words).into_iter().map(|at| at + page).collect())
}

fn list(pages: impl IntoIterator<Item = u64>) -> Vec<u64> {
    pages.into_iter().collect()
}

#[test]
fn a_range_that_cuts_a_page_of_the_iommu_was_refused_by_the_kernel() {
    for is_ours in [true, false] {
        let (kernel, mut log, mappings) = logged(is_ours, &[(0, 64), (96, 32)]);
        [20, 60, 100].iter().for_each(|page| kernel.write(1, *page));
        // From within one dirty page of the IOMMU to within another, over a hole.
        assert_eq!(report(&mut log, &mappings, 24, 75).unwrap(), list((24..32).chain(48..64).chain(96..99)));
        // What lies beside it was cleared with it, and is told once.
        assert_eq!(report(&mut log, &mappings, 0, 20).unwrap(), list(16..20));
        assert_eq!(report(&mut log, &mappings, 0, 128).unwrap(), list((20..24).chain(99..112)));
        assert_eq!(report(&mut log, &mappings, 0, 128).unwrap(), []);
    }
}

#[test]
fn a_report_of_a_part_of_a_large_page_lost_the_rest_of_it() {
    for is_ours in [true, false] {
        // All of a mapping, a part of one, and a large page beside small ones.
        let (kernel, mut log, mappings) = logged(is_ours, &[(0, 64), (64, 64), (144, 48)]);
        kernel.state.lock().unwrap().large = vec![span(0, 64), span(64, 32), span(160, 32)];
        for (page, first, last) in [(3, 0, 64), (63, 0, 64), (70, 64, 96), (100, 96, 112), (191, 160, 192)] {
            for cut in [first, first + 5, last - 1] {
                kernel.write(1, page);
                assert_eq!(report(&mut log, &mappings, cut, 1).unwrap(), [cut], "{page}");
                let rest = list((first..cut).chain(cut + 1..last));
                assert_eq!(report(&mut log, &mappings, 0, 200).unwrap(), rest, "{page} after {cut}");
                assert_eq!(report(&mut log, &mappings, 0, 200).unwrap(), []);
            }
        }
    }
}

#[test]
fn a_report_that_failed_lost_the_pages_beside_its_range() {
    let (kernel, mut log, mappings) = logged(true, &[(0, 64)]);
    kernel.write(1, 16);
    kernel.state.lock().unwrap().fails_at = Some(32 * PAGE);
    report(&mut log, &mappings, 20, 40).unwrap_err();
    kernel.state.lock().unwrap().fails_at = None;
    let after = report(&mut log, &mappings, 0, 64).unwrap();
    assert_eq!(after, list((0..20).chain(60..64)), "all of which the caller was not told that it is lost");
}

#[test]
fn an_unmap_lost_the_pages_that_a_report_of_other_memory_had_read() {
    for is_ours in [true, false] {
        let (kernel, mut log, mut mappings) = logged(is_ours, &[(0, 32), (32, 32)]);
        kernel.write(1, 16);
        assert_eq!(report(&mut log, &mappings, 0, 20).unwrap(), list(16..20));
        kernel.write(1, 0);
        assert_eq!(unmap(&mut log, &mut mappings, 0, 32).unwrap(), list((0..16).chain(20..32)));
        let next = report(&mut log, &mappings, 0, 64).unwrap();
        assert_eq!(next, list((0..16).chain(20..32)), "and in the next report");
        assert_eq!(report(&mut log, &mappings, 0, 64).unwrap(), []);
    }
}

#[test]
fn unmapping_nothing_is_refused() {
    for is_ours in [true, false] {
        let (_, mut log, mut mappings) = logged(is_ours, &[(0, 16)]);
        for _ in 0..2 {
            let error = unmap(&mut log, &mut mappings, 32, 16).unwrap_err();
            assert_eq!(error.errno(), Some(Errno::ENOENT), "{error}");
        }
        unmap(&mut log, &mut mappings, 0, 16).unwrap();
        let error = unmap(&mut log, &mut mappings, 0, 16).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::ENOENT), "{error}");
    }
}

#[test]
fn an_unmap_that_is_refused_forgets_nothing() {
    let (kernel, mut log, mut mappings) = logged(true, &[(0, 16)]);
    kernel.write(1, 3);
    kernel.state.lock().unwrap().unmap_refusal = Some(Errno::EBUSY);
    unmap(&mut log, &mut mappings, 0, 16).unwrap_err();
    assert_eq!(report(&mut log, &mappings, 0, 16).unwrap(), list(0..16));
    assert_eq!(report(&mut log, &mappings, 0, 16).unwrap(), []);
    // One whose bits cannot be read.
    let mut state = kernel.state.lock().unwrap();
    (state.unmap_refusal, state.fails_at) = (None, Some(0));
    drop(state);
    assert_eq!(unmap(&mut log, &mut mappings, 0, 16).unwrap(), list(0..16));
}

#[test]
fn all_page_tables_are_read() {
    let (kernel, mut log, mappings) = logged(true, &[(0, 64)]);
    kernel.state.lock().unwrap().tables.insert(2, true);
    kernel.write(1, 0);
    kernel.write(2, 32);
    assert_eq!(report(&mut log, &mappings, 0, 64).unwrap(), list((0..16).chain(32..48)));
}

#[test]
fn turning_tracking_off_ended_at_the_first_page_table_that_refused() {
    let kernel = Kernel::new(true, &[]);
    kernel.state.lock().unwrap().tables.extend([(2, false), (3, false), (4, false)]);
    let log = Log::start("dev", Box::new(PageTableLog::new(kernel.clone()))).unwrap();
    assert_eq!(kernel.tracking(), [true; 4]);
    kernel.state.lock().unwrap().stubborn.extend([2, 3]);
    let error = log.stop("dev").unwrap_err();
    assert!(error.to_string().contains("tracking of 2"), "the first: {error}");
    assert_eq!(kernel.tracking(), [false, true, true, false]);
}

#[test]
fn tracking_is_on_in_all_page_tables_or_in_none() {
    let kernel = Kernel::new(true, &[]);
    kernel.state.lock().unwrap().tables.extend([(2, false), (3, false)]);
    kernel.state.lock().unwrap().stubborn.insert(3);
    Log::start("dev", Box::new(PageTableLog::new(kernel.clone()))).unwrap_err();
    assert_eq!(kernel.tracking(), [false; 3]);
    kernel.state.lock().unwrap().tables.clear();
    let error = Log::start("dev", Box::new(PageTableLog::new(kernel))).unwrap_err();
    assert!(matches!(error, Error::Usage { .. }), "{error}");
}

#[test]
fn memory_in_more_pieces_than_can_be_asked_for_is_an_error() {
    let pieces: Vec<_> = (0..8192).map(|at| (at * 32, 16)).collect();
    let (_, mut log, mappings) = logged(false, &pieces);
    assert_eq!(report(&mut log, &mappings, 0, 1024 * 32).unwrap(), []);
    let error = report(&mut log, &mappings, 0, 8192 * 32).unwrap_err();
    assert!(error.to_string().contains("too many pieces"), "{error}");
}

#[test]
fn chunks_end_at_multiples_of_their_size() {
    let of = |iova, size| Span::of(iova, size).unwrap();
    let (chunk, far) = (CHUNK_BYTES, 1 << 50);
    let spans = [of(0, chunk), of(far - PAGE, 2 * chunk + 2 * PAGE), of(u64::MAX - PAGE + 1, PAGE)];
    let far = [of(far - PAGE, PAGE), of(far, chunk), of(far + chunk, chunk), of(far + 2 * chunk, PAGE)];
    assert_eq!(chunks(&spans), [&spans[..1], &far, &spans[2..]].concat());
}
