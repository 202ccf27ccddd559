//! The state of a simulation: its tasks, its clock, and the choice of the next task to run.

use std::collections::BTreeMap;
use std::panic::Location;
use std::time::Duration;

use super::baton::Baton;
use super::failure::{Failure, What};
use super::random::Random;
use super::trace::{CallSite, Event, Trace};
use super::waiting::{Waiting, Woken};

/// Virtual time of a step. A loop that never waits still reaches its deadline.
const STEP_TIME: Duration = Duration::from_micros(1);
/// Longest delay between the deadline of a wait and its end.
const LATE_NS_MAX: u64 = 50_000;
/// The rates of spurious wake-ups that a seed may have: one wait in 2^4 up to one in 2^12.
const SPURIOUS_SHIFTS: std::ops::RangeInclusive<u64> = 4..=12;
/// A spurious wake-up comes within 2^0 to 2^10 choices of the next task, and sooner rather than later.
const SPURIOUS_DELAY_SHIFTS: u64 = 11;
/// The relative probabilities with which a task is chosen. Each task draws one.
const WEIGHTS: [u64; 6] = [1, 1, 1, 4, 16, 64];
/// In how many of 256 calls a task that need not wait lets another one run. Each seed draws one.
const EAGERNESS: [u64; 4] = [256, 96, 24, 6];

/// A thread of the simulation.
pub(crate) struct TaskState {
    pub(crate) name: String,
    pub(crate) process: usize,
    pub(crate) scope: Option<usize>,
    pub(crate) waiting: Waiting,
    pub(crate) woken: Woken,
    pub(crate) at: &'static Location<'static>,
    pub(crate) crashed: bool,
    /// The value of `State::choices` at which the current wait ends spuriously.
    spurious_at: Option<u64>,
    /// The task is chosen before all others.
    urgent: bool,
    weight: u64,
    baton: Baton,
}

/// Tasks that crash together.
pub(crate) struct ProcessState {
    pub(crate) name: String,
    /// Calls of this crate by the tasks of the process.
    pub(crate) points: u64,
    /// How many more threads [`Scope::try_spawn`](crate::Scope::try_spawn) may start; `None` without a limit.
    pub(crate) threads_left: Option<u64>,
}

/// The whole state, under the lock of [`Core`](super::task::Core).
pub(crate) struct State {
    pub(crate) seed: u64,
    pub(crate) now: Duration,
    pub(crate) steps: u64,
    pub(crate) tasks: BTreeMap<usize, TaskState>,
    pub(crate) processes: Vec<ProcessState>,
    pub(crate) failure: Option<Failure>,
    pub(crate) trace: Trace,
    /// For random numbers of the program. Their use does not change the interleaving.
    pub(crate) program_random: Random,
    pub(crate) defects: Defects,
    random: Random,
    settings: Settings,
    eagerness: u64,
    /// How often the next task was chosen.
    choices: u64,
    next_id: usize,
}

/// The settings of a simulation that its steps depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) steps_max: u64,
    pub(crate) time_max: Duration,
    pub(crate) spurious_one_in: Option<u64>,
}

/// Defects that the simulation gives to the program, so that a test can see that its checks find them.
#[derive(Default)]
pub(crate) struct Defects {
    /// The end of a file's name, and a line: the notifications there have no effect.
    pub(crate) forgotten: Option<(String, u32)>,
    /// [`catch`](crate::catch) catches no panic.
    pub(crate) panics_escape: bool,
}

impl Defects {
    pub(crate) fn forgets(&self, at: &Location<'_>) -> bool {
        let is_at = |(file, line): &(String, u32)| at.line() == *line && at.file().ends_with(file.as_str());
        self.forgotten.as_ref().is_some_and(is_at)
    }
}

/// The rate of spurious wake-ups of a seed: none for half of the seeds.
pub(crate) fn draw_spurious_one_in(seed: u64) -> Option<u64> {
    let mut random = Random::new(seed ^ 0x7370_7572_696f_7573);
    let (first, last) = SPURIOUS_SHIFTS.into_inner();
    (random.below(2) == 1).then(|| 1 << (first + random.below(last - first + 1)))
}

impl ProcessState {
    pub(crate) fn new(name: impl Into<String>) -> ProcessState {
        ProcessState { name: name.into(), points: 0, threads_left: None }
    }

    /// Counts a thread against the limit; `false` when the limit is reached.
    pub(crate) fn admit_thread(&mut self) -> bool {
        match &mut self.threads_left {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }
}

impl State {
    pub(crate) fn new(seed: u64, settings: Settings, trace: bool) -> State {
        let mut random = Random::new(seed);
        let eagerness = EAGERNESS[random.below(EAGERNESS.len() as u64) as usize];
        State {
            seed,
            now: Duration::ZERO,
            steps: 0,
            tasks: BTreeMap::new(),
            processes: vec![ProcessState::new("world")],
            failure: None,
            trace: Trace::new(trace),
            program_random: Random::new(seed ^ 0x6368_616e_6365),
            defects: Defects::default(),
            random,
            settings,
            eagerness,
            choices: 0,
            next_id: 0,
        }
    }

    /// An unused number for a task or a scope.
    pub(crate) fn next_id(&mut self) -> usize {
        self.next_id += 1;
        self.next_id
    }

    /// Adds a task whose thread has been started and waits for its baton.
    pub(crate) fn add_task(
        &mut self,
        id: usize,
        name: &str,
        process: usize,
        scope: Option<usize>,
        baton: Baton,
        at: &'static Location<'static>,
    ) {
        let weight = WEIGHTS[self.random.below(WEIGHTS.len() as u64) as usize];
        let name = format!("{}/{name}", self.processes[process].name);
        self.trace.add(self.now, &name, &Event::Starts, at);
        let task = TaskState {
            name,
            process,
            scope,
            waiting: Waiting::Ready,
            woken: Woken::Happened,
            at,
            crashed: self.failure.is_some(),
            spurious_at: None,
            urgent: false,
            weight,
            baton,
        };
        self.tasks.insert(id, task);
    }

    /// Counts and traces a call by a task, and lets its time pass.
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

    /// Advances the step count and the clock by one step. Returns the time.
    pub(crate) fn tick(&mut self) -> Duration {
        self.steps += 1;
        self.now += STEP_TIME;
        if self.steps > self.settings.steps_max {
            self.fail(What::Steps);
        }
        self.now
    }

    /// Whether a task that need not wait lets another one run.
    pub(crate) fn yields(&mut self) -> bool {
        self.tasks.values().any(|task| task.urgent) || self.random.below(256) < self.eagerness
    }

    /// Begins a wait of a task, and draws whether the wait ends spuriously.
    ///
    /// The draw is for the wait and not for a period, so the steps and timers of other tasks do not make a spurious
    /// wake-up more likely while a task waits for a notification that never comes.
    pub(crate) fn begin_wait(&mut self, id: usize, waiting: Waiting) {
        let mut spurious_at = None;
        if let (Some(one_in), Waiting::Notified(..) | Waiting::Polls(..)) =
            (self.settings.spurious_one_in, waiting)
            && self.random.below(one_in) == 0
        {
            let shift_max = self.random.below(SPURIOUS_DELAY_SHIFTS);
            let delay_max = 1 << self.random.below(shift_max + 1);
            spurious_at = Some(self.choices + 1 + self.random.below(delay_max));
        }
        if let Some(task) = self.tasks.get_mut(&id) {
            // A wait that a crash ends counts as timed out.
            (task.waiting, task.woken, task.spurious_at) = (waiting, Woken::TimedOut, spurious_at);
        }
    }

    /// Ends the waits that `is_woken` selects.
    pub(crate) fn wake(&mut self, is_woken: impl Fn(Waiting) -> bool, urgent: bool) {
        for task in self.tasks.values_mut().filter(|task| is_woken(task.waiting)) {
            task.waiting = Waiting::Ready;
            task.woken = Woken::Happened;
            task.urgent = urgent;
        }
    }

    /// Marks all tasks of a process as crashed. Each one unwinds when it is chosen next.
    pub(crate) fn crash(&mut self, process: usize) {
        for task in self.tasks.values_mut().filter(|task| task.process == process) {
            task.crashed = true;
            if !matches!(task.waiting, Waiting::ScopeEnd(_)) {
                task.waiting = Waiting::Ready;
            }
            self.trace.add(self.now, &task.name, &Event::Crashes, task.at);
        }
    }

    /// Records the first failure, and crashes all processes to end the simulation.
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
            Waiting::Ready => "is ready to run".into(),
            Waiting::Unlocked(_) => "waits to lock a monitor".into(),
            Waiting::Notified(_, None) => "waits for a notification".into(),
            Waiting::Notified(_, Some(until)) => format!("waits for a notification until {until:?}"),
            Waiting::Polls(_, None) => "polls".into(),
            Waiting::Polls(_, Some(until)) => format!("polls until {until:?}"),
            Waiting::Until(until) => format!("sleeps until {until:?}"),
            Waiting::End(other) => match self.tasks.get(&other) {
                Some(other) => format!("waits for the end of {}", other.name),
                None => "waits for a thread that has ended".into(),
            },
            Waiting::ScopeEnd(_) => "waits for the threads of its scope".into(),
            Waiting::Points(process, points) => {
                format!("waits for call {points} of {}", self.processes[process].name)
            }
        };
        format!("{}: {waits}, {}", task.name, CallSite(task.at))
    }

    /// Chooses the next task. When no task is ready, advances the clock to the earliest deadline. `None` without tasks.
    pub(crate) fn pick(&mut self) -> Option<usize> {
        loop {
            self.choices += 1;
            self.end_due_waits();
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
                    if self.now > self.settings.time_max {
                        self.fail(What::Time);
                    }
                }
                None if self.tasks.values().any(|task| matches!(task.waiting, Waiting::Points(..))) => {
                    for task in self.tasks.values_mut() {
                        if let Waiting::Points(..) = task.waiting {
                            (task.waiting, task.woken) = (Waiting::Ready, Woken::TimedOut);
                        }
                    }
                }
                None => self.fail(What::Deadlock),
            }
        }
    }

    /// Ends the waits whose deadline has come, and those that end spuriously now.
    fn end_due_waits(&mut self) {
        let now = self.now;
        for task in self.tasks.values_mut() {
            if task.waiting.deadline().is_some_and(|deadline| deadline <= now) {
                (task.waiting, task.woken) = (Waiting::Ready, Woken::TimedOut);
            } else if task.waiting.is_for_notification()
                && task.spurious_at.is_some_and(|choice| choice <= self.choices)
            {
                (task.waiting, task.woken) = (Waiting::Ready, Woken::Happened);
                self.trace.add(now, &task.name, &Event::SpuriousWakeUp, task.at);
            }
        }
    }

    fn pick_ready(&mut self) -> Option<usize> {
        let ready = || self.tasks.iter().filter(|(_, task)| task.waiting == Waiting::Ready);
        if let Some((&urgent, _)) = ready().find(|(_, task)| task.urgent) {
            return Some(urgent);
        }
        let all = ready().map(|(_, task)| task.weight).sum();
        let mut drawn = self.random.below(all);
        for (&id, task) in self.tasks.iter().filter(|(_, task)| task.waiting == Waiting::Ready) {
            if drawn < task.weight {
                return Some(id);
            }
            drawn -= task.weight;
        }
        None
    }

    /// The baton of a task.
    pub(crate) fn baton(&self, id: usize) -> Option<Baton> {
        Some(self.tasks.get(&id)?.baton.clone())
    }
}
