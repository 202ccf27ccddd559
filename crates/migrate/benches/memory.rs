//! How fast guest memory moves: the engine beside the floor, plain send and recv of as many bytes over as many TCP
//! sockets, in turns and in one process, each socket's ends with a thread of its own. Memory is faulted in, and none of
//! it is zero. Prints throughput and CPU time, both sides together, as ratios to the floor's next to them. Each socket has the
//! congestion control that is named, so that no sysctl is needed.
//!
//! `scattered` instead of a name measures memory of which every second page was touched beside as many pages without gaps: 512 MiB
//! at most, over the first of the numbers of links. Without a name bbr, cubic and `scattered` are measured. Each is measured with the
//! stream's checksums and without.
//!
//! `cargo bench -p limosa-migrate --bench memory -- [bbr|cubic|reno|scattered]... [MIB [LINKS [RUNS]]]`

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::num::NonZeroU32;
use std::sync::Mutex;
use std::time::Instant;

use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{
    Destination, FilePages, GuestPages, Ledger, Memory, MemoryChecksums, MemoryRegion, Options, Outcome,
    Received, Source,
};
use limosa_testing::memfd;
use rustix::time::{ClockId, clock_gettime};

const PIECE_BYTES: usize = 1 << 20;
/// The floor goes round in so much memory: more than caches hold.
const FLOOR_BYTES: usize = 512 << 20;

/// The most MiB of scattered pages.
const SCATTERED_MIB: u64 = 512;

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

/// Memory of twice this number of bytes, with every second page touched.
fn scattered(bytes: u64, seed: u64) -> FilePages {
    const PAGE: usize = 4096;
    let pages = FilePages::mapped(memfd(2 * bytes), 0, 2 * bytes).expect("room");
    let mut page = [0; PAGE];
    for at in (0..2 * bytes).step_by(2 * PAGE) {
        fill(&mut page, seed + at);
        pages.write(at, &page).expect("room");
    }
    pages
}

/// Pairs of connected TCP sockets with this congestion control.
fn pairs(congestion: &str, links: usize) -> Vec<(TcpStream, TcpStream)> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let chosen = |socket: &TcpStream| {
        rustix::net::sockopt::set_tcp_congestion(socket, congestion).unwrap_or_else(|errno| {
            panic!("{congestion}: {errno} (net.ipv4.tcp_available_congestion_control)")
        });
    };
    // What is accepted takes the listener's.
    rustix::net::sockopt::set_tcp_congestion(&listener, congestion).ok();
    let pair = |_| {
        let near = TcpStream::connect(address).expect("listening");
        let far = listener.accept().expect("connected").0;
        [&near, &far].into_iter().for_each(chosen);
        (near, far)
    };
    (0..links).map(pair).collect()
}

/// Plain send and recv.
fn floor(congestion: &str, bytes: usize, links: usize, from: &[u8], to: &mut [u8]) -> Cost {
    let pairs = pairs(congestion, links);
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

/// How the engine's links are made.
#[derive(Clone, Copy)]
struct How<'a> {
    congestion: &'a str,
    checksums: MemoryChecksums,
}

impl std::fmt::Display for How<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let without = if self.checksums == MemoryChecksums::Never { " without checksums" } else { "" };
        write!(f, "{}{without}", self.congestion)
    }
}

/// The engine.
fn engine(how: How<'_>, bytes: u64, links: u32, here: &FilePages, there: &FilePages) -> Cost {
    let How { congestion, checksums } = how;
    let links_max = NonZeroU32::new(links).unwrap_or(NonZeroU32::MIN);
    let options = Options::default().with_links(links_max).with_memory_checksums(checksums);
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: bytes, pages };
    let link = |socket: TcpStream| SocketLink::new(socket, "the other end");
    let (nears, fars): (Vec<_>, Vec<_>) =
        pairs(congestion, links as usize).into_iter().map(|(near, far)| (link(near), link(far))).unzip();
    // The first one, and the others as they are asked for.
    let (near, nears) = queue(nears);
    let (far, fars) = queue(fars);
    let further = |links: &Mutex<VecDeque<SocketLink>>| -> Result<Box<dyn Link>, LinkError> {
        links
            .lock()
            .ok()
            .and_then(|mut links| links.pop_front())
            .map(|link| Box::new(link) as _)
            .ok_or(LinkError::Closed)
    };
    timed(|| {
        std::thread::scope(|scope| {
            let (options, further) = (&options, &further);
            let receiving = scope.spawn(move || {
                let ledger = Ledger::new();
                let regions = [region(there)];
                let destination = Destination::new(&[], &ledger, options).with_memory(&regions);
                destination.receive_over(&far, &|_: Wait<'_>| further(&fars))
            });
            let source = Source::new(&[], options).with_memory(Memory::stopped(vec![region(here)]));
            let outcome = source.send_over(&near, &|_: Wait<'_>| further(&nears));
            drop(near);
            assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
            let received = receiving.join().expect("no panic");
            assert!(matches!(received, Received::Runs(_)), "{received:?}");
        });
    })
}

/// The first of several links, and the others.
fn queue(links: Vec<SocketLink>) -> (SocketLink, Mutex<VecDeque<SocketLink>>) {
    let mut links = VecDeque::from(links);
    (links.pop_front().expect("one link or more"), Mutex::new(links))
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of.get(of.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What is to be measured.
struct Plan {
    mib: u64,
    links: Vec<u32>,
    runs: u64,
}

impl Plan {
    /// The engine beside the floor.
    fn dense(&self, how: How<'_>) {
        let Plan { mib, runs, .. } = *self;
        let bytes = mib << 20;
        let (here, there) = (memory(bytes, 1), memory(bytes, 2));
        let round = FLOOR_BYTES.min(bytes as usize);
        let (mut from, mut to) = (vec![1; round], vec![2; round]);
        fill(&mut from, 3);
        for links in &self.links {
            let plain = |to: &mut Vec<u8>| floor(how.congestion, bytes as usize, *links as usize, &from, to);
            // A first turn of each is not counted.
            let mut before = plain(&mut to);
            engine(how, bytes, *links, &here, &there);
            let (mut rates, mut costs) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
            for _ in 0..runs {
                let moved = engine(how, bytes, *links, &here, &there);
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
                "{how}: {mib} MiB over {links} links: {:.0} MiB/s, {:.2} of the floor's; {:.2} s of CPU, {:.2} of the \
                 floor's (medians of {runs})",
                median(rates.0),
                median(rates.1),
                median(costs.0),
                median(costs.1),
            );
        }
    }

    /// Every second page beside as many pages without gaps.
    fn scattered(&self, checksums: MemoryChecksums) {
        let how = How { congestion: "reno", checksums };
        let (mib, runs) = (self.mib.min(SCATTERED_MIB), self.runs);
        let bytes = mib << 20;
        let dense = (memory(bytes, 1), memory(bytes, 2));
        let sparse = (scattered(bytes, 1), scattered(bytes, 2));
        for links in self.links.iter().take(1) {
            let plain = || engine(how, bytes, *links, &dense.0, &dense.1);
            let mut before = plain();
            let (mut rates, mut ratios, mut costs) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..runs {
                let moved = engine(how, 2 * bytes, *links, &sparse.0, &sparse.1);
                let after = plain();
                rates.push(mib as f64 / moved.wall);
                ratios.push((before.wall + after.wall) / 2.0 / moved.wall);
                costs.push(moved.cpu / ((before.cpu + after.cpu) / 2.0));
                before = after;
            }
            println!(
                "scattered, {how}: {mib} MiB in every second page over {links} links: {:.0} MiB/s, {:.2} of the rate without gaps, \
                 {:.2} of its CPU (medians of {runs})",
                median(rates),
                median(ratios),
                median(costs),
            );
        }
    }
}

fn main() {
    let words: Vec<_> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let mut numbers = words.iter().filter_map(|word| word.parse::<u64>().ok());
    let mib = numbers.next().unwrap_or(4096).max(16);
    let links = numbers.next().map_or(vec![1, 2, 4], |links| vec![links.clamp(1, 16) as u32]);
    let plan = Plan { mib, links, runs: numbers.next().unwrap_or(5).max(1) };
    let mut names: Vec<_> =
        words.iter().map(String::as_str).filter(|word| word.parse::<u64>().is_err()).collect();
    if names.is_empty() {
        names = vec!["bbr", "cubic", "scattered"];
    }
    for name in names {
        for checksums in [MemoryChecksums::Always, MemoryChecksums::Never] {
            match name {
                "scattered" => plan.scattered(checksums),
                congestion => plan.dense(How { congestion, checksums }),
            }
        }
    }
}
