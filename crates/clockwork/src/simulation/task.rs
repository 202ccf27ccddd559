//! A thread of a simulation, and what becomes of its calls.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::failure::What;
use super::state::{State, Waiting, Woken, await_turn};
use super::trace::Event;

/// How many simulations there are in this process: while there is none, no thread looks whether it is in one.
pub(super) static SIMULATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static CURRENT: RefCell<Option<Rc<Task>>> = const { RefCell::new(None) };
}

/// Looks at the world after every step; what it finds wrong.
pub(super) type Watch = Box<dyn FnMut() -> Result<(), String> + Send>;

/// What the threads of a simulation share.
pub(crate) struct Core {
    pub(super) state: Mutex<State>,
    pub(super) watch: Option<Mutex<Watch>>,
    pub(super) ended: Condvar,
    /// As in the state; for who must not wait for it.
    pub(super) steps: AtomicU64,
    base: Instant,
}

/// A thread of the simulation; lives on this thread.
pub(crate) struct Task {
    core: Arc<Core>,
    id: usize,
    process: usize,
    go: Arc<AtomicBool>,
}

/// A scope of the calling task.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScopeId(usize);

/// A task that another one started.
#[derive(Debug)]
pub(crate) struct Child<R> {
    id: usize,
    result: Arc<Mutex<Option<std::thread::Result<R>>>>,
}

/// What a task unwinds with whose process crashes.
struct Crashed;

/// Whether this is what a thread ends with whose process was crashed.
#[must_use]
pub fn is_crash(payload: &(dyn Any + Send)) -> bool {
    payload.is::<Crashed>()
}

/// The simulation's task on this thread.
pub(crate) fn current() -> Option<Rc<Task>> {
    if SIMULATIONS.load(Ordering::Relaxed) == 0 {
        return None;
    }
    // A thread that ends has left its simulation.
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
        // What it calls is not part of the simulation.
        let task = CURRENT.with(|current| current.borrow_mut().take());
        let found = watch.lock().unwrap_or_else(PoisonError::into_inner)();
        CURRENT.with(|current| *current.borrow_mut() = task);
        if let Err(found) = found {
            self.lock().fail(What::Watch(found));
        }
    }

    /// Runs a task in this thread, from its first turn to its end.
    pub(super) fn run<R>(
        self: &Arc<Core>,
        id: usize,
        process: usize,
        go: Arc<AtomicBool>,
        f: impl FnOnce() -> R,
        result: &Mutex<Option<std::thread::Result<R>>>,
    ) {
        await_turn(&go);
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

    /// The task has nothing more to do, and nobody is to find it here.
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

    pub(crate) fn random_bytes(&self) -> [u8; 16] {
        let mut state = self.core.lock();
        let mut word = || u128::from(state.chance.below(u64::MAX));
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
        self.core.lock().wake(|waiting| matches!(waiting, Waiting::Notified(..)), false);
        self.point(&Event::WakesAll);
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

    /// Whether the moment came.
    #[track_caller]
    pub(crate) fn wait(&self, monitor: usize, until: Option<Instant>) -> bool {
        let until = until.map(|until| until.saturating_duration_since(self.core.base));
        let woken = self.block(Waiting::Notified(monitor, until), &Event::Waits(until));
        self.end_if_crashed();
        woken == Woken::TimedOut
    }

    #[track_caller]
    pub(crate) fn notify(&self, monitor: usize) {
        self.core.lock().wake(|waiting| matches!(waiting, Waiting::Notified(at, _) if at == monitor), false);
        self.point(&Event::Notifies);
        self.end_if_crashed();
    }

    pub(crate) fn scope_begins(&self) -> ScopeId {
        ScopeId(self.core.lock().next_id())
    }

    /// Waits for the tasks of a scope, whatever happens.
    #[track_caller]
    pub(crate) fn scope_ends(&self, scope: ScopeId) {
        let alive = || self.core.lock().tasks.values().any(|task| task.scope == Some(scope.0));
        while alive() {
            self.block(Waiting::ScopeEnd(scope.0), &Event::ScopeEnds);
        }
    }

    /// Waits for a process to come so far; whether it did.
    #[track_caller]
    pub(super) fn await_points(&self, process: usize, points: u64) -> bool {
        if self.core.lock().processes[process].points >= points {
            return true;
        }
        let note = Event::Note(format!("waits for point {points}"));
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

    /// Unwinds when the process has crashed. What already unwinds goes on, and never waits.
    pub(super) fn end_if_crashed(&self) {
        if !std::thread::panicking() && self.is_crashed() {
            resume_unwind(Box::new(Crashed));
        }
    }

    /// A point at which others may go on.
    #[track_caller]
    fn point(&self, event: &Event) {
        self.core.watch();
        let mut state = self.core.lock();
        state.step(self.id, event, Location::caller());
        self.core.steps.store(state.steps, Ordering::Relaxed);
        if state.makes_way() {
            self.pass(state, Waiting::Turn);
        }
    }

    #[track_caller]
    fn block(&self, waiting: Waiting, event: &Event) -> Woken {
        self.core.watch();
        let mut state = self.core.lock();
        state.step(self.id, event, Location::caller());
        self.core.steps.store(state.steps, Ordering::Relaxed);
        let crashed = state.tasks.get(&self.id).is_some_and(|task| task.crashed);
        // Who has crashed waits for nothing but for threads that borrow from it.
        let waits = !crashed || matches!(waiting, Waiting::ScopeEnd(_));
        self.pass(state, if waits { waiting } else { Waiting::Turn })
    }

    /// Gives the turn away until it comes back.
    fn pass<'a>(&'a self, mut state: MutexGuard<'a, State>, waiting: Waiting) -> Woken {
        if let Some(task) = state.tasks.get_mut(&self.id) {
            (task.waiting, task.woken) = (waiting, Woken::TimedOut);
        }
        if let Some(next) = state.pick()
            && next != self.id
            && let Some(baton) = state.baton(next)
        {
            drop(state);
            baton.hand_over();
            await_turn(&self.go);
            state = self.core.lock();
        }
        state.tasks.get(&self.id).map_or(Woken::Happened, |task| task.woken)
    }
}

impl ScopeId {
    #[track_caller]
    pub(crate) fn spawn<'scope, R: Send + 'scope>(
        self,
        threads: &'scope std::thread::Scope<'scope, '_>,
        name: String,
        f: impl FnOnce() -> R + Send + 'scope,
    ) -> Child<R> {
        let task = current().expect("a scope of a simulation is used in it");
        let process = task.process;
        self.spawn_in(&task, process, threads, name, f)
    }

    #[track_caller]
    pub(super) fn spawn_in<'scope, R: Send + 'scope>(
        self,
        task: &Task,
        process: usize,
        threads: &'scope std::thread::Scope<'scope, '_>,
        name: String,
        f: impl FnOnce() -> R + Send + 'scope,
    ) -> Child<R> {
        task.end_if_crashed();
        let core = task.core.clone();
        let (id, go) = core.lock().add_task(name.clone(), process, Some(self.0), Location::caller());
        let result = Arc::new(Mutex::new(None));
        let thread = std::thread::Builder::new().name(name).spawn_scoped(threads, {
            let result = result.clone();
            let core = core.clone();
            move || {
                core.run(id, process, go, f, &result);
                // Before the end: what nobody joins is dropped while it is still this task's turn.
                drop(result);
                core.end(id);
            }
        });
        let thread = match thread {
            Ok(thread) => thread.thread().clone(),
            Err(error) => {
                core.lock().tasks.remove(&id);
                panic!("the system starts no thread: {error}");
            }
        };
        if let Some(child) = core.lock().tasks.get_mut(&id) {
            child.thread = Some(thread);
        }
        task.point(&Event::Note(String::from("starts a thread")));
        Child { id, result }
    }
}

impl<R> Child<R> {
    #[track_caller]
    pub(crate) fn join(self) -> std::thread::Result<R> {
        let task = current().expect("a thread of a simulation is joined in it");
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

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "of an unknown kind".into())
}
