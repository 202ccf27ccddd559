//! The log of a container over a kernel that keeps type1's rules.

use std::collections::BTreeSet;
use std::sync::Mutex;

use limosa_client::{DirtyBits, Error};
use limosa_protocol::Errno;
use limosa_protocol::bitmap::{runs, words_for};

use super::super::super::log::Log;
use super::super::super::refused;
use super::*;

/// Of the kernel, larger than those of reports.
const PAGE: u64 = 65536;
const QUARTER: u64 = PAGE / 4;

#[derive(Debug)]
struct Kernel {
    is_ours: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    is_set: bool,
    is_on: bool,
    mapped: Vec<Span>,
    /// Dirty pages, by number.
    dirty: BTreeSet<u64>,
    /// Bitmaps cannot be written any more.
    fails: bool,
    /// The mapping that begins here cannot be unmapped.
    stuck: Option<u64>,
}

fn span(page: u64, pages: u64) -> Span {
    Span::of(page * PAGE, pages * PAGE).unwrap()
}

fn refusal(errno: Errno) -> Error {
    refused("dev", "a request", errno, "")
}

impl Kernel {
    fn write(&self, pages: impl IntoIterator<Item = u64>) {
        self.state.lock().unwrap().dirty.extend(pages);
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl State {
    fn check(&self, span: Span, limits: Limits) -> Result<()> {
        let cuts = |mapped: &Span| mapped.overlap(span).is_some() && !span.contains(*mapped);
        let is_odd = span != span.rounded_out(PAGE) || limits.page_size != PAGE;
        let is_long = span.pages(PAGE) > limits.pages_max;
        if !self.is_set || !self.is_on || is_odd || is_long || self.mapped.iter().any(cuts) {
            return Err(refusal(Errno::EINVAL));
        }
        Ok(())
    }

    fn take(&mut self, span: Span) -> Vec<u64> {
        let mut words = vec![0; words_for(span.pages(PAGE))];
        let first = span.first / PAGE;
        for page in first..=span.last / PAGE {
            let is_mapped =
                self.mapped.iter().any(|mapped| (mapped.first..=mapped.last).contains(&(page * PAGE)));
            if is_mapped && self.dirty.remove(&page) {
                words[((page - first) / 64) as usize] |= 1 << ((page - first) % 64);
            }
        }
        words
    }

    fn unmap(&mut self, span: Span) -> Result<()> {
        if self.stuck.is_some_and(|stuck| span.overlap(Span { first: stuck, last: stuck }).is_some()) {
            return Err(refusal(Errno::EBUSY));
        }
        let before = self.mapped.len();
        self.mapped.retain(|mapped| !span.contains(*mapped));
        if self.mapped.len() == before { Err(refusal(Errno::ENOENT)) } else { Ok(()) }
    }
}

impl Type1 for Kernel {
    fn is_ours(&self) -> bool {
        self.is_ours
    }

    fn is_set(&self) -> bool {
        self.state().is_set
    }

    fn start_dirty(&self, _: &str) -> Result<Limits> {
        self.state().is_on = true;
        Ok(Limits { page_size: PAGE, pages_max: 128 })
    }

    fn stop_dirty(&self, _: &str) -> Result<()> {
        self.state().is_on = false;
        Ok(())
    }

    fn read_dirty(&self, _: &str, span: Span, limits: Limits) -> Result<Vec<u64>> {
        let mut state = self.state();
        state.check(span, limits)?;
        // What was found is forgotten before it turns out that nobody takes it.
        let words = state.take(span);
        if state.fails { Err(refusal(Errno::EFAULT)) } else { Ok(words) }
    }

    fn unmap_dirty(&self, _: &str, span: Span, limits: Limits) -> Result<Vec<u64>> {
        let mut state = self.state();
        state.check(span, limits)?;
        if state.fails {
            return Err(refusal(Errno::EFAULT));
        }
        let words = state.take(span);
        state.unmap(span)?;
        Ok(words)
    }

    fn unmap(&self, _: &str, span: Span) -> Result<()> {
        self.state().unmap(span)
    }
}

/// A log that is on, of memory in these pieces, as (first page, pages).
fn logged(is_ours: bool, memory: &[(u64, u64)]) -> (Arc<Kernel>, Log, Mappings) {
    let mapped: Vec<Span> = memory.iter().map(|&(page, pages)| span(page, pages)).collect();
    let known: Vec<_> = mapped.iter().map(|span| (span.first, span.size())).collect();
    let state =
        State { is_set: true, is_on: false, mapped, dirty: BTreeSet::new(), fails: false, stuck: None };
    let kernel = Arc::new(Kernel { is_ours, state: Mutex::new(state) });
    let log = Log::start("dev", Box::new(ContainerLog::new(kernel.clone()))).unwrap();
    (kernel, log, Mappings::at(if is_ours { &known } else { &[] }))
}

fn set(words: &[u64]) -> Vec<u64> {
    runs(words).flat_map(|(page, pages)| page..page + pages).collect()
}

/// The dirty quarters of pages in a range, by their numbers in the address space.
fn report(log: &mut Log, mappings: &Mappings, range: Span) -> Result<Vec<u64>> {
    let mut words = vec![0; words_for(range.pages(QUARTER)) + 1];
    log.report("dev", mappings, range, &mut DirtyBits { page_size: QUARTER, words: &mut words })?;
    Ok(set(&words).into_iter().map(|at| at + range.first / QUARTER).collect())
}

/// The dirty pages of what is unmapped, by their numbers in the address space.
fn unmap(log: &mut Log, mappings: &mut Mappings, range: Span) -> Result<Vec<u64>> {
    let mut words = vec![0; words_for(range.pages(PAGE))];
    log.unmap("dev", mappings, range, Some(DirtyBits { page_size: PAGE, words: &mut words }))?;
    Ok(set(&words).into_iter().map(|at| at + range.first / PAGE).collect())
}

fn quarters(pages: impl IntoIterator<Item = u64>) -> Vec<u64> {
    pages.into_iter().flat_map(|page| 4 * page..4 * page + 4).collect()
}

#[test]
fn an_unmap_lost_the_pages_that_a_report_of_other_memory_had_read() {
    let (kernel, mut log, mut mappings) = logged(true, &[(0, 32), (32, 4)]);
    kernel.write([5, 20, 21]);
    assert_eq!(report(&mut log, &mappings, span(0, 16)).unwrap(), quarters([5]));
    kernel.write([22]);
    assert_eq!(unmap(&mut log, &mut mappings, span(0, 32)).unwrap(), [20, 21, 22]);
    assert_eq!(report(&mut log, &mappings, span(0, 36)).unwrap(), quarters(20..23), "and in the next report");
    assert_eq!(report(&mut log, &mappings, span(0, 36)).unwrap(), []);
}

#[test]
fn unmapping_nothing_was_ok_while_the_log_was_on() {
    for is_ours in [true, false] {
        let (kernel, mut log, mut mappings) = logged(is_ours, &[(0, 4)]);
        let nothing = |log: &mut Log, mappings: &mut Mappings, range| {
            let with_bits = unmap(log, mappings, range).unwrap_err();
            let without = log.unmap("dev", mappings, range, None).unwrap_err();
            assert_eq!([with_bits.errno(), without.errno()], [Some(Errno::ENOENT); 2], "{with_bits}");
        };
        nothing(&mut log, &mut mappings, span(8, 4));
        kernel.write([1]);
        assert_eq!(unmap(&mut log, &mut mappings, span(0, 4)).unwrap(), [1]);
        nothing(&mut log, &mut mappings, span(0, 4));
        // Nor is there anything once the container has lost its IOMMU.
        kernel.state().is_set = false;
        nothing(&mut log, &mut mappings, span(0, 4));
        kernel.state().is_set = true;
        assert_eq!(report(&mut log, &mappings, span(0, 4)).unwrap(), quarters([1]), "nothing is forgotten");
    }
}

#[test]
fn a_report_that_failed_lost_the_pages_beside_its_range() {
    let (kernel, mut log, mappings) = logged(true, &[(0, 8)]);
    kernel.write([0, 4]);
    kernel.state().fails = true;
    report(&mut log, &mappings, span(3, 2)).unwrap_err();
    kernel.state().fails = false;
    assert_eq!(report(&mut log, &mappings, span(0, 8)).unwrap(), quarters([0, 1, 2, 5, 6, 7]));
    assert_eq!(report(&mut log, &mappings, span(0, 8)).unwrap(), []);
}

#[test]
fn a_range_that_cuts_a_page_was_refused_by_the_container_of_a_vmm() {
    let (kernel, mut log, mappings) = logged(false, &[(0, 1), (1, 1), (2, 1)]);
    kernel.write([0, 1]);
    let cut = Span::of(QUARTER, 4 * QUARTER).unwrap();
    assert_eq!(report(&mut log, &mappings, cut).unwrap(), [1, 2, 3, 4]);
    assert_eq!(report(&mut log, &mappings, span(0, 3)).unwrap(), [0, 5, 6, 7]);
    assert_eq!(report(&mut log, &mappings, span(0, 3)).unwrap(), []);
}

#[test]
fn an_unmap_that_fails_half_way_keeps_what_it_has_read() {
    // Too far apart for one bitmap.
    let (kernel, mut log, mut mappings) = logged(true, &[(0, 4), (4000, 4)]);
    kernel.write([2, 4001]);
    kernel.state().stuck = Some(4000 * PAGE);
    let all = span(0, 4004);
    unmap(&mut log, &mut mappings, all).unwrap_err();
    kernel.state().stuck = None;
    let dirty = unmap(&mut log, &mut mappings, all).unwrap();
    assert_eq!(dirty, [2, 4000, 4001, 4002, 4003], "the second piece was read by a request that failed");
    assert_eq!(report(&mut log, &mappings, all).unwrap(), quarters(dirty));
}

#[test]
fn memory_whose_bits_cannot_be_had_is_unmapped_and_dirty() {
    let (kernel, mut log, mut mappings) = logged(true, &[(0, 4), (8, 4)]);
    kernel.state().fails = true;
    assert_eq!(unmap(&mut log, &mut mappings, span(0, 4)).unwrap(), [0, 1, 2, 3]);
    assert!(kernel.state().mapped == [span(8, 4)], "unmapped");
    assert!(!mappings.overlaps(span(0, 4)), "and forgotten");
}

#[test]
fn memory_of_a_container_that_lost_its_iommu_is_dirty() {
    let (kernel, mut log, mut mappings) = logged(true, &[(0, 4), (8, 4)]);
    kernel.state().is_set = false;
    assert_eq!(unmap(&mut log, &mut mappings, span(0, 8)).unwrap(), [0, 1, 2, 3], "and no hole is");
    kernel.state().is_set = true;
    log.restart("dev", &mappings).unwrap();
    assert_eq!(report(&mut log, &mappings, span(0, 12)).unwrap(), quarters((0..4).chain(8..12)));
}

#[test]
fn bitmaps_end_where_mappings_do_and_have_no_more_pages_than_the_kernel_takes() {
    let memory = [(0, 4), (4, 4), (10, 2), (12, 1)].map(|(page, pages)| (page * PAGE, pages * PAGE));
    let mappings = Mappings::at(&memory);
    let pieces = |range, pages_max| pieces(&mappings, range, Limits { page_size: PAGE, pages_max });
    assert_eq!(pieces(span(0, 13), 13), [span(0, 13)]);
    assert_eq!(pieces(span(0, 13), 12), [span(0, 12), span(12, 1)]);
    assert_eq!(pieces(span(0, 13), 8), [span(0, 8), span(10, 3)]);
    assert_eq!(pieces(span(0, 13), 4), [span(0, 4), span(4, 4), span(10, 3)]);
    assert_eq!(pieces(span(5, 6), 13), [span(4, 8)], "whole mappings");
    assert_eq!(pieces(span(8, 2), 13), []);
}

#[test]
fn mappings_far_apart_are_asked_for_one_by_one() {
    let memory = [(0, PAGE), (1 << 40, PAGE), (u64::MAX - PAGE + 1, PAGE)];
    let all = Span { first: 0, last: u64::MAX };
    let limits = Limits { page_size: PAGE, pages_max: u64::MAX };
    let expected = memory.map(|(iova, size)| Span::of(iova, size).unwrap());
    assert_eq!(pieces(&Mappings::at(&memory), all, limits), expected);
}
