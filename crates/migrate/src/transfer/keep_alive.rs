//! The thread that tells the peer, on every link, that this side is alive; and that ends a move whose guest has stood
//! still for too long, whatever the others are waiting for.

use std::time::{Duration, Instant};

use limosa_clockwork::{Monitor, now};

use super::team::Team;
use crate::wire::FrameWriter;
use crate::{Error, Result};

/// What the thread looks at. It outlives the team's work: the commit and the way back are told of, too.
#[derive(Default)]
pub(crate) struct KeepAlive {
    state: Monitor<State>,
}

#[derive(Default)]
struct State {
    /// When the guest has stood still for too long, and the limit.
    standstill: Option<(Instant, Duration)>,
    over: bool,
}

impl KeepAlive {
    /// The guest stands still from now on, and no longer than this.
    pub(crate) fn stands_still(&self, limit: Duration) {
        self.state.lock().standstill = now().checked_add(limit).map(|until| (until, limit));
        self.state.notify_all();
    }

    /// The destination is ready, or the guest runs again.
    pub(crate) fn stands_still_no_more(&self) {
        self.state.lock().standstill = None;
    }

    /// Whether the guest has stood still for too long.
    pub(crate) fn check(&self) -> Result<()> {
        match self.state.lock().standstill {
            Some((until, limit)) if until <= now() => Err(Error::StoodStill { limit }),
            _ => Ok(()),
        }
    }

    /// The thread is to end.
    pub(crate) fn end(&self) {
        self.state.lock().over = true;
        self.state.notify_all();
    }

    /// The thread. A link that has failed fails the team: its reader may be waiting for something else.
    pub(crate) fn run<'a>(&self, team: &Team, writers: &[&FrameWriter<'a>], interval: Duration) {
        let mut state = self.state.lock();
        while !state.over {
            let next = now() + interval;
            let until = state.standstill.map_or(next, |(until, _)| until.min(next));
            (state, _) = self.state.wait(state, Some(until));
            if let Some((until, limit)) = state.standstill
                && until <= now()
            {
                state.standstill = None;
                drop(state);
                team.fail(Error::StoodStill { limit });
                state = self.state.lock();
            }
            if state.over || next > now() {
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
