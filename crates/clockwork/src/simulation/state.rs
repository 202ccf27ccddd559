//! The state of a simulation: its tasks, its clock, and who goes next.

use std::collections::BTreeMap;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;
use std::time::Duration;

use super::failure::{Failure, What};
use super::random::Random;
use super::trace::{Event, Place, Trace};

/// What time goes by with every step: a loop that never waits sees its deadline come.
const STEP_TIME: Duration = Duration::from_micros(1);
/// A timer is this late at most.
const LATE_NS_MAX: u64 = 50_000;
/// Once in so many turns a wait ends for no reason, as a condition variable's may.
const SPURIOUS_ONE_IN: u64 = 256;
/// How much more often than others a task goes next; drawn for each.
const WEIGHTS: [u64; 6] = [1, 1, 1, 4, 16, 64];
/// In how many of 256 cases a task that could go on makes way all the same; drawn for each seed.
const EAGERNESS: [u64; 4] = [256, 96, 24, 6];

/// What a task waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// For its turn.
    Turn,
    /// For a monitor's value.
    Unlocked(usize),
    /// For a monitor's notification, or until then.
    Notified(usize, Option<Duration>),
    Until(Duration),
    End(usize),
    /// For all tasks of a scope to end. Nothing cuts this short: they borrow from whoever waits.
    ScopeEnd(usize),
    /// For a process to come so far.
    Points(usize, u64),
}

/// Why a task goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    Happened,
    /// Its time has come; or, for [`Waiting::Points`], the process will not come so far.
    TimedOut,
}

/// A thread of the simulation.
pub(crate) struct TaskState {
    pub(crate) name: String,
    pub(crate) process: usize,
    pub(crate) scope: Option<usize>,
    pub(crate) waiting: Waiting,
    pub(crate) woken: Woken,
    pub(crate) at: &'static Location<'static>,
    pub(crate) crashed: bool,
    /// Goes before all others.
    urgent: bool,
    weight: u64,
    go: Arc<AtomicBool>,
    /// Known once it has been started.
    pub(crate) thread: Option<Thread>,
}

/// Some tasks that crash together.
pub(crate) struct ProcessState {
    pub(crate) name: String,
    pub(crate) points: u64,
}

/// All of it.
pub(crate) struct State {
    pub(crate) seed: u64,
    pub(crate) now: Duration,
    pub(crate) steps: u64,
    pub(crate) tasks: BTreeMap<usize, TaskState>,
    pub(crate) processes: Vec<ProcessState>,
    pub(crate) failure: Option<Failure>,
    pub(crate) trace: Trace,
    pub(crate) chance: Random,
    pub(crate) steps_max: u64,
    pub(crate) time_max: Duration,
    random: Random,
    eagerness: u64,
    next_id: usize,
}

impl State {
    pub(crate) fn new(seed: u64, steps_max: u64, time_max: Duration, trace: bool) -> State {
        let mut random = Random::new(seed);
        let eagerness = EAGERNESS[random.below(EAGERNESS.len() as u64) as usize];
        State {
            seed,
            now: Duration::ZERO,
            steps: 0,
            tasks: BTreeMap::new(),
            processes: vec![ProcessState { name: "world".into(), points: 0 }],
            failure: None,
            trace: Trace::new(trace),
            chance: Random::new(seed ^ 0x6368_616e_6365),
            steps_max,
            time_max,
            random,
            eagerness,
            next_id: 0,
        }
    }

    /// A number for a task or a scope.
    pub(crate) fn next_id(&mut self) -> usize {
        self.next_id += 1;
        self.next_id
    }

    pub(crate) fn add_task(
        &mut self,
        name: String,
        process: usize,
        scope: Option<usize>,
        at: &'static Location<'static>,
    ) -> (usize, Arc<AtomicBool>) {
        let id = self.next_id();
        let go = Arc::new(AtomicBool::new(false));
        let weight = WEIGHTS[self.random.below(WEIGHTS.len() as u64) as usize];
        let name = format!("{}/{name}", self.processes[process].name);
        self.trace.add(self.now, &name, &Event::Starts, at);
        let task = TaskState {
            name,
            process,
            scope,
            waiting: Waiting::Turn,
            woken: Woken::Happened,
            at,
            crashed: self.failure.is_some(),
            urgent: false,
            weight,
            go: go.clone(),
            thread: None,
        };
        self.tasks.insert(id, task);
        (id, go)
    }

    /// A step of a task: counted, timed, traced, and checked against the limits.
    pub(crate) fn step(&mut self, id: usize, event: &Event, at: &'static Location<'static>) {
        self.tick();
        let Some(task) = self.tasks.get_mut(&id) else { return };
        task.at = at;
        self.trace.add(self.now, &task.name, event, at);
        let process = task.process;
        self.processes[process].points += 1;
        let points = self.processes[process].points;
        self.wake(
            |waiting| matches!(waiting, Waiting::Points(of, at) if of == process && at <= points),
            true,
        );
    }

    /// What every call takes of the steps and of the time, which it returns.
    pub(crate) fn tick(&mut self) -> Duration {
        self.steps += 1;
        self.now += STEP_TIME;
        if self.steps > self.steps_max {
            self.fail(What::Steps);
        }
        self.now
    }

    /// Whether the task makes way though it could go on.
    pub(crate) fn makes_way(&mut self) -> bool {
        self.tasks.values().any(|task| task.urgent) || self.random.below(256) < self.eagerness
    }

    /// Everybody who waits for such a thing goes on when it is his turn.
    pub(crate) fn wake(&mut self, whom: impl Fn(Waiting) -> bool, urgent: bool) {
        for task in self.tasks.values_mut().filter(|task| whom(task.waiting)) {
            task.waiting = Waiting::Turn;
            task.woken = Woken::Happened;
            task.urgent = urgent;
        }
    }

    /// All tasks of a process end as soon as they have their turn.
    pub(crate) fn crash(&mut self, process: usize) {
        for task in self.tasks.values_mut().filter(|task| task.process == process) {
            task.crashed = true;
            if !matches!(task.waiting, Waiting::ScopeEnd(_)) {
                task.waiting = Waiting::Turn;
            }
            self.trace.add(self.now, &task.name, &Event::Crashes, task.at);
        }
    }

    /// The simulation has failed: says so, and ends all tasks.
    pub(crate) fn fail(&mut self, what: What) {
        if self.failure.is_some() {
            return;
        }
        let tasks = self.tasks.values().map(|task| self.describe(task)).collect();
        let (seed, steps, time) = (self.seed, self.steps, self.now);
        self.failure = Some(Failure { seed, what, steps, time, tasks, trace: String::new() });
        for process in 0..self.processes.len() {
            self.crash(process);
        }
    }

    fn describe(&self, task: &TaskState) -> String {
        let waits = match task.waiting {
            Waiting::Turn => "can go on".into(),
            Waiting::Unlocked(_) => "waits for a monitor's value".into(),
            Waiting::Notified(_, None) => "waits to be notified".into(),
            Waiting::Notified(_, Some(until)) => format!("waits to be notified, until {until:?}"),
            Waiting::Until(until) => format!("sleeps until {until:?}"),
            Waiting::End(other) => match self.tasks.get(&other) {
                Some(other) => format!("waits for {} to end", other.name),
                None => "waits for a thread that has ended".into(),
            },
            Waiting::ScopeEnd(_) => "waits for its threads to end".into(),
            Waiting::Points(process, points) => {
                format!("waits for {} to come to point {points}", self.processes[process].name)
            }
        };
        format!("{}: {waits}, {}", task.name, Place(task.at))
    }

    /// Who goes next. When nobody can, time goes on to where somebody can.
    pub(crate) fn pick(&mut self) -> Option<usize> {
        loop {
            self.wake_who_is_due();
            if let Some(next) = self.pick_ready() {
                let task = self.tasks.get_mut(&next)?;
                task.urgent = false;
                return Some(next);
            }
            if self.tasks.is_empty() {
                return None;
            }
            let deadlines = self.tasks.values().filter_map(|task| task.waiting.deadline());
            match deadlines.min() {
                Some(due) => {
                    self.now = self.now.max(due) + Duration::from_nanos(self.random.below(LATE_NS_MAX));
                    if self.now > self.time_max {
                        self.fail(What::Time);
                    }
                }
                None if self.tasks.values().any(|task| matches!(task.waiting, Waiting::Points(..))) => {
                    for task in self.tasks.values_mut() {
                        if let Waiting::Points(..) = task.waiting {
                            (task.waiting, task.woken) = (Waiting::Turn, Woken::TimedOut);
                        }
                    }
                }
                None => self.fail(What::Deadlock),
            }
        }
    }

    fn wake_who_is_due(&mut self) {
        let spurious = self.random.below(SPURIOUS_ONE_IN) == 0;
        let now = self.now;
        for task in self.tasks.values_mut() {
            if task.waiting.deadline().is_some_and(|deadline| deadline <= now) {
                (task.waiting, task.woken) = (Waiting::Turn, Woken::TimedOut);
            } else if spurious && matches!(task.waiting, Waiting::Notified(..)) {
                (task.waiting, task.woken) = (Waiting::Turn, Woken::Happened);
            }
        }
    }

    fn pick_ready(&mut self) -> Option<usize> {
        let ready = || self.tasks.iter().filter(|(_, task)| task.waiting == Waiting::Turn);
        if let Some((&urgent, _)) = ready().find(|(_, task)| task.urgent) {
            return Some(urgent);
        }
        let all = ready().map(|(_, task)| task.weight).sum();
        let mut drawn = self.random.below(all);
        for (&id, task) in self.tasks.iter().filter(|(_, task)| task.waiting == Waiting::Turn) {
            if drawn < task.weight {
                return Some(id);
            }
            drawn -= task.weight;
        }
        None
    }

    /// What wakes a task's thread.
    pub(crate) fn baton(&self, id: usize) -> Option<Baton> {
        let task = self.tasks.get(&id)?;
        Some(Baton { go: task.go.clone(), thread: task.thread.clone()? })
    }
}

impl Waiting {
    fn deadline(self) -> Option<Duration> {
        match self {
            Waiting::Notified(_, until) => until,
            Waiting::Until(until) => Some(until),
            _ => None,
        }
    }
}

/// The turn of a task, to be given to its thread.
pub(crate) struct Baton {
    go: Arc<AtomicBool>,
    thread: Thread,
}

impl Baton {
    pub(crate) fn hand_over(self) {
        self.go.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Waits for the turn of the calling thread.
pub(crate) fn await_turn(go: &AtomicBool) {
    while !go.swap(false, Ordering::Acquire) {
        std::thread::park();
    }
}
