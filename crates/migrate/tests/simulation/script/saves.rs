//! A run in which the guest is not moved but saved, and what was saved is loaded: with what goes wrong in both, and then
//! once more without.

use limosa_client::DeviceExt;
use limosa_clockwork::simulation::Process;
use limosa_clockwork::{Scope, now, simulation, sleep};
use limosa_migrate::{AfterLoad, AfterSave, Decision, Error, InDoubt, Outcome, Received, published};
use limosa_protocol::State;

use super::{Ended, NO_MOVE, Script, Summary, crash_or_panic};
use crate::bounds;
use crate::fate::Fates;
use crate::model::get;
use crate::panics::Place;
use crate::plan::{End, Mutation, SILENCE_MAX};

impl Script<'_> {
    /// Saves the guest, and loads what was published, if anything was.
    pub(super) fn save_and_load<'scope>(
        &'scope self,
        scope: Scope<'scope, '_>,
        fates: &Fates<'_>,
        after: AfterSave,
    ) -> Result<Summary, String> {
        let mut summary = Summary::new(Ended::NotSaved);
        let is_saved = self.save(scope, fates, after, &mut summary)?;
        let at_stop = self.world.truth().at_stop.take();
        if is_saved {
            summary.ended = Ended::Saved;
        }
        // The guest goes on where it does, and looks around.
        sleep(self.plan.rest * 20);
        // One that stands still after a save may be loaded elsewhere, as far as can be seen of it.
        let is_kept = !(self.plan.stands && is_saved && after == AfterSave::Stop);
        if is_kept && self.source.is_as_before().is_ok() && simulation::random(3) == 0 {
            // A save is no reason why it could not be moved.
            fates.end();
            self.second_move(scope, fates.processes, &Summary { ended: Ended::Undone, ..summary.clone() })?;
            return Ok(summary);
        }
        self.turn_off_source();
        let go_back = || {
            let truth = &mut *self.world.truth();
            let at_stop = at_stop.clone();
            (truth.memory, truth.devices) = at_stop.ok_or("saved, and nothing ever stopped")?;
            Ok::<_, String>(())
        };
        if is_saved {
            go_back()?;
        }
        let received = self.load(scope, fates, &mut summary)?;
        let loaded = matches!(received, Some(Received::Runs(_) | Received::Stopped(_)));
        if loaded && !is_saved {
            return Err(format!("nothing was saved, and it was loaded: {received:?}"));
        }
        if received.is_some() && !loaded && is_saved && fates.fired() == 0 {
            return Err(format!("nothing went wrong, and what was saved was not loaded: {received:?}"));
        }
        fates.end();
        if loaded || matches!(received, Some(Received::Broken { .. })) {
            return Ok(summary);
        }
        self.destination.heal();
        fates.processes[1].allow_threads();
        self.network.disk.heal();
        // Where the loader died the guest may have begun to run: that is over.
        self.guest.stop(End::Destination);
        self.clear_destination()?;
        let is_whole = is_saved && !self.network.disk.is_altered();
        let is_partial = !is_saved && self.network.disk.name_what_is_left();
        if !is_partial {
            go_back()?;
        }
        match self.load(scope, fates, &mut summary)? {
            Some(Received::Runs(_) | Received::Stopped(_)) if is_whole => Ok(summary),
            Some(Received::Discarded { .. }) if !is_whole => Ok(summary),
            // A process that died when everything was written had only not said so.
            Some(_) if !is_saved && !is_partial => Ok(summary),
            other => Err(format!("loaded without trouble what is whole: {is_whole}, and: {other:?}")),
        }
    }

    /// Whether there is something to load now.
    fn save<'scope>(
        &'scope self,
        scope: Scope<'scope, '_>,
        fates: &Fates<'_>,
        after: AfterSave,
        summary: &mut Summary,
    ) -> Result<bool, String> {
        let [process, _] = fates.processes;
        let saving = move || self.source.as_source(|source| source.save(&self.network.disk, after));
        let saved = process.spawn(scope, "save", saving).join();
        if let Ok(outcome) = &saved
            && let (false, Some((stopped, again))) =
                (matches!(outcome, Outcome::InDoubt(_)), self.guest.stood())
        {
            self.check_stood(stopped, again, self.plan.standstill_max)?;
        }
        let called_off = self.check_cancel(&self.source)?;
        let is_published = self.network.disk.has_published();
        simulation::note(|| format!("{saved:?}"));
        let outcome = match saved {
            Ok(outcome) => outcome,
            Err(panic) => {
                crash_or_panic(panic);
                summary.crashes += 1;
                self.source_restarts();
                let noted = self.source.noted.lock().expect("not poisoned").take();
                if let (AfterSave::Stop, Some(id)) = (after, noted) {
                    return self.settle_save(scope, process, self.as_found(InDoubt::recover(id)), summary);
                }
                // No other side can run it, so a restart of the source may let it go on.
                let undone = self.decide(scope, process, Decision::NotCommitted, InDoubt::recover(NO_MOVE));
                let Ok(Outcome::Undone { report, .. }) = undone else {
                    return match undone {
                        Ok(other) => Err(format!("a saver that was started anew: {other:?}")),
                        // Once more.
                        Err(panic) => {
                            crash_or_panic(panic);
                            Ok(is_published)
                        }
                    };
                };
                self.source_runs(&report.notes, true)?;
                return Ok(is_published);
            }
        };
        summary.windows(bounds::check(self.plan, bounds::of_source(&outcome))?);
        match &outcome {
            Outcome::Moved(report) => {
                if called_off {
                    return Err(format!("called off, and saved: {outcome:?}"));
                }
                if !is_published {
                    return Err(format!("nothing was published: {outcome:?}"));
                }
                match after {
                    AfterSave::Run => self.source_runs(&report.notes, false)?,
                    AfterSave::Stop if self.world.running(End::Source) > 0 => {
                        return Err("saved to go on elsewhere, and the source runs".into());
                    }
                    AfterSave::Stop => return Ok(true),
                }
            }
            Outcome::Undone { why, report } => {
                if fates.fired() == 0 && !self.may_be_undone(why) {
                    return Err(format!("nothing went wrong, and it was not saved: {why}"));
                }
                let is_unknown = matches!(why, Error::PublicationUnknown { .. });
                if is_unknown && after == AfterSave::Stop {
                    return Err(format!("it may be loaded elsewhere, and the source runs: {why}"));
                }
                if is_published && !is_unknown {
                    return Err(format!("not saved, and yet there is something: {why}"));
                }
                self.source_runs(&report.notes, false)?;
            }
            Outcome::InDoubt(doubt) if after == AfterSave::Run => {
                return Err(format!("the guest was to run on, and is in doubt: {doubt:?}"));
            }
            Outcome::InDoubt(_) => {
                let Outcome::InDoubt(doubt) = outcome else { unreachable!("it was just matched") };
                return self.settle_save(scope, process, doubt, summary);
            }
        }
        self.nothing_lost_in_undo()?;
        Ok(is_published)
    }

    /// Looks whether the snapshot is there, as often as it takes, and acts on that. Whether it is there.
    fn settle_save<'scope>(
        &'scope self,
        scope: Scope<'scope, '_>,
        process: Process,
        mut doubt: InDoubt,
        summary: &mut Summary,
    ) -> Result<bool, String> {
        summary.in_doubt = true;
        let is_published = self.network.disk.has_published();
        // More failures of the disk than are planned.
        for _ in 0..8 {
            let id = doubt.id;
            if self.plan.mutation == Some(Mutation::RunsInDoubt) {
                let again = std::mem::replace(&mut doubt, self.as_found(InDoubt::recover(id)));
                self.source.as_source(|source| drop(source.decide(Decision::NotCommitted, again)));
            }
            if self.world.running(End::Source) > 0 {
                return Err(format!("in doubt, and the source runs: {doubt:?}"));
            }
            let deciding = move || {
                let found = published(&self.network.disk, id, SILENCE_MAX, None);
                let decision = found.as_ref().copied().unwrap_or(Decision::Unknown);
                simulation::note(|| format!("{found:?}"));
                self.source.as_source(|source| source.decide(decision, doubt))
            };
            match process.spawn(scope, "settle", deciding).join() {
                Ok(Outcome::Moved(_)) if !is_published => return Err("nothing was published".into()),
                Ok(Outcome::Moved(_)) if self.world.running(End::Source) > 0 => {
                    return Err("settled that it goes on elsewhere, and the source runs".into());
                }
                Ok(Outcome::Moved(_)) => return Ok(true),
                Ok(Outcome::Undone { .. }) if is_published => {
                    return Err("it was published, and the source runs".into());
                }
                Ok(Outcome::Undone { report, .. }) => {
                    self.source_runs(&report.notes, false)?;
                    self.nothing_lost_in_undo()?;
                    return Ok(false);
                }
                Ok(Outcome::InDoubt(still)) => doubt = still,
                Err(panic) => {
                    crash_or_panic(panic);
                    summary.crashes += 1;
                    self.source_restarts();
                    doubt = self.as_found(InDoubt::recover(id));
                }
            }
            sleep(self.plan.rest);
        }
        // What was altered at rest is not known again; a person looks.
        if !self.network.disk.is_altered() {
            return Err(format!("nothing is wrong any more, and it is still in doubt: {doubt:?}"));
        }
        summary.looked_at = true;
        let decision = if is_published { Decision::Committed } else { Decision::NotCommitted };
        let decided = self.source.as_source(|source| source.decide(decision, doubt));
        match decided {
            Outcome::Moved(_) if is_published => Ok(true),
            Outcome::Undone { report, .. } if !is_published => {
                self.source_runs(&report.notes, false)?;
                Ok(false)
            }
            other => Err(format!("decided, and {other:?}")),
        }
    }

    /// Loads what is there; nothing when the loader died.
    fn load<'scope>(
        &'scope self,
        scope: Scope<'scope, '_>,
        fates: &Fates<'_>,
        summary: &mut Summary,
    ) -> Result<Option<Received>, String> {
        let after = match simulation::random(3) {
            0 => AfterLoad::Run,
            1 => AfterLoad::Stop,
            _ => AfterLoad::AsFound,
        };
        let is_to_run = after == AfterLoad::Run || after == AfterLoad::AsFound && !self.plan.stands;
        if let Some(cancelled) = &mut *self.destination.cancelled.lock() {
            // Nobody was there who could have ended for it.
            *cancelled = now();
        }
        let loading = move || self.destination.load(&self.network.disk, after);
        let loading = fates.processes[1].spawn(scope, "load", loading);
        let mut crashed = false;
        let received = self.received(loading, summary, &mut crashed)?;
        simulation::note(|| format!("{received:?}"));
        let destination = &self.destination;
        let holds = || destination.devices.iter().any(|device| get(&device.outside.holds));
        match &received {
            Some(Received::Runs(_)) if !is_to_run => {
                return Err(format!("{after:?}, and it runs: {received:?}"));
            }
            Some(Received::Stopped(_)) if is_to_run => {
                return Err(format!("{after:?}, and it does not run: {received:?}"));
            }
            Some(Received::Runs(_)) => {
                if !destination.has_lost() && !self.plan.panics(End::Destination, Place::Start) {
                    destination.runs_all()?;
                }
                sleep(self.plan.rest * 20);
                self.guest.stop(End::Destination);
                destination.compare()?;
            }
            Some(Received::Stopped(_)) => {
                destination.compare()?;
                if self.world.running(End::Destination) > 0 {
                    return Err("loaded to stay in STOP, and it runs".into());
                }
            }
            Some(Received::Discarded { .. }) if holds() && !self.plan.hurts_devices() => {
                return Err("discarded, and what was loaded is still there".into());
            }
            Some(Received::Broken { .. }) if !self.plan.hurts_devices() => {
                return Err("broken without a device that fails".into());
            }
            _ => {}
        }
        Ok(received)
    }

    /// What was saved is to go on elsewhere.
    fn turn_off_source(&self) {
        self.guest.stop(End::Source);
        for device in &self.source.devices {
            device.outside.script.clear();
            // One in ERROR does not run.
            let _ = device.itself().set_state(State::Stop);
        }
    }
}
