//! Frames of the protocol: a header of 16 bytes, the numbers of the frame's fds, and a body. `docs/switch-over.md` draws
//! them. Everything here is pure: bytes in, values out.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::item::ITEM_FDS_MAX;

/// The first four bytes of each frame: "LSwO".
pub const MAGIC: [u8; 4] = *b"LSwO";
/// The version of the protocol that this crate speaks.
pub const VERSION: u16 = 1;
/// Bytes of an item that go in its frame. More go in a memfd.
pub const INLINE_BYTES_MAX: usize = 64 << 10;
/// Bytes of a frame after its header.
pub const LENGTH_MAX: usize = INLINE_BYTES_MAX + 4096;
/// Fds of one frame: those of an item, and the memfd with its bytes.
pub const FRAME_FDS_MAX: usize = ITEM_FDS_MAX + 1;
/// Bytes of a reason and of a name.
pub const TEXT_BYTES_MAX: usize = 1024;

/// A kind of frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// From the old server to a connecting process: the number of the channel's fd, and the token.
    Door = 1,
    /// Each side's first frame on the channel.
    Hello = 2,
    /// From the old server: the memfd with the commit word.
    Word = 3,
    /// From the old server: an item.
    Item = 4,
    /// From the old server: the new one is to answer [`Kind::Pulled`] once it has all fds so far.
    Batch = 5,
    /// From the new server: it has all fds so far.
    Pulled = 6,
    /// From the old server: all items of a step have been sent.
    End = 7,
    /// From the new server: it accepts the step.
    Ready = 8,
    /// From either: no, and why.
    Refused = 9,
    /// From the new server: it has committed.
    Running = 10,
}

impl Kind {
    /// The kind that a header names.
    fn of(number: u16) -> Option<Kind> {
        use Kind::*;
        [Door, Hello, Word, Item, Batch, Pulled, End, Ready, Refused, Running]
            .into_iter()
            .find(|kind| *kind as u16 == number)
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U16,
    kind: U16,
    length: U32,
    fds: U32,
}

/// Bytes of a header.
pub const HEADER_BYTES: usize = size_of::<RawHeader>();

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What kind of frame.
    pub kind: Kind,
    /// Bytes after the header.
    pub length: usize,
    /// How many fds it names.
    pub fds: usize,
}

/// Bytes that are not of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {found}; expected {expected}")]
pub struct Malformed {
    /// What is wrong.
    pub what: &'static str,
    /// The value found.
    pub found: u64,
    /// What was expected.
    pub expected: &'static str,
}

impl Malformed {
    pub(crate) fn new(what: &'static str, found: impl TryInto<u64>, expected: &'static str) -> Malformed {
        Malformed { what, found: found.try_into().unwrap_or(u64::MAX), expected }
    }
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let header = RawHeader {
            magic: MAGIC,
            version: VERSION.into(),
            kind: (self.kind as u16).into(),
            length: (self.length as u32).into(),
            fds: (self.fds as u32).into(),
        };
        zerocopy::transmute!(header)
    }

    /// Reads and bounds a header.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, Malformed> {
        let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
        if raw.magic != MAGIC {
            let found = u32::from_le_bytes(raw.magic);
            return Err(Malformed::new(
                "a frame's first bytes",
                found,
                "\"LSwO\": is it a take-over socket?",
            ));
        }
        if raw.version.get() != VERSION {
            let found = raw.version.get();
            return Err(Malformed::new("the switch-over protocol's version", found, "version 1"));
        }
        let number = raw.kind.get();
        let kind = Kind::of(number).ok_or(Malformed::new("a frame's kind", number, "1 to 10"))?;
        let (length, fds) = (raw.length.get() as usize, raw.fds.get() as usize);
        if length > LENGTH_MAX {
            return Err(Malformed::new("a frame's length", length, "69632 bytes at most"));
        }
        if fds > FRAME_FDS_MAX || fds * 4 > length {
            return Err(Malformed::new("a frame's fds", fds, "129 at most, each with its number"));
        }
        Ok(Header { kind, length, fds })
    }
}

/// The numbers of a frame's fds, and its body.
pub fn split_numbers<'a>(header: &Header, payload: &'a [u8]) -> Result<(Vec<i32>, &'a [u8]), Malformed> {
    let short = Malformed::new("a frame's payload", payload.len(), "as many bytes as its header says");
    if payload.len() != header.length {
        return Err(short);
    }
    let (numbers, body) = payload.split_at_checked(header.fds * 4).ok_or(short)?;
    let numbers = numbers.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes));
    let numbers: Vec<_> = numbers.collect();
    match numbers.iter().find(|number| **number < 0) {
        Some(_) => Err(Malformed::new("the number of an fd", u64::MAX, "0 or more")),
        None => Ok((numbers, body)),
    }
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
