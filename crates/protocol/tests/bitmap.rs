//! Dirty bitmaps against a naive model: a set of pages.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use limosa_protocol::Errno;
use limosa_protocol::bitmap::{self, DirtyBitmap, Grid, regranulate, words_for};
use proptest::prelude::*;

const PAGES: u64 = 700;

type Pages = BTreeSet<u64>;

fn words_of(pages: &Pages, len: u64) -> Vec<u64> {
    let mut words = vec![0; words_for(len)];
    for page in pages {
        words[(page / 64) as usize] |= 1 << (page % 64);
    }
    words
}

fn pages_of(words: &[u64]) -> Pages {
    (0..words.len() as u64 * 64).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 == 1).collect()
}

fn pages_of_runs(runs: impl Iterator<Item = (u64, u64)>) -> Pages {
    let mut pages = Pages::new();
    let mut end = None;
    for (start, len) in runs {
        assert!(len > 0 && end.is_none_or(|end| start > end), "runs are in order and apart");
        pages.extend(start..start + len);
        end = Some(start + len);
    }
    pages
}

fn marked(pages: &Pages) -> DirtyBitmap {
    let bitmap = DirtyBitmap::new(PAGES).unwrap();
    pages.iter().for_each(|page| bitmap.set(*page));
    bitmap
}

/// A bitmap of several blocks of 4096 pages, the last of them not whole.
const MANY_PAGES: u64 = 3 * 4096 + 700;

/// What is done to a bitmap.
#[derive(Clone, Debug)]
enum Act {
    Set(u64, u64),
    SetLocked(u64, u64),
    OrWords(u64, Vec<u64>, u64),
    Or(Pages),
    Harvest(u64, u64),
    HarvestExclusive(u64, u64),
    Clear,
}

fn act() -> impl Strategy<Value = Act> {
    let short = (0..MANY_PAGES, 0..200_u64).prop_map(|(start, len)| (start, len.min(MANY_PAGES - start)));
    let long = (0..=MANY_PAGES, 0..=MANY_PAGES).prop_map(|(a, b)| (a.min(b), a.abs_diff(b)));
    let range = prop_oneof![3 => short.clone(), 2 => long];
    prop_oneof![
        range.clone().prop_map(|(start, len)| Act::Set(start, len)),
        range.clone().prop_map(|(start, len)| Act::SetLocked(start, len)),
        (short, prop::collection::vec(some_word(), 4))
            .prop_map(|((start, len), words)| Act::OrWords(start, words, len)),
        prop::collection::btree_set(0..MANY_PAGES, 0..5).prop_map(Act::Or),
        range.clone().prop_map(|(start, len)| Act::Harvest(start, len)),
        range.prop_map(|(start, len)| Act::HarvestExclusive(start, len)),
        Just(Act::Clear),
    ]
}

/// A range within `PAGES` pages.
fn range() -> impl Strategy<Value = (u64, u64)> {
    (0..=PAGES, 0..=PAGES).prop_map(|(a, b)| (a.min(b), a.abs_diff(b)))
}

/// Few pages, many pages, long runs: each makes other words.
fn some_pages() -> impl Strategy<Value = Pages> {
    prop_oneof![
        prop::collection::btree_set(0..PAGES, 0..20),
        prop::collection::btree_set(0..PAGES, 300..600),
        prop::collection::vec(range(), 0..4)
            .prop_map(|runs| runs.into_iter().flat_map(|(start, len)| start..start + len).collect()),
    ]
}

proptest! {
    #[test]
    fn a_bitmap_of_many_blocks_has_the_pages_of_a_set_whatever_is_done_to_it(acts in prop::collection::vec(act(), 1..24)) {
        let mut bitmap = DirtyBitmap::new(MANY_PAGES).unwrap();
        let mut pages = Pages::new();
        for act in acts {
            let mut harvested = None;
            match act {
                Act::Set(start, len) => {
                    bitmap.set_range(start, len);
                    pages.extend(start..start + len);
                }
                Act::SetLocked(start, len) => {
                    bitmap.set_range_locked(start, len);
                    pages.extend(start..start + len);
                }
                Act::OrWords(start, words, len) => {
                    bitmap.or_words(start, &words, len);
                    pages.extend(pages_of(&words).range(..len).map(|page| start + page));
                }
                Act::Or(more) => {
                    let other = DirtyBitmap::new(MANY_PAGES).unwrap();
                    more.iter().for_each(|page| other.set(*page));
                    bitmap.or(&other);
                    pages.extend(more);
                }
                Act::Harvest(start, len) => {
                    let mut out = vec![0; words_for(len)];
                    bitmap.harvest(start, len, &mut out);
                    harvested = Some((start, len, out));
                }
                Act::HarvestExclusive(start, len) => {
                    let mut out = vec![0; words_for(len)];
                    bitmap.harvest_exclusive(start, len, &mut out);
                    harvested = Some((start, len, out));
                }
                Act::Clear => {
                    bitmap.clear();
                    pages.clear();
                }
            }
            if let Some((start, len, out)) = harvested {
                let expected: Pages = pages.range(start..start + len).map(|page| page - start).collect();
                prop_assert_eq!(pages_of(&out), expected);
                pages.retain(|page| !(start..start + len).contains(page));
            }
            prop_assert_eq!(pages_of_runs(bitmap.runs()), pages.clone());
            prop_assert_eq!(bitmap.count(), pages.len() as u64);
            prop_assert_eq!(bitmap.is_empty(), pages.is_empty());
        }
    }

    #[test]
    fn ranges_are_set_and_cleared(pages in some_pages(), (start, len) in range()) {
        let mut words = words_of(&pages, PAGES);
        bitmap::set_range(&mut words, start, len);
        let union: Pages = pages.iter().copied().chain(start..start + len).collect();
        prop_assert_eq!(&pages_of(&words), &union);
        let atomic = marked(&pages);
        atomic.set_range(start, len);
        prop_assert_eq!(&pages_of_runs(atomic.runs()), &union);
        for from in [0, 1, 63, 64, 65, 127, 200, u64::MAX] {
            let rest = union.range(from..).copied().collect();
            prop_assert_eq!(pages_of_runs(atomic.runs_from(from)), rest, "from {}", from);
        }
        let locked = marked(&pages);
        locked.set_range_locked(start, len);
        prop_assert_eq!(&pages_of_runs(locked.runs()), &union);

        let mut words = words_of(&pages, PAGES);
        bitmap::clear_range(&mut words, start, len);
        let rest: Pages = pages.iter().copied().filter(|page| !(start..start + len).contains(page)).collect();
        prop_assert_eq!(pages_of(&words), rest);
    }

    #[test]
    fn counting_asking_and_runs_agree_with_the_set(pages in some_pages(), (start, len) in range()) {
        let words = words_of(&pages, PAGES);
        let atomic = marked(&pages);
        prop_assert_eq!(bitmap::count(&words), pages.len() as u64);
        prop_assert_eq!(atomic.count(), pages.len() as u64);
        prop_assert_eq!(bitmap::is_empty(&words), pages.is_empty());
        prop_assert_eq!(atomic.is_empty(), pages.is_empty());
        prop_assert!((0..PAGES).all(|page| bitmap::get(&words, page) == pages.contains(&page)));
        prop_assert!((0..PAGES).all(|page| atomic.get(page) == pages.contains(&page)));
        prop_assert_eq!(&pages_of_runs(bitmap::runs(&words)), &pages);
        let within: Pages = pages.iter().copied().filter(|page| (start..start + len).contains(page)).collect();
        prop_assert_eq!(bitmap::any(&words, start, len), !within.is_empty());
        prop_assert_eq!(pages_of_runs(bitmap::runs_in(&words, start, len)), within);
        atomic.clear();
        prop_assert!(atomic.is_empty());
    }

    #[test]
    fn a_harvest_moves_its_range_and_nothing_else(pages in some_pages(), (start, len) in range(), before in some_pages()) {
        let before: Pages = before.into_iter().filter(|page| *page < len).collect();
        let (within, rest): (Pages, Pages) = pages.iter().partition(|page| (start..start + len).contains(page));
        let expected: Pages = within.iter().map(|page| page - start).chain(before.iter().copied()).collect();

        let atomic = marked(&pages);
        let mut out = words_of(&before, len);
        atomic.read(start, len, &mut out);
        prop_assert_eq!(&pages_of(&out), &expected);
        prop_assert_eq!(&pages_of_runs(atomic.runs()), &pages);

        let mut out = words_of(&before, len);
        atomic.harvest(start, len, &mut out);
        prop_assert_eq!(&pages_of(&out), &expected);
        prop_assert_eq!(&pages_of_runs(atomic.runs()), &rest);

        let mut exclusive = marked(&pages);
        let mut out = words_of(&before, len);
        exclusive.harvest_exclusive(start, len, &mut out);
        prop_assert_eq!(&pages_of(&out), &expected);
        prop_assert_eq!(&pages_of_runs(exclusive.runs()), &rest);
    }

    #[test]
    fn or_adds_pages_at_any_offset(
        dst in some_pages(), src in some_pages(), (start, len) in range(), from in 0..PAGES,
    ) {
        let len = len.min(PAGES - from);
        let moved: Pages =
            src.iter().filter(|page| (from..from + len).contains(page)).map(|page| page - from + start).collect();
        let expected: Pages = dst.union(&moved).copied().collect();
        let mut words = words_of(&dst, PAGES);
        bitmap::or_range(&mut words, start, &words_of(&src, PAGES), from, len);
        prop_assert_eq!(pages_of(&words), expected);

        let atomic = marked(&dst);
        atomic.or_words(start, &words_of(&src, PAGES), len);
        let moved: Pages = src.iter().filter(|page| **page < len).map(|page| page + start).collect();
        prop_assert_eq!(pages_of_runs(atomic.runs()), dst.union(&moved).copied().collect());

        let union: Pages = dst.union(&src).copied().collect();
        let mut words = words_of(&dst, PAGES);
        bitmap::or_into(&mut words, &words_of(&src, PAGES));
        prop_assert_eq!(&pages_of(&words), &union);
        let atomic = marked(&dst);
        atomic.or(&marked(&src));
        prop_assert_eq!(&pages_of_runs(atomic.runs()), &union);
    }
}

/// Two grids over one range of addresses. Page sizes are small, so that bytes can be counted.
#[derive(Clone, Debug)]
struct Grids {
    from: Grid,
    to: Grid,
    iova: u64,
    length: u64,
}

impl Grids {
    /// Pages from the grid's start to the range's end.
    fn pages(&self, grid: Grid) -> u64 {
        (self.iova + self.length - grid.iova).div_ceil(grid.page_size)
    }

    /// What must be set in the target: byte by byte.
    fn model(&self, src: &Pages) -> Pages {
        (self.iova..self.iova + self.length)
            .filter(|byte| src.contains(&((byte - self.from.iova) / self.from.page_size)))
            .map(|byte| (byte - self.to.iova) / self.to.page_size)
            .collect()
    }
}

/// `fine`: how the grids and the range lie, in bytes; powers of two up to 2^9 beside each other.
fn grids() -> impl Strategy<Value = Grids> {
    let align = prop_oneof![Just(1u64), Just(4), Just(64)];
    (0u32..10, 0u32..10, align, 0u64..2000, 0u64..2000, 0u64..2000, 0u64..6000).prop_map(
        |(from, to, align, a, b, c, length)| {
            let down = |at: u64| at / align * align;
            let base = 1 << 40;
            Grids {
                from: Grid { iova: base + down(a), page_size: 1 << from },
                to: Grid { iova: base + down(b), page_size: 1 << to },
                iova: base + down(a).max(down(b)) + down(c),
                length,
            }
        },
    )
}

fn some_word() -> impl Strategy<Value = u64> {
    prop_oneof![3 => Just(0), 2 => Just(!0u64), 2 => any::<u64>(), 2 => (0u32..64).prop_map(|bit| 1 << bit)]
}

fn some_bits() -> impl Strategy<Value = Vec<u64>> {
    let word = some_word();
    prop::collection::vec(word, 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn regranulating_sets_exactly_the_pages_with_a_dirty_byte(grids in grids(), pattern in some_bits()) {
        let src: Vec<u64> = pattern.iter().copied().cycle().take(words_for(grids.pages(grids.from))).collect();
        let mut dst = vec![0; words_for(grids.pages(grids.to))];
        regranulate(&src, grids.from, &mut dst, grids.to, grids.iova, grids.length);
        prop_assert_eq!(pages_of(&dst), grids.model(&pages_of(&src)));
    }

    #[test]
    fn a_report_loses_no_page_and_keeps_those_that_reach_out(grids in grids(), pattern in some_bits(), exclusive: bool) {
        let pages = grids.pages(grids.from);
        let mut src: Vec<u64> = pattern.iter().copied().cycle().take(words_for(pages)).collect();
        if let Some(last) = src.last_mut() {
            *last &= !0 >> ((64 - pages % 64) % 64);
        }
        let mut log = DirtyBitmap::new(pages).unwrap();
        log.or_words(0, &src, pages);
        let mut dst = vec![0; words_for(grids.pages(grids.to))];
        let Grids { from, to, iova, length } = grids;
        if exclusive {
            log.report_exclusive(from, &mut dst, to, iova, length);
        } else {
            log.report(from, &mut dst, to, iova, length);
        }
        let src = pages_of(&src);
        prop_assert_eq!(pages_of(&dst), grids.model(&src));
        let whole = |page: &u64| {
            let start = from.iova + page * from.page_size;
            start >= iova && start + from.page_size <= iova + length
        };
        let kept: Pages = src.into_iter().filter(|page| !whole(page)).collect();
        prop_assert_eq!(pages_of_runs(log.runs()), kept);
    }
}

#[test]
fn page_sizes_far_apart_regranulate_both_ways() {
    let huge = Grid { iova: 0, page_size: 1 << 30 };
    let small = Grid { iova: 0, page_size: 4096 };
    let mut fine = vec![0; words_for(3 << 18)];
    regranulate(&[0b010], huge, &mut fine, small, 0, 3 << 30);
    assert_eq!(bitmap::runs(&fine).collect::<Vec<_>>(), [(1 << 18, 1 << 18)]);
    let mut coarse = [0];
    regranulate(&fine, small, &mut coarse, huge, 0, 3 << 30);
    assert_eq!(coarse, [0b010]);
    fine.fill(0);
    bitmap::set_range(&mut fine, (3 << 18) - 1, 1);
    regranulate(&fine, small, &mut coarse, huge, 4096, (3 << 30) - 4096);
    assert_eq!(coarse, [0b110]);
}

#[test]
fn a_range_may_end_at_the_top_of_the_address_space() {
    let top = |pages: u64, page_size: u64| Grid { iova: 0u64.wrapping_sub(pages * page_size), page_size };
    let (from, to) = (top(3, 8192), top(6, 4096));
    let mut dst = [0];
    regranulate(&[0b101], from, &mut dst, to, from.iova, 3 * 8192);
    assert_eq!(dst, [0b110011]);
    let whole = Grid { iova: 0, page_size: 1 << 63 };
    let mut dst = [0];
    regranulate(&[0b10], whole, &mut dst, whole, 1, u64::MAX);
    assert_eq!(dst, [0b10]);
}

#[test]
fn a_bitmap_larger_than_the_address_space_is_enomem() {
    assert_eq!(DirtyBitmap::new(u64::MAX).unwrap_err(), Errno::ENOMEM);
}

/// A server's memory does not follow what a client claims: 256 MiB of bitmap, 8 TiB of pages.
#[test]
#[cfg(target_os = "linux")]
fn memory_is_taken_as_pages_are_marked() {
    let resident_kib = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = resident_kib();
    let mut bitmap = DirtyBitmap::new(1 << 31).unwrap();
    bitmap.set(12345);
    let mut out = [0; 1];
    for start in (0..1 << 31).step_by(1 << 20) {
        bitmap.harvest_exclusive(start, 64, &mut out);
        bitmap.harvest(start, 64, &mut out);
    }
    bitmap.clear();
    assert!(bitmap.is_empty());
    let more = resident_kib().saturating_sub(before);
    assert!(more < 64 << 10, "{more} KiB more are resident");
}

#[test]
fn an_empty_bitmap_has_nothing() {
    let mut none = DirtyBitmap::new(0).unwrap();
    none.set_range(0, 0);
    none.harvest(0, 0, &mut []);
    none.harvest_exclusive(0, 0, &mut []);
    assert!(none.is_empty() && none.runs().next().is_none());
}

#[test]
#[should_panic(expected = "do not fit")]
fn marking_beyond_the_end_is_a_bug_even_within_the_last_word() {
    DirtyBitmap::new(65).unwrap().set(65);
}

/// Every mark comes out of exactly the harvests that there are: threads mark pages of their own
/// and of all while others harvest.
#[test]
fn marks_and_harvests_at_once_lose_nothing() {
    const PAGES: u64 = 4096 + 17;
    for locked in [false, true] {
        let bitmap = DirtyBitmap::new(PAGES).unwrap();
        let done = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let markers: Vec<_> = (0..3u64)
                .map(|lane| {
                    let bitmap = &bitmap;
                    scope.spawn(move || {
                        for page in (lane..PAGES).step_by(3) {
                            if locked {
                                bitmap.set_range_locked(page, 1);
                            } else {
                                bitmap.set_range(page, 1.max((page % 7) * 40).min(PAGES - page));
                            }
                        }
                    })
                })
                .collect();
            let harvester = scope.spawn(|| {
                let mut seen = vec![0; words_for(PAGES)];
                while !done.load(Ordering::Acquire) {
                    bitmap.harvest(0, PAGES, &mut seen);
                    let mut part = vec![0; words_for(1000)];
                    bitmap.harvest(77, 1000, &mut part);
                    bitmap::or_range(&mut seen, 77, &part, 0, 1000);
                }
                seen
            });
            markers.into_iter().for_each(|marker| marker.join().unwrap());
            done.store(true, Ordering::Release);
            harvester.join().unwrap()
        });
        let mut seen = seen;
        bitmap.harvest(0, PAGES, &mut seen);
        assert_eq!(bitmap::runs(&seen).collect::<Vec<_>>(), [(0, PAGES)]);
        assert!(bitmap.is_empty());
    }
}
