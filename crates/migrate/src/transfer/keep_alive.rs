//! [`KeepAlive`]: the thread that sends keep-alives over every link, and that fails a move whose guest has stood still for
//! too long, whatever the other threads wait for.

use std::time::{Duration, Instant};

use limosa_clockwork::{Monitor, now};

use super::team::Team;
use crate::error::Remaining;
use crate::wire::FrameWriter;
use crate::{Error, Result};

/// The state of the thread. The thread outlives the team's work: it also serves the commit and the rollback.
#[derive(Default)]
pub(crate) struct KeepAlive {
    state: Monitor<State>,
}

#[derive(Default)]
struct State {
    /// The time from which the guest has stood still for too long, and the limit.
    standstill: Option<(Instant, Duration)>,
    over: bool,
}

impl KeepAlive {
    /// The guest stands still from now on, for at most this long.
    pub(crate) fn stands_still(&self, limit: Duration) {
        self.state.lock().standstill = now().checked_add(limit).map(|until| (until, limit));
        self.state.notify_all();
    }

    /// The limit has no effect any more: COMMIT is sent next, or the guest runs again.
    pub(crate) fn stands_still_no_more(&self) {
        self.state.lock().standstill = None;
    }

    /// Before COMMIT: fails if the guest has stood still for too long.
    pub(crate) fn check(&self) -> Result<()> {
        match self.state.lock().standstill {
            // The destination has loaded everything then.
            Some((until, limit)) if until <= now() => Err(Error::StoodStill { limit, left: None }),
            _ => Ok(()),
        }
    }

    /// Ends the thread.
    pub(crate) fn end(&self) {
        self.state.lock().over = true;
        self.state.notify_all();
    }

    /// The body of the thread. A link that fails is a failure of the team, since no other thread may be using the link.
    /// `left` says where most is left when the guest has stood still for too long.
    pub(crate) fn run<'a>(
        &self,
        team: &Team,
        writers: &[&FrameWriter<'a>],
        interval: Duration,
        left: impl Fn() -> Option<Remaining>,
    ) {
        let mut state = self.state.lock();
        while !state.over {
            let next = now() + interval;
            let until = state.standstill.map_or(next, |(until, _)| until.min(next));
            (state, _) = self.state.wait(state, Some(until));
            let late = now().saturating_duration_since(until);
            if let Some((until, limit)) = state.standstill
                && until <= now()
            {
                state.standstill = None;
                drop(state);
                team.fail(Error::StoodStill { limit, left: left() });
                state = self.state.lock();
            }
            if state.over || next > now() {
                continue;
            }
            // A peer that has given this side up may have said why. A frame that it refuses now could discard that.
            if writers.iter().any(|writer| writer.was_late(late)) {
                continue;
            }
            drop(state);
            for writer in writers.iter().filter(|writer| writer.has_peer()) {
                if let Err(error) = writer.keep_alive(interval) {
                    team.fail(error);
                }
            }
            state = self.state.lock();
        }
    }
}
