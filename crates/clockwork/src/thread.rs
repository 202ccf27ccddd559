//! [`scope`]: threads that end before the function that starts them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread::{Builder, ScopedJoinHandle};

use crate::hook;

/// Where threads are started that may borrow from what is outside of the scope.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'scope, 'env: 'scope> {
    pub(crate) threads: &'scope std::thread::Scope<'scope, 'env>,
    pub(crate) simulated: Option<hook::ScopeId>,
}

/// A thread of a [`scope`].
#[derive(Debug)]
pub struct Handle<'scope, R>(pub(crate) Thread<'scope, R>);

#[derive(Debug)]
pub(crate) enum Thread<'scope, R> {
    Real(ScopedJoinHandle<'scope, R>),
    Simulated(hook::Child<R>),
}

/// Runs `f`, which may start threads that borrow; returns when all of them have ended, also when `f` panics.
///
/// # Panics
///
/// When `f` does, with its panic, or when a thread did that was not joined.
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
        // The standard library would wait for the threads where no other one can go on.
        let returned = catch_unwind(AssertUnwindSafe(|| f(Scope { threads, simulated: Some(id) })));
        task.scope_ends(id);
        returned.unwrap_or_else(|panic| resume_unwind(panic))
    })
}

impl<'scope, 'env> Scope<'scope, 'env> {
    /// Starts a thread of this name, which is for people: debuggers and panics show it.
    ///
    /// # Panics
    ///
    /// When the system starts no further thread.
    #[track_caller]
    pub fn spawn<F, R>(self, name: impl Into<String>, f: F) -> Handle<'scope, R>
    where
        F: FnOnce() -> R + Send + 'scope,
        R: Send + 'scope,
    {
        let name = name.into().replace('\0', " ");
        Handle(match self.simulated {
            Some(scope) => Thread::Simulated(scope.spawn(self.threads, name, f)),
            None => {
                let thread = Builder::new().name(name).spawn_scoped(self.threads, f);
                Thread::Real(thread.expect("the system starts a thread"))
            }
        })
    }
}

impl<R> Handle<'_, R> {
    /// Waits for the thread to end; what it returned, or its panic.
    ///
    /// # Errors
    ///
    /// The panic's payload, for [`std::panic::resume_unwind`].
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
    fn threads_that_nobody_joins_end_before_the_scope_does() {
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
    fn a_panic_of_a_thread_comes_out_of_join_and_one_of_the_closure_out_of_scope() {
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
}
