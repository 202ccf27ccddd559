//! The source's half of the commit: from the first byte of COMMIT on, only the destination's answer tells which side may run
//! (`docs/stream.md: The commit`).

use limosa_stream::{Damage, Kind, Proofs};

use crate::Error;

/// Why a commit failed.
#[derive(Debug)]
pub(crate) enum Uncommitted {
    /// The destination will never run this move, so the source may.
    Off(Error),
    /// The destination may run, so the source must not.
    Doubt(Error),
}

/// The consequence of an error after the first byte of COMMIT. An ABORT says that the destination will never run this move,
/// and is believed only of a destination that cannot prove it (`docs/stream.md: Proofs`).
pub(crate) fn after_commit(error: Error, proofs: &Proofs) -> Uncommitted {
    match error {
        Error::Aborted { .. } if proofs.are_none() => Uncommitted::Off(error),
        Error::Aborted { peer, .. } => {
            let why = "it proves nothing after COMMIT, where REFUSED is due";
            Uncommitted::Doubt(Error::Stream {
                from: peer,
                damage: Damage::Unproven { kind: Kind::ABORT, why },
            })
        }
        error => Uncommitted::Doubt(error),
    }
}
