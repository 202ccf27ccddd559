//! [`Task`]: a thread of a simulation, and the simulated form of each call of this crate.

use std::any::Any;
use std::cell::RefCell;
use std::io;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::baton::{Baton, await_baton};
use super::failure::What;
use super::state::State;
use super::trace::Event;
use super::waiting::{Waiting, Woken};
use crate::panic::message;

/// `errno.h` of Linux: pthread_create(3) returns it when the system refuses a thread.
const EAGAIN: i32 = 11;

/// Number of simulations that run in this process. While it is 0, [`current`] does not look for a task.
pub(super) static SIMULATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static CURRENT: RefCell<Option<Rc<Task>>> = const { RefCell::new(None) };
}

/// The function of [`Simulation::watch`](super::Simulation::watch).
pub(super) type Watch = Box<dyn FnMut() -> Result<(), String> + Send>;

/// The part of a simulation that its threads share.
pub(crate) struct Core {
    pub(super) state: Mutex<State>,
    pub(super) watch: Option<Mutex<Watch>>,
    pub(super) ended: Condvar,
    /// A copy of `State::steps` that can be read without the lock.
    pub(super) steps: AtomicU64,
    base: Instant,
}

/// The task of the current thread.
pub(crate) struct Task {
    core: Arc<Core>,
    id: usize,
    process: usize,
    go: Arc<AtomicBool>,
}

/// A scope that a task opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScopeId(usize);

/// The handle of a task for the task that started it.
#[derive(Debug)]
pub(crate) struct Child<R> {
    id: usize,
    result: Arc<Mutex<Option<std::thread::Result<R>>>>,
}

/// The payload with which the tasks of a crashed process unwind.
struct Crashed;

/// Whether a panic payload, as of [`Handle::join`](crate::Handle::join), comes from a crash of the thread's process.
#[must_use]
pub fn is_crash(payload: &(dyn Any + Send)) -> bool {
    payload.is::<Crashed>()
}

/// The task of the calling thread, in a simulation.
pub(crate) fn current() -> Option<Rc<Task>> {
    if SIMULATIONS.load(Ordering::Relaxed) == 0 {
        return None;
    }
    // The thread-local is gone when the thread is about to end; its task has ended before.
    CURRENT.try_with(|current| current.try_borrow().ok()?.clone()).ok().flatten()
}

impl Core {
    pub(super) fn new(state: State, watch: Option<Watch>) -> Core {
        Core {
            state: Mutex::new(state),
            watch: watch.map(Mutex::new),
            ended: Condvar::new(),
            steps: AtomicU64::new(0),
            base: Instant::now(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        let Some(watch) = &self.watch else { return };
        // The calls of the function are not part of the simulation.
        let task = CURRENT.with(|current| current.borrow_mut().take());
        let found = watch.lock().unwrap_or_else(PoisonError::into_inner)();
        CURRENT.with(|current| *current.borrow_mut() = task);
        if let Err(found) = found {
            self.lock().fail(What::Watch(found));
        }
    }

    /// Runs a task on the calling thread: waits for the first baton, calls `f` and stores its result.
    pub(super) fn run<R>(
        self: &Arc<Core>,
        id: usize,
        process: usize,
        go: Arc<AtomicBool>,
        f: impl FnOnce() -> R,
        result: &Mutex<Option<std::thread::Result<R>>>,
    ) {
        await_baton(&go);
        let task = Rc::new(Task { core: self.clone(), id, process, go });
        CURRENT.with(|current| *current.borrow_mut() = Some(task.clone()));
        let returned = catch_unwind(AssertUnwindSafe(|| {
            task.end_if_crashed();
            f()
        }));
        let panic = returned.as_ref().err().filter(|payload| !is_crash(payload.as_ref()));
        if let Some(payload) = panic {
            self.lock().fail(What::Panic(message(payload.as_ref())));
        }
        *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(returned);
    }

    /// Removes a task that has finished, and lets another one run.
    pub(super) fn end(&self, id: usize) {
        CURRENT.with(|current| current.borrow_mut().take());
        let mut state = self.lock();
        state.step(id, &Event::Ends, Location::caller());
        let scope = state.tasks.remove(&id).and_then(|task| task.scope);
        state.wake(|waiting| waiting == Waiting::End(id), false);
        if let Some(scope) = scope
            && !state.tasks.values().any(|task| task.scope == Some(scope))
        {
            state.wake(|waiting| waiting == Waiting::ScopeEnd(scope), false);
        }
        let next = state.pick().and_then(|next| state.baton(next));
        drop(state);
        match next {
            Some(next) => next.hand_over(),
            None => self.ended.notify_all(),
        }
    }
}

impl Task {
    pub(super) fn core(&self) -> &Core {
        &self.core
    }

    pub(super) fn process(&self) -> usize {
        self.process
    }

    pub(crate) fn random_bytes(&self) -> [u8; 16] {
        let mut state = self.core.lock();
        let mut word = || u128::from(state.program_random.below(u64::MAX));
        (word() << 64 | word()).to_le_bytes()
    }

    pub(crate) fn now(&self) -> Instant {
        let now = self.core.lock().tick();
        self.end_if_crashed();
        self.core.base + now
    }

    #[track_caller]
    pub(crate) fn sleep(&self, time: Duration) {
        let until = self.core.lock().now.saturating_add(time);
        self.block(Waiting::Until(until), &Event::Sleeps(until));
        self.end_if_crashed();
    }

    #[track_caller]
    pub(crate) fn wake_all(&self) {
        self.core.lock().wake(Waiting::is_for_notification, false);
        self.point(&Event::WakesAll);
        self.end_if_crashed();
    }

    #[track_caller]
    pub(crate) fn wake_polls(&self) {
        self.core.lock().wake(|waiting| matches!(waiting, Waiting::Polls(..)), false);
        self.point(&Event::WakesPolls);
        self.end_if_crashed();
    }

    #[track_caller]
    pub(crate) fn lock<G>(&self, monitor: usize, mut try_lock: impl FnMut() -> Option<G>) -> G {
        self.point(&Event::Locks);
        self.end_if_crashed();
        loop {
            if let Some(guard) = try_lock() {
                return guard;
            }
            self.block(Waiting::Unlocked(monitor), &Event::Locks);
            self.end_if_crashed();
        }
    }

    pub(crate) fn unlocked(&self, monitor: usize) {
        self.core.lock().wake(|waiting| waiting == Waiting::Unlocked(monitor), false);
    }

    /// Waits for a notification; `true` when the wait timed out.
    #[track_caller]
    pub(crate) fn wait(&self, monitor: usize, until: Option<Instant>, as_poll: bool) -> bool {
        let until = until.map(|until| until.saturating_duration_since(self.core.base));
        let waiting = if as_poll { Waiting::Polls } else { Waiting::Notified }(monitor, until);
        let woken = self.block(waiting, &Event::Waits(until));
        self.end_if_crashed();
        woken == Woken::TimedOut
    }

    #[track_caller]
    pub(crate) fn notify(&self, monitor: usize) {
        let mut state = self.core.lock();
        if !state.defects.forgets(Location::caller()) {
            state.wake(|waiting| waiting.is_on(monitor), false);
        }
        drop(state);
        self.point(&Event::Notifies);
        self.end_if_crashed();
    }

    pub(crate) fn scope_begins(&self) -> ScopeId {
        ScopeId(self.core.lock().next_id())
    }

    /// Waits for the tasks of a scope, also after a crash or a failure.
    #[track_caller]
    pub(crate) fn scope_ends(&self, scope: ScopeId) {
        let alive = || self.core.lock().tasks.values().any(|task| task.scope == Some(scope.0));
        while alive() {
            self.block(Waiting::ScopeEnd(scope.0), &Event::ScopeEnds);
        }
    }

    /// Waits for a process to make `points` calls; `false` when it cannot.
    #[track_caller]
    pub(super) fn await_points(&self, process: usize, points: u64) -> bool {
        if self.core.lock().processes[process].points >= points {
            return true;
        }
        let note = Event::Note(format!("waits for call {points}"));
        let woken = self.block(Waiting::Points(process, points), &note);
        self.end_if_crashed();
        woken == Woken::Happened
    }

    #[track_caller]
    pub(super) fn note(&self, note: impl FnOnce() -> String) {
        let mut state = self.core.lock();
        if state.trace.is_kept() {
            let State { now, tasks, trace, .. } = &mut *state;
            if let Some(task) = tasks.get(&self.id) {
                trace.add(*now, &task.name, &Event::Note(note()), Location::caller());
            }
        }
    }

    pub(super) fn is_crashed(&self) -> bool {
        self.core.lock().tasks.get(&self.id).is_some_and(|task| task.crashed)
    }

    /// Whether [`catch`](crate::catch) catches panics.
    pub(crate) fn catches_panics(&self) -> bool {
        !self.core.lock().defects.panics_escape
    }

    /// Unwinds the task if its process has crashed. A task that already unwinds goes on with that.
    pub(crate) fn end_if_crashed(&self) {
        if !std::thread::panicking() && self.is_crashed() {
            resume_unwind(Box::new(Crashed));
        }
    }

    /// A call that need not wait. Another task may run before it returns.
    #[track_caller]
    fn point(&self, event: &Event) {
        self.core.watch();
        let mut state = self.core.lock();
        state.step(self.id, event, Location::caller());
        self.core.steps.store(state.steps, Ordering::Relaxed);
        if state.yields() {
            self.pass(state, Waiting::Ready);
        }
    }

    /// A call that waits.
    #[track_caller]
    fn block(&self, waiting: Waiting, event: &Event) -> Woken {
        self.core.watch();
        let mut state = self.core.lock();
        state.step(self.id, event, Location::caller());
        self.core.steps.store(state.steps, Ordering::Relaxed);
        let crashed = state.tasks.get(&self.id).is_some_and(|task| task.crashed);
        // A crashed task waits for nothing except the threads that borrow from it.
        let waits = !crashed || matches!(waiting, Waiting::ScopeEnd(_));
        self.pass(state, if waits { waiting } else { Waiting::Ready })
    }

    /// Lets the next task run, and returns once this one is chosen again.
    fn pass<'a>(&'a self, mut state: MutexGuard<'a, State>, waiting: Waiting) -> Woken {
        state.begin_wait(self.id, waiting);
        if let Some(next) = state.pick()
            && next != self.id
            && let Some(baton) = state.baton(next)
        {
            drop(state);
            baton.hand_over();
            await_baton(&self.go);
            state = self.core.lock();
        }
        state.tasks.get(&self.id).map_or(Woken::Happened, |task| task.woken)
    }
}

impl ScopeId {
    /// Counts a thread against the limit of the calling task's process.
    #[track_caller]
    pub(crate) fn check_thread_limit(self, name: &str) -> io::Result<()> {
        let task = current().expect("a scope of a simulation is used in the simulation");
        task.end_if_crashed();
        if task.core.lock().processes[task.process].admit_thread() {
            return Ok(());
        }
        task.point(&Event::Note(format!("is refused the thread {name}")));
        task.end_if_crashed();
        Err(io::Error::from_raw_os_error(EAGAIN))
    }

    #[track_caller]
    pub(crate) fn spawn<'scope, R: Send + 'scope>(
        self,
        threads: &'scope std::thread::Scope<'scope, '_>,
        builder: Builder,
        name: String,
        f: impl FnOnce() -> R + Send + 'scope,
    ) -> io::Result<Child<R>> {
        let task = current().expect("a scope of a simulation is used in the simulation");
        let process = task.process;
        self.spawn_in(&task, process, threads, builder, name, f)
    }

    /// Starts a thread, and adds its task once the system has started it.
    #[track_caller]
    pub(super) fn spawn_in<'scope, R: Send + 'scope>(
        self,
        task: &Task,
        process: usize,
        threads: &'scope std::thread::Scope<'scope, '_>,
        builder: Builder,
        name: String,
        f: impl FnOnce() -> R + Send + 'scope,
    ) -> io::Result<Child<R>> {
        task.end_if_crashed();
        let core = task.core.clone();
        let id = core.lock().next_id();
        let go = Arc::new(AtomicBool::new(false));
        let result = Arc::new(Mutex::new(None));
        let thread = builder.name(name.clone()).spawn_scoped(threads, {
            let (core, go, result) = (core.clone(), go.clone(), result.clone());
            move || {
                core.run(id, process, go, f, &result);
                // Before the task ends: a result that is not joined is dropped by this task, and not beside another.
                drop(result);
                core.end(id);
            }
        })?;
        let baton = Baton::new(go, thread.thread().clone());
        core.lock().add_task(id, &name, process, Some(self.0), baton, Location::caller());
        task.point(&Event::Note(String::from("starts a thread")));
        Ok(Child { id, result })
    }
}

impl<R> Child<R> {
    #[track_caller]
    pub(crate) fn join(self) -> std::thread::Result<R> {
        let task = current().expect("a thread of a simulation is joined in the simulation");
        loop {
            if let Some(result) = self.result.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return result;
            }
            let name =
                task.core.lock().tasks.get(&self.id).map_or_else(String::new, |task| task.name.clone());
            task.block(Waiting::End(self.id), &Event::Joins(name));
            task.end_if_crashed();
        }
    }
}
