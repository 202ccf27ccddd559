//! What the engine adds to a stop: idle devices with 1 MiB of final state each and no memory, moved over loopback TCP
//! again and again. From the downtime the arcs of the slowest device on each side are taken, and the time that
//! plain `send` and `recv` of the same bytes take in the same run, alone and with the devices' reading and loading at
//! their ends; what is left is the engine's own.
//!
//! `harvest` measures what the dirty logs of the devices add to a stop instead: the downtime with 256 GiB of untouched memory beside
//! the downtime without memory, for devices with little state. Without an argument both are measured.
//!
//! `cargo bench -p limosa-migrate --bench switchover -- [harvest] [RUNS [DEVICES]]`

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use limosa_client::{Chunk, DataStream, Device, DeviceExt};
use limosa_device::{Loopback, Machine};
use limosa_migrate::link::{Listener, Wait, connect};
use limosa_migrate::{
    Act, Destination, FilePages, Ledger, Memory, MemoryRegion, MovedDevice, Options, Outcome, Phase,
    Received, Report, Source,
};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_protocol::State;
use limosa_testing::memfd;

const STATE_BYTES: usize = 1 << 20;
const SOON: Duration = Duration::from_secs(10);

const MEMORY_BYTES: u64 = 256 << 30;

fn device(state_bytes: usize) -> Loopback {
    let config =
        format!("state={state_bytes},block={state_bytes},verify=off,pre-copy=off").parse::<SyntheticConfig>();
    let model = Synthetic::new(config.expect("right")).expect("right");
    Loopback::new("synthetic", Machine::simple(model))
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

/// The parts of a source's downtime.
const PHASES: [Phase; 4] = [Phase::Stop, Phase::StopCopy, Phase::Load, Phase::Commit];

/// In ms: how long each of [`PHASES`] took.
fn phases(report: &Report) -> [f64; 4] {
    PHASES.map(|wanted| {
        let durations = report.phases.iter().filter(|phase| phase.phase == wanted);
        durations.map(|phase| phase.duration_ns).sum::<u64>() as f64 / 1e6
    })
}

/// In ms: as many bytes through a bare socket, and then the same with devices that are read and loaded at its ends.
fn floors(sources: &[Loopback], destinations: &[Loopback]) -> [f64; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut near = TcpStream::connect(listener.local_addr().expect("bound")).expect("it listens");
    let (mut far, _) = listener.accept().expect("it connected");
    near.set_nodelay(true).expect("a TCP socket");
    let mut data = vec![0x5a; STATE_BYTES];
    let mut into = vec![0; STATE_BYTES];
    let bare = timed(|| {
        std::thread::scope(|scope| {
            scope.spawn(|| sources.iter().for_each(|_| near.write_all(&data).expect("the far end reads")));
            sources.iter().for_each(|_| far.read_exact(&mut into).expect("the near end writes"));
        });
    });
    let open = |devices: &[Loopback], state| -> Vec<Box<dyn DataStream>> {
        let enter = |device: &Loopback| device.set_state(state).expect("it may").expect("a session");
        devices.iter().map(enter).collect()
    };
    let mut savings = open(sources, State::StopCopy);
    let mut loadings = open(destinations, State::Resuming);
    let with_devices = timed(|| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for saving in &mut savings {
                    while let Chunk::Data(bytes) = saving.read(&mut data).expect("data") {
                        near.write_all(&(bytes as u32).to_le_bytes()).expect("the far end reads");
                        near.write_all(&data[..bytes]).expect("the far end reads");
                    }
                    near.write_all(&[0; 4]).expect("the far end reads");
                }
            });
            for loading in &mut loadings {
                loop {
                    let mut bytes = [0; 4];
                    far.read_exact(&mut bytes).expect("the near end writes");
                    let bytes = u32::from_le_bytes(bytes) as usize;
                    if bytes == 0 {
                        break;
                    }
                    far.read_exact(&mut into[..bytes]).expect("the near end writes");
                    loading.write(&into[..bytes]).expect("it takes its data");
                }
            }
        });
    });
    drop((savings, loadings));
    [bare, with_devices]
}

/// In ms.
fn timed(act: impl FnOnce()) -> f64 {
    let began = Instant::now();
    act();
    began.elapsed().as_secs_f64() * 1e3
}

/// A move of devices, and of memory that nothing has touched.
fn moved(
    sources: &[Loopback],
    destinations: &[Loopback],
    memory: Option<&[FilePages; 2]>,
) -> [Box<Report>; 2] {
    let region = |pages| MemoryRegion { id: 0, iova: 0, size: MEMORY_BYTES, pages };
    let regions = |side: usize| memory.iter().map(|both| region(&both[side])).collect::<Vec<_>>();
    let (our_memory, their_memory) = (regions(0), regions(1));
    let (options, ledger) = (Options::default(), Ledger::new());
    let ours: Vec<_> = sources.iter().map(|device| MovedDevice::new(device)).collect();
    let theirs: Vec<_> = destinations.iter().map(|device| MovedDevice::new(device)).collect();
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address")).expect("a port");
    let near = connect(listener.address(), SOON).expect("it listens");
    let far = listener.accept(Wait::within(SOON, None)).expect("it connected");
    let (outcome, received) = std::thread::scope(|scope| {
        let destination = Destination::new(&theirs, &ledger, &options).with_memory(&their_memory);
        let receiving = scope.spawn(move || destination.receive(&far));
        let source = Source::new(&ours, &options).with_memory(Memory::stopped(our_memory));
        let outcome = source.send(&near);
        (outcome, receiving.join().expect("no panic"))
    });
    match (outcome, received) {
        (Outcome::Moved(ours), Received::Runs(theirs)) => [Box::new(ours), Box::new(theirs)],
        (outcome, received) => panic!("{outcome:?} {received:?}"),
    }
}

/// In ms: downtime, arcs on both sides, the floors; and the phases of the downtime.
fn once(sources: &[Loopback], destinations: &[Loopback]) -> ([f64; 4], [f64; 4]) {
    let [report, theirs] = moved(sources, destinations, None);
    let reset = || sources.iter().chain(destinations).for_each(|device| device.reset().expect("a reset"));
    reset();
    let [bare, with_devices] = floors(sources, destinations);
    reset();
    let downtime = report.downtime_ns.expect("it was stopped") as f64 / 1e6;
    ([downtime, arcs(&report) + arcs(&theirs), bare, with_devices], phases(&report))
}

/// Prints what the logs of so many devices add.
fn harvest(runs: usize, devices: usize) {
    let make = || (0..devices).map(|_| device(4 << 10)).collect::<Vec<_>>();
    let (sources, destinations) = (make(), make());
    let pages = || FilePages::new(memfd(MEMORY_BYTES), 0);
    let memory = [pages(), pages()];
    let mut parts = [const { Vec::new() }; 2];
    let mut downtime = |memory: Option<&_>| {
        let [report, _] = moved(&sources, &destinations, memory);
        sources.iter().chain(&destinations).for_each(|device| device.reset().expect("a reset"));
        parts[usize::from(memory.is_some())].push(phases(&report));
        report.downtime_ns.expect("it was stopped") as f64 / 1e6
    };
    let both: Vec<_> = (0..runs).map(|_| [downtime(None), downtime(Some(&memory))]).collect();
    let [without, with] = [0, 1].map(|column| median(both.iter().map(|run| run[column])));
    let added = median(both.iter().map(|[without, with]| with - without));
    println!(
        "{devices} devices: a stop of {without:.2} ms without memory, of {with:.2} ms with the logs of {} GiB each: {added:.2} ms \
         more (medians of {runs})",
        MEMORY_BYTES >> 30
    );
    parts.iter().for_each(|phases| print_phases(phases));
}

/// Prints the medians of the phases of moves.
fn print_phases(moves: &[[f64; 4]]) {
    let medians = [0, 1, 2, 3].map(|at| median(moves.iter().map(|phases| phases[at])));
    let parts: Vec<_> =
        PHASES.iter().zip(medians).map(|(phase, ms)| format!("{} {ms:.3}", phase.name())).collect();
    println!("         of it {}", parts.join(", "));
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let mut numbers = std::env::args().filter_map(|arg| arg.parse::<usize>().ok());
    let runs = numbers.next().unwrap_or(30);
    let has_arguments = std::env::args().skip(1).any(|arg| !arg.starts_with('-'));
    let devices = numbers.next();
    if std::env::args().any(|arg| arg == "harvest") {
        return devices
            .map_or(vec![1, 16, 64], |devices| vec![devices])
            .into_iter()
            .for_each(|devices| harvest(runs, devices));
    }
    let counts = devices.map_or(vec![1, 4, 16, 64], |devices| vec![devices]);
    println!("median of {runs} moves, in ms");
    println!("devices  downtime     arcs  bare socket  with devices  beyond socket  beyond both");
    for devices in counts {
        let make = || (0..devices).map(|_| device(STATE_BYTES)).collect::<Vec<_>>();
        let (sources, destinations) = (make(), make());
        let all: Vec<_> = (0..runs).map(|_| once(&sources, &destinations)).collect();
        let [downtime, arcs, bare, with_devices] =
            [0, 1, 2, 3].map(|column| median(all.iter().map(|(run, _)| run[column])));
        let beyond = |floor: usize| median(all.iter().map(|(run, _)| run[0] - run[1] - run[floor]));
        println!(
            "{devices:7}  {downtime:8.3}  {arcs:7.3}  {bare:11.3}  {with_devices:12.3}  {:13.3}  {:11.3}",
            beyond(2),
            beyond(3)
        );
        print_phases(&all.iter().map(|(_, phases)| *phases).collect::<Vec<_>>());
    }
    if !has_arguments {
        harvest(10, 64);
    }
}
