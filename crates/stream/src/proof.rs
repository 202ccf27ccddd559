//! Proofs that a frame about a move's commit comes from the other end of that move (`docs/stream.md: Proofs`). The
//! source creates a [`Secret`] for each move, and the frames that decide which side runs carry a hash that is keyed by
//! it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{Damage, Kind, MigrationId};

/// Bytes of a proof.
pub const PROOF_BYTES: usize = 32;
/// Bytes of the label that tells one kind's proofs from another's.
const LABEL_BYTES: usize = 16;

/// The secret of one move: 32 random bytes that only its two ends know. Text and bytes of it are for notes that only the
/// machine's owner can read. `Debug` does not show it.
#[derive(Clone)]
pub struct Secret([u8; 32]);

/// 32 random bytes that are used once: a destination's challenge in a move, or a source's nonce in a question.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Nonce([u8; 32]);

/// The proofs of the words of one move or of one question. [`Proofs::none`] makes and takes words without proofs.
#[derive(Clone, Debug, Default)]
pub struct Proofs(Option<Keyed>);

#[derive(Clone, Debug)]
struct Keyed {
    secret: Secret,
    id: MigrationId,
    nonce: Nonce,
}

impl Secret {
    /// A new one, from the system's random numbers.
    pub fn random() -> std::io::Result<Secret> {
        random().map(Secret)
    }

    /// The secret with these bytes.
    pub fn new(bytes: [u8; 32]) -> Secret {
        Secret(bytes)
    }

    /// The bytes, for a record that only its owner can read.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Takes the same time wherever the two differ.
impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        blake3::Hash::from(self.0) == blake3::Hash::from(other.0)
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&Hex(&self.0))
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Secret, D::Error> {
        unhex(from).map(Secret)
    }
}

impl Nonce {
    /// A new one, from the system's random numbers.
    pub fn random() -> std::io::Result<Nonce> {
        random().map(Nonce)
    }

    /// The nonce with these bytes.
    pub fn new(bytes: [u8; 32]) -> Nonce {
        Nonce(bytes)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The nonce of a QUERY; `None` of one without a proof, which has no nonce.
    pub fn of_query(payload: &[u8]) -> Option<Nonce> {
        payload.first_chunk().copied().map(Nonce)
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Hex(&self.0), f)
    }
}

impl Serialize for Nonce {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&Hex(&self.0))
    }
}

impl<'de> Deserialize<'de> for Nonce {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Nonce, D::Error> {
        unhex(from).map(Nonce)
    }
}

impl Proofs {
    /// The proofs of the move or question with this secret, id, and challenge or nonce.
    pub fn new(secret: Secret, id: MigrationId, nonce: Nonce) -> Proofs {
        Proofs(Some(Keyed { secret, id, nonce }))
    }

    /// No proofs: a saved stream, or a peer that is not authenticated.
    pub fn none() -> Proofs {
        Proofs(None)
    }

    /// Whether words come without proofs.
    pub fn are_none(&self) -> bool {
        self.0.is_none()
    }

    /// The secret that keys them.
    pub fn secret(&self) -> Option<&Secret> {
        self.0.as_ref().map(|keyed| &keyed.secret)
    }

    /// The challenge, or the nonce of the question.
    pub fn nonce(&self) -> Option<Nonce> {
        self.0.as_ref().map(|keyed| keyed.nonce)
    }

    /// The payload of a frame of this kind: the body, followed by the proof.
    pub fn prove(&self, kind: Kind, body: &[u8]) -> Vec<u8> {
        let mut payload = body.to_vec();
        if let Some(keyed) = &self.0 {
            payload.extend(keyed.proof(kind, body).as_bytes());
        }
        payload
    }

    /// The body of a payload of this kind, after verifying its proof. `kind` is one with proofs
    /// ([`Kind::proof_bytes`]), and the payload has a length that it allows.
    pub fn check<'p>(&self, kind: Kind, payload: &'p [u8]) -> Result<&'p [u8], Damage> {
        let (least, most) = kind.payload_bytes();
        let Some(keyed) = &self.0 else {
            // Nothing keys REFUSED, which has no form without a proof.
            if payload.len() > most || kind == Kind::REFUSED {
                let why = "it carries a proof, and none was agreed on".into();
                return Err(Damage::Misplaced { kind, why });
            }
            return Ok(payload);
        };
        let unproven = |why| Err(Damage::Unproven { kind, why });
        if payload.len() < least + kind.proof_bytes() {
            return unproven("it carries no proof that it is of this move");
        }
        let Some((body, proof)) = payload.split_last_chunk::<PROOF_BYTES>() else {
            return unproven("it is too short for a proof");
        };
        // The comparison of hashes takes the same time wherever they differ.
        if keyed.proof(kind, body) != blake3::Hash::from(*proof) {
            return unproven("its proof is not of this move");
        }
        Ok(body)
    }
}

impl Keyed {
    fn proof(&self, kind: Kind, body: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret.0);
        hasher.update(&label(kind)).update(&self.id.0).update(&self.nonce.0).update(body);
        hasher.finalize()
    }
}

/// `limosa` and the kind's name, filled up with zeroes, so that the fields after it lie at fixed offsets.
fn label(kind: Kind) -> [u8; LABEL_BYTES] {
    let mut label = [0; LABEL_BYTES];
    let text = ["limosa ", kind.name().unwrap_or_default()].concat();
    let bytes = text.len().min(LABEL_BYTES);
    label[..bytes].copy_from_slice(&text.as_bytes()[..bytes]);
    label
}

/// Random bytes: the system's, or those of a simulation's seed.
pub(super) fn random<const BYTES: usize>() -> std::io::Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    for piece in bytes.chunks_mut(16) {
        if let Some(drawn) = limosa_clockwork::random_bytes() {
            piece.copy_from_slice(&drawn[..piece.len()]);
            continue;
        }
        let mut filled = 0;
        while filled < piece.len() {
            let flags = rustix::rand::GetRandomFlags::empty();
            filled += rustix::io::retry_on_intr(|| rustix::rand::getrandom(&mut piece[filled..], flags))?;
        }
    }
    Ok(bytes)
}

/// Bytes as hexadecimal digits.
struct Hex<'b>(&'b [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Reads 64 hexadecimal digits. The error does not repeat the text, which may be a secret.
fn unhex<'de, D: Deserializer<'de>>(from: D) -> Result<[u8; 32], D::Error> {
    struct Digits;
    impl de::Visitor<'_> for Digits {
        type Value = [u8; 32];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("64 hexadecimal digits")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<[u8; 32], E> {
            let half = |at: usize| {
                let digits = text.get(at..at + 32).unwrap_or_default();
                MigrationId::from_str(digits).map_err(|_| E::custom("expected 64 hexadecimal digits"))
            };
            if text.len() != 64 {
                return Err(E::custom("expected 64 hexadecimal digits"));
            }
            let mut bytes = [0; 32];
            bytes[..16].copy_from_slice(&half(0)?.0);
            bytes[16..].copy_from_slice(&half(32)?.0);
            Ok(bytes)
        }
    }
    from.deserialize_str(Digits)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: MigrationId = MigrationId([5; 16]);

    /// All kinds that carry proofs.
    fn kinds() -> Vec<Kind> {
        (0..100).map(Kind).filter(|kind| kind.proof_bytes() > 0).collect()
    }

    fn proofs(secret: u8, id: u8, nonce: u8) -> Proofs {
        Proofs::new(Secret([secret; 32]), MigrationId([id; 16]), Nonce([nonce; 32]))
    }

    fn body(kind: Kind) -> Vec<u8> {
        vec![7; kind.payload_bytes().0 + kind.proof_bytes() - PROOF_BYTES]
    }

    #[test]
    fn every_word_on_which_it_depends_who_runs_carries_a_proof() {
        let names: Vec<_> = kinds().iter().map(ToString::to_string).collect();
        let expected = "SUM READY COMMIT RUNNING QUERY OUTCOME DONE JOIN REFUSED";
        assert_eq!(names.join(" "), expected);
        let labels: std::collections::BTreeSet<_> = kinds().into_iter().map(label).collect();
        assert_eq!(labels.len(), names.len(), "labels differ");
    }

    #[test]
    fn a_proof_holds_for_its_own_kind_move_and_nonce_only() {
        let own = proofs(1, 2, 3);
        for kind in kinds() {
            let payload = own.prove(kind, &body(kind));
            assert!(kind.allows(payload.len()), "{kind}");
            assert_eq!(own.check(kind, &payload), Ok(&body(kind)[..]), "{kind}");
            for other in [proofs(9, 2, 3), proofs(1, 9, 3), proofs(1, 2, 9)] {
                assert!(matches!(other.check(kind, &payload), Err(Damage::Unproven { .. })), "{kind}");
            }
            for other in kinds().into_iter().filter(|other| *other != kind) {
                let taken = Keyed::proof(own.0.as_ref().unwrap(), other, &body(kind));
                let stolen = [&body(kind)[..], taken.as_bytes()].concat();
                assert!(
                    matches!(own.check(kind, &stolen), Err(Damage::Unproven { .. })),
                    "{other} as {kind}"
                );
            }
        }
    }

    #[test]
    fn a_word_without_a_proof_is_refused_where_proofs_were_agreed_on_and_taken_where_none_were() {
        for kind in kinds() {
            let bare = vec![7; kind.payload_bytes().0];
            assert!(matches!(proofs(1, 2, 3).check(kind, &bare), Err(Damage::Unproven { .. })), "{kind}");
            let proven = proofs(1, 2, 3).prove(kind, &body(kind));
            assert!(matches!(Proofs::none().check(kind, &proven), Err(Damage::Misplaced { .. })), "{kind}");
            if kind == Kind::REFUSED {
                assert!(Proofs::none().check(kind, &bare).is_err());
            } else {
                assert_eq!(Proofs::none().check(kind, &bare), Ok(&bare[..]), "{kind}");
                assert_eq!(Proofs::none().prove(kind, &bare), bare, "{kind}");
            }
        }
    }

    #[test]
    fn the_proof_is_the_documented_one() {
        let payload = proofs(1, 2, 3).prove(Kind::OUTCOME, &2u32.to_le_bytes());
        let hashed = [&b"limosa OUTCOME\0\0"[..], &[2; 16], &[3; 32], &[2, 0, 0, 0]].concat();
        assert_eq!(payload[..4], [2, 0, 0, 0]);
        assert_eq!(payload[4..], *blake3::keyed_hash(&[1; 32], &hashed).as_bytes());
    }

    #[test]
    fn a_secret_was_shown() {
        let secret = Secret::random().unwrap();
        let json = serde_json::to_string(&secret).unwrap();
        assert_eq!(json.len(), 66);
        assert_eq!(serde_json::from_str::<Secret>(&json).unwrap(), secret);
        let digits = json.trim_matches('"');
        let proofs = Proofs::new(secret.clone(), ID, Nonce([3; 32]));
        for shown in [format!("{secret:?}"), format!("{proofs:?}"), format!("{secret:#?}")] {
            assert!(shown.contains("Secret(..)") && !shown.contains(&digits[..4]), "{shown}");
        }
        // Nor by the error for one that is cut.
        let cut = serde_json::from_str::<Secret>(&format!("\"{}\"", &digits[..62])).unwrap_err().to_string();
        assert!(cut.contains("64 hexadecimal digits") && !cut.contains(&digits[..8]), "{cut}");
        let signed = format!("\"+{}\"", &digits[1..]);
        assert!(serde_json::from_str::<Secret>(&signed).is_err());
        assert!(serde_json::from_str::<Secret>(&"\"ü\"".replace('ü', &"ü".repeat(32))).is_err());
    }

    proptest! {
        #[test]
        fn an_altered_payload_is_refused(at: prop::sample::Index, flip in 1u8.., which: prop::sample::Index) {
            let kind = kinds()[which.index(kinds().len())];
            let own = proofs(1, 2, 3);
            let mut payload = own.prove(kind, &body(kind));
            let at = at.index(payload.len());
            payload[at] ^= flip;
            prop_assert!(own.check(kind, &payload).is_err());
        }

        #[test]
        fn arbitrary_payloads_never_panic(
            kind in 0u16..40, payload in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let kind = Kind(kind);
            if kind.proof_bytes() > 0 && kind.allows(payload.len()) {
                prop_assert!(proofs(1, 2, 3).check(kind, &payload).is_err());
                let _ = Proofs::none().check(kind, &payload);
            }
        }
    }
}
