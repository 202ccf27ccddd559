//! The reasons not to trust the other side (`docs/failure.md: Who is believed`).

use limosa_stream::MigrationId;

use crate::link::Fingerprint;

/// Why the other side is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mistrust {
    /// It is of a version whose words carry no proofs.
    #[error(
        "{sign}, so it is of an older version, and what it says about the commit cannot be verified; update it, or allow peers that are not authenticated (--insecure, Options::unauthenticated_peers)"
    )]
    OlderVersion {
        /// What shows it.
        sign: &'static str,
    },
    /// This side knows no secret of the move, so that the other side can prove nothing.
    #[error(
        "the other end of move {id} cannot be authenticated, as no secret of the move was noted; allow peers that \
         are not authenticated (--insecure, Options::unauthenticated_peers), or look at both ends and decide (--decide)"
    )]
    NoSecret {
        /// The move.
        id: MigrationId,
    },
    /// It has another certificate than the destination to which the COMMIT was sent.
    #[error(
        "it is not the destination to which the COMMIT was sent: the SHA-256 of its certificate is {}, expected {expected}; \
         ask the destination with that certificate, or look at the destination and decide (--decide)",
        .found.map_or("not known, as the link is not under TLS".into(), |found| found.to_string())
    )]
    AnotherCertificate {
        /// The certificate to which the COMMIT was sent.
        expected: Fingerprint,
        /// The certificate that was found; `None` without TLS.
        found: Option<Fingerprint>,
    },
}
