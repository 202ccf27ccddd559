//! [`DeviceFlow`]: the state that the worker of a device shares with the other threads of a source, and its [`Job`]s.

use std::collections::VecDeque;
use std::time::Instant;

use limosa_protocol::State;

use crate::Error;
use crate::protocol::credit::SendWindow;
use crate::report::Unrecovered;

/// A job of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// No-op, used to time a hand-off to another thread.
    NoOp,
    /// Ask how much it has to give.
    Look,
    /// Enter a state; a session that this opens is kept.
    Enter(State),
    /// End the session before it has given data, and open another: two arcs, used to time them.
    Reopen,
    /// Give data before the stop, as long as [`DeviceFlow::streaming`] is set.
    Stream,
    /// Enter STOP_COPY. [`Job::Drain`] is the next job.
    Stop,
    /// Give all remaining data.
    Drain,
    /// Enter STOP: the guest runs elsewhere.
    Finish,
    /// Rollback: return to RUNNING_P2P.
    ReturnP2p,
    /// Rollback: return to the state in which it was found.
    Return,
}

/// The state that the worker of a device shares with the other threads.
pub(crate) struct DeviceFlow {
    pub(crate) window: SendWindow,
    /// How many bytes of initial data are left, as the device said last.
    pub(crate) initial: u64,
    /// The position up to which the destination has to load the stream before all initial data is loaded.
    pub(crate) initial_end: u64,
    /// How many bytes are left in pre-copy; `None` if the device does not say.
    pub(crate) left: Option<u64>,
    /// How many bytes it would give in the stop; `None` if that is not known.
    pub(crate) stop_bytes: Option<u64>,
    /// The position in its stream at which it said so.
    pub(super) looked_at: u64,
    /// Whether it was asked how much it has to give.
    pub(crate) looked: bool,
    /// Whether it had nothing for now when it was read last.
    pub(crate) drained: bool,
    /// When it first had nothing for now, since this was last cleared.
    pub(crate) idle_since: Option<Instant>,
    /// Whether it has a session.
    pub(crate) has_session: bool,
    /// Whether it is to give data before the stop.
    pub(crate) streaming: bool,
    /// Whether it has given everything.
    pub(super) ended: bool,
    /// The loss in the rollback.
    pub(crate) loss: Option<Unrecovered>,
    /// Why it did not enter STOP after the move.
    pub(crate) unfinished: Option<Error>,
    pub(super) jobs: VecDeque<Job>,
}

impl DeviceFlow {
    pub(crate) fn new(window: SendWindow) -> DeviceFlow {
        DeviceFlow {
            window,
            initial: 0,
            initial_end: 0,
            left: None,
            stop_bytes: None,
            looked_at: 0,
            looked: false,
            drained: false,
            idle_since: None,
            has_session: false,
            streaming: false,
            ended: false,
            loss: None,
            unfinished: None,
            jobs: VecDeque::new(),
        }
    }

    /// How many bytes it has still to give, as far as that is known, and has given that are not known to be loaded.
    pub(crate) fn remaining(&self) -> u64 {
        let given = self.window.sent().saturating_sub(self.looked_at);
        let left = if self.ended { 0 } else { self.stop_bytes.unwrap_or(0).saturating_sub(given) };
        left.saturating_add(self.window.on_the_way())
    }

    /// Whether the destination has loaded the initial data that was read so far.
    pub(crate) fn initial_is_loaded(&self) -> bool {
        self.window.taken() >= self.initial_end
    }
}
