//! [`Foreign`]: a value that is dropped in the background.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::closer;

/// A value whose drop may block because it closes a file that a peer chose: an fd from a peer, a mapping of its
/// file, or a socket with unreceived fds in its queue. It is dropped on a thread of the closer.
pub struct Foreign<T: Send + 'static> {
    value: Option<T>,
    is_harmless: bool,
}

/// An fd that came from another process.
pub type ForeignFd = Foreign<OwnedFd>;

impl<T: Send + 'static> Foreign<T> {
    /// Drops this value on a thread of the closer, when its time comes.
    pub fn new(value: T) -> Foreign<T> {
        Foreign { value: Some(value), is_harmless: false }
    }

    /// A value of this process, for a place that takes a [`Foreign`]: it is dropped at once, on the current thread.
    pub fn harmless(value: T) -> Foreign<T> {
        Foreign { value: Some(value), is_harmless: true }
    }

    /// The value itself: its drop may then block the thread that drops it.
    pub fn into_inner(mut self) -> T {
        self.value.take().expect(HERE)
    }
}

const HERE: &str = "there until it is dropped";

impl<T: Send + 'static> Drop for Foreign<T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take_if(|_| !self.is_harmless) {
            closer::drop_elsewhere(Box::new(value));
        }
    }
}

impl<T: Send + 'static> Deref for Foreign<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect(HERE)
    }
}

impl<T: Send + 'static> DerefMut for Foreign<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect(HERE)
    }
}

impl<T: AsFd + Send + 'static> AsFd for Foreign<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (**self).as_fd()
    }
}

impl<T: Send + 'static> From<T> for Foreign<T> {
    fn from(value: T) -> Foreign<T> {
        Foreign::new(value)
    }
}

impl<T: fmt::Debug + Send + 'static> fmt::Debug for Foreign<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Foreign").field(&**self).finish()
    }
}
