//! [`Writer`]: writes a saved state.

use crc32c::{crc32c, crc32c_append};
use zerocopy::IntoBytes;

use super::Section;
use super::format::*;

/// Produces the bytes of a saved state.
///
/// For a small device: add sections, then call [`Writer::finish`]. For a stream: [take](Writer::take) the bytes
/// produced so far in pieces while more sections are added. Bulk payload need not pass through the writer:
/// [`Writer::begin`] announces it, and each piece is passed to [`Writer::lend`] for the checksum and sent directly from
/// its place.
#[derive(Debug)]
pub struct Writer {
    /// Bytes produced and not compacted yet; the first `taken` of them were taken.
    made: Vec<u8>,
    taken: usize,
    /// The running checksum.
    sum: u32,
    sections: u32,
    /// Bytes of the state so far.
    bytes: u64,
    /// Bytes of the open section's payload that have not been passed to [`Writer::lend`].
    to_lend: u64,
    open: bool,
    ended: bool,
}

impl Writer {
    /// Begins a state of a kind of device: 1 to 64 printable ASCII characters without a space, such as `limosa.uart`.
    ///
    /// # Panics
    ///
    /// If the kind is invalid.
    pub fn new(kind: &str) -> Writer {
        assert!(is_word(kind.as_bytes(), KIND_BYTES), "not a device's kind: {kind:?}");
        let header = Header {
            magic: MAGIC,
            format_version: FORMAT_VERSION.into(),
            kind_bytes: (kind.len() as u16).into(),
            zero: 0.into(),
        };
        let mut writer = Writer {
            made: Vec::new(),
            taken: 0,
            sum: crc32c(&[]),
            sections: 0,
            bytes: 0,
            to_lend: 0,
            open: false,
            ended: false,
        };
        writer.put(header.as_bytes());
        writer.put(kind.as_bytes());
        writer.put_sum();
        writer
    }

    /// Adds a section with its payload.
    ///
    /// # Panics
    ///
    /// If a section is open or the state has ended, or if the payload is larger than the section's limit: mistakes of
    /// the device, which would write states that no reader accepts.
    pub fn section(&mut self, section: &Section, place: u64, payload: &[u8]) {
        self.begin(section, place, payload.len() as u64);
        if self.open {
            self.put(payload);
            self.close();
        }
    }

    /// Adds a section with a message. Panics as [`Writer::section`] does.
    pub fn message(&mut self, section: &Section, message: &impl prost::Message) {
        self.section(section, 0, &message.encode_to_vec());
    }

    /// Begins a section whose `length` bytes of payload are then passed to [`Writer::lend`]. Panics as
    /// [`Writer::section`] does.
    pub fn begin(&mut self, section: &Section, place: u64, length: u64) {
        assert!(length <= section.bytes_max, "section {:?} of {length} bytes", section.name);
        let flags = if section.optional { OPTIONAL } else { 0 };
        self.head(name_bytes(section.name), section.version, flags, place, length);
        self.to_lend = length;
        self.open = true;
        if length == 0 {
            self.close();
        }
    }

    /// Adds a piece of the open section's payload to the checksum. The caller sends the piece itself, after
    /// everything that was produced before it. After the last piece, the bytes that follow the payload are produced.
    ///
    /// # Panics
    ///
    /// If the piece is longer than the rest of the section, or if earlier bytes are not [taken](Writer::take) yet.
    pub fn lend(&mut self, piece: &[u8]) {
        assert!(self.untaken().is_empty(), "the bytes before the piece were not taken");
        self.to_lend = self.to_lend.checked_sub(piece.len() as u64).expect("no more than was announced");
        self.sum = crc32c_append(self.sum, piece);
        self.bytes += piece.len() as u64;
        if self.open && self.to_lend == 0 {
            self.close();
        }
    }

    /// Bytes of the open section's payload that have not been passed to [`Writer::lend`]; 0 if none is open.
    pub fn to_lend(&self) -> u64 {
        self.to_lend
    }

    /// Ends the state. Panics as [`Writer::section`] does.
    pub fn end(&mut self) {
        let end = End { sections: u64::from(self.sections).into(), bytes: self.bytes.into() };
        self.head(END, END_VERSION, 0, 0, size_of::<End>() as u64);
        self.put(end.as_bytes());
        self.close();
        self.ended = true;
    }

    /// Whether the state has ended. Bytes may still have to be taken.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// The bytes that were produced and not taken yet.
    pub fn untaken(&self) -> &[u8] {
        &self.made[self.taken..]
    }

    /// Takes at most `bytes_max` of the produced bytes.
    pub fn take(&mut self, bytes_max: usize) -> &[u8] {
        let from = self.taken;
        self.taken += bytes_max.min(self.made.len() - from);
        &self.made[from..self.taken]
    }

    /// Ends the state, if it has not ended, and returns all bytes that were not taken. Panics as
    /// [`Writer::section`] does.
    pub fn finish(mut self) -> Vec<u8> {
        if !self.ended {
            self.end();
        }
        self.made.drain(..self.taken);
        self.made
    }

    fn head(&mut self, name: [u8; NAME_BYTES], version: u32, flags: u32, place: u64, length: u64) {
        assert!(!self.open && !self.ended, "a section is open, or the state has ended");
        let sequence = self.sections.into();
        let head = Head {
            name,
            version: version.into(),
            flags: flags.into(),
            sequence,
            zero: 0.into(),
            place: place.into(),
            length: length.into(),
        };
        self.put(head.as_bytes());
        self.put_sum();
        self.sections = self.sections.checked_add(1).expect("fewer than 2^32 sections");
    }

    fn close(&mut self) {
        self.put_sum();
        self.open = false;
        self.to_lend = 0;
    }

    fn put(&mut self, bytes: &[u8]) {
        self.sum = crc32c_append(self.sum, bytes);
        self.put_plain(bytes);
    }

    fn put_sum(&mut self) {
        self.put_plain(&self.sum.to_le_bytes());
    }

    fn put_plain(&mut self, bytes: &[u8]) {
        if self.taken == self.made.len() {
            self.made.clear();
            self.taken = 0;
        }
        self.made.extend_from_slice(bytes);
        self.bytes += bytes.len() as u64;
    }
}
