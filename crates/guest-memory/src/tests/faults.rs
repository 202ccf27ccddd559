//! What holds for pages that are not there.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::sigbus::tear;

fn bytes_of(fd: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    assert_eq!(rustix::io::pread(fd, &mut bytes, offset).unwrap(), len);
    bytes
}

/// Reads a range, with a fault at an offset of it in the midst: what the handler does for a page that cannot be had.
fn read_with_faults(mapping: &FileMapping, offset: u64, bytes: usize, at: &[usize]) -> Result<(), Errno> {
    mapping.access(true, offset, bytes, |from| {
        at.iter().for_each(|at| assert!(tear(from.addr() + at)));
    })
}

/// How many mappings the kernel has of files with this name, and of anonymous memory between the first and the last of them.
fn kernel_mappings(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let lines: Vec<_> = maps.lines().collect();
    let is_ours = |line: &&str| line.contains(name);
    let first = lines.iter().position(is_ours).expect("it is mapped");
    lines.iter().rposition(is_ours).unwrap() - first + 1
}

#[test]
fn one_bad_page_failed_all_of_a_mapping_for_good() {
    let fd = memfd_named("one-bad-page", 4 * PAGE);
    let mapping = FileMapping::new(&fd, 0, 4 * PAGE, true, true).unwrap();
    mapping.write(0, &vec![7; 4 * PAGE as usize]).unwrap();
    assert_eq!(read_with_faults(&mapping, PAGE, 100, &[50]), Err(Errno::EFAULT));
    assert_eq!(kernel_mappings("one-bad-page"), 1, "mapped as before");
    let mut data = vec![0; 4 * PAGE as usize];
    mapping.read(0, &mut data).unwrap();
    assert!(data.iter().all(|byte| *byte == 7), "it is there again");
    mapping.write(PAGE, &[8; 2]).unwrap();
    assert_eq!(bytes_of(&fd, PAGE, 2), [8, 8]);
}

#[test]
fn a_fault_fails_the_accesses_to_its_page_and_no_other() {
    let fd = memfd(4 * PAGE);
    let mapping = FileMapping::new(&fd, 0, 4 * PAGE, true, true).unwrap();
    mapping.write(0, &vec![7; 4 * PAGE as usize]).unwrap();
    // While one access is under way, another thread's faults.
    let beside = |offset: u64, bytes: usize, fault_at: u64| {
        mapping.access(true, offset, bytes, |_| {
            let other = || read_with_faults(&mapping, fault_at, 8, &[0]);
            assert_eq!(std::thread::scope(|scope| scope.spawn(other).join().unwrap()), Err(Errno::EFAULT));
        })
    };
    assert_eq!(beside(0, 4096, PAGE), Ok(()));
    assert_eq!(beside(2 * PAGE, 4096, PAGE), Ok(()));
    assert_eq!(beside(PAGE, 4096, PAGE), Err(Errno::EFAULT), "it saw zeros, or wrote to nowhere");
    assert_eq!(beside(PAGE - 8, 16, PAGE), Err(Errno::EFAULT));
    // A cover that is still there is none for whom begins now.
    mapping
        .access(true, 0, 8, |from| {
            assert!(tear(from.addr()));
            let other = || {
                let mut data = [0; 8];
                (mapping.read(0, &mut data), data)
            };
            let seen = std::thread::scope(|scope| scope.spawn(other).join().unwrap());
            assert_eq!(seen, (Ok(()), [7; 8]));
        })
        .unwrap_err();
}

#[test]
fn faults_without_number_split_no_mappings() {
    let fd = memfd_named("without-number", 1000 * 4096);
    let mapping = FileMapping::new(&fd, 0, 1000 * 4096, true, true).unwrap();
    let every_other: Vec<_> = (0..500).map(|page| page * 8192).collect();
    let outcome = mapping.access(true, 0, 1000 * 4096, |from| {
        every_other.iter().for_each(|at| assert!(tear(from.addr() + at)));
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let pieces = maps.lines().filter(|line| line.contains("without-number")).count();
        assert!(pieces < 70, "{pieces}");
    });
    assert_eq!(outcome, Err(Errno::EFAULT));
    mapping.write(0, &vec![5; 1000 * 4096]).unwrap();
    assert_eq!(kernel_mappings("without-number"), 1);
    assert!(bytes_of(&fd, 0, 1000 * 4096).iter().all(|byte| *byte == 5));
    // An access during which the list lost covers does not know any more, and fails.
    let outcome = mapping.access(true, 999 * 4096, 8, |_| {
        for page in 0..100 {
            assert_eq!(read_with_faults(&mapping, page * 4096, 8, &[0]), Err(Errno::EFAULT));
        }
    });
    assert_eq!(outcome, Err(Errno::EFAULT));
}

#[test]
fn a_file_that_is_truncated_and_extended_again_is_whole_again() {
    let fd = memfd_named("extended-again", 4 * PAGE);
    let mapping = FileMapping::new(&fd, 0, 4 * PAGE, true, true).unwrap();
    let other = FileMapping::new(&fd, PAGE, PAGE, true, false).unwrap();
    mapping.write(0, &vec![7; 4 * PAGE as usize]).unwrap();
    for _ in 0..3 {
        ftruncate(&fd, PAGE).unwrap();
        assert_eq!(mapping.read(0, &mut [0; 4]), Ok(()), "what is left is left");
        assert_eq!(mapping.write(PAGE, &vec![1; 3 * PAGE as usize]), Err(Errno::EFAULT));
        assert_eq!(mapping.read(3 * PAGE, &mut [0; 8]), Err(Errno::EFAULT));
        assert_eq!(other.read(0, &mut [0; 8]), Err(Errno::EFAULT));
        assert_eq!(mapping.write(0, &[7; 64]), Ok(()));
        ftruncate(&fd, 4 * PAGE).unwrap();
        let mut data = [1; 8];
        assert_eq!((mapping.read(PAGE, &mut data), data), (Ok(()), [0; 8]), "the file's own zeros");
        assert_eq!(other.read(0, &mut data), Ok(()));
        assert_eq!(mapping.write(PAGE, &vec![7; 3 * PAGE as usize]), Ok(()));
        assert!(bytes_of(&fd, 0, 4 * PAGE as usize).iter().all(|byte| *byte == 7));
    }
}

/// Nobody takes zeros for memory: a thread that reads while pages go and come again reads what was written, or an error.
#[test]
fn pages_that_come_and_go_under_many_threads() {
    let fd = memfd(64 * PAGE);
    let mapping = FileMapping::new(&fd, 0, 64 * PAGE, true, true).unwrap();
    mapping.write(0, &vec![0xaa; 64 * PAGE as usize]).unwrap();
    let (is_over, whole) = (AtomicBool::new(false), AtomicU64::new(0));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (mapping, is_over, whole) = (&mapping, &is_over, &whole);
            scope.spawn(move || {
                let mut data = vec![0; 3 * PAGE as usize];
                while !is_over.load(Ordering::Relaxed) {
                    if mapping.read(thread * 8 * PAGE, &mut data).is_ok() {
                        assert!(data.iter().all(|byte| *byte == 0xaa), "zeros taken for memory");
                        whole.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        // The same path as a fault: covers come and go in the ranges that are read. On a busy machine the readers may begin late.
        for round in 0u64.. {
            if round >= 2000 && whole.load(Ordering::Relaxed) > 0 || begun.elapsed() > Duration::from_secs(60)
            {
                break;
            }
            let at = round * 13 % 64 * PAGE;
            assert_eq!(read_with_faults(&mapping, at, 4096, &[0]), Err(Errno::EFAULT));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert!(whole.into_inner() > 0);
    let mut data = vec![0; 64 * PAGE as usize];
    mapping.read(0, &mut data).unwrap();
    assert!(data.iter().all(|byte| *byte == 0xaa));
}

#[test]
fn huge_pages_that_cannot_be_had_fail_their_access() {
    let Ok(fd) = memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB) else {
        eprintln!("this kernel has no huge pages");
        return;
    };
    const HUGE: u64 = 1 << 21;
    ftruncate(&fd, 4 * HUGE).unwrap();
    let files = MappedFiles::default();
    // A window of the whole file, for which nothing is set aside.
    let fd = ForeignFd::harmless(fd);
    let mapping = match files.map(fd, HUGE + 5, 100, (true, true), false) {
        Ok(mapping) => mapping,
        Err(errno) => return assert_eq!(errno, Errno::ENOMEM),
    };
    // Where the system has none to give, the access fails, each time, and the process lives.
    for _ in 0..2 {
        let mut data = [1; 100];
        match mapping.read(0, &mut data) {
            Ok(()) => assert_eq!(data, [0; 100]),
            Err(errno) => assert_eq!(errno, Errno::EFAULT),
        }
    }
}
