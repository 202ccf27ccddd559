//! Clients of a listener that stay silent, or are not migrating, do not block those that are.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use crate::common::closures::AtCommit;
use crate::common::hooked::Hooked;
use crate::common::peer::Peer;
use crate::common::{Ends, options, world};
use limosa_migrate::link::{
    Address, Connector, Link, LinkError, Listener, SocketLink, Tls, TlsLink, Wait, connect,
};
use limosa_migrate::{
    Acceptor, Cancel, CommitNote, Decision, Destination, Error, InDoubt, Incoming, Ledger, MovedDevice,
    NoMove, OfferedMove, Options, Outcome, PENDING_MAX, Received, Source,
};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::body::decode_u32;
use limosa_stream::{Decoded, Decoder, DeviceFacts, Header, Kind, MigrationId, Offer, Preface, PrefaceFlags};
use rcgen::{CertificateParams, KeyPair};

const LIMIT: Duration = Duration::from_secs(60);
/// So long that a test that waits for it fails by its own limit.
const SILENCE: Duration = Duration::from_secs(3600);
const ID: MigrationId = MigrationId([7; 16]);
const FLAGS: MigrationFlags = MigrationFlags::SETS[3];

fn wait() -> Wait<'static> {
    Wait::within(LIMIT, None)
}

/// The made-up peers here prove nothing.
fn believing(silence: Duration) -> Options {
    options().with_silence_max(silence).with_unauthenticated_peers(true)
}

fn bound() -> Listener {
    Listener::bind(&Address::Tcp("127.0.0.1".into(), 0)).unwrap()
}

fn accepting(tls: Option<Tls>, ledger: &Arc<Ledger>, silence: Duration) -> Acceptor {
    Acceptor::new(bound(), tls, ledger.clone(), &believing(silence)).unwrap()
}

fn listening(silence: Duration) -> Acceptor {
    accepting(None, &Arc::default(), silence)
}

fn connected(acceptor: &Acceptor) -> TcpStream {
    let Address::Tcp(host, port) = acceptor.address() else { panic!("{acceptor:?}") };
    let stream = TcpStream::connect((host.as_str(), *port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// The bytes of a preface and of frames with these payloads.
fn opening(preface: Preface, frames: &[(Kind, &[u8])]) -> Vec<u8> {
    let mut bytes = preface.encode().to_vec();
    for (number, (kind, payload)) in frames.iter().enumerate() {
        bytes.extend(Header::new(*kind, 0, 0, number as u32, payload).encode());
        bytes.extend(*payload);
    }
    bytes
}

fn preface(flags: PrefaceFlags) -> Preface {
    Preface::new(ID, flags)
}

/// A connection that has sent this.
fn says(acceptor: &Acceptor, words: &[u8]) -> TcpStream {
    let mut client = connected(acceptor);
    client.write_all(words).unwrap();
    client
}

/// What a client hears before the other side closes: the frames behind the preface, if there is one.
fn hears(client: &mut TcpStream) -> Vec<(Kind, Vec<u8>)> {
    let mut bytes = Vec::new();
    // A reset may follow.
    let _ = client.read_to_end(&mut bytes);
    let mut decoder = Decoder::new();
    if bytes.first() != Some(&0x89) {
        decoder.push(&preface(PrefaceFlags::empty()).encode());
    }
    decoder.push(&bytes);
    let mut frames = Vec::new();
    while let Some(decoded) = decoder.next().unwrap() {
        match decoded {
            Decoded::Preface(preface) => assert_eq!(preface.id, ID),
            Decoded::Frame { header, payload, .. } => frames.push((header.kind, payload.to_vec())),
        }
    }
    frames
}

/// The reason that a client is given before it is closed.
#[track_caller]
fn refusal(client: &mut TcpStream) -> String {
    match hears(client).pop() {
        Some((Kind::ABORT, payload)) => String::from_utf8(payload[4..].to_vec()).unwrap(),
        heard => panic!("{heard:?} where an ABORT is due"),
    }
}

/// The answer that a client gets.
#[track_caller]
fn outcome(client: &mut TcpStream) -> u32 {
    match hears(client).pop() {
        Some((Kind::OUTCOME, payload)) => decode_u32(&payload),
        heard => panic!("{heard:?} where an OUTCOME is due"),
    }
}

#[track_caller]
fn offered(acceptor: &Acceptor) -> OfferedMove {
    match acceptor.accept(wait()).unwrap() {
        Incoming::Offer(offered) => offered,
        incoming => panic!("{incoming:?}"),
    }
}

fn an_offer() -> Vec<u8> {
    let device = DeviceFacts { id: 7, name: "made up".into(), flags: 7, ..DeviceFacts::default() };
    Offer { devices: vec![device], ..Offer::default() }.encode().unwrap()
}

/// One certificate for both sides, which is its own authority.
fn tls(folder: &Path) -> Tls {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["both".to_owned()]).unwrap().self_signed(&key).unwrap();
    let (pem, key_pem) = (folder.join("both"), folder.join("key"));
    std::fs::write(&pem, certificate.pem()).unwrap();
    std::fs::write(&key_pem, key.serialize_pem()).unwrap();
    std::fs::set_permissions(&key_pem, Permissions::from_mode(0o600)).unwrap();
    Tls::load(&pem, &pem, &key_pem, Some("both")).unwrap()
}

/// A move over two links, with these clients before each of its links.
fn move_among(tls: Option<&Tls>, mut others: impl FnMut(&Acceptor) + Send) {
    let (source, destination) = world("dev", FLAGS, 100_000);
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.options = options().with_links(2.try_into().unwrap());
    let acceptor = accepting(tls.cloned(), &Arc::default(), SILENCE);
    others(&acceptor);
    let mut connector = Connector::new(acceptor.address().clone());
    if let Some(tls) = tls {
        connector = connector.with_tls(tls.clone());
    }
    let others = std::sync::Mutex::new(others);
    let (outcome, received) = std::thread::scope(|scope| {
        let received = scope.spawn(|| {
            let offered = offered(&acceptor);
            ends.with_destination(|destination| destination.receive_offered(offered))
        });
        let further = |wait: Wait<'_>| {
            (others.lock().unwrap())(&acceptor);
            connector.connect(wait)
        };
        let first = connector.connect(wait()).unwrap();
        let outcome = ends.with_source(|source| source.send_over(&first, &further));
        (outcome, received.join().unwrap())
    });
    let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
    assert_eq!(report.links.len(), 2, "{report:?}");
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert!(ends.check(outcome, received, "among other clients"));
}

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

/// A device that counts how often it is called, and a destination of it.
fn counted(called: &Arc<AtomicUsize>) -> Hooked {
    let called = called.clone();
    Hooked::new("there", FLAGS, &[]).on(move |_, _| {
        called.fetch_add(1, Ordering::SeqCst);
    })
}

#[test]
fn a_second_offer_reset_the_devices_of_a_guest_that_had_just_arrived() {
    let (options, ledger, called) = (options(), Arc::new(Ledger::new()), Arc::default());
    let acceptor = accepting(None, &ledger, SILENCE);
    let (source, there) = (Hooked::new("source", FLAGS, &[7; 900]), counted(&called));
    let (here, there) = ([MovedDevice::new(&source)], [MovedDevice::new(&there)]);
    let (address, noted) = (acceptor.address().clone(), Mutex::new(None));
    let note = AtCommit(|note: &CommitNote| *noted.lock().unwrap() = Some(note.clone()));
    let (outcome, received) = std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let offered = offered(&acceptor);
            Destination::new(&there, &ledger, &options).receive_offered(offered)
        });
        let link = connect(&address, LIMIT).unwrap();
        let outcome = Source::new(&here, &options).with_vmm(&note).send(&link);
        drop(link);
        (outcome, receiving.join().unwrap())
    });
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    let Received::Runs(report) = received else { panic!("{received:?}") };
    let before = called.load(Ordering::SeqCst);
    // By the same source, and by somebody who disappears.
    let again = Hooked::new("source", FLAGS, &[8; 900]);
    let outcome = Source::new(&[MovedDevice::new(&again)], &options).send(&connect(&address, LIMIT).unwrap());
    let Outcome::Undone { why: Error::Aborted { reason, .. }, .. } = outcome else { panic!("{outcome:?}") };
    assert!(reason.contains("a move was committed here, and this process only answers"), "{reason}");
    let mut stranger =
        says(&acceptor, &opening(preface(PrefaceFlags::empty()), &[(Kind::OFFER, &an_offer())]));
    let reason = refusal(&mut stranger);
    assert!(reason.contains("no move is taken here"), "{reason}");
    assert_eq!(called.load(Ordering::SeqCst), before, "no device was called");
    // It still answers the source, and nobody else.
    let id = report.id.parse().unwrap();
    let asks = Preface::new(id, PrefaceFlags::empty());
    let mut heard = Vec::new();
    says(&acceptor, &opening(asks, &[(Kind::QUERY, &[])])).read_to_end(&mut heard).unwrap();
    let heard = String::from_utf8_lossy(&heard);
    assert!(heard.contains("QUERY: it carries no proof"), "{heard}");
    let doubt = InDoubt::recover(noted.into_inner().unwrap().unwrap());
    let outcome = Source::new(&[], &options).resolve(doubt, &connect(&address, LIMIT).unwrap());
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    let answer = acceptor.accept(wait()).unwrap();
    let Incoming::Answered { id: asked, decision: Decision::Committed } = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(asked, id);
}

#[test]
fn offers_and_questions_while_a_move_is_under_way_are_answered_and_do_not_disturb_it() {
    let ledger = Arc::new(Ledger::new());
    let acceptor = accepting(None, &ledger, SILENCE);
    let offer = opening(preface(PrefaceFlags::empty()), &[(Kind::OFFER, &an_offer())]);
    let first = says(&acceptor, &offer);
    let taken = offered(&acceptor);
    let reason = refusal(&mut says(&acceptor, &offer));
    assert!(reason.contains(&NoMove::Busy.to_string()), "{reason}");
    let question = opening(preface(PrefaceFlags::empty()), &[(Kind::QUERY, &[])]);
    assert_eq!(outcome(&mut says(&acceptor, &question)), 0);
    // When it has ended, another one is taken.
    let device = Hooked::new("there", FLAGS, &[]);
    let options = options();
    drop(first);
    let there = [MovedDevice::new(&device)];
    let received = Destination::new(&there, &ledger, &options).receive_offered(taken);
    assert!(matches!(received, Received::Discarded { .. }), "{received:?}");
    assert_eq!(device.state(), State::Running);
    assert!(matches!(acceptor.accept(wait()), Ok(Incoming::Answered { id: ID, .. })));
    let _second = says(&acceptor, &offer);
    drop(offered(&acceptor));
    // One that is only looked at leaves the place free as well.
    let _third = says(&acceptor, &offer);
    offered(&acceptor);
}

#[test]
fn a_process_that_only_answers_is_held_by_nobody_and_takes_no_move() {
    let ledger = Arc::new(Ledger::new());
    let acceptor = Acceptor::answering(bound(), None, ledger, &believing(SILENCE)).unwrap();
    let held: Vec<_> =
        (0..3).map(|_| says(&acceptor, &opening(preface(PrefaceFlags::empty()), &[]))).collect();
    let offer = opening(preface(PrefaceFlags::empty()), &[(Kind::OFFER, &an_offer())]);
    let reason = refusal(&mut says(&acceptor, &offer));
    assert!(reason.contains(&NoMove::Answers.to_string()), "{reason}");
    let question = opening(preface(PrefaceFlags::empty()), &[(Kind::QUERY, &[])]);
    assert_eq!(outcome(&mut says(&acceptor, &question)), 0);
    drop(held);
    // Over a link that somebody else has accepted, too.
    let (near, far) = SocketLink::pair().unwrap();
    let (done, answered) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || done.send(Ledger::new().answer(&far, &options(), None)).unwrap());
        let outcome = {
            let device = Hooked::new("source", FLAGS, &[7; 9]);
            Source::new(&[MovedDevice::new(&device)], &options()).send(&near)
        };
        let Outcome::Undone { why: Error::Aborted { reason, .. }, .. } = outcome else {
            panic!("{outcome:?}")
        };
        assert!(reason.contains(&NoMove::Answers.to_string()), "{reason}");
        let answered = answered.recv().unwrap();
        assert!(matches!(answered, Err(Error::NotTaken { why: NoMove::Answers })), "{answered:?}");
    });
}
