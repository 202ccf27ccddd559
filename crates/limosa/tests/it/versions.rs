//! Peers of other versions: what they cannot do together is said on both sides, and the source runs on.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use crate::support::{Ended, Folder, GUEST, limosa, start};
use limosa_stream::body::encode_abort;
use limosa_stream::{
    AbortCode, Answer, Decoded, Decoder, HEADER_BYTES, Header, Kind, MigrationId, Offer, PREFACE_BYTES,
    Preface, PrefaceFlags, VERSION,
};
use rustix::process::Signal;

fn preface(id: MigrationId, version: u16, oldest: u16) -> Vec<u8> {
    Preface { version, oldest, ..Preface::new(id, PrefaceFlags::empty()) }.encode().to_vec()
}

/// Sends to a made-up destination, which answers the preface with this; the source goes on.
fn send_to(folder: &Folder, answer: impl FnOnce(MigrationId) -> Vec<u8> + Send + 'static) -> Ended {
    let source = folder.device("source", &[]);
    source.mark(GUEST);
    let link = folder.text("link");
    let listener = UnixListener::bind(&link).unwrap();
    let peer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut decoder, mut piece) = (Decoder::new(), [0; 4096]);
        let id = loop {
            match decoder.next().unwrap() {
                Some(Decoded::Preface(preface)) => break preface.id,
                Some(_) => panic!("a preface is due"),
                None => {
                    let got = stream.read(&mut piece).unwrap();
                    decoder.push(&piece[..got]);
                }
            }
        };
        stream.write_all(&answer(id)).unwrap();
        // Until the other side is done.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let sent = limosa(&["send", &source.socket, "--to", &format!("unix:{link}")]);
    peer.join().unwrap();
    assert!(source.runs(GUEST), "{sent:?}");
    sent
}

#[test]
fn a_newer_destination_that_needs_more_than_this_source_knows_is_refused() {
    let sent = send_to(&Folder::new(), |id| preface(id, VERSION + 3, VERSION + 1));
    let needed = format!("of version {} and needs a reader of {} or newer", VERSION + 3, VERSION + 1);
    sent.fails(6, &[&needed, "the source is as it was before"]);
}

#[test]
fn an_older_destination_that_does_not_know_what_the_source_uses_is_believed() {
    let says = |uses: &'static str| {
        move |id| {
            let reason = format!("the stream uses {uses}, which this version does not know");
            let reason = encode_abort(AbortCode::Stream, &reason);
            let header = Header::new(Kind::ABORT, 0, 0, 0, &reason);
            [&preface(id, VERSION, VERSION)[..], &header.encode(), &reason].concat()
        }
    };
    let sent = send_to(&Folder::new(), says("flush"));
    sent.fails(1, &["called the move off", "the stream uses flush", "the source is as it was before"]);
    // This one can be moved to all the same.
    let sent = send_to(&Folder::new(), says("proofs"));
    sent.fails(3, &["it is of an older version", "--insecure", "the source is as it was before"]);
}

#[test]
fn a_newer_source_that_needs_more_than_this_destination_knows_is_told_and_passed_over() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    device.mark(GUEST);
    let link = folder.text("link");
    let receiver = start(&["receive", &device.socket, "--listen", &format!("unix:{link}")]);
    receiver.line("listening on");
    let mut source = UnixStream::connect(&link).unwrap();
    source.write_all(&preface(MigrationId([7; 16]), VERSION + 1, VERSION + 1)).unwrap();
    let mut answer = Vec::new();
    source.read_to_end(&mut answer).unwrap();
    let said = String::from_utf8_lossy(&answer);
    assert!(said.contains("needs a reader of"), "the source is told too: {said}");
    let named = receiver.line("passed over");
    assert!(named.contains("needs a reader of"), "{named}");
    // One that it knows is taken.
    let known = folder.device("known", &[]);
    known.mark(GUEST + 1);
    limosa(&["send", &known.socket, "--to", &format!("unix:{link}")]).ok();
    receiver.end().ok();
    assert!(device.runs(GUEST + 1));
}

/// What a source or a destination of the first versions would have sent: a move without secret and challenge.
fn as_older(kind: Kind, payload: &[u8]) -> Option<Vec<u8>> {
    match kind {
        Kind::OFFER => {
            let mut offer = Offer::decode(payload).unwrap();
            offer.secret = None;
            offer.needs.retain(|need| need != "proofs");
            Some(offer.encode().unwrap())
        }
        Kind::ANSWER => {
            let answer = Answer { challenge: None, ..Answer::decode(payload).unwrap() };
            Some(answer.encode().unwrap())
        }
        _ => None,
    }
}

/// Passes one direction of a link on, with OFFER and ANSWER as an older version writes them.
fn pass_as_older(mut from: UnixStream, mut to: UnixStream) -> std::io::Result<()> {
    let mut preface = [0; PREFACE_BYTES];
    from.read_exact(&mut preface)?;
    to.write_all(&preface)?;
    loop {
        let mut bytes = [0; HEADER_BYTES];
        from.read_exact(&mut bytes)?;
        let header = Header::decode(&bytes).unwrap();
        let mut payload = vec![0; header.length as usize];
        from.read_exact(&mut payload)?;
        if let Some(older) = as_older(header.kind, &payload) {
            let header = Header::new(header.kind, 0, 0, header.sequence, &older);
            (bytes, payload) = (header.encode(), older);
        }
        to.write_all(&[&bytes[..], &payload].concat())?;
    }
}

/// A move between two sides, each of which takes the other for one of an older version. `insecure` says which of them
/// believe such a peer. Returns how sender and receiver ended.
fn move_between_versions(
    folder: &Folder,
    insecure: [bool; 2],
) -> (Ended, Ended, [crate::support::Server; 2]) {
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    source.mark(GUEST);
    let (listen, between) = (folder.text("link"), folder.text("between"));
    let flag = |insecure: bool| if insecure { &["--insecure"][..] } else { &[] };
    let receive = ["receive", &destination.socket, "--listen", &format!("unix:{listen}")];
    let receiver = start(&[&receive[..], flag(insecure[1])].concat());
    receiver.line("listening on");
    let listener = UnixListener::bind(&between).unwrap();
    let relay = std::thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = UnixStream::connect(&listen).unwrap();
        let (near_again, far_again) = (near.try_clone().unwrap(), far.try_clone().unwrap());
        let there = std::thread::spawn(move || {
            let _ = pass_as_older(near_again, far_again.try_clone().unwrap());
            let _ = far_again.shutdown(Shutdown::Write);
        });
        // Until the receiver has ended it.
        let _ = pass_as_older(far, near.try_clone().unwrap());
        let _ = near.shutdown(Shutdown::Write);
        there.join().unwrap();
    });
    let send = ["send", &source.socket, "--to", &format!("unix:{between}")];
    let sent = limosa(&[&send[..], flag(insecure[0])].concat());
    if !insecure[1] {
        // It is the first to see the other, and goes on to wait for one that it believes.
        receiver.line("passed over");
        receiver.signal(Signal::INT);
    }
    let received = receiver.end();
    relay.join().unwrap();
    (sent, received, [source, destination])
}

#[test]
fn a_peer_of_an_older_version_is_refused_by_either_side_unless_it_is_to_be_believed() {
    for source_believes in [false, true] {
        let folder = Folder::new();
        let (sent, received, [source, destination]) =
            move_between_versions(&folder, [source_believes, false]);
        let why = ["its OFFER has no secret, so it is of an older version", "--insecure"];
        received.fails(7, &why);
        sent.fails(3, &[&why[..], &["the source is as it was before"]].concat());
        assert!(source.runs(GUEST) && !destination.runs(GUEST));
    }
    let folder = Folder::new();
    let (sent, received, [source, destination]) = move_between_versions(&folder, [false, true]);
    let why = ["its ANSWER has no challenge, so it is of an older version", "--insecure"];
    sent.fails(3, &[&why[..], &["the source is as it was before"]].concat());
    received.fails(3, &[&why[..], &["called the move off"]].concat());
    assert!(source.runs(GUEST) && !destination.runs(GUEST));

    let folder = Folder::new();
    let (sent, received, [source, destination]) = move_between_versions(&folder, [true, true]);
    sent.ok();
    received.ok();
    assert!(destination.runs(GUEST) && !source.runs(GUEST));
}
