//! A VMM, and how it moves its machine with Limosa. It is meant to be read in the order of its files: the guest, the
//! devices, the hooks that the engine calls, and here the machine and its moves.
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

mod devices;
mod guest;
mod hooks;

use std::error::Error;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use limosa_migrate::link::{Address, Bandwidth, Connector, Listener, Wait, connect};
use limosa_migrate::{
    Acceptor, Cancel, Destination, InDoubt, Incoming, Ledger, Memory, MemoryRegion, Options, Outcome,
    PAGE_BYTES, Received, Source,
};

use devices::Devices;
use guest::{Guest, LogHandle, PAGES};
use hooks::{Hooks, Watch};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// How many times a source in doubt asks, once a second, before it leaves the decision to a person.
const RESOLVE_TRIES: u32 = 10;

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
    fn new(folder: &Path) -> Result<Machinery> {
        let memory = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)?);
        memory.set_len(PAGES * PAGE_BYTES)?;
        let guest = Arc::new(Guest::new(&memory)?);
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
