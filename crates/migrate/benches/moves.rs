//! How fast the engine moves device state and guest memory, beside the bare socket that carries it:
//! pieces of 1 MiB through a UNIX socket pair.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use limosa_client::Device;
use limosa_device::{Loopback, Machine};
use limosa_migrate::{
    Destination, FilePages, GuestPages, Ledger, Memory, MemoryRegion, MovedDevice, Options, Outcome, Source,
    move_local,
};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_testing::memfd;

const BYTES: u64 = 256 << 20;

fn bare_socket() {
    let (mut near, mut far) = UnixStream::pair().expect("a socket pair");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let piece = vec![0x5a; 1 << 20];
            (0..BYTES / piece.len() as u64).for_each(|_| near.write_all(&piece).expect("the far end reads"));
        });
        let mut piece = vec![0; 1 << 20];
        (0..BYTES / piece.len() as u64)
            .for_each(|_| far.read_exact(&mut piece).expect("the near end writes"));
    });
}

fn device(state: u64) -> Loopback {
    let config = format!("state={state},block=1M,verify=off,pre-copy=off").parse::<SyntheticConfig>();
    let model = Synthetic::new(config.expect("right")).expect("right");
    Loopback::new("synthetic", Machine::simple(model))
}

fn memory(fill: u8) -> FilePages {
    let file = memfd(BYTES);
    let pages = FilePages::new(file, 0);
    let piece = vec![fill; 1 << 20];
    (0..BYTES).step_by(piece.len()).for_each(|at| pages.write(at, &piece).expect("room"));
    pages
}

fn move_once(source: &Loopback, destination: &Loopback, memory: Option<(&FilePages, &FilePages)>) {
    let (options, ledger) = (Options::default(), Ledger::new());
    let (ours, theirs) = ([MovedDevice::new(source)], [MovedDevice::new(destination)]);
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: BYTES, pages };
    let here = memory.map(|(here, _)| region(here)).into_iter().collect();
    let there: Vec<_> = memory.map(|(_, there)| region(there)).into_iter().collect();
    let (outcome, _) = move_local(
        Source::new(&ours, &options).with_memory(Memory::stopped(here)),
        Destination::new(&theirs, &ledger, &options).with_memory(&there),
    );
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    source.reset().expect("a reset");
    destination.reset().expect("a reset");
}

fn moves(c: &mut Criterion) {
    let mut group = c.benchmark_group("move");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(BYTES));
    group.bench_function("bare socket", |b| b.iter(bare_socket));
    let (source, destination) = (device(BYTES), device(BYTES));
    group.bench_function("device state", |b| b.iter(|| move_once(&source, &destination, None)));
    let (source, destination) = (device(1 << 20), device(1 << 20));
    let (full, empty) = (memory(1), memory(0));
    group.bench_function("memory", |b| b.iter(|| move_once(&source, &destination, Some((&full, &empty)))));
    let zeroes = memory(0);
    group.bench_function("memory of zeroes", |b| {
        b.iter(|| move_once(&source, &destination, Some((&zeroes, &empty))));
    });
    group.finish();
    c.bench_function("a device of 1 MiB, all of the move", |b| {
        b.iter(|| move_once(&source, &destination, None))
    });
}

criterion_group!(benches, moves);
criterion_main!(benches);
