//! What the engine adds to a stop: idle devices with 1 MiB of final state each and no memory, moved over loopback TCP
//! again and again. From the downtime the arcs of the slowest device on each side are taken, and the time that
//! plain `send` and `recv` of the same bytes take in the same run; what is left is the engine's, with the devices'
//! reading and loading of their data.
//!
//! `cargo bench -p limosa-migrate --bench switchover -- [RUNS]`

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use limosa_client::Device;
use limosa_device::{Loopback, Machine};
use limosa_migrate::link::{Listener, Wait, connect};
use limosa_migrate::{
    Act, Destination, Ledger, Memory, MovedDevice, Nobody, Options, Outcome, Received, Report, Source,
};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};

const STATE_BYTES: usize = 1 << 20;
const SOON: Duration = Duration::from_secs(10);

fn device() -> Loopback {
    let config = format!("state={STATE_BYTES},block=1M,verify=off,pre-copy=off").parse::<SyntheticConfig>();
    let model = Synthetic::new(config.expect("right")).expect("right");
    Loopback::new("synthetic", Machine::new(Box::new(model)))
}

/// In ms: the longest that one device of this side spent in arcs while nothing ran.
fn arcs(report: &Report) -> f64 {
    let stopped = report.stopped_ns.unwrap_or(0);
    let devices = report.devices.iter().map(|device| {
        let arcs = device.spans.iter().filter(|span| matches!(span.act, Act::Enter { .. }));
        arcs.filter(|span| span.start_ns >= stopped).map(|span| span.duration_ns).sum::<u64>()
    });
    devices.max().unwrap_or(0) as f64 / 1e6
}

/// In ms: as many bytes through a bare socket.
fn floor(devices: usize) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut near = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
    let (mut far, _) = listener.accept().expect("it connected");
    near.set_nodelay(true).expect("a TCP socket");
    let data = vec![0x5a; STATE_BYTES];
    let mut into = vec![0; STATE_BYTES];
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| (0..devices).for_each(|_| near.write_all(&data).expect("the far end reads")));
        (0..devices).for_each(|_| far.read_exact(&mut into).expect("the near end writes"));
    });
    began.elapsed().as_secs_f64() * 1e3
}

/// In ms: downtime, arcs on both sides, the floor.
fn once(sources: &[Loopback], destinations: &[Loopback]) -> [f64; 3] {
    let (options, ledger) = (Options::default(), Ledger::new());
    let ours: Vec<_> = sources.iter().map(|device| MovedDevice::new(device)).collect();
    let theirs: Vec<_> = destinations.iter().map(|device| MovedDevice::new(device)).collect();
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("a port");
    let near = connect(listener.address(), SOON).expect("it listens");
    let far = listener.accept(Wait::within(SOON, None)).expect("it connected");
    let (outcome, received) = std::thread::scope(|scope| {
        let destination = Destination {
            devices: &theirs,
            memory: &[],
            vmm: &Nobody,
            observer: &Nobody,
            options: &options,
            cancel: None,
            ledger: &ledger,
        };
        let receiving = scope.spawn(move || destination.receive(&far));
        let mut source = Source {
            devices: &ours,
            memory: Memory::default(),
            vmm: &Nobody,
            observer: &Nobody,
            options: &options,
            cancel: None,
        };
        let outcome = source.send(&near);
        (outcome, receiving.join().expect("no panic"))
    });
    let (Outcome::Moved(report), Received::Runs(theirs)) = (&outcome, &received) else {
        panic!("{outcome:?} {received:?}")
    };
    sources.iter().chain(destinations).for_each(|device| device.reset().expect("a reset"));
    let downtime = report.downtime_ns.expect("it was stopped") as f64 / 1e6;
    [downtime, arcs(report) + arcs(theirs), floor(sources.len())]
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let runs = std::env::args().filter_map(|arg| arg.parse::<usize>().ok()).next().unwrap_or(30);
    println!("median of {runs} moves, in ms");
    println!("devices  downtime     arcs  bare socket  the engine's");
    for devices in [1, 4, 16] {
        let make = || (0..devices).map(|_| device()).collect::<Vec<_>>();
        let (sources, destinations) = (make(), make());
        let all: Vec<_> = (0..runs).map(|_| once(&sources, &destinations)).collect();
        let column = |at: usize| median(all.iter().map(|run| run[at]));
        let share = median(all.iter().map(|[downtime, arcs, floor]| downtime - arcs - floor));
        println!("{devices:7}  {:8.3}  {:7.3}  {:11.3}  {share:12.3}", column(0), column(1), column(2));
    }
}
