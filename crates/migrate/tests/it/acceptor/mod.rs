//! Clients of a listener that stay silent, or are not migrating, do not block those that are.

mod during_a_move;
mod silent;

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
