//! [`CommitNote`]: the note that a source keeps before it commits, from which a restarted process can settle the move.

use limosa_stream::{MigrationId, Secret};
use serde::{Deserialize, Serialize};

use crate::link::Fingerprint;

/// The note that a source keeps before it commits ([`Vmm::committing`](crate::Vmm::committing)). From it a restarted
/// process makes the move in doubt ([`InDoubt::recover`](crate::InDoubt::recover)), and tells the destination's answer
/// from another peer's.
///
/// It is kept as its fields (`serde`), in a file that only the machine's owner can read: with the secret anybody can speak
/// for either end of this move. `Debug` does not show the secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CommitNote {
    /// The id of the move.
    pub id: MigrationId,
    /// The key of the proofs of the destination's answer. `None` of a save, and of a move to a destination that proves
    /// nothing: its answer is believed only with
    /// [`Options::unauthenticated_peers`](crate::Options::unauthenticated_peers).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Secret>,
    /// The certificate of the destination, which alone may answer. `None` without TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Fingerprint>,
}

/// A note of which only the id is left.
impl From<MigrationId> for CommitNote {
    fn from(id: MigrationId) -> CommitNote {
        CommitNote { id, ..CommitNote::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_survives_as_json_and_shows_no_secret() {
        let id = MigrationId([1; 16]);
        let full =
            CommitNote { id, secret: Some(Secret::new([0xab; 32])), peer: Some(Fingerprint([0xcd; 32])) };
        for note in [CommitNote::from(id), full.clone()] {
            let json = serde_json::to_string(&note).unwrap();
            assert_eq!(serde_json::from_str::<CommitNote>(&json).unwrap(), note, "{json}");
        }
        let shown = format!("{full:?}");
        assert!(shown.contains("cdcd") && !shown.contains("abab") && !shown.contains("171"), "{shown}");
    }
}
