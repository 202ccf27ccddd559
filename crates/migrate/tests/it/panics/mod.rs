//! Panics in what the engine calls: devices, observers, the VMM, memory and its log. None leaves a call of the engine's
//! or hangs it; the guest runs on one side, or the move is in doubt.

mod devices;
mod links;
mod memory;
mod observers;
mod snapshots;
mod vmm;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use limosa_migrate::link::{Link, SocketLink};
use limosa_migrate::{
    Destination, Error, Ledger, Memory, MemoryRegion, MovedDevice, Nobody, Observer, Options, Outcome,
    PAGE_BYTES, Received, Source, Vmm,
};
use limosa_protocol::MigrationFlags;

use crate::common::hooked::{Hooked, panic_quietly};
use crate::common::options;
use memory::{PanickingLog, PanickingPages};

const FLAGS: MigrationFlags = MigrationFlags::SETS[3];
const PAGES: u64 = 16;

fn guest() -> Vec<u8> {
    (0..1000_u32).map(|at| at as u8 | 1).collect()
}

/// Both ends of a move, of which anything may panic.
struct Machine {
    source: Hooked,
    destination: Hooked,
    observers: [Arc<dyn Observer + Send>; 2],
    vmms: [Arc<dyn Vmm + Send>; 2],
    memory: [Arc<PanickingPages>; 2],
    log: PanickingLog,
    options: Options,
}

impl Machine {
    fn new(flags: MigrationFlags) -> Machine {
        let pages = |panics| {
            let bytes = Mutex::new(vec![0; (PAGES * PAGE_BYTES) as usize]);
            Arc::new(PanickingPages { bytes, panics })
        };
        let machine = Machine {
            source: Hooked::new("source", flags, &guest()),
            destination: Hooked::new("destination", flags, &[]),
            observers: [Arc::new(Nobody), Arc::new(Nobody)],
            vmms: [Arc::new(Nobody), Arc::new(Nobody)],
            memory: [pages(None), pages(None)],
            log: PanickingLog::new(None),
            options: options(),
        };
        machine.memory[0].bytes.lock().unwrap()[5000] = 7;
        machine
    }

    fn run(&mut self) -> (Outcome, Received) {
        self.run_over(|link, _| Box::new(link))
    }

    fn run_over(&mut self, wrap: impl Fn(SocketLink, bool) -> Box<dyn Link>) -> (Outcome, Received) {
        let (here, there) = ([MovedDevice::new(&self.source)], [MovedDevice::new(&self.destination)]);
        let region =
            |at: usize| MemoryRegion { id: 0, iova: 0, size: PAGES * PAGE_BYTES, pages: &*self.memory[at] };
        let (regions, ledger) = ([region(1)], Ledger::new());
        let source = Source::new(&here, &self.options)
            .with_memory(Memory::logged(vec![region(0)], &mut self.log))
            .with_vmm(&*self.vmms[0])
            .with_observer(&*self.observers[0]);
        let destination = Destination::new(&there, &ledger, &self.options)
            .with_memory(&regions)
            .with_vmm(&*self.vmms[1])
            .with_observer(&*self.observers[1]);
        let (near, far) = SocketLink::pair().unwrap();
        let (near, far) = (wrap(near, true), wrap(far, false));
        std::thread::scope(|scope| {
            let receiving = scope.spawn(move || destination.receive(&*far));
            let outcome = source.send(&*near);
            drop(near);
            (outcome, receiving.join().unwrap())
        })
    }

    /// The guest runs on one side, or somebody says that it does not.
    fn check(&self, outcome: &Outcome, received: &Received, what: &str) {
        let here = self.source.state().is_running() && self.source.data() == guest();
        let there = self.destination.state().is_running() && self.destination.data() == guest();
        assert!(!(here && there), "{what}: it runs twice");
        match outcome {
            Outcome::Moved(_) => {
                assert!(there && !here, "{what}: {received:?}");
                assert!(matches!(received, Received::Runs(_)), "{what}: {received:?}");
            }
            Outcome::Undone { report, .. } => {
                assert!(!there, "{what}: {received:?}");
                assert!(
                    here || !report.unrecovered.is_empty(),
                    "{what}: it runs nowhere, and nobody says so"
                );
                assert!(matches!(received, Received::Discarded { .. }), "{what}: {received:?}");
            }
            Outcome::InDoubt(_) => {
                assert!(!self.source.state().is_running(), "{what}: in doubt, and it runs");
                assert!(!matches!(received, Received::Discarded { .. }), "{what}: {received:?}");
            }
        }
    }
}

/// Why a move was undone: the source's own error, or the one of the destination, which the source was told of.
fn panicked(outcome: &Outcome, received: &Received) -> Option<String> {
    let place = |why: &Error| match why {
        Error::Panicked { place, message } => {
            assert_eq!(message, "a defect of a test's");
            Some(place.clone())
        }
        _ => None,
    };
    let here = match outcome {
        Outcome::Undone { why, .. } => place(why),
        Outcome::InDoubt(doubt) => place(&doubt.why),
        Outcome::Moved(_) => None,
    };
    let there = match received {
        Received::Discarded { why, .. } | Received::Broken { why, .. } => place(why),
        _ => None,
    };
    here.or(there)
}

/// Panics in the n-th call of these.
struct Panicking<T> {
    calls: AtomicUsize,
    at: usize,
    /// Where it was when it panicked.
    fired: Mutex<Option<T>>,
}

impl<T: Send> Panicking<T> {
    fn new(at: usize) -> Panicking<T> {
        Panicking { calls: AtomicUsize::new(0), at, fired: Mutex::new(None) }
    }
    fn call(&self, place: T) {
        if self.calls.fetch_add(1, Ordering::SeqCst) == self.at {
            *self.fired.lock().unwrap() = Some(place);
            panic_quietly();
        }
    }
}
