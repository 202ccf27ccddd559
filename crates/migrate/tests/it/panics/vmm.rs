//! Panics of the VMM's hooks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use limosa_migrate::{CommitNote, Outcome, Received, Vmm, WhenStalled};

use super::{FLAGS, Machine, PanickingLog, panicked};
use crate::common::hooked::{ends_in_time, panic_quietly};

/// A VMM that panics where it is told to.
struct PanickingVmm {
    at: &'static str,
    /// Refuses the commit, so that the move is undone.
    refuses: bool,
    resumed: AtomicUsize,
}

impl PanickingVmm {
    fn new(at: &'static str) -> PanickingVmm {
        let refuses = at == "resume";
        PanickingVmm { at, refuses, resumed: AtomicUsize::new(0) }
    }
    fn call(&self, place: &str) {
        if self.at == place {
            panic_quietly();
        }
    }
}

impl Vmm for PanickingVmm {
    fn throttle(&self, step: u32) -> bool {
        // The word that ends it is another call.
        self.call(if step == 0 { "throttle off" } else { "throttle" });
        step <= 1
    }
    fn stop(&self) -> Result<(), String> {
        self.call("stop");
        Ok(())
    }
    fn committing(&self, _: &CommitNote) -> Result<(), String> {
        self.call("committing");
        if self.refuses { Err("a full disk".into()) } else { Ok(()) }
    }
    fn resume(&self) {
        self.resumed.fetch_add(1, Ordering::SeqCst);
        self.call("resume");
    }
    fn prepare(&self) -> Result<(), String> {
        self.call("prepare");
        Ok(())
    }
    fn start(&self) {
        self.call("start");
    }
}

#[test]
fn a_panic_of_the_vmm_is_a_refusal_where_it_can_refuse_and_a_note_where_it_cannot() {
    let cases = [
        ("stop", "Vmm::stop", false),
        ("committing", "Vmm::committing", false),
        ("resume", "Vmm::resume", false),
        ("prepare", "Vmm::prepare", false),
        ("start", "Vmm::start", true),
        ("throttle", "Vmm::throttle", true),
        ("throttle off", "Vmm::throttle", true),
    ];
    for (at, place, moves) in cases {
        ends_in_time(at, move || {
            let mut machine = Machine::new(FLAGS);
            let vmm = Arc::new(PanickingVmm::new(at));
            machine.vmms = [vmm.clone(), vmm.clone()];
            if at.starts_with("throttle") {
                // The log says that all is dirty whenever it is asked.
                machine.log = PanickingLog { always_dirty: true, ..PanickingLog::new(None) };
                machine.options.convergence = machine
                    .options
                    .convergence
                    .with_downtime_goal(std::time::Duration::ZERO)
                    .with_stalled_rounds_max(1)
                    .with_when_stalled(WhenStalled::SwitchOver);
            }
            let (outcome, received) = machine.run();
            machine.check(&outcome, &received, at);
            assert_eq!(matches!(outcome, Outcome::Moved(_)), moves, "{at}: {outcome:?}");
            if at != "stop" || !moves {
                let expected = usize::from(!moves);
                assert_eq!(
                    vmm.resumed.load(Ordering::SeqCst),
                    expected,
                    "{at}: vCPUs that were stopped go on"
                );
            }
            let notes = match (&outcome, &received) {
                (Outcome::Moved(here), Received::Runs(there)) => [&here.notes[..], &there.notes[..]].concat(),
                (Outcome::Undone { report, .. }, _) => report.notes.clone(),
                _ => Vec::new(),
            };
            let told = panicked(&outcome, &received).is_some_and(|told| told == place)
                || notes.iter().any(|note| note.contains(&format!("{place} panicked")));
            assert!(told, "{at}: {outcome:?} {notes:?}");
        });
    }
}
