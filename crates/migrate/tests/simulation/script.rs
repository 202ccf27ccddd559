//! One run: a move or a save with what goes wrong in it, what the two ends do until it is settled who runs, and whether
//! all of the contract was kept. Here is what both have in common.

mod moves;
mod saves;

use std::any::Any;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use limosa_client::Device;
use limosa_clockwork::simulation::{self, Failure, Process, Run, is_crash};
use limosa_clockwork::{Handle, Monitor, Scope, Simulation, now, scope, sleep};
use limosa_migrate::{Decision, Error, InDoubt, Obstacle, Outcome, Received, WhenStalled};
use limosa_protocol::State;
use limosa_stream::MigrationId;

use crate::adversary::Adversary;
use crate::bounds;
use crate::fate::Fates;
use crate::guest::Guest;
use crate::link::Network;
use crate::machine::Computer;
use crate::model::set;
use crate::panics::Place;
use crate::plan::{End, Mutation, Plan, STANDSTILL_MAX};
use crate::standstill;
use crate::world::World;

/// Steps and virtual time of a run, at most.
const STEPS_MAX: u64 = 500_000;
const TIME_MAX: Duration = Duration::from_secs(3_600);
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
    /// Whether more of a device was on its way than the window allowed at first.
    pub grew: bool,
    /// Whether an adversary has put a frame on a link.
    pub forged: bool,
    /// Whether pages were received where they belong, and whether some were sent without a checksum.
    pub received_in_place: bool,
    pub sent_unchecked: bool,
}

impl Summary {
    fn new(ended: Ended) -> Summary {
        Summary {
            ended,
            in_doubt: false,
            looked_at: false,
            crashes: 0,
            fired: 0,
            filled: false,
            grew: false,
            forged: false,
            received_in_place: false,
            sent_unchecked: false,
        }
    }

    fn windows(&mut self, windows: bounds::Windows) {
        self.filled |= windows.filled;
        self.grew |= windows.grew;
    }
}

/// A run of this plan.
pub fn run(plan: &Plan, folder: &Path, trace: bool) -> Result<Run<Summary>, Box<Failure>> {
    let world = Arc::new(World::new(plan));
    let watched = world.clone();
    let mut simulation = Simulation::new(plan.seed);
    match plan.mutation {
        // A spurious wake-up would heal it.
        Some(Mutation::ForgetsNotification { file, line }) => {
            simulation = simulation.forgetting_notifications(file, line).spurious_one_in(None);
        }
        Some(Mutation::LetsPanicsEscape) => simulation = simulation.letting_panics_escape(),
        _ => {}
    }
    simulation
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
        let network = Arc::new(Network::new(plan, world));
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
        match self.plan.stands {
            true => self.source.stand(),
            false => self.guest.start(End::Source),
        }
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
                let forged = self.network.adversary.as_ref().is_some_and(Adversary::has_forged);
                let received_in_place = self.world.received_in_place.load(Ordering::SeqCst);
                let sent_unchecked = self.world.sent_unchecked.load(Ordering::SeqCst);
                let fired = fates.fired();
                Ok(Summary { fired, forged, received_in_place, sent_unchecked, ..summary })
            });
            fates.end();
            self.guest.end();
            summary
        })
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
                    summary.windows(bounds::check(self.plan, report)?);
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
        let doubt = self.as_found(doubt);
        let decided = move || self.source.as_source(|source| source.decide(decision, doubt));
        source.spawn(scope, "decide", decided).join()
    }

    /// With the facts that the driver of the source knows of its devices.
    fn as_found(&self, doubt: InDoubt) -> InDoubt {
        match self.plan.stands {
            true => doubt.with_found(vec![State::Stop; self.plan.devices.len()]),
            false => doubt,
        }
    }

    /// A restart of the destination resets the devices that were loaded for nothing.
    fn clear_destination(&self) -> Result<(), String> {
        for device in &self.destination.devices {
            // One that fails is asked again.
            device.outside.script.clear();
            set(&device.outside.lost, false);
            device.itself().reset().map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Whether it was called off in time; then it has ended soon.
    fn check_cancel(&self, computer: &Computer) -> Result<bool, String> {
        let Some(cancelled) = computer.cancelled.lock().take() else { return Ok(false) };
        let (took, limit) = (now() - cancelled, CANCEL_MAX + self.plan.undo_calls());
        if took > limit {
            return Err(format!(
                "the {:?} ended {took:?} after it was called off, {limit:?} are allowed",
                computer.end
            ));
        }
        Ok(true)
    }

    /// The guest has not stood still for longer than it may.
    fn check_standstill(&self, ended: &Ending<Outcome>, standstill_max: Duration) -> Result<(), String> {
        let (Ok(outcome), Some((stopped, again))) = (ended, self.guest.stood()) else { return Ok(()) };
        let stood_until = again.unwrap_or_else(simulation::elapsed);
        let why = match outcome {
            // The destination starts it, and may do so later than this.
            Outcome::Moved(_) => return self.check_stood(stopped, again, standstill_max),
            Outcome::Undone { why, .. } => why,
            Outcome::InDoubt(doubt) => &doubt.why,
        };
        self.check_stood(stopped, Some(stood_until), standstill_max)?;
        let by_limit = matches!(why, Error::StoodStill { .. });
        let (Some(limit), false) = (standstill::after_faults(self.plan), by_limit) else { return Ok(()) };
        let from = self.world.struck().unwrap_or_default().max(stopped);
        match stood_until.saturating_sub(from) {
            took if took > limit => Err(format!(
                "the guest stood still for {took:?} after something went wrong, {limit:?} are allowed: {why}"
            )),
            _ => Ok(()),
        }
    }

    fn check_stood(
        &self,
        stopped: Duration,
        again: Option<Duration>,
        standstill_max: Duration,
    ) -> Result<(), String> {
        let Some(again) = again else { return Ok(()) };
        let limit = standstill::whatever_happens(self.plan, standstill_max);
        match again.saturating_sub(stopped) {
            took if took > limit => Err(format!("the guest stood still for {took:?}, {limit:?} are allowed")),
            _ => Ok(()),
        }
    }

    /// Whether a move without a fault need not succeed: it would cost more than it may.
    fn may_be_undone(&self, why: &Error) -> bool {
        match why {
            Error::NotConverging { obstacle: Obstacle::Standstill { .. }, .. } | Error::StoodStill { .. } => {
                self.plan.standstill_max < STANDSTILL_MAX
            }
            Error::NotConverging { .. } => self.plan.convergence.when_stalled == WhenStalled::Abort,
            _ => false,
        }
    }

    /// After an undo the other users of the log know all pages that the move took from it.
    fn nothing_lost_in_undo(&self) -> Result<(), String> {
        let truth = self.world.truth();
        match truth.taken.difference(&truth.given_back).next() {
            Some((region, page)) => {
                Err(format!("page {page} of region {region} was taken and not given back"))
            }
            None => Ok(()),
        }
    }

    /// The source runs again, or names every device that does not. A source that died during the undo names none.
    fn source_runs(&self, notes: &[String], crashed: bool) -> Result<(), String> {
        let may_fail = self.plan.hurts_devices() || self.plan.panics(End::Source, Place::Resume);
        // A note about devices without P2P says nothing about a device that is lost.
        let is_told = notes.iter().any(|note| !note.starts_with("without P2P"));
        match self.source.is_as_before() {
            Ok(()) => Ok(()),
            Err(_) if may_fail && (crashed || is_told) => Ok(()),
            Err(_) if self.source.has_lost() => Ok(()),
            Err(wrong) => Err(format!("undone, and {wrong}; notes: {notes:?}")),
        }
    }
}

const NO_MOVE: MigrationId = MigrationId([0; 16]);

fn crash_or_panic(panic: Box<dyn Any + Send>) {
    if !is_crash(&*panic) {
        std::panic::resume_unwind(panic);
    }
}
