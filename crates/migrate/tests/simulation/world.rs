//! Facts that only the simulation knows: the machine that runs at this moment, and the expected contents of memory
//! and devices.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use limosa_clockwork::simulation;
use limosa_migrate::Round;

use crate::plan::{End, Plan};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// The truth about one guest.
#[derive(Default)]
pub struct World {
    /// How many devices and vCPUs run at each end, with the guest's state.
    running: [AtomicI64; 2],
    wrong: Mutex<Option<String>>,
    truth: Mutex<Truth>,
    /// When something went wrong last.
    struck: Mutex<Option<Duration>>,
    /// Whether pages were received where they belong, and whether some were sent without a checksum.
    pub received_in_place: AtomicBool,
    pub sent_unchecked: AtomicBool,
}

/// Memory, and the blocks of devices.
pub type Contents = (Vec<Vec<u8>>, Vec<Vec<u64>>);

/// What a guest that lost nothing has.
#[derive(Default)]
pub struct Truth {
    pub memory: Vec<Vec<u8>>,
    pub devices: Vec<Vec<u64>>,
    /// Pages that vCPUs wrote since the log was started or harvested.
    pub marks: Vec<BTreeSet<u64>>,
    /// Pages that each device wrote since its log was started or reported: region and page.
    pub device_marks: Vec<BTreeSet<(usize, u64)>>,
    /// Pages that were taken from the logs of a move: an undo has to give them back.
    pub taken: BTreeSet<(usize, u64)>,
    pub given_back: BTreeSet<(usize, u64)>,
    pub logs: bool,
    /// Memory and devices when nothing ran any more, the last time; only where that is asked for.
    pub at_stop: Option<Contents>,
    pub keeps_stop: bool,
    /// What the source's devices have said of their pre-copy data.
    pub precopy: Vec<Precopy>,
    /// Bytes that each device of the destination has loaded.
    pub loaded: Vec<u64>,
    /// The round that was reported last at the source.
    pub last_round: Option<Round>,
}

/// What a device has said of its pre-copy data.
#[derive(Clone, Copy, Debug, Default)]
pub struct Precopy {
    /// When its saving session opened; `None` without one.
    pub since: Option<Duration>,
    /// Bytes of initial data that were left when it was asked last, and when it said for the first time that there are
    /// some.
    pub initial_told: u64,
    pub told_at: Duration,
    /// Bytes it had given when all initial data was given.
    pub initial_end: Option<u64>,
    /// Bytes that are left now.
    pub left: u64,
}

impl World {
    pub fn new(plan: &Plan) -> World {
        let (regions, devices) = (&plan.regions, plan.devices.len());
        let truth = Truth {
            memory: regions.iter().map(|pages| vec![plan.fill(*pages); *pages as usize * PAGE]).collect(),
            devices: vec![Vec::new(); devices],
            marks: vec![BTreeSet::new(); regions.len()],
            device_marks: vec![BTreeSet::new(); devices],
            precopy: vec![Precopy::default(); devices],
            loaded: vec![0; devices],
            ..Truth::default()
        };
        World { truth: Mutex::new(truth), ..World::default() }
    }

    pub fn truth(&self) -> MutexGuard<'_, Truth> {
        self.truth.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something of the guest begins or ends to run at this end.
    pub fn runs(&self, end: End, runs: bool) {
        let by = if runs { 1 } else { -1 };
        let before = self.running[end as usize].fetch_add(by, Ordering::SeqCst);
        if before + by == 0 && end == End::Source {
            let truth = &mut *self.truth();
            if truth.keeps_stop {
                truth.at_stop = Some((truth.memory.clone(), truth.devices.clone()));
            }
        }
        if let Err(wrong) = self.check() {
            self.wrong(wrong);
        }
    }

    /// Something goes wrong now, of what was planned.
    pub fn strikes(&self) {
        *self.struck.lock().unwrap_or_else(PoisonError::into_inner) = Some(simulation::elapsed());
    }

    /// When something went wrong last.
    pub fn struck(&self) -> Option<Duration> {
        *self.struck.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn running(&self, end: End) -> i64 {
        self.running[end as usize].load(Ordering::SeqCst)
    }

    /// Something is not as it should be; the first one counts.
    pub fn wrong(&self, what: impl Into<String>) {
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        let what = what.into();
        limosa_clockwork::simulation::note(|| format!("WRONG: {what}"));
        wrong.get_or_insert(what);
    }

    /// What must hold at every step.
    pub fn check(&self) -> Result<(), String> {
        let (source, destination) = (self.running(End::Source), self.running(End::Destination));
        if source > 0 && destination > 0 {
            return Err(format!("two run: {source} parts at the source, {destination} at the destination"));
        }
        if source < 0 || destination < 0 {
            return Err("the simulation counts who runs, and has counted wrong".into());
        }
        match &*self.wrong.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(wrong) => Err(wrong.clone()),
            None => Ok(()),
        }
    }
}
