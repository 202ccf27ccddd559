//! The migration stream's codec (`docs/stream.md`): converts bytes to frames and back, without I/O and without a
//! clock.
//!
//! [`Preface`] and [`Header`] are the fixed structures. [`body`] has the payloads of frames. [`Order`] checks which
//! frame may follow which. [`Proofs`] authenticate the frames of a commit. [`Decoder`] takes a stream in pieces of any
//! size.

#![forbid(unsafe_code)]

pub mod body;
pub mod buffer;
mod decoder;
mod frame;
mod order;
mod packed;
mod preface;
mod proof;
mod runs;
mod text;

pub use body::{AbortCode, Answer, DeviceFacts, MemoryFacts, Offer, PciIds, Seal, Totals};
pub use decoder::{Damaged, Decoded, Decoder};
pub use frame::{Header, Kind, RunningCrc};
pub use order::{Order, Step};
pub use packed::{Compression, Packer, UnknownCompression, Unpacker, unpack};
pub use preface::{MigrationId, Preface, PrefaceFlags};
pub use proof::{Nonce, PROOF_BYTES, Proofs, Secret};
pub use runs::{Run, Runs, RunsTable};
pub use text::{escaped, is_printable, printable, without_passwords};

/// The version of the streams that this crate writes.
pub const VERSION: u16 = 1;
/// The oldest version whose readers can read the streams that this crate writes.
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
/// The maximum number of devices in one move.
pub const DEVICES_MAX: usize = 64;
/// The smallest window of a device, in bytes: how much of its data may be on its way (`docs/stream.md: CREDIT`).
pub const WINDOW_BYTES_MIN: u64 = 64 << 10;
/// The maximum number of links of one move.
pub const LINKS_MAX: u32 = 16;
/// The maximum number of regions, and of interrupt indexes, in the facts of a device.
pub const REGIONS_MAX: usize = 256;
/// The maximum number of memory regions in one move.
pub const MEMORY_REGIONS_MAX: usize = 256;
/// The largest memory region, in bytes.
pub const MEMORY_BYTES_MAX: u64 = 1 << 48;
/// The longest name of a device or a kind, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// The longest data stream of one device, in bytes.
pub const DEVICE_BYTES_MAX: u64 = 1 << 40;

/// Why a stream is refused. The fault is the writer's, or that of the path from it.
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
        /// The writer's version.
        version: u16,
        /// The oldest version whose readers can read it.
        oldest: u16,
    },
    /// It uses something that this reader does not know and must not ignore.
    #[error("the stream uses {what}, which this version does not know")]
    Unknown {
        /// What it uses.
        what: String,
    },
    /// It is valid but unexpected: it belongs to another move, or is of another kind.
    #[error("{what}")]
    Unexpected {
        /// What arrived, and what was expected.
        what: String,
    },
    /// A checksum is wrong: bytes were altered on the way or at rest.
    #[error("checksum of {of}: expected {expected:#010x}, computed {computed:#010x}")]
    Checksum {
        /// What the checksum covers.
        of: &'static str,
        /// The checksum in the stream.
        expected: u32,
        /// The checksum of the bytes that arrived.
        computed: u32,
    },
    /// The hash in the SEAL is not that of the bytes before it.
    #[error("blake3 of the stream: the SEAL says {expected}, computed {computed}: the stream was altered")]
    Seal {
        /// The hash in the SEAL.
        expected: String,
        /// The hash of the bytes that arrived.
        computed: String,
    },
    /// A frame was lost, duplicated or reordered.
    #[error("frame {found} came where frame {expected} was due: a frame was lost, duplicated or reordered")]
    Sequence {
        /// The number that was expected.
        expected: u32,
        /// The number that arrived.
        found: u32,
    },
    /// It ends too early.
    #[error("the stream ends in the middle of {what}")]
    Truncated {
        /// In the middle of what.
        what: &'static str,
    },
    /// A payload has the wrong length.
    #[error("{kind} of {bytes} bytes: expected {expected}")]
    Length {
        /// The frame.
        kind: Kind,
        /// Its length.
        bytes: usize,
        /// The lengths that are allowed.
        expected: String,
    },
    /// The frame is valid, but not at this place in the stream.
    #[error("{kind} is out of place: {why}")]
    Misplaced {
        /// The frame.
        kind: Kind,
        /// Why.
        why: String,
    },
    /// A word about the commit does not prove that it is of this move.
    #[error("{kind}: {why}")]
    Unproven {
        /// The frame.
        kind: Kind,
        /// What it lacks.
        why: &'static str,
    },
    /// The content of a frame is invalid.
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
