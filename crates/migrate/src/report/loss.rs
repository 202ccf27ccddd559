//! [`Unrecovered`]: devices that a failed move could not bring back to their state before it.

use std::fmt;

use limosa_protocol::State;
use serde::Serialize;

use super::timeline::state_name;

/// A device that could not be brought back to what it was before the move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Unrecovered {
    /// Its name.
    pub device: String,
    /// The kind of its loss.
    #[serde(flatten)]
    pub loss: Loss,
    /// The reason, as the device gave it.
    pub why: String,
}

/// The loss of a device that could not be brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "loss", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Loss {
    /// On the source: it was in ERROR and had to be reset. It runs, but has lost its state.
    StateLost,
    /// On the source: it was reset while it was stopped, and not by the engine. It runs, but has lost its state.
    WasReset,
    /// It stays in another state than before.
    StaysIn {
        /// The state in which it is.
        #[serde(serialize_with = "state_name")]
        found: State,
        /// The state in which it should be.
        #[serde(serialize_with = "state_name")]
        wanted: State,
    },
    /// On the destination: it could not be reset, and may still hold the source's state. It does not run.
    NotReset,
    /// It does not answer, or panicked.
    Unknown,
}

impl fmt::Display for Unrecovered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unrecovered { device, loss, why } = self;
        match loss {
            Loss::StateLost => {
                write!(f, "{device} was in ERROR and had to be reset: its state is lost ({why})")
            }
            Loss::WasReset => write!(f, "{device} was reset while it was stopped: its state is lost ({why})"),
            Loss::StaysIn { found: State::Error, .. } => {
                write!(f, "{device} is in ERROR and cannot be reset: {why}")
            }
            Loss::StaysIn { found, wanted } => {
                write!(f, "{device} stays in {found}, it should be in {wanted}: {why}")
            }
            Loss::NotReset => {
                write!(f, "{device} could not be reset and may still hold the source's state: {why}")
            }
            Loss::Unknown => write!(f, "{device}: its state is not known: {why}"),
        }
    }
}
