//! What can go wrong in a move, split by whose fault it is: this side's devices, memory or VMM, the
//! other side, what lies between, or nobody's.

use std::time::Duration;

use crate::link::LinkError;
use limosa_stream::{AbortCode, Damage};

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
    #[error("{device}: {what}")]
    DeviceMisbehaved {
        /// The device.
        device: String,
        /// What was expected, and what it did.
        what: String,
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
    /// What is dirtied cannot be moved fast enough for the downtime that is allowed.
    #[error(
        "it does not converge: after {rounds} rounds a stop would take {predicted:?}, allowed are {allowed:?}; allow \
         more downtime, slow the guest down, or give it a faster link"
    )]
    NotConverging {
        /// How many rounds there were.
        rounds: u32,
        /// How long nothing would run.
        predicted: Duration,
        /// How long nothing may run.
        allowed: Duration,
    },
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

impl Error {
    /// What the other side is told.
    pub(crate) fn abort_code(&self) -> AbortCode {
        match self {
            Error::Device { .. } | Error::DeviceMisbehaved { .. } => AbortCode::Device,
            Error::Memory { .. } => AbortCode::Memory,
            Error::Vmm { .. } => AbortCode::Vmm,
            Error::Incompatible { .. } => AbortCode::Incompatible,
            Error::Aborted { code, .. } => *code,
            Error::Stream { .. } => AbortCode::Stream,
            Error::TimedOut { .. } | Error::NotConverging { .. } => AbortCode::TimeLimit,
            Error::Cancelled => AbortCode::Cancelled,
            Error::Link { .. }
            | Error::Snapshot { .. }
            | Error::PublicationUnknown { .. }
            | Error::Os { .. }
            | Error::StartedAnew => AbortCode::Other,
        }
    }

    /// Whether the other side is known to know that the move is off, or cannot be reached.
    pub(crate) fn peer_needs_no_word(&self) -> bool {
        matches!(self, Error::Aborted { .. } | Error::Link { .. })
    }
}
