//! Clients of a listener that stay silent, or are not migrating, do not block those that are.

use std::io::{IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::time::Duration;

use crate::common::{Ends, options, world};
use limosa_migrate::link::{
    Address, Connector, FurtherLinks, Link, LinkError, Listener, Tls, TlsLink, Wait, connect,
};
use limosa_migrate::{Acceptor, Cancel, Error, Incoming, Outcome, PENDING_MAX, Received};
use limosa_protocol::MigrationFlags;
use limosa_stream::{MigrationId, Preface, PrefaceFlags};
use rcgen::{CertificateParams, KeyPair};

const LIMIT: Duration = Duration::from_secs(60);
/// So long that a test that waits for it fails by its own limit.
const SILENCE: Duration = Duration::from_secs(3600);

fn wait() -> Wait<'static> {
    Wait::within(LIMIT, None)
}

fn listening(tls: Option<Tls>, silence: Duration) -> Acceptor {
    let listener = Listener::bind(&Address::Tcp("127.0.0.1".into(), 0)).unwrap();
    Acceptor::new(listener, tls, silence).unwrap()
}

fn connected(acceptor: &Acceptor) -> TcpStream {
    let Address::Tcp(host, port) = acceptor.address() else { panic!("{acceptor:?}") };
    let stream = TcpStream::connect((host.as_str(), *port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// One certificate for both sides, which is its own authority.
fn tls(folder: &Path) -> Tls {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(["both".to_owned()]).unwrap().self_signed(&key).unwrap();
    let (pem, key_pem) = (folder.join("both"), folder.join("key"));
    std::fs::write(&pem, certificate.pem()).unwrap();
    std::fs::write(&key_pem, key.serialize_pem()).unwrap();
    Tls::load(&pem, &pem, &key_pem, Some("both")).unwrap()
}

/// What the next client did, which must not be a peer.
#[track_caller]
fn named(acceptor: &Acceptor) -> (String, Error) {
    match acceptor.accept(wait()).unwrap() {
        Incoming::NotAPeer { peer, why } => (peer, why),
        Incoming::Peer(link) => panic!("{} sent a preface", link.peer()),
    }
}

/// A move over two links, with these silent clients before each of its links.
fn move_among(tls: Option<&Tls>, mut silent: impl FnMut(&Acceptor) + Send) {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 100_000);
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.options = options().with_links(2.try_into().unwrap());
    let acceptor = listening(tls.cloned(), SILENCE);
    silent(&acceptor);
    let mut connector = Connector::new(acceptor.address().clone());
    if let Some(tls) = tls {
        connector = connector.with_tls(tls.clone());
    }
    let silent = std::sync::Mutex::new(silent);
    let (outcome, received) = std::thread::scope(|scope| {
        let received = scope.spawn(|| {
            let first = acceptor.next(wait()).unwrap();
            ends.with_destination(|destination| destination.receive_over(&first, &acceptor))
        });
        let further = |wait: Wait<'_>| {
            (silent.lock().unwrap())(&acceptor);
            connector.connect(wait)
        };
        let first = connector.connect(wait()).unwrap();
        let outcome = ends.with_source(|source| source.send_over(&first, &further));
        (outcome, received.join().unwrap())
    });
    let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
    assert_eq!(report.links.len(), 2, "{report:?}");
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert!(ends.check(outcome, received, "among silent clients"));
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
fn of_too_many_clients_the_one_that_was_silent_for_longest_is_closed() {
    let acceptor = listening(None, SILENCE);
    let mut clients: Vec<_> = (0..=PENDING_MAX).map(|_| connected(&acceptor)).collect();
    let first = clients[0].local_addr().unwrap();
    let (peer, why) = named(&acceptor);
    assert_eq!(peer, format!("tcp:{first}"));
    assert!(matches!(why, Error::TimedOut { .. }), "{why}");
    assert!(why.to_string().contains("more clients connected"), "{why}");
    assert_eq!(clients[0].read(&mut [0]).unwrap(), 0, "it is closed");
    // All others can still send their preface.
    let preface = Preface::new(MigrationId([7; 16]), PrefaceFlags::empty()).encode();
    for late in clients[1..].iter_mut().rev() {
        late.write_all(&preface).unwrap();
        let Incoming::Peer(link) = acceptor.accept(wait()).unwrap() else { panic!("it sent a preface") };
        assert_eq!(link.peer(), format!("tcp:{}", late.local_addr().unwrap()));
        // The preface is read again, in pieces of any size, and then the data behind it.
        late.write_all(b"more").unwrap();
        let (mut bytes, mut filled) = ([0; 44], 0);
        while filled < bytes.len() {
            let end = bytes.len().min(filled + 7);
            filled += link.read(&mut bytes[filled..end], wait()).unwrap();
        }
        assert_eq!((&bytes[..40], &bytes[40..]), (&preface[..], &b"more"[..]));
        link.write(&[IoSlice::new(b"back")], wait()).unwrap();
        link.finish();
        let mut back = String::new();
        late.read_to_string(&mut back).unwrap();
        assert_eq!(back, "back");
    }
}

#[test]
fn an_error_says_what_a_client_did_instead() {
    let acceptor = listening(None, SILENCE);
    for (words, part) in [
        (&b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"[..], "not a Limosa stream"),
        (b"\x16\x03\x01\x02\x00\x01", "it speaks TLS"),
        (b"\x89LM", "closed by the other end"),
        (b"", "closed by the other end"),
    ] {
        let mut client = connected(&acceptor);
        client.write_all(words).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let (peer, why) = named(&acceptor);
        assert_eq!(peer, format!("tcp:{}", client.local_addr().unwrap()));
        assert!(why.to_string().contains(part), "{part}: {why}");
    }
    // A damaged preface is reported by the code that uses the link.
    let mut newer = connected(&acceptor);
    let mut preface = Preface::new(MigrationId([7; 16]), PrefaceFlags::empty()).encode();
    preface[20] ^= 1;
    newer.write_all(&preface).unwrap();
    assert!(matches!(acceptor.accept(wait()), Ok(Incoming::Peer(_))));
}

#[test]
fn a_client_that_is_silent_for_too_long_is_told_why_and_closed() {
    let acceptor = listening(None, Duration::from_millis(1));
    let mut silent = connected(&acceptor);
    let (_, why) = named(&acceptor);
    assert!(matches!(why, Error::TimedOut { doing: "waiting for the preface", .. }), "{why}");
    // It gets the reason before it is closed.
    assert!(silent.read_to_end(&mut Vec::new()).unwrap() > 0);
}

#[test]
fn a_wait_for_a_client_ends_at_its_deadline_and_at_a_cancel_and_the_end_closes_pending_clients() {
    let acceptor = listening(None, SILENCE);
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

#[test]
fn a_client_that_is_not_a_peer_is_passed_over_by_the_wait_for_a_further_link() {
    let acceptor = listening(None, SILENCE);
    let mut client = connected(&acceptor);
    client.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n").unwrap();
    let soon = Wait::within(Duration::from_millis(50), None);
    assert!(matches!(acceptor.next(soon), Err(LinkError::TimedOut)));
    let mut peer = connected(&acceptor);
    peer.write_all(&Preface::new(MigrationId([7; 16]), PrefaceFlags::FURTHER).encode()).unwrap();
    let link = acceptor.next(wait()).unwrap();
    assert_eq!(link.peer(), format!("tcp:{}", peer.local_addr().unwrap()));
}
