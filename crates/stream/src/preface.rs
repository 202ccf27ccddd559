//! The preface, the first bytes of a stream (`docs/stream.md: Preface`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::proof::random;
use super::{Damage, PREFACE_BYTES, VERSION, VERSION_OLDEST, u16_at, u32_at};

const MAGIC: [u8; 8] = *b"\x89LMSA\r\n\x1a";
/// The preface flags that a reader must know: it refuses others among these bits.
const FLAGS_MANDATORY: u32 = 0xffff;

/// The unique name of one move: 16 random bytes, printed as 32 hexadecimal digits.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MigrationId(pub [u8; 16]);

impl MigrationId {
    /// A new one, from the system's random numbers.
    pub fn random() -> std::io::Result<MigrationId> {
        random().map(MigrationId)
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not the id of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not the id of a move: expected 32 hexadecimal digits")]
pub struct NotAnId;

impl FromStr for MigrationId {
    type Err = NotAnId;

    fn from_str(text: &str) -> Result<MigrationId, NotAnId> {
        if text.len() != 32 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(NotAnId);
        }
        let number = u128::from_str_radix(text, 16).map_err(|_| NotAnId)?;
        Ok(MigrationId(number.to_be_bytes()))
    }
}

impl Serialize for MigrationId {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MigrationId {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<MigrationId, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

bitflags::bitflags! {
    /// Flags of a preface.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PrefaceFlags: u32 {
        /// A saved stream: no peer answers, and nothing follows SUM.
        const STORED = 1 << 0;
        /// A saved stream that is complete only with a SEAL. Old readers ignore this.
        const SEALED = 1 << 16;
        /// A further link of a move.
        const FURTHER = 1 << 1;
        const _ = !0;
    }
}

/// The first bytes of a stream, in either direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preface {
    /// The writer's version.
    pub version: u16,
    /// The oldest version whose readers can read the stream.
    pub oldest: u16,
    /// What kind of stream it is.
    pub flags: PrefaceFlags,
    /// The id of the move.
    pub id: MigrationId,
}

impl Preface {
    /// The preface that this version writes.
    pub fn new(id: MigrationId, flags: PrefaceFlags) -> Preface {
        Preface { version: VERSION, oldest: VERSION_OLDEST, flags, id }
    }

    /// The bytes.
    pub fn encode(&self) -> [u8; PREFACE_BYTES] {
        let mut out = [0; PREFACE_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&self.version.to_le_bytes());
        out[10..12].copy_from_slice(&self.oldest.to_le_bytes());
        out[12..16].copy_from_slice(&self.flags.bits().to_le_bytes());
        out[16..32].copy_from_slice(&self.id.0);
        let crc = crc32c::crc32c(&out[..36]);
        out[36..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Whether a preface may begin with these bytes: they are those of the magic number, as far as there are any.
    pub fn may_begin(bytes: &[u8]) -> bool {
        bytes.iter().zip(&MAGIC).all(|(byte, magic)| byte == magic)
    }

    /// Reads the bytes. Fails with [`Damage::NotAStream`], [`Damage::Checksum`], [`Damage::Newer`], or with
    /// [`Damage::Unknown`] for an unknown flag that must not be ignored.
    pub fn decode(bytes: &[u8; PREFACE_BYTES]) -> Result<Preface, Damage> {
        if bytes[..8] != MAGIC {
            return Err(Damage::NotAStream);
        }
        let (expected, computed) = (u32_at(bytes, 36), crc32c::crc32c(&bytes[..36]));
        if expected != computed {
            return Err(Damage::Checksum { of: "the preface", expected, computed });
        }
        let (version, oldest) = (u16_at(bytes, 8), u16_at(bytes, 10));
        if oldest > VERSION {
            return Err(Damage::Newer { version, oldest });
        }
        if version == 0 || oldest > version {
            return Err(Damage::Unknown { what: format!("version {version} (oldest {oldest})") });
        }
        let flags = u32_at(bytes, 12);
        let unknown = flags & FLAGS_MANDATORY & !PrefaceFlags::STORED.union(PrefaceFlags::FURTHER).bits();
        if unknown != 0 {
            return Err(Damage::Unknown { what: format!("preface flags {unknown:#x}") });
        }
        Ok(Preface { version, oldest, flags: PrefaceFlags::from_bits_retain(flags), id: id_in(bytes) })
    }

    /// The id in the bytes of a preface, also of one whose version or flags this reader does not know: the id with which it
    /// is answered. `None` if the bytes are no preface, or were altered.
    pub fn id(bytes: &[u8; PREFACE_BYTES]) -> Option<MigrationId> {
        match Preface::decode(bytes) {
            Err(Damage::NotAStream | Damage::Checksum { .. }) => None,
            _ => Some(id_in(bytes)),
        }
    }
}

fn id_in(bytes: &[u8; PREFACE_BYTES]) -> MigrationId {
    MigrationId(bytes[16..32].try_into().expect("sixteen bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preface() -> Preface {
        Preface::new(MigrationId(*b"0123456789abcdef"), PrefaceFlags::STORED)
    }

    fn with(change: impl FnOnce(&mut [u8; PREFACE_BYTES])) -> Result<Preface, Damage> {
        let mut bytes = preface().encode();
        change(&mut bytes);
        let crc = crc32c::crc32c(&bytes[..36]);
        bytes[36..].copy_from_slice(&crc.to_le_bytes());
        Preface::decode(&bytes)
    }

    #[test]
    fn preface_and_id_round_trip() {
        assert_eq!(Preface::decode(&preface().encode()), Ok(preface()));
        let id = MigrationId::random().unwrap();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("+0123456789abcdef0123456789abcde".parse::<MigrationId>(), Err(NotAnId));
        assert_ne!(id, MigrationId::random().unwrap());
    }

    #[test]
    fn every_altered_bit_is_refused() {
        for bit in 0..PREFACE_BYTES * 8 {
            let mut bytes = preface().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Preface::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn newer_streams_are_refused_only_when_they_say_that_they_need_it() {
        let set = |version: u16, oldest: u16| {
            with(|bytes| {
                bytes[8..10].copy_from_slice(&version.to_le_bytes());
                bytes[10..12].copy_from_slice(&oldest.to_le_bytes());
            })
        };
        assert_eq!(set(9, 1).unwrap().version, 9);
        assert_eq!(set(9, 2), Err(Damage::Newer { version: 9, oldest: 2 }));
        assert!(matches!(set(0, 0), Err(Damage::Unknown { .. })));
        assert!(matches!(with(|bytes| bytes[13] = 0x80), Err(Damage::Unknown { .. })));
        assert!(with(|bytes| bytes[15] = 0x80).is_ok(), "a flag of the upper half");
    }

    #[test]
    fn a_preface_of_an_unknown_version_has_an_id_and_an_altered_one_has_none() {
        let mut newer = Preface { version: 9, oldest: 9, ..preface() }.encode();
        assert!(Preface::decode(&newer).is_err());
        assert_eq!(Preface::id(&newer), Some(preface().id));
        newer[20] ^= 1;
        assert_eq!(Preface::id(&newer), None);
        assert_eq!(Preface::id(&[0; PREFACE_BYTES]), None);
    }
}
