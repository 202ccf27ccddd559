//! [`Decoder`]: takes a stream in pieces of any size, and returns its preface and frames.

use super::{Damage, HEADER_BYTES, Header, PREFACE_BYTES, Preface};

/// A part of a stream that a [`Decoder`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// The stream's first bytes.
    Preface(Preface),
    /// A frame whose checksums and number are correct.
    Frame {
        /// Where its header starts, in bytes from the stream's start.
        at: u64,
        /// Its header.
        header: Header,
        /// Its payload.
        payload: &'a [u8],
    },
}

/// Damage, and its position.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at}: {damage}")]
pub struct Damaged {
    /// Where the damaged preface or frame starts, in bytes from the stream's start.
    pub at: u64,
    /// The damage.
    pub damage: Damage,
    /// Whether the frames after it can still be found. If not, every later call returns the same error.
    pub recoverable: bool,
}

/// Decodes one direction of a stream. Payloads without a checksum are refused unless [`Decoder::with_unchecked`] allows them, since a
/// saved stream has none. It holds at most one frame in addition to the bytes that were pushed last.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// The length of the part of the buffer that has been returned.
    used: usize,
    /// Bytes of the stream before `buffer[used]`.
    at: u64,
    has_preface: bool,
    takes_unchecked: bool,
    sequence: u32,
    lost: Option<Damaged>,
}

impl Decoder {
    /// At the start of a stream.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// The same for a stream over a link, where both sides have agreed on payloads without a checksum.
    #[must_use]
    pub fn with_unchecked(self) -> Decoder {
        Decoder { takes_unchecked: true, ..self }
    }

    /// Adds bytes. Call [`Decoder::next`] until it returns `None` before you add more.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.lost.is_none() {
            self.buffer.drain(..self.used);
            self.used = 0;
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next part of the stream, or `None` when more bytes are needed.
    #[allow(clippy::should_implement_trait, reason = "the result borrows from the decoder")]
    pub fn next(&mut self) -> Result<Option<Decoded<'_>>, Damaged> {
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        let at = self.at;
        let rest = &self.buffer[self.used..];
        if !self.has_preface {
            let Some(bytes) = rest.first_chunk::<PREFACE_BYTES>() else { return Ok(None) };
            let preface = Preface::decode(bytes).map_err(|damage| self.lose(damage))?;
            self.has_preface = true;
            self.advance(PREFACE_BYTES);
            return Ok(Some(Decoded::Preface(preface)));
        }
        let Some(bytes) = rest.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let header = Header::decode(bytes).map_err(|damage| self.lose(damage))?;
        let end = HEADER_BYTES + header.length as usize;
        if self.buffer.len() - self.used < end {
            return Ok(None);
        }
        let start = self.used;
        let (due, takes_unchecked) = (self.sequence, self.takes_unchecked);
        self.advance(end);
        self.sequence = header.sequence.wrapping_add(1);
        let payload = &self.buffer[start + HEADER_BYTES..start + end];
        header
            .check_payload(payload)
            .and_then(|()| header.check_is_checked(takes_unchecked))
            .and_then(|()| header.check_sequence(due))
            .map_err(|damage| Damaged { at, damage, recoverable: true })?;
        Ok(Some(Decoded::Frame { at, header, payload }))
    }

    /// Tells the decoder that the stream ends here. Fails if that is within the preface or a frame.
    pub fn finish(&self) -> Result<(), Damaged> {
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        let what = match self.has_preface {
            false => "its preface",
            true if self.used < self.buffer.len() => "a frame",
            true => return Ok(()),
        };
        Err(Damaged { at: self.at, damage: Damage::Truncated { what }, recoverable: false })
    }

    fn advance(&mut self, bytes: usize) {
        self.used += bytes;
        self.at += bytes as u64;
    }

    fn lose(&mut self, damage: Damage) -> Damaged {
        let lost = Damaged { at: self.at, damage, recoverable: false };
        self.lost = Some(lost.clone());
        lost
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Kind, MigrationId, PrefaceFlags};
    use super::*;

    /// A stream of a preface and these DEVICE_DATA payloads.
    fn stream(payloads: &[Vec<u8>]) -> Vec<u8> {
        let mut out = Preface::new(MigrationId([7; 16]), PrefaceFlags::empty()).encode().to_vec();
        for (sequence, payload) in payloads.iter().enumerate() {
            out.extend(Header::new(Kind::DEVICE_DATA, 0, 0, sequence as u32, payload).encode());
            out.extend(payload);
        }
        out
    }

    /// All payloads, fed in pieces of that size; the error if the stream is not whole.
    fn decode(bytes: &[u8], piece: usize) -> Result<Vec<Vec<u8>>, Damaged> {
        let mut decoder = Decoder::new();
        let mut out = Vec::new();
        for piece in bytes.chunks(piece) {
            decoder.push(piece);
            while let Some(decoded) = decoder.next()? {
                if let Decoded::Frame { payload, .. } = decoded {
                    out.push(payload.to_vec());
                }
            }
        }
        decoder.finish().map(|()| out)
    }

    fn payloads() -> impl Strategy<Value = Vec<Vec<u8>>> {
        proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 1..6)
    }

    proptest! {
        #[test]
        fn any_segmentation_gives_the_same_frames(payloads in payloads(), piece in 1usize..200) {
            prop_assert_eq!(decode(&stream(&payloads), piece), Ok(payloads));
        }

        #[test]
        fn every_alteration_is_refused(payloads in payloads(), at: prop::sample::Index, flip in 1u8..) {
            let mut bytes = stream(&payloads);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(decode(&bytes, 64).is_err());
        }

        #[test]
        fn every_truncation_loses_whole_frames_or_is_refused(payloads in payloads(), at: prop::sample::Index) {
            let bytes = stream(&payloads);
            let cut = at.index(bytes.len());
            if let Ok(some) = decode(&bytes[..cut], 64) {
                prop_assert_eq!(&some[..], &payloads[..some.len()]);
                prop_assert!(some.len() < payloads.len());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), piece in 1usize..50) {
            let _ = decode(&bytes, piece);
            let mut after_preface = stream(&[]);
            after_preface.extend(bytes);
            let _ = decode(&after_preface, piece);
        }
    }

    #[test]
    fn a_swapped_or_doubled_frame_is_refused_and_the_rest_still_found() {
        let frame = |sequence, byte| {
            let mut out = Header::new(Kind::DEVICE_DATA, 0, 0, sequence, &[byte]).encode().to_vec();
            out.push(byte);
            out
        };
        let mut bytes = stream(&[vec![1]]);
        bytes.extend(frame(2, 3));
        bytes.extend(frame(3, 4));
        let mut decoder = Decoder::new();
        decoder.push(&bytes);
        decoder.next().unwrap();
        decoder.next().unwrap();
        let damaged = decoder.next().unwrap_err();
        assert!(damaged.recoverable);
        assert_eq!(damaged.damage, Damage::Sequence { expected: 1, found: 2 });
        assert!(matches!(decoder.next(), Ok(Some(Decoded::Frame { .. }))));
    }
}
