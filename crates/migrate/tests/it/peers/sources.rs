//! Sources that break the protocol: the destination refuses them and stays usable.

use super::*;

#[test]
fn a_source_that_breaks_the_order_is_refused_and_the_destination_stays_usable() {
    let ends = ends();
    type Speak = fn(&mut Peer);
    let cases: [(&str, Speak); 9] = [
        ("DEVICE_DATA is out of place: the device has not begun", |peer| {
            peer.frame(Kind::DEVICE_DATA, 7, 0, b"x");
        }),
        ("DEVICE_BEGIN is out of place: device 0 was not offered", |peer| {
            peer.frame(Kind::DEVICE_BEGIN, 0, 0, &[]);
        }),
        ("it starts at byte 1, byte 0 is due", |peer| {
            peer.frame(Kind::DEVICE_BEGIN, 7, 0, &[]);
            peer.frame(Kind::DEVICE_DATA, 7, 1, b"x");
        }),
        ("COMMIT is out of place", |peer| peer.frame(Kind::COMMIT, 0, 0, &[])),
        ("READY is out of place", |peer| peer.frame(Kind::READY, 0, 0, &[])),
        ("QUERY is out of place", |peer| peer.frame(Kind::QUERY, 0, 0, &[])),
        ("SUM is out of place", |peer| peer.frame(Kind::SUM, 0, 0, &[0; 24])),
        ("memory region 0 was not offered", |peer| peer.frame(Kind::MEMORY_DATA, 0, 0, &[1; 4096])),
        ("frame 3 came where frame 1 was due", |peer| {
            peer.sequence = 3;
            peer.frame(Kind::DEVICE_BEGIN, 7, 0, &[]);
        }),
    ];
    for (expected, speak) in cases {
        let why = source_says(&ends, |peer| {
            greet(peer);
            speak(peer);
        });
        assert!(why.to_string().contains(expected), "{expected}: {why}");
    }
    let (outcome, received) = ends.run_plain();
    assert!(ends.check(outcome, received, "after all that"));
}

#[test]
fn a_source_that_sends_more_than_it_has_credit_for_is_refused() {
    let why = source_says(&ends(), |peer| {
        peer.preface(ID);
        let device = DeviceFacts { id: 7, name: "made up".into(), flags: 7, ..DeviceFacts::default() };
        let needs = vec!["credit".into()];
        let offer = Offer { needs, devices: vec![device], ..Offer::default() };
        peer.frame(Kind::OFFER, 0, 0, &offer.encode().unwrap());
        peer.frame(Kind::DEVICE_BEGIN, 7, 0, &[]);
        // Whether it is in order does not matter any more.
        peer.frame(Kind::DEVICE_DATA, 7, (4 << 20) - 3, b"four");
    });
    assert!(why.to_string().contains("the last credit allows data up to byte 4194304"), "{why}");
}

#[test]
fn a_source_that_knows_no_credit_is_given_one_link() {
    let mut ends = ends();
    ends.options.links = std::num::NonZeroU32::new(4).unwrap();
    let (near, far) = SocketLink::pair().unwrap();
    let received = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(near);
            peer.preface(ID);
            let device = DeviceFacts { id: 7, name: "made up".into(), flags: 7, ..DeviceFacts::default() };
            let offer = Offer { devices: vec![device], links: 4, ..Offer::default() };
            peer.frame(Kind::OFFER, 0, 0, &offer.encode().unwrap());
            peer.read_id();
            let (kind, answer) = peer.read();
            assert_eq!(kind, Kind::ANSWER);
            let answer = Answer::decode(&answer).unwrap();
            // What came over one link ahead of another would have no bound.
            assert!(answer.accepted && answer.links == 1, "{answer:?}");
        });
        let nobody = |_: Wait<'_>| -> Result<Box<dyn Link>, LinkError> { panic!("nobody asks for more") };
        ends.with_destination(|destination| destination.receive_over(&far, &nobody))
    });
    assert!(matches!(received, Received::Discarded { .. }), "{received:?}");
}

#[test]
fn a_foreign_device_s_state_is_refused_before_ready() {
    let why = source_says(&ends(), |peer| {
        greet(peer);
        whole(peer, b"what another device would load");
        peer.frame(Kind::COMMIT, 0, 0, &[]);
    });
    assert!(why.to_string().contains("entering STOP") && why.to_string().contains("EINVAL"), "{why}");
}

#[test]
fn a_source_that_says_nothing_more_than_that_it_lives_holds_nobody_for_ever() {
    let mut ends = ends();
    ends.options = believing().with_silence_max(Duration::from_millis(100));
    let why = source_says(&ends, |peer| {
        peer.preface(ID);
        send_for_ever(peer, Kind::PROGRESS, &[0; 8]);
    });
    // By its time, or by its bytes, whichever end sooner.
    let is_over = matches!(why, Error::TimedOut { .. }) || why.to_string().contains("is due by now");
    assert!(is_over, "{why}");
}

/// Sends such frames until the other side hangs up, which it must do soon.
fn send_for_ever(peer: &mut Peer, kind: Kind, payload: &[u8]) {
    let began = Instant::now();
    while peer.try_frame(kind, 0, 0, payload) {
        assert!(began.elapsed() < Duration::from_secs(20), "nobody hung up");
    }
}

#[test]
fn keep_alives_behind_an_offer_held_the_devices_for_ever() {
    for stops in [false, true] {
        let mut ends = ends();
        ends.options = believing().with_idle_max(Duration::from_millis(50));
        ends.options.standstill_max = Duration::from_millis(100);
        let why = source_says(&ends, |peer| {
            greet(peer);
            if stops {
                peer.frame(Kind::STOPPED, 0, 0, &[]);
            }
            send_for_ever(peer, Kind::PROGRESS, &[0; 8]);
        });
        let Error::Idle { limit, .. } = why else { panic!("{why}") };
        assert_eq!(limit, Duration::from_millis(if stops { 100 } else { 50 }));
        assert!(why.to_string().contains("Options::idle_max, `--idle`"), "{why}");
    }
}

#[test]
fn a_source_that_never_sent_its_sum_held_the_devices_for_ever() {
    let mut ends = ends();
    ends.options = believing().with_move_max(Duration::from_millis(50));
    let why = source_says(&ends, |peer| {
        greet(peer);
        send_for_ever(peer, Kind::ROUND, &[0; 16]);
    });
    assert!(matches!(why, Error::TookTooLong { .. }), "{why}");
    assert!(why.to_string().contains("Options::move_max, `--move-limit`"), "{why}");
}

/// Opens a door when a move is undone.
struct OpensAtUndo(Arc<Door>);

impl Observer for OpensAtUndo {
    fn phase(&self, phase: Phase) {
        if phase == Phase::Undo {
            self.0.open();
        }
    }
}

#[test]
fn a_source_that_waits_for_a_slow_device_is_not_idle() {
    let door = Arc::new(Door::default());
    let opens = OpensAtUndo(door.clone());
    let device = Hooked::new("there", MigrationFlags::SETS[3], &[]).on(move |_, call| {
        if call == Call::Write {
            door.pass();
        }
    });
    // A source that has nothing to wait for may not send a single keep-alive.
    let (options, ledger) = (believing().with_idle_max(Duration::ZERO), Ledger::new());
    let devices = [MovedDevice::new(&device)];
    let (near, far) = SocketLink::pair().unwrap();
    let received = std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(near);
            greet(&mut peer);
            peer.frame(Kind::DEVICE_BEGIN, 7, 0, &[]);
            peer.frame(Kind::DEVICE_DATA, 7, 0, b"slow");
            // The device has the data until the move is undone.
            (0..100).for_each(|_| peer.frame(Kind::PROGRESS, 0, 0, &[0; 8]));
            peer.frame(Kind::ABORT, 0, 0, &encode_abort(AbortCode::Vmm, "second thoughts"));
        });
        Destination::new(&devices, &ledger, &options).with_observer(&opens).receive(&far)
    });
    let Received::Discarded { why: Error::Aborted { .. }, .. } = received else { panic!("{received:?}") };
}

#[test]
fn a_newer_stream_is_refused_by_name() {
    let why = source_says(&ends(), |peer| {
        let preface = Preface { version: 4, oldest: 3, ..Preface::new(ID, PrefaceFlags::empty()) };
        peer.bytes(&preface.encode());
    });
    let Error::Stream { damage: Damage::Newer { version: 4, oldest: 3 }, .. } = why else { panic!("{why}") };
    let why = source_says(&ends(), |peer| {
        peer.preface(ID);
        peer.frame(Kind::OFFER, 0, 0, br#"{"devices":[],"needs":["postcopy"]}"#);
    });
    assert!(why.to_string().contains("the stream uses postcopy"), "{why}");
}

#[test]
fn an_offer_that_lies_is_refused_before_a_device_is_touched() {
    let ends = ends();
    let device = |id: u32| format!(r#"{{"id":{id},"name":"made up","flags":7}}"#);
    let devices = |list: &[String]| format!(r#"{{"devices":[{}]}}"#, list.join(","));
    let memory = |list: &str| format!(r#"{{"devices":[{}],"memory":[{list}]}}"#, device(7));
    let part = |id: u32, address: u64, bytes: u64, page: u64| {
        format!(r#"{{"id":{id},"address":{address},"bytes":{bytes},"page_bytes":{page}}}"#)
    };
    let many = |count: u32| devices(&(0..count).map(device).collect::<Vec<_>>());
    for (expected, offer) in [
        ("65 devices, the most is 64", many(65)),
        ("the source has 64 devices, the destination 1", many(64)),
        ("it offers no device and no memory", many(0)),
        ("two devices have the id 7", devices(&[device(7), device(7)])),
        ("a name over 255 bytes", devices(&[device(7).replace("made up", &"n".repeat(256))])),
        (
            "257 regions, the most is 256",
            devices(&[device(7).replace('}', &format!(r#","irqs":{:?}}}"#, [1; 257]))]),
        ),
        (
            "made\\u{1b}[2Jup -> ",
            devices(&[device(7).replace("made up", r#"made\u001b[2Jup","irqs":[9],"x":""#)]),
        ),
        ("only the source has memory 3", memory(&part(3, 0, 4096, 4096))),
        (
            "two memory regions have the id 1",
            memory(&[part(1, 0, 4096, 4096), part(1, 1 << 20, 4096, 4096)].join(",")),
        ),
        ("overlap", memory(&[part(1, 0, 8192, 4096), part(2, 4096, 4096, 4096)].join(","))),
        ("address 0xfffffffffffff000", memory(&part(0, u64::MAX - 4095, 8192, 4096))),
        ("pages of 0 bytes", memory(&part(0, 0, 4096, 0))),
        ("pages of 18446744073709551615 bytes", memory(&part(0, 0, 4096, u64::MAX))),
        ("281474976714752 bytes", memory(&part(0, 0, (1 << 48) + 4096, 4096))),
        ("OFFER", memory(r#"{"id":-1,"address":0,"bytes":4096,"page_bytes":4096}"#)),
        ("OFFER", memory(r#"{"id":0,"address":1e400,"bytes":4096,"page_bytes":4096}"#)),
        ("OFFER", "[".repeat(100_000)),
        ("OFFER", "null".into()),
        ("OFFER", " ".repeat(256 << 10)),
    ] {
        let why = source_says(&ends, |peer| {
            peer.preface(ID);
            peer.frame(Kind::OFFER, 0, 0, offer.as_bytes());
        });
        assert!(why.to_string().contains(expected), "{expected}: {why}");
    }
    let (outcome, received) = ends.run_plain();
    assert!(ends.check(outcome, received, "after all that"));
}

#[test]
fn a_length_that_a_kind_cannot_have_is_not_waited_for() {
    let ends = ends();
    for (kind, length) in [
        (Kind::OFFER, 0),
        (Kind::OFFER, (256 << 10) + 1),
        (Kind::OFFER, u32::MAX),
        (Kind::DEVICE_DATA, 0),
        (Kind::DEVICE_DATA, (1 << 20) + 1),
        (Kind::DEVICE_DATA, u32::MAX),
        (Kind::DEVICE_BEGIN, 1),
        (Kind::DEVICE_END, 15),
        (Kind::DEVICE_HINT, 25),
        (Kind::MEMORY_DATA, 0),
        (Kind::MEMORY_DATA, u32::MAX),
        (Kind::MEMORY_ZERO, 7),
        (Kind::ROUND, 8),
        (Kind::STOPPED, 1),
        (Kind::SUM, 0),
        (Kind::FLUSH, 1),
        (Kind::ABORT, 3),
        (Kind::ABORT, 5001),
        (Kind::PROGRESS, 9),
        (Kind(4000), u32::MAX),
    ] {
        let why = source_says(&ends, |peer| {
            match kind {
                Kind::OFFER => peer.preface(ID),
                _ => greet(peer),
            }
            peer.lie_of_length(kind, length);
        });
        assert!(matches!(why, Error::Stream { .. }), "{kind} of {length}: {why}");
    }
}

#[test]
fn a_source_that_calls_off_is_believed() {
    let why = source_says(&ends(), |peer| {
        greet(peer);
        peer.frame(Kind::ABORT, 0, 0, &encode_abort(AbortCode::Vmm, "second thoughts"));
    });
    let Error::Aborted { code: AbortCode::Vmm, reason, .. } = why else { panic!("{why}") };
    assert_eq!(reason, "second thoughts");
}

#[test]
fn frames_that_nobody_knows_yet_are_passed_over_when_they_allow_it() {
    let ends = ends();
    let why = source_says(&ends, |peer| {
        greet(peer);
        let mut header = Header::new(Kind(4000), 0, 0, peer.sequence, b"news");
        header.skippable = true;
        peer.sequence += 1;
        peer.bytes(&[&header.encode()[..], b"news"].concat());
        peer.frame(Kind(4001), 0, 0, b"bad news");
    });
    assert!(why.to_string().contains("frame of kind 4001"), "{why}");
}
