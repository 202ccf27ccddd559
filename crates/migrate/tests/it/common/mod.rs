//! What the engine's tests are made of: a device with scripted faults, a world that counts how often
//! its guest runs, and links that fail where they are told to.
#![allow(dead_code, unused_imports, reason = "each binary uses a part")]

pub mod closures;
mod device;
mod door;
pub mod hooked;
mod links;
mod odd;
pub mod peer;
#[path = "../../scripted/mod.rs"]
mod scripted;
mod zeroes;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[allow(unused_imports, reason = "each test binary uses a part")]
pub use device::{TestDevice, world};
pub use door::Door;
use limosa_client::DirtySource;
use limosa_migrate::{
    AfterLoad, Cancel, Convergence, Destination, DirtyLog, GuestPages, Ledger, Memory, MemoryRegion,
    MovedDevice, Nobody, Observer, Options, Outcome, Received, Source, Vmm,
};
#[allow(unused_imports, reason = "each test binary uses a part")]
pub use links::{Fault, FaultyLink, Way, move_over_links};
#[allow(unused_imports, reason = "each test binary uses a part")]
pub use odd::Quirks;
#[allow(unused_imports, reason = "each test binary uses a part")]
pub use scripted::Step;
pub use zeroes::Zeroes;

use limosa_migrate::link::{Link, SocketLink};
use limosa_protocol::State;

/// Limits short enough for tests in which somebody stays silent.
pub fn options() -> Options {
    Options::default()
        .with_silence_max(Duration::from_secs(10))
        .with_load_max(Duration::from_secs(10))
        .with_commit_max(Duration::from_secs(10))
        .with_convergence(Convergence::default().with_downtime_goal(Duration::from_secs(3600)))
}

/// Guest memory in a vector.
pub struct VecPages(pub Mutex<Vec<u8>>);

impl VecPages {
    pub fn new(bytes: usize) -> VecPages {
        VecPages(Mutex::new(vec![0; bytes]))
    }
}

impl GuestPages for VecPages {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..into.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }
}

/// Shared guest memory.
pub type Pages = Arc<dyn GuestPages + Send + Sync>;

/// A source and a destination with one or more devices each.
pub struct Ends {
    pub source: Vec<TestDevice>,
    pub destination: Vec<TestDevice>,
    pub ledger: Ledger,
    pub options: Options,
    /// Of the source, where it differs.
    pub source_options: Option<Options>,
    pub cancel: Option<Cancel>,
    pub after: AfterLoad,
    pub vmm: Arc<dyn Vmm + Send>,
    pub observer: Arc<dyn Observer + Send>,
    /// What each side says that its devices are.
    pub kinds: (Option<String>, Option<String>),
    /// Of the source; taken by the next move.
    pub log: Mutex<Option<Box<dyn DirtyLog>>>,
    /// Of the source.
    pub sources: Vec<Arc<dyn DirtySource>>,
    /// Of each side; region 0 at address 0.
    pub memory: Option<(Pages, Pages, u64)>,
}

impl Ends {
    pub fn new(source: Vec<TestDevice>, destination: Vec<TestDevice>) -> Ends {
        Ends {
            source,
            destination,
            ledger: Ledger::new(),
            options: options(),
            source_options: None,
            cancel: None,
            after: AfterLoad::default(),
            vmm: Arc::new(Nobody),
            observer: Arc::new(Nobody),
            kinds: (None, None),
            log: Mutex::default(),
            sources: Vec::new(),
            memory: None,
        }
    }

    /// Runs `act` with the source's end.
    pub fn with_source<R>(&self, act: impl FnOnce(Source<'_>) -> R) -> R {
        let devices: Vec<_> = (self.source.iter())
            .map(|device| MovedDevice::new(&device.client).with_kind(self.kinds.0.clone()))
            .collect();
        let regions = self.memory.iter().map(|(pages, _, size)| MemoryRegion {
            id: 0,
            iova: 0,
            size: *size,
            pages: &**pages,
        });
        let mut log = self.log.lock().unwrap().take();
        act(Source::new(&devices, self.source_options.as_ref().unwrap_or(&self.options))
            .with_memory(
                match log.as_deref_mut() {
                    Some(log) => Memory::logged(regions.collect(), log),
                    None => Memory::stopped(regions.collect()),
                }
                .with_sources(self.sources.iter().map(|source| &**source as &dyn DirtySource).collect()),
            )
            .with_vmm(&*self.vmm)
            .with_observer(&*self.observer)
            .with_cancel(self.cancel.as_ref()))
    }

    /// Runs `act` with the destination's end.
    pub fn with_destination<R>(&self, act: impl FnOnce(Destination<'_>) -> R) -> R {
        let devices: Vec<_> = (self.destination.iter())
            .map(|device| MovedDevice::new(&device.client).with_kind(self.kinds.1.clone()))
            .collect();
        let regions: Vec<_> = (self.memory.iter())
            .map(|(_, pages, size)| MemoryRegion { id: 0, iova: 0, size: *size, pages: &**pages })
            .collect();
        act(Destination::new(&devices, &self.ledger, &self.options)
            .with_memory(&regions)
            .with_after(self.after)
            .with_vmm(&*self.vmm))
    }

    /// One move over these links.
    pub fn run(&self, near: impl Link, far: impl Link) -> (Outcome, Received) {
        std::thread::scope(|scope| {
            let received =
                scope.spawn(move || self.with_destination(|destination| destination.receive(&far)));
            let outcome = self.with_source(|source| source.send(&near));
            drop(near);
            (outcome, received.join().unwrap())
        })
    }

    /// One move over a link that works.
    pub fn run_plain(&self) -> (Outcome, Received) {
        let (near, far) = SocketLink::pair().unwrap();
        self.run(near, far)
    }

    /// Asks over new links that work, until there is an answer: a hasty source may give a question up.
    pub fn resolve(&self, mut doubt: limosa_migrate::InDoubt) -> Outcome {
        let begun = Instant::now();
        loop {
            let (near, far) = SocketLink::pair().unwrap();
            let (outcome, answered) = std::thread::scope(|scope| {
                let answered =
                    scope.spawn(move || self.with_destination(|destination| destination.receive(&far)));
                let outcome = self.with_source(|source| source.resolve(doubt, &near));
                drop(near);
                (outcome, answered.join().unwrap())
            });
            match outcome {
                Outcome::InDoubt(again) if !matches!(answered, Received::Answered { .. }) => doubt = again,
                outcome => {
                    assert!(matches!(answered, Received::Answered { .. }), "{answered:?}");
                    return outcome;
                }
            }
            assert!(begun.elapsed() < limosa_testing::LIMIT, "{answered:?}");
        }
    }

    /// The invariants, whatever happened; a move in doubt is resolved first. Whether it was moved.
    pub fn check(&self, outcome: Outcome, received: Received, what: &str) -> bool {
        for device in &self.source {
            assert!(device.guest.most() <= 1, "{what}: {} ran twice at once", device.name());
        }
        let outcome = match outcome {
            Outcome::InDoubt(doubt) => {
                for device in &self.source {
                    let state = device.state();
                    assert!(!state.is_running(), "{what}: in doubt, and {} is in {state}", device.name());
                }
                self.resolve(doubt)
            }
            outcome => outcome,
        };
        for device in self.source.iter().chain(&self.destination) {
            assert!(device.guest.most() <= 1, "{what}: {} ran twice at once", device.name());
            assert_eq!(device.guest.running(), 1, "{what}: {outcome:?}\n{received:?}");
        }
        match outcome {
            Outcome::Moved(_) => {
                assert!(matches!(received, Received::Runs(_)), "{what}: {received:?}");
                for (source, destination) in self.source.iter().zip(&self.destination) {
                    assert_eq!(source.state(), State::Stop, "{what}");
                    assert_eq!(destination.state(), State::Running, "{what}");
                    assert!(destination.holds_guest(), "{what}");
                    assert_eq!(destination.data(), source.data(), "{what}");
                }
                if let Some((source, destination, size)) = &self.memory {
                    let read = |pages: &Pages| {
                        let mut all = vec![0; *size as usize];
                        pages.read(0, &mut all).unwrap();
                        all
                    };
                    assert!(read(source) == read(destination), "{what}: memory differs");
                }
                true
            }
            Outcome::Undone { report, .. } => {
                assert!(!matches!(received, Received::Runs(_)), "{what}: {received:?}");
                for device in &self.source {
                    assert_eq!(device.state(), State::Running, "{what}: {:?}", report.notes);
                    assert!(device.holds_guest(), "{what}");
                    assert!(!device.is_logging(), "{what}: DMA logging was left on");
                }
                for device in &self.destination {
                    assert_eq!(device.state(), State::Running, "{what}: found so");
                    assert!(!device.holds_guest(), "{what}: what was loaded is still there");
                }
                false
            }
            Outcome::InDoubt(doubt) => panic!("{what}: still in doubt: {doubt:?}"),
        }
    }
}
