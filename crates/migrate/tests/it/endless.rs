//! Devices whose data has no end, and hostile peers: the guest goes on within its limits.

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::hooked::{Hooked, MadeUp, ends_in_time, move_over_a_link};
use crate::common::options;
use limosa_client::Chunk;
use limosa_migrate::link::{Link, LinkError, SocketLink, Wait};
use limosa_migrate::{
    AfterLoad, AfterSave, Destination, Error, Ledger, Misbehaviour, MovedDevice, Options, Outcome, Received,
    SnapshotFile, Source, Vmm,
};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{MigrationFlags, State};
use limosa_vfio_user::client::{self, Client};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

const MIB: u64 = 1 << 20;

/// Gives as much as is read.
struct Endless;

impl MadeUp for Endless {
    fn read(&self, _stopped: bool, into: &mut [u8]) -> Chunk {
        Chunk::Data(into.len())
    }
    fn info(&self) -> PrecopyInfo {
        PrecopyInfo { dirty_bytes: 1 << 40, ..PrecopyInfo::default() }
    }
}

/// Whether the vCPUs run.
#[derive(Default)]
struct Vcpus {
    stopped: AtomicBool,
    resumed: AtomicBool,
}

impl Vmm for Vcpus {
    fn stop(&self) -> Result<(), String> {
        self.stopped.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn resume(&self) {
        self.resumed.store(true, Ordering::SeqCst);
    }
}

fn small() -> Options {
    options().with_state_max(Some(MIB))
}

#[track_caller]
fn assert_endless(why: &Error, device: &str) {
    let Error::DeviceMisbehaved { device: found, how: Misbehaviour::Endless(MIB) } = why else {
        panic!("{why}");
    };
    assert_eq!(found, device);
    assert!(why.to_string().contains("--state-max"), "{why}");
}

#[test]
fn a_device_without_an_end_undoes_the_move_whether_it_is_stopped_or_not() {
    for flags in [MigrationFlags::SETS[0], MigrationFlags::SETS[3]] {
        let source = Hooked::new("endless", flags, &[]).making_up(Arc::new(Endless));
        let destination = Hooked::new("here", flags, &[]);
        let (vmm, ledger, options) = (Vcpus::default(), Ledger::new(), small());
        let (from, to) = ([MovedDevice::new(&source)], [MovedDevice::new(&destination)]);
        let moved = Source::new(&from, &options).with_vmm(&vmm);
        let unlimited = crate::common::options();
        let (outcome, received) = move_over_a_link(moved, Destination::new(&to, &ledger, &unlimited));
        let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
        assert_endless(&why, "endless");
        assert!(matches!(received, Received::Discarded { .. }));
        assert_eq!(vmm.stopped.load(Ordering::SeqCst), vmm.resumed.load(Ordering::SeqCst));
        assert_eq!((source.state(), destination.state()), (State::Running, State::Running));
    }
}

#[test]
fn a_source_or_a_snapshot_with_more_data_than_a_device_may_have_is_refused() {
    let state = vec![7; 2 * MIB as usize];
    let flags = MigrationFlags::SETS[3];
    let source = Hooked::new("large", flags, &state);
    let from = [MovedDevice::new(&source)];
    let (ledger, limited, unlimited) = (Ledger::new(), small(), options());
    let destination = Hooked::new("here", flags, &[]);
    let to = [MovedDevice::new(&destination)];
    let moved = Source::new(&from, &unlimited);
    let (outcome, received) = move_over_a_link(moved, Destination::new(&to, &ledger, &limited));
    let Received::Discarded { why, .. } = received else { panic!("{received:?}") };
    assert_endless(&why, "here");
    let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
    assert!(why.to_string().contains("--state-max"), "the source is told: {why}");
    assert_eq!(source.state(), State::Running);

    let folder = tempfile::tempdir().unwrap();
    let file = SnapshotFile::new(folder.path().join("large.lmsa"));
    let outcome = Source::new(&from, &unlimited).save(&file, AfterSave::Run);
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    let received = Destination::new(&to, &ledger, &limited).load(&file, AfterLoad::Run);
    let Received::Discarded { why, .. } = received else { panic!("{received:?}") };
    assert_endless(&why, "here");
    let received = Destination::new(&to, &ledger, &unlimited).load(&file, AfterLoad::Run);
    assert!(matches!(received, Received::Runs(_)), "{received:?}");
    assert_eq!(destination.data(), state);
}

/// A socket whose last close waits for an hour, or until its other end, which is returned too, is gone.
fn lingering() -> (OwnedFd, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while rustix::net::send(&socket, &[0; 65536], SendFlags::NOSIGNAL).is_ok() {}
    let hour = std::time::Duration::from_secs(3600);
    rustix::net::sockopt::set_socket_linger(&socket, Some(hour)).unwrap();
    (socket.into(), other)
}

/// Sends bytes and an fd with them.
fn send_with(to: &UnixStream, bytes: &[u8], fd: &OwnedFd) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = rustix::net::sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    assert_eq!(sent, Ok(bytes.len()));
}

/// Serves a device that is stopped, with an fd that lingers beside the answer to the stop, and gives data for ever. Ends with
/// its client.
fn serve(mut socket: UnixStream) {
    let (mut state, mut unread) = (2u32, Vec::new());
    loop {
        let mut header = [0; 16];
        if socket.read_exact(&mut header).is_err() {
            return;
        }
        let word = |from: &[u8], at: usize| u32::from_ne_bytes(from[at..at + 4].try_into().unwrap());
        let (command, size) = (u16::from_ne_bytes([header[2], header[3]]), word(&header, 4) as usize);
        let mut body = vec![0; size - 16];
        socket.read_exact(&mut body).unwrap();
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
        const GET: u32 = 1 << 16;
        const PROBE: u32 = 1 << 18;
        let mut stops = false;
        let answer = match command {
            1 => [&words(&[1 << 16])[..], b"{}\0"].concat(),
            4 => words(&[16, 0, 0, 0]),
            16 if word(&body, 4) & PROBE != 0 && matches!(word(&body, 4) & 0xffff, 1 | 2) => {
                body[..8].to_vec()
            }
            16 if word(&body, 4) == GET | 1 => [&body[..8], &1u64.to_ne_bytes()].concat(),
            16 if word(&body, 4) == GET | 2 => [&body[..8], &words(&[state, u32::MAX])[..]].concat(),
            16 if word(&body, 4) & 0xffff == 2 && word(&body, 4) & PROBE == 0 => {
                state = word(&body, 8);
                stops = state == 3;
                body[..16].to_vec()
            }
            17 => [words(&[word(&body, 0), word(&body, 4)]), vec![7; word(&body, 4) as usize]].concat(),
            _ => {
                header[4..16].copy_from_slice(&words(&[16, 1 | 1 << 5, 25]));
                socket.write_all(&header).unwrap();
                continue;
            }
        };
        header[4..16].copy_from_slice(&words(&[16 + answer.len() as u32, 1, 0]));
        let message = [&header[..], &answer].concat();
        let mut rest = &message[..];
        if stops {
            let (fd, other) = lingering();
            unread.push(other);
            send_with(&socket, &rest[..8], &fd);
            rest = &rest[8..];
        }
        if socket.write_all(rest).is_err() {
            return;
        }
    }
}

#[test]
fn a_hostile_server_does_not_keep_the_guest_stopped() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let serving = std::thread::spawn(move || serve(theirs));
    let (why, resumed) = ends_in_time("a save of a hostile device", move || {
        let device = Client::from_stream(ours, "hostile", client::Options::default()).unwrap();
        let (devices, options, vmm) = ([MovedDevice::new(&device)], small(), Vcpus::default());
        let folder = tempfile::tempdir().unwrap();
        let file = SnapshotFile::new(folder.path().join("endless.lmsa"));
        let saved = Source::new(&devices, &options).with_vmm(&vmm).save(&file, AfterSave::Run);
        let Outcome::Undone { why, .. } = saved else { panic!("{saved:?}") };
        assert!(vmm.stopped.into_inner());
        (why, vmm.resumed.into_inner())
    });
    assert_endless(&why, "hostile");
    assert!(resumed);
    serving.join().unwrap();
}

#[test]
fn an_fd_over_a_link_fails_it_and_nobody_waits_for_its_closing() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let link = SocketLink::new(ours, "hostile");
    let (fd, _unread) = lingering();
    send_with(&theirs, b"a", &fd);
    // Nobody receives this one: it is closed with the link.
    send_with(&theirs, b"b", &fd);
    drop(fd);
    let failed = ends_in_time("a link that brings fds", move || {
        let wait = Wait::within(std::time::Duration::from_secs(10), None);
        link.read(&mut [0; 1], wait).map(drop)
    });
    assert!(matches!(failed, Err(LinkError::Io(_))), "{failed:?}");
}
