//! The rollback of a destination: the source is told why, and everything that was loaded is discarded.

use limosa_protocol::State;

use super::device_queue::Command;
use super::receive::Receiving;
use super::{Destination, Ending};
use crate::report::{Loss, Phase, Unrecovered};
use crate::{Error, Result};

impl<'a> Destination<'a> {
    /// Tells the source why the move has ended, so that its guest need not wait, and then resets every device that was
    /// touched.
    pub(super) fn discard(&self, receiving: &Receiving<'_, 'a>, why: Error) -> Ending {
        let connection = receiving.connection;
        connection.abort(&why);
        let opened = receiving.opened();
        if opened.iter().any(|opened| *opened) {
            receiving.recorder().phase(Phase::Undo);
            let done = receiving.command(|at| opened[at].then_some(Command::Discard));
            for (moved, done) in self.devices.iter().zip(done) {
                if let Some(unrecovered) = loss(moved.device.name(), done) {
                    receiving.recorder().unrecovered(unrecovered);
                }
            }
        }
        Ending::Discarded(why)
    }
}

fn loss(device: &str, done: Result<()>) -> Option<Unrecovered> {
    let error = done.err()?;
    let loss = match &error {
        Error::Device { doing, .. } if doing.starts_with("it stays in") => {
            Loss::StaysIn { found: State::Running, wanted: State::Stop }
        }
        _ => Loss::NotReset,
    };
    let why = match error {
        Error::Device { error, .. } => error.to_string(),
        error => error.to_string(),
    };
    Some(Unrecovered { device: device.into(), loss, why })
}
