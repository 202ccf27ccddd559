//! One run: a move with what goes wrong in it, what the two ends do until it is settled who runs, and whether all of
//! the contract was kept.

mod saves;

use std::any::Any;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use limosa_client::{Device, DeviceExt};
use limosa_clockwork::simulation::{self, Failure, Process, Run, is_crash};
use limosa_clockwork::{Handle, Monitor, Scope, Simulation, now, scope, sleep};
use limosa_migrate::stream::MigrationId;
use limosa_migrate::{Decision, Error, InDoubt, Outcome, Phase, Received, WhenStalled};
use limosa_protocol::State;

use crate::bounds;
use crate::disk::Disk;
use crate::fate::Fates;
use crate::guest::Guest;
use crate::link::Network;
use crate::machine::Computer;
use crate::model::get;
use crate::plan::{End, Mutation, Plan};
use crate::world::World;

/// Steps and virtual time of a run, at most.
const STEPS_MAX: u64 = 500_000;
const TIME_MAX: Duration = Duration::from_secs(3_600);
/// After this many questions nothing goes wrong any more, and the next one has to be answered.
const QUESTIONS_IN_TROUBLE: u32 = 2;
/// What an engine may take to end once it is called off, beside what its devices take.
const CANCEL_MAX: Duration = Duration::from_secs(5);

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ended {
    Moved,
    Undone,
    /// The destination can neither run nor give back, and says so.
    Broken,
    /// There is a snapshot.
    Saved,
    NotSaved,
}

/// What a run was like.
#[derive(Clone, Debug)]
pub struct Summary {
    pub ended: Ended,
    /// Whether the source was ever in doubt.
    pub in_doubt: bool,
    /// Whether a person had to look.
    pub looked_at: bool,
    pub crashes: u32,
    pub fired: u32,
    /// Whether as much of a device was on its way as may be.
    pub filled: bool,
}

impl Summary {
    fn new(ended: Ended) -> Summary {
        Summary { ended, in_doubt: false, looked_at: false, crashes: 0, fired: 0, filled: false }
    }
}

/// A run of this plan.
pub fn run(plan: &Plan, folder: &Path, trace: bool) -> Result<Run<Summary>, Box<Failure>> {
    let world = Arc::new(World::new(&plan.regions, plan.devices.len()));
    let watched = world.clone();
    Simulation::new(plan.seed)
        .steps_max(STEPS_MAX)
        .time_max(TIME_MAX)
        .trace(trace)
        .watch(move || watched.check())
        .run(|| {
            simulation::note(|| format!("{plan:#?}"));
            let summary = Script::new(plan, &world, folder).run();
            match &summary {
                Ok(summary) => simulation::note(|| format!("{summary:?}")),
                Err(wrong) => world.wrong(wrong.clone()),
            }
            // For the watcher to see what was said last.
            sleep(Duration::from_millis(1));
            summary.expect("the watcher has seen what is wrong")
        })
        .map_err(Box::new)
}

struct Script<'a> {
    plan: &'a Plan,
    world: &'a Arc<World>,
    guest: Arc<Guest>,
    source: Computer,
    destination: Computer,
    network: Arc<Network>,
}

type Ending<T> = Result<T, Box<dyn Any + Send>>;

impl<'a> Script<'a> {
    fn new(plan: &'a Plan, world: &'a Arc<World>, folder: &Path) -> Script<'a> {
        let guest = Arc::new(Guest::new(world.clone(), plan.rest));
        let network = Arc::new(Network::new(&plan.links, Disk::new(plan.mutation)));
        let computer = |end| Computer::new(end, plan, world, &guest, &network, folder.join("moves"));
        let (source, destination) = (computer(End::Source), computer(End::Destination));
        world.truth().keeps_stop = plan.saves.is_some();
        Script { plan, world, guest, source, destination, network }
    }

    fn run(&self) -> Result<Summary, String> {
        let processes = [Process::new("source"), Process::new("destination")];
        let fates = Fates {
            computers: [&self.source, &self.destination],
            processes,
            network: &self.network,
            state: Monitor::default(),
        };
        self.guest.start(End::Source);
        scope(|scope| {
            let vcpu = Process::new("guest");
            vcpu.spawn(scope, "vcpu", || self.guest.run([&self.source, &self.destination]));
            for planned in &self.plan.faults {
                let fates = &fates;
                scope.spawn("fate", move || fates.await_and_fire(planned));
            }
            let run = match self.plan.saves {
                Some(after) => self.save_and_load(scope, &fates, after),
                None => self.first_move(scope, &fates),
            };
            let summary = run.and_then(|summary| {
                fates.end();
                self.settled(&summary)?;
                self.second_move(scope, processes, &summary)?;
                Ok(Summary { fired: fates.fired(), ..summary })
            });
            fates.end();
            self.guest.end();
            summary
        })
    }

    /// The move in trouble, until it is settled who runs.
    fn first_move<'scope>(
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
            summary.filled |= bounds::check(self.plan, bounds::of_source(outcome))?;
        }
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
                    match *self.source.noted.lock().expect("not poisoned") {
                        Some(id) => InDoubt::recover(id),
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
            (Outcome::Moved(_), Some(Received::Runs(_))) => Ended::Moved,
            // It found that a device would not start, and died before it could say so.
            (Outcome::Moved(_), None)
                if destination_crashed
                    && self.plan.hurts_devices()
                    && self.destination.runs_all().is_err() =>
            {
                Ended::Broken
            }
            (Outcome::Moved(_), None) if destination_crashed => Ended::Moved,
            (Outcome::Undone { .. }, Some(Received::Discarded { .. })) => Ended::Undone,
            (Outcome::Undone { .. }, None) if destination_crashed => Ended::Undone,
            _ => return Err(format!("the ends differ in what became of it: {outcome:?}\n{received:?}")),
        };
        if let Outcome::Undone { why, report } = &outcome {
            let excused = matches!(why, Error::NotConverging { .. })
                && self.plan.convergence.when_stalled == WhenStalled::Abort;
            if fates.fired() == 0 && !excused {
                return Err(format!("nothing went wrong, and it was undone: {why}"));
            }
            if !source_crashed {
                self.nothing_lost_in_undo()?;
            }
            self.source_runs(&report.notes)?;
            if destination_crashed {
                self.clear_destination()?;
            }
        }
        Ok(summary)
    }

    /// How the destination's thread ended.
    fn received(
        &self,
        receiving: Handle<'_, Received>,
        summary: &mut Summary,
        crashed: &mut bool,
    ) -> Result<Option<Received>, String> {
        match receiving.join() {
            Ok(received) => {
                if let Some(report) = bounds::of_destination(&received) {
                    summary.filled |= bounds::check(self.plan, report)?;
                }
                let called_off = self.check_cancel(&self.destination)?;
                if called_off && !matches!(received, Received::Discarded { .. }) {
                    return Err(format!("called off at the destination, and not discarded: {received:?}"));
                }
                Ok(Some(received))
            }
            Err(panic) => {
                crash_or_panic(panic);
                *crashed = true;
                summary.crashes += 1;
                self.destination.crashed();
                Ok(None)
            }
        }
    }

    /// Its VMM's log and what the process knew of the move are gone; the guest stays as it was.
    fn source_restarts(&self) {
        let mut truth = self.world.truth();
        truth.logs = false;
        truth.taken.clear();
    }

    fn decide<'scope>(
        &'scope self,
        scope: Scope<'scope, '_>,
        source: Process,
        decision: Decision,
        doubt: InDoubt,
    ) -> Ending<Outcome> {
        let decided = move || self.source.as_source(|source| source.decide(decision, doubt));
        source.spawn(scope, "decide", decided).join()
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

    /// Whoever restarts the destination resets what was loaded for nothing.
    fn clear_destination(&self) -> Result<(), String> {
        for device in &self.destination.devices {
            // One that fails is asked again.
            device.outside.script.clear();
            device.itself().reset().map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Whether it was called off in time; then it has ended soon.
    fn check_cancel(&self, computer: &Computer) -> Result<bool, String> {
        let Some(cancelled) = computer.cancelled.lock().take() else { return Ok(false) };
        let slowest = self.plan.devices.iter().map(|device| device.slow).max().unwrap_or_default();
        let (devices, regions) = (self.plan.devices.len() as u32, self.plan.regions.len() as u32);
        // The calls of all devices at once, those of one that is being compared, and those of one after the other.
        let calls = 8 + 6 + devices * (2 * regions + 3);
        let (took, limit) = (now() - cancelled, CANCEL_MAX + calls * slowest);
        if took > limit {
            return Err(format!(
                "the {:?} ended {took:?} after it was called off, {limit:?} are allowed",
                computer.end
            ));
        }
        Ok(true)
    }

    /// After an undo whoever else lives by the log knows all that the move took from it.
    fn nothing_lost_in_undo(&self) -> Result<(), String> {
        let truth = self.world.truth();
        match truth.taken.difference(&truth.given_back).next() {
            Some((region, page)) => {
                Err(format!("page {page} of region {region} was taken and not given back"))
            }
            None => Ok(()),
        }
    }

    /// The source runs again; or says of every device that does not.
    fn source_runs(&self, notes: &[String]) -> Result<(), String> {
        match self.source.runs_all() {
            Ok(()) => Ok(()),
            Err(_) if self.plan.hurts_devices() && !notes.is_empty() => Ok(()),
            Err(wrong) => Err(format!("undone, and {wrong}; notes: {notes:?}")),
        }
    }

    /// Exactly one runs.
    fn settled(&self, summary: &Summary) -> Result<(), String> {
        let hurt = self.plan.hurts_devices();
        match summary.ended {
            Ended::Moved => {
                self.destination.runs_all()?;
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
    fn second_move<'scope>(
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
            Ended::Undone if self.source.runs_all().is_err() => return Ok(()),
            Ended::Undone => {}
        }
        self.source.heal();
        self.destination.heal();
        self.clear_destination()?;
        let (near, far) = self.network.connect();
        let receiving = destination.spawn(scope, "receive again", move || self.destination.receive(&far));
        let sending = source.spawn(scope, "send again", move || self.source.send_at_any_cost(&near));
        let (sent, received) = (sending.join(), receiving.join());
        let (Ok(Outcome::Moved(_)), Ok(Received::Runs(_))) = (&sent, &received) else {
            return Err(format!("the second move failed: {sent:?}\n{received:?}"));
        };
        self.destination.runs_all()?;
        sleep(self.plan.rest * 20);
        self.guest.stop(End::Destination);
        self.destination.compare()
    }
}

const NO_MOVE: MigrationId = MigrationId([0; 16]);

fn crash_or_panic(panic: Box<dyn Any + Send>) {
    if !is_crash(&*panic) {
        std::panic::resume_unwind(panic);
    }
}
