//! The VMM of a machine: the hooks that the engine calls.

use super::*;

impl Vmm for Computer {
    fn throttle(&self, step: u32) -> bool {
        self.panics.call(Place::Throttle, &self.world);
        self.guest.slow(step);
        step < 4
    }

    fn stop(&self) -> Result<(), String> {
        self.panics.call(Place::Stop, &self.world);
        if self.stop_refused.load(Ordering::SeqCst) {
            self.world.strikes();
            return Err("a vCPU does not answer".into());
        }
        self.check_precopy();
        if self.mutation != Some(Mutation::NeverStops) {
            self.guest.stop(self.end);
        }
        Ok(())
    }

    fn committing(&self, note: &CommitNote) -> Result<(), String> {
        self.panics.call(Place::Committing, &self.world);
        if self.note_full.load(Ordering::SeqCst) {
            self.world.strikes();
            return Err("no space left on the disk".into());
        }
        *self.noted.lock().expect("not poisoned") = Some(note.clone());
        Ok(())
    }

    fn resume(&self) {
        self.panics.call(Place::Resume, &self.world);
        if !self.stands {
            self.guest.start(self.end);
        }
    }

    fn prepare(&self) -> Result<(), String> {
        // Nothing has run since the source stopped.
        if let Err(difference) = self.compare() {
            self.world.wrong(format!("about to run: {difference}"));
        }
        self.panics.call(Place::Prepare, &self.world);
        if self.prepare_refused.load(Ordering::SeqCst) {
            self.world.strikes();
            return Err("no memory for it".into());
        }
        Ok(())
    }

    fn start(&self) {
        self.panics.call(Place::Start, &self.world);
        self.guest.start(self.end);
    }
}

impl Observer for Computer {
    fn round(&self, round: &Round) {
        if self.end == End::Source {
            let truth = &mut *self.world.truth();
            truth.last_round = Some(*round);
        }
    }

    fn phase(&self, phase: Phase) {
        limosa_clockwork::simulation::note(|| format!("phase {phase:?}"));
        // Before anything at which the process could crash.
        self.starts.fetch_or(phase == Phase::Start, Ordering::SeqCst);
        self.guest.wake();
        self.phases.lock().begun.push(phase);
        self.phases.notify_all();
        self.panics.call(Place::Observer, &self.world);
    }
}
