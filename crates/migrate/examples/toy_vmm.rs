//! A VMM in one file, and how it moves its machine with Limosa. It is meant to be read from top to bottom.
//!
//! The machine has memory, a vCPU that writes to it and rings the devices, and two devices behind vfio-user
//! sockets. There is no guest code and no KVM. Their replacement is as small as possible, and does what matters here: it
//! dirties memory all the time, and can be stopped and started.
//!
//! ```console
//! $ cargo run -p limosa-migrate --example toy_vmm receive unix:/tmp/move     # one terminal
//! $ cargo run -p limosa-migrate --example toy_vmm run                        # another one
//! send unix:/tmp/move
//! ```
//!
//! Both read commands from standard input: `send ADDRESS [BYTES_PER_SECOND]`, `resolve ADDRESS`, `count`, `quit`.
//! Ctrl-C, or `cancel`, cancels the current move.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use limosa_client::{Device, DmaMap, DmaMemory};
use limosa_device::saved::Section;
use limosa_device::{Bus, Description, Fault, Loopback, Machine, SimpleModel, Whole, WholeState};
use limosa_migrate::link::{Address, Bandwidth, Connector, Listener, Wait, connect};
use limosa_migrate::{Acceptor, Incoming};
use limosa_migrate::{
    Cancel, CommitNote, Destination, DirtyLog, Estimate, FilePages, GuestPages, InDoubt, Ledger, Memory,
    MemoryRegion, MovedDevice, Observer, Options, Outcome, PAGE_BYTES, Phase, Received, Round, Source, Vmm,
};
use limosa_models::synthetic::{Synthetic, SyntheticConfig, registers};
use limosa_models::uart::{Line, Uart};
use limosa_protocol::bitmap::{DirtyBitmap, words_for};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{Errno, pci_index};
use limosa_vfio_user::client::{self, Client};
use limosa_vfio_user::server::{self, Server};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Pages of guest memory. The vCPU writes to the lower half, a device by DMA to the upper one.
const PAGES: u64 = 4096;
const VCPU_PAGES: u64 = PAGES / 2;
/// How the vCPU is slowed down: by a rest after each step, which doubles each time.
const THROTTLE_STEPS: u32 = 6;
const THROTTLE_REST: Duration = Duration::from_millis(1);
/// How many times a source in doubt asks, once a second, before it leaves the decision to a person.
const RESOLVE_TRIES: u32 = 10;

// ---------------------------------------------------------------------------------------------------------------------
// The guest: memory, a vCPU, and the log of what the vCPU writes.

/// The part of the machine that is not a device.
struct Guest {
    /// A memfd: the devices' servers map the same pages.
    memory: FilePages,
    vcpu: Mutex<Vcpu>,
    /// How many threads wait for the vCPU, which yields to them between two steps: the mutex alone is not fair.
    wanted: AtomicU32,
    /// The vCPU may run, or the process ends.
    changed: Condvar,
    log: Log,
}

/// The vCPU's registers, and whether it runs.
#[derive(Default)]
struct Vcpu {
    count: u64,
    runs: bool,
    /// How long it rests after each step, in order to dirty less.
    rest: Duration,
}

/// Which pages the vCPU wrote since the last harvest. With KVM this is `KVM_GET_DIRTY_LOG`, or the dirty ring.
struct Log {
    is_on: AtomicBool,
    dirty: DirtyBitmap,
}

impl Guest {
    fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.wanted.fetch_add(1, Ordering::AcqRel);
        let vcpu = lock(&self.vcpu);
        self.wanted.fetch_sub(1, Ordering::AcqRel);
        vcpu
    }

    /// What the vCPU's thread does: it counts, leaves each number in the page that is its turn, and rings both devices.
    fn run(&self, devices: &Devices) -> Result<()> {
        loop {
            // A step is done under the lock. A thread that stops the vCPU takes the lock, and so waits for the step's end.
            while self.wanted.load(Ordering::Acquire) > 0 {
                std::thread::yield_now();
            }
            let mut vcpu = lock(&self.vcpu);
            while !vcpu.runs {
                vcpu = self.changed.wait(vcpu).unwrap_or_else(PoisonError::into_inner);
            }
            vcpu.count += 1;
            let page = vcpu.count % VCPU_PAGES;
            self.memory.write(page * PAGE_BYTES, &vcpu.count.to_le_bytes())?;
            // The mark comes after the write: a harvest in between leaves the mark for the next one. The other way
            // round the harvest could take the mark, the engine read the page, and the write be lost.
            if self.log.is_on.load(Ordering::Acquire) {
                self.log.dirty.set(page);
            }
            devices.ring(vcpu.count)?;
            let rest = vcpu.rest;
            drop(vcpu);
            if !rest.is_zero() {
                std::thread::sleep(rest);
            }
        }
    }

    fn set_running(&self, runs: bool) {
        self.vcpu().runs = runs;
        self.changed.notify_all();
    }

    /// Checks that each page holds the last number that the vCPU left there. The vCPU must not run.
    fn check(&self) -> Result<()> {
        let count = self.vcpu().count;
        for page in 0..VCPU_PAGES {
            let mut found = [0; 8];
            self.memory.read(page * PAGE_BYTES, &mut found)?;
            let last = (count.saturating_sub(VCPU_PAGES - 1)..=count)
                .rev()
                .find(|number| number % VCPU_PAGES == page);
            let (found, expected) = (u64::from_le_bytes(found), last.unwrap_or(0));
            if found != expected {
                return Err(format!("page {page} holds {found}, not {expected}").into());
            }
        }
        Ok(())
    }

    fn checksum(&self) -> io::Result<u64> {
        let mut bytes = vec![0; (PAGES * PAGE_BYTES) as usize];
        self.memory.read(0, &mut bytes)?;
        let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        Ok(words.fold(0xcbf2_9ce4_8422_2325, |hash, word| {
            (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
        }))
    }
}

/// The engine's handle to the log. Its calls are all that the engine needs of KVM.
struct LogHandle<'a>(&'a Log);

impl DirtyLog for LogHandle<'_> {
    fn start(&mut self) -> io::Result<()> {
        self.0.dirty.clear();
        self.0.is_on.store(true, Ordering::Release);
        Ok(())
    }

    fn harvest(&mut self, _region: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        let mut words = vec![0; words_for(PAGES)];
        self.0.dirty.harvest(0, PAGES, &mut words);
        dirty.or_words(0, &words, PAGES);
        Ok(())
    }

    fn stop(&mut self) {
        self.0.is_on.store(false, Ordering::Release);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The devices: two behind vfio-user sockets, and the vCPU's registers.

/// A VMM must also move the state that is neither in memory nor in a device of another process: registers of vCPUs, an
/// interrupt controller, clocks. The engine moves devices, so this state is a device too, in the VMM's own process. It is
/// saved when everything has stopped, as sections with versions and checksums.
struct Registers(Arc<Guest>);

#[derive(Clone, PartialEq, prost::Message)]
struct SavedRegisters {
    #[prost(uint64, tag = "1")]
    count: u64,
}

impl SimpleModel for Registers {
    fn description(&self) -> Description {
        Description::default()
    }

    fn attach(&mut self, _bus: Bus) {}

    fn region_read(&mut self, _region: u32, _offset: u64, _data: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn region_write(&mut self, _region: u32, _offset: u64, _data: &[u8]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.0.vcpu().count = 0;
        Ok(())
    }
}

impl WholeState for Registers {
    type Saved = SavedRegisters;
    const KIND: &'static str = "toy-vmm.registers";
    const SECTION: Section = Section::message("registers", 1);

    // The vCPU is stopped and started by the hooks of [`Hooks`], before and after all devices.
    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn to_saved(&self) -> SavedRegisters {
        SavedRegisters { count: self.0.vcpu().count }
    }

    fn restore(&mut self, saved: SavedRegisters) -> Result<(), Errno> {
        self.0.vcpu().count = saved.count;
        Ok(())
    }
}

/// The machine's devices. The engine sees all of them as [`Device`]; it would see a kernel VFIO device, opened by
/// `limosa-vfio-kernel` from the VMM's own file descriptors, in the same way.
struct Devices {
    synthetic: Client,
    uart: Client,
    registers: Loopback,
}

impl Devices {
    fn new(folder: &std::path::Path, guest: &Arc<Guest>, memory: &File) -> Result<Devices> {
        let config =
            SyntheticConfig { state_bytes: 4 << 20, dma_rate: 8 << 20, ..SyntheticConfig::default() };
        let synthetic = serve(folder.join("synthetic"), Box::new(Synthetic::new(config)?), memory)?;
        let uart = serve(folder.join("uart"), Box::new(Uart::new(vec![Line::Echo])?), memory)?;
        let registers = Loopback::new("registers", Machine::simple(Whole::new(Registers(guest.clone()))));
        Ok(Devices { synthetic, uart, registers })
    }

    /// The devices of a move, in an order that is the same on both sides.
    fn moved(&self) -> [MovedDevice<'_>; 3] {
        [&self.synthetic as &dyn Device, &self.uart, &self.registers].map(MovedDevice::new)
    }

    /// Turns on the DMA of the synthetic device, which writes to the upper half of the memory from then on.
    fn start_dma(&self) -> Result<()> {
        let window = [
            (registers::DMA_BASE, VCPU_PAGES * PAGE_BYTES),
            (registers::DMA_PAGES, PAGES - VCPU_PAGES),
            (registers::DMA_CONTROL, 1),
        ];
        for (register, value) in window {
            self.synthetic.region_write(pci_index::BAR0, register, &value.to_le_bytes())?;
        }
        Ok(())
    }

    /// Leaves a number in a register of each device, and finds there what it left the last time.
    fn ring(&self, count: u64) -> Result<()> {
        if !count.is_multiple_of(64) {
            return Ok(());
        }
        let last = (count - 64).to_le_bytes();
        let (mut scratch, mut byte) = ([0; 8], [0]);
        self.synthetic.region_read(pci_index::BAR0, registers::SCRATCH, &mut scratch)?;
        self.uart.region_read(pci_index::BAR0, 7, &mut byte)?;
        if scratch != last || byte[0] != last[1] {
            return Err(format!("the devices hold {scratch:?} and {byte:?}, not {last:?}").into());
        }
        self.synthetic.region_write(pci_index::BAR0, registers::SCRATCH, &count.to_le_bytes())?;
        self.uart.region_write(pci_index::BAR0, 7, &[count.to_le_bytes()[1]])?;
        Ok(())
    }
}

/// Serves a device on a thread, instead of in a process of its own, connects to it, and shares the memory with it.
fn serve(path: PathBuf, model: Box<dyn SimpleModel>, memory: &File) -> Result<Client> {
    let server = Server::bind(&path, Machine::simple(model), server::Options::default())?;
    std::thread::spawn(move || server.serve());
    let client = Client::connect(&path, client::Options::default())?;
    let backing = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    client.dma_map(&DmaMap { iova: 0, size: PAGES * PAGE_BYTES, flags, memory: backing })?;
    Ok(client)
}

// ---------------------------------------------------------------------------------------------------------------------
// The hooks that the engine calls.

/// The hooks, in the order in which they are called.
struct Hooks<'a>(&'a Guest);

impl Vmm for Hooks<'_> {
    /// On the source, when the guest dirties memory faster than the link carries it: slow the guest down, step by step. Step
    /// 0 lets it run at full speed again.
    fn throttle(&self, step: u32) -> bool {
        if step > THROTTLE_STEPS {
            return false;
        }
        let rest = if step == 0 { Duration::ZERO } else { THROTTLE_REST * (1 << (step - 1)) };
        self.0.vcpu().rest = rest;
        println!("throttle {step}: the vCPU rests {rest:?} after each step");
        true
    }

    /// On the source, at the beginning of the stop. When this returns, the vCPUs must not write any more. The devices still
    /// run. The engine stops them next, so this must not wait for a device.
    fn stop(&self) -> Result<(), String> {
        self.0.set_running(false);
        Ok(())
    }

    /// On the source, when everything has arrived and before the destination is told to run. A VMM writes the note to a disk
    /// here, in a file of mode 0600, as it has the move's secret. If its process ends before it knows how the move ended, the
    /// next process resolves the move by the note ([`InDoubt::recover`]). Everything stands still, so this example prints
    /// what must not be lost.
    fn committing(&self, note: &CommitNote) -> Result<(), String> {
        let checksum = self.0.checksum().map_err(|error| error.to_string())?;
        println!("commits {}: count {} checksum {checksum:016x}", note.id, self.0.vcpu().count);
        Ok(())
    }

    /// On the source, when the move was undone. The devices run again already.
    fn resume(&self) {
        self.0.set_running(true);
    }

    /// On the destination, when it is told to run and before the devices do: the last chance to refuse, after which the
    /// source runs again.
    fn prepare(&self) -> Result<(), String> {
        let checksum = self.0.checksum().map_err(|error| error.to_string())?;
        println!("takes over: count {} checksum {checksum:016x}", self.0.vcpu().count);
        self.0.check().map_err(|error| error.to_string())
    }

    /// On the destination, when the devices run.
    fn start(&self) {
        self.0.set_running(true);
    }
}

/// An observer. The engine's threads call it and wait for it, so it is quick.
struct Watch;

impl Observer for Watch {
    fn phase(&self, phase: Phase) {
        println!("phase {}", phase.name());
    }

    fn round(&self, round: &Round) {
        println!("round {}: {} KiB dirty", round.round, round.memory_dirty_bytes >> 10);
    }

    /// The time that the move will still take, on the source. A VMM shows it to its operator, who may cancel the move.
    fn estimate(&self, estimate: &Estimate) {
        match estimate.remaining {
            Some(remaining) => {
                println!("a stop would take {:?}, {remaining:?} to go", estimate.predicted_downtime)
            }
            None => println!("a stop would take {:?}, no end in sight", estimate.predicted_downtime),
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The machine, and its moves.

struct Machinery {
    guest: Arc<Guest>,
    devices: Arc<Devices>,
    /// The handle of the current move.
    cancel: Mutex<Option<Cancel>>,
    /// A move in doubt. As long as there is one, the guest must not run.
    doubt: Mutex<Option<InDoubt>>,
    options: Options,
}

impl Machinery {
    fn new(folder: &std::path::Path) -> Result<Machinery> {
        let memory = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)?);
        memory.set_len(PAGES * PAGE_BYTES)?;
        let guest = Arc::new(Guest {
            memory: FilePages::new(memory.try_clone()?, 0),
            vcpu: Mutex::default(),
            wanted: AtomicU32::new(0),
            changed: Condvar::new(),
            log: Log { is_on: AtomicBool::new(false), dirty: DirtyBitmap::new(PAGES)? },
        });
        let devices = Arc::new(Devices::new(folder, &guest, &memory)?);
        let (vcpu, its_devices) = (guest.clone(), devices.clone());
        std::thread::spawn(move || {
            if let Err(error) = vcpu.run(&its_devices) {
                println!("the guest has crashed: {error}");
                std::process::exit(1);
            }
        });
        let (cancel, doubt) = (Mutex::default(), Mutex::default());
        Ok(Machinery { guest, devices, cancel, doubt, options: Options::default() })
    }

    /// The regions of guest memory. Both sides name them alike.
    fn memory(&self) -> MemoryRegion<'_> {
        MemoryRegion { id: 0, iova: 0, size: PAGES * PAGE_BYTES, pages: &self.guest.memory }
    }

    /// Calls a function with the source. A move blocks until it has ended, so a VMM gives it a thread of its own.
    fn with_source<R>(&self, cancel: Option<&Cancel>, act: impl FnOnce(Source<'_>) -> R) -> R {
        let mut log = LogHandle(&self.guest.log);
        act(Source::new(&self.devices.moved(), &self.options)
            .with_memory(Memory::logged(vec![self.memory()], &mut log))
            .with_vmm(&Hooks(&self.guest))
            .with_observer(&Watch)
            .with_cancel(cancel))
    }

    /// Moves the machine to the destination at this address.
    fn send(&self, to: &Address, bandwidth: Option<u64>) -> Result<()> {
        let cancel = Cancel::new()?;
        *lock(&self.cancel) = Some(cancel.clone());
        // It also makes the further links of the move, up to `Options::links`, which share the bandwidth.
        let mut connector = Connector::new(to.clone());
        if let Some(bytes_per_second) = bandwidth {
            connector = connector.with_bandwidth(Bandwidth::new(bytes_per_second));
        }
        let link = connector.connect(Wait::within(self.options.silence_max, Some(&cancel)))?;
        let outcome = self.with_source(Some(&cancel), |source| source.send_over(&link, &connector));
        *lock(&self.cancel) = None;
        self.ended(outcome);
        // If the link failed just when the destination was to run, the destination knows whether it does.
        for _ in 0..RESOLVE_TRIES {
            if lock(&self.doubt).is_none() {
                break;
            }
            self.resolve(to)?;
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    }

    /// Asks how a move in doubt ended. A source that guesses instead runs the guest twice, or not at all.
    fn resolve(&self, to: &Address) -> Result<()> {
        let Some(doubt) = lock(&self.doubt).take() else { return Ok(()) };
        let link = match connect(to, Duration::from_secs(1)) {
            Ok(link) => link,
            Err(error) => {
                *lock(&self.doubt) = Some(doubt);
                println!("the destination does not answer: {error}");
                return Ok(());
            }
        };
        let outcome = self.with_source(None, |source| source.resolve(doubt, &link));
        self.ended(outcome);
        Ok(())
    }

    /// The three ways in which a move ends.
    fn ended(&self, outcome: Outcome) {
        match outcome {
            // The guest runs elsewhere. This process can exit.
            Outcome::Moved(report) => {
                print!("{report}");
                println!("moved");
            }
            // The guest runs here as before, with its devices, and can be moved again at any time.
            Outcome::Undone { why, report } => {
                report.notes.iter().for_each(|note| println!("note: {note}"));
                println!("undone: {why}");
            }
            // The guest may run at the destination: here the vCPUs and the devices stay stopped.
            Outcome::InDoubt(doubt) => {
                println!("in doubt: {}; the guest stays stopped", doubt.why);
                *lock(&self.doubt) = Some(doubt);
            }
        }
    }

    /// Waits for a machine, and takes it over. The devices and the memory here are like those of the source, and idle.
    fn receive(&self, acceptor: &Acceptor, ledger: &Ledger) -> Result<()> {
        let devices = self.devices.moved();
        let memory = [self.memory()];
        let hooks = Hooks(&self.guest);
        loop {
            let cancel = Cancel::new()?;
            *lock(&self.cancel) = Some(cancel.clone());
            let offered = match acceptor.accept(Wait::within(Duration::MAX, Some(&cancel)))? {
                Incoming::Offer(offered) => offered,
                Incoming::Answered { id, decision } => {
                    println!("answered for {id}: {decision:?}");
                    continue;
                }
            };
            // One move consumes it.
            let destination = Destination::new(&devices, ledger, &self.options)
                .with_memory(&memory)
                .with_vmm(&hooks)
                .with_observer(&Watch)
                .with_cancel(Some(&cancel));
            match destination.receive_offered(offered) {
                Received::Runs(report) => {
                    *lock(&self.cancel) = None;
                    print!("{report}");
                    println!("runs");
                    return Ok(());
                }
                // The loaded state is discarded and the devices are reset: another source may offer its machine.
                Received::Discarded { why, .. } => println!("discarded: {why}"),
                Received::Broken { why, .. } => return Err(why.into()),
                Received::Stopped(_) | Received::Answered { .. } => return Err("it was no move".into()),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This process has a guest that runs now, and receives no other: the acceptor refuses every offer since the move was
/// committed. As long as it lives it answers a source in doubt, by itself; this only prints the answers.
fn print_answers(acceptor: &Acceptor) {
    while let Ok(Incoming::Answered { id, decision }) = acceptor.accept(Wait::within(Duration::MAX, None)) {
        println!("answered for {id}: {decision:?}");
    }
}

/// Does what standard input says.
fn monitor(machinery: &Arc<Machinery>) -> Result<()> {
    for line in io::stdin().lines() {
        let line = line?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["send", address, ref rest @ ..] => {
                let (machinery, address) = (machinery.clone(), address.parse::<Address>()?);
                let bandwidth = rest.first().map(|rate| rate.parse()).transpose()?;
                std::thread::spawn(move || {
                    if let Err(error) = machinery.send(&address, bandwidth) {
                        println!("not sent: {error}");
                    }
                });
            }
            ["resolve", address] => machinery.resolve(&address.parse()?)?,
            ["cancel"] => interrupt(machinery),
            ["count"] => println!("count {}", machinery.guest.vcpu().count),
            ["quit"] => break,
            _ => println!("expected send, resolve, cancel, count or quit, not `{line}`"),
        }
    }
    Ok(())
}

/// Cancels the current move, or without one ends the process.
fn interrupt(machinery: &Machinery) {
    match &*lock(&machinery.cancel) {
        Some(cancel) => cancel.cancel(),
        None => std::process::exit(130),
    }
}

fn main() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("toy-vmm-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let machinery = Arc::new(Machinery::new(&folder)?);
    // The clients are connected, and no other client is expected.
    std::fs::remove_dir_all(&folder)?;
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT])?;
    let interrupted = machinery.clone();
    std::thread::spawn(move || signals.forever().for_each(|_| interrupt(&interrupted)));

    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["run"] => {
            machinery.devices.start_dma()?;
            machinery.guest.set_running(true);
            println!("runs");
        }
        ["receive", address] => {
            let listener = Listener::bind(&address.parse()?)?;
            // Kept in memory, what became of a move is forgotten with the process. A VMM whose machines matter keeps
            // it on a disk: `Ledger::open`.
            let ledger = Arc::new(Ledger::new());
            // A client that stays silent, or is not migrating, does not block others.
            let acceptor = Acceptor::new(listener, None, Arc::clone(&ledger), &machinery.options)?;
            println!("listens at {}", acceptor.address());
            machinery.receive(&acceptor, &ledger)?;
            std::thread::spawn(move || print_answers(&acceptor));
        }
        _ => return Err("expected `run` or `receive ADDRESS`".into()),
    }
    monitor(&machinery)
}
