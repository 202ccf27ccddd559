//! The proxy between a real client and a real server, and between peers that do everything wrong.

mod common;

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use common::{Collected, Traced, collect};
use limosa_client::{Chunk, Device, DeviceExt, DmaMap, DmaMemory};
use limosa_foreign_fd::receive;
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State};
use limosa_trace::event::{Event, Outcome, Request, Transition};
use limosa_trace::proxy::relay;
use limosa_trace::sink::line;
use limosa_vfio_user::codec::{Command, Header};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zerocopy::IntoBytes;

fn is_feature(event: &Event, index: FeatureIndex, op: FeatureOp) -> bool {
    matches!(&event.request, Request::Feature { index: i, op: o, .. } if (*i, *o) == (index, op))
}

fn is_malformed(event: &&Event) -> bool {
    event.request == Request::Malformed
}

#[test]
fn a_clients_walk_is_traced_with_its_answers_and_what_was_refused() {
    let traced = Traced::start();
    let client = traced.client();
    client.set_state(State::Stop).unwrap();
    let mut stream = client.set_state(State::StopCopy).unwrap().unwrap();
    let mut data = vec![0; 1 << 16];
    while let Chunk::Data(_) = stream.read(&mut data).unwrap() {}
    assert!(client.set_state(State::PreCopy).is_err());
    drop(stream);
    drop(client);
    let events = traced.end();
    let arcs: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.request {
            Request::Feature { transition: Some(to), .. } => Some((to.to, &event.outcome)),
            _ => None,
        })
        .collect();
    assert!(arcs.iter().any(|(_, outcome)| **outcome == Outcome::Refused(Errno::EINVAL)), "{arcs:?}");
    let is_walk = |event: &&Event| {
        let Request::Feature { transition, .. } = &event.request else { return false };
        *transition == Some(Transition { from: Some(State::Stop), to: State::StopCopy })
    };
    let walk = events.iter().find(is_walk).unwrap_or_else(|| panic!("{events:#?}"));
    assert!(walk.duration_ns.is_some() && walk.pid == Some(std::process::id()), "{walk:?}");
    let shown = line(walk);
    assert!(shown.contains("FEATURE SET MIG_DEVICE_STATE STOP > STOP_COPY -> ok <"), "{shown}");
    assert!(events.iter().any(|event| is_feature(event, FeatureIndex::MIGRATION, FeatureOp::GET)));
    let bytes: u64 = events
        .iter()
        .filter(|event| event.request == Request::Named("MIG_DATA_READ"))
        .map(|event| event.bytes)
        .sum();
    assert!(bytes > 1 << 20, "{bytes} bytes of session data");
    assert_eq!(events.iter().filter(is_malformed).count(), 0, "{events:#?}");
}

#[test]
fn fds_are_passed_on_and_named() {
    let traced = Traced::start();
    let client = traced.client();
    let memory = limosa_testing::memfd_named("guest", 1 << 20);
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    let memory = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
    client.dma_map(&DmaMap { iova: 0x10_0000, size: 1 << 20, flags, memory }).unwrap();
    drop(client);
    let events = traced.end();
    let map = events.iter().find(|event| event.request == Request::Named("DMA_MAP")).unwrap();
    assert_eq!(map.outcome, Outcome::Done(String::new()), "{map:?}");
    assert!(map.fds.len() == 1 && map.fds[0].contains("memfd:guest"), "{map:?}");
    assert_eq!(map.arguments, "0x100000+0x100000 read+write offset 0x0");
}

/// A client and a server of the test's own, with a relay between them.
fn between(play: impl FnOnce(UnixStream, UnixStream)) -> Vec<Event> {
    let (client, ours) = UnixStream::pair().unwrap();
    let (theirs, server) = UnixStream::pair().unwrap();
    let Collected { recorder, events } = collect();
    let handle = recorder.handle();
    std::thread::scope(|scope| {
        scope.spawn(move || relay(1, &ours, &theirs, "device", &handle));
        play(client, server);
    });
    assert!(recorder.finish().is_empty());
    events()
}

fn reset(id: u16) -> Vec<u8> {
    Header::command(id, Command::DEVICE_RESET, 0).unwrap().as_bytes().to_vec()
}

#[test]
fn garbage_and_halves_are_passed_on_as_they_are_and_shown() {
    let garbage = b"GET / HTTP/1.1\r\nHost: of nobody\r\n\r\n".to_vec();
    let mut half = Header::command(1, Command::DEVICE_FEATURE, 40).unwrap().as_bytes().to_vec();
    half.extend([7; 11]);
    let mut tiny = reset(2);
    tiny[4..8].copy_from_slice(&3u32.to_ne_bytes());
    tiny.extend(b"and what follows");
    for (sent, said) in
        [(garbage, "message size"), (half, "ended within DEVICE_FEATURE"), (tiny, "size of 3")]
    {
        let events = between(|mut client, mut server| {
            client.write_all(&sent).unwrap();
            // Half a message is there although no other half comes.
            let mut got = vec![0; sent.len()];
            server.read_exact(&mut got).unwrap();
            assert_eq!(got, sent);
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
            // The other direction is open still.
            server.write_all(b"bye").unwrap();
            client.read_exact(&mut got[..3]).unwrap();
            assert_eq!(&got[..3], b"bye");
        });
        let malformed: Vec<_> = events.iter().filter(is_malformed).map(line).collect();
        assert!(malformed.iter().any(|line| line.contains(said)), "{said}: {malformed:?}");
    }
}

#[test]
fn fds_did_not_stay_with_the_message_they_were_sent_with() {
    let pipes: Vec<_> = (0..4).map(|_| rustix::pipe::pipe().unwrap()).collect();
    between(|client, server| {
        // Messages without fds are before, between and behind, and all may be there before the relay receives any.
        for (id, (_, write)) in (0u16..).step_by(3).zip(&pipes) {
            (&client).write_all(&[reset(id), reset(id + 1)].concat()).unwrap();
            let fds = [write.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            let message = reset(id + 2);
            sendmsg(&client, &[IoSlice::new(&message)], &mut control, SendFlags::empty()).unwrap();
        }
        for id in 0..12u16 {
            let (mut message, mut fds) = ([0; 16], Vec::new());
            let got = receive(&server, &mut message, RecvFlags::empty(), &mut fds).unwrap();
            assert_eq!((got.bytes, &message[..2]), (16, &id.to_ne_bytes()[..]));
            assert_eq!(fds.len(), usize::from(id % 3 == 2), "message {id}");
        }
    });
}

#[test]
fn the_death_of_one_side_ends_the_other() {
    for client_dies in [true, false] {
        let events = between(|client, server| {
            (&client).write_all(&reset(1)).unwrap();
            (&server).read_exact(&mut [0; 16]).unwrap();
            let (dies, mut other) = if client_dies { (client, server) } else { (server, client) };
            drop(dies);
            assert_eq!(other.read(&mut [0]).unwrap(), 0);
            drop(other);
        });
        let [reset] = &events[..] else { panic!("{events:#?}") };
        assert!(matches!(reset.outcome, Outcome::Unanswered(_)), "{reset:?}");
    }
}

#[test]
fn a_flood_is_held_back_by_its_receiver_and_none_of_it_is_lost() {
    const COUNT: u32 = 20_000;
    let events = between(|client, mut server| {
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for id in 0..COUNT {
                    (&client).write_all(&reset(id as u16)).unwrap();
                }
            });
            let mut message = [0; 16];
            for id in 0..COUNT {
                server.read_exact(&mut message).unwrap();
                assert_eq!(message[..2], (id as u16).to_ne_bytes());
            }
        });
    });
    assert_eq!(events.len(), COUNT as usize);
}

#[test]
fn a_server_that_is_not_there_is_named_and_its_clients_are_sent_away() {
    let traced = Traced::start();
    std::fs::remove_file(traced.back()).unwrap();
    let mut client = UnixStream::connect(traced.front()).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    let events = traced.end();
    let note = events.iter().find(|event| event.request == Request::Note).unwrap();
    let Outcome::Said(text) = &note.outcome else { panic!("{note:?}") };
    assert!(text.contains("device") && text.contains("No such file"), "{text}");
}
