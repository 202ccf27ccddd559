//! The frame's header and the kinds of frames (`docs/stream.md: Frame`, `Kinds`).

use std::fmt;

use super::runs::{COUNT_BYTES, RUN_BYTES};
use super::{
    DATA_BYTES_MAX, Damage, HEADER_BYTES, OFFER_BYTES_MAX, PROOF_BYTES, REASON_BYTES_MAX, u16_at, u32_at,
    u64_at,
};

const FLAG_SKIPPABLE: u16 = 1 << 0;
const FLAG_COMPRESSED: u16 = 1 << 1;
const FLAG_UNCHECKED: u16 = 1 << 2;

/// The kind of a frame. An unknown number survives a round trip.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind(pub u16);

macro_rules! kinds {
    ($($name:ident = $number:literal, $least:expr, $most:expr, $doc:literal;)*) => {
        impl Kind {
            $(#[doc = $doc] pub const $name: Kind = Kind($number);)*

            /// The name, or `None` for a kind that this version does not know.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $($number => Some(stringify!($name)),)* _ => None }
            }

            /// The minimum and the maximum length of its payload without a proof, in bytes.
            pub const fn payload_bytes(self) -> (usize, usize) {
                match self.0 { $($number => ($least, $most),)* _ => (0, DATA_BYTES_MAX) }
            }
        }
    };
}

kinds! {
    OFFER = 1, 2, OFFER_BYTES_MAX, "Devices and memory with their facts, JSON.";
    ANSWER = 2, 2, OFFER_BYTES_MAX, "Whether the offer is accepted, and if not why, JSON.";
    DEVICE_BEGIN = 3, 0, 0, "A device's data follows.";
    DEVICE_DATA = 4, 1, DATA_BYTES_MAX, "The next bytes of a device's data stream.";
    DEVICE_HINT = 5, 24, 24, "A device's pre-copy info.";
    DEVICE_END = 6, 16, 16, "A device's data is complete.";
    MEMORY_DATA = 7, 1, DATA_BYTES_MAX, "Pages of memory.";
    MEMORY_ZERO = 8, 8, 8, "A run of pages that hold zeroes.";
    ROUND = 9, 16, 16, "A round of pre-copy is over.";
    STOPPED = 10, 0, 0, "The source's devices are stopped.";
    SUM = 11, 24, 24, "Everything is sent, and these are the totals.";
    READY = 12, 0, 0, "The destination has loaded everything, is in STOP, and holds.";
    COMMIT = 13, 0, 0, "The destination is told to run.";
    RUNNING = 14, 0, 0, "The destination runs.";
    ABORT = 15, 4, 4 + REASON_BYTES_MAX, "The sender gives up, and why.";
    PROGRESS = 16, 8, 8, "A keep-alive.";
    QUERY = 17, 0, 0, "Asks how this move ended.";
    OUTCOME = 18, 4, 4, "How it ended.";
    DONE = 19, 0, 0, "The source knows that the destination runs.";
    FLUSH = 20, 0, 0, "Asks whether every frame before it on this link is handled.";
    FLUSHED = 21, 0, 0, "Every frame before FLUSH on that link is handled.";
    CREDIT = 22, 0, 0, "How much of its data a device has taken.";
    JOIN = 23, 4, 4, "The number of a further link.";
    LINK_END = 24, 0, 0, "The last frame of a further link.";
    LINKS = 25, 4, 4, "How many links the source uses, if they are fewer than was agreed.";
    REFUSED = 26, 4, 4 + REASON_BYTES_MAX, "After READY: the destination will never run this move, and why.";
    MEMORY_RUNS = 27, RUN_BYTES + COUNT_BYTES, DATA_BYTES_MAX, "Several runs of pages of memory, some of them zeroes.";
    WINDOW_FULL = 28, 0, 0, "The source has more of a device's data than its window allows to be on its way.";
    WINDOW = 29, 0, 0, "A device's window is larger from now on.";
    SEAL = 30, 40, 40, "Length and BLAKE3 hash of a saved stream up to here.";
}

impl Kind {
    /// By how many bytes its payload is longer with a proof (`docs/stream.md: Proofs`); 0 for a kind that carries none.
    pub const fn proof_bytes(self) -> usize {
        match self {
            Kind::JOIN | Kind::SUM | Kind::READY | Kind::COMMIT | Kind::RUNNING | Kind::REFUSED => {
                PROOF_BYTES
            }
            Kind::DONE | Kind::OUTCOME => PROOF_BYTES,
            // The nonce comes with it.
            Kind::QUERY => 2 * PROOF_BYTES,
            _ => 0,
        }
    }

    /// Whether a payload of this kind may have this length in bytes, with a proof or without.
    pub const fn allows(self, bytes: usize) -> bool {
        let ((least, most), proof) = (self.payload_bytes(), self.proof_bytes());
        (least <= bytes && bytes <= most) || (proof > 0 && least + proof <= bytes && bytes <= most + proof)
    }

    /// Whether its payload may be compressed.
    pub const fn may_be_compressed(self) -> bool {
        matches!(self, Kind::MEMORY_DATA | Kind::MEMORY_RUNS | Kind::DEVICE_DATA)
    }

    /// Whether its payload may come without a checksum, where both sides have agreed on that (`docs/stream.md: Unchecked
    /// payloads`).
    pub const fn may_be_unchecked(self) -> bool {
        matches!(self, Kind::MEMORY_DATA | Kind::MEMORY_RUNS)
    }

    /// Whether readers that do not know this kind may pass over it.
    pub const fn is_skippable(self) -> bool {
        matches!(self, Kind::DEVICE_HINT | Kind::PROGRESS | Kind::SEAL)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => write!(f, "frame of kind {}", self.0),
        }
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The header of a frame, which precedes the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The kind of the frame.
    pub kind: Kind,
    /// Whether a reader that does not know the kind may pass over it.
    pub skippable: bool,
    /// Whether the payload is compressed, and begins with its decompressed length.
    pub compressed: bool,
    /// Whether the payload has no checksum.
    pub unchecked: bool,
    /// The id of its device or memory region, or the number of its link; 0 for none (`docs/stream.md: Frame`).
    pub section: u32,
    /// Bytes of payload that follow.
    pub length: u32,
    /// The number of the frame.
    pub sequence: u32,
    /// The position in the section, in bytes; for some kinds another number (`docs/stream.md: Frame`).
    pub position: u64,
    /// crc32c of the payload; 0 without a checksum.
    pub payload_crc: u32,
}

impl Header {
    /// The header of a frame with this payload.
    ///
    /// # Panics
    /// If the kind does not allow a payload of this length: a defect of the caller.
    pub fn new(kind: Kind, section: u32, position: u64, sequence: u32, payload: &[u8]) -> Header {
        Header::with_crc(kind, section, position, sequence, payload.len(), payload_crc(payload))
    }

    /// The header of a frame whose payload has so many bytes and this crc32c.
    ///
    /// # Panics
    /// If the kind does not allow a payload of this length: a defect of the caller.
    pub fn with_crc(
        kind: Kind,
        section: u32,
        position: u64,
        sequence: u32,
        length: usize,
        payload_crc: u32,
    ) -> Header {
        assert!(kind.allows(length), "{kind} of {length} bytes");
        Header {
            kind,
            skippable: kind.is_skippable(),
            compressed: false,
            unchecked: false,
            section,
            length: length as u32,
            sequence,
            position,
            payload_crc,
        }
    }

    /// The header of a frame of memory whose payload has this many bytes and no checksum.
    ///
    /// # Panics
    /// If the kind does not allow that: a defect of the caller.
    pub fn unchecked(kind: Kind, section: u32, position: u64, sequence: u32, length: usize) -> Header {
        assert!(
            kind.may_be_unchecked() && kind.allows(length),
            "{kind} of {length} bytes without a checksum"
        );
        Header {
            kind,
            skippable: false,
            compressed: false,
            unchecked: true,
            section,
            length: length as u32,
            sequence,
            position,
            payload_crc: 0,
        }
    }

    /// The header of the same frame with this compressed payload.
    pub fn packed(self, payload: &[u8]) -> Header {
        Header { compressed: true, length: payload.len() as u32, payload_crc: payload_crc(payload), ..self }
    }

    /// The header of the same frame with this decompressed payload.
    pub fn unpacked(self, payload: &[u8]) -> Header {
        Header { compressed: false, ..self.packed(payload) }
    }

    /// The bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..2].copy_from_slice(&self.kind.0.to_le_bytes());
        let skippable = if self.skippable { FLAG_SKIPPABLE } else { 0 };
        let compressed = if self.compressed { FLAG_COMPRESSED } else { 0 };
        let unchecked = if self.unchecked { FLAG_UNCHECKED } else { 0 };
        out[2..4].copy_from_slice(&(skippable | compressed | unchecked).to_le_bytes());
        out[4..8].copy_from_slice(&self.section.to_le_bytes());
        out[8..12].copy_from_slice(&self.length.to_le_bytes());
        out[12..16].copy_from_slice(&self.sequence.to_le_bytes());
        out[16..24].copy_from_slice(&self.position.to_le_bytes());
        out[24..28].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32c::crc32c(&out[..28]);
        out[28..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads the bytes and checks everything that does not need the payload: the checksum, the flags, and the length
    /// against the limits of the kind. A skippable frame of an unknown kind is accepted, whatever its other flags are.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, Damage> {
        let (expected, computed) = (u32_at(bytes, 28), crc32c::crc32c(&bytes[..28]));
        if expected != computed {
            return Err(Damage::Checksum { of: "a frame's header", expected, computed });
        }
        let kind = Kind(u16_at(bytes, 0));
        let flags = u16_at(bytes, 2);
        let skippable = flags & FLAG_SKIPPABLE != 0;
        if kind.name().is_none() && !skippable {
            return Err(Damage::Unknown { what: kind.to_string() });
        }
        let compressed = kind.may_be_compressed() && flags & FLAG_COMPRESSED != 0;
        let unchecked = kind.may_be_unchecked() && !compressed && flags & FLAG_UNCHECKED != 0;
        let known = match (compressed, unchecked) {
            (true, _) => FLAG_SKIPPABLE | FLAG_COMPRESSED,
            (_, true) => FLAG_SKIPPABLE | FLAG_UNCHECKED,
            _ => FLAG_SKIPPABLE,
        };
        if kind.name().is_some() && flags & !known != 0 {
            return Err(Damage::Unknown { what: format!("{kind} with flags {flags:#x}") });
        }
        let length = u32_at(bytes, 8);
        if !kind.allows(length as usize) {
            let (least, most) = kind.payload_bytes();
            let mut expected = if least == most { format!("{least}") } else { format!("{least} to {most}") };
            if kind.proof_bytes() > 0 {
                expected.push_str(&format!(", and {} more with a proof", kind.proof_bytes()));
            }
            return Err(Damage::Length { kind, bytes: length as usize, expected });
        }
        let payload_crc = u32_at(bytes, 24);
        if unchecked && payload_crc != 0 {
            let why = format!("it has the checksum {payload_crc:#010x}, and the flag UNCHECKED");
            return Err(Damage::Content { kind, why });
        }
        Ok(Header {
            kind,
            skippable,
            compressed,
            unchecked,
            section: u32_at(bytes, 4),
            length,
            sequence: u32_at(bytes, 12),
            position: u64_at(bytes, 16),
            payload_crc,
        })
    }

    /// Checks the payload, which must have [`Header::length`] bytes, against its checksum, if it has one.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), Damage> {
        let computed = if self.unchecked { 0 } else { payload_crc(payload) };
        match payload.len() == self.length as usize {
            true => self.check_crc(computed),
            false => Err(Damage::Checksum { of: "a frame's payload", expected: self.payload_crc, computed }),
        }
    }

    /// Checks the crc32c of a payload of [`Header::length`] bytes that was computed as it came. Without a checksum it passes.
    pub fn check_crc(&self, computed: u32) -> Result<(), Damage> {
        if !self.unchecked && computed != self.payload_crc {
            return Err(Damage::Checksum { of: "a frame's payload", expected: self.payload_crc, computed });
        }
        Ok(())
    }

    /// Refuses a payload without a checksum where both sides have not agreed on that.
    pub fn check_is_checked(&self, takes_unchecked: bool) -> Result<(), Damage> {
        if self.unchecked && !takes_unchecked {
            return Err(Damage::Unknown {
                what: format!("{} without a checksum, which was not agreed on", self.kind),
            });
        }
        Ok(())
    }

    /// Checks the frame's number against the expected one.
    pub fn check_sequence(&self, due: u32) -> Result<(), Damage> {
        if self.sequence != due {
            return Err(Damage::Sequence { expected: due, found: self.sequence });
        }
        Ok(())
    }
}

/// crc32c, on long input twice as fast as by the processor's crc32 instruction.
fn payload_crc(payload: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(payload)
}

/// The checksum of bytes that arrive in pieces. It reads the bytes again while they are in the cache. Combining the
/// checksums of pieces takes longer, for pieces of up to half a MiB.
#[derive(Clone, Debug)]
pub struct RunningCrc(crc_fast::Digest);

impl Default for RunningCrc {
    fn default() -> RunningCrc {
        RunningCrc::new()
    }
}

impl RunningCrc {
    /// The checksum of no bytes.
    pub fn new() -> RunningCrc {
        RunningCrc(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi))
    }

    /// Appends these bytes.
    pub fn add(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// The checksum of all bytes so far.
    pub fn value(&self) -> u32 {
        self.0.finalize() as u32
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn headers_round_trip_and_every_altered_bit_is_refused(
            kind in 1u16..=18, section: u32, sequence: u32, position: u64, fill: u8, bit in 0usize..HEADER_BYTES * 8,
        ) {
            let kind = Kind(kind);
            let payload = vec![fill; kind.payload_bytes().0];
            let header = Header::new(kind, section, position, sequence, &payload);
            let mut bytes = header.encode();
            prop_assert_eq!(Header::decode(&bytes), Ok(header));
            prop_assert_eq!(header.check_payload(&payload), Ok(()));
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&bytes).is_err());
        }

        #[test]
        fn arbitrary_headers_never_panic(mut bytes: [u8; HEADER_BYTES]) {
            let _ = Header::decode(&bytes);
            let crc = crc32c::crc32c(&bytes[..28]);
            bytes[28..].copy_from_slice(&crc.to_le_bytes());
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert!(header.length as usize <= DATA_BYTES_MAX);
                prop_assert!(header.kind.name().is_some() || header.skippable);
            }
        }
    }

    #[test]
    fn both_ways_to_compute_a_checksum_agree() {
        let bytes: Vec<u8> = (0..DATA_BYTES_MAX).map(|at| (at ^ (at >> 7)) as u8).collect();
        for length in (0..600).chain([4095, 4096, 4097, 65_537, DATA_BYTES_MAX]) {
            assert_eq!(payload_crc(&bytes[..length]), crc32c::crc32c(&bytes[..length]), "of {length} bytes");
        }
    }

    fn encode_raw(kind: u16, flags: u16, length: u32) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&kind.to_le_bytes());
        bytes[2..4].copy_from_slice(&flags.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn only_memory_that_is_not_compressed_may_come_without_a_checksum() {
        let header = Header::unchecked(Kind::MEMORY_DATA, 3, 8192, 5, 4096);
        assert_eq!(Header::decode(&header.encode()), Ok(header));
        assert_eq!(header.check_payload(&[7; 4096]), Ok(()));
        assert!(header.check_payload(&[7; 4095]).is_err());
        for (kind, flags) in [
            (Kind::DEVICE_DATA, FLAG_UNCHECKED),
            (Kind::OFFER, FLAG_UNCHECKED),
            (Kind::MEMORY_DATA, FLAG_UNCHECKED | FLAG_COMPRESSED),
        ] {
            let refused = Header::decode(&encode_raw(kind.0, flags, 4096));
            assert!(matches!(refused, Err(Damage::Unknown { .. })), "{kind}: {refused:?}");
        }
        let with_both = Header { payload_crc: 1, ..header };
        assert!(matches!(Header::decode(&with_both.encode()), Err(Damage::Content { .. })));
    }

    #[test]
    fn unknown_kinds_pass_only_when_skippable() {
        assert!(matches!(Header::decode(&encode_raw(999, 0, 0)), Err(Damage::Unknown { .. })));
        assert!(Header::decode(&encode_raw(999, 1 | 1 << 9, 5)).is_ok());
        let flagged = Header::decode(&encode_raw(Kind::COMMIT.0, 1 << 9, 0));
        assert!(matches!(flagged, Err(Damage::Unknown { .. })));
    }

    #[test]
    fn lengths_beyond_the_kind_s_limit_are_refused_before_the_payload() {
        for (kind, length) in [
            (4, 1 << 20 | 1),
            (4, 0),
            (4, u32::MAX),
            (1, 256 << 10 | 1),
            (13, 1),
            (13, 33),
            (11, 55),
            (15, 3),
            (26, 4 + 32 + 4097),
        ] {
            assert!(
                matches!(Header::decode(&encode_raw(kind, 0, length)), Err(Damage::Length { .. })),
                "{kind}"
            );
        }
    }
}
