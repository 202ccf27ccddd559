//! The payloads of frames (`docs/stream.md: Kinds`): small fixed structures here, and the JSON of the handshake.

mod facts;
mod handshake;

use limosa_protocol::feature::PrecopyInfo;
use serde::Serialize;

pub use facts::{DeviceFacts, MemoryFacts, PciIds};
pub use handshake::{Answer, NEEDS_CREDIT, NEEDS_FLUSH, NEEDS_PROOFS, Offer};

use super::{REASON_BYTES_MAX, printable, u16_at, u32_at, u64_at};

/// The kind of reason for ending a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortCode {
    /// A user cancelled.
    Cancelled,
    /// A device failed.
    Device,
    /// A frame was damaged or misplaced.
    Stream,
    /// Memory could not be read or written.
    Memory,
    /// A time limit passed.
    TimeLimit,
    /// Devices or memory do not match.
    Incompatible,
    /// The VMM refused.
    Vmm,
    /// The destination takes no move, or none now.
    NotTaken,
    /// The guest would stand still for too long, or did.
    Standstill,
    /// The link failed.
    Link,
    /// Something else.
    Other,
}

const ABORT_CODES: [(AbortCode, u16); 10] = [
    (AbortCode::Cancelled, 1),
    (AbortCode::Device, 2),
    (AbortCode::Stream, 3),
    (AbortCode::Memory, 4),
    (AbortCode::TimeLimit, 5),
    (AbortCode::Incompatible, 6),
    (AbortCode::Vmm, 7),
    (AbortCode::NotTaken, 8),
    (AbortCode::Standstill, 9),
    (AbortCode::Link, 10),
];

/// The payload of ABORT, and of REFUSED before its proof. A reason that is too long is cut.
pub fn encode_abort(code: AbortCode, reason: &str) -> Vec<u8> {
    let number = ABORT_CODES.iter().find(|(known, _)| *known == code).map_or(0, |(_, number)| *number);
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut out = u32::from(number).to_le_bytes().to_vec();
    out.extend_from_slice(&reason.as_bytes()[..end]);
    out
}

/// Reads the payload of ABORT, or of REFUSED before its proof, which has at least 4 bytes.
pub fn decode_abort(payload: &[u8]) -> (AbortCode, String) {
    let number = u16_at(payload, 0);
    let code =
        ABORT_CODES.iter().find(|(_, known)| *known == number).map_or(AbortCode::Other, |(code, _)| *code);
    (code, printable(&String::from_utf8_lossy(&payload[4..])))
}

/// The bytes of a stream's frames in total (the payload of SUM).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Bytes in DEVICE_DATA.
    pub device_bytes: u64,
    /// Bytes in MEMORY_DATA, and of pages in MEMORY_RUNS.
    pub memory_bytes: u64,
    /// Bytes covered by MEMORY_ZERO, and by runs of zeroes in MEMORY_RUNS.
    pub zero_bytes: u64,
}

impl Totals {
    /// The payload.
    pub fn encode(&self) -> [u8; 24] {
        let mut out = [0; 24];
        out[..8].copy_from_slice(&self.device_bytes.to_le_bytes());
        out[8..16].copy_from_slice(&self.memory_bytes.to_le_bytes());
        out[16..].copy_from_slice(&self.zero_bytes.to_le_bytes());
        out
    }

    /// Reads a payload of 24 bytes.
    pub fn decode(payload: &[u8]) -> Totals {
        Totals {
            device_bytes: u64_at(payload, 0),
            memory_bytes: u64_at(payload, 8),
            zero_bytes: u64_at(payload, 16),
        }
    }
}

/// Length and hash of a saved stream before its SEAL (the payload of SEAL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// The length in bytes.
    pub bytes: u64,
    /// The BLAKE3 hash of these bytes.
    pub blake3: [u8; 32],
}

impl Seal {
    /// The payload.
    pub fn encode(&self) -> [u8; 40] {
        let mut out = [0; 40];
        out[..8].copy_from_slice(&self.bytes.to_le_bytes());
        out[8..].copy_from_slice(&self.blake3);
        out
    }

    /// Reads a payload of 40 bytes.
    pub fn decode(payload: &[u8]) -> Seal {
        Seal { bytes: u64_at(payload, 0), blake3: payload[8..40].try_into().expect("32 bytes") }
    }
}

/// The payload of DEVICE_END.
pub fn encode_device_end(bytes: u64, crc: u32) -> [u8; 16] {
    let mut out = [0; 16];
    out[..8].copy_from_slice(&bytes.to_le_bytes());
    out[8..12].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Reads the payload of DEVICE_END, 16 bytes: bytes and crc32c.
pub fn decode_device_end(payload: &[u8]) -> (u64, u32) {
    (u64_at(payload, 0), u32_at(payload, 8))
}

/// The payload of ROUND.
pub fn encode_round(round: u32, dirty_bytes: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&round.to_le_bytes());
    out[8..].copy_from_slice(&dirty_bytes.to_le_bytes());
    out
}

/// Reads the payload of ROUND, 16 bytes: the round, and the bytes of memory still dirty.
pub fn decode_round(payload: &[u8]) -> (u32, u64) {
    (u32_at(payload, 0), u64_at(payload, 8))
}

/// The payload of DEVICE_HINT.
pub fn encode_hint(info: &PrecopyInfo) -> [u8; 24] {
    let mut out = [0; 24];
    out[..8].copy_from_slice(&info.initial_bytes.to_le_bytes());
    out[8..16].copy_from_slice(&info.dirty_bytes.to_le_bytes());
    out[16..20].copy_from_slice(&info.flags.to_le_bytes());
    out
}

/// Reads the payload of DEVICE_HINT, 24 bytes.
pub fn decode_hint(payload: &[u8]) -> PrecopyInfo {
    PrecopyInfo {
        argsz: 24,
        flags: u32_at(payload, 16),
        initial_bytes: u64_at(payload, 0),
        dirty_bytes: u64_at(payload, 8),
    }
}

/// Reads a payload that is one u64: MEMORY_ZERO's length, PROGRESS's bytes.
pub fn decode_u64(payload: &[u8]) -> u64 {
    u64_at(payload, 0)
}

/// Reads a payload that is one u32: OUTCOME.
pub fn decode_u32(payload: &[u8]) -> u32 {
    u32_at(payload, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_payloads_round_trip() {
        let totals = Totals { device_bytes: 1, memory_bytes: u64::MAX, zero_bytes: 3 };
        assert_eq!(Totals::decode(&totals.encode()), totals);
        assert_eq!(decode_device_end(&encode_device_end(7, 9)), (7, 9));
        assert_eq!(decode_round(&encode_round(7, 9)), (7, 9));
        let info = PrecopyInfo { argsz: 24, flags: 1, initial_bytes: 5, dirty_bytes: 6 };
        assert_eq!(decode_hint(&encode_hint(&info)), info);
        for (code, _) in ABORT_CODES {
            assert_eq!(decode_abort(&encode_abort(code, "why")), (code, "why".into()));
        }
        let long = "ü".repeat(REASON_BYTES_MAX);
        assert!(encode_abort(AbortCode::Other, &long).len() <= REASON_BYTES_MAX + 4);
        assert_eq!(decode_abort(b"\x63\0\0\0a\x1b[2J\xff").1, "a\\u{1b}[2J\u{fffd}");
    }
}
