//! Cuts a stream of bytes into vfio-user messages (`vfio-user.rst: Header`), with a bound on the recorded size of each.

use limosa_vfio_user::codec::{Command, Header};
use limosa_vfio_user::version::DATA_XFER_BYTES_MAX;
use zerocopy::FromBytes;

use crate::seen::{Malformed, Message};

/// The most bytes of a message's body that are kept.
pub const HEAD_BYTES_MAX: usize = 8192;
/// The same for messages whose body is data: region contents, guest memory, session data.
pub const DATA_HEAD_BYTES_MAX: usize = 64;
/// Limit on the bytes that are kept of data that is not a message.
pub const MALFORMED_BYTES_MAX: usize = 64;
/// The most fds that are kept of one message: those that the kernel passes at once.
pub const FDS_MAX: usize = 253;
/// Limit on the size of a plausible message: the largest data that peers agree on, and a header.
pub const MESSAGE_BYTES_MAX: u32 = DATA_XFER_BYTES_MAX + (64 << 10);

/// The result of cutting bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Framed {
    /// A whole message.
    Message(Message),
    /// Bytes that are not a message. The following bytes are cut into messages only if they look like one.
    Malformed(Malformed),
}

/// Cuts one direction of a connection into messages.
#[derive(Clone, Debug)]
pub struct Framer(Position);

#[derive(Clone, Debug)]
enum Position {
    Header {
        got: Vec<u8>,
        began_ns: u64,
        fds: Vec<String>,
        /// The bytes follow a header with an impossible size. Some servers continue after such a header.
        is_doubtful: bool,
    },
    Body {
        message: Message,
        left: usize,
    },
    /// The beginning of the next message is not known.
    Lost {
        bytes: u64,
    },
}

impl Default for Framer {
    fn default() -> Framer {
        Framer(Position::start())
    }
}

impl Position {
    fn start() -> Position {
        Position::Header { got: Vec::new(), began_ns: 0, fds: Vec::new(), is_doubtful: false }
    }
}

impl Framer {
    /// How many bytes come before the next place where a message, or its body, begins. `None` where that is not known.
    pub fn until_boundary(&self) -> Option<usize> {
        match &self.0 {
            Position::Header { got, .. } => Some(Header::BYTES - got.len()),
            Position::Body { left, .. } => Some(*left),
            Position::Lost { .. } => None,
        }
    }

    /// Whether the next byte is the first of a message.
    pub fn is_between(&self) -> bool {
        matches!(&self.0, Position::Header { got, .. } if got.is_empty())
    }

    /// Number of next bytes that are only counted: [`Framer::skip`] skips them.
    pub fn unread(&self) -> usize {
        match &self.0 {
            Position::Header { .. } => 0,
            Position::Body { message, left } if message.head.len() >= kept_bytes(message) => *left,
            Position::Body { .. } => 0,
            Position::Lost { .. } => usize::MAX,
        }
    }

    /// Accepts received bytes, and the fds that came with them.
    pub fn push(&mut self, time_ns: u64, mut bytes: &[u8], fds: Vec<String>, framed: &mut dyn FnMut(Framed)) {
        if bytes.is_empty() {
            return;
        }
        self.add_fds(fds);
        while !bytes.is_empty() {
            match &mut self.0 {
                Position::Header { got, began_ns, .. } => {
                    if got.is_empty() {
                        *began_ns = time_ns;
                    }
                    let (taken, rest) = bytes.split_at(bytes.len().min(Header::BYTES - got.len()));
                    got.extend_from_slice(taken);
                    bytes = rest;
                    if got.len() == Header::BYTES {
                        self.header(framed);
                    }
                }
                Position::Body { message, left } => {
                    let (taken, rest) = bytes.split_at(bytes.len().min(*left));
                    let room = kept_bytes(message).saturating_sub(message.head.len());
                    message.head.extend_from_slice(&taken[..taken.len().min(room)]);
                    *left -= taken.len();
                    bytes = rest;
                }
                Position::Lost { bytes: lost } => {
                    *lost = lost.saturating_add(bytes.len() as u64);
                    return;
                }
            }
            self.finish(time_ns, framed);
        }
    }

    /// Skips this many bytes, at most [`Framer::unread`].
    pub fn skip(&mut self, time_ns: u64, bytes: usize, framed: &mut dyn FnMut(Framed)) {
        match &mut self.0 {
            Position::Header { .. } => {}
            Position::Body { left, .. } => *left -= bytes.min(*left),
            Position::Lost { bytes: lost } => *lost = lost.saturating_add(bytes as u64),
        }
        self.finish(time_ns, framed);
    }

    /// The connection has ended in this direction.
    pub fn end(&mut self, framed: &mut dyn FnMut(Framed)) {
        let malformed = match std::mem::replace(&mut self.0, Position::start()) {
            Position::Header { got, .. } if got.is_empty() => return,
            Position::Header { got, .. } => Malformed {
                reason: format!("the connection ended within a header, after {} of its 16 bytes", got.len()),
                bytes: got.len() as u64,
                head: got,
            },
            Position::Body { message, left } => {
                let got = message.body_bytes - left;
                Malformed {
                    reason: format!(
                        "the connection ended within {}, after {} of its {} bytes",
                        message.header.command,
                        Header::BYTES + got,
                        message.header.size
                    ),
                    bytes: (Header::BYTES + got) as u64,
                    head: start_of(&message),
                }
            }
            Position::Lost { bytes: 0 } => return,
            Position::Lost { bytes } => Malformed {
                reason: format!("{bytes} bytes followed that are not decoded"),
                head: Vec::new(),
                bytes,
            },
        };
        framed(Framed::Malformed(malformed));
    }

    fn add_fds(&mut self, more: Vec<String>) {
        let fds = match &mut self.0 {
            Position::Header { fds, .. } => fds,
            Position::Body { message, .. } => &mut message.fds,
            Position::Lost { .. } => return,
        };
        let room = FDS_MAX.saturating_sub(fds.len());
        fds.extend(more.into_iter().take(room));
    }

    /// The header is complete.
    fn header(&mut self, framed: &mut dyn FnMut(Framed)) {
        let Position::Header { got, began_ns, fds, is_doubtful } = &mut self.0 else { return };
        let Ok(header) = Header::read_from_bytes(got) else { return };
        if *is_doubtful && looks_like_header(got) != Some(true) {
            self.0 = Position::Lost { bytes: Header::BYTES as u64 };
            return;
        }
        let body_bytes = match header.body_bytes() {
            Ok(bytes) if header.size <= MESSAGE_BYTES_MAX => bytes,
            wrong => {
                let reason = match wrong {
                    Err(error) => error.to_string(),
                    Ok(_) => {
                        format!("a message size of {}, where none is above {MESSAGE_BYTES_MAX}", header.size)
                    }
                };
                let head = std::mem::take(got);
                let bytes = head.len() as u64;
                self.0 =
                    Position::Header { got: Vec::new(), began_ns: 0, fds: Vec::new(), is_doubtful: true };
                framed(Framed::Malformed(Malformed { reason, head, bytes }));
                return;
            }
        };
        let (began_ns, fds) = (*began_ns, std::mem::take(fds));
        let message = Message { began_ns, ended_ns: began_ns, header, head: Vec::new(), body_bytes, fds };
        self.0 = Position::Body { message, left: body_bytes };
    }

    /// Returns the message if it is complete.
    fn finish(&mut self, time_ns: u64, framed: &mut dyn FnMut(Framed)) {
        if !matches!(&self.0, Position::Body { left: 0, .. }) {
            return;
        }
        if let Position::Body { mut message, .. } = std::mem::replace(&mut self.0, Position::start()) {
            message.ended_ns = time_ns;
            framed(Framed::Message(message));
        }
    }
}

/// How much of a message's body is kept.
fn kept_bytes(message: &Message) -> usize {
    match message.header.command {
        Command::REGION_READ
        | Command::REGION_WRITE
        | Command::DMA_READ
        | Command::DMA_WRITE
        | Command::MIG_DATA_READ
        | Command::MIG_DATA_WRITE => DATA_HEAD_BYTES_MAX,
        _ => HEAD_BYTES_MAX,
    }
}

fn start_of(message: &Message) -> Vec<u8> {
    let mut head = zerocopy::IntoBytes::as_bytes(&message.header).to_vec();
    head.extend_from_slice(&message.head[..message.head.len().min(MALFORMED_BYTES_MAX - Header::BYTES)]);
    head
}

/// Whether these may be the first bytes of a client's first message: VERSION (`vfio-user.rst: VFIO_USER_VERSION`). `None` where
/// there are too few of them to tell.
pub fn begins_with_version(bytes: &[u8]) -> Option<bool> {
    let Ok((header, _)) = Header::read_from_prefix(bytes) else { return None };
    let is_version = header.command == Command::VERSION
        && header.flags & Header::TYPE_MASK == Header::TYPE_COMMAND
        && (Header::BYTES as u32 + 4..=Header::BYTES as u32 + 4 + 65536).contains(&header.size);
    Some(is_version)
}

/// Whether these look like a header in the middle of a conversation: every field has a value that the specification gives
/// a meaning. `None` where there are too few of them to tell.
pub fn looks_like_header(bytes: &[u8]) -> Option<bool> {
    let Ok((header, _)) = Header::read_from_prefix(bytes) else { return None };
    let known = Header::TYPE_MASK | Header::NO_REPLY | Header::ERROR;
    Some(
        header.command.name().is_some()
            && header.body_bytes().is_ok()
            && header.size <= MESSAGE_BYTES_MAX
            && header.flags & !known == 0
            && header.kind().is_ok()
            && (header.error == 0 || header.flags & Header::ERROR != 0),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn message(command: Command, body: &[u8]) -> Vec<u8> {
        let header = Header::command(3, command, body.len()).unwrap();
        [header.as_bytes(), body].concat()
    }

    fn frame(chunks: &[&[u8]]) -> Vec<Framed> {
        let (mut framer, mut all) = (Framer::default(), Vec::new());
        for chunk in chunks {
            framer.push(1, chunk, Vec::new(), &mut |framed| all.push(framed));
        }
        framer.end(&mut |framed| all.push(framed));
        all
    }

    #[test]
    fn a_size_below_the_header_loses_the_place() {
        let mut bytes = message(Command::DEVICE_RESET, &[]);
        bytes[4..8].copy_from_slice(&15u32.to_ne_bytes());
        let all = frame(&[&bytes, b"more"]);
        assert!(matches!(&all[0], Framed::Malformed(bad) if bad.reason.contains("15")), "{all:?}");
        assert!(matches!(&all[1], Framed::Malformed(bad) if bad.bytes == 4), "{all:?}");
    }

    #[test]
    fn a_conversation_that_went_on_behind_a_size_that_cannot_be_was_lost() {
        let mut bad = message(Command::DEVICE_RESET, &[]);
        bad[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        let all = frame(&[&bad, &message(Command::REGION_READ, &[0; 16])]);
        assert!(matches!(&all[0], Framed::Malformed(_)), "{all:?}");
        assert!(matches!(&all[1], Framed::Message(message) if message.body_bytes == 16), "{all:?}");
        let all = frame(&[&bad, b"no header, but what it is not is known only", b" later"]);
        assert!(matches!(&all[..], [_, Framed::Malformed(bad)] if bad.bytes == 49), "{all:?}");
    }

    #[test]
    fn half_a_message_is_said_to_be_one() {
        let bytes = message(Command::REGION_READ, &[0; 16]);
        for cut in 1..bytes.len() {
            let all = frame(&[&bytes[..cut]]);
            let [Framed::Malformed(bad)] = &all[..] else { panic!("{cut}: {all:?}") };
            assert!(bad.reason.contains("ended within") && bad.bytes == cut as u64, "{bad:?}");
        }
    }

    #[test]
    fn fds_belong_to_the_message_with_whose_bytes_they_came() {
        let (one, two) = (message(Command::DMA_MAP, &[0; 32]), message(Command::DEVICE_RESET, &[]));
        let (mut framer, mut all) = (Framer::default(), Vec::new());
        framer.push(1, &one, vec!["memfd".into()], &mut |framed| all.push(framed));
        framer.push(2, &two, Vec::new(), &mut |framed| all.push(framed));
        let fds = |framed: &Framed| match framed {
            Framed::Message(message) => message.fds.len(),
            Framed::Malformed(_) => panic!("{framed:?}"),
        };
        assert_eq!((fds(&all[0]), fds(&all[1])), (1, 0));
    }

    #[test]
    fn no_more_than_the_limit_is_kept() {
        let (data, other) = (vec![7; 1 << 20], vec![7; 1 << 16]);
        let all = frame(&[&message(Command::REGION_WRITE, &data), &message(Command::DEVICE_FEATURE, &other)]);
        let kept = |framed: &Framed| match framed {
            Framed::Message(message) => (message.head.len(), message.body_bytes),
            Framed::Malformed(_) => panic!("{framed:?}"),
        };
        assert_eq!(kept(&all[0]), (DATA_HEAD_BYTES_MAX, 1 << 20));
        assert_eq!(kept(&all[1]), (HEAD_BYTES_MAX, 1 << 16));
    }

    proptest! {
        /// Whatever the pieces, the messages are the same; and what need not be looked at may be skipped.
        #[test]
        fn pieces_make_no_difference(
            bodies in prop::collection::vec((1u16..19, prop::collection::vec(any::<u8>(), 0..300)), 0..6),
            tail in prop::collection::vec(any::<u8>(), 0..40),
            pieces in prop::collection::vec(1usize..90, 1..60),
        ) {
            let mut bytes = Vec::new();
            for (command, body) in &bodies {
                bytes.extend(message(Command(*command), body));
            }
            bytes.extend(&tail);
            let whole = frame(&[&bytes]);
            let (mut framer, mut all, mut rest, mut pieces) = (Framer::default(), Vec::new(), &bytes[..], pieces.iter().cycle());
            while !rest.is_empty() {
                let take = (*pieces.next().unwrap()).min(rest.len());
                let skipped = framer.unread().min(take);
                if skipped > 0 {
                    framer.skip(1, skipped, &mut |framed| all.push(framed));
                }
                framer.push(1, &rest[skipped..take], Vec::new(), &mut |framed| all.push(framed));
                rest = &rest[take..];
            }
            framer.end(&mut |framed| all.push(framed));
            prop_assert_eq!(all, whole);
        }

        #[test]
        fn any_bytes_are_framed_and_bounded(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            for framed in frame(&[&bytes]) {
                match framed {
                    Framed::Message(message) => prop_assert!(message.head.len() <= HEAD_BYTES_MAX),
                    Framed::Malformed(bad) => prop_assert!(bad.head.len() <= MALFORMED_BYTES_MAX && bad.bytes > 0),
                }
            }
            let _ = (begins_with_version(&bytes), looks_like_header(&bytes));
        }
    }
}
