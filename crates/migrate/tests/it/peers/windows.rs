//! Windows of device data that grow (`docs/stream.md: WINDOW`): where latency limits the rate, and never beyond the room that the
//! destination has.

use super::*;

const WINDOW_BYTES: u64 = 64 << 10;

/// Why a source of one device undoes its move, when the destination answers its offer so, and then does what `acts` says.
fn undone_by(answer: &[u8], acts: impl FnOnce(&mut Peer) + Send) -> (Error, Ends) {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 1 << 20);
    let options = believing().with_precopy(false);
    let ends = Ends { options, ..Ends::new(vec![source], vec![destination]) };
    let (near, far) = SocketLink::pair().unwrap();
    let outcome = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(far);
            let id = peer.read_id();
            peer.preface(id);
            peer.frame(Kind::ANSWER, 0, 0, answer);
            acts(&mut peer);
            let wait = Wait::within(Duration::from_secs(10), None);
            while peer.link.read(&mut [0; 4096], wait).is_ok() {}
        });
        let outcome = ends.with_source(|source| source.send(&near));
        drop(near);
        outcome
    });
    let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
    (why, ends)
}

#[test]
fn a_source_whose_window_is_full_says_so_and_sends_as_much_as_the_larger_one_allows() {
    let (why, ends) = undone_by(br#"{"accepted":true,"window":65536,"windows_grow":true}"#, |peer| {
        let until_full = |peer: &mut Peer| while peer.read().0 != Kind::WINDOW_FULL {};
        until_full(peer);
        let taken = peer.taken;
        assert!((WINDOW_BYTES / 2..=WINDOW_BYTES).contains(&taken), "{taken}");
        // What the larger window allows comes without any credit.
        peer.frame(Kind::WINDOW, 0, 4 * WINDOW_BYTES, &[]);
        while peer.taken < 3 * WINDOW_BYTES {
            // STOPPED is another thread's, and may come at any time.
            assert_ne!(peer.read().0, Kind::WINDOW_FULL, "it says once that a window is full");
        }
        // When all that was on its way then is taken, it may say so again.
        peer.frame(Kind::CREDIT, 0, peer.taken, &[]);
        until_full(peer);
        assert!(peer.taken > 6 * WINDOW_BYTES, "{}", peer.taken);
        // A window does not become smaller.
        peer.frame(Kind::WINDOW, 0, WINDOW_BYTES, &[]);
    });
    assert!(why.to_string().contains("65536 bytes are less than the 262144 before"), "{why}");
    assert_eq!(ends.source[0].state(), State::Running);
}

#[test]
fn a_destination_that_knows_no_larger_windows_is_not_asked_for_one() {
    let (why, _) = undone_by(br#"{"accepted":true,"window":65536}"#, |peer| {
        loop {
            match peer.read().0 {
                Kind::DEVICE_DATA => peer.frame(Kind::CREDIT, 0, peer.taken, &[]),
                Kind::WINDOW_FULL => panic!("a frame of a newer version"),
                Kind::SUM => break,
                _ => {}
            }
        }
        peer.frame(Kind::WINDOW, 0, 2 * WINDOW_BYTES, &[]);
    });
    assert!(why.to_string().contains("WINDOW is out of place: nothing was asked for"), "{why}");
}

/// As a source with credit: the windows in bytes that a destination gives when it is told again and again that its window is full.
fn windows(options: Options) -> Vec<u64> {
    let mut given = Vec::new();
    let why = source_says(&Ends { options, ..ends() }, |peer| {
        peer.preface(ID);
        let device = DeviceFacts { id: 7, name: "made up".into(), flags: 7, ..DeviceFacts::default() };
        let needs = vec!["credit".into(), "flush".into()];
        let offer = Offer { needs, devices: vec![device], ..Offer::default() };
        peer.frame(Kind::OFFER, 0, 0, &offer.encode().unwrap());
        peer.read_id();
        let (kind, payload) = peer.read();
        assert_eq!(kind, Kind::ANSWER);
        let answer = Answer::decode(&payload).unwrap();
        assert!(answer.windows_grow);
        given.extend(answer.window);
        peer.frame(Kind::DEVICE_BEGIN, 7, 0, &[]);
        for flush in 1.. {
            peer.frame(Kind::WINDOW_FULL, 7, 0, &[]);
            peer.frame(Kind::FLUSH, 0, flush, &[]);
            let header = peer.next().expect("an answer");
            if header.kind == Kind::FLUSHED {
                break;
            }
            assert_eq!((header.kind, header.section), (Kind::WINDOW, 7));
            given.push(header.position);
            while peer.next().expect("an answer").kind != Kind::FLUSHED {}
        }
        peer.frame(Kind::ABORT, 0, 0, &encode_abort(AbortCode::Cancelled, "enough"));
    });
    assert!(matches!(why, Error::Aborted { .. }), "{why}");
    given
}

#[test]
fn a_window_doubles_as_long_as_there_is_room_for_it() {
    let mib = |windows: Vec<u64>| windows.into_iter().map(|bytes| bytes >> 20).collect::<Vec<_>>();
    assert_eq!(mib(windows(believing())), [4, 8, 16, 32, 64], "one device alone");
    assert_eq!(mib(windows(believing().with_windows_bytes_max(21 << 20))), [4, 8, 16, 21], "all the room");
    assert_eq!(mib(windows(believing().with_windows_bytes_max(0))), [4]);
}

#[test]
fn a_window_of_a_device_that_has_not_begun_is_out_of_place() {
    let why = source_says(&ends(), |peer| {
        greet(peer);
        peer.frame(Kind::WINDOW_FULL, 7, 0, &[]);
    });
    assert!(why.to_string().contains("WINDOW_FULL is out of place: the device has not begun"), "{why}");
}
