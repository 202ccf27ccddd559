//! Answers and questions about a move in doubt that prove nothing.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{CommitNote, Decision, Error, InDoubt, Ledger, Mistrust, Outcome, Received};
use limosa_protocol::State;
use limosa_stream::{Kind, MigrationId, Nonce, Offer, Proofs};

use super::{FORGED, Forged, ID, commits, ends, is_unproven, receives, secret, state};
use crate::common::peer::Peer;
use crate::common::{Ends, options};

/// Lets a source in doubt ask a made-up destination, which gets the QUERY and the proofs of the right answer.
fn asks(ends: &Ends, doubt: InDoubt, answer: impl FnOnce(&mut Peer, Proofs) + Send) -> Outcome {
    let note = doubt.note().clone();
    let (near, far) = SocketLink::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(far);
            assert_eq!(peer.read_id(), note.id);
            peer.preface(note.id);
            let (kind, query) = peer.read();
            assert_eq!(kind, Kind::QUERY);
            let nonce = Nonce::of_query(&query).expect("it has a nonce");
            let proofs = Proofs::new(note.secret.expect("it was noted"), note.id, nonce);
            assert_eq!(proofs.check(Kind::QUERY, &query), Ok(&nonce.bytes()[..]));
            answer(&mut peer, proofs);
            while peer.next().is_some() {}
        });
        let outcome = ends.with_source(|source| source.resolve(doubt, &near));
        drop(near);
        outcome
    })
}

#[test]
fn an_outcome_that_proves_nothing_settles_no_doubt() {
    let ends = ends();
    let outcome = commits(&ends, |_, _| {});
    let Outcome::InDoubt(mut doubt) = outcome else { panic!("{outcome:?}") };
    let stays = |outcome: Outcome| {
        let Outcome::InDoubt(doubt) = outcome else { panic!("{outcome:?}") };
        assert!(!ends.source[0].state().is_running() && ends.source[0].holds_guest());
        doubt
    };
    let mut recorded = Vec::new();
    for number in [1_u32, 2] {
        for forged in FORGED {
            let id = doubt.id;
            doubt = stays(asks(&ends, doubt, |peer, proofs| {
                let payload = forged.word(&proofs, id, Kind::OUTCOME, &number.to_le_bytes());
                peer.frame(Kind::OUTCOME, 0, 0, &payload);
            }));
            assert!(is_unproven(&doubt.why, Kind::OUTCOME), "{number} {forged:?}: {}", doubt.why);
        }
        // What was proved of "not known" is no proof of anything else.
        doubt = stays(asks(&ends, doubt, |peer, proofs| {
            let unknown = proofs.prove(Kind::OUTCOME, &0_u32.to_le_bytes());
            let altered = [&number.to_le_bytes(), &unknown[4..]].concat();
            peer.frame(Kind::OUTCOME, 0, 0, &altered);
        }));
        assert!(is_unproven(&doubt.why, Kind::OUTCOME), "{number}: {}", doubt.why);
        // An answer to an earlier question, which did not arrive.
        doubt = stays(asks(&ends, doubt, |peer, proofs| {
            recorded = proofs.prove(Kind::OUTCOME, &number.to_le_bytes());
            peer.link.cut();
        }));
        doubt = stays(asks(&ends, doubt, |peer, _| peer.frame(Kind::OUTCOME, 0, 0, &recorded)));
        assert!(is_unproven(&doubt.why, Kind::OUTCOME), "{number}: {}", doubt.why);
    }
    doubt = stays(asks(&ends, doubt, |peer, _| peer.frame(Kind::OUTCOME, 0, 0, &[0; 4])));
    // A process that is started anew knows the right answer by its note.
    let note = serde_json::to_string(doubt.note()).unwrap();
    let again = InDoubt::recover(serde_json::from_str::<CommitNote>(&note).unwrap());
    let outcome = asks(&ends, again, |peer, proofs| {
        let payload = proofs.prove(Kind::OUTCOME, &1_u32.to_le_bytes());
        peer.frame(Kind::OUTCOME, 0, 0, &payload);
    });
    assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
    assert!(ends.source[0].state() == State::Running);
}

#[test]
fn a_source_that_knows_only_the_id_believes_nobody() {
    let ends = ends();
    let (near, far) = SocketLink::pair().unwrap();
    let outcome = ends.with_source(|source| source.resolve(InDoubt::recover(ID), &near));
    let Outcome::InDoubt(doubt) = outcome else { panic!("{outcome:?}") };
    let Error::Unauthenticated { why, .. } = &doubt.why else { panic!("{}", doubt.why) };
    assert_eq!(*why, Mistrust::NoSecret { id: ID });
    drop(near);
    let mut bytes = [0; 1];
    let read = far.read(&mut bytes, Wait::within(Duration::from_secs(10), None));
    assert!(matches!(read, Err(LinkError::Closed)), "nobody is asked");
}

/// A QUERY about the move, with a proof that is forged or right; how it was answered, and what its receiver says of it.
fn query(
    ledger: &Ledger,
    forged: Option<Forged>,
    believing: bool,
) -> (Kind, Vec<u8>, Result<(MigrationId, Decision), Error>) {
    let (near, far) = SocketLink::pair().unwrap();
    std::thread::scope(|scope| {
        let asking = scope.spawn(move || {
            let nonce = Nonce::random().unwrap();
            let proofs = Proofs::new(secret(), ID, nonce);
            let payload = match forged {
                None => proofs.prove(Kind::QUERY, nonce.bytes()),
                Some(Forged::Bare) => Vec::new(),
                Some(forged) => forged.word(&proofs, ID, Kind::QUERY, nonce.bytes()),
            };
            let mut peer = Peer::new(near);
            peer.preface(ID);
            peer.frame(Kind::QUERY, 0, 0, &payload);
            assert_eq!(peer.read_id(), ID);
            let (kind, payload) = peer.read();
            if kind == Kind::OUTCOME && !believing {
                return (kind, proofs.check(kind, &payload).unwrap().to_vec());
            }
            (kind, payload)
        });
        let options = options().with_unauthenticated_peers(believing);
        let received = ledger.answer(&far, &options, None);
        drop(far);
        let (kind, payload) = asking.join().unwrap();
        (kind, payload, received)
    })
}

#[test]
fn a_stranger_who_knew_the_id_undid_a_move_by_asking_about_it() {
    for asked_rightly in [false, true] {
        let ends = ends();
        let received = receives(&ends, |peer| {
            peer.offer(ID, secret(), Offer::default());
            let sum = peer.whole(&state()).encode();
            peer.word(Kind::SUM, &sum);
            peer.expect(Kind::READY);
            for forged in FORGED {
                for believing in [false, true] {
                    let (kind, reason, answered) = query(&ends.ledger, Some(forged), believing);
                    assert_eq!(kind, Kind::ABORT, "{forged:?}: {}", String::from_utf8_lossy(&reason));
                    let why = answered.unwrap_err();
                    assert!(is_unproven(&why, Kind::QUERY), "{forged:?}: {why}");
                }
            }
            if asked_rightly {
                let (kind, outcome, answered) = query(&ends.ledger, None, false);
                assert_eq!((kind, &outcome[..]), (Kind::OUTCOME, &[1, 0, 0, 0][..]));
                assert_eq!(answered.unwrap(), (ID, Decision::NotCommitted));
            }
            peer.word(Kind::COMMIT, &[]);
            match asked_rightly {
                true => drop(peer.expect(Kind::REFUSED)),
                false => drop(peer.expect(Kind::RUNNING)),
            }
            peer.word(Kind::DONE, &[]);
        });
        assert_eq!(matches!(received, Received::Runs(_)), !asked_rightly, "{received:?}");
    }
}

#[test]
fn a_record_without_a_secret_was_answered_to_anybody() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("{ID}.move"));
    // As the first versions wrote it: committed.
    let fields = [&b"LMSAmove\x01\x02\0\0\0\0\0\0"[..], &ID.0, &[9; 16], &[0; 12]].concat();
    std::fs::write(&path, [&fields[..], &crc32c::crc32c(&fields).to_le_bytes()].concat()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let ledger = Ledger::open(folder.path()).unwrap();
    let (kind, reason, answered) = query(&ledger, Some(Forged::Bare), false);
    assert_eq!(kind, Kind::ABORT);
    let reason = String::from_utf8_lossy(&reason[4..]).into_owned();
    assert!(reason.contains("no secret of the move was noted") && reason.contains("--insecure"), "{reason}");
    assert!(matches!(answered, Err(Error::Unauthenticated { .. })), "{answered:?}");
    let (kind, outcome, answered) = query(&ledger, Some(Forged::Bare), true);
    assert_eq!((kind, &outcome[..]), (Kind::OUTCOME, &[2, 0, 0, 0][..]));
    assert_eq!(answered.unwrap(), (ID, Decision::Committed));
}
