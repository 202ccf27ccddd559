//! Strangers at a listener: whoever connects and has no move holds up nobody who has one.

use std::io::{IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::time::Duration;

use crate::common::{Ends, options, world};
use limosa_migrate::link::{
    Acceptor, Address, Incoming, Link, LinkError, Listener, PENDING_MAX, Tls, TlsLink, Wait, connect,
};
use limosa_migrate::{Cancel, Error, Options, Outcome, Received};
use limosa_protocol::MigrationFlags;
use limosa_stream::{MigrationId, Preface, PrefaceFlags};
use rcgen::{CertificateParams, KeyPair};

const LIMIT: Duration = Duration::from_secs(60);
/// So long that a test that waits for it fails by its own limit.
const SILENCE: Duration = Duration::from_secs(3600);

fn wait() -> Wait<'static> {
    Wait::within(LIMIT, None)
}

fn arrivals(tls: Option<Tls>, silence: Duration) -> Acceptor {
    let listener = Listener::bind(&Address::Tcp("127.0.0.1".into(), 0)).unwrap();
    Acceptor::new(listener, tls, silence).unwrap()
}

fn stranger(arrivals: &Acceptor) -> TcpStream {
    let Address::Tcp(host, port) = arrivals.address() else { panic!("{arrivals:?}") };
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

/// The next one, which has to be a stranger: what it did.
#[track_caller]
fn named(arrivals: &Acceptor) -> (String, Error) {
    match arrivals.next(wait()).unwrap() {
        Incoming::NotAPeer { peer, why } => (peer, why),
        Incoming::Peer(link) => panic!("{} sent a preface", link.peer()),
    }
}

/// A move over two links, with these silent ones before each of its links.
fn move_among(tls: Option<&Tls>, mut silent: impl FnMut(&Acceptor) + Send) {
    let (source, destination) = world("dev", MigrationFlags::SETS[3], 100_000);
    let mut ends = Ends::new(vec![source], vec![destination]);
    ends.options = Options { links: 2.try_into().unwrap(), ..options() };
    let arrivals = arrivals(tls.cloned(), SILENCE);
    silent(&arrivals);
    let link = || -> Result<Box<dyn Link>, LinkError> {
        let link = connect(arrivals.address(), LIMIT)?;
        Ok(match tls {
            Some(tls) => Box::new(TlsLink::connect(link, tls, arrivals.address(), wait())?),
            None => Box::new(link),
        })
    };
    let silent = std::sync::Mutex::new(silent);
    let next = |wait: Wait<'_>| match arrivals.next(wait)? {
        Incoming::Peer(link) => Ok(link),
        Incoming::NotAPeer { why, .. } => panic!("{why}"),
    };
    let (outcome, received) = std::thread::scope(|scope| {
        let received = scope.spawn(|| {
            let first = next(wait()).unwrap();
            ends.with_destination(|destination| destination.receive_over(&first, &next))
        });
        let further = |_: Wait<'_>| {
            (silent.lock().unwrap())(&arrivals);
            link()
        };
        let outcome = ends.with_source(|source| source.send_over(&link().unwrap(), &further));
        (outcome, received.join().unwrap())
    });
    let Outcome::Moved(report) = &outcome else { panic!("{outcome:?}") };
    assert_eq!(report.links.len(), 2, "{report:?}");
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert!(ends.check(outcome, received, "among strangers"));
}

#[test]
fn a_stranger_that_stays_silent_holds_up_no_move() {
    let mut strangers = Vec::new();
    move_among(None, |arrivals| {
        for words in [&b""[..], b"\x89LMSA\r\n"] {
            let mut silent = stranger(arrivals);
            silent.write_all(words).unwrap();
            strangers.push(silent);
        }
    });
    assert_eq!(strangers.len(), 4);
}

#[test]
fn a_stranger_that_stays_silent_before_or_after_the_tls_handshake_holds_up_no_move() {
    let folder = tempfile::tempdir().unwrap();
    let tls = tls(folder.path());
    let (mut before, mut after) = (Vec::new(), Vec::new());
    move_among(Some(&tls), |arrivals| {
        before.push(stranger(arrivals));
        // Only whoever accepts shakes hands.
        let (address, tls) = (arrivals.address().clone(), tls.clone());
        let link = connect(&address, LIMIT).unwrap();
        after.push(std::thread::spawn(move || {
            let link = TlsLink::connect(link, &tls, &address, wait())?;
            link.read(&mut [0], wait()).map(drop)
        }));
    });
    for silent in after {
        // In the end, when nobody listens any more; on a slow machine that may come before the handshake's end.
        let closed = silent.join().unwrap().unwrap_err();
        assert!(!matches!(closed, LinkError::TimedOut | LinkError::Cancelled), "{closed}");
    }
}

#[test]
fn of_too_many_strangers_the_one_that_was_silent_for_longest_goes() {
    let arrivals = arrivals(None, SILENCE);
    let mut strangers: Vec<_> = (0..=PENDING_MAX).map(|_| stranger(&arrivals)).collect();
    let first = strangers[0].local_addr().unwrap();
    let (peer, why) = named(&arrivals);
    assert_eq!(peer, format!("tcp:{first}"));
    assert!(matches!(why, Error::TimedOut { .. }), "{why}");
    assert!(why.to_string().contains("others came"), "{why}");
    assert_eq!(strangers[0].read(&mut [0]).unwrap(), 0, "it is closed");
    // All others may still speak.
    let preface = Preface::new(MigrationId([7; 16]), PrefaceFlags::empty()).encode();
    for late in strangers[1..].iter_mut().rev() {
        late.write_all(&preface).unwrap();
        let Incoming::Peer(link) = arrivals.next(wait()).unwrap() else { panic!("it sent a preface") };
        assert_eq!(link.peer(), format!("tcp:{}", late.local_addr().unwrap()));
        // It is read again, in whatever pieces, and then what comes behind it.
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
fn what_a_stranger_did_instead_is_named() {
    let arrivals = arrivals(None, SILENCE);
    for (words, part) in [
        (&b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"[..], "not a Limosa stream"),
        (b"\x16\x03\x01\x02\x00\x01", "it speaks TLS"),
        (b"\x89LM", "closed by the other end"),
        (b"", "closed by the other end"),
    ] {
        let mut stranger = stranger(&arrivals);
        stranger.write_all(words).unwrap();
        stranger.shutdown(Shutdown::Write).unwrap();
        let (peer, why) = named(&arrivals);
        assert_eq!(peer, format!("tcp:{}", stranger.local_addr().unwrap()));
        assert!(why.to_string().contains(part), "{part}: {why}");
    }
    // Whatever is wrong with a preface is for whoever takes the link.
    let mut newer = stranger(&arrivals);
    let mut preface = Preface::new(MigrationId([7; 16]), PrefaceFlags::empty()).encode();
    preface[20] ^= 1;
    newer.write_all(&preface).unwrap();
    assert!(matches!(arrivals.next(wait()), Ok(Incoming::Peer(_))));
}

#[test]
fn who_is_silent_for_too_long_is_closed_and_named() {
    let arrivals = arrivals(None, Duration::from_millis(1));
    let mut silent = stranger(&arrivals);
    let (_, why) = named(&arrivals);
    assert!(matches!(why, Error::TimedOut { doing: "waiting for the preface", .. }), "{why}");
    // It is told why before it is closed.
    assert!(silent.read_to_end(&mut Vec::new()).unwrap() > 0);
}

#[test]
fn a_wait_for_arrivals_ends_at_its_deadline_at_a_cancel_and_without_leaving_anybody() {
    let arrivals = arrivals(None, SILENCE);
    let mut silent = stranger(&arrivals);
    let soon = Wait::within(Duration::from_millis(5), None);
    assert!(matches!(arrivals.next(soon), Err(LinkError::TimedOut)));
    let cancel = Cancel::new().unwrap();
    cancel.cancel();
    let cancelled = Wait::within(LIMIT, Some(&cancel));
    assert!(matches!(arrivals.next(cancelled), Err(LinkError::Cancelled)));
    drop(arrivals);
    assert_eq!(silent.read(&mut [0]).unwrap_or(0), 0);
}
