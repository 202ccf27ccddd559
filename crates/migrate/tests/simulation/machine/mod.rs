//! One end: devices, memory, a VMM, what it keeps on disk, and the engine's process.

mod vmm;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use limosa_client::DeviceExt;
use limosa_clockwork::{Monitor, now, simulation};
use limosa_migrate::link::{Link, LinkError, Wait};
use limosa_migrate::{
    AfterLoad, Cancel, CommitNote, Destination, DirtyLog, InDoubt, Ledger, Memory, MemoryRegion, MovedDevice,
    Observer, Options, Outcome, Phase, Received, Round, Source, Vmm, WhenStalled,
};
use limosa_protocol::State;

use crate::device::SimDevice;
use crate::disk::Disk;
use crate::guest::Guest;
use crate::link::Network;
use crate::memory::{RegionPages, SimLog, SimMemory, iova};
use crate::model::{get, set};
use crate::panics::{Panics, Place};
use crate::plan::{End, Mutation, Plan, STANDSTILL_MAX};
use crate::world::World;

pub struct Computer {
    pub end: End,
    pub world: Arc<World>,
    pub guest: Arc<Guest>,
    pub network: Arc<Network>,
    pub memory: Arc<SimMemory>,
    pub devices: Vec<SimDevice>,
    pages: Vec<RegionPages>,
    pub options: Options,
    cancel: Mutex<Cancel>,
    /// When it was called off, of which the engine is to take note soon.
    pub cancelled: Monitor<Option<std::time::Instant>>,
    /// What the source notes before it commits, for the process that is started anew.
    pub noted: Mutex<Option<CommitNote>>,
    pub note_full: AtomicBool,
    pub prepare_refused: AtomicBool,
    pub stop_refused: AtomicBool,
    pub log_lost: Arc<AtomicBool>,
    pub panics: Arc<Panics>,
    /// In what time what a device says is acted upon.
    look_max: Duration,
    /// How long initial data may hold the stop back.
    initial_max: Duration,
    /// Nothing goes wrong.
    is_calm: bool,
    /// The guest is saved, and not moved.
    saves: bool,
    /// The machine stood still before the move, and is to stay so.
    stands: bool,
    mutation: Option<Mutation>,
    /// What phases this end has come to.
    pub phases: Monitor<Phases>,
    /// It has begun to start its devices.
    pub starts: AtomicBool,
    pub ledger: Mutex<Option<Arc<Ledger>>>,
    pub ledger_folder: PathBuf,
}

#[derive(Default)]
pub struct Phases {
    pub begun: Vec<Phase>,
    /// No more come.
    pub over: bool,
}

impl Computer {
    pub fn new(
        end: End,
        plan: &Plan,
        world: &Arc<World>,
        guest: &Arc<Guest>,
        network: &Arc<Network>,
        folder: PathBuf,
    ) -> Computer {
        let panics = Arc::<Panics>::default();
        let memory = SimMemory::new(end, world.clone(), plan, panics.clone());
        let memory = Arc::new(memory);
        let devices = (plan.devices.iter().enumerate())
            .map(|(number, device)| SimDevice::new(end, number, *device, &plan.regions, &memory, world))
            .collect();
        let pages =
            (0..plan.regions.len()).map(|region| RegionPages { memory: memory.clone(), region }).collect();
        Computer {
            end,
            world: world.clone(),
            guest: guest.clone(),
            network: network.clone(),
            memory,
            devices,
            pages,
            options: plan.broken_options(end),
            cancel: Mutex::new(Cancel::new().expect("an eventfd")),
            cancelled: Monitor::default(),
            noted: Mutex::default(),
            note_full: AtomicBool::new(false),
            prepare_refused: AtomicBool::new(false),
            stop_refused: AtomicBool::new(false),
            log_lost: Arc::default(),
            panics,
            look_max: Duration::from_millis(100) + plan.slowest(),
            initial_max: plan.convergence.initial_max,
            is_calm: plan.faults.is_empty(),
            saves: plan.saves.is_some(),
            stands: plan.stands,
            mutation: plan.mutation,
            phases: Monitor::default(),
            starts: AtomicBool::new(false),
            ledger: Mutex::default(),
            ledger_folder: folder,
        }
    }

    fn regions(&self) -> Vec<MemoryRegion<'_>> {
        let regions = self.pages.iter().enumerate();
        let regions = regions.map(|(region, pages)| MemoryRegion {
            id: region as u32,
            iova: iova(region),
            size: self.memory.len(region),
            pages,
        });
        regions.collect()
    }

    fn moved(&self) -> Vec<MovedDevice<'_>> {
        self.devices.iter().map(|device| MovedDevice::new(device)).collect()
    }

    /// With the source's side of the engine.
    pub fn as_source<R>(&self, act: impl FnOnce(Source<'_>) -> R) -> R {
        self.as_source_with(&self.options, act)
    }

    fn as_source_with<R>(&self, options: &Options, act: impl FnOnce(Source<'_>) -> R) -> R {
        let devices = self.moved();
        let mut log = SimLog {
            world: self.world.clone(),
            covers_devices: self.memory.log_covers_devices,
            lost: self.log_lost.clone(),
            mutation: self.mutation,
            panics: self.panics.clone(),
        };
        let log: &mut dyn DirtyLog = &mut log;
        let cancel = self.cancel.lock().expect("not poisoned").clone();
        act(Source::new(&devices, options)
            .with_memory(Memory::logged(self.regions(), log))
            .with_vmm(self)
            .with_observer(self)
            .with_cancel(Some(&cancel)))
    }

    pub fn send(&self, link: &dyn Link) -> Outcome {
        self.as_source(|source| source.send_over(link, &|_: Wait<'_>| self.call()))
    }

    /// A move that never waits for a better moment.
    pub fn send_at_any_cost(&self, link: &dyn Link) -> Outcome {
        let convergence = self.options.convergence.with_when_stalled(WhenStalled::SwitchOver);
        let options = self.options.clone().with_convergence(convergence).with_standstill_max(STANDSTILL_MAX);
        self.as_source_with(&options, |source| source.send_over(link, &|_: Wait<'_>| self.call()))
    }

    /// A further link to the destination.
    fn call(&self) -> Result<Box<dyn Link>, LinkError> {
        self.panics.call(Place::FurtherLinks, &self.world);
        self.network.call()
    }

    /// Loads what was saved there.
    pub fn load(&self, from: &Disk, after: AfterLoad) -> Received {
        self.as_destination(|destination| destination.load(from, after))
    }

    pub fn resolve(&self, doubt: InDoubt, link: &dyn Link) -> Outcome {
        self.as_source(|source| source.resolve(doubt, link))
    }

    /// Receives a move or a question.
    pub fn receive(&self, link: &dyn Link) -> Received {
        self.as_destination(|destination| {
            destination.receive_over(link, &|wait: Wait<'_>| {
                self.panics.call(Place::FurtherLinks, &self.world);
                self.network.answer(wait)
            })
        })
    }

    fn as_destination(&self, act: impl FnOnce(Destination<'_>) -> Received) -> Received {
        let devices = self.moved();
        let ledger = self.ledger();
        let cancel = self.cancel.lock().expect("not poisoned").clone();
        let after = match self.mutation {
            Some(Mutation::RunsWhatStood) => AfterLoad::Run,
            _ => AfterLoad::AsFound,
        };
        act(Destination::new(&devices, &ledger, &self.options)
            .with_after(after)
            .with_memory(&self.regions())
            .with_vmm(self)
            .with_observer(self)
            .with_cancel(Some(&cancel)))
    }

    /// The ledger of this life of the process.
    pub fn ledger(&self) -> Arc<Ledger> {
        let mut ledger = self.ledger.lock().expect("not poisoned");
        let open = || Arc::new(Ledger::open(&self.ledger_folder).expect("the folder can be made"));
        ledger.get_or_insert_with(open).clone()
    }

    /// The process has crashed: what it had is gone.
    pub fn crashed(&self) {
        self.ledger.lock().expect("not poisoned").take();
        self.free_ledger();
        if self.mutation == Some(Mutation::LedgerForgets) {
            let _ = std::fs::remove_dir_all(&self.ledger_folder);
        }
    }

    /// Whether all of it is the guest's, and runs it; or stands still, where it stood still before the move.
    pub fn is_as_before(&self) -> Result<(), String> {
        if self.stands { self.stands_all() } else { self.runs_all() }
    }

    /// Whether all of it runs the guest.
    pub fn runs_all(&self) -> Result<(), String> {
        self.is_all(State::Running, Some(self.end))
    }

    /// Whether all of it holds the guest, and nothing runs.
    pub fn stands_all(&self) -> Result<(), String> {
        self.is_all(State::Stop, None)
    }

    fn is_all(&self, expected: State, vcpu_at: Option<End>) -> Result<(), String> {
        for device in &self.devices {
            let state = device.itself().state().map_err(|error| error.to_string())?;
            if state != expected || !get(&device.outside.holds) {
                return Err(format!("{:?}: a device is in {state}", self.end));
            }
        }
        match self.guest.runs_at() {
            at if at == vcpu_at => Ok(()),
            at => Err(format!("{:?}: the vCPU runs at {at:?}", self.end)),
        }
    }

    /// Its devices stop, before anything is moved.
    pub fn stand(&self) {
        for device in &self.devices {
            device.itself().set_state(State::Stop).expect("a device without a fault stops");
        }
    }

    /// At the stop: initial data is loaded, and a device that is quiet has given what it had.
    fn check_precopy(&self) {
        let truth = self.world.truth();
        let Some(round) = truth.last_round else { return };
        let now = simulation::elapsed();
        let mut wrong = None;
        for (number, device) in self.devices.iter().enumerate() {
            let precopy = truth.precopy[number];
            let Some(since) = precopy.since else { continue };
            let name = format!("device {number}");
            let is_overdue = now - since >= self.initial_max;
            // What it has said just before the stop may come too late.
            let looked = now - precopy.told_at > self.look_max;
            if !is_overdue && precopy.initial_told > 0 && (looked || round.device_initial_bytes > 0) {
                wrong = Some(format!("the stop comes, and {name} still has initial data: {precopy:?}"));
            }
            let loaded = truth.loaded[number];
            if !is_overdue
                && !self.saves
                && precopy.initial_told == 0
                && loaded < precopy.initial_end.unwrap_or(0)
            {
                wrong = Some(format!("the stop comes, and {name} has loaded {loaded} bytes: {precopy:?}"));
            }
            // What takes no more than this is not worth another look (`StopPolicy`).
            let floor = (self.options.convergence.downtime_goal / 64).max(Duration::from_millis(1));
            let little = (round.bytes_per_second as f64 * floor.as_secs_f64()) as u64;
            let may_drain = device.is_quiet() && !is_overdue && self.is_calm;
            if may_drain && precopy.left > little {
                wrong =
                    Some(format!("the stop comes, and {name}, which is quiet, has {} bytes", precopy.left));
            }
        }
        drop(truth);
        if let Some(wrong) = wrong {
            self.world.wrong(wrong);
        }
    }

    /// Whether somebody has reset the device in a way that the engine need not see, or before it comes to see it.
    fn lost(&self, device: &SimDevice) -> bool {
        get(&device.outside.lost) || !get(&device.outside.holds)
    }

    /// Whether a device was reset in a way that the engine need not see.
    pub fn has_lost(&self) -> bool {
        self.devices.iter().any(|device| get(&device.outside.lost))
    }

    /// Memory and devices are what the guest made them.
    pub fn compare(&self) -> Result<(), String> {
        if let Some(difference) = self.memory.difference() {
            return Err(difference);
        }
        let truth = self.world.truth();
        for (number, device) in self.devices.iter().enumerate() {
            if !self.lost(device) && get(&device.outside.blocks) != truth.devices[number] {
                return Err(format!("device {number} of the {:?} has not what the guest gave it", self.end));
            }
        }
        Ok(())
    }

    /// Somebody calls it off.
    pub fn cancel(&self) {
        let cancel = self.cancel.lock().expect("not poisoned").clone();
        // Nothing new begins meanwhile.
        let phases = self.phases.lock();
        let too_late = [Phase::Commit, Phase::Start, Phase::Finish, Phase::Undo];
        // Before that it is known what must come of it.
        if !phases.begun.iter().any(|phase| too_late.contains(phase)) {
            self.cancelled.lock().get_or_insert(now());
        }
        if self.mutation != Some(Mutation::CancelIgnored) {
            cancel.cancel();
        }
    }

    /// A device is reset by its guest, where that runs; otherwise by somebody else.
    pub fn reset(&self, device: usize) {
        let device = &self.devices[device];
        let Some(state) = self.guest.reset(self.end, device) else { return };
        // Until more is known: others run from here on.
        set(&device.outside.lost, true);
        // After the last look at a device nothing of it can be seen, and between a look and an arc only by the count.
        let is_late = match self.end {
            // The error tells of one that is not stopped yet, a note of others.
            End::Source => {
                let returns = |phase: &Phase| matches!(phase, Phase::Undo | Phase::Finish);
                state.is_running() || self.phases.lock().begun.iter().any(returns)
            }
            End::Destination if self.saves => true,
            // The last look at a device that stays stopped.
            End::Destination if self.stands => self.starts.load(Ordering::SeqCst),
            End::Destination => {
                self.starts.load(Ordering::SeqCst) && (!device.counts_resets() || state == State::Running)
            }
        };
        set(&device.outside.lost, is_late);
    }

    /// Nothing is wrong here any more.
    pub fn heal(&self) {
        *self.cancel.lock().expect("not poisoned") = Cancel::new().expect("an eventfd");
        // The process that was called off may have crashed before anybody asked how it ended.
        self.cancelled.lock().take();
        for flag in
            [&self.note_full, &self.prepare_refused, &self.stop_refused, &self.log_lost, &self.memory.fails]
        {
            flag.store(false, Ordering::SeqCst);
        }
        for device in &self.devices {
            device.find();
            device.outside.script.clear();
        }
        self.panics.disarm();
        self.free_ledger();
        self.network.refuse(false);
    }

    /// No record can be made any more; those that are there can be written.
    pub fn fill_ledger(&self) {
        let away = self.ledger_folder.with_extension("away");
        if self.ledger_folder.is_dir() && std::fs::rename(&self.ledger_folder, away).is_ok() {
            std::fs::write(&self.ledger_folder, "full").expect("the folder's folder can be written");
        }
    }

    pub fn free_ledger(&self) {
        let away = self.ledger_folder.with_extension("away");
        if away.is_dir() {
            std::fs::remove_file(&self.ledger_folder).expect("it is a file");
            std::fs::rename(away, &self.ledger_folder).expect("nothing is in its place");
        }
    }
}
