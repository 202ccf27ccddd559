//! What holds for the lock.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Barrier, mpsc};

use super::*;

/// Numbers that a writer changes one after the other, without anything atomic: a reader that is inside with a writer sees some
/// that differ.
struct Same(UnsafeCell<[u64; 16]>);

// SAFETY: that this is sound is what the tests are about.
unsafe impl Sync for Same {}

impl Same {
    fn new() -> ManyReaders<Same> {
        ManyReaders::new(Same(UnsafeCell::new([0; 16])))
    }

    fn read(&self) -> u64 {
        // SAFETY: the caller has a read guard.
        let numbers = unsafe { self.0.get().read_volatile() };
        assert!(numbers.iter().all(|number| *number == numbers[0]), "{numbers:?}");
        numbers[0]
    }

    fn raise(&mut self) -> u64 {
        for number in self.0.get_mut() {
            // SAFETY: a plain write that the compiler leaves where it is.
            unsafe { (&raw mut *number).write_volatile(*number + 1) };
        }
        self.0.get_mut()[0]
    }
}

/// Readers until a number of writes is done, in so many threads, with membarrier and without; returns how often they read.
fn readers_and_writers(readers: usize, writers: u64, writes: u64) -> u64 {
    let lock = Same::new();
    let by_fences = ManyReaders::with(Same(UnsafeCell::new([0; 16])), false);
    run(&by_fences, readers, writers, writes) + run(&lock, readers, writers, writes)
}

fn run(lock: &ManyReaders<Same>, readers: usize, writers: u64, writes: u64) -> u64 {
    let (is_over, start) = (AtomicBool::new(false), Barrier::new(readers + writers as usize));
    let reads = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..readers)
            .map(|_| {
                let (is_over, start) = (&is_over, &start);
                scope.spawn(move || {
                    start.wait();
                    let (mut reads, mut before) = (0, 0);
                    while !is_over.load(Relaxed) || reads == 0 {
                        let now = lock.read().read();
                        assert!(now >= before, "a change was taken back");
                        (before, reads) = (now, reads + 1);
                    }
                    reads
                })
            })
            .collect();
        let writers: Vec<_> = (0..writers)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    for _ in 0..writes {
                        lock.write().raise();
                    }
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        is_over.store(true, Relaxed);
        readers.into_iter().map(|reader| reader.join().unwrap()).sum()
    });
    assert_eq!(lock.read().read(), writers * writes, "a change was lost");
    reads
}

#[test]
fn readers_and_writers_are_never_inside_together() {
    assert!(readers_and_writers(2, 1, 300) > 0);
    assert!(readers_and_writers(3, 3, 100) > 0);
    assert_eq!(readers_and_writers(0, 4, 2000), 0);
}

#[test]
fn threads_beyond_those_with_a_counter_of_their_own_share_one() {
    assert!(readers_and_writers(100, 2, 20) >= 100);
}

#[test]
fn a_counter_goes_to_another_thread_when_its_own_has_ended() {
    let lock = Same::new();
    for round in 0..300 {
        let read = std::thread::scope(|scope| scope.spawn(|| lock.read().read()).join().unwrap());
        assert_eq!(read, round);
        lock.write().raise();
    }
}

#[test]
fn a_writer_waits_for_the_last_reader_and_readers_for_it() {
    let lock = Arc::new(Same::new());
    let order = Arc::new(AtomicU64::new(0));
    let first = lock.read();
    std::thread::scope(|scope| {
        let (inside, entered) = mpsc::channel();
        let (wait, go_on) = mpsc::channel::<()>();
        let (writing, seen) = (&lock, &order);
        scope.spawn(move || {
            let mut write = writing.write();
            assert_eq!(seen.load(Relaxed), 1, "the reader was still inside");
            inside.send(()).unwrap();
            go_on.recv().unwrap();
            write.raise();
            seen.store(2, Relaxed);
        });
        let (reading, seen) = (&lock, &order);
        seen.store(1, Relaxed);
        drop(first);
        entered.recv().unwrap();
        let reader = scope.spawn(move || (reading.read().read(), seen.load(Relaxed)));
        wait.send(()).unwrap();
        assert_eq!(reader.join().unwrap(), (1, 2), "it read before the writer was done");
    });
}

#[test]
fn a_panic_inside_leaves_the_lock_usable() {
    let lock = Same::new();
    let panics = |inside: &(dyn Fn() + Sync)| {
        std::thread::scope(|scope| scope.spawn(inside).join().unwrap_err());
    };
    panics(&|| {
        let _guard = lock.read();
        panic!("as a reader");
    });
    panics(&|| {
        let _guard = lock.write();
        panic!("as a writer");
    });
    panics(&|| {
        let _guard = lock.read();
        drop(lock.read());
        // Threads that share a counter are not told apart, and other tests may have all the others.
        panic!("as a reader with a counter that is shared");
    });
    assert_eq!(lock.write().raise(), 1);
    assert_eq!(lock.read().read(), 1);
}
