//! What dirty bitmaps cost: marking a page, and whole bitmaps of 64 GiB at 4 KiB pages.

#![allow(missing_docs, reason = "criterion's macros")]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use limosa_protocol::bitmap::{DirtyBitmap, Grid, count, regranulate, runs, words_for};

const PAGES: u64 = (64 << 30) / 4096;

fn marking(c: &mut Criterion) {
    let mut group = c.benchmark_group("mark");
    let bitmap = DirtyBitmap::new(PAGES).expect("2 MiB");
    // A stride that is no power of two, within what the caches hold.
    let mut page = 0;
    let mut next = move || {
        page = (page + 12345) % (1 << 17);
        page
    };
    group.bench_function("set", |b| b.iter(|| bitmap.set(black_box(next()))));
    group.bench_function("set_range_locked, marked before", |b| {
        b.iter(|| bitmap.set_range_locked(black_box(next()), 1));
    });
    group.bench_function("set_range, 2 MiB", |b| b.iter(|| bitmap.set_range(black_box(next()), 512)));
    group.finish();
}

fn pattern(permille: u64) -> Vec<u64> {
    let mut words = vec![0u64; words_for(PAGES)];
    let mut seed = 1u64;
    for page in 0..PAGES {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        if (seed >> 33) % 1000 < permille {
            words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }
    words
}

fn whole(c: &mut Criterion) {
    for (density, permille) in [("clean", 0), ("1 %", 10), ("12.5 %", 125), ("100 %", 1000)] {
        let mut group = c.benchmark_group(format!("64 GiB at 4 KiB, {density} dirty"));
        let words = pattern(permille);
        let mut bitmap = DirtyBitmap::new(PAGES).expect("2 MiB");
        let mut out = vec![0u64; words_for(PAGES)];
        group.bench_function("harvest", |b| {
            b.iter_custom(|times| {
                (0..times)
                    .map(|_| {
                        bitmap.or_words(0, &words, PAGES);
                        let start = std::time::Instant::now();
                        bitmap.harvest(0, PAGES, black_box(&mut out));
                        start.elapsed()
                    })
                    .sum::<Duration>()
            });
        });
        group.bench_function("harvest_exclusive", |b| {
            b.iter_custom(|times| {
                (0..times)
                    .map(|_| {
                        bitmap.or_words(0, &words, PAGES);
                        let start = std::time::Instant::now();
                        bitmap.harvest_exclusive(0, PAGES, black_box(&mut out));
                        start.elapsed()
                    })
                    .sum::<Duration>()
            });
        });
        group.bench_function("count", |b| b.iter(|| count(black_box(&words))));
        group.bench_function("runs", |b| b.iter(|| runs(black_box(&words)).map(|(_, len)| len).sum::<u64>()));
        let small = Grid { iova: 0, page_size: 4096 };
        for (name, kib) in [("16 KiB", 16), ("2 MiB", 2048)] {
            let large = Grid { iova: 0, page_size: kib << 10 };
            let mut coarse = vec![0; words_for((64 << 30) / large.page_size)];
            group.bench_function(format!("to {name} pages"), |b| {
                b.iter(|| regranulate(&words, small, black_box(&mut coarse), large, 0, 64 << 30));
            });
            group.bench_function(format!("from {name} pages"), |b| {
                let fresh = || vec![0; words_for(PAGES)];
                b.iter_batched_ref(
                    fresh,
                    |fine| regranulate(&coarse, large, fine, small, 0, 64 << 30),
                    BatchSize::LargeInput,
                );
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300)).sample_size(20);
    targets = marking, whole
}
criterion_main!(benches);
