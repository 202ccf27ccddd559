//! How fast guest memory moves: the engine beside the floor, plain send and recv of as many bytes over as many TCP
//! sockets, in turns and in one process, each socket's ends with a thread of its own. Memory is faulted in, and none of
//! it is zero. Prints throughput and CPU time, both sides together, as ratios to the floor's next to them.
//!
//! `cargo bench -p limosa-migrate --bench memory -- [MIB [LINKS [RUNS]]]`

use std::io::{Read, Write};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use limosa_migrate::link::{Link, LinkError, Listener, SocketLink, Wait, connect};
use limosa_migrate::{
    Destination, FilePages, GuestPages, Ledger, Memory, MemoryRegion, Options, Outcome, Received, Source,
};
use limosa_testing::memfd;
use rustix::time::{ClockId, clock_gettime};

const PIECE_BYTES: usize = 1 << 20;
/// The floor goes round in so much memory: more than caches hold.
const FLOOR_BYTES: usize = 512 << 20;
const SOON: Duration = Duration::from_secs(30);

/// What it took, in seconds.
#[derive(Clone, Copy)]
struct Cost {
    wall: f64,
    cpu: f64,
}

fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn timed(run: impl FnOnce()) -> Cost {
    let (began, before) = (Instant::now(), cpu());
    run();
    Cost { wall: began.elapsed().as_secs_f64(), cpu: cpu() - before }
}

/// Bytes that look random, and no page of them zero.
fn fill(bytes: &mut [u8], mut seed: u64) {
    for word in bytes.as_chunks_mut::<8>().0 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        *word = seed.to_le_bytes();
    }
}

/// Guest memory that is faulted in.
fn memory(bytes: u64, seed: u64) -> FilePages {
    let file = memfd(bytes);
    let pages = FilePages::mapped(file, 0, bytes).expect("room");
    let mut piece = vec![0; PIECE_BYTES];
    for at in (0..bytes).step_by(PIECE_BYTES) {
        fill(&mut piece, seed + at);
        pages.write(at, &piece).expect("room");
    }
    pages
}

fn listener() -> Listener {
    Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("a port")
}

/// Plain send and recv.
fn floor(bytes: usize, links: usize, from: &[u8], to: &mut [u8]) -> Cost {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let pairs: Vec<_> = (0..links)
        .map(|_| {
            let near = std::net::TcpStream::connect(address).expect("listening");
            (near, listener.accept().expect("connected").0)
        })
        .collect();
    let share = bytes / links;
    let (from_share, to_share) = (from.len() / links, to.len() / links);
    timed(|| {
        std::thread::scope(|scope| {
            let memory = from.chunks(from_share).zip(to.chunks_mut(to_share));
            for ((mut near, mut far), (from, to)) in pairs.into_iter().zip(memory) {
                scope.spawn(move || {
                    let pieces = from.chunks_exact(PIECE_BYTES).cycle();
                    pieces.take(share / PIECE_BYTES).for_each(|piece| near.write_all(piece).expect("sent"));
                });
                scope.spawn(move || {
                    for at in 0..share / PIECE_BYTES {
                        let at = at % (to.len() / PIECE_BYTES) * PIECE_BYTES;
                        far.read_exact(&mut to[at..at + PIECE_BYTES]).expect("received");
                    }
                });
            }
        });
    })
}

/// The engine.
fn engine(bytes: u64, links: u32, here: &FilePages, there: &FilePages) -> Cost {
    let options = Options::default().with_links(NonZeroU32::new(links).unwrap_or(NonZeroU32::MIN));
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: bytes, pages };
    let listener = listener();
    let near: SocketLink = connect(listener.address(), SOON).expect("listening");
    let far = listener.accept(Wait::within(SOON, None)).expect("connected");
    timed(|| {
        std::thread::scope(|scope| {
            let (listener, options) = (&listener, &options);
            let receiving = scope.spawn(move || {
                let accept = |wait: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
                    Ok(Box::new(listener.accept(wait)?))
                };
                let ledger = Ledger::new();
                let regions = [region(there)];
                let destination = Destination::new(&[], &ledger, options).with_memory(&regions);
                destination.receive_over(&far, &accept)
            });
            let further = |_: Wait<'_>| -> Result<Box<dyn Link>, LinkError> {
                Ok(Box::new(connect(listener.address(), SOON)?))
            };
            let source = Source::new(&[], options).with_memory(Memory::stopped(vec![region(here)]));
            let outcome = source.send_over(&near, &further);
            drop(near);
            assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
            let received = receiving.join().expect("no panic");
            assert!(matches!(received, Received::Runs(_)), "{received:?}");
        });
    })
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of.get(of.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    let mut numbers = std::env::args().filter_map(|word| word.parse::<u64>().ok());
    let mib = numbers.next().unwrap_or(4096).max(16);
    let only = numbers.next().map(|links| links.clamp(1, 16) as u32);
    let runs = numbers.next().unwrap_or(7).max(1);
    let bytes = mib << 20;
    let (here, there) = (memory(bytes, 1), memory(bytes, 2));
    let round = FLOOR_BYTES.min(bytes as usize);
    let (mut from, mut to) = (vec![1; round], vec![2; round]);
    fill(&mut from, 3);
    for links in only.map_or(vec![1, 2, 4], |links| vec![links]) {
        let plain = |to: &mut Vec<u8>| floor(bytes as usize, links as usize, &from, to);
        // A first turn of each is not counted.
        let mut before = plain(&mut to);
        engine(bytes, links, &here, &there);
        let (mut rates, mut costs) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
        for _ in 0..runs {
            let moved = engine(bytes, links, &here, &there);
            let after = plain(&mut to);
            // The floor before it and the one after it, so that what else the machine does counts for both.
            let (wall, cpu) = ((before.wall + after.wall) / 2.0, (before.cpu + after.cpu) / 2.0);
            rates.0.push(mib as f64 / moved.wall);
            rates.1.push(wall / moved.wall);
            costs.0.push(moved.cpu);
            costs.1.push(moved.cpu / cpu);
            before = after;
        }
        println!(
            "{mib} MiB over {links} links: {:.0} MiB/s, {:.2} of the floor's; {:.2} s of CPU, {:.2} of the floor's \
             (medians of {runs})",
            median(rates.0),
            median(rates.1),
            median(costs.0),
            median(costs.1),
        );
    }
}
