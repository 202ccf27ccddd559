//! Messages in any number of pieces, with fds and without, and what a peer may do wrong.

use std::convert::Infallible;
use std::fs::File;
use std::io::{IoSlice, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use zerocopy::IntoBytes;

use super::*;
use crate::codec::{Command, Header};
use crate::version::MSG_FDS_MAX;

fn pair() -> (Receiver, Sender, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (receiver, sender) = split(ours, waits(20_000)).unwrap();
    (receiver, sender, theirs)
}

/// Sleeps of so many milliseconds at a time.
fn waits(sleep: u64) -> Waits {
    Waits { message: Duration::from_secs(20), sleep: Duration::from_millis(sleep) }
}

/// Sends as a client does, with a deadline.
fn send_by(
    sender: &Sender,
    parts: &mut [IoSlice<'_>],
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<(), ConnectionError> {
    sender.send_with(parts, fds, || sender.wait_writable(deadline))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn message(id: u16, body: &[u8]) -> Vec<u8> {
    let header = Header::command(id, Command::DMA_MAP, body.len()).unwrap();
    [header.as_bytes(), body].concat()
}

/// One send of the peer's, bypassing the code under test.
fn send(to: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = rustix::net::sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}

/// A file that says which it is.
fn file(name: u8) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[name]).unwrap();
    file.into()
}

fn names(fds: Fds) -> Vec<u8> {
    fds.fds
        .into_iter()
        .map(|fd| {
            assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
            let mut file = File::from(fd.into_inner());
            file.rewind().unwrap();
            let mut name = [0];
            file.read_exact(&mut name).unwrap();
            name[0]
        })
        .collect()
}

/// Receives one whole message.
fn receive(receiver: &mut Receiver) -> (u16, Vec<u8>, Vec<u8>) {
    let header = receiver.next(Some(soon())).unwrap();
    let mut body = vec![0; receiver.body_left()];
    let bytes = body.len();
    assert_eq!(receiver.read(&mut body, Some(soon())), Ok(bytes));
    let fds = receiver.fds();
    assert!(!fds.truncated);
    (header.id, body, names(fds))
}

#[test]
fn pipelined_messages_keep_their_fds() {
    let (mut receiver, _sender, peer) = pair();
    let (a, b, c) = (file(b'a'), file(b'b'), file(b'c'));
    send(&peer, &message(1, b"one"), &[]);
    send(&peer, &message(2, b"two"), &[a.as_fd()]);
    send(&peer, &message(3, b"three"), &[]);
    send(&peer, &message(4, b"four"), &[b.as_fd(), c.as_fd()]);
    send(&peer, &message(5, b"five"), &[]);
    assert_eq!(receive(&mut receiver), (1, b"one".to_vec(), b"".to_vec()));
    assert_eq!(receive(&mut receiver), (2, b"two".to_vec(), b"a".to_vec()));
    assert_eq!(receive(&mut receiver), (3, b"three".to_vec(), b"".to_vec()));
    assert_eq!(receive(&mut receiver), (4, b"four".to_vec(), b"bc".to_vec()));
    assert_eq!(receive(&mut receiver), (5, b"five".to_vec(), b"".to_vec()));
}

#[test]
fn a_header_alone_may_bring_the_fds_and_so_may_the_body() {
    let (mut receiver, _sender, peer) = pair();
    let (a, b) = (file(b'a'), file(b'b'));
    let first = message(1, b"body");
    let second = message(2, &[7; 20000]);
    send(&peer, &message(0, b""), &[a.as_fd()]);
    send(&peer, &first[..16], &[a.as_fd()]);
    send(&peer, &first[16..], &[]);
    send(&peer, &second[..5], &[]);
    send(&peer, &second[5..100], &[]);
    send(&peer, &second[100..], &[b.as_fd()]);
    assert_eq!(receive(&mut receiver), (0, b"".to_vec(), b"a".to_vec()));
    assert_eq!(receive(&mut receiver), (1, b"body".to_vec(), b"a".to_vec()));
    assert_eq!(receive(&mut receiver), (2, vec![7; 20000], b"b".to_vec()));
}

#[test]
fn a_part_of_a_header_may_bring_the_fds() {
    let (mut receiver, _sender, peer) = pair();
    let a = file(b'a');
    let second = message(2, b"x");
    send(&peer, &message(1, b"one"), &[]);
    send(&peer, &second[..3], &[a.as_fd()]);
    assert_eq!(receive(&mut receiver), (1, b"one".to_vec(), b"".to_vec()));
    send(&peer, &second[3..], &[]);
    assert_eq!(receive(&mut receiver), (2, b"x".to_vec(), b"a".to_vec()));
}

#[test]
fn fds_that_nobody_wants_are_closed() {
    let (mut receiver, _sender, peer) = pair();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    send(&peer, &message(1, b"one"), &[writer.as_fd()]);
    drop(writer);
    send(&peer, &message(2, b"two"), &[]);
    receiver.next(Some(soon())).unwrap();
    assert_eq!(receive(&mut receiver), (2, b"two".to_vec(), b"".to_vec()));
    // The end of the pipe is reached once nobody holds its other end.
    assert_eq!(File::from(reader).read(&mut [0]).unwrap(), 0);
}

#[test]
fn fds_beyond_the_limit_are_closed_and_said_to_be() {
    let (mut receiver, _sender, peer) = pair();
    let fd = file(b'a');
    let many = vec![fd.as_fd(); MSG_FDS_MAX + 20];
    send(&peer, &message(1, b"one"), &many);
    send(&peer, &message(2, b"two"), &many[..MSG_FDS_MAX]);
    receiver.next(Some(soon())).unwrap();
    receiver.head(3, Some(soon())).unwrap();
    let fds = receiver.fds();
    assert!(fds.truncated);
    assert!(fds.fds.len() <= MSG_FDS_MAX + 4);
    assert_eq!(receive(&mut receiver).2.len(), MSG_FDS_MAX, "the next message is not touched by it");
}

#[test]
fn fds_in_every_piece_of_a_message_are_bounded() {
    let (mut receiver, _sender, peer) = pair();
    let fd = file(b'a');
    let long = message(1, &[0; 1000]);
    for piece in long.chunks(16) {
        send(&peer, piece, &[fd.as_fd(); MSG_FDS_MAX]);
    }
    receiver.next(Some(soon())).unwrap();
    receiver.head(1000, Some(soon())).unwrap();
    let fds = receiver.fds();
    assert!(fds.truncated && fds.fds.len() <= 4 * MSG_FDS_MAX);
}

#[test]
fn what_is_left_of_a_body_is_thrown_away() {
    let (mut receiver, _sender, peer) = pair();
    let writer = std::thread::spawn(move || {
        let mut peer = peer;
        for id in 0..5 {
            peer.write_all(&message(id, &vec![1; usize::from(id) * 100_000])).unwrap();
        }
    });
    for id in 0..5 {
        assert_eq!(receiver.next(Some(soon())).unwrap().id, id);
        assert_eq!(receiver.body_left(), usize::from(id) * 100_000);
        receiver.head(3, Some(soon())).unwrap();
        receiver.consume(1);
    }
    let end = receiver.next(Some(soon()));
    assert_eq!(end, Err(ConnectionError::Closed));
    writer.join().unwrap();
}

#[test]
fn a_peer_that_goes_within_a_message_is_told_from_one_that_goes_between() {
    for cut in [1, 15, 16, 18] {
        let (mut receiver, _sender, peer) = pair();
        send(&peer, &message(1, b"body")[..cut], &[]);
        drop(peer);
        let end = loop {
            match receiver.next(Some(soon())) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert_eq!(end, ConnectionError::Cut, "after {cut} bytes");
    }
}

#[test]
fn a_size_below_the_header_is_a_message_without_a_body() {
    let (mut receiver, _sender, peer) = pair();
    let header = Header { size: 3, ..Header::command(1, Command::VERSION, 0).unwrap() };
    send(&peer, header.as_bytes(), &[]);
    send(&peer, &message(2, b"two"), &[]);
    let got = receiver.next(Some(soon())).unwrap();
    assert!(got == header && got.body_bytes().is_err() && receiver.body_left() == 0);
    assert_eq!(receive(&mut receiver), (2, b"two".to_vec(), b"".to_vec()));
}

#[test]
fn a_peer_that_stalls_within_a_message_is_given_up_without_a_deadline() {
    for cut in [5, 16, 18] {
        let (ours, peer) = UnixStream::pair().unwrap();
        let short = Duration::from_millis(1);
        let (mut receiver, _sender) = split(ours, Waits { message: short, sleep: short }).unwrap();
        send(&peer, &message(1, b"body")[..cut], &[]);
        let end = receiver.next(None).and_then(|_| receiver.read(&mut [0; 4], None));
        assert_eq!(end, Err(ConnectionError::Stalled), "after {cut} bytes");
    }
}

#[test]
fn a_peer_that_drips_is_given_up_even_though_no_wait_is_long() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let waits = Waits { message: Duration::from_millis(20), sleep: Duration::from_secs(20) };
    let (mut receiver, _sender) = split(ours, waits).unwrap();
    let header = Header::command(1, Command::DMA_MAP, 1 << 30).unwrap();
    let dripping = std::thread::spawn(move || {
        let mut drops = header.as_bytes().chunks(1).chain(std::iter::repeat(&[0][..]));
        // Until the other side has hung up.
        drops.find_map(|drop| peer.write_all(drop).err())
    });
    let taken = receiver.next(None).and_then(|_| {
        loop {
            let bytes = receiver.head(Receiver::BUFFER_BYTES, None)?.len();
            receiver.consume(bytes);
        }
    });
    let Err(end): Result<Infallible, _> = taken;
    assert_eq!(end, ConnectionError::Stalled);
    drop((receiver, _sender));
    dripping.join().unwrap();
}

#[test]
fn a_deadline_holds_within_a_message_that_drips() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let waits = Waits { message: Duration::from_secs(3600), sleep: Duration::from_secs(20) };
    let (mut receiver, _sender) = split(ours, waits).unwrap();
    let header = Header::command(1, Command::DMA_MAP, 1 << 30).unwrap();
    let dripping = std::thread::spawn(move || {
        let mut drops = header.as_bytes().chunks(1).chain(std::iter::repeat(&[0][..]));
        drops.find_map(|drop| peer.write_all(drop).err())
    });
    receiver.next(Some(soon())).unwrap();
    let deadline = || Some(Instant::now() + Duration::from_millis(20));
    assert_eq!(receiver.read(&mut vec![0; 1 << 30], deadline()), Err(ConnectionError::TimedOut));
    assert_eq!(receiver.next(deadline()), Err(ConnectionError::TimedOut), "while the rest is skipped");
    assert_eq!(receiver.next_until(Instant::now() + Duration::from_millis(20)), Ok(None));
    drop((receiver, _sender));
    dripping.join().unwrap();
}

#[test]
fn a_peer_that_takes_a_message_in_drips_is_given_up() {
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let waits = Waits { message: Duration::from_millis(20), sleep: Duration::from_secs(20) };
    let (receiver, sender) = split(ours, waits).unwrap();
    let taking = std::thread::spawn(move || while matches!(peer.read(&mut [0]), Ok(1)) {});
    let long = message(1, &vec![0; 64 << 20]);
    assert_eq!(sender.send(&mut [IoSlice::new(&long)], &[]), Err(ConnectionError::Stalled));
    let next = sender.send(&mut [IoSlice::new(&message(2, b""))], &[]);
    assert_eq!(next, Err(ConnectionError::Closed), "nothing may follow half a message");
    drop((receiver, sender));
    taking.join().unwrap();
    // Nor is one that never has room for long, but for the pieces of a message.
    let (ours, mut peer) = UnixStream::pair().unwrap();
    let (receiver, sender) = split(ours, waits).unwrap();
    let taking = std::thread::spawn(move || while matches!(peer.read(&mut [0; 16]), Ok(1..)) {});
    let mut sending = sender.hold();
    let end = (0..1 << 20).find_map(|_| sending.send(&mut [IoSlice::new(&long[..65536])], &[]).err());
    assert_eq!(end, Some(ConnectionError::Stalled));
    drop(sending);
    sender.shutdown();
    drop((receiver, sender));
    taking.join().unwrap();
}

#[test]
fn no_message_until_an_instant_is_no_error() {
    let (mut receiver, _sender, peer) = pair();
    assert_eq!(receiver.next_until(Instant::now()), Ok(None));
    send(&peer, &message(1, b"one"), &[]);
    assert_eq!(receiver.next_until(soon()).unwrap().unwrap().id, 1);
    send(&peer, &message(2, b"two"), &[]);
    assert_eq!(receiver.next_until(Instant::now()), Ok(None), "too late is too late");
    assert_eq!(receiver.next_until(soon()).unwrap().unwrap().id, 2);
}

#[test]
fn small_replies_are_bounded_by_their_number() {
    let (_receiver, sender, _peer) = pair();
    let one = message(1, b"");
    let kept = (0..1 << 20).take_while(|_| sender.reply(&mut [IoSlice::new(&one)]).is_ok()).count();
    assert!(kept < 1 << 20);
    assert_eq!(sender.reply(&mut [IoSlice::new(&one)]), Err(ConnectionError::Backlog));
}

#[test]
fn receiving_goes_on_after_a_deadline() {
    let (ours, peer) = UnixStream::pair().unwrap();
    let (mut receiver, _sender) = split(ours, waits(1)).unwrap();
    let bytes = message(1, &[9; 100]);
    let now = Some(Instant::now());
    assert_eq!(receiver.next(now), Err(ConnectionError::TimedOut));
    send(&peer, &bytes[..10], &[]);
    assert_eq!(receiver.next(now), Err(ConnectionError::TimedOut));
    send(&peer, &bytes[10..40], &[]);
    assert_eq!(receiver.next(now).unwrap().id, 1);
    assert_eq!(receiver.read(&mut [0; 100], now), Err(ConnectionError::TimedOut));
    assert_eq!(receiver.next(now), Err(ConnectionError::TimedOut));
    send(&peer, &bytes[40..], &[]);
    send(&peer, &message(2, b""), &[]);
    assert_eq!(receiver.next(Some(soon())).unwrap().id, 2);
}

#[test]
fn a_message_longer_than_the_sockets_buffer_arrives_whole() {
    let (mut receiver, _s, peer) = pair();
    let (_r, sender) = split(peer, waits(20_000)).unwrap();
    let body: Vec<u8> = (0..20_000_000u32).map(|n| n as u8).collect();
    let want = body.clone();
    let a = file(b'a');
    let sending = std::thread::spawn(move || {
        let header = Header::command(1, Command::MIG_DATA_WRITE, body.len()).unwrap();
        let mut parts = [IoSlice::new(header.as_bytes()), IoSlice::new(&[]), IoSlice::new(&body)];
        send_by(&sender, &mut parts, &[a.as_fd()], soon()).unwrap();
        sender
    });
    assert_eq!(receive(&mut receiver), (1, want, b"a".to_vec()));
    drop(sending.join().unwrap());
}

#[test]
fn a_message_that_cannot_be_finished_ends_the_connection() {
    let (_receiver, sender, mut peer) = pair();
    let body = vec![0; 20_000_000];
    let header = Header::command(1, Command::MIG_DATA_WRITE, body.len()).unwrap();
    let mut parts = [IoSlice::new(header.as_bytes()), IoSlice::new(&body)];
    assert_eq!(send_by(&sender, &mut parts, &[], Instant::now()), Err(ConnectionError::TimedOut));
    assert_eq!(
        send_by(&sender, &mut [IoSlice::new(&message(2, b""))], &[], soon()),
        Err(ConnectionError::Closed),
        "nothing may follow half a message"
    );
    let mut all = Vec::new();
    peer.read_to_end(&mut all).unwrap();
    assert!(!all.is_empty() && all.len() < body.len());
}

#[test]
fn replies_are_kept_in_order_and_bounded() {
    let (_receiver, sender, peer) = pair();
    let (mut receiver, _s) = split(peer, waits(20_000)).unwrap();
    let body = vec![0; 1 << 20];
    let header = |id| Header::command(id, Command::DMA_READ, body.len()).unwrap();
    let mut kept = 0;
    let end = loop {
        let header = header(kept);
        match sender.reply(&mut [IoSlice::new(header.as_bytes()), IoSlice::new(&body)]) {
            Ok(()) => kept += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(end, ConnectionError::Backlog);
    assert!(sender.keeps() && usize::from(kept) <= 32 + (Sender::KEPT_BYTES_MAX >> 20));
    let sending = std::thread::spawn(move || {
        // An ordinary message comes after everything that was kept.
        send_by(&sender, &mut [IoSlice::new(&message(9999, b"last"))], &[], soon()).unwrap();
        assert!(!sender.keeps());
        sender
    });
    for id in 0..kept {
        let (got, data, _) = receive(&mut receiver);
        assert_eq!((got, data.len()), (id, body.len()));
    }
    assert_eq!(receive(&mut receiver).0, 9999);
    drop(sending.join().unwrap());
}

#[test]
fn too_many_fds_are_not_sent() {
    let (_receiver, sender, _peer) = pair();
    let fd = file(b'a');
    let many = vec![fd.as_fd(); MSG_FDS_MAX + 1];
    assert_eq!(
        send_by(&sender, &mut [IoSlice::new(&message(1, b""))], &many, soon()),
        Err(ConnectionError::Fds(MSG_FDS_MAX + 1))
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// However the peer cuts its messages, each arrives with its own fds.
    #[test]
    fn any_segmentation_gives_the_same_messages(
        bodies in prop::collection::vec((0usize..12_000, 0u8..3), 1..8),
        cuts in prop::collection::vec(1usize..9000, 1..40),
        read_all in any::<bool>(),
    ) {
        let (mut receiver, _sender, peer) = pair();
        let fd = file(b'f');
        let sending = std::thread::spawn({
            let bodies = bodies.clone();
            move || {
                let mut cuts = cuts.into_iter().cycle();
                for (id, (bytes, fds)) in bodies.into_iter().enumerate() {
                    let message = message(id as u16, &vec![id as u8; bytes]);
                    // The first piece brings the fds.
                    let mut rest = &message[..];
                    let mut fds = vec![fd.as_fd(); usize::from(fds)];
                    while !rest.is_empty() {
                        let (piece, after) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                        send(&peer, piece, &fds);
                        fds.clear();
                        rest = after;
                    }
                }
                peer
            }
        });
        for (id, (bytes, fds)) in bodies.into_iter().enumerate() {
            if read_all || id % 2 == 0 {
                let (got, body, names) = receive(&mut receiver);
                prop_assert_eq!((usize::from(got), names.len()), (id, usize::from(fds)));
                prop_assert_eq!(body, vec![id as u8; bytes]);
            } else {
                prop_assert_eq!(usize::from(receiver.next(Some(soon())).unwrap().id), id);
            }
        }
        sending.join().unwrap();
    }
}
