//! What a trace makes of the bytes of both directions of a connection, and of system calls.
//!
//! Input: a number of rounds, each with a byte that says what comes, a length, and that number of bytes.

use limosa_protocol::Errno;
use limosa_protocol::feature::{FeatureMigState, FeatureOp};
use limosa_protocol::{FeatureHeader, FeatureIndex, State};
use limosa_trace::decode::Decoder;
use limosa_trace::event::Direction;
use limosa_trace::framer::{Framed, Framer, HEAD_BYTES_MAX, begins_with_version, looks_like_header};
use limosa_trace::seen::{Action, Call, FileKind, Seen};
use limosa_trace::sink::line;
use limosa_vfio_user::codec::{Command, Header, MigData, RegionAccess};
use zerocopy::IntoBytes;

use crate::input::Input;

const DIRECTIONS: [Direction; 2] = [Direction::ToDevice, Direction::FromDevice];
const FILES: [FileKind; 6] = [
    FileKind::Device,
    FileKind::Group,
    FileKind::Container,
    FileKind::Iommufd,
    FileKind::Data,
    FileKind::Other,
];

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut framers = [Framer::default(), Framer::default()];
    let mut decoder = Decoder::default();
    let mut seen = vec![Seen::Opened {
        time_ns: 0,
        conversation: 1,
        name: "device".into(),
        pid: Some(1),
        is_whole: true,
    }];
    let mut time_ns = 0;
    while !input.0.is_empty() {
        let what: u8 = input.take();
        let bytes = usize::from(input.take::<u16>()).min(input.0.len());
        let (piece, rest) = input.0.split_at(bytes);
        input.0 = rest;
        time_ns += 1;
        match what {
            0..=127 => {
                let way = usize::from(what & 1);
                let direction = DIRECTIONS[way];
                let skipped = framers[way].unread().min(piece.len());
                let mut framed = |framed| seen.push(as_seen(framed, direction, time_ns));
                framers[way].skip(time_ns, skipped, &mut framed);
                framers[way].push(time_ns, &piece[skipped..], vec!["fd".into()], &mut framed);
            }
            _ => seen.push(Seen::Call(call(what, piece, time_ns))),
        }
        let _ = (begins_with_version(piece), looks_like_header(piece));
    }
    for (framer, direction) in framers.iter_mut().zip(DIRECTIONS) {
        framer.end(&mut |framed| seen.push(as_seen(framed, direction, time_ns)));
    }
    let mut shown = |event| {
        let line = line(&event);
        assert!(!line.chars().any(char::is_control), "{line:?}");
    };
    for seen in &seen {
        if let Seen::Message { message, .. } = seen {
            assert!(message.head.len() <= HEAD_BYTES_MAX);
        }
        decoder.decode(seen, &mut shown);
    }
    decoder.finish(time_ns, &mut shown);
}

fn as_seen(framed: Framed, direction: Direction, time_ns: u64) -> Seen {
    match framed {
        Framed::Message(message) => Seen::Message { conversation: 1, direction, message },
        Framed::Malformed(malformed) => Seen::Malformed { time_ns, conversation: 1, direction, malformed },
    }
}

fn call(what: u8, piece: &[u8], time_ns: u64) -> Call {
    let (before, after) = piece.split_at(piece.len() / 2);
    let (head, referred) = after.split_at(after.len() / 2);
    let action = match what & 3 {
        0 => Action::Read { offset: None, bytes: 64, head: before.to_vec() },
        1 => Action::Write { offset: Some(8), bytes: 64, head: before.to_vec() },
        2 => Action::Ioctl {
            request: 0x3b75,
            before: before.to_vec(),
            after: head.to_vec(),
            referred: referred.to_vec(),
        },
        _ => Action::Ioctl {
            request: 0x3b00 | u32::from(what) << 1,
            before: before.to_vec(),
            after: after.to_vec(),
            referred: Vec::new(),
        },
    };
    let result = if what & 4 == 0 { Ok(before.len() as i64) } else { Err(Errno::EINVAL) };
    Call {
        time_ns,
        duration_ns: 1,
        pid: 1,
        fd: 3,
        file: FILES[usize::from(what >> 3) % FILES.len()],
        name: "vfio0".into(),
        device: None,
        action,
        result,
    }
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let round = |what: u8, bytes: &[u8]| [&[what][..], &(bytes.len() as u16).to_ne_bytes(), bytes].concat();
    let exchange = |command: Command, asked: &[u8], answer: &[u8]| {
        let header = Header::command(1, command, asked.len()).expect("a short message");
        let reply = header.reply(answer.len()).expect("a short message");
        let asked = round(0, &[header.as_bytes(), asked].concat());
        [asked, round(1, &[reply.as_bytes(), answer].concat())].concat()
    };
    let state = FeatureMigState::new(State::StopCopy);
    let header = FeatureHeader::new(FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET, 8);
    let set = [header.as_bytes(), state.as_bytes()].concat();
    let access = RegionAccess { offset: 0x10, region: 0, count: 4 };
    let data = MigData { argsz: 12, size: 4 };
    vec![
        ("version", exchange(Command::VERSION, b"\0\0\x02\0{}\0", b"\0\0\x02\0{}\0")),
        ("set_state", exchange(Command::DEVICE_FEATURE, &set, &set)),
        (
            "region_read",
            exchange(Command::REGION_READ, access.as_bytes(), &[access.as_bytes(), b"data"].concat()),
        ),
        (
            "mig_data_read",
            exchange(Command::MIG_DATA_READ, data.as_bytes(), &[data.as_bytes(), b"data"].concat()),
        ),
        ("kernel_set_state", round(0x82, &[&set[..], &set, &[0; 16]].concat())),
        ("kernel_read", round(0xa0, b"session data")),
        ("garbage", round(0, b"GET / HTTP/1.1\r\n\r\n")),
    ]
}
