//! When pre-copy stops: the goal, the stall, and what the caller chose to do then.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{Ends, VecPages, world};
use limosa_migrate::{
    Cancel, Convergence, DirtyLog, Error, GuestPages, Observer, Outcome, PAGE_BYTES, Phase, Round, Vmm,
    WhenStalled,
};
use limosa_protocol::MigrationFlags;
use limosa_protocol::bitmap::DirtyBitmap;

/// Enough pages for the rate to be measured.
const PAGES: u64 = 512;

/// A guest that dirties all of its pages in every round, until it is slowed down enough.
struct Restless {
    memory: Arc<VecPages>,
    dirty: Mutex<BTreeSet<u64>>,
    running: AtomicBool,
    /// How often it can be slowed down.
    throttles: u32,
    steps: Mutex<Vec<u32>>,
    rounds: AtomicU32,
    /// Calls the move off after this number of rounds.
    cancel: Mutex<Option<(u32, Cancel)>>,
}

impl Restless {
    fn write(&self) {
        let slowed = self.steps.lock().unwrap().iter().filter(|step| **step > 0).count() as u32;
        if !self.running.load(Ordering::SeqCst) || (self.throttles > 0 && slowed == self.throttles) {
            return;
        }
        for page in 0..PAGES {
            self.memory.write(page * PAGE_BYTES, &self.rounds.load(Ordering::SeqCst).to_le_bytes()).unwrap();
            self.dirty.lock().unwrap().insert(page);
        }
    }
}

impl Observer for Restless {
    fn phase(&self, phase: Phase) {
        if phase == Phase::PreCopy {
            self.write();
        }
    }
    fn round(&self, round: &Round) {
        self.rounds.store(round.round, Ordering::SeqCst);
        if let Some((after, cancel)) = &*self.cancel.lock().unwrap()
            && round.round >= *after
        {
            cancel.cancel();
        }
        self.write();
    }
}

impl Vmm for Restless {
    fn throttle(&self, step: u32) -> bool {
        self.steps.lock().unwrap().push(step);
        step <= self.throttles
    }
    fn stop(&self) -> Result<(), String> {
        self.running.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn resume(&self) {
        self.running.store(true, Ordering::SeqCst);
    }
}

struct Log(Arc<Restless>);

impl DirtyLog for Log {
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn harvest(&mut self, _: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        std::mem::take(&mut *self.0.dirty.lock().unwrap())
            .into_iter()
            .for_each(|page| dirty.set_range(page, 1));
        Ok(())
    }
    fn stop(&mut self) {}
}

/// One move of a restless guest that can be slowed down so often. Nothing may stand still.
fn run(
    when_stalled: WhenStalled,
    throttles: u32,
    cancel_after: Option<u32>,
) -> (Outcome, bool, Arc<Restless>) {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 1000);
    let mut ends = Ends::new(vec![source], vec![destination]);
    let memory = Arc::new(VecPages::new((PAGES * PAGE_BYTES) as usize));
    let guest = Arc::new(Restless {
        memory: memory.clone(),
        dirty: Mutex::default(),
        running: AtomicBool::new(true),
        throttles,
        steps: Mutex::default(),
        rounds: AtomicU32::new(0),
        cancel: Mutex::default(),
    });
    if let Some(after) = cancel_after {
        ends.cancel = Some(Cancel::new().unwrap());
        *guest.cancel.lock().unwrap() = ends.cancel.clone().map(|cancel| (after, cancel));
    }
    let there = Arc::new(VecPages::new((PAGES * PAGE_BYTES) as usize));
    ends.memory = Some((memory, there, PAGES * PAGE_BYTES));
    ends.log = Mutex::new(Some(Box::new(Log(guest.clone()))));
    (ends.vmm, ends.observer) = (guest.clone(), guest.clone());
    ends.options.convergence = Convergence::default()
        .with_downtime_goal(Duration::ZERO)
        .with_stalled_rounds_max(3)
        .with_rounds_max(40)
        .with_when_stalled(when_stalled);
    let (outcome, received) = ends.run_plain();
    let kept = match &outcome {
        Outcome::Moved(report) => Outcome::Moved(report.clone()),
        Outcome::Undone { why: Error::NotConverging { obstacle, predicted, is_minimum, goal }, report } => {
            Outcome::Undone {
                why: Error::NotConverging {
                    obstacle: obstacle.clone(),
                    predicted: *predicted,
                    is_minimum: *is_minimum,
                    goal: *goal,
                },
                report: report.clone(),
            }
        }
        Outcome::Undone { report, .. } => Outcome::Undone { why: Error::Cancelled, report: report.clone() },
        Outcome::InDoubt(doubt) => panic!("{doubt:?}"),
    };
    (kept, ends.check(outcome, received, "a restless guest"), guest)
}

#[test]
fn a_guest_that_does_not_converge_is_stopped_all_the_same_and_that_is_said() {
    let (outcome, moved, _) = run(WhenStalled::SwitchOver, 0, None);
    assert!(moved);
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    assert!((3..=40).contains(&report.rounds.len()), "{}", report.rounds.len());
    assert!(report.notes.iter().any(|note| note.contains("the goal was 0.0 us")), "{:?}", report.notes);
    assert_eq!(report.predicted_downtime_ns, report.rounds.last().map(|round| round.predicted_downtime_ns));
    // The first round has zeroes only.
    assert!(report.rounds.iter().skip(1).all(|round| round.bytes_per_second > 0));
}

#[test]
fn a_move_that_does_not_converge_is_called_off_where_that_was_chosen() {
    let (outcome, moved, guest) = run(WhenStalled::Abort, 0, None);
    assert!(!moved);
    let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
    assert!(why.to_string().contains("does not converge"), "{why}");
    assert!(guest.running.load(Ordering::SeqCst), "it was never stopped");
    assert_eq!(*guest.steps.lock().unwrap(), [1], "asked once, and it cannot");
}

#[test]
fn a_guest_that_is_slowed_down_converges_and_is_let_go() {
    let (outcome, moved, guest) = run(WhenStalled::SwitchOver, 2, None);
    assert!(moved, "{outcome:?}");
    // It is not the guest's fault that a downtime of zero is impossible.
    assert_eq!(*guest.steps.lock().unwrap(), [1, 2, 0]);
    let Outcome::Moved(report) = outcome else { panic!("{outcome:?}") };
    assert_eq!(report.rounds.last().unwrap().dirty_bytes, 0, "it came to rest");
}

#[test]
fn keeping_trying_ends_with_a_cancel_and_the_guest_at_full_speed() {
    let (outcome, moved, guest) = run(WhenStalled::KeepTrying, 0, Some(60));
    assert!(!moved);
    let Outcome::Undone { why: Error::Cancelled, report } = outcome else { panic!("{outcome:?}") };
    assert!(report.rounds.len() >= 60, "beyond the last round: {}", report.rounds.len());
    assert!(guest.running.load(Ordering::SeqCst));
}
