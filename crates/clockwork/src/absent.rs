//! The simulator's interface when the feature `simulation` is off: types without values, so that the compiler removes
//! every branch that would use them.

use std::any::Any;
use std::convert::Infallible;
use std::io;
use std::thread::{Builder, Result};
use std::time::{Duration, Instant};

pub(crate) struct Task(Infallible);

#[derive(Clone, Copy, Debug)]
pub(crate) struct ScopeId(Infallible);

#[derive(Debug)]
pub(crate) struct Child<R>(Infallible, std::marker::PhantomData<R>);

pub(crate) const fn current() -> Option<Task> {
    None
}

pub(crate) fn is_crash(_: &(dyn Any + Send)) -> bool {
    false
}

impl Task {
    pub(crate) fn now(&self) -> Instant {
        match self.0 {}
    }

    pub(crate) fn sleep(&self, _: Duration) {
        match self.0 {}
    }

    pub(crate) fn random_bytes(&self) -> [u8; 16] {
        match self.0 {}
    }

    pub(crate) fn catches_panics(&self) -> bool {
        match self.0 {}
    }

    pub(crate) fn end_if_crashed(&self) {
        match self.0 {}
    }

    pub(crate) fn wake_all(&self) {
        match self.0 {}
    }

    pub(crate) fn wake_polls(&self) {
        match self.0 {}
    }

    pub(crate) fn lock<G>(&self, _: usize, _: impl FnMut() -> Option<G>) -> G {
        match self.0 {}
    }

    pub(crate) fn unlocked(&self, _: usize) {
        match self.0 {}
    }

    pub(crate) fn wait(&self, _: usize, _: Option<Instant>, _: bool) -> bool {
        match self.0 {}
    }

    pub(crate) fn notify(&self, _: usize) {
        match self.0 {}
    }

    pub(crate) fn scope_begins(&self) -> ScopeId {
        match self.0 {}
    }

    pub(crate) fn scope_ends(&self, _: ScopeId) {
        match self.0 {}
    }
}

impl ScopeId {
    pub(crate) fn check_thread_limit(self, _: &str) -> io::Result<()> {
        match self.0 {}
    }

    pub(crate) fn spawn<'scope, R: Send + 'scope>(
        self,
        _: &'scope std::thread::Scope<'scope, '_>,
        _: Builder,
        _: String,
        _: impl FnOnce() -> R + Send + 'scope,
    ) -> io::Result<Child<R>> {
        match self.0 {}
    }
}

impl<R> Child<R> {
    pub(crate) fn join(self) -> Result<R> {
        match self.0 {}
    }
}
