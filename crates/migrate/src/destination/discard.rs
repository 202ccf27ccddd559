//! The rollback of a destination: it sends the source the reason, and discards everything that was loaded.

use limosa_protocol::State;

use super::device_queue::Command;
use super::receiving::Receiving;
use super::{Destination, Ending};
use crate::Error;
use crate::report::{Loss, Phase, Unrecovered};

impl<'a> Destination<'a> {
    /// Tells the source why the move has ended, so that its guest need not wait, and then resets every device that was
    /// touched and returns it to the state in which it was found.
    pub(super) fn discard(&self, receiving: &Receiving<'_, 'a>, why: Error) -> Ending {
        receiving.connection.abort(&why);
        let found = receiving.found();
        if found.iter().all(Option::is_none) {
            return Ending::Discarded(why);
        }
        receiving.recorder().phase(Phase::Undo);
        let reset = receiving.command(|at| found[at].map(|_| Command::Reset));
        let stops = |at: usize| reset[at].is_ok() && found[at] == Some(State::Stop);
        let stopped = receiving.command(|at| stops(at).then_some(Command::ReturnToStop));
        let stays = Loss::StaysIn { found: State::Running, wanted: State::Stop };
        for (moved, (reset, stopped)) in self.devices.iter().zip(reset.iter().zip(&stopped)) {
            let lost = |loss, error: &Error| {
                let why = match error {
                    Error::Device { error, .. } => error.to_string(),
                    error => error.to_string(),
                };
                receiving.recorder().unrecovered(Unrecovered {
                    device: moved.device.name().into(),
                    loss,
                    why,
                });
            };
            match (reset, stopped) {
                (Err(error), _) => lost(Loss::NotReset, error),
                (_, Err(error)) => lost(stays, error),
                _ => {}
            }
        }
        Ending::Discarded(why)
    }
}
