//! Clients that stay silent, send half an opening or something else.

use super::*;

#[test]
fn a_client_that_stays_silent_blocks_no_move() {
    let mut clients = Vec::new();
    move_among(None, |acceptor| {
        for words in [&b""[..], b"\x89LMSA\r\n"] {
            let mut silent = connected(acceptor);
            silent.write_all(words).unwrap();
            clients.push(silent);
        }
    });
    assert_eq!(clients.len(), 4);
}

#[test]
fn a_client_that_stays_silent_before_or_after_the_tls_handshake_blocks_no_move() {
    let folder = tempfile::tempdir().unwrap();
    let tls = tls(folder.path());
    let (mut before, mut after) = (Vec::new(), Vec::new());
    move_among(Some(&tls), |acceptor| {
        before.push(connected(acceptor));
        // The handshake needs the other end, which accepts later.
        let (address, tls) = (acceptor.address().clone(), tls.clone());
        let link = connect(&address, LIMIT).unwrap();
        after.push(std::thread::spawn(move || {
            let link = TlsLink::connect(link, &tls, &address, wait())?;
            link.read(&mut [0], wait()).map(drop)
        }));
    });
    for silent in after {
        // It is closed at the end, with the acceptor; on a slow machine that may be before the handshake is complete.
        let closed = silent.join().unwrap().unwrap_err();
        assert!(!matches!(closed, LinkError::TimedOut | LinkError::Cancelled), "{closed}");
    }
}

#[test]
fn a_client_that_sends_half_an_opening_blocks_no_further_link() {
    let further = opening(preface(PrefaceFlags::FURTHER), &[]);
    let other = opening(preface(PrefaceFlags::FURTHER), &[(Kind::JOIN, &1_u32.to_le_bytes())]);
    let (mut silent, mut wrong) = (Vec::new(), Vec::new());
    move_among(None, |acceptor| {
        silent.push(says(acceptor, &further));
        silent.push(says(acceptor, &opening(preface(PrefaceFlags::empty()), &[(Kind::PROGRESS, &[0; 8])])));
        wrong.push(says(acceptor, &other));
    });
    for mut client in wrong {
        let why = refusal(&mut client);
        assert!(why.contains(&format!("a further link of move {ID}, which is not under way here")), "{why}");
    }
}

#[test]
fn of_too_many_clients_the_one_that_was_silent_for_longest_is_closed() {
    let acceptor = listening(SILENCE);
    let mut clients: Vec<_> = (0..=PENDING_MAX).map(|_| connected(&acceptor)).collect();
    assert_eq!(clients[0].read(&mut [0]).unwrap(), 0, "it is closed");
    // All others are still heard.
    let question = opening(preface(PrefaceFlags::empty()), &[(Kind::QUERY, &[])]);
    for late in clients[1..].iter_mut().rev() {
        late.write_all(&question).unwrap();
        assert_eq!(outcome(late), 0);
    }
}

#[test]
fn a_client_is_told_what_it_did_instead_of_an_opening_and_ends_nothing() {
    let acceptor = listening(SILENCE);
    let empty = PrefaceFlags::empty();
    let newer = Preface { version: 4, oldest: 3, ..preface(empty) };
    let altered = {
        let mut bytes = preface(empty).encode().to_vec();
        bytes[20] ^= 1;
        bytes
    };
    let joins = |number: u32| opening(preface(PrefaceFlags::FURTHER), &[(Kind::JOIN, &number.to_le_bytes())]);
    let offers = |offer: &[u8]| opening(preface(empty), &[(Kind::OFFER, offer)]);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n".to_vec(), "not a Limosa stream"),
        (b"\x16\x03\x01\x02\x00\x01".to_vec(), "it speaks TLS"),
        (b"\x89LM".to_vec(), "closed by the other end"),
        (Vec::new(), "closed by the other end"),
        (altered, "checksum of the preface"),
        (opening(newer, &[]), "version 4 and needs a reader of 3"),
        (opening(preface(PrefaceFlags::STORED), &[]), "a saved stream came over a link"),
        (opening(preface(empty), &[]), "closed by the other end"),
        (opening(preface(empty), &[(Kind::MEMORY_DATA, &[1; 1 << 20])]), "MEMORY_DATA is out of place"),
        (opening(preface(empty), &[(Kind::COMMIT, &[])]), "COMMIT is out of place: an OFFER is due"),
        (offers(b"{{"), "OFFER:"),
        (offers(br#"{"devices":[],"needs":["postcopy"]}"#), "the stream uses postcopy"),
        (offers(br#"{"needs":[],"devices":[],"memory":[]}"#), "it offers no device and no memory"),
        (offers(&an_offer())[..100].to_vec(), "closed by the other end"),
        (joins(0), "link 0, expected 1 to 15"),
        (joins(1), "which is not under way here"),
    ];
    for (words, part) in &cases {
        let mut client = connected(&acceptor);
        // It may be refused before it has said all.
        let _ = client.write_all(words);
        let _ = client.shutdown(Shutdown::Write);
        let why = refusal(&mut client);
        assert!(why.contains(part), "{part}: {why}");
    }
    let began = Instant::now();
    while acceptor.passed_over() < cases.len() as u64 {
        assert!(began.elapsed() < LIMIT, "{} of {}", acceptor.passed_over(), cases.len());
        std::thread::yield_now();
    }
    let client = says(&acceptor, &offers(&an_offer()));
    let offered = offered(&acceptor);
    assert_eq!((offered.id(), offered.peer()), (ID, &*format!("tcp:{}", client.local_addr().unwrap())));
}

#[test]
fn a_client_that_is_silent_for_too_long_is_told_why_and_closed() {
    let acceptor = listening(Duration::from_millis(1));
    for words in [&b""[..], &opening(preface(PrefaceFlags::empty()), &[])] {
        let mut silent = says(&acceptor, words);
        let why = refusal(&mut silent);
        assert!(why.contains("nothing came within 1ms while waiting for the"), "{why}");
    }
}

#[test]
fn a_client_whose_first_bytes_begin_no_stream_was_waited_for_until_the_end_of_the_silence() {
    let acceptor = listening(SILENCE);
    for words in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"SSH-2.0-OpenSSH_9.6\r\n", b"\x89LMSB"] {
        let mut client = says(&acceptor, words);
        let why = refusal(&mut client);
        assert!(why.contains("not a Limosa stream"), "{why}");
    }
}

#[test]
fn keep_alives_held_a_receiver_for_as_long_as_an_answer_may_take() {
    let acceptor = listening(Duration::from_millis(50));
    let mut peer = Peer::new(SocketLink::new(connected(&acceptor), "the acceptor"));
    peer.preface(ID);
    let began = Instant::now();
    while peer.try_frame(Kind::PROGRESS, 0, 0, &[0; 8]) {
        assert!(began.elapsed() < LIMIT, "nobody hung up");
    }
}

#[test]
fn keep_alives_before_an_offer_fill_no_memory() {
    let acceptor = listening(SILENCE);
    let mut client = connected(&acceptor);
    let alive: Vec<(Kind, &[u8])> = vec![(Kind::PROGRESS, &[0; 8]); 10_000];
    let _ = client.write_all(&opening(preface(PrefaceFlags::empty()), &alive));
    let why = refusal(&mut client);
    assert!(why.contains("PROGRESS is out of place: an OFFER is due by now"), "{why}");
}

#[test]
fn a_wait_for_a_client_ends_at_its_deadline_and_at_a_cancel_and_the_end_closes_pending_clients() {
    let acceptor = listening(SILENCE);
    let mut silent = connected(&acceptor);
    let soon = Wait::within(Duration::from_millis(5), None);
    assert!(matches!(acceptor.accept(soon), Err(LinkError::TimedOut)));
    let cancel = Cancel::new().unwrap();
    cancel.cancel();
    let cancelled = Wait::within(LIMIT, Some(&cancel));
    assert!(matches!(acceptor.accept(cancelled), Err(LinkError::Cancelled)));
    drop(acceptor);
    assert_eq!(silent.read(&mut [0]).unwrap_or(0), 0);
}
