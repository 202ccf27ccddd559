//! Destinations that break the protocol: the source runs on.

use super::*;

/// Lets a made-up destination answer a source; why the source went back.
fn destination_says(answer: impl FnOnce(&mut Peer, MigrationId) + Send) -> Error {
    let mut ends = ends();
    ends.options = believing().with_silence_max(Duration::from_secs(2));
    let (near, far) = SocketLink::pair().unwrap();
    let outcome = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(far);
            let id = peer.read_id();
            answer(&mut peer, id);
            peer.link.finish();
            let wait = Wait::within(Duration::from_secs(10), None);
            while peer.link.read(&mut [0; 4096], wait).is_ok() {}
        });
        let outcome = ends.with_source(|source| source.send(&near));
        drop(near);
        outcome
    });
    let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!(ends.source[0].state(), State::Running);
    assert!(ends.source[0].holds_guest());
    why
}

const ACCEPTED: &[u8] = br#"{"accepted":true,"window":65536}"#;

#[test]
fn a_destination_that_breaks_the_order_leaves_the_source_running() {
    let why = destination_says(|peer, _| peer.preface(ID));
    assert!(why.to_string().contains("it answers for move 0505"), "{why}");
    let why = destination_says(|peer, id| {
        peer.preface(id);
        peer.frame(Kind::READY, 0, 0, &[]);
    });
    assert!(why.to_string().contains("READY is out of place: ANSWER is due"), "{why}");
    let why = destination_says(|peer, id| {
        peer.preface(id);
        peer.frame(Kind::ANSWER, 0, 0, ACCEPTED);
        peer.frame(Kind::RUNNING, 0, 0, &[]);
    });
    assert!(why.to_string().contains("RUNNING is out of place: nothing was asked"), "{why}");
    let why = destination_says(|peer, id| {
        peer.preface(id);
        peer.frame(Kind::ANSWER, 0, 0, br#"{"accepted":false,"reasons":["too\u001b[2J old"]}"#);
    });
    assert_eq!(why.to_string(), "cannot be moved: too\\u{1b}[2J old");
}

#[test]
fn a_destination_of_another_version_leaves_the_source_running() {
    let newer = |version, oldest| {
        destination_says(move |peer, id| {
            let preface = Preface { version, oldest, ..Preface::new(id, PrefaceFlags::empty()) };
            peer.bytes(&preface.encode());
            peer.frame(Kind::ANSWER, 0, 0, br#"{"accepted":false,"reasons":["it was read"]}"#);
        })
    };
    let why = newer(4, 3);
    assert!(matches!(why, Error::Stream { damage: Damage::Newer { version: 4, oldest: 3 }, .. }), "{why}");
    for (version, oldest) in [(0, 0), (1, 0x100), (3, 4)] {
        assert!(matches!(newer(version, oldest), Error::Stream { .. }), "{version} {oldest}");
    }
    // One that is newer and speaks to older ones is understood.
    assert_eq!(newer(4, 1).to_string(), "cannot be moved: it was read");
}

#[test]
fn an_answer_that_lies_leaves_the_source_running() {
    let answers = |payload: &'static [u8]| {
        destination_says(move |peer, id| {
            peer.preface(id);
            peer.frame(Kind::ANSWER, 0, 0, payload);
        })
    };
    for payload in
        [&b"{}"[..], b"true", br#"{"accepted":1}"#, br#"{"accepted":true,"reasons":7}"#, b"\xff\xfe"]
    {
        let why = answers(payload);
        assert!(matches!(why, Error::Stream { .. }) && why.to_string().contains("ANSWER"), "{why}");
    }
    let why = answers(br#"{"accepted":false,"reasons":[]}"#);
    assert_eq!(why.to_string(), "cannot be moved: the destination refuses and does not say why");
    // READY for what was not sent, RUNNING for what was not committed, an outcome that nobody asked for.
    for kind in [Kind::READY, Kind::RUNNING, Kind::OUTCOME, Kind::COMMIT, Kind::DONE] {
        let why = destination_says(move |peer, id| {
            peer.preface(id);
            peer.frame(Kind::ANSWER, 0, 0, ACCEPTED);
            let payload: &[u8] = if kind == Kind::OUTCOME { &[2, 0, 0, 0] } else { &[] };
            peer.frame(kind, 0, 0, payload);
        });
        assert!(matches!(why, Error::Stream { .. }), "{kind}: {why}");
    }
    let why = destination_says(|peer, id| {
        peer.preface(id);
        peer.frame(Kind::ANSWER, 0, 0, ACCEPTED);
        while peer.read().0 != Kind::SUM {}
        peer.frame(Kind::RUNNING, 0, 0, &[]);
    });
    assert!(why.to_string().contains("RUNNING is out of place"), "{why}");
}

#[test]
fn a_destination_that_calls_off_at_the_commit_gives_the_guest_back() {
    let why = destination_says(|peer, id| {
        peer.preface(id);
        peer.frame(Kind::ANSWER, 0, 0, ACCEPTED);
        while peer.read().0 != Kind::SUM {}
        peer.frame(Kind::READY, 0, 0, &[]);
        assert_eq!(peer.read().0, Kind::COMMIT);
        peer.frame(Kind::ABORT, 0, 0, &encode_abort(AbortCode::Device, "it does not start"));
    });
    assert!(why.to_string().contains("it does not start"), "{why}");
}

#[test]
fn a_move_that_ran_once_cannot_be_replayed() {
    let ends = ends();
    // A state that the device takes: no bytes.
    let data = [&b"testdev1"[..], &[0; 8], &crc32c::crc32c(&[]).to_le_bytes()].concat();
    let send = |peer: &mut Peer| {
        greet(peer);
        whole(peer, &data);
        peer.frame(Kind::COMMIT, 0, 0, &[]);
    };
    let (near, far) = SocketLink::pair().unwrap();
    let mut peer = Peer::new(near);
    send(&mut peer);
    peer.frame(Kind::DONE, 0, 0, &[]);
    let received = ends.with_destination(|destination| destination.receive(&far));
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    Device::reset(&ends.destination[0].client).unwrap();
    let why = source_says(&ends, send);
    assert!(why.to_string().contains("which is decided already"), "{why}");
    assert_eq!(ends.ledger.ask(ID), Decision::Committed, "as before");
}
