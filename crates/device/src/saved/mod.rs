//! A device's saved state: tagged fields in sections with a name, a version, a length and checksums. A reader refuses a
//! state that is incomplete, altered, of another device or of an unknown version (format: `docs/saved-state.md`).
//!
//! A device declares its sections once. A [`Writer`] produces the bytes, all at once or as a stream while the device
//! runs; a [`Reader`] accepts them in pieces of any size.
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

/// Default limit on the bytes of a small section.
pub const MESSAGE_BYTES_MAX: u64 = 64 << 10;

/// A device's declaration of a kind of section.
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
    /// A small section that must come exactly once: a message of at most [`MESSAGE_BYTES_MAX`] bytes. `name` is 1 to 16
    /// printable ASCII characters other than a space, and not `end`; `version`, at least 1, is the version that is
    /// written, and the newest that can be read.
    ///
    /// # Panics
    ///
    /// If name or version are invalid; at compile time for a constant.
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

    /// Raw memory that may occur any number of times, in sections of at most `bytes_max` bytes. A reader passes it
    /// on in pieces as it arrives. Panics as [`Section::message`] does.
    pub const fn bulk(name: &'static str, version: u32, bytes_max: u64) -> Section {
        Section { bytes_max, bulk: true, once: false, ..Section::message(name, version) }
    }

    /// The section may occur any number of times, or not at all.
    pub const fn repeated(self) -> Section {
        Section { once: false, ..self }
    }

    /// A reader that does not know the section or its version ignores it; the section may be missing.
    pub const fn optional(self) -> Section {
        Section { optional: true, once: false, ..self }
    }

    /// The oldest version that can still be read.
    pub const fn reads_from(self, version_oldest: u32) -> Section {
        Section { version_oldest, ..self }
    }

    /// Limits the payload to this many bytes.
    pub const fn bytes_max(self, bytes_max: u64) -> Section {
        Section { bytes_max, ..self }
    }

    /// The limit on the bytes of its payload.
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
