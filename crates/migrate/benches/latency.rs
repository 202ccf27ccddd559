//! What latency costs a device: its state moves over a link whose bytes arrive late by half a round trip in each direction, with a
//! window that stays as it is at first and with one that grows. Without a limit the first moves no faster than a window in each round
//! trip.
//!
//! `cargo bench -p limosa-migrate --bench latency -- [RUNS [ROUND_TRIP_MS [STATE_MIB]]]`

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use limosa_client::Device;
use limosa_device::{Loopback, Machine};
use limosa_migrate::link::SocketLink;
use limosa_migrate::{Destination, Ledger, MovedDevice, Options, Outcome, Received, Source};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};

const PIECE_BYTES: usize = 256 << 10;

/// Bytes on their way, with the moment at which each piece arrives; `None` behind the last one.
#[derive(Default)]
struct Way {
    pieces: Mutex<VecDeque<(Instant, Option<Vec<u8>>)>>,
    changed: Condvar,
}

impl Way {
    fn push(&self, at: Instant, piece: Option<Vec<u8>>) {
        self.pieces.lock().expect("no panic").push_back((at, piece));
        self.changed.notify_all();
    }

    fn pop(&self) -> (Instant, Option<Vec<u8>>) {
        let mut pieces = self.pieces.lock().expect("no panic");
        loop {
            if let Some(first) = pieces.pop_front() {
                return first;
            }
            pieces = self.changed.wait(pieces).expect("no panic");
        }
    }
}

/// Both ends of a link with this latency in each direction.
fn late(latency: Duration) -> (SocketLink, SocketLink) {
    let [(near, near_end), (far, far_end)] = [(); 2].map(|()| UnixStream::pair().expect("sockets"));
    for (mut from, mut to) in [
        (near_end.try_clone().expect("a descriptor"), far_end.try_clone().expect("a descriptor")),
        (far_end, near_end),
    ] {
        std::thread::spawn(move || {
            let way = Way::default();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    loop {
                        let (at, piece) = way.pop();
                        std::thread::sleep(at.saturating_duration_since(Instant::now()));
                        let Some(piece) = piece else { break };
                        if to.write_all(&piece).is_err() {
                            break;
                        }
                    }
                    // The other end may have done so.
                    let _ = to.shutdown(Shutdown::Write);
                });
                let mut piece = vec![0; PIECE_BYTES];
                while let Ok(bytes @ 1..) = from.read(&mut piece) {
                    way.push(Instant::now() + latency, Some(piece[..bytes].to_vec()));
                }
                way.push(Instant::now() + latency, None);
            });
        });
    }
    (SocketLink::new(near, "the destination"), SocketLink::new(far, "the source"))
}

/// In seconds.
fn move_once(sources: &Loopback, destinations: &Loopback, options: &Options, latency: Duration) -> f64 {
    let ledger = Ledger::new();
    let (ours, theirs) = ([MovedDevice::new(sources)], [MovedDevice::new(destinations)]);
    let (near, far) = late(latency);
    let began = Instant::now();
    let (outcome, received) = std::thread::scope(|scope| {
        let destination = Destination::new(&theirs, &ledger, options);
        let receiving = scope.spawn(move || destination.receive(&far));
        let outcome = Source::new(&ours, options).send(&near);
        drop(near);
        (outcome, receiving.join().expect("no panic"))
    });
    let took = began.elapsed().as_secs_f64();
    assert!(
        matches!((&outcome, &received), (Outcome::Moved(_), Received::Runs(_))),
        "{outcome:?} {received:?}"
    );
    for device in [sources, destinations] {
        device.reset().expect("a reset");
    }
    took
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

fn main() {
    let mut numbers = std::env::args().filter_map(|arg| arg.parse::<u64>().ok());
    let runs = numbers.next().unwrap_or(5).max(1);
    let round_trip = Duration::from_millis(numbers.next().unwrap_or(20));
    let mib = numbers.next().unwrap_or(256).max(1);
    let device = || {
        let config = format!("state={mib}M,block=1M,verify=off,pre-copy=off").parse::<SyntheticConfig>();
        Loopback::new("synthetic", Machine::simple(Synthetic::new(config.expect("right")).expect("right")))
    };
    let (source, destination) = (device(), device());
    let grows = Options::default();
    let stays = grows.clone().with_windows_bytes_max(0);
    let times: Vec<_> = (0..runs)
        .map(|_| [&stays, &grows].map(|options| move_once(&source, &destination, options, round_trip / 2)))
        .collect();
    let [stays, grows] = [0, 1].map(|column| median(times.iter().map(|run| run[column]).collect()));
    println!(
        "{mib} MiB of a device at a round trip of {round_trip:?}: {:.0} MiB/s with a window that stays at 4 MiB, {:.0} MiB/s with one \
         that grows (medians of {runs})",
        mib as f64 / stays,
        mib as f64 / grows
    );
}
