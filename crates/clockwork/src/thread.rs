//! [`scope`]: threads that end before the function that starts them returns.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread::{Builder, ScopedJoinHandle};

use crate::hook;

/// Starts threads that may borrow from outside of the [`scope()`].
#[derive(Clone, Copy, Debug)]
pub struct Scope<'scope, 'env: 'scope> {
    pub(crate) threads: &'scope std::thread::Scope<'scope, 'env>,
    pub(crate) simulated: Option<hook::ScopeId>,
}

/// A thread of a [`scope()`].
#[derive(Debug)]
pub struct Handle<'scope, R>(pub(crate) Thread<'scope, R>);

#[derive(Debug)]
pub(crate) enum Thread<'scope, R> {
    Real(ScopedJoinHandle<'scope, R>),
    Simulated(hook::Child<R>),
}

/// Runs `f`, which may start threads that borrow, and waits for all of these threads, also when `f` panics.
///
/// # Panics
///
/// With the panic of `f`. Panics also when a thread panicked and was not joined.
#[track_caller]
pub fn scope<'env, F, T>(f: F) -> T
where
    F: for<'scope> FnOnce(Scope<'scope, 'env>) -> T,
{
    let Some(task) = hook::current() else {
        return std::thread::scope(|threads| f(Scope { threads, simulated: None }));
    };
    let id = task.scope_begins();
    std::thread::scope(|threads| {
        // The wait of the standard library would block the only thread that the simulator lets run, so the simulator
        // waits first.
        let returned = catch_unwind(AssertUnwindSafe(|| f(Scope { threads, simulated: Some(id) })));
        task.scope_ends(id);
        returned.unwrap_or_else(|panic| resume_unwind(panic))
    })
}

impl<'scope, 'env> Scope<'scope, 'env> {
    /// Starts a thread. Debuggers and panic messages show its name.
    ///
    /// # Errors
    ///
    /// The system refused to start the thread, as at a limit on processes or memory (`EAGAIN`). In a simulation,
    /// `simulation::Process::refuse_threads` causes this error. `f` is dropped without a call.
    #[track_caller]
    pub fn try_spawn<F, R>(self, name: impl Into<String>, f: F) -> io::Result<Handle<'scope, R>>
    where
        F: FnOnce() -> R + Send + 'scope,
        R: Send + 'scope,
    {
        let name = name.into();
        if let Some(scope) = self.simulated {
            scope.check_thread_limit(&name)?;
        }
        self.start(Builder::new(), name, f)
    }

    /// Starts a thread, for tests: as [`Scope::try_spawn`], but panics where that returns an error. A simulation never
    /// refuses this thread.
    ///
    /// # Panics
    ///
    /// When the system refused to start the thread.
    #[track_caller]
    pub fn spawn<F, R>(self, name: impl Into<String>, f: F) -> Handle<'scope, R>
    where
        F: FnOnce() -> R + Send + 'scope,
        R: Send + 'scope,
    {
        self.start(Builder::new(), name.into(), f).expect("the system starts a thread")
    }

    #[track_caller]
    fn start<F, R>(self, builder: Builder, name: String, f: F) -> io::Result<Handle<'scope, R>>
    where
        F: FnOnce() -> R + Send + 'scope,
        R: Send + 'scope,
    {
        // The standard library panics on a name that holds a NUL.
        let name = name.replace('\0', " ");
        Ok(Handle(match self.simulated {
            Some(scope) => Thread::Simulated(scope.spawn(self.threads, builder, name, f)?),
            None => Thread::Real(builder.name(name).spawn_scoped(self.threads, f)?),
        }))
    }
}

impl<R> Handle<'_, R> {
    /// Waits for the thread to end and returns its result.
    ///
    /// # Errors
    ///
    /// The payload of the thread's panic, for [`std::panic::resume_unwind`].
    #[track_caller]
    pub fn join(self) -> std::thread::Result<R> {
        match self.0 {
            Thread::Real(thread) => thread.join(),
            Thread::Simulated(child) => child.join(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::Monitor;

    #[test]
    fn threads_that_are_not_joined_end_before_the_scope_does() {
        let ended = AtomicU32::new(0);
        let go = Monitor::new(false);
        scope(|scope| {
            for number in 0..3 {
                let (ended, go) = (&ended, &go);
                scope.spawn(format!("thread {number}"), move || {
                    let mut guard = go.lock();
                    while !*guard {
                        (guard, _) = go.wait(guard, None);
                    }
                    ended.fetch_add(1, Ordering::Relaxed);
                });
            }
            *go.lock() = true;
            go.notify_all();
        });
        assert_eq!(ended.into_inner(), 3);
    }

    #[test]
    fn a_thread_can_start_another_one() {
        let answer = scope(|scope| {
            let outer = scope.spawn("outer", move || scope.spawn("inner", || 42).join());
            outer.join().unwrap().unwrap()
        });
        assert_eq!(answer, 42);
    }

    #[test]
    fn join_returns_a_thread_s_panic_and_scope_resumes_the_closure_s() {
        let payload = scope(|scope| {
            let thread = scope.spawn("panics", || resume_unwind(Box::new(5u32)));
            let payload = thread.join().map(|(): ()| ()).unwrap_err();
            payload.downcast_ref::<u32>().copied()
        });
        assert_eq!(payload, Some(5));
        let ended = AtomicU32::new(0);
        let out = catch_unwind(AssertUnwindSafe(|| {
            scope(|scope| {
                scope.spawn("ends first", || ended.fetch_add(1, Ordering::Relaxed));
                resume_unwind(Box::new(6u32));
            })
        }));
        assert_eq!(out.unwrap_err().downcast_ref::<u32>(), Some(&6));
        assert_eq!(ended.into_inner(), 1);
    }

    /// A stack that no address space has room for: the system refuses the thread.
    const STACK_BYTES_REFUSED: usize = 1 << 50;

    #[test]
    fn try_spawn_starts_a_thread() {
        let answer = scope(|scope| scope.try_spawn("adds", || 40 + 2).unwrap().join().unwrap());
        assert_eq!(answer, 42);
    }

    #[test]
    fn try_spawn_accepts_a_name_with_a_nul() {
        scope(|scope| assert!(scope.try_spawn("a\0b", || {}).is_ok()));
    }

    #[test]
    fn a_thread_that_the_system_refuses_is_an_error() {
        scope(|scope| {
            let refused =
                scope.start(Builder::new().stack_size(STACK_BYTES_REFUSED), "refused".into(), || {});
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::WouldBlock);
            scope.try_spawn("next", || {}).unwrap().join().unwrap();
        });
    }

    #[cfg(feature = "simulation")]
    #[test]
    fn a_thread_that_the_system_refuses_leaves_no_trace_in_the_simulator() {
        /// Locks a monitor when `start` drops it, so the simulator may run other tasks at that point.
        struct LocksWhenDropped<'a>(&'a Monitor<u32>);
        impl Drop for LocksWhenDropped<'_> {
            fn drop(&mut self) {
                *self.0.lock() += 1;
            }
        }
        let play = |seed| {
            let run = crate::Simulation::new(seed).trace(true).run(|| {
                let drops = Monitor::new(0);
                let sum = scope(|scope| {
                    let before = scope.spawn("before", || {
                        drop(drops.lock());
                        1
                    });
                    let captured = LocksWhenDropped(&drops);
                    let builder = Builder::new().stack_size(STACK_BYTES_REFUSED);
                    let refused = scope.start(builder, "refused".into(), move || drop(captured));
                    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::WouldBlock);
                    let after = scope.try_spawn("after", || 2).unwrap();
                    before.join().unwrap() + after.join().unwrap()
                });
                (sum, drops.into_inner())
            });
            let run = run.unwrap();
            assert_eq!(run.value, (3, 1));
            (run.trace, run.digest)
        };
        for seed in 0..50 {
            assert_eq!(play(seed), play(seed));
        }
    }
}
