//! The hooks that the engine calls, and an observer.

use std::time::Duration;

use limosa_migrate::{CommitNote, Estimate, Observer, Phase, Round, Vmm};

use crate::guest::Guest;

/// How the vCPU is slowed down: by a rest after each step, which doubles each time.
const THROTTLE_STEPS: u32 = 6;
const THROTTLE_REST: Duration = Duration::from_millis(1);

/// The hooks, in the order in which they are called.
pub struct Hooks<'a>(pub &'a Guest);

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
    /// next process resolves the move by the note (`InDoubt::recover`). Everything stands still, so this example prints
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
pub struct Watch;

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
