//! The saved stream: records of 16 bytes, each followed by what it announces.
//!
//! ```text
//! 0   u32  kind: 1 identity, 2 blocks, 3 rest
//! 4   u32  identity, rest: bytes that follow; blocks: index of the first block
//! 8   u32  identity, rest: crc32c of these bytes; blocks: how many whole blocks follow
//! 12  u32  crc32c of the 12 bytes before
//! ```
//!
//! All little-endian. An identity comes first, then any number of runs of blocks, a block later in
//! the stream replacing the same one before it; then the rest, which is the last. Blocks carry
//! their own proof (see [`Stamp`](super::Stamp)) and are lent and received in place.

use limosa_device::pci::FunctionState;

use super::load::LoadError;

/// Bytes of a record.
pub(super) const RECORD_BYTES: usize = 16;

/// The most bytes of an identity or rest.
pub(super) const SECTION_BYTES_MAX: usize = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Identity { bytes: u32, crc: u32 },
    Blocks { first: u32, count: u32 },
    Rest { bytes: u32, crc: u32 },
}

impl Record {
    pub(super) fn encode(self) -> [u8; RECORD_BYTES] {
        let (kind, a, b) = match self {
            Record::Identity { bytes, crc } => (1_u32, bytes, crc),
            Record::Blocks { first, count } => (2, first, count),
            Record::Rest { bytes, crc } => (3, bytes, crc),
        };
        let mut record = [0; RECORD_BYTES];
        for (at, field) in [kind, a, b].into_iter().enumerate() {
            record[at * 4..at * 4 + 4].copy_from_slice(&field.to_le_bytes());
        }
        let crc = crc32c::crc32c(&record[..12]);
        record[12..].copy_from_slice(&crc.to_le_bytes());
        record
    }

    pub(super) fn decode(record: &[u8; RECORD_BYTES]) -> Result<Record, LoadError> {
        let field = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| record[at * 4 + byte]));
        if field(3) != crc32c::crc32c(&record[..12]) {
            return Err(LoadError::Damaged("a record".into()));
        }
        match (field(0), field(1), field(2)) {
            (1, bytes, crc) => Ok(Record::Identity { bytes, crc }),
            (2, first, count) => Ok(Record::Blocks { first, count }),
            (3, bytes, crc) => Ok(Record::Rest { bytes, crc }),
            (kind, ..) => Err(LoadError::Unknown(kind)),
        }
    }

    /// An identity or rest with its record before it.
    pub(super) fn section(record: impl FnOnce(u32, u32) -> Record, section: &[u8]) -> Vec<u8> {
        let record = record(section.len() as u32, crc32c::crc32c(section));
        [&record.encode(), section].concat()
    }
}

/// Which device a state is of. Field numbers are never used for anything else.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Identity {
    #[prost(string, tag = "1")]
    pub(super) kind: String,
    #[prost(uint32, tag = "2")]
    pub(super) version: u32,
    #[prost(uint64, tag = "3")]
    pub(super) state_bytes: u64,
    #[prost(uint32, tag = "4")]
    pub(super) block_bytes: u32,
    #[prost(uint64, tag = "5")]
    pub(super) seed: u64,
}

pub(super) const KIND: &str = "synthetic";

/// The newest version of the state that this program knows.
pub(super) const VERSION: u32 = 1;

/// All of the state beside the blocks. Field numbers are never used for anything else.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Rest {
    /// Over all blocks.
    #[prost(uint64, tag = "1")]
    pub(super) checksum: u64,
    #[prost(uint64, tag = "2")]
    pub(super) dirtied: u64,
    #[prost(uint64, tag = "3")]
    pub(super) cursor: u64,
    #[prost(uint64, tag = "4")]
    pub(super) dirty_rate: u64,
    #[prost(uint64, tag = "5")]
    pub(super) dma_base: u64,
    #[prost(uint64, tag = "6")]
    pub(super) dma_pages: u64,
    #[prost(uint64, tag = "7")]
    pub(super) dma_pattern: u64,
    #[prost(uint64, tag = "8")]
    pub(super) dma_rate: u64,
    #[prost(uint64, tag = "9")]
    pub(super) dma_limit: u64,
    #[prost(uint64, tag = "10")]
    pub(super) dma_sequence: u64,
    #[prost(bool, tag = "11")]
    pub(super) dma_enabled: bool,
    #[prost(bool, tag = "12")]
    pub(super) dma_failed: bool,
    #[prost(bytes = "vec", tag = "13")]
    pub(super) scratch: Vec<u8>,
    #[prost(message, optional, tag = "14")]
    pub(super) function: Option<FunctionState>,
}
