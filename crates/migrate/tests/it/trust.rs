//! Words about the commit of which each frame is right in itself, and that prove nothing, or something else
//! (`docs/stream.md: Proofs`): nobody acts on them.

use std::num::NonZeroU32;
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;
use std::time::Duration;

use crate::common::peer::Peer;
use crate::common::{Ends, options, world};
use limosa_client::Device;
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{CommitNote, Decision, Error, InDoubt, Ledger, Mistrust, Outcome, Received};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::body::{NEEDS_CREDIT, NEEDS_PROOFS, encode_abort};
use limosa_stream::{
    AbortCode, Answer, Damage, Header, Kind, MigrationId, Nonce, Offer, Preface, PrefaceFlags, Proofs, Secret,
};

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
    assert!(reason.contains("no secret of it was noted") && reason.contains("--insecure"), "{reason}");
    assert!(matches!(answered, Err(Error::Unauthenticated { .. })), "{answered:?}");
    let (kind, outcome, answered) = query(&ledger, Some(Forged::Bare), true);
    assert_eq!((kind, &outcome[..]), (Kind::OUTCOME, &[2, 0, 0, 0][..]));
    assert_eq!(answered.unwrap(), (ID, Decision::Committed));
}

#[test]
fn a_source_of_an_older_version_is_refused_before_a_device_is_touched() {
    let ends = ends();
    let received = receives(&ends, |peer| {
        peer.preface(ID);
        let device = limosa_stream::DeviceFacts { id: 7, flags: 7, ..Default::default() };
        let offer = Offer { devices: vec![device], ..Offer::default() };
        peer.frame(Kind::OFFER, 0, 0, &offer.encode().unwrap());
        peer.read_id();
        let (kind, payload) = peer.read();
        assert_eq!(kind, Kind::ANSWER);
        let answer = Answer::decode(&payload).unwrap();
        assert!(!answer.accepted, "{answer:?}");
        let reason = answer.reasons.join(";");
        assert!(reason.contains("its OFFER has no secret") && reason.contains("--insecure"), "{reason}");
    });
    let Received::Discarded { why, report } = received else { panic!("{received:?}") };
    let Error::Unauthenticated { why, .. } = why else { panic!("{why}") };
    assert_eq!(why, Mistrust::OlderVersion { sign: "its OFFER has no secret" });
    assert!(report.devices[0].spans.is_empty(), "{:?}", report.devices[0].spans);
}

#[test]
fn a_destination_of_an_older_version_is_refused_before_the_guest_is_touched() {
    let ends = ends();
    let outcome = sends(&ends, |peer| {
        let id = peer.read_id();
        let (_, payload) = peer.read();
        assert!(Offer::decode(&payload).unwrap().secret.is_some());
        peer.preface(id);
        let answer = Answer { accepted: true, window: Some(1 << 16), ..Answer::default() };
        peer.frame(Kind::ANSWER, 0, 0, &answer.encode().unwrap());
        let (kind, reason) = peer.read();
        assert_eq!(kind, Kind::ABORT);
        assert!(String::from_utf8_lossy(&reason).contains("its ANSWER has no challenge"), "{reason:?}");
    });
    let Outcome::Undone { why, report } = outcome else { panic!("{outcome:?}") };
    let Error::Unauthenticated { why, .. } = why else { panic!("{why}") };
    assert_eq!(why, Mistrust::OlderVersion { sign: "its ANSWER has no challenge" });
    assert!(report.devices[0].spans.is_empty(), "{:?}", report.devices[0].spans);
    assert!(ends.source[0].holds_guest() && ends.source[0].state() == State::Running);
}

#[test]
fn a_destination_that_proves_nothing_is_believed_where_that_is_allowed() {
    let mut ends = ends();
    ends.options.unauthenticated_peers = true;
    let outcome = sends(&ends, |peer| {
        let id = peer.read_id();
        let (_, payload) = peer.read();
        let offer = Offer::decode(&payload).unwrap();
        assert!(offer.needs.iter().all(|need| need != NEEDS_PROOFS), "{:?}", offer.needs);
        peer.preface(id);
        let answer = Answer { accepted: true, window: Some(1 << 16), ..Answer::default() };
        peer.frame(Kind::ANSWER, 0, 0, &answer.encode().unwrap());
        assert_eq!(peer.expect(Kind::SUM).len(), 24);
        peer.word(Kind::READY, &[]);
        peer.expect(Kind::COMMIT);
    });
    let Outcome::InDoubt(doubt) = outcome else { panic!("{outcome:?}") };
    assert_eq!(doubt.note().secret, None, "it does not know it");
    let (near, far) = SocketLink::pair().unwrap();
    let id = doubt.id;
    let outcome = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(far);
            assert_eq!(peer.read_id(), id);
            peer.preface(id);
            assert_eq!(peer.read(), (Kind::QUERY, Vec::new()));
            peer.word(Kind::OUTCOME, &1_u32.to_le_bytes());
            while peer.next().is_some() {}
        });
        let outcome = ends.with_source(|source| source.resolve(doubt, &near));
        drop(near);
        outcome
    });
    assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?}");
    assert!(ends.source[0].holds_guest() && ends.source[0].state() == State::Running);
}

/// A link that is one of the move, if its JOIN is right.
fn joins(proofs: &Proofs, forged: Option<Forged>, number: u32) -> (SocketLink, Box<dyn Link>) {
    let (near, far) = SocketLink::pair().unwrap();
    let body = number.to_le_bytes();
    let payload = match forged {
        None => proofs.prove(Kind::JOIN, &body),
        Some(forged) => forged.word(proofs, ID, Kind::JOIN, &body),
    };
    let header = Header::new(Kind::JOIN, 0, 0, 0, &payload);
    let preface = Preface::new(ID, PrefaceFlags::FURTHER).encode();
    let mut peer = Peer::new(near);
    peer.bytes(&[&preface[..], &header.encode(), &payload].concat());
    (peer.link, Box::new(far))
}

#[test]
fn a_link_that_does_not_prove_that_it_is_of_the_move_does_not_join_it() {
    let mut ends = ends();
    ends.options.links = NonZeroU32::new(2).unwrap();
    let (near, far) = SocketLink::pair().unwrap();
    let links = Mutex::new(Vec::<Box<dyn Link>>::new());
    let next = |wait: Wait<'_>| loop {
        if let Some(link) = links.lock().unwrap().pop() {
            return Ok(link);
        }
        wait.left()?;
        std::thread::yield_now();
    };
    let received = std::thread::scope(|scope| {
        let links = &links;
        scope.spawn(move || {
            let mut peer = Peer::new(near);
            let offer = Offer { links: 2, needs: vec![NEEDS_CREDIT.into()], ..Offer::default() };
            assert_eq!(peer.offer(ID, secret(), offer).links, 2);
            // The proof for another number is none, either.
            let (stranger, other) = joins(&peer.proofs, Some(Forged::Bare), 1);
            let (swapped, swapped_far) = {
                let three = peer.proofs.prove(Kind::JOIN, &3_u32.to_le_bytes());
                let (near, far) = SocketLink::pair().unwrap();
                let payload = [&1_u32.to_le_bytes(), &three[4..]].concat();
                let header = Header::new(Kind::JOIN, 0, 0, 0, &payload);
                let preface = Preface::new(ID, PrefaceFlags::FURTHER).encode();
                let mut peer = Peer::new(near);
                peer.bytes(&[&preface[..], &header.encode(), &payload].concat());
                (peer.link, Box::new(far) as Box<dyn Link>)
            };
            links.lock().unwrap().extend([other, swapped_far]);
            let mut strangers = vec![stranger, swapped];
            for forged in &FORGED[1..] {
                let (stranger, far) = joins(&peer.proofs, Some(*forged), 1);
                links.lock().unwrap().push(far);
                strangers.push(stranger);
            }
            for stranger in strangers {
                let wait = Wait::within(Duration::from_secs(10), None);
                assert!(matches!(stranger.read(&mut [0], wait), Err(LinkError::Closed)), "it is closed");
            }
            let (own, far) = joins(&peer.proofs, None, 1);
            links.lock().unwrap().push(far);
            let mut own = Peer::new(own);
            own.sequence = 1;
            own.frame(Kind::LINK_END, 0, 0, &[]);
            let sum = peer.whole(&state()).encode();
            peer.word(Kind::SUM, &sum);
            peer.expect(Kind::READY);
            peer.word(Kind::COMMIT, &[]);
            peer.expect(Kind::RUNNING);
            peer.word(Kind::DONE, &[]);
            while peer.next().is_some() {}
        });
        let received = ends.with_destination(|destination| destination.receive_over(&far, &next));
        drop(far);
        received
    });
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
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
