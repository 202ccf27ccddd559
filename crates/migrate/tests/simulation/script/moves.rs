//! A run in which the guest is moved: the move in trouble, the questions of a source in doubt, and a second move where the
//! first was undone.

use std::io::IoSlice;
use std::sync::atomic::Ordering;

use limosa_client::DeviceExt;
use limosa_clockwork::simulation::{self, Process};
use limosa_clockwork::{Scope, sleep};
use limosa_migrate::link::{Link, Wait};
use limosa_migrate::{Decision, InDoubt, Outcome, Phase, Received};
use limosa_protocol::State;

use super::{Ended, NO_MOVE, Script, Summary, crash_or_panic};
use crate::adversary::Adversary;
use crate::bounds;
use crate::fate::Fates;
use crate::model::get;
use crate::panics::Place;
use crate::plan::{End, Mutation, SILENCE_MAX, STANDSTILL_MAX};

/// After this many questions nothing goes wrong any more, and the next one has to be answered.
const QUESTIONS_IN_TROUBLE: u32 = 2;

impl Script<'_> {
    /// The move in trouble, until it is settled who runs.
    pub(super) fn first_move<'scope>(
        &'scope self,
        scope: Scope<'scope, '_>,
        fates: &Fates<'_>,
    ) -> Result<Summary, String> {
        let [source, destination] = fates.processes;
        let (near, far) = self.network.connect();
        let mut receiving = Some(destination.spawn(scope, "receive", move || self.destination.receive(&far)));
        let sending = source.spawn(scope, "send", move || self.source.send(&near));
        let mut summary = Summary::new(Ended::Moved);
        let mut sent = sending.join();
        if let Ok(outcome) = &sent {
            summary.windows(bounds::check(self.plan, bounds::of_source(outcome))?);
        }
        self.check_standstill(&sent, self.plan.standstill_max)?;
        let called_off = self.check_cancel(&self.source)?;
        if let Ok(outcome @ (Outcome::Moved(_) | Outcome::InDoubt(_))) = &sent
            && called_off
        {
            return Err(format!("called off at the source, and not undone: {outcome:?}"));
        }
        let mut received = None;
        let mut destination_crashed = false;
        let mut source_crashed = false;
        let mut question = 0;
        let outcome = loop {
            let doubt = match sent {
                Ok(Outcome::InDoubt(doubt)) => {
                    // One that died while it went back knew that nobody else runs.
                    let went_back = self.source.phases.lock().begun.contains(&Phase::Undo);
                    if self.world.running(End::Source) > 0 && !went_back {
                        return Err(format!("in doubt, and the source runs: {}", doubt.why));
                    }
                    doubt
                }
                Ok(outcome) => break outcome,
                Err(panic) => {
                    crash_or_panic(panic);
                    source_crashed = true;
                    summary.crashes += 1;
                    self.source_restarts();
                    let noted = self.source.noted.lock().expect("not poisoned").clone();
                    match noted {
                        Some(note) => InDoubt::recover(note),
                        // It never came to the commit.
                        None => {
                            sent =
                                self.decide(scope, source, Decision::NotCommitted, InDoubt::recover(NO_MOVE));
                            continue;
                        }
                    }
                }
            };
            summary.in_doubt = true;
            simulation::note(|| format!("in doubt: {}", doubt.why));
            if self.plan.mutation == Some(Mutation::RunsInDoubt) {
                sent = self.decide(scope, source, Decision::NotCommitted, doubt);
                continue;
            }
            question += 1;
            if question > QUESTIONS_IN_TROUBLE {
                fates.end();
                self.source.heal();
                self.destination.heal();
            }
            // It may ask while the destination is still at it.
            if (question > QUESTIONS_IN_TROUBLE || simulation::random(2) == 0)
                && let Some(receiving) = receiving.take()
            {
                received = self.received(receiving, &mut summary, &mut destination_crashed)?;
            }
            let (near, far) = self.network.connect();
            let answering = destination.spawn(scope, "answer", move || self.destination.receive(&far));
            let doubt = self.as_found(doubt);
            let resolving = source.spawn(scope, "resolve", move || self.source.resolve(doubt, &near));
            sent = resolving.join();
            let mut answer_crashed = false;
            let answered = self.received(answering, &mut summary, &mut answer_crashed)?;
            destination_crashed |= answer_crashed;
            if question > QUESTIONS_IN_TROUBLE + 1 {
                // Asked without trouble.
                let Some(Received::Answered { decision: Decision::Unknown, .. }) = answered else {
                    return Err(format!("asked without trouble, and not answered: {answered:?}"));
                };
                if !destination_crashed || !self.destination.starts.load(Ordering::SeqCst) {
                    return Err(
                        "a destination that did not die while it started does not know what became of it"
                            .into(),
                    );
                }
                if let Ok(Outcome::InDoubt(doubt)) = sent {
                    summary.looked_at = true;
                    let decision = self.somebody_looks();
                    sent = self.decide(scope, source, decision, doubt);
                }
            }
        };
        if let Some(receiving) = receiving.take() {
            received = self.received(receiving, &mut summary, &mut destination_crashed)?;
        }
        self.source.noted.lock().expect("not poisoned").take();
        fates.end();
        simulation::note(|| format!("{outcome:?}\n{received:?}"));
        summary.ended = match (&outcome, &received) {
            (Outcome::Moved(_), Some(Received::Broken { .. })) => Ended::Broken,
            (Outcome::Moved(_), Some(Received::Runs(_))) if !self.plan.stands => Ended::Moved,
            (Outcome::Moved(_), Some(Received::Stopped(_))) if self.plan.stands => Ended::Moved,
            // It found that a device would not start, and died before it could say so.
            (Outcome::Moved(_), None)
                if destination_crashed
                    && self.plan.hurts_devices()
                    && self.destination.is_as_before().is_err() =>
            {
                Ended::Broken
            }
            (Outcome::Moved(_), None) if destination_crashed => Ended::Moved,
            (Outcome::Undone { .. }, Some(Received::Discarded { .. })) => Ended::Undone,
            (Outcome::Undone { .. }, None) if destination_crashed => Ended::Undone,
            _ => return Err(format!("the ends differ in what became of it: {outcome:?}\n{received:?}")),
        };
        if let Outcome::Undone { why, report } = &outcome {
            if fates.fired() == 0 && !self.may_be_undone(why) {
                return Err(format!("nothing went wrong, and it was undone: {why}"));
            }
            if !source_crashed {
                self.nothing_lost_in_undo()?;
            }
            self.source_runs(&report.notes, source_crashed)?;
            if destination_crashed {
                self.clear_destination()?;
            }
        }
        Ok(summary)
    }

    /// What a person does who finds the source in doubt, and a destination that died while it started its devices.
    fn somebody_looks(&self) -> Decision {
        let devices = &self.destination.devices;
        let holds = devices.iter().all(|device| get(&device.outside.holds));
        if holds && self.world.running(End::Destination) > 0 {
            for device in devices {
                device.itself().set_state(State::Running).expect("a device without a fault runs");
            }
            self.guest.start(End::Destination);
            return Decision::Committed;
        }
        self.clear_destination().expect("a device without a fault can be reset");
        Decision::NotCommitted
    }

    /// Exactly one runs.
    pub(super) fn settled(&self, summary: &Summary) -> Result<(), String> {
        let hurt = self.plan.hurts_devices();
        match summary.ended {
            Ended::Moved => {
                if !self.destination.has_lost() && !self.plan.panics(End::Destination, Place::Start) {
                    self.destination.is_as_before()?;
                }
                if self.world.running(End::Source) > 0 {
                    return Err("moved, and the source runs".into());
                }
            }
            Ended::Undone => {
                let left = self.destination.devices.iter().any(|device| get(&device.outside.holds));
                if left && !hurt {
                    return Err("undone, and what was loaded is still there".into());
                }
            }
            Ended::Saved | Ended::NotSaved => return Ok(()),
            Ended::Broken if hurt => {}
            Ended::Broken => return Err("broken without a device that fails".into()),
        }
        // The guest goes on, and looks around.
        sleep(self.plan.rest * 20);
        Ok(())
    }

    /// Where the guest is, all of it is; and it can still be moved.
    pub(super) fn second_move<'scope>(
        &'scope self,
        scope: Scope<'scope, '_>,
        [source, destination]: [Process; 2],
        summary: &Summary,
    ) -> Result<(), String> {
        match summary.ended {
            Ended::Broken | Ended::Saved | Ended::NotSaved => return Ok(()),
            Ended::Moved => {
                self.guest.stop(End::Destination);
                return self.destination.compare();
            }
            // A device that had to be reset has lost its state.
            Ended::Undone if self.source.is_as_before().is_err() => return Ok(()),
            Ended::Undone => {}
        }
        self.source.heal();
        self.destination.heal();
        [source, destination].iter().for_each(|process| process.allow_threads());
        self.clear_destination()?;
        self.replayed(scope, destination)?;
        let (near, far) = self.network.connect();
        let receiving = destination.spawn(scope, "receive again", move || self.destination.receive(&far));
        let sending = source.spawn(scope, "send again", move || self.source.send_at_any_cost(&near));
        let (sent, received) = (sending.join(), receiving.join());
        self.check_standstill(&sent, STANDSTILL_MAX)?;
        let is_received = match &received {
            Ok(Received::Runs(_)) => !self.plan.stands,
            Ok(Received::Stopped(_)) => self.plan.stands,
            _ => false,
        };
        if !is_received || !matches!(sent, Ok(Outcome::Moved(_))) {
            return Err(format!("the second move failed: {sent:?}\n{received:?}"));
        }
        self.destination.is_as_before()?;
        sleep(self.plan.rest * 20);
        self.guest.stop(End::Destination);
        self.destination.compare()
    }

    /// The adversary sends to the destination all that the source has sent, once more: nothing becomes of it.
    fn replayed<'scope>(&'scope self, scope: Scope<'scope, '_>, destination: Process) -> Result<(), String> {
        let Some(stream) = self.network.adversary.as_ref().and_then(Adversary::recorded) else {
            return Ok(());
        };
        let (near, far) = self.network.connect();
        let receiving =
            destination.spawn(scope, "receive what was recorded", move || self.destination.receive(&far));
        let (wait, mut sent) = (Wait::within(SILENCE_MAX, None), 0);
        while sent < stream.len() {
            // The destination may have had enough.
            let Ok(some) = near.write(&[IoSlice::new(&stream[sent..])], wait) else { break };
            sent += some;
        }
        drop(near);
        let received = receiving.join();
        let holds = self.destination.devices.iter().any(|device| get(&device.outside.holds));
        match received {
            Ok(Received::Discarded { .. }) if !holds && self.world.running(End::Destination) == 0 => Ok(()),
            received => Err(format!("a move that was recorded was replayed, and {received:?}")),
        }
    }
}
