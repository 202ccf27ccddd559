//! What mtty does otherwise than the standard has it, seen on the device itself, and that nothing is lost
//! by it: `docs/kernel.md`, "Where mtty and the kernel differ from the written standard".

mod serial;

use std::path::PathBuf;

use limosa_client::{Chunk, DataStream, Device, DeviceExt, Error, FeatureReply, FeatureRequest, Result};
use limosa_lab::Mdev;
use limosa_migrate::{AfterLoad, AfterSave, Ledger, Outcome, Received, SnapshotFile};
use limosa_protocol::info::DeviceFlags;
use limosa_protocol::{Errno, State, pci_index};
use limosa_testing::{forward_device, forward_stream};
use limosa_vfio_kernel::{Door, KernelDevice};
use serial::{
    Card, LINE_STATUS, SCRATCH, TRANSPORTS, Transport, drain, fresh, get, kernel, move_here, moves, mtty,
    options, peek, receive, send, set, set_up, with_destination, with_source,
};

const PORT: usize = 24;
/// Of a port's 36 bytes.
const HEAD: usize = 24;
const COUNT: usize = 26;
const TRIGGER: usize = 34;

/// A card of the kernel's with a guest's bytes in it.
fn busy() -> (Mdev, KernelDevice) {
    let mdev = mtty(1);
    let card = kernel(&mdev, Door::Cdev);
    set_up(&card, 0);
    send(&card, 0, b"stay");
    // In this order, the device is closed first.
    (mdev, card)
}

fn session(card: &dyn Device, state: State) -> Box<dyn DataStream> {
    card.set_state(state).unwrap().expect("a session opens")
}

/// A device whose data stream comes altered, with checksums that know nothing of it.
struct Altered<'a> {
    device: &'a dyn Device,
    change: fn(usize, u8) -> u8,
}

struct AlteredStream {
    stream: Box<dyn DataStream>,
    change: fn(usize, u8) -> u8,
    at: usize,
}

impl DataStream for AlteredStream {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        let chunk = self.stream.read(data)?;
        if let Chunk::Data(bytes) = chunk {
            for byte in &mut data[..bytes] {
                *byte = (self.change)(self.at, *byte);
                self.at += 1;
            }
        }
        Ok(chunk)
    }

    forward_stream!(|this| this.stream; write, precopy_info, transfer_bytes_max);
}

impl Device for Altered<'_> {
    forward_device!(|this| this.device; name, identity, reset, info, registers);

    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let mut reply = self.device.feature(request)?;
        let change = self.change;
        reply.stream = reply
            .stream
            .map(|stream| Box::new(AlteredStream { stream, change, at: 0 }) as Box<dyn DataStream>);
        Ok(reply)
    }
}

/// A move that must not be: the source runs on with its bytes, the destination is untouched.
#[track_caller]
fn is_refused(from: &dyn Device, source: &dyn Device, to: &dyn Device, reason: &str) {
    set(to, 0, SCRATCH, 0x11);
    send(to, 0, b"mine");
    let before = peek(source);
    let (outcome, received) = move_here(from, to);
    let (Outcome::Undone { .. }, Received::Discarded { why, .. }) = (&outcome, &received) else {
        panic!("{outcome:?} {received:?}")
    };
    assert!(why.to_string().contains(reason), "{why}");
    assert_eq!((source.state().unwrap(), to.state().unwrap()), (State::Running, State::Running));
    assert_eq!(peek(source), before);
    if to.name() != "loopback" {
        // mtty's reset would have left what was loaded.
        assert_eq!((get(to, 0, SCRATCH), receive(to, 0, 16)), (0x11, b"mine".to_vec()));
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_stream_whose_write_was_refused_is_loaded_by_mtty_and_discarded_by_the_engine() {
    let (_mdev, card) = busy();
    let mut foreign = peek(&card);
    foreign[0] ^= 1;
    foreign[PORT + usize::from(SCRATCH as u8)] = 0x99;
    let mut stream = session(&card, State::Resuming);
    let refused = stream.write(&foreign).unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::EFAULT), "{refused}");
    // The stream is not to be written to any more; that mtty then takes the state is mtty's.
    assert_eq!(stream.write(&[]).unwrap_err().errno(), Some(Errno::EFAULT));
    card.set_state(State::Running).unwrap();
    assert_eq!(get(&card, 0, SCRATCH), 0x99, "what was refused is loaded");

    // The engine stops at the write's error.
    let (source, to) = (Card::new(Transport::Loopback, 1), Card::new(Transport::Cdev, 1));
    set_up(&*source, 0);
    let altered = Altered { device: &*source, change: |at, byte| if at == 0 { byte ^ 1 } else { byte } };
    is_refused(&altered, &*source, &*to, "EFAULT");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_stream_that_contradicts_itself_is_loaded_by_mtty_and_refused_by_the_model() {
    let (_mdev, card) = busy();
    let state = peek(&card);
    // More bytes than lie between its indexes. (An index beyond the FIFO is taken too, and then mtty reads and
    // writes memory that is not its own.)
    let mut wrong = state.clone();
    wrong[PORT + COUNT] = 11;
    session(&card, State::Resuming).write(&wrong).unwrap();
    card.set_state(State::Running).unwrap();
    assert_eq!(peek(&card), wrong, "it is taken as it is");
    for transport in [Transport::Loopback, Transport::VfioUser] {
        let to = Card::new(transport, 1);
        let (outcome, received) = move_here(&card, &*to);
        assert!(matches!(outcome, Outcome::Undone { .. }), "{outcome:?} {received:?}");
        assert_eq!((card.state().unwrap(), to.state().unwrap()), (State::Running, State::Running));
        assert_eq!(get(&*to, 0, LINE_STATUS), 0x60, "nothing of it is there");
        for at in [HEAD, TRIGGER] {
            let mut wrong = state.clone();
            wrong[PORT + at] = 200;
            let mut stream = session(&*to, State::Resuming);
            let written = stream.write(&wrong);
            assert!(written.is_err() || to.set_state(State::Stop).is_err(), "byte {at} of the port");
            to.reset().unwrap();
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn flipped_bits_that_mtty_never_notices_are_refused_before_it_sees_them() {
    let (_mdev, card) = busy();
    let state = peek(&card);
    let mut flipped = state.clone();
    flipped[PORT + 8] ^= 4;
    let (_other, to) = busy();
    session(&to, State::Resuming).write(&flipped).unwrap();
    to.set_state(State::Running).unwrap();
    assert_eq!(receive(&to, 0, 16), b"wtay", "a byte of the guest's is another");

    // In a saved stream every byte is vouched for.
    let file = PathBuf::from(fresh("saved"));
    let saved =
        with_source(&card, &options(), |source| source.save(&SnapshotFile::new(&file), AfterSave::Run));
    assert!(matches!(saved, Outcome::Moved(_)), "{saved:?}");
    let whole = std::fs::read(&file).unwrap();
    set(&to, 0, SCRATCH, 0x44);
    let load = |stream: &[u8]| {
        std::fs::write(&file, stream).unwrap();
        let ledger = Ledger::new();
        with_destination(&to, &ledger, &options(), |destination| {
            destination.load(&SnapshotFile::new(&file), AfterLoad::Run)
        })
    };
    for at in 0..whole.len() {
        let mut altered = whole.clone();
        altered[at] ^= 1 << (at % 8);
        // Four bytes of the preface mean nothing: its checksum covers them too.
        let received = load(&altered);
        assert!(matches!(received, Received::Discarded { .. }), "byte {at}: {received:?}");
        let cut = load(&whole[..at]);
        assert!(matches!(cut, Received::Discarded { .. }), "cut at {at}: {cut:?}");
        assert_eq!(to.state().unwrap(), State::Running);
    }
    assert_eq!(get(&to, 0, SCRATCH), 0x44, "the card was not touched");
    assert!(matches!(load(&whole), Received::Runs(_)));
    assert_eq!(receive(&to, 0, 16), b"stay");
    std::fs::remove_file(&file).unwrap();
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn an_end_in_pre_copy_is_taken_for_nothing_for_now() {
    for door in [Door::Cdev, Door::Group] {
        let mdev = mtty(1);
        let card = kernel(&mdev, door);
        send(&card, 0, b"late");
        let mut stream = session(&card, State::PreCopy);
        let mut data = [0; 100];
        assert_eq!(stream.read(&mut data).unwrap(), Chunk::Data(24));
        // mtty's read gives 0 here, where ENOMSG is due.
        for _ in 0..3 {
            assert_eq!(stream.read(&mut data).unwrap(), Chunk::NothingForNow);
        }
        assert!(card.set_state(State::StopCopy).unwrap().is_none(), "the session goes on");
        let rest = drain(stream.as_mut());
        assert_eq!((rest.len(), &rest[8..12]), (36, &b"late"[..]));
        assert_eq!(stream.read(&mut data).unwrap(), Chunk::End);
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_reset_keeps_what_mtty_holds_and_a_later_load_replaces_all_of_it() {
    let (_mdev, card) = busy();
    let before = peek(&card);
    let flags = DeviceFlags::from_bits_retain(card.info().unwrap().flags);
    assert_eq!(flags, DeviceFlags::PCI, "it does not say that it can be reset");
    card.reset().unwrap();
    assert_eq!(peek(&card), before, "registers and FIFO are those from before");
    let source = Card::new(Transport::Loopback, 1);
    send(&*source, 0, b"new");
    moves(&*source, &card);
    assert_eq!((receive(&card, 0, 16), get(&card, 0, SCRATCH)), (b"new".to_vec(), 0));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_is_written_to_a_stopped_mtty_takes_effect_and_is_not_in_the_stream_that_was_begun() {
    let (_mdev, card) = busy();
    let mut stream = session(&card, State::StopCopy);
    set(&card, 0, SCRATCH, 0x99);
    assert_eq!(get(&card, 0, SCRATCH), 0x99);
    let state = drain(stream.as_mut());
    assert_eq!(state[PORT + usize::from(SCRATCH as u8)], 0x5a, "as it was when it stopped");
    let ours = Card::new(Transport::Loopback, 1);
    let _session = session(&*ours, State::StopCopy);
    let refused = ours.region_write(0, SCRATCH, &[0x99]).unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::EBUSY), "the model takes none");
}

/// As a process leaves a card that is killed while it has it open.
fn forsaken(state: State) -> (Mdev, KernelDevice) {
    let (mdev, card) = busy();
    let mut stream = session(&card, state);
    if state == State::Resuming {
        stream.write(&[0; 3]).unwrap();
    }
    drop((card, stream));
    let card = kernel(&mdev, Door::Cdev);
    (mdev, card)
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_card_left_in_a_session_by_a_process_that_is_gone_is_named_and_can_be_had_back() {
    for state in [State::PreCopy, State::StopCopy, State::Resuming] {
        let (_mdev, card) = forsaken(state);
        assert_eq!(card.state().unwrap(), state, "mtty stays where it was");
        let other = Card::new(Transport::Loopback, 1);
        for (from, to) in [(&card as &dyn Device, &*other), (&*other, &card as &dyn Device)] {
            let (outcome, _) = move_here(from, to);
            let Outcome::Undone { why, .. } = outcome else { panic!("{outcome:?}") };
            assert!(why.to_string().contains(&format!("it is in {state}")), "{why}");
            assert_eq!(card.state().unwrap(), state, "untouched");
        }
        if state == State::Resuming {
            card.reset().unwrap();
        }
        card.set_state(State::Running).unwrap();
        assert_eq!(get(&card, 0, SCRATCH), 0x5a);
        moves(&card, &*other);
        assert_eq!(receive(&*other, 0, 16), b"stay", "{state}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_second_session_opens_where_the_first_was_left_in_pre_copy() {
    let (_mdev, card) = forsaken(State::PreCopy);
    let expected = {
        let (_other, same) = busy();
        peek(&same)
    };
    // PRE_COPY_P2P to STOP_COPY goes on with a session; here there is none, and mtty opens one.
    let mut stream = card.set_state(State::StopCopy).unwrap().expect("a session opens");
    assert_eq!(drain(stream.as_mut()), expected, "the whole state");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn configuration_space_is_not_part_of_the_stream() {
    for to in TRANSPORTS {
        let (_mdev, card) = busy();
        let to = Card::new(to, 1);
        let line = |card: &dyn Device| {
            let mut line = [0];
            card.region_read(pci_index::CONFIG, 0x3c, &mut line).unwrap();
            line[0]
        };
        card.region_write(pci_index::CONFIG, 0x3c, &[9]).unwrap();
        moves(&card, &*to);
        assert_eq!((line(&card), line(&*to)), (9, 0), "a VMM keeps it");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_load_that_was_broken_off_is_not_finished_by_the_next_process_which_would_crash_the_kernel() {
    let (_mdev, card) = forsaken(State::Resuming);
    for to in State::ALL.into_iter().filter(|state| *state != State::Error) {
        let Err(refused) = card.set_state(to) else { panic!("to {to}") };
        assert!(matches!(refused, Error::Refused { errno: Errno::EINVAL, .. }), "{refused}");
        assert!(refused.to_string().contains("reset it"), "{refused}");
    }
    assert_eq!(card.state().unwrap(), State::Resuming);
    card.reset().unwrap();
    card.set_state(State::Stop).unwrap();
    card.set_state(State::Running).unwrap();
    assert_eq!(receive(&card, 0, 16), b"stay");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn interrupts_are_told_of_though_mtty_wants_to_be_asked_first_what_it_is() {
    // It answers EINVAL for every interrupt until DEVICE_GET_INFO was asked, which opening does.
    for transport in TRANSPORTS {
        let card = Card::new(transport, 1);
        let count = |index| card.irq(index).map(|irq| irq.count);
        assert_eq!((count(0).unwrap(), count(1).unwrap()), (1, 1), "{transport:?}");
        assert_eq!(card.info().unwrap().num_irqs, 5);
        for index in 2..5 {
            // Of the five that it says it has it knows two.
            let not_there = matches!(count(index), Ok(0) | Err(Error::Refused { errno: Errno::EINVAL, .. }));
            assert!(not_there, "{transport:?}: {:?}", count(index));
        }
    }
}
