//! [`Shared`]: the state that an acceptor and its threads share.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use limosa_stream::{LINKS_MAX, MigrationId};
use rustix::event::{EventfdFlags, eventfd};

use super::PENDING_MAX;
use super::heard::HeardLink;
use super::passed_over::PassedOver;
use crate::Options;
use crate::error::NoMove;
use crate::ledger::{Decision, Ledger};
use crate::link::{Link, SocketLink};
use crate::lock::lock;

/// The most answers that are kept for [`Acceptor::accept`](super::Acceptor::accept). The oldest ones are dropped.
const ANSWERED_MAX: usize = 64;

/// An eventfd.
#[derive(Debug)]
pub(super) struct Event(OwnedFd);

impl Event {
    fn new() -> std::io::Result<Event> {
        Ok(Event(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(super) fn wake(&self) {
        // Refused only when the counter is at its maximum, where the eventfd is readable as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(super) fn clear(&self) {
        // Refused when it is clear.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The state that an acceptor and its threads share.
pub(super) struct Shared {
    pub(super) ledger: Arc<Ledger>,
    pub(super) silence_max: Duration,
    /// Whether questions about moves without a secret are answered.
    pub(super) believes: bool,
    state: Mutex<State>,
    /// There is an offer or an answer.
    pub(super) news: Event,
    /// A further link has joined.
    pub(super) joined: Event,
    /// The thread that accepts has to look.
    pub(super) control: Event,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("silence_max", &self.silence_max).finish_non_exhaustive()
    }
}

pub(super) struct State {
    pub(super) slot: Slot,
    /// Whether a further move may come after one that has committed.
    takes_further: bool,
    pub(super) answered: VecDeque<(MigrationId, Decision)>,
    /// Connections whose kind is not known yet, and those that are being refused, oldest first.
    pub(super) pending: VecDeque<Pending>,
    next_number: u64,
    pub(super) passed_over: PassedOver,
    pub(super) is_over: bool,
}

/// The place for one move.
pub(super) enum Slot {
    Free,
    /// A move was offered, and no receiver has taken it yet.
    Waiting {
        link: HeardLink,
        id: MigrationId,
    },
    /// A move is under way.
    Taken {
        id: MigrationId,
        further: Vec<HeardLink>,
        /// The move that was offered after this one had committed.
        next: Option<(HeardLink, MigrationId)>,
    },
    /// No move is taken any more.
    Closed(NoMove),
}

impl Slot {
    /// Takes the move that was offered, if there is one. From then on it is under way.
    pub(super) fn take_offer(&mut self) -> Option<(HeardLink, MigrationId)> {
        let Slot::Waiting { id, .. } = *self else { return None };
        match std::mem::replace(self, Slot::Taken { id, further: Vec::new(), next: None }) {
            Slot::Waiting { link, id } => Some((link, id)),
            _ => None,
        }
    }
}

pub(super) struct Pending {
    number: u64,
    link: Arc<SocketLink>,
    since: Instant,
}

impl Shared {
    pub(super) fn new(ledger: Arc<Ledger>, options: &Options, slot: Slot) -> std::io::Result<Shared> {
        let state = State {
            slot,
            takes_further: false,
            answered: VecDeque::new(),
            pending: VecDeque::new(),
            next_number: 0,
            passed_over: PassedOver::new(),
            is_over: false,
        };
        let (news, joined, control) = (Event::new()?, Event::new()?, Event::new()?);
        let (silence_max, believes) = (options.silence_max, options.unauthenticated_peers);
        Ok(Shared { ledger, silence_max, believes, state: Mutex::new(state), news, joined, control })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A new connection. Closes another one if there are too many. Returns its number.
    pub(super) fn begin(&self, link: &Arc<SocketLink>, since: Instant) -> u64 {
        let mut state = self.state();
        let closed = match state.pending.len() >= PENDING_MAX {
            true => {
                let at = state.least_wanted();
                state.pending.remove(at)
            }
            false => None,
        };
        let number = state.next_number;
        state.next_number += 1;
        state.pending.push_back(Pending { number, link: Arc::clone(link), since });
        drop(state);
        if let Some(closed) = closed {
            closed.link.cut();
            let waited = closed.since.elapsed();
            let why = format!("closed after {waited:?}: more clients connected than are heard at once");
            self.passed_over(closed.link.peer(), &why);
        }
        number
    }

    /// Forgets a connection. Returns whether it was still there: it may have been closed to make room for another.
    pub(super) fn forget(&self, number: u64) -> bool {
        forget(&mut self.state().pending, number)
    }

    /// A connection has offered a move. If none is taken now, the link is given back with the reason.
    pub(super) fn offer(
        &self,
        number: u64,
        link: HeardLink,
        id: MigrationId,
    ) -> Result<(), (HeardLink, NoMove)> {
        let mut state = self.state();
        match state.slot {
            Slot::Free => {}
            // Its source knows that it has ended, and the next sender may have waited for that.
            Slot::Taken { id: before, next: None, .. }
                if state.takes_further && self.ledger.has_committed(before) => {}
            Slot::Waiting { .. } | Slot::Taken { .. } => return Err((link, NoMove::Busy)),
            Slot::Closed(why) => return Err((link, why)),
        }
        // Otherwise it was closed to make room for another one.
        if forget(&mut state.pending, number) {
            link.replay();
            match &mut state.slot {
                Slot::Taken { next, .. } => *next = Some((link, id)),
                slot => *slot = Slot::Waiting { link, id },
            }
            drop(state);
            self.news.wake();
        }
        Ok(())
    }

    /// A connection is a further link of a move. If that move is not under way, the link is given back.
    pub(super) fn join(&self, number: u64, link: HeardLink, id: MigrationId) -> Result<(), HeardLink> {
        let mut state = self.state();
        let State { slot, pending, .. } = &mut *state;
        match slot {
            Slot::Taken { id: under_way, further, .. }
                if *under_way == id && further.len() < LINKS_MAX as usize =>
            {
                // Otherwise it was closed to make room for another one.
                if forget(pending, number) {
                    link.replay();
                    further.push(link);
                }
            }
            _ => return Err(link),
        }
        drop(state);
        self.joined.wake();
        Ok(())
    }

    /// A source in doubt was answered. Anybody can ask about a move that is not known, so that such a question counts as one
    /// of a client that is passed over.
    pub(super) fn answered(&self, peer: &str, id: MigrationId, decision: Decision) {
        let mut state = self.state();
        let others = match decision {
            Decision::Unknown => match state.passed_over.one_more(Instant::now()) {
                Some(others) => others,
                None => return drop((state, self.control.wake())),
            },
            Decision::NotCommitted | Decision::Committed => 0,
        };
        if state.answered.len() >= ANSWERED_MAX {
            state.answered.pop_front();
        }
        state.answered.push_back((id, decision));
        drop(state);
        tracing::debug!(peer, %id, ?decision, "answered a source in doubt");
        log_others(others);
        self.news.wake();
    }

    /// A client was passed over, or a connection failed.
    pub(super) fn passed_over(&self, peer: &str, why: &dyn fmt::Display) {
        let line = self.state().passed_over.one_more(Instant::now());
        let Some(others) = line else { return self.control.wake() };
        let why = why.to_string();
        // Most messages name the other side themselves.
        let peer = if why.contains(peer) { String::new() } else { format!("{peer}: ") };
        tracing::warn!("{peer}{why}; passed over");
        log_others(others);
    }

    /// Closes the place for moves.
    pub(super) fn close(&self, why: NoMove) {
        let mut state = self.state();
        let before = match state.slot {
            Slot::Closed(_) => return,
            _ => std::mem::replace(&mut state.slot, Slot::Closed(why)),
        };
        drop(state);
        // Links are closed outside the lock.
        drop(before);
    }

    /// The move under way has ended.
    pub(super) fn ended(&self, was_committed: bool) {
        let mut state = self.state();
        if was_committed && !state.takes_further {
            drop(state);
            return self.close(NoMove::Committed);
        }
        let Slot::Taken { next, .. } = &mut state.slot else { return };
        let after = next.take().map_or(Slot::Free, |(link, id)| Slot::Waiting { link, id });
        let before = std::mem::replace(&mut state.slot, after);
        drop(state);
        self.news.wake();
        drop(before);
    }

    /// From now on another move may come after one that has committed.
    pub(super) fn take_further(&self) {
        let mut state = self.state();
        state.takes_further = true;
        if matches!(state.slot, Slot::Closed(NoMove::Committed)) {
            state.slot = Slot::Free;
        }
    }

    /// The acceptor ends.
    pub(super) fn end(&self) {
        let mut state = self.state();
        state.is_over = true;
        state.pending.drain(..).for_each(|pending| pending.link.cut());
        drop(state);
        self.control.wake();
        self.close(NoMove::Answers);
    }
}

fn forget(pending: &mut VecDeque<Pending>, number: u64) -> bool {
    let at = pending.iter().position(|pending| pending.number == number);
    at.and_then(|at| pending.remove(at)).is_some()
}

impl State {
    /// The connection that is closed when there are too many: the oldest one of the host that has most of them, so that a host
    /// that connects all the time does not push others out.
    fn least_wanted(&self) -> usize {
        let of_host = |at: usize| {
            let host = self.pending[at].host();
            self.pending.iter().filter(|pending| pending.host() == host).count()
        };
        // The first of several is the oldest.
        (0..self.pending.len()).rev().max_by_key(|at| of_host(*at)).unwrap_or(0)
    }
}

impl Pending {
    /// The client's address without its port.
    fn host(&self) -> &str {
        let peer = self.link.peer();
        peer.rsplit_once(':').map_or(peer, |(host, _)| host)
    }
}

/// A line for clients that were passed over without one.
pub(super) fn log_others(others: u64) {
    match others {
        0 => {}
        1 => tracing::warn!("one more client was passed over"),
        others => tracing::warn!("{others} more clients were passed over"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(shared: &Shared, id: MigrationId) -> Result<(), NoMove> {
        let (near, _) = SocketLink::pair().unwrap();
        let near = Arc::new(near);
        let number = shared.begin(&near, Instant::now());
        shared.offer(number, HeardLink::new(Box::new(near)), id).map_err(|(_, why)| why)
    }

    #[test]
    fn a_sender_was_refused_because_the_move_before_had_not_quite_ended() {
        let [first, second, third] = [1, 2, 3].map(|byte| MigrationId([byte; 16]));
        for takes_further in [false, true] {
            let ledger = Arc::new(Ledger::new());
            let shared = Shared::new(Arc::clone(&ledger), &Options::default(), Slot::Free).unwrap();
            if takes_further {
                shared.take_further();
            }
            assert_eq!(offer(&shared, first), Ok(()));
            assert!(matches!(shared.state().slot.take_offer(), Some((_, id)) if id == first));
            assert!(ledger.begin_holding(first, None).unwrap());
            assert_eq!(offer(&shared, second), Err(NoMove::Busy), "it may not commit");
            assert!(ledger.start(first).unwrap(), "an offer decides nothing");
            ledger.committed(first);
            // The source of the first move knows that, and its user may send the next one.
            assert_eq!(offer(&shared, second).is_ok(), takes_further);
            assert_eq!(offer(&shared, third), Err(NoMove::Busy));
            shared.ended(true);
            let next = shared.state().slot.take_offer().map(|(_, id)| id);
            assert_eq!(next, takes_further.then_some(second));
            let after = if takes_further { NoMove::Busy } else { NoMove::Committed };
            assert_eq!(offer(&shared, third), Err(after));
        }
    }
}
