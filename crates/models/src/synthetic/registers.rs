//! The registers of BAR 0. Each is 64 bits, little-endian, and read or written in aligned accesses
//! of 4 or 8 bytes; reads may be of any length.

/// Reads "LIMOSASY".
pub const IDENT: u64 = 0x00;
/// Bytes of state.
pub const STATE_BYTES: u64 = 0x08;
/// Bytes of state that change at once.
pub const BLOCK_BYTES: u64 = 0x10;
/// What all contents derive from.
pub const SEED: u64 = 0x18;
/// How many times a block of the state changed since power-on.
pub const DIRTIED: u64 = 0x20;
/// A checksum over which generation every block has.
pub const CHECKSUM: u64 = 0x28;
/// Writing *n* changes *n* blocks at once. Reads 0.
pub const DIRTY: u64 = 0x30;
/// Bytes of state that change each second.
pub const DIRTY_RATE: u64 = 0x38;
/// Reading it checks every byte of the state and tells how many blocks are not as they should be.
pub const BAD_BLOCKS: u64 = 0x40;
/// Writing reports all initial pre-copy data again. Reads 0.
pub const REINIT: u64 = 0x48;
/// IOVA of the DMA window. This and the next three cannot be changed while the engine is on (EBUSY);
/// changing this one, DMA_PAGES or DMA_PATTERN starts the sequence numbers again at 0.
pub const DMA_BASE: u64 = 0x80;
/// Pages of 4 KiB in the DMA window.
pub const DMA_PAGES: u64 = 0x88;
/// The number of a [`Pattern`](super::Pattern).
pub const DMA_PATTERN: u64 = 0x90;
/// The engine stops at this sequence number, and raises the first MSI vector; 0 for never.
pub const DMA_LIMIT: u64 = 0x98;
/// Bytes each second, 0 for as fast as possible. May be changed at any time.
pub const DMA_RATE: u64 = 0xa0;
/// 1 turns the engine on (EINVAL without a window), 0 off; after turning it off, no write is in progress. Reads 1 while
/// it is on.
pub const DMA_CONTROL: u64 = 0xa8;
/// Sequence number of the next write, which is how many writes were done.
pub const DMA_SEQUENCE: u64 = 0xb0;
/// 1 when the engine turned itself off because a write was refused.
pub const DMA_FAILED: u64 = 0xb8;
/// [`SCRATCH_BYTES`] bytes of memory, part of the state.
pub const SCRATCH: u64 = 0x100;
/// Bytes of scratch memory.
pub const SCRATCH_BYTES: usize = 256;
/// Bytes of BAR 0.
pub const BAR_BYTES: u64 = 4096;
/// What [`IDENT`] reads.
pub const IDENT_VALUE: u64 = u64::from_le_bytes(*b"LIMOSASY");
