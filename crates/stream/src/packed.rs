//! Compressed payloads (`docs/stream.md: Compressed payloads`). Each is compressed on its own: the decompressed length,
//! u32, then the compressed bytes.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use super::{DATA_BYTES_MAX, Damage, Header, u32_at};
use crate::buffer::{Buffer, Gauge};

/// Bytes of the length in front.
const LENGTH_BYTES: usize = 4;
/// The fastest level of zstd: links for which compression pays are faster than the higher levels.
const ZSTD_LEVEL: i32 = 1;

/// How payloads are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Zstandard (RFC 8878), a frame for each payload, at level 1.
    Zstd,
    /// LZ4's block format, a block for each payload: faster, and compresses less.
    Lz4,
}

impl Compression {
    /// All algorithms.
    pub const ALL: [Compression; 2] = [Compression::Zstd, Compression::Lz4];

    /// The name in [`Offer::needs`](super::Offer::needs).
    pub const fn name(self) -> &'static str {
        match self {
            Compression::Zstd => "zstd",
            Compression::Lz4 => "lz4",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text that is not the name of a [`Compression`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a compression: expected zstd or lz4")]
pub struct UnknownCompression(String);

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(name: &str) -> Result<Compression, UnknownCompression> {
        let known = Compression::ALL.into_iter().find(|compression| compression.name() == name);
        known.ok_or_else(|| UnknownCompression(name.into()))
    }
}

/// Compresses payloads. Keep it for the next payload, since its memory is reused.
pub struct Packer {
    coder: Coder,
    packed: Buffer,
}

enum Coder {
    Zstd(zstd::bulk::Compressor<'static>),
    Lz4,
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl Packer {
    /// The error is the system's: no memory.
    pub fn new(compression: Compression) -> std::io::Result<Packer> {
        Packer::counted(compression, &Arc::default())
    }

    /// Like [`Packer::new`], with a buffer that this gauge counts.
    pub fn counted(compression: Compression, buffers: &Arc<Gauge>) -> std::io::Result<Packer> {
        let coder = match compression {
            Compression::Zstd => Coder::Zstd(zstd::bulk::Compressor::new(ZSTD_LEVEL)?),
            Compression::Lz4 => Coder::Lz4,
        };
        Ok(Packer { coder, packed: Buffer::new(buffers) })
    }

    /// The compressed payload, or `None` if it would not be shorter: then the payload is sent as it is.
    pub fn pack(&mut self, payload: &[u8]) -> Option<&[u8]> {
        let raw = u32::try_from(payload.len()).ok().filter(|raw| *raw as usize <= DATA_BYTES_MAX)?;
        let room = match self.coder {
            Coder::Zstd(_) => payload.len(),
            Coder::Lz4 => lz4_flex::block::get_maximum_output_size(payload.len()),
        };
        self.packed.grow(LENGTH_BYTES + room);
        let (length, packed) = self.packed.split_at_mut(LENGTH_BYTES);
        length.copy_from_slice(&raw.to_le_bytes());
        // A compressed payload that does not fit into the length of the original is not shorter.
        let bytes = match &mut self.coder {
            Coder::Zstd(zstd) => zstd.compress_to_buffer(payload, &mut packed[..room]).ok()?,
            Coder::Lz4 => lz4_flex::block::compress_into(payload, &mut packed[..room]).ok()?,
        };
        let bytes = LENGTH_BYTES + bytes;
        (bytes < payload.len()).then(|| &self.packed[..bytes])
    }
}

/// Decompresses payloads.
pub struct Unpacker {
    coder: Decoder,
}

enum Decoder {
    Zstd(zstd::bulk::Decompressor<'static>),
    Lz4,
}

impl fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Unpacker {
    /// The error is the system's: no memory.
    pub fn new(compression: Compression) -> std::io::Result<Unpacker> {
        let coder = match compression {
            Compression::Zstd => Decoder::Zstd(zstd::bulk::Decompressor::new()?),
            Compression::Lz4 => Decoder::Lz4,
        };
        Ok(Unpacker { coder })
    }

    /// Decompresses the payload of a frame into `raw`, and returns the header that the frame would have had without
    /// compression. The caller has checked the payload against its checksum. Never allocates more than
    /// [`DATA_BYTES_MAX`].
    pub fn unpack(&mut self, header: &Header, payload: &[u8], raw: &mut Vec<u8>) -> Result<Header, Damage> {
        let kind = header.kind;
        let content = |why: String| Damage::Content { kind, why };
        if payload.len() <= LENGTH_BYTES {
            let expected = format!("more than {LENGTH_BYTES}, for it is compressed");
            return Err(Damage::Length { kind, bytes: payload.len(), expected });
        }
        let length = u32_at(payload, 0) as usize;
        // A writer compresses only if that makes the payload shorter.
        if !(payload.len() + 1..=DATA_BYTES_MAX).contains(&length) {
            let least = payload.len() + 1;
            return Err(content(format!(
                "{length} bytes before it was compressed, expected {least} to {DATA_BYTES_MAX}"
            )));
        }
        raw.clear();
        raw.reserve_exact(length);
        raw.resize(length, 0);
        let packed = &payload[LENGTH_BYTES..];
        let bytes = match &mut self.coder {
            Decoder::Zstd(zstd) => {
                zstd.decompress_to_buffer(packed, &mut raw[..]).map_err(|error| error.to_string())
            }
            Decoder::Lz4 => lz4_flex::block::decompress_into(packed, raw).map_err(|error| error.to_string()),
        };
        match bytes {
            Ok(bytes) if bytes == length => Ok(header.unpacked(raw)),
            Ok(bytes) => Err(content(format!("{bytes} bytes were compressed, it says {length}"))),
            Err(error) => Err(content(format!("it cannot be decompressed: {error}"))),
        }
    }
}

/// Decompresses a payload whose header says that it is compressed. Fails without an unpacker.
pub fn unpack(
    unpacker: Option<&mut Unpacker>,
    header: &Header,
    payload: &[u8],
    raw: &mut Vec<u8>,
) -> Result<Header, Damage> {
    match unpacker {
        Some(unpacker) => unpacker.unpack(header, payload, raw),
        None => {
            let why = "it is compressed, and the OFFER names no compression".into();
            Err(Damage::Content { kind: header.kind, why })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Kind;
    use super::*;

    fn header(payload: &[u8]) -> Header {
        Header::new(Kind::MEMORY_DATA, 3, 4096, 7, payload)
    }

    /// Packs and takes apart again; whether it became shorter.
    fn round_trip(compression: Compression, payload: &[u8]) -> bool {
        let mut packer = Packer::new(compression).unwrap();
        let Some(packed) = packer.pack(payload) else { return false };
        let packed = packed.to_vec();
        assert!(packed.len() < payload.len());
        let sent = header(payload).packed(&packed);
        assert!(sent.check_payload(&packed).is_ok());
        assert_eq!(Header::decode(&sent.encode()), Ok(sent));
        let mut raw = vec![9; 5];
        let found = Unpacker::new(compression).unwrap().unpack(&sent, &packed, &mut raw).unwrap();
        assert!(raw == payload);
        assert_eq!(found, header(payload));
        true
    }

    #[test]
    fn what_becomes_shorter_comes_back_and_what_does_not_goes_as_it_is() {
        let mut noise = vec![0; DATA_BYTES_MAX];
        let mut word = 88_172_645_463_325_252_u64;
        for bytes in noise.as_chunks_mut::<8>().0 {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            *bytes = word.to_le_bytes();
        }
        for compression in Compression::ALL {
            for length in [64, 4096, 65_536, DATA_BYTES_MAX] {
                assert!(round_trip(compression, &vec![7; length]), "{compression}, {length}");
                assert!(!round_trip(compression, &noise[..length]), "{compression}, {length}");
            }
            for length in 0..8 {
                assert!(!round_trip(compression, &vec![7; length]), "{compression}, {length}");
            }
            assert_eq!(compression.name().parse(), Ok(compression));
        }
        assert!("gzip".parse::<Compression>().is_err());
    }

    #[test]
    fn lengths_that_lie_are_refused_before_anything_is_allocated() {
        for compression in Compression::ALL {
            let mut packer = Packer::new(compression).unwrap();
            let packed = packer.pack(&[7; 8192]).unwrap().to_vec();
            for lie in [0, 1, packed.len() as u32, 8191, 8193, DATA_BYTES_MAX as u32 + 1, u32::MAX] {
                let mut payload = packed.clone();
                payload[..4].copy_from_slice(&lie.to_le_bytes());
                let mut raw = Vec::new();
                let found = Unpacker::new(compression).unwrap().unpack(&header(&payload), &payload, &mut raw);
                assert!(matches!(found, Err(Damage::Content { .. })), "{compression}, {lie}: {found:?}");
                assert!(raw.capacity() <= 8193, "{compression}, {lie}");
            }
            for short in 0..=4 {
                let found = Unpacker::new(compression).unwrap().unpack(
                    &header(&packed[..short.max(1)]),
                    &packed[..short],
                    &mut Vec::new(),
                );
                assert!(matches!(found, Err(Damage::Length { .. })), "{compression}, {short}");
            }
        }
    }

    proptest! {
        #[test]
        fn anything_comes_back(bytes in prop::collection::vec(0u8..4, 0..4096), times in 1usize..20) {
            let payload = bytes.repeat(times);
            for compression in Compression::ALL {
                round_trip(compression, &payload);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(length in 0u32..100_000, bytes: Vec<u8>) {
            let payload = [&length.to_le_bytes()[..], &bytes].concat();
            for compression in Compression::ALL {
                let mut raw = Vec::new();
                if Unpacker::new(compression).unwrap().unpack(&header(&payload), &payload, &mut raw).is_ok() {
                    prop_assert!(raw.len() > payload.len() && raw.len() <= DATA_BYTES_MAX);
                }
            }
        }
    }
}
