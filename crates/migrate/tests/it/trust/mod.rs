//! Words about the commit of which each frame is right in itself, and that prove nothing, or something else
//! (`docs/stream.md: Proofs`): nobody acts on them.

mod doubt;
mod further_links;
mod older_versions;

use std::sync::Mutex;
use std::time::Duration;

use limosa_client::Device;
use limosa_migrate::link::{Link, SocketLink};
use limosa_migrate::{Decision, Error, Ledger, Outcome, Received};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::body::{NEEDS_PROOFS, encode_abort};
use limosa_stream::{AbortCode, Damage, Kind, MigrationId, Nonce, Offer, Proofs, Secret};

use crate::common::peer::Peer;
use crate::common::{Ends, options, world};

const ID: MigrationId = MigrationId([5; 16]);

fn secret() -> Secret {
    Secret::new([7; 32])
}

fn ends() -> Ends {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 300);
    let options = options().with_silence_max(Duration::from_secs(5));
    Ends { options, ..Ends::new(vec![source], vec![destination]) }
}

/// A state that the destination's device takes: no bytes.
fn state() -> Vec<u8> {
    [&b"testdev1"[..], &[0; 8], &crc32c::crc32c(&[]).to_le_bytes()].concat()
}

/// How a word is forged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Forged {
    /// Without a proof.
    Bare,
    /// With the proof of another word of the move.
    OtherKind,
    /// With the proof that the same word had in another move of the same secret.
    OtherId,
    /// With the proof that the same word had over an earlier connection, or in the answer to an earlier question.
    Replayed,
    /// By somebody who knows all but the secret.
    Guessed,
}

const FORGED: [Forged; 5] =
    [Forged::Bare, Forged::OtherKind, Forged::OtherId, Forged::Replayed, Forged::Guessed];

impl Forged {
    /// The payload of a word of the move with these proofs.
    fn word(self, proofs: &Proofs, id: MigrationId, kind: Kind, body: &[u8]) -> Vec<u8> {
        let (secret, nonce) = (proofs.secret().unwrap().clone(), proofs.nonce().unwrap());
        match self {
            Forged::Bare => body.to_vec(),
            Forged::OtherKind => {
                let other = if kind == Kind::RUNNING { Kind::READY } else { Kind::RUNNING };
                proofs.prove(other, body)
            }
            Forged::OtherId => Proofs::new(secret, MigrationId([6; 16]), nonce).prove(kind, body),
            Forged::Replayed => Proofs::new(secret, id, Nonce::new([1; 32])).prove(kind, body),
            Forged::Guessed => Proofs::new(Secret::new([0; 32]), id, nonce).prove(kind, body),
        }
    }
}

fn is_unproven(why: &Error, of: Kind) -> bool {
    matches!(why, Error::Stream { damage: Damage::Unproven { kind, .. }, .. } if *kind == of)
}

/// What the destination makes of a made-up source.
fn receives(ends: &Ends, speak: impl FnOnce(&mut Peer) + Send) -> Received {
    let (near, far) = SocketLink::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(near);
            speak(&mut peer);
            peer.link.finish();
            // Until the other side is done.
            while peer.next().is_some() {}
        });
        let received = ends.with_destination(|destination| destination.receive(&far));
        drop(far);
        received
    })
}

/// What the source makes of a made-up destination.
fn sends(ends: &Ends, answer: impl FnOnce(&mut Peer) + Send) -> Outcome {
    let (near, far) = SocketLink::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(far);
            answer(&mut peer);
            peer.link.finish();
            while peer.next().is_some() {}
        });
        let outcome = ends.with_source(|source| source.send(&near));
        drop(near);
        outcome
    })
}

#[test]
fn a_sum_or_commit_that_proves_nothing_starts_nothing() {
    for forged in FORGED {
        for at in [Kind::SUM, Kind::COMMIT] {
            let ends = ends();
            let received = receives(&ends, |peer| {
                assert!(peer.offer(ID, secret(), Offer::default()).accepted);
                let sum = peer.whole(&state()).encode();
                let word = |kind, body: &[u8]| match kind == at {
                    true => forged.word(&peer.proofs, ID, kind, body),
                    false => peer.proofs.prove(kind, body),
                };
                let (sum, commit) = (word(Kind::SUM, &sum), word(Kind::COMMIT, &[]));
                peer.frame(Kind::SUM, 0, 0, &sum);
                peer.try_frame(Kind::COMMIT, 0, 0, &commit);
                if at == Kind::COMMIT {
                    peer.expect(Kind::READY);
                    // The right one would know at once that it may go on.
                    let refused = String::from_utf8(peer.expect(Kind::REFUSED)[4..].to_vec()).unwrap();
                    assert!(refused.contains("COMMIT"), "{refused}");
                }
            });
            let Received::Discarded { why, .. } = received else { panic!("{forged:?}: {received:?}") };
            assert!(is_unproven(&why, at), "{forged:?} {at}: {why}");
            assert!(!ends.destination[0].holds_guest() && ends.destination[0].state() == State::Running);
            let expected = if at == Kind::COMMIT { Decision::NotCommitted } else { Decision::Unknown };
            assert_eq!(ends.ledger.ask(ID), expected, "{forged:?} {at}");
        }
    }
    // The one that the source makes itself starts the devices.
    let ends = ends();
    let received = receives(&ends, |peer| {
        peer.offer(ID, secret(), Offer::default());
        let sum = peer.whole(&state()).encode();
        peer.word(Kind::SUM, &sum);
        peer.expect(Kind::READY);
        peer.word(Kind::COMMIT, &[]);
        peer.expect(Kind::RUNNING);
        peer.word(Kind::DONE, &[]);
    });
    assert!(matches!(&received, Received::Runs(report) if report.peer_told), "{received:?}");
}

#[test]
fn a_move_that_was_recorded_was_run_by_another_destination() {
    // All that a source sends over a link that can be read.
    let recorded = Mutex::new(Vec::new());
    let first = ends();
    let received = receives(&first, |peer| {
        peer.offer(ID, secret(), Offer::default());
        let sum = peer.whole(&state()).encode();
        for (kind, body) in [(Kind::SUM, &sum[..]), (Kind::COMMIT, &[]), (Kind::DONE, &[])] {
            recorded.lock().unwrap().push((kind, peer.proofs.prove(kind, body)));
            peer.word(kind, body);
        }
        peer.expect(Kind::RUNNING);
    });
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    let recorded = recorded.into_inner().unwrap();
    // To another destination, and to the same one after it has forgotten the move.
    for ends in [ends(), Ends { ledger: Ledger::new(), ..first }] {
        Device::reset(&ends.destination[0].client).unwrap();
        let received = receives(&ends, |peer| {
            peer.offer(ID, secret(), Offer::default());
            peer.whole(&state());
            for (kind, payload) in &recorded {
                peer.try_frame(*kind, 0, 0, payload);
            }
        });
        let Received::Discarded { why, .. } = received else { panic!("{received:?}") };
        assert!(is_unproven(&why, Kind::SUM), "{why}");
        assert!(!ends.destination[0].holds_guest());
    }
}

#[test]
fn a_ready_that_proves_nothing_is_no_reason_to_commit() {
    for forged in FORGED {
        let ends = ends();
        let outcome = sends(&ends, |peer| {
            let id = peer_id(peer);
            peer.expect(Kind::SUM);
            let ready = forged.word(&peer.proofs, id, Kind::READY, &[]);
            peer.frame(Kind::READY, 0, 0, &ready);
            assert_eq!(peer.read().0, Kind::ABORT, "{forged:?}");
        });
        let Outcome::Undone { why, .. } = outcome else { panic!("{forged:?}: {outcome:?}") };
        assert!(is_unproven(&why, Kind::READY), "{forged:?}: {why}");
        assert!(ends.source[0].holds_guest() && ends.source[0].state() == State::Running);
    }
}

/// Accepts the offer, and returns the move's id.
fn peer_id(peer: &mut Peer) -> MigrationId {
    let offer = peer.accept();
    assert!(offer.needs.iter().any(|need| need == NEEDS_PROOFS), "{:?}", offer.needs);
    peer.id
}

/// A source that has sent COMMIT, and what it makes of this answer.
fn commits(ends: &Ends, answer: impl FnOnce(&mut Peer, MigrationId) + Send) -> Outcome {
    sends(ends, |peer| {
        let id = peer_id(peer);
        peer.expect(Kind::SUM);
        peer.word(Kind::READY, &[]);
        peer.expect(Kind::COMMIT);
        answer(peer, id);
    })
}

#[test]
fn a_source_that_has_committed_runs_on_and_ends_by_proven_words_only() {
    let reason = encode_abort(AbortCode::Device, "it does not start");
    for forged in FORGED {
        for (kind, body) in [(Kind::RUNNING, &[][..]), (Kind::REFUSED, &reason)] {
            let ends = ends();
            let outcome = commits(&ends, |peer, id| {
                let payload = forged.word(&peer.proofs, id, kind, body);
                peer.frame(kind, 0, 0, &payload);
            });
            let Outcome::InDoubt(doubt) = outcome else { panic!("{kind} {forged:?}: {outcome:?}") };
            assert!(is_unproven(&doubt.why, kind), "{forged:?}: {}", doubt.why);
            assert!(
                !ends.source[0].state().is_running() && ends.source[0].holds_guest(),
                "{kind} {forged:?}"
            );
        }
    }
    // An ABORT can be sent by anybody; before COMMIT it ends the move.
    let ends = ends();
    let outcome = commits(&ends, |peer, _| peer.frame(Kind::ABORT, 0, 0, &reason));
    let Outcome::InDoubt(doubt) = outcome else { panic!("{outcome:?}") };
    assert!(is_unproven(&doubt.why, Kind::ABORT), "{}", doubt.why);
    assert!(!ends.source[0].state().is_running());

    let ends = self::ends();
    let outcome = commits(&ends, |peer, _| peer.word(Kind::REFUSED, &reason));
    let Outcome::Undone { why: Error::Aborted { code, reason, .. }, .. } = outcome else {
        panic!("{outcome:?}")
    };
    assert_eq!((code, reason.as_str()), (AbortCode::Device, "it does not start"));
    assert!(ends.source[0].holds_guest() && ends.source[0].state() == State::Running);

    let ends = self::ends();
    let outcome = commits(&ends, |peer, _| {
        peer.word(Kind::RUNNING, &[]);
        peer.expect(Kind::DONE);
    });
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
}

#[test]
fn a_secret_was_in_what_people_read() {
    let ends = ends();
    let outcome = commits(&ends, |_, _| {});
    let Outcome::InDoubt(doubt) = outcome else { panic!("{outcome:?}") };
    let secret = doubt.note().secret.clone().expect("the destination had a challenge");
    let digits: String = secret.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let report = serde_json::to_string(&doubt.report).unwrap();
    let shown = [format!("{doubt:?}"), format!("{:?}", doubt.note()), report, doubt.report.to_string()];
    for shown in shown {
        assert!(!shown.contains(&digits) && !shown.contains(&digits[..8]), "{shown}");
        assert!(!shown.contains(&format!("{:?}", secret.bytes())), "{shown}");
    }
}
