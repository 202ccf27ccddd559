//! What the saved-state format costs a bulk section: its checksum, beside a copy of the same bytes.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use limosa_device::saved::{Reader, Section, Writer};

const BULK: Section = Section::bulk("memory", 1, 1 << 20);

fn bulk(c: &mut Criterion) {
    let mut group = c.benchmark_group("1 MiB of bulk payload");
    let payload = vec![0x5a; 1 << 20];
    group.throughput(Throughput::Bytes(payload.len() as u64));
    let mut copy = vec![0; payload.len()];
    group.bench_function("memcpy", |b| b.iter(|| black_box(&mut copy).copy_from_slice(black_box(&payload))));
    let mut writer = Writer::new("bench");
    group.bench_function("lend", |b| {
        b.iter(|| {
            writer.begin(&BULK, 0, payload.len() as u64);
            writer.take(usize::MAX);
            writer.lend(black_box(&payload));
        });
    });
    let mut writer = Writer::new("bench");
    let mut reader = Reader::new("bench", &[BULK], u64::MAX);
    group.bench_function("lend and push", |b| {
        b.iter(|| {
            writer.begin(&BULK, 0, payload.len() as u64);
            reader.push(writer.take(usize::MAX), |_| Ok(())).expect("push");
            writer.lend(black_box(&payload));
            reader.push(&payload, |_| Ok(())).expect("push");
        });
    });
    group.finish();
}

criterion_group!(benches, bulk);
criterion_main!(benches);
