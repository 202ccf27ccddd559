//! The source's half of the commit: from the first byte of COMMIT on, only the destination's word tells who may run
//! (`docs/stream.md: The commit`).

use crate::Error;

/// Why a commit failed.
#[derive(Debug)]
pub(crate) enum Uncommitted {
    /// The destination will never run this move, so the source may.
    Off(Error),
    /// The destination may run, so the source must not.
    Doubt(Error),
}

/// What follows from an error after the first byte of COMMIT. Only the destination's ABORT proves that it will never
/// run.
pub(crate) fn after_commit(error: Error) -> Uncommitted {
    match error {
        Error::Aborted { .. } => Uncommitted::Off(error),
        error => Uncommitted::Doubt(error),
    }
}
