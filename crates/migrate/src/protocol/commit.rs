//! The source's half of the commit: from the first byte of COMMIT on, only the destination's answer tells which side may run
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

/// The consequence of an error after the first byte of COMMIT. Only an ABORT of the destination proves that it will never
/// run this move.
pub(crate) fn after_commit(error: Error) -> Uncommitted {
    match error {
        Error::Aborted { .. } => Uncommitted::Off(error),
        error => Uncommitted::Doubt(error),
    }
}
