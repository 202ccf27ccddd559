//! What can go wrong in a move, split by whose fault it is: this side's devices, memory or VMM, the
//! other side, what lies between, or nobody's.

use std::time::Duration;

use limosa_clockwork::Panic;
use limosa_protocol::State;
use limosa_stream::{AbortCode, Damage};

use crate::link::LinkError;
use crate::protocol::Obstacle;

/// The result of the engine's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a move did not happen, or a file is not what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device of this side failed or refused.
    #[error("{device}: {doing}: {error}")]
    Device {
        /// The device.
        device: String,
        /// What was being done.
        doing: String,
        /// What it answered.
        #[source]
        error: limosa_client::Error,
    },
    /// A device of this side did something that the standard does not allow.
    #[error("{device}: {how}")]
    DeviceMisbehaved {
        /// The device.
        device: String,
        /// What it did.
        how: Misbehaviour,
    },
    /// A device of this side was reset, or driven by somebody else, while it was being moved: what was saved or loaded
    /// of it is no longer its state.
    #[error("{device}: it was reset or driven by somebody else while it was being moved: {found}")]
    DeviceChanged {
        /// The device.
        device: String,
        /// How that shows.
        found: Changed,
    },
    /// Guest memory of this side could not be read or written.
    #[error("guest memory at {address:#x}: {error}")]
    Memory {
        /// Where.
        address: u64,
        /// The system's answer.
        #[source]
        error: std::io::Error,
    },
    /// The VMM of this side refused.
    #[error("the VMM refused to {doing}: {reason}")]
    Vmm {
        /// What it was asked.
        doing: &'static str,
        /// Why.
        reason: String,
    },
    /// The devices or the memory of the two sides do not match. Nothing was moved.
    #[error("cannot be moved: {}", .reasons.join("; "))]
    Incompatible {
        /// Why not: each names a device or memory region, what was found and what was expected.
        reasons: Vec<String>,
    },
    /// The other side called the move off.
    #[error("{peer} called the move off: {reason}")]
    Aborted {
        /// The other side.
        peer: String,
        /// What kind of reason it gave.
        code: AbortCode,
        /// Its words.
        reason: String,
    },
    /// The other side sent what it must not, or it was altered on the way; or a file is damaged.
    #[error("{from}: {damage}")]
    Stream {
        /// The other side, or the file.
        from: String,
        /// What is wrong.
        #[source]
        damage: Damage,
    },
    /// The link failed.
    #[error("the link to {peer} failed while {doing}: {error}")]
    Link {
        /// The other side.
        peer: String,
        /// What was being done.
        doing: &'static str,
        /// What was seen.
        #[source]
        error: LinkError,
    },
    /// A stop within the downtime goal cannot be had, and nothing else is wanted
    /// ([`WhenStalled::Abort`](crate::WhenStalled::Abort)).
    #[error(
        "it does not converge: a stop would take {}{predicted:?}, wanted are {goal:?}: {obstacle}",
        if *is_minimum { "at least " } else { "" }
    )]
    NotConverging {
        /// What is in the way.
        obstacle: Obstacle,
        /// How long nothing would run.
        predicted: Duration,
        /// Whether that is only what is known of it.
        is_minimum: bool,
        /// How long nothing is to run.
        goal: Duration,
    },
    /// The guest stood still for as long as it may, and the destination was not ready.
    #[error(
        "the guest has stood still for {limit:?}, the limit for that, and the destination has not loaded everything"
    )]
    StoodStill {
        /// The limit ([`Options::standstill_max`](crate::Options::standstill_max)).
        limit: Duration,
    },
    /// Code that the engine called panicked, or the engine did.
    #[error("{place} panicked: {message}")]
    Panicked {
        /// Which call or thread.
        place: String,
        /// The panic's message.
        message: String,
    },
    /// A move in doubt was to be settled with another machine than the one that it is about.
    #[error("it is another machine than the one that was moved: {0}")]
    AnotherMachine(Difference),
    /// The other side let a time limit pass.
    #[error("{peer}: nothing came within {limit:?} while {doing}")]
    TimedOut {
        /// The other side.
        peer: String,
        /// What was being done.
        doing: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// Somebody called the move off on this side.
    #[error("cancelled")]
    Cancelled,
    /// This side was started anew and knows no more than the move's id.
    #[error("started anew after the commit, with only the move's id known")]
    StartedAnew,
    /// A system call on this side failed.
    #[error("{doing}: {error}")]
    Os {
        /// What was being done.
        doing: &'static str,
        /// The system's answer.
        #[source]
        error: std::io::Error,
    },
    /// The place of a snapshot, a file or another, could not be read or written.
    #[error("{name}: {doing}: {error}")]
    Snapshot {
        /// The place.
        name: String,
        /// What was being done.
        doing: &'static str,
        /// What the system or the store answered.
        #[source]
        error: std::io::Error,
    },
    /// A snapshot may have been published, or may still be: the answer was lost. [`published`](crate::published) finds
    /// out.
    #[error(
        "{name}: it is not known whether the snapshot was published: {error}; look with `limosa verify {name}`"
    )]
    PublicationUnknown {
        /// The place.
        name: String,
        /// What was reported instead of an answer.
        #[source]
        error: std::io::Error,
    },
}

/// What a device did that the standard does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misbehaviour {
    /// A session opened and there was no data stream.
    #[error("it entered {0} and gave no data stream")]
    NoDataStream(State),
    /// A read gave nothing, or more than there was room for.
    #[error("a read of up to {room} bytes gave {bytes}")]
    WrongLength {
        /// The room.
        room: usize,
        /// What the device said.
        bytes: usize,
    },
    /// Its data never ends.
    #[error("its data has no end within {0} bytes")]
    Endless(u64),
    /// In STOP_COPY a device has data, or is at its end.
    #[error("in STOP_COPY it said \"nothing for now\" instead of data or the end")]
    NothingInStopCopy,
}

/// How it shows that a device was changed behind the engine's back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Changed {
    /// It is in another state than the engine has driven it to.
    #[error("it is in {found}, the engine has driven it to {expected}")]
    State {
        /// Where the engine has driven it.
        expected: State,
        /// Where it is.
        found: State,
    },
    /// A second saving session opened while the first was open.
    #[error("entering {0} opened a second session while the first was open")]
    SecondSession(State),
    /// It counts more resets than before.
    #[error("it has been reset {0} times meanwhile")]
    Reset(u64),
}

/// How two machines differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Difference {
    /// They have other devices.
    #[error("its devices are [{}], those that were moved are [{}]", .found.join(", "), .expected.join(", "))]
    Devices {
        /// The names of those that were moved.
        expected: Vec<String>,
        /// The names of those that are here.
        found: Vec<String>,
    },
    /// They have other memory.
    #[error("its regions of memory are of {found:?} bytes, those that were moved are of {expected:?}")]
    Memory {
        /// Bytes of the regions that were moved.
        expected: Vec<u64>,
        /// Bytes of the regions that are here.
        found: Vec<u64>,
    },
}

impl Error {
    pub(crate) fn panicked(place: &str, panic: &Panic) -> Error {
        Error::Panicked { place: place.into(), message: panic.message.clone() }
    }

    /// The same error once more, for another caller: what the system answered is kept in words.
    pub(crate) fn again(&self) -> Error {
        let io = |error: &std::io::Error| match error.raw_os_error() {
            Some(errno) => std::io::Error::from_raw_os_error(errno),
            None => std::io::Error::new(error.kind(), error.to_string()),
        };
        match self {
            Error::Link { peer, doing, error } => {
                let error = match error {
                    LinkError::TimedOut => LinkError::TimedOut,
                    LinkError::Cancelled => LinkError::Cancelled,
                    LinkError::Closed => LinkError::Closed,
                    LinkError::Io(error) => LinkError::Io(io(error)),
                    error => LinkError::Io(std::io::Error::other(error.to_string())),
                };
                Error::Link { peer: peer.clone(), doing, error }
            }
            Error::TimedOut { peer, doing, limit } => {
                Error::TimedOut { peer: peer.clone(), doing, limit: *limit }
            }
            Error::Os { doing, error } => Error::Os { doing, error: io(error) },
            Error::Panicked { place, message } => {
                Error::Panicked { place: place.clone(), message: message.clone() }
            }
            _ => Error::Cancelled,
        }
    }

    /// What the other side is told.
    pub(crate) fn abort_code(&self) -> AbortCode {
        match self {
            Error::Device { .. } | Error::DeviceMisbehaved { .. } | Error::DeviceChanged { .. } => {
                AbortCode::Device
            }
            Error::Memory { .. } => AbortCode::Memory,
            Error::Vmm { .. } => AbortCode::Vmm,
            Error::Incompatible { .. } => AbortCode::Incompatible,
            Error::Aborted { code, .. } => *code,
            Error::Stream { .. } => AbortCode::Stream,
            Error::TimedOut { .. } | Error::NotConverging { .. } | Error::StoodStill { .. } => {
                AbortCode::TimeLimit
            }
            Error::Cancelled => AbortCode::Cancelled,
            Error::Link { .. }
            | Error::Snapshot { .. }
            | Error::PublicationUnknown { .. }
            | Error::Os { .. }
            | Error::Panicked { .. }
            | Error::AnotherMachine(_)
            | Error::StartedAnew => AbortCode::Other,
        }
    }

    /// Whether the other side knows that the move is off.
    pub(crate) fn peer_needs_no_word(&self) -> bool {
        matches!(self, Error::Aborted { .. })
    }
}
