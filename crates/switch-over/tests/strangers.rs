//! Peers that are no servers: silent ones, ones that end, and ones that say something else, on either side.

mod support;

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::Duration;

use limosa_switch_over::body::{Hello, Part};
use limosa_switch_over::frame::{HEADER_BYTES, Header, Kind};
use limosa_switch_over::{
    Cause, GiveLimits, GiveOptions, OldServer, PENDING_MAX, Peer, TakeLimits, TakeOptions, TakeOver, take,
};
use support::{TestGiver, TestTaker};

fn old() -> GiveOptions<'static> {
    GiveOptions { name: "old", limits: GiveLimits::default(), observer: None }
}

fn frame(kind: Kind, body: &[u8]) -> Vec<u8> {
    let header = Header { kind, length: body.len(), fds: 0 };
    [&header.encode()[..], body].concat()
}

fn read_frame(mut socket: &UnixStream) -> (Header, Vec<u8>) {
    let mut header = [0; HEADER_BYTES];
    socket.read_exact(&mut header).unwrap();
    let header = Header::decode(&header).unwrap();
    let mut payload = vec![0; header.length];
    socket.read_exact(&mut payload).unwrap();
    (header, payload)
}

/// A new server by hand: its channel, and the old server's HELLO.
fn reach(path: &Path) -> (UnixStream, UnixStream, Hello) {
    let door = UnixStream::connect(path).unwrap();
    let (header, payload) = read_frame(&door);
    assert_eq!((header.kind, header.fds), (Kind::Door, 1));
    let number = i32::from_le_bytes(*payload.first_chunk().unwrap());
    let channel = UnixStream::from(Peer::of(&door).unwrap().pull(number).unwrap());
    let (header, body) = read_frame(&channel);
    assert_eq!(header.kind, Kind::Hello);
    let hello = Hello::decode(&body).unwrap();
    (door, channel, hello)
}

/// Runs an old server, and a test beside it. The old server answers until a real new server has taken over.
fn beside(options: &GiveOptions, test: impl FnOnce(&Path) + Send) -> Vec<limosa_switch_over::Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("take-over");
    let take_over = TakeOver::listen(&path).unwrap();
    let giver = TestGiver::default();
    let limits = *options;
    thread::scope(|scope| {
        let path = &path;
        let new = scope.spawn(move || {
            test(path);
            let limits = TakeLimits { hello: Duration::from_secs(60), ..TakeLimits::default() };
            let options = TakeOptions { name: "new", limits, observer: None };
            take(OldServer::Path(path), TestTaker::default(), &options).unwrap();
        });
        let mut errors = Vec::new();
        loop {
            match take_over.serve_one(&giver, &limits, None) {
                Ok(_) => break,
                Err(error) => {
                    assert!(giver.serves.load(SeqCst));
                    errors.push(error);
                }
            }
        }
        new.join().unwrap();
        errors
    })
}

#[test]
fn silent_strangers_block_nobody() {
    let mut strangers = Vec::new();
    let limits = GiveLimits { hello: Duration::from_secs(3600), ..GiveLimits::default() };
    let errors = beside(&GiveOptions { limits, ..old() }, |path| {
        for _ in 0..2 * PENDING_MAX {
            let stranger = UnixStream::connect(path).unwrap();
            read_frame(&stranger);
            strangers.push(stranger);
        }
    });
    assert!(errors.is_empty(), "{errors:?}");
    // Each was closed: those above the bound, and the others as the real one came.
    for mut stranger in strangers {
        assert_eq!(stranger.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn a_stranger_that_says_nothing_for_too_long_is_closed() {
    let limits = GiveLimits { hello: Duration::from_millis(30), ..GiveLimits::default() };
    beside(&GiveOptions { limits, ..old() }, |path| {
        let mut stranger = UnixStream::connect(path).unwrap();
        read_frame(&stranger);
        assert_eq!(stranger.read(&mut [0]).unwrap(), 0);
    });
}

#[test]
fn strangers_that_say_something_else_change_nothing() {
    let wrong_token = Hello { token: [0; 16], sends_fds: false, name: "x".into() };
    let said: [Vec<u8>; 5] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0xff; 200],
        frame(Kind::Ready, &Part::Offer.encode()),
        frame(Kind::Hello, b"short"),
        frame(Kind::Hello, &wrong_token.encode()),
    ];
    let errors = beside(&old(), |path| {
        for said in &said {
            let (_door, mut channel, _) = reach(path);
            channel.write_all(said).unwrap();
            let mut rest = Vec::new();
            // Closed, with or without a reset for what was not read.
            let _ = channel.read_to_end(&mut rest);
        }
    });
    assert!(errors.is_empty(), "{errors:?}");
}

#[test]
fn a_new_server_that_ends_or_talks_nonsense_after_hello_is_an_error_of_its_step() {
    let errors = beside(&old(), |path| {
        for said in
            [&b""[..], &frame(Kind::Ready, &Part::Rest.encode()), &frame(Kind::Running, b""), &[9; 64]]
        {
            let (_door, mut channel, hello) = reach(path);
            channel.write_all(&frame(Kind::Hello, &hello.encode())).unwrap();
            let (word, _) = read_frame(&channel);
            assert_eq!((word.kind, word.fds), (Kind::Word, 1));
            channel.write_all(said).unwrap();
            channel.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = channel.read_to_end(&mut Vec::new());
        }
    });
    assert_eq!(errors.len(), 4, "{errors:?}");
    assert!(matches!(errors[0].cause, Cause::Ended));
    errors[1..].iter().for_each(|error| assert!(matches!(error.cause, Cause::Malformed(_)), "{error}"));
}

#[test]
fn a_new_server_that_says_that_it_runs_without_having_taken_is_not_believed() {
    let errors = beside(&old(), |path| {
        let (_door, mut channel, hello) = reach(path);
        channel.write_all(&frame(Kind::Hello, &hello.encode())).unwrap();
        for part in [Part::Offer, Part::Prepare] {
            channel.write_all(&frame(Kind::Ready, &part.encode())).unwrap();
        }
        channel.write_all(&frame(Kind::Running, b"")).unwrap();
        let _ = channel.read_to_end(&mut Vec::new());
    });
    assert!(matches!(errors[..], [limosa_switch_over::Error { cause: Cause::Withdrawn, .. }]), "{errors:?}");
}

#[test]
fn a_second_new_server_is_told_that_another_takes_over() {
    beside(&old(), |path| {
        let (_door, second, _) = reach(path);
        let (_first_door, mut first, hello) = reach(path);
        first.write_all(&frame(Kind::Hello, &hello.encode())).unwrap();
        let (refused, reason) = read_frame(&second);
        assert_eq!(refused.kind, Kind::Refused);
        assert!(String::from_utf8_lossy(&reason).contains("another new server is taking over"));
    });
}

/// An old server by hand.
fn pretend(serve: impl FnOnce(UnixStream) + Send) -> limosa_switch_over::Error {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("take-over");
    let listener = UnixListener::bind(&path).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || serve(listener.accept().unwrap().0));
        let limits = TakeLimits { hello: Duration::from_secs(5), ..TakeLimits::default() };
        let options = TakeOptions { name: "new", limits, observer: None };
        take(OldServer::Path(&path), TestTaker::default(), &options).unwrap_err()
    })
}

fn door(fd: i32, token: [u8; 16]) -> Vec<u8> {
    let mut bytes = Header { kind: Kind::Door, length: 20, fds: 1 }.encode().to_vec();
    bytes.extend(fd.to_le_bytes());
    bytes.extend(token);
    bytes
}

#[test]
fn a_channel_of_another_process_is_refused() {
    let error = pretend(|mut connection| {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let hello = Hello { token: [2; 16], sends_fds: false, name: "x".into() };
        ours.write_all(&frame(Kind::Hello, &hello.encode())).unwrap();
        connection.write_all(&door(theirs.as_raw_fd(), [1; 16])).unwrap();
        let _ = connection.read(&mut [0]);
    });
    assert!(matches!(error.cause, Cause::OtherProcess), "{error}");
}

#[test]
fn a_channel_that_is_no_socket_is_refused() {
    let file = Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
    let error = pretend(|mut connection| {
        connection.write_all(&door(file.as_raw_fd(), [1; 16])).unwrap();
        let _ = connection.read(&mut [0]);
    });
    assert!(error.to_string().contains("a UNIX stream socket"), "{error}");
    let error = pretend(|mut connection| {
        connection.write_all(&door(i32::MAX, [1; 16])).unwrap();
        let _ = connection.read(&mut [0]);
    });
    assert!(error.to_string().contains("which it does not have"), "{error}");
    let error = pretend(|mut connection| connection.write_all(b"HTTP/1.1 400 Bad Request\r\n").unwrap());
    assert!(error.to_string().contains("is it a take-over socket?"), "{error}");
}

/// It had its place until the limit for a new server's hello.
#[test]
fn a_client_that_says_something_at_the_door_is_no_new_server_and_ends() {
    let limits = GiveLimits { hello: Duration::from_secs(1000), ..GiveLimits::default() };
    let errors = beside(&GiveOptions { limits, ..old() }, |path| {
        let mut door = UnixStream::connect(path).unwrap();
        door.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        door.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        // What is sent before it is heard is DOOR. What is not read of it may be told by a reset.
        match door.read_to_end(&mut Vec::new()) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    });
    assert!(errors.is_empty(), "{errors:?}");
}
