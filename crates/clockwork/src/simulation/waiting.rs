//! [`Waiting`]: the wait of a task of a simulation, and the reason for its end.

use std::time::Duration;

/// What a task waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// Nothing: the simulator may choose the task.
    Ready,
    /// The lock of a monitor.
    Unlocked(usize),
    /// A notification of a monitor, until a time.
    Notified(usize, Option<Duration>),
    /// As [`Waiting::Notified`]. [`wake_polls`](crate::wake_polls) ends it as well.
    Polls(usize, Option<Duration>),
    Until(Duration),
    End(usize),
    /// The end of all tasks of a scope. Nothing cuts this wait short: the tasks borrow from the task that waits.
    ScopeEnd(usize),
    /// A number of calls by a process.
    Points(usize, u64),
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    Happened,
    /// The time of the wait came. For [`Waiting::Points`]: the process cannot reach the number.
    TimedOut,
}

impl Waiting {
    pub(super) fn deadline(self) -> Option<Duration> {
        match self {
            Waiting::Notified(_, until) | Waiting::Polls(_, until) => until,
            Waiting::Until(until) => Some(until),
            _ => None,
        }
    }

    /// Whether this is a wait of a condition variable or a poll.
    pub(crate) fn is_for_notification(self) -> bool {
        matches!(self, Waiting::Notified(..) | Waiting::Polls(..))
    }

    /// Whether a notification of this monitor ends the wait.
    pub(crate) fn is_on(self, monitor: usize) -> bool {
        matches!(self, Waiting::Notified(at, _) | Waiting::Polls(at, _) if at == monitor)
    }
}
