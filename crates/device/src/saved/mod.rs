//! A device's saved state: tagged fields in sections with a name, a version, a length and checksums, made to be refused
//! when it is not whole, not right, not this device's or not understood (`docs/saved-state.md` draws it byte by byte).
//!
//! A device declares its sections once. A [`Writer`] makes the bytes, all at once or as a stream that goes on while the
//! device runs; a [`Reader`] takes them in any segmentation.
//!
//! ```
//! use limosa_device::saved::{Item, Reader, Refusal, Section, Writer};
//!
//! #[derive(Clone, PartialEq, prost::Message)]
//! struct Registers {
//!     #[prost(uint32, tag = "1")]
//!     scratch: u32,
//! }
//!
//! const KIND: &str = "example.scratch";
//! const REGISTERS: Section = Section::message("registers", 1);
//!
//! let mut writer = Writer::new(KIND);
//! writer.message(&REGISTERS, &Registers { scratch: 7 });
//! let bytes = writer.finish();
//!
//! let mut staged = Registers::default();
//! let mut reader = Reader::new(KIND, &[REGISTERS], 1 << 20);
//! for piece in bytes.chunks(3) {
//!     reader.push(piece, |item: Item<'_>| {
//!         staged = item.decode()?;
//!         Ok::<(), Refusal>(())
//!     })?;
//! }
//! reader.finish()?;
//! assert_eq!(staged.scratch, 7);
//! # Ok::<(), Refusal>(())
//! ```

mod format;
mod item;
mod outline;
mod reader;
mod refusal;
#[cfg(test)]
mod tests;
mod writer;

pub use item::{Ahead, Item};
pub use outline::{Outline, OutlineSection};
pub use reader::Reader;
pub use refusal::Refusal;
pub use writer::Writer;

/// How many bytes a small section may have unless its declaration says otherwise.
pub const MESSAGE_BYTES_MAX: u64 = 64 << 10;

/// What a device says of one kind of section in its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    name: &'static str,
    version: u32,
    version_oldest: u32,
    bytes_max: u64,
    optional: bool,
    bulk: bool,
    once: bool,
}

impl Section {
    /// A small section that must come exactly once: a message of at most [`MESSAGE_BYTES_MAX`] bytes. `name` is 1 to
    /// 16 printable ASCII characters other than a space, and not `end`; `version`, at least 1, is the one that is
    /// written, and the newest that can be read.
    ///
    /// # Panics
    ///
    /// When name or version are not so; at compile time for a constant.
    pub const fn message(name: &'static str, version: u32) -> Section {
        assert!(format::is_word(name.as_bytes(), format::NAME_BYTES), "not a section's name");
        assert!(!matches!(name.as_bytes(), b"end"), "the name of the end");
        assert!(version > 0, "versions begin at 1");
        let bytes_max = MESSAGE_BYTES_MAX;
        Section {
            name,
            version,
            version_oldest: version,
            bytes_max,
            optional: false,
            bulk: false,
            once: true,
        }
    }

    /// Raw memory that may come any number of times, in sections of at most `bytes_max` bytes, and that is handed out
    /// in pieces as it arrives. Panics as [`Section::message`] does.
    pub const fn bulk(name: &'static str, version: u32, bytes_max: u64) -> Section {
        Section { bytes_max, bulk: true, once: false, ..Section::message(name, version) }
    }

    /// May come any number of times, or not at all.
    pub const fn repeated(self) -> Section {
        Section { once: false, ..self }
    }

    /// Whoever does not know the section, or not this version, may go on without it; it need not come.
    pub const fn optional(self) -> Section {
        Section { optional: true, once: false, ..self }
    }

    /// Versions from this one on can still be read.
    pub const fn reads_from(self, version_oldest: u32) -> Section {
        Section { version_oldest, ..self }
    }

    /// Has at most so many bytes of payload.
    pub const fn bytes_max(self, bytes_max: u64) -> Section {
        Section { bytes_max, ..self }
    }

    /// The most bytes of payload that it may have.
    pub const fn bytes_max_of(&self) -> u64 {
        self.bytes_max
    }

    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The version that is written.
    pub const fn version(&self) -> u32 {
        self.version
    }
}
