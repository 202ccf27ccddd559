//! What a device and its machine cost without any transport: a register read, and 1 MiB of session
//! data lent and received, beside a copy of as much.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use limosa_client::{Device, DeviceExt};
use limosa_device::{Loopback, Machine, Save, SessionId};
use limosa_models::synthetic::{Synthetic, registers};
use limosa_protocol::State;

const CHUNK: usize = 1 << 20;

fn device(config: &str) -> Loopback {
    let model = Synthetic::new(config.parse().expect("a configuration")).expect("a device");
    Loopback::new("synthetic", Machine::simple(model))
}

fn open(device: &Loopback, state: State) -> SessionId {
    device.reset().expect("a reset");
    device.set_state(state).expect("the state");
    device.machine().session().expect("a session")
}

fn registers(c: &mut Criterion) {
    let device = device("state=1M");
    let mut data = [0; 8];
    c.bench_function("read 8 bytes", |b| {
        b.iter(|| device.machine().region_read(0, registers::SCRATCH, black_box(&mut data)));
    });
}

fn data(c: &mut Criterion) {
    let mut group = c.benchmark_group("1 MiB of session data");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    let mut into = vec![0; CHUNK];

    let source = device("state=256M,verify=off");
    let whole: Vec<u8> = {
        let mut stream = source.set_state(State::StopCopy).expect("the state").expect("a stream");
        let (mut all, mut data) = (Vec::new(), vec![0; CHUNK]);
        while let Ok(limosa_client::Chunk::Data(bytes)) = stream.read(&mut data) {
            all.extend_from_slice(&data[..bytes]);
        }
        all
    };
    group.bench_function("copy", |b| b.iter(|| into.copy_from_slice(black_box(&whole[..CHUNK]))));

    let mut session = open(&source, State::StopCopy);
    group.bench_function("lend", |b| {
        b.iter(|| {
            let more = source.machine().data_read(session, CHUNK, |save| {
                black_box(&save);
                matches!(save, Save::Data(_))
            });
            if more != Ok(true) {
                session = open(&source, State::StopCopy);
            }
        });
    });

    for verify in ["off", "on"] {
        let destination = device(&format!("state=256M,verify={verify}"));
        let mut session = open(&destination, State::Resuming);
        let (mut at, mut spare) = (0, Vec::new());
        group.bench_function(format!("receive by a copy, verify={verify}"), |b| {
            b.iter_batched(
                || {
                    if at + CHUNK > whole.len() {
                        session = open(&destination, State::Resuming);
                        at = 0;
                    }
                    at += CHUNK;
                    (session, at - CHUNK)
                },
                |(session, mut from)| {
                    let end = from + CHUNK;
                    while from < end {
                        let filled =
                            destination.machine().data_fill(session, end - from, &mut spare, |piece| {
                                piece.copy_from_slice(&whole[from..from + piece.len()]);
                                Ok::<_, ()>(piece.len())
                            });
                        from += filled.expect("a copy does not fail").expect("it loads");
                    }
                },
                BatchSize::PerIteration,
            );
        });
    }
}

criterion_group!(benches, registers, data);
criterion_main!(benches);
