//! Peers of other versions: what they cannot do together is said on both sides, and the source runs on.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use limosa_stream::body::encode_abort;
use limosa_stream::{AbortCode, Decoded, Decoder, Header, Kind, MigrationId, Preface, PrefaceFlags, VERSION};
use support::{Ended, Folder, limosa, start};

const GUEST: u64 = 0x6775_6573;

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
    let sent = send_to(&Folder::new(), |id| {
        let reason =
            encode_abort(AbortCode::Incompatible, "the stream uses flush, which this version does not know");
        let header = Header::new(Kind::ABORT, 0, 0, 0, &reason);
        [&preface(id, VERSION, VERSION)[..], &header.encode(), &reason].concat()
    });
    sent.fails(3, &["called the move off", "the stream uses flush", "the source is as it was before"]);
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
    assert!(device.runs(GUEST));
    // One that it knows is taken.
    let known = folder.device("known", &[]);
    known.mark(GUEST + 1);
    limosa(&["send", &known.socket, "--to", &format!("unix:{link}")]).ok();
    receiver.end().ok();
    assert!(device.runs(GUEST + 1));
}
