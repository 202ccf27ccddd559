//! Peers of older versions, whose words carry no proofs.

use limosa_migrate::link::SocketLink;
use limosa_migrate::{Error, Mistrust, Outcome, Received};
use limosa_protocol::State;
use limosa_stream::body::NEEDS_PROOFS;
use limosa_stream::{Answer, Kind, Offer};

use super::{ID, ends, receives, sends};
use crate::common::peer::Peer;

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
