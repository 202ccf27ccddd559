//! What guest memory costs: a device's write beside the bare copy, with logging off and on, and a report of a log.

use std::cell::RefCell;
use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use limosa_device::{Backing, Irq, Mapping, Mappings, RemoteMemory, SetIrqs, Wiring};
use limosa_protocol::Errno;
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::{DmaMapFlags, IrqFlags};
use limosa_testing::memfd;
use rustix::event::{EventfdFlags, eventfd};

const PAGE: u64 = 4096;
/// Small enough for a cache, so that what is measured is not the memory.
const WINDOW: u64 = 64 * PAGE;

fn memory(bytes: u64) -> Mappings {
    let memory = Mappings::default();
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    let backing = Backing::File { fd: OwnedFd::from(memfd(bytes)).into(), offset: 0 };
    memory.map(Mapping { iova: 0, size: bytes, flags, backing }).expect("map");
    memory
}

fn writes(c: &mut Criterion) {
    for len in [8, 64, 4096] {
        let mut group = c.benchmark_group(format!("write {len} B"));
        let data = vec![0x5a; len];
        let mut target = vec![0; WINDOW as usize];
        // Every write to the next page, and no two runs on the same marks.
        let step = |at: &mut u64| {
            *at = (*at + PAGE) % (WINDOW - PAGE);
            *at
        };
        group.bench_function("memcpy", |b| {
            let mut at = 0;
            b.iter(|| {
                let at = step(&mut at) as usize;
                black_box(&mut target[at..at + len]).copy_from_slice(black_box(&data));
            });
        });
        let mappings = memory(WINDOW);
        let memory = mappings.dma();
        group.bench_function("logging off", |b| {
            let mut at = 0;
            b.iter(|| memory.write(step(&mut at), black_box(&data)));
        });
        mappings.logging_start(PAGE, &[DmaLoggingRange { iova: 0, length: WINDOW }]).expect("start");
        group.bench_function("logging on, page dirty already", |b| {
            let mut at = 0;
            b.iter(|| memory.write(step(&mut at), black_box(&data)));
        });
        // 64 writes a run, each to a page of its own; without logging for comparison.
        let write_all =
            || (0..WINDOW / PAGE).for_each(|page| memory.write(page * PAGE, &data).expect("write"));
        let report = || mappings.logging_report(0, WINDOW, PAGE, &mut [0]).expect("report");
        group.bench_function("logging on, 64 clean pages", |b| {
            b.iter_batched(report, |()| write_all(), BatchSize::PerIteration);
        });
        mappings.logging_stop().expect("stop");
        group.bench_function("logging off, 64 pages", |b| {
            b.iter_batched(|| (), |()| write_all(), BatchSize::PerIteration);
        });
        group.finish();
    }
}

fn reports(c: &mut Criterion) {
    const SPAN: u64 = 64 << 30;
    const PIECE: u64 = 1 << 30;
    let mut group = c.benchmark_group("report 64 GiB at 4 KiB");
    let mut words = vec![0u64; (SPAN / PAGE / 64) as usize];
    for (name, every) in [("clean", 0), ("1 % dirty", 100), ("all dirty", 1)] {
        let dirty = Mappings::default();
        let dma = dirty.dma();
        let backing = Backing::Remote(Arc::new(Swallows));
        dirty.map(Mapping { iova: 0, size: SPAN, flags: DmaMapFlags::WRITE, backing }).expect("map");
        dirty.logging_start(PAGE, &[DmaLoggingRange { iova: 0, length: SPAN }]).expect("start");
        let mark = || {
            if every == 1 {
                let data = [0u8; 1 << 20];
                (0..SPAN >> 20).for_each(|mib| dma.write(mib << 20, &data).expect("write"));
            } else if every > 1 {
                (0..SPAN / PAGE).step_by(every).for_each(|page| dma.write(page * PAGE, &[0]).expect("write"));
            }
        };
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                mark,
                |()| dirty.logging_report(0, SPAN, PAGE, &mut words).expect("report"),
                BatchSize::PerIteration,
            );
        });
        group.bench_function(format!("{name}, in pieces of 1 GiB"), |b| {
            b.iter_batched_ref(
                mark,
                |()| {
                    for (piece, words) in words.chunks_exact_mut((PIECE / PAGE / 64) as usize).enumerate() {
                        dirty.logging_report(piece as u64 * PIECE, PIECE, PAGE, words).expect("report");
                    }
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// Memory that takes every write and keeps nothing: only the log is of interest.
struct Swallows;

impl RemoteMemory for Swallows {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
}

/// So many vectors, each with an eventfd of its own.
fn wired(count: u32) -> Wiring {
    let wiring = Wiring::new(&[Irq { flags: IrqFlags::EVENTFD, count }]);
    let fd = |_| Some(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd").into());
    wiring.set(0, 0, SetIrqs::Wire((0..count).map(fd).collect())).expect("they are there");
    wiring
}

/// Each of several threads with a window of its own, as the queues of a device have: nanoseconds for one access of each
/// thread. While threads have cores of their own, the figure stays the same.
fn threads(c: &mut Criterion) {
    const OPS: u64 = 20_000;
    for (len, raises) in [(8, false), (4096, false), (64, true)] {
        let name = if raises { "threads write and raise a vector" } else { "threads write" };
        let mut group = c.benchmark_group(format!("{name}, {len} B, logging on"));
        for threads in [1, 2, 4] {
            let mappings = memory(threads * WINDOW);
            mappings
                .logging_start(PAGE, &[DmaLoggingRange { iova: 0, length: threads * WINDOW }])
                .expect("start");
            let time = |access: &(dyn Fn(u64, u64, &[u8]) + Sync), rounds: u64| {
                let (start, data) = (Barrier::new(threads as usize), vec![0x5a; len]);
                let work = |thread: u64| {
                    start.wait();
                    let since = Instant::now();
                    for n in 0..rounds * OPS {
                        access(thread, n * PAGE % (WINDOW - PAGE), &data);
                    }
                    since.elapsed()
                };
                let elapsed = std::thread::scope(|scope| {
                    let workers: Vec<_> =
                        (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
                    workers.into_iter().map(|worker| worker.join().expect("no panic")).max()
                });
                elapsed.expect("at least one") / OPS as u32
            };
            let dma = mappings.dma();
            let wiring = wired(threads as u32);
            let vectors: Vec<_> = (0..threads as u32)
                .map(|at| wiring.interrupts().vector(0, at).expect("it is there").clone())
                .collect();
            group.bench_function(format!("{threads}"), |b| {
                b.iter_custom(|rounds| {
                    let access = |thread: u64, at, data: &[u8]| {
                        dma.write(thread * WINDOW + at, data).expect("write");
                        if raises {
                            vectors[thread as usize].raise();
                        }
                    };
                    time(&access, rounds)
                });
            });
            // The floor: the same copies by each thread.
            group.bench_function(format!("{threads}, memcpy"), |b| {
                b.iter_custom(|rounds| {
                    time(&|_, at, data| {
                        thread_local!(static TARGET: RefCell<Vec<u8>> = RefCell::new(vec![0; WINDOW as usize]));
                        TARGET.with_borrow_mut(|target| {
                            black_box(&mut target[at as usize..][..data.len()]).copy_from_slice(black_box(data));
                        });
                    }, rounds)
                });
            });
        }
        group.finish();
    }
    let mut group = c.benchmark_group("mark");
    let mappings = memory(WINDOW);
    mappings.logging_start(PAGE, &[DmaLoggingRange { iova: 0, length: WINDOW }]).expect("start");
    let dma = mappings.dma();
    group.bench_function("a page dirty already", |b| b.iter(|| dma.mark_dirty(black_box(PAGE), 8)));
    group.bench_function("pin and drop 4 KiB", |b| {
        b.iter(|| dma.pin(black_box(PAGE), PAGE, DmaMapFlags::WRITE).expect("pin"));
    });
    group.finish();
}

criterion_group!(benches, writes, threads, reports);
criterion_main!(benches);
