//! [`Item`] and [`Ahead`]: the output of a [`Reader`](super::Reader), and the payload that comes next.

use super::{Refusal, Section};

/// The output of a [`Reader`](super::Reader): a small section, complete and verified, or a piece of a bulk section.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// Which section.
    pub section: &'a Section,
    /// The version of the section's contents, which the reader supports.
    pub version: u32,
    /// Where the section's payload belongs.
    pub place: u64,
    /// Where in the payload these bytes come from; 0 for a small section.
    pub offset: u64,
    /// Bytes of the section's payload.
    pub length: u64,
    /// The payload, or a piece of it, not empty. Pieces of one section come in order.
    pub bytes: &'a [u8],
}

/// Bulk payload that comes next, see [`Reader::ahead`](super::Reader::ahead).
#[derive(Clone, Copy, Debug)]
pub struct Ahead<'a> {
    /// Which section.
    pub section: &'a Section,
    /// Where its payload belongs.
    pub place: u64,
    /// Bytes of it that have already arrived.
    pub offset: u64,
    /// Bytes of the whole payload.
    pub length: u64,
}

impl Item<'_> {
    /// Decodes a small section's message. [`Refusal::Malformed`] if that fails.
    pub fn decode<M: prost::Message + Default>(&self) -> Result<M, Refusal> {
        M::decode(self.bytes).map_err(|error| Refusal::malformed(self.section.name, error.to_string()))
    }
}
