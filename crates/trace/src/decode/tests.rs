//! Requests with their answers, and whatever else may come.

use limosa_protocol::feature::{
    DmaLoggingRange, FeatureDmaLoggingControl, FeatureDmaLoggingReport, FeatureMigState,
};
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp, State};
use limosa_vfio_user::codec::{Command, Header, MigData, RegionAccess};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::call::{FEATURE, ioctl_name};
use super::*;
use crate::event::Transition;
use crate::framer::{Framed, Framer};
use crate::seen::{Action, Call, FileKind, Message};

fn opened() -> Seen {
    Seen::Opened { time_ns: 0, conversation: 1, name: "a.sock".into(), pid: Some(7), is_whole: true }
}

fn message(direction: Direction, header: Header, at: u64, body: &[u8]) -> Seen {
    let message = Message {
        began_ns: at,
        ended_ns: at + 1,
        header,
        head: body.to_vec(),
        body_bytes: body.len(),
        fds: Vec::new(),
    };
    Seen::Message { conversation: 1, direction, message }
}

/// A command and its reply.
fn exchange(id: u16, command: Command, body: &[u8], reply: Result<&[u8], Errno>) -> [Seen; 2] {
    let header = Header::command(id, command, body.len()).unwrap();
    let answer = match reply {
        Ok(body) => message(Direction::FromDevice, header.reply(body.len()).unwrap(), 1500, body),
        Err(errno) => message(Direction::FromDevice, header.refusal(errno), 1500, &[]),
    };
    [message(Direction::ToDevice, header, 1000, body), answer]
}

fn decode(seen: &[Seen]) -> Vec<Event> {
    let (mut decoder, mut all) = (Decoder::default(), Vec::new());
    for seen in seen {
        decoder.decode(seen, &mut |event| all.push(event));
    }
    decoder.finish(9000, &mut |event| all.push(event));
    all
}

fn feature(index: FeatureIndex, op: FeatureOp, payload: &[u8]) -> Vec<u8> {
    [FeatureHeader::new(index, op, payload.len() as u32).as_bytes(), payload].concat()
}

fn set_state(to: State) -> Vec<u8> {
    feature(FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET, FeatureMigState::new(to).as_bytes())
}

#[test]
fn a_set_says_from_where_to_where_and_what_was_refused() {
    let get = feature(
        FeatureIndex::MIG_DEVICE_STATE,
        FeatureOp::GET,
        FeatureMigState::new(State::Running).as_bytes(),
    );
    let [one, two, three, four] =
        [State::Stop, State::StopCopy, State::Resuming, State::Running].map(set_state);
    let mut all = vec![opened()];
    all.extend(exchange(0, Command::DEVICE_FEATURE, &get, Ok(&get)));
    all.extend(exchange(1, Command::DEVICE_FEATURE, &one, Ok(&one)));
    all.extend(exchange(2, Command::DEVICE_FEATURE, &two, Ok(&two)));
    all.extend(exchange(3, Command::DEVICE_FEATURE, &three, Err(Errno::EINVAL)));
    all.extend(exchange(4, Command::DEVICE_FEATURE, &four, Ok(&four)));
    let events = decode(&all);
    let shown: Vec<_> = events.iter().map(|event| event.arguments.as_str()).collect();
    assert_eq!(shown, ["", "RUNNING > STOP", "STOP > STOP_COPY", "STOP_COPY > RESUMING", "RUNNING"]);
    assert_eq!(events[0].outcome, Outcome::Done("RUNNING".into()));
    assert_eq!(events[3].outcome, Outcome::Refused(Errno::EINVAL));
    let Request::Feature { transition, .. } = events[2].request else { panic!() };
    assert_eq!(transition, Some(Transition { from: Some(State::Stop), to: State::StopCopy }));
    assert_eq!(
        (events[0].duration_ns, events[0].pid, events[0].name.as_str()),
        (Some(501), Some(7), "a.sock")
    );
    assert_eq!(events[1].request.key(), "FEATURE SET MIG_DEVICE_STATE");
}

#[test]
fn replies_find_their_commands_whatever_their_order() {
    let read = RegionAccess { offset: 16, region: 2, count: 4 };
    let value = [read.as_bytes(), &[1, 2, 3, 4]].concat();
    let one = exchange(1, Command::REGION_READ, read.as_bytes(), Ok(&value));
    let two = exchange(2, Command::DEVICE_RESET, &[], Ok(&[]));
    let [one, one_reply] = one;
    let [two, two_reply] = two;
    let events = decode(&[opened(), one, two, two_reply, one_reply]);
    assert_eq!(events[0].request, Request::Named("DEVICE_RESET"));
    assert_eq!(events[1].arguments, "region 2 0x10+0x4");
    assert_eq!(events[1].outcome, Outcome::Done("0x04030201".into()));
    assert_eq!(events[1].bytes, 4);
}

#[test]
fn what_gets_no_answer_is_said_at_the_end_and_a_reply_to_nothing_at_once() {
    let reset = Header::command(5, Command::DEVICE_RESET, 0).unwrap();
    let events = decode(&[
        opened(),
        message(Direction::FromDevice, reset.reply(0).unwrap(), 1, &[]),
        message(Direction::ToDevice, reset, 2, &[]),
        message(Direction::ToDevice, reset, 3, &[]),
    ]);
    assert_eq!(events[0].request, Request::Malformed);
    assert_eq!(events[1].outcome, Outcome::Unanswered("its id was used again"));
    assert!(matches!(events[2].outcome, Outcome::Unanswered(_)) && events.len() == 3);
}

#[test]
fn an_answer_to_what_was_asked_before_the_trace_was_taken_for_malformed() {
    let Seen::Opened { time_ns, conversation, name, pid, .. } = opened() else { unreachable!() };
    let middle = Seen::Opened { time_ns, conversation, name, pid, is_whole: false };
    let reset = Header::command(5, Command::DEVICE_RESET, 0).unwrap();
    let events = decode(&[middle, message(Direction::FromDevice, reset.refusal(Errno::EBUSY), 1, &[])]);
    assert_eq!(events[0].request, Request::Named("DEVICE_RESET"));
    assert_eq!(events[0].outcome, Outcome::Refused(Errno::EBUSY));
    assert_eq!((events[0].direction, events.len()), (Direction::ToDevice, 1));
}

#[test]
fn no_more_commands_wait_than_the_limit() {
    let mut all = vec![opened()];
    for id in 0..5000 {
        all.push(message(
            Direction::ToDevice,
            Header::command(id, Command::DEVICE_RESET, 0).unwrap(),
            u64::from(id),
            &[],
        ));
    }
    let events = decode(&all);
    assert_eq!(events.len(), 5000);
    assert_eq!(events[0].time_ns, 0, "the oldest is given up first");
}

#[test]
fn session_data_is_counted_and_not_shown() {
    let asked = MigData { argsz: 8 + 4096, size: 4096 };
    let reply = [MigData { argsz: 8 + 5, size: 5 }.as_bytes(), b"state"].concat();
    let mut all = vec![opened()];
    all.extend(exchange(1, Command::MIG_DATA_READ, asked.as_bytes(), Ok(&reply)));
    let events = decode(&all);
    assert_eq!((events[0].bytes, &events[0].outcome), (5, &Outcome::Done("5 bytes".into())));
}

/// QEMU's count has 32 bits, and its data begins 4 bytes earlier (`hw/vfio-user/protocol.h: VFIOUserDMARW`).
#[test]
fn what_a_device_asks_of_qemu_is_decoded_in_qemus_form() {
    let json = br#"{"capabilities":{"migration":{"max_bitmap_size":256},"write_multiple":true}}"#;
    for (json, is_qemus) in [(&json[..], true), (b"{}", false)] {
        let version = [&[0, 0, 2, 0], json, b"\0"].concat();
        let asked = [&0x1000u64.to_ne_bytes()[..], &3u32.to_ne_bytes(), b"abc\0"].concat();
        let header = Header::command(9, Command::DMA_WRITE, asked.len()).unwrap();
        let mut all = vec![opened()];
        all.extend(exchange(1, Command::VERSION, &version, Ok(&version)));
        all.push(message(Direction::FromDevice, header, 1, &asked));
        all.push(message(Direction::ToDevice, header.reply(asked.len()).unwrap(), 2, &asked));
        let events = decode(&all);
        assert_eq!(events[1].direction, Direction::FromDevice);
        assert_eq!(events[1].arguments == "0x1000+0x3", is_qemus, "{events:#?}");
        assert_eq!(events[1].outcome == Outcome::Done("3 bytes".into()), is_qemus, "{events:#?}");
    }
}

fn ioctl(file: FileKind, request: u32, before: &[u8], after: &[u8], result: Result<i64, Errno>) -> Call {
    let action =
        Action::Ioctl { request, before: before.to_vec(), after: after.to_vec(), referred: Vec::new() };
    Call {
        time_ns: 1,
        duration_ns: 2,
        pid: 3,
        fd: 4,
        file,
        name: "vfio0".into(),
        device: None,
        action,
        result,
    }
}

#[test]
fn a_kernels_data_fd_is_named() {
    let before = set_state(State::StopCopy);
    let mut after = before.clone();
    after[12..16].copy_from_slice(&9i32.to_ne_bytes());
    let calls = [
        ioctl(FileKind::Device, FEATURE, &set_state(State::Stop), &set_state(State::Stop), Ok(0)),
        ioctl(FileKind::Device, FEATURE, &before, &after, Ok(0)),
        ioctl(FileKind::Device, FEATURE, &before, &before, Err(Errno::EINVAL)),
    ];
    let events = decode(&calls.map(Seen::Call));
    assert_eq!(events[1].arguments, "STOP > STOP_COPY");
    assert_eq!(events[1].outcome, Outcome::Done("data_fd 9".into()));
    assert_eq!(events[2].outcome, Outcome::Refused(Errno::EINVAL));
}

#[test]
fn what_a_kernels_payload_points_to_is_part_of_it() {
    let control = FeatureDmaLoggingControl { page_size: 4096, num_ranges: 1, reserved: 0 };
    let pointer = 0x7fff_0000_u64.to_ne_bytes();
    let payload = [control.as_bytes(), &pointer].concat();
    let before = feature(FeatureIndex::DMA_LOGGING_START, FeatureOp::SET, &payload);
    let mut start = ioctl(FileKind::Device, FEATURE, &before, &before, Ok(0));
    let Action::Ioctl { referred, .. } = &mut start.action else { panic!() };
    *referred = DmaLoggingRange { iova: 0x1000, length: 0x2000 }.as_bytes().to_vec();
    let report = FeatureDmaLoggingReport { iova: 0x1000, length: 0x2000, page_size: 4096 };
    let payload = [report.as_bytes(), &pointer].concat();
    let before = feature(FeatureIndex::DMA_LOGGING_REPORT, FeatureOp::GET, &payload);
    let mut read = ioctl(FileKind::Device, FEATURE, &before, &before, Ok(0));
    let Action::Ioctl { referred, .. } = &mut read.action else { panic!() };
    *referred = 3u64.to_le_bytes().to_vec();
    let events = decode(&[Seen::Call(start), Seen::Call(read)]);
    assert_eq!(events[0].arguments, "page size 4096, 0x1000+0x2000");
    assert_eq!(events[1].arguments, "0x1000+0x2000 page size 4096");
    assert_eq!(events[1].outcome, Outcome::Done("2 dirty pages".into()));
}

/// Against the header files of Linux.
#[test]
fn ioctls_have_their_names() {
    use vfio_bindings::bindings::vfio as linux;
    assert_eq!(FEATURE, u32::from(linux::VFIO_TYPE) << 8 | (linux::VFIO_BASE + 17));
    assert_eq!(ioctl_name(FileKind::Device, FEATURE), Some("DEVICE_FEATURE"));
    assert_eq!(ioctl_name(FileKind::Container, 0x3b71), Some("IOMMU_MAP_DMA"));
    assert_eq!(ioctl_name(FileKind::Iommufd, 0x3b85), Some("IOMMU_IOAS_MAP"));
    assert_eq!(ioctl_name(FileKind::Device, 0x3b7a), None);
    assert_eq!(ioctl_name(FileKind::Device, 0x3b00), None);
}

proptest! {
    #[test]
    fn no_bytes_make_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600), command in 0u16..20, flip: bool) {
        let mut framers = [Framer::default(), Framer::default()];
        let mut all = vec![opened()];
        let header = Header::command(1, Command(command), bytes.len()).unwrap();
        let (a, b) = (message(Direction::ToDevice, header, 1, &bytes), message(Direction::FromDevice, header.reply(bytes.len()).unwrap(), 2, &bytes));
        all.extend(if flip { [b, a] } else { [a, b] });
        for (framer, direction) in framers.iter_mut().zip([Direction::ToDevice, Direction::FromDevice]) {
            framer.push(1, &bytes, Vec::new(), &mut |framed| all.push(match framed {
                Framed::Message(message) => Seen::Message { conversation: 1, direction, message },
                Framed::Malformed(malformed) => Seen::Malformed { time_ns: 1, conversation: 1, direction, malformed },
            }));
        }
        for event in decode(&all) {
            prop_assert!(event.arguments.chars().all(|c| !c.is_control()), "{event:?}");
        }
    }

    #[test]
    fn no_ioctl_makes_a_panic(request in 0x3b64u32..0x3b9a, before in prop::collection::vec(any::<u8>(), 0..200), after in prop::collection::vec(any::<u8>(), 0..200), value: i64, index in 0u16..14, op in 0u32..8) {
        let flags = u32::from(index) | op << 16;
        let mut headed = before.clone();
        if let Ok((header, _)) = FeatureHeader::mut_from_prefix(&mut headed) {
            header.flags = flags;
        }
        for file in [FileKind::Device, FileKind::Container, FileKind::Data, FileKind::Other] {
            for result in [Ok(value), Err(Errno::EINVAL)] {
                decode(&[Seen::Call(ioctl(file, request, &before, &after, result))]);
                decode(&[Seen::Call(ioctl(file, FEATURE, &headed, &after, result))]);
            }
        }
    }
}
