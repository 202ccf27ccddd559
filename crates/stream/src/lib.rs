//! The migration stream's codec (`docs/stream.md`): bytes in, frames out, and back. No I/O, no clock.
//!
//! [`Preface`] and [`Header`] are the fixed structures, [`body`] holds what payloads say, [`Order`]
//! which frame may follow which, [`Decoder`] takes a stream in pieces of any size.

#![forbid(unsafe_code)]

pub mod body;
pub mod buffer;
mod decoder;
mod frame;
mod order;
mod packed;
mod preface;

pub use body::{AbortCode, Answer, DeviceFacts, MemoryFacts, Offer, PciIds, Seal, Totals};
pub use decoder::{Damaged, Decoded, Decoder};
pub use frame::{Header, Kind, RunningCrc};
pub use order::{Order, Step};
pub use packed::{Compression, Packer, UnknownCompression, Unpacker, unpack};
pub use preface::{MigrationId, Preface, PrefaceFlags};

/// The version of the stream that this crate writes.
pub const VERSION: u16 = 1;
/// The oldest version whose readers can read what this crate writes.
pub const VERSION_OLDEST: u16 = 1;
/// Bytes of a preface.
pub const PREFACE_BYTES: usize = 40;
/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 32;
/// The longest payload of any frame, in bytes.
pub const DATA_BYTES_MAX: usize = 1 << 20;
/// The longest OFFER or ANSWER, in bytes.
pub const OFFER_BYTES_MAX: usize = 256 << 10;
/// The longest reason in an ABORT, in bytes.
pub const REASON_BYTES_MAX: usize = 4 << 10;
/// The most devices in one move.
pub const DEVICES_MAX: usize = 64;
/// The least that a destination may allow of a device to be on its way, in bytes.
pub const WINDOW_BYTES_MIN: u64 = 64 << 10;
/// The most links of one move.
pub const LINKS_MAX: u32 = 16;
/// The most regions, and the most interrupt indexes, that a device's facts list.
pub const REGIONS_MAX: usize = 256;
/// The most regions of memory in one move.
pub const MEMORY_REGIONS_MAX: usize = 256;
/// The longest region of memory, in bytes.
pub const MEMORY_BYTES_MAX: u64 = 1 << 48;
/// The longest name of a device or a kind, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// The longest data stream of one device, in bytes.
pub const DEVICE_BYTES_MAX: u64 = 1 << 40;

/// Why a stream is refused. The writer, or the way from it, is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// It does not begin with the magic number.
    #[error("not a Limosa stream: it does not begin with its magic number")]
    NotAStream,
    /// It needs a newer reader.
    #[error(
        "the stream is of version {version} and needs a reader of {oldest} or newer, this one is {VERSION}"
    )]
    Newer {
        /// What the writer speaks.
        version: u16,
        /// The oldest reader that would do.
        oldest: u16,
    },
    /// It uses something that this reader does not know, and that must not be ignored.
    #[error("the stream uses {what}, which this version does not know")]
    Unknown {
        /// What.
        what: String,
    },
    /// A checksum is wrong: altered on the way or at rest.
    #[error("checksum of {of}: expected {expected:#010x}, computed {computed:#010x}")]
    Checksum {
        /// What it covers.
        of: &'static str,
        /// As the stream says.
        expected: u32,
        /// Of what came.
        computed: u32,
    },
    /// The SEAL does not fit what came before it.
    #[error(
        "blake3 of the whole: the SEAL says {expected}, computed {computed}: some of it is not what was written"
    )]
    Seal {
        /// As the SEAL says.
        expected: String,
        /// Of what came.
        computed: String,
    },
    /// A frame was lost, doubled or swapped.
    #[error("frame {found} came where frame {expected} was due: a frame was lost, doubled or swapped")]
    Sequence {
        /// The number that was due.
        expected: u32,
        /// The number that came.
        found: u32,
    },
    /// It ends too early.
    #[error("the stream ends in the middle of {what}")]
    Truncated {
        /// Of what.
        what: &'static str,
    },
    /// A payload has the wrong length.
    #[error("{kind} of {bytes} bytes: expected {expected}")]
    Length {
        /// The frame.
        kind: Kind,
        /// What it has.
        bytes: usize,
        /// What would be right.
        expected: String,
    },
    /// Right in itself, wrong at this place.
    #[error("{kind} is out of place: {why}")]
    Misplaced {
        /// The frame.
        kind: Kind,
        /// Why.
        why: String,
    },
    /// The content of a frame makes no sense.
    #[error("{kind}: {why}")]
    Content {
        /// The frame.
        kind: Kind,
        /// What is wrong with it.
        why: String,
    },
}

/// A little-endian u32 at an offset; the caller has checked the length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// A little-endian u64 at an offset; the caller has checked the length.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// A little-endian u16 at an offset; the caller has checked the length.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}
