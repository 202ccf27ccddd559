//! [`Batch`]: frames that a link gets in one write. One of them may be large, and its payload is not copied.

use std::io::IoSlice;

use limosa_guest_memory::SendPart;
use limosa_stream::{HEADER_BYTES, Header};

use super::super::Frame;
use super::header_of;
use crate::link::{Link, LinkError, Wait};

/// A small frame with its header, whose number it gets when it is sent.
pub(super) type SmallFrame = (Header, Box<[u8]>);

/// A small frame to be sent.
pub(super) fn small(frame: &Frame<'_>) -> SmallFrame {
    (header_of(frame), frame.payload.into())
}

/// The payload of the large frame.
#[derive(Clone, Copy)]
pub(super) enum Payload<'p> {
    Bytes(&'p [u8]),
    /// Guest memory, which is sent from where it lies.
    Memory(&'p [SendPart<'p>]),
}

impl Payload<'_> {
    fn len(&self) -> usize {
        match self {
            Payload::Bytes(bytes) => bytes.len(),
            Payload::Memory(parts) => parts.iter().map(SendPart::len).sum(),
        }
    }
}

/// Encoded frames.
pub(super) struct Batch<'p> {
    /// The frames before the large one.
    before: Vec<u8>,
    /// The large one, if there is one.
    header: Option<[u8; HEADER_BYTES]>,
    payload: Payload<'p>,
    large_bytes: usize,
    /// The frames after it.
    after: Vec<u8>,
    /// Where each frame begins.
    starts: Vec<usize>,
    /// The number of the next frame.
    sequence: u32,
    /// The bytes of all payloads.
    pub(super) payload_bytes: u64,
}

impl<'p> Batch<'p> {
    /// A batch whose first frame gets this number.
    pub(super) fn new(sequence: u32) -> Batch<'p> {
        Batch {
            before: Vec::new(),
            header: None,
            payload: Payload::Bytes(&[]),
            large_bytes: 0,
            after: Vec::new(),
            starts: Vec::new(),
            sequence,
            payload_bytes: 0,
        }
    }

    /// Adds small frames, before the large one if that is not added yet.
    pub(super) fn add(&mut self, frames: &[SmallFrame]) {
        for (header, payload) in frames {
            let header = self.begin(*header, payload.len());
            let part = if self.header.is_none() { &mut self.before } else { &mut self.after };
            part.extend_from_slice(&header);
            part.extend_from_slice(payload);
        }
    }

    /// Adds the large frame.
    pub(super) fn add_large(&mut self, header: Header, payload: Payload<'p>) {
        let bytes = payload.len();
        self.header = Some(self.begin(header, bytes));
        (self.payload, self.large_bytes) = (payload, bytes);
    }

    /// The header of the next frame, with its number.
    fn begin(&mut self, mut header: Header, bytes: usize) -> [u8; HEADER_BYTES] {
        header.sequence = self.sequence;
        self.sequence = self.sequence.wrapping_add(1);
        self.starts.push(self.len());
        self.payload_bytes += bytes as u64;
        header.encode()
    }

    /// How many bytes it has.
    pub(super) fn len(&self) -> usize {
        self.before.len() + self.header().len() + self.large_bytes + self.after.len()
    }

    fn header(&self) -> &[u8] {
        self.header.as_ref().map_or(&[], |header| header)
    }

    /// How many frames have begun in the first bytes.
    pub(super) fn begun(&self, bytes: usize) -> u32 {
        self.starts.partition_point(|start| *start < bytes) as u32
    }

    /// Writes once, from this byte on. Returns the number of bytes.
    pub(super) fn write(&self, link: &dyn Link, from: usize, wait: Wait<'_>) -> Result<usize, LinkError> {
        match self.payload {
            Payload::Bytes(payload) => {
                let mut skipped = from;
                let (mut slices, mut used) = ([IoSlice::new(&[]); 4], 0);
                for part in [&self.before, self.header(), payload, &self.after] {
                    let rest = &part[skipped.min(part.len())..];
                    skipped = skipped.saturating_sub(part.len());
                    if !rest.is_empty() {
                        slices[used] = IoSlice::new(rest);
                        used += 1;
                    }
                }
                link.write(&slices[..used], wait)
            }
            Payload::Memory(_) => link.write_parts(&self.parts(from, self.len()), wait),
        }
    }

    /// The rest of the frame of which these first bytes of the batch end in the middle; nothing, if they end with a frame.
    pub(super) fn rest_of_frame(&self, sent: usize) -> Vec<u8> {
        let next = self.starts.get(self.begun(sent) as usize);
        let mut rest = Vec::new();
        for part in self.parts(sent, next.copied().unwrap_or(self.len())) {
            // Zeroes for what is not there: the move fails, and the peer is to read why.
            let _ = part.append_to(&mut rest);
        }
        rest
    }

    /// These bytes.
    fn parts(&self, from: usize, end: usize) -> Vec<SendPart<'_>> {
        let (bytes, memory) = match self.payload {
            Payload::Bytes(bytes) => (bytes, &[][..]),
            Payload::Memory(parts) => (&[][..], parts),
        };
        let all = [&self.before, self.header(), bytes].map(SendPart::Bytes).into_iter();
        let all = all.chain(memory.iter().cloned()).chain([SendPart::Bytes(&self.after)]);
        let mut at = 0;
        all.filter_map(|part| {
            let (begin, bytes) = (at, part.len());
            at += bytes;
            let skipped = from.saturating_sub(begin).min(bytes);
            let part = part.within(skipped, end.saturating_sub(begin.max(from)));
            (!part.is_empty()).then_some(part)
        })
        .collect()
    }
}
