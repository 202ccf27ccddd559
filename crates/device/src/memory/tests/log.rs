//! What holds for the log of DMA writes.

use std::collections::BTreeSet;

use limosa_protocol::bitmap::{count, get, runs, words_for};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::logging::RANGES_MAX;
use proptest::prelude::*;

use super::*;

const P: u64 = 4096;

fn range(iova: u64, length: u64) -> DmaLoggingRange {
    DmaLoggingRange { iova, length }
}

/// A MiB of memory at 0, and its client if it is remote.
fn megabyte() -> GuestMemory {
    let memory = GuestMemory::default();
    memory.map(file(&memfd(256 * P), 0, 256 * P, 0, RW)).unwrap();
    memory
}

/// The runs of dirty pages in a report.
fn report(memory: &GuestMemory, iova: u64, length: u64, page_size: u64) -> Vec<(u64, u64)> {
    let mut words = vec![0; words_for(length.div_ceil(page_size))];
    memory.logging_report(iova, length, page_size, &mut words).unwrap();
    runs(&words).collect()
}

#[test]
fn pages_are_reported_once_and_only_when_logging_is_on() {
    let memory = megabyte();
    memory.write(0, &[1; 10]).unwrap();
    assert_eq!(memory.logging_report(0, P, P, &mut [0]), Err(Errno::EINVAL));
    assert_eq!(memory.logging_check(0, P, P), Err(Errno::EINVAL));
    assert_eq!(memory.logging_stop(), Err(Errno::EINVAL));
    assert_eq!(memory.logging_start(P, &[range(0, 256 * P)]), Ok(P));
    assert_eq!(memory.logging_start(P, &[range(0, 256 * P)]), Err(Errno::EINVAL), "on already");
    assert_eq!(report(&memory, 0, 256 * P, P), []);
    memory.write(3 * P - 1, &[1; 2]).unwrap();
    memory.write(100 * P, &[1; 2 * P as usize]).unwrap();
    memory.read(5 * P, &mut [0; 8]).unwrap();
    assert_eq!(memory.logging_check(0, 256 * P, P), Ok(()));
    assert_eq!(report(&memory, 0, 256 * P, P), [(2, 2), (100, 2)]);
    assert_eq!(report(&memory, 0, 256 * P, P), []);
    memory.write(0, &[1]).unwrap();
    memory.logging_stop().unwrap();
    memory.logging_start(P, &[]).unwrap();
    assert_eq!(report(&memory, 0, 256 * P, P), [], "a new log is clean");
}

#[test]
fn a_report_sets_bits_and_clears_none() {
    let memory = megabyte();
    memory.logging_start(P, &[]).unwrap();
    memory.write(2 * P, &[1]).unwrap();
    let mut words = [0b1001];
    memory.logging_report(0, 64 * P, P, &mut words).unwrap();
    assert_eq!(words, [0b1101]);
}

#[test]
fn hints_between_4_kib_and_1_gib_are_kept() {
    for (hint, chosen) in [(1, P), (512, P), (P, P), (65536, 65536), (1 << 30, 1 << 30), (1 << 31, P)] {
        let memory = GuestMemory::default();
        assert_eq!(memory.logging_start(hint, &[range(0, 1 << 31)]), Ok(chosen), "{hint}");
    }
    for hint in [0, 5000, u64::MAX] {
        assert_eq!(GuestMemory::default().logging_start(hint, &[]), Err(Errno::EINVAL));
    }
}

#[test]
fn a_start_that_is_refused_leaves_logging_off() {
    let memory = megabyte();
    let start = |ranges: &[_]| memory.logging_start(P, ranges).unwrap_err();
    assert_eq!(start(&[range(0, P), range(0, P)]), Errno::EINVAL);
    assert_eq!(start(&[range(1, P)]), Errno::EINVAL);
    assert_eq!(start(&[range(0, 0)]), Errno::EINVAL);
    assert_eq!(start(&[range(u64::MAX - P + 1, 2 * P)]), Errno::EOVERFLOW);
    assert_eq!(start(&vec![range(0, P); RANGES_MAX + 1]), Errno::E2BIG);
    assert_eq!(start(&[range(0, (LOGGED_PAGES_MAX + 1) * P)]), Errno::E2BIG);
    assert_eq!(memory.logging_check(0, P, P), Err(Errno::EINVAL));
    assert_eq!(memory.logging_start(P, &[range(0, LOGGED_PAGES_MAX * P)]), Ok(P));
}

#[test]
fn reports_that_cannot_be_are_refused() {
    let memory = megabyte();
    memory.logging_start(P, &[]).unwrap();
    let report = |iova, length, page_size| {
        let answer = memory.logging_report(iova, length, page_size, &mut [0; 4]);
        assert_eq!(memory.logging_check(iova, length, page_size), answer);
        answer
    };
    for page_size in [0, 1, 2048, 4097, 12288] {
        assert_eq!(report(0, P, page_size), Err(Errno::EINVAL), "{page_size}");
    }
    assert_eq!(report(0, 0, P), Err(Errno::EINVAL));
    assert_eq!(report(u64::MAX, 2, P), Err(Errno::EOVERFLOW));
    assert_eq!(report(0, 256 * P, P), Ok(()));
    assert_eq!(memory.logging_report(0, 256 * P + 1, P, &mut [0; 4]), Err(Errno::EINVAL), "too few words");
    assert_eq!(report(1 << 60, P, P), Ok(()), "not mapped, not written");
}

#[test]
fn only_the_ranges_named_are_logged() {
    let memory = megabyte();
    memory.logging_start(P, &[range(8 * P, 8 * P), range(32 * P, 8 * P)]).unwrap();
    memory.write(0, &[1; 256 * P as usize]).unwrap();
    assert_eq!(report(&memory, 0, 256 * P, P), [(8, 8), (32, 8)]);
}

#[test]
fn everything_means_what_is_mapped_later_too() {
    let (memory, fd) = (megabyte(), memfd(256 * P));
    memory.logging_start(P, &[]).unwrap();
    let far = 1 << 40;
    memory.map(file(&fd, far, 256 * P, 0, RW)).unwrap();
    memory.map(file(&fd, far - 256 * P, 256 * P, 0, RW)).unwrap();
    memory.map(file(&fd, u64::MAX - P + 1, P, 0, RW)).unwrap();
    memory.write(far - P, &[1; 2 * P as usize]).unwrap();
    memory.write(u64::MAX, &[1]).unwrap();
    assert_eq!(report(&memory, far - 2 * P, 4 * P, P), [(1, 2)]);
    memory.unmap(far, 256 * P).unwrap();
    memory.map(file(&fd, far, 256 * P, 0, RW)).unwrap();
    memory.write(far + 5, &[1]).unwrap();
    assert_eq!(report(&memory, far, 256 * P, P), [(0, 1)]);
    let mut words = [0];
    memory.unmap_report(u64::MAX - P + 1, P, P, &mut words).unwrap();
    assert_eq!(words, [1]);
}

#[test]
fn a_map_that_the_log_of_everything_cannot_take_is_refused() {
    let (memory, client) = (GuestMemory::default(), Arc::new(Client::default()));
    memory.logging_start(P, &[]).unwrap();
    assert_eq!(memory.map(remote(&client, 0, (LOGGED_PAGES_MAX + 1) * P)), Err(Errno::E2BIG));
    assert_eq!(memory.map(remote(&client, 0, LOGGED_PAGES_MAX * P)), Ok(()));
    assert_eq!(memory.map(remote(&client, 1 << 60, P)), Err(Errno::E2BIG));
    memory.logging_stop().unwrap();
    assert_eq!(memory.map(remote(&client, 1 << 60, P)), Ok(()));
    assert_eq!(memory.logging_start(P, &[]), Err(Errno::E2BIG));
    assert_eq!(memory.logging_start(2 * P, &[]), Ok(2 * P));
}

#[test]
fn a_page_written_before_an_unmap_is_not_lost() {
    let memory = megabyte();
    memory.logging_start(P, &[range(0, 256 * P)]).unwrap();
    memory.write(7 * P, &[1]).unwrap();
    memory.unmap(0, 256 * P).unwrap();
    assert_eq!(report(&memory, 0, 256 * P, P), [(7, 1)]);
}

#[test]
fn an_unmap_that_reports_is_all_or_nothing() {
    let memory = megabyte();
    let mut words = [0; 4];
    assert_eq!(memory.unmap_report(0, 256 * P, P, &mut words), Err(Errno::EINVAL), "logging is off");
    memory.logging_start(P, &[]).unwrap();
    memory.write(9 * P, &[1]).unwrap();
    assert_eq!(memory.unmap_report(0, P, P, &mut words), Err(Errno::EINVAL), "a part");
    assert_eq!(memory.unmap_report(512 * P, P, P, &mut words), Ok(0), "nothing is there");
    assert_eq!(memory.unmap_report(0, 256 * P, 100, &mut words), Err(Errno::EINVAL));
    assert_eq!(memory.unmap_report(0, 256 * P, P, &mut words[..3]), Err(Errno::EINVAL));
    assert_eq!(words, [0; 4]);
    assert_eq!(memory.unmap_report(0, 256 * P, P, &mut words), Ok(256 * P));
    assert_eq!(words, [1 << 9, 0, 0, 0]);
    assert_eq!(memory.read_obj::<u8>(0), Err(Errno::EFAULT));
}

#[test]
fn writes_by_message_are_logged_even_when_they_fail() {
    let (memory, client) = (GuestMemory::default(), Arc::new(Client::default()));
    client.bytes.lock().unwrap().resize(4 * P as usize, 0);
    memory.map(remote(&client, 0, 4 * P)).unwrap();
    memory.logging_start(P, &[]).unwrap();
    memory.write(P, &[1]).unwrap();
    client.fails.store(true, Ordering::Relaxed);
    assert_eq!(memory.write(3 * P, &[1]), Err(Errno::EIO));
    assert_eq!(report(&memory, 0, 4 * P, P), [(1, 1), (3, 1)]);
}

#[test]
fn a_write_by_message_that_outlasts_a_report_is_in_the_next() {
    struct Reports(Mutex<Option<Arc<GuestMemory>>>);
    impl RemoteMemory for Reports {
        fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
            Ok(())
        }
        fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
            let memory = self.0.lock().unwrap().take().unwrap();
            report(&memory, 0, P, P);
            Ok(())
        }
    }
    let memory = Arc::new(GuestMemory::default());
    let backing = Backing::Remote(Arc::new(Reports(Mutex::new(Some(memory.clone())))));
    memory.map(Mapping { iova: 0, size: P, flags: RW, backing }).unwrap();
    memory.logging_start(P, &[]).unwrap();
    memory.write(0, &[1]).unwrap();
    assert_eq!(report(&memory, 0, P, P), [(0, 1)]);
}

#[test]
fn a_write_to_a_torn_file_is_logged() {
    let (memory, fd) = (GuestMemory::default(), memfd(PAGE));
    memory.map(file(&fd, 0, PAGE, 0, RW)).unwrap();
    memory.logging_start(P, &[]).unwrap();
    ftruncate(&fd, 0).unwrap();
    assert_eq!(memory.write(P, &[1]), Err(Errno::EFAULT));
    assert_eq!(report(&memory, 0, PAGE, P), [(1, 1)]);
}

#[test]
fn no_page_is_lost_between_writers_and_reports() {
    const WRITES: u64 = 20_000;
    let fd = memfd(256 * P);
    let memory = GuestMemory::default();
    memory.map(file(&fd, 0, 256 * P, 0, RW)).unwrap();
    memory.logging_start(P, &[]).unwrap();
    // What a client has: it copies each page that is reported, and at the end must have everything.
    let mut copy = vec![0; 256 * P as usize];
    let take = |copy: &mut [u8]| {
        for (page, pages) in report(&memory, 0, 256 * P, P) {
            let (at, len) = ((page * P) as usize, (pages * P) as usize);
            copy[at..at + len].copy_from_slice(&bytes_of(&fd, at as u64, len));
        }
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2u64)
            .map(|writer| {
                let memory = &memory;
                scope.spawn(move || {
                    for n in 1..=WRITES {
                        let slot = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 47;
                        memory.write_obj((slot % 65536) * 16 + writer * 8, &n).unwrap();
                    }
                })
            })
            .collect();
        while writers.iter().any(|writer| !writer.is_finished()) {
            take(&mut copy);
        }
    });
    take(&mut copy);
    assert!(copy == bytes_of(&fd, 0, 256 * P as usize), "a page was lost");
}

/// The plainest log there can be: which pages of which size are dirty.
struct Plain {
    page_size: u64,
    ranges: Vec<(u64, u64)>,
    dirty: BTreeSet<u64>,
}

impl Plain {
    fn write(&mut self, iova: u64, len: u64) {
        for page in iova / self.page_size..=(iova + len - 1) / self.page_size {
            let at = page * self.page_size;
            if self.ranges.iter().any(|(first, end)| (*first..*end).contains(&at)) {
                self.dirty.insert(page);
            }
        }
    }

    fn report(&mut self, iova: u64, len: u64, page_size: u64, words: &[u64]) {
        for bit in 0..words.len() as u64 * 64 {
            // Byte by byte would be plainest; 512 divides everything here.
            let bytes = (iova + bit * page_size..(iova + (bit + 1) * page_size).min(iova + len)).step_by(512);
            let dirty = bytes.into_iter().any(|byte| self.dirty.contains(&(byte / self.page_size)));
            assert_eq!(get(words, bit), dirty, "bit {bit}");
        }
        let page_size = self.page_size;
        self.dirty.retain(|page| page * page_size < iova || (page + 1) * page_size > iova + len);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64),
    Report(u64, u64, u32),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn any_writes_and_reports_agree_with_the_plainest_log(
        shift in 12u32..17,
        everything in any::<bool>(),
        ops in prop::collection::vec(prop_oneof![
            (0u64..1 << 20, 1u64..40_000).prop_map(|(iova, len)| Op::Write(iova, len.min((1 << 20) - iova))),
            (0u64..2048, 1u64..2048, 12u32..18).prop_map(|(iova, len, shift)| Op::Report(iova * 512, len * 512, shift)),
        ], 1..40),
    ) {
        let memory = megabyte();
        let page_size = 1 << shift;
        let (named, ranges) = if everything {
            (vec![], vec![(0, 1 << 20)])
        } else {
            (vec![range(4 << 16, 1 << 16), range(8 << 16, 3 << 16), range(5 << 16, 1 << 16)],
             vec![(4 << 16, 6 << 16), (8 << 16, 11 << 16)])
        };
        prop_assert_eq!(memory.logging_start(page_size, &named), Ok(page_size));
        let mut plain = Plain { page_size, ranges, dirty: BTreeSet::new() };
        for op in ops {
            match op {
                Op::Write(iova, len) => {
                    memory.write(iova, &vec![1; len as usize]).unwrap();
                    plain.write(iova, len);
                }
                Op::Report(iova, len, shift) => {
                    let mut words = vec![0; words_for(len.div_ceil(1 << shift))];
                    // A look finds all of what is reported, and takes nothing.
                    let mut looked = words.clone();
                    memory.logging_look(iova, len, 1 << shift, &mut looked).unwrap();
                    memory.logging_report(iova, len, 1 << shift, &mut words).unwrap();
                    prop_assert!(words.iter().zip(&looked).all(|(word, looked)| word & !looked == 0));
                    plain.report(iova, len, 1 << shift, &words);
                }
            }
        }
    }
}

#[test]
fn a_look_finds_blocks_of_4096_pages_and_takes_nothing() {
    const GIB: u64 = 1 << 30;
    let memory = GuestMemory::default();
    // 64 MiB of memory at 3 GiB, in a log of 8 GiB.
    memory.map(file(&memfd(64 << 20), 3 * GIB, 64 << 20, 0, RW)).unwrap();
    memory.logging_start(P, &[range(GIB, 8 * GIB)]).unwrap();
    let blocks = || {
        let mut words = [0; 8];
        memory.logging_look(GIB, 8 * GIB, 16 << 20, &mut words).unwrap();
        runs(&words).collect::<Vec<_>>()
    };
    assert!(blocks().is_empty());
    memory.write(3 * GIB + 4096, &[1]).unwrap();
    memory.write(3 * GIB + (48 << 20) - 1, &[1, 1]).unwrap();
    assert_eq!(blocks(), [(128, 1), (130, 2)]);
    assert_eq!(blocks(), [(128, 1), (130, 2)], "nothing is taken");
    let mut words = vec![0; 64];
    memory.logging_report(3 * GIB, 16 << 20, P, &mut words).unwrap();
    assert_eq!(count(&words), 1);
    assert_eq!(blocks(), [(130, 2)], "a block that was reported is clean");
    for (iova, length, page_size) in [(0, 0, P), (0, P, 2048), (u64::MAX, P, P)] {
        assert!(memory.logging_look(iova, length, page_size, &mut [0; 1]).is_err());
    }
    memory.logging_stop().unwrap();
    assert_eq!(memory.logging_look(GIB, GIB, 16 << 20, &mut [0; 1]), Err(Errno::EINVAL), "no log");
}

#[test]
fn reports_in_pieces_are_the_report_of_the_whole() {
    let memory = megabyte();
    memory.logging_start(P, &[]).unwrap();
    memory.write(3 * P, &[1; 100 * P as usize]).unwrap();
    let pieces: u64 = (0..256 / 64)
        .map(|piece| {
            let mut words = [0];
            memory.logging_report(piece * 64 * P, 64 * P, P, &mut words).unwrap();
            count(&words)
        })
        .sum();
    assert_eq!(pieces, 100);
}
