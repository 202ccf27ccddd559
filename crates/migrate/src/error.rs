//! The errors of a move, grouped by whose fault they are: that of this side's devices, memory or VMM, of the other side, or
//! of the link between them.

mod device;
mod mismatch;
mod mistrust;
mod obstacle;

use std::time::Duration;

use limosa_clockwork::{Panic, catch};
use limosa_stream::{AbortCode, Damage};

pub use device::{Changed, Misbehaviour};
pub use mismatch::{Difference, Mismatch, MismatchKind};
pub use mistrust::Mistrust;
pub use obstacle::{Obstacle, Remaining};

use crate::Cancel;
use crate::link::LinkError;
use mismatch::joined;
use obstacle::and_left;

/// The result of the engine's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a move failed, or why a file is invalid.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device of this side failed or refused.
    #[error("{device}: {doing}: {error}")]
    Device {
        /// The device.
        device: String,
        /// The step of the engine that failed.
        doing: String,
        /// The device's answer.
        #[source]
        error: limosa_client::Error,
    },
    /// A device of this side did something that the standard does not allow.
    #[error("{device}: {how}")]
    DeviceMisbehaved {
        /// The device.
        device: String,
        /// The behaviour.
        how: Misbehaviour,
    },
    /// A device of this side was reset or driven by another client during the move: what was saved or loaded is no longer
    /// its state.
    #[error("{device}: it was reset or driven by another client during the move: {found}")]
    DeviceChanged {
        /// The device.
        device: String,
        /// The change that the engine found.
        found: Changed,
    },
    /// Guest memory of this side could not be read or written.
    #[error("guest memory at {address:#x}: {error}")]
    Memory {
        /// The address, as devices see it.
        address: u64,
        /// The system's answer.
        #[source]
        error: std::io::Error,
    },
    /// The destination was asked what became of the move, and does not know.
    #[error("{peer} was asked what became of the move, and does not know")]
    NotKnown {
        /// The address that was asked.
        peer: String,
    },
    /// The VMM of this side refused.
    #[error("the VMM refused to {doing}: {reason}")]
    Vmm {
        /// The request that it refused.
        doing: &'static str,
        /// Its reason.
        reason: String,
    },
    /// The devices or the memory of the two sides do not match. Nothing was moved.
    #[error("cannot be moved: {}", joined(.reasons))]
    Incompatible {
        /// The reasons. Each names a device or memory region, what was found and what was expected.
        reasons: Vec<Mismatch>,
    },
    /// This destination takes no move, or none now. The source of the offer has received that refusal.
    #[error("no move is taken here: {why}")]
    NotTaken {
        /// Why.
        why: NoMove,
    },
    /// The other side ended the move.
    #[error("{peer} called the move off: {reason}")]
    Aborted {
        /// The other side.
        peer: String,
        /// The kind of its reason.
        code: AbortCode,
        /// The reason in its words.
        reason: String,
    },
    /// The other side violated the format, or bytes were altered on the way; or a file is damaged.
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
        /// The step of the engine that failed.
        doing: &'static str,
        /// The link's error.
        #[source]
        error: LinkError,
    },
    /// A stop would exceed the downtime goal, which was made a limit ([`WhenStalled::Abort`](crate::WhenStalled::Abort)), or
    /// the limit for a guest that stands still.
    #[error(
        "the move does not converge: a stop would take {}{predicted:?}, the goal is {goal:?}: {obstacle}",
        if *is_minimum { "at least " } else { "" }
    )]
    NotConverging {
        /// The obstacle to a short stop.
        obstacle: Obstacle,
        /// The predicted downtime.
        predicted: Duration,
        /// Whether the downtime is at least that long, since a device does not say how much it gives.
        is_minimum: bool,
        /// The downtime goal.
        goal: Duration,
    },
    /// The guest has stood still for as long as it may, and the destination was not told to run yet.
    #[error(
        "the guest has stood still for {limit:?}, the limit, and the destination was not told to run yet{}",
        and_left(.left)
    )]
    StoodStill {
        /// The limit ([`Options::standstill_max`](crate::Options::standstill_max)).
        limit: Duration,
        /// Where most was left; `None` where everything was loaded.
        left: Option<Remaining>,
    },
    /// Code that the engine called, or the engine itself, panicked.
    #[error("{place} panicked: {message}")]
    Panicked {
        /// The device, hook or thread.
        place: String,
        /// The panic's message.
        message: String,
    },
    /// The other side cannot prove that it is an end of this move.
    #[error("{peer}: {why}")]
    Unauthenticated {
        /// The other side.
        peer: String,
        /// What it lacks.
        why: Mistrust,
    },
    /// The machine with which a move in doubt was to be settled is not the machine that was sent.
    #[error("it is not the machine that was moved: {0}")]
    AnotherMachine(Difference),
    /// The other side exceeded a time limit.
    #[error("{peer}: nothing came within {limit:?} while {doing}")]
    TimedOut {
        /// The other side.
        peer: String,
        /// The step of the engine that failed.
        doing: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The link was closed after this process had stood still, and so was silent, for longer than a side may be.
    #[error(
        "{peer} closed the link: this process stood still for {time:?} (stopped by a signal, or without a processor), longer \
         than the {limit:?} for which a side may be silent"
    )]
    Suspended {
        /// The other side.
        peer: String,
        /// How long this process stood still.
        time: Duration,
        /// The limit for silence ([`Options::silence_max`](crate::Options::silence_max)) on this side.
        limit: Duration,
    },
    /// The source sent nothing but keep-alives for as long as it may.
    #[error(
        "{peer}: it sent nothing but keep-alives for {limit:?}, the limit for that (Options::idle_max, `--idle`)"
    )]
    Idle {
        /// The source.
        peer: String,
        /// The limit.
        limit: Duration,
    },
    /// Not everything had arrived when a move had taken as long as it may.
    #[error(
        "{peer}: it has not sent everything {limit:?} after its offer, the limit for that (Options::move_max, \
         `--move-limit`)"
    )]
    TookTooLong {
        /// The source.
        peer: String,
        /// The limit.
        limit: Duration,
    },
    /// A user cancelled the move on this side.
    #[error("cancelled")]
    Cancelled,
    /// This process was restarted and knows only the move's id.
    #[error("restarted after the commit, with only the move's id known")]
    StartedAnew,
    /// A system call on this side failed.
    #[error("{doing}: {error}")]
    Os {
        /// The step of the engine that failed.
        doing: &'static str,
        /// The system's answer.
        #[source]
        error: std::io::Error,
    },
    /// The destination's ledger cannot record the move. It is not committed, since nothing could answer for it later.
    #[error("the move cannot be recorded, and is not committed: {error}")]
    NotRecorded {
        /// The system's answer, with the record or the folder that it is about.
        #[source]
        error: std::io::Error,
    },
    /// The place of a snapshot, a file or another, could not be read or written.
    #[error("{name}: {doing}: {error}")]
    Snapshot {
        /// The place's name.
        name: String,
        /// The step of the engine that failed.
        doing: &'static str,
        /// The answer of the system or the store.
        #[source]
        error: std::io::Error,
    },
    /// A snapshot may have been published, or may still be: the answer was lost. [`published`](crate::published) finds
    /// out.
    #[error(
        "{name}: it is not known whether the snapshot was published: {error}; look with `limosa verify {name}`"
    )]
    PublicationUnknown {
        /// The place's name.
        name: String,
        /// The error that came instead of an answer.
        #[source]
        error: std::io::Error,
    },
}

/// Why a destination takes no move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoMove {
    /// Another move is under way.
    #[error("another move is under way; try again when that has ended")]
    Busy,
    /// A move was committed, and a guest runs on the devices.
    #[error(
        "a move was committed here, and this process only answers what became of it; send to another receiver"
    )]
    Committed,
    /// The devices cannot be used at the moment.
    #[error(
        "the devices are not free here: they cannot be used at the moment; send to another receiver, or later"
    )]
    InUse,
    /// The guest that was received last is on the devices.
    #[error(
        "the devices are not free here: the guest that was received last is on them, and has not moved on; send to another \
         receiver, or later"
    )]
    HasGuest,
    /// The process is only there to answer.
    #[error("this process only answers what became of moves; send to a receiver")]
    Answers,
}

impl Error {
    pub(crate) fn panicked(place: &str, panic: &Panic) -> Error {
        Error::Panicked { place: place.into(), message: panic.message.clone() }
    }

    /// A copy of the error for another caller. An error of the system keeps its number or its text.
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

    /// The kind of reason that the other side is told.
    pub(crate) fn abort_code(&self) -> AbortCode {
        match self {
            Error::Device { .. } | Error::DeviceMisbehaved { .. } | Error::DeviceChanged { .. } => {
                AbortCode::Device
            }
            Error::Memory { .. } => AbortCode::Memory,
            Error::Vmm { .. } => AbortCode::Vmm,
            Error::Incompatible { .. } | Error::Unauthenticated { .. } => AbortCode::Incompatible,
            Error::NotTaken { .. } => AbortCode::NotTaken,
            Error::Aborted { code, .. } => *code,
            Error::Stream { .. } => AbortCode::Stream,
            Error::TimedOut { .. } | Error::Idle { .. } | Error::TookTooLong { .. } => AbortCode::TimeLimit,
            Error::NotConverging { .. } | Error::StoodStill { .. } => AbortCode::Standstill,
            Error::Cancelled => AbortCode::Cancelled,
            Error::Link { .. } => AbortCode::Link,
            Error::Suspended { .. }
            | Error::NotRecorded { .. }
            | Error::Snapshot { .. }
            | Error::PublicationUnknown { .. }
            | Error::Os { .. }
            | Error::Panicked { .. }
            | Error::AnotherMachine(_)
            | Error::NotKnown { .. }
            | Error::StartedAnew => AbortCode::Other,
        }
    }

    /// Whether the other side knows already that the move has ended.
    pub(crate) fn peer_needs_no_word(&self) -> bool {
        matches!(self, Error::Aborted { .. })
    }
}

/// [`Error::Cancelled`] when the move was called off.
pub(crate) fn check_cancel(cancel: Option<&Cancel>) -> Result<()> {
    if cancel.is_some_and(Cancel::is_cancelled) { Err(Error::Cancelled) } else { Ok(()) }
}

/// Does something that may call the caller's code; a panic of it is an error that names the place.
pub(crate) fn guard<T>(place: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    match catch(work) {
        Ok(done) => done,
        Err(panic) => Err(Error::panicked(place, &panic)),
    }
}
