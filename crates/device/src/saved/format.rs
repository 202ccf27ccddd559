//! The fixed parts of a saved state (`docs/saved-state.md`).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const MAGIC: [u8; 8] = *b"LIMOSADS";
pub(super) const FORMAT_VERSION: u32 = 1;
pub(super) const KIND_BYTES: usize = 64;
pub(super) const NAME_BYTES: usize = 16;
pub(super) const CHECKSUM_BYTES: usize = size_of::<U32>();
pub(super) const OPTIONAL: u32 = 1;
pub(super) const END: [u8; NAME_BYTES] = *b"end\0\0\0\0\0\0\0\0\0\0\0\0\0";
pub(super) const END_VERSION: u32 = 1;

/// A state's header, up to the kind.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: [u8; 8],
    pub(super) format_version: U32,
    pub(super) kind_bytes: U16,
    pub(super) zero: U16,
}

/// A section's head, up to its checksum.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Head {
    pub(super) name: [u8; NAME_BYTES],
    pub(super) version: U32,
    pub(super) flags: U32,
    pub(super) sequence: U32,
    pub(super) zero: U32,
    pub(super) place: U64,
    pub(super) length: U64,
}

/// The payload of the end.
#[derive(Clone, Copy, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct End {
    pub(super) sections: U64,
    pub(super) bytes: U64,
}

const _: () = assert!(size_of::<Header>() == 16 && size_of::<Head>() == 48 && size_of::<End>() == 16);

/// Whether these are 1 to `bytes_max` printable ASCII characters without a space.
pub(super) const fn is_word(bytes: &[u8], bytes_max: usize) -> bool {
    let mut at = 0;
    while at < bytes.len() {
        if !bytes[at].is_ascii_graphic() {
            return false;
        }
        at += 1;
    }
    !bytes.is_empty() && bytes.len() <= bytes_max
}

/// A name without its padding zeros, or `None` if it is invalid.
pub(super) fn name_of(bytes: &[u8; NAME_BYTES]) -> Option<&str> {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(NAME_BYTES);
    let (name, rest) = bytes.split_at(end);
    if !is_word(name, NAME_BYTES) || rest.iter().any(|byte| *byte != 0) {
        return None;
    }
    std::str::from_utf8(name).ok()
}

/// The 16 bytes of a name that [`is_word`].
pub(super) fn name_bytes(name: &str) -> [u8; NAME_BYTES] {
    let mut bytes = [0; NAME_BYTES];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}
