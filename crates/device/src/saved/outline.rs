//! The outline of a saved state, for people: its device kind and its sections, without the device.

use super::{Reader, Refusal};

/// Limit on the kinds of sections that are counted.
const SECTIONS_MAX: usize = 256;

/// Reads a saved state of any device, checks that it is complete and unaltered, and lists its sections. Uses little
/// memory, whatever the state.
#[derive(Debug)]
pub struct Outline {
    reader: Reader,
}

/// All sections of one name and version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlineSection {
    /// The name.
    pub name: String,
    /// The version.
    pub version: u32,
    /// Whether they may be ignored.
    pub optional: bool,
    /// Number of sections.
    pub count: u64,
    /// Total bytes of payload.
    pub bytes: u64,
}

impl Default for Outline {
    fn default() -> Outline {
        Outline { reader: Reader::any() }
    }
}

impl Outline {
    /// Reads the next bytes. Refuses what every device would refuse: bytes that are not a saved state, an unknown
    /// format, altered bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.reader.push(bytes, |_| Ok(()))
    }

    /// The kind of device, once its name has arrived; empty before.
    pub fn kind(&self) -> &str {
        self.reader.kind()
    }

    /// The sections so far, by first appearance, the first 256 kinds of them.
    pub fn sections(&self) -> &[OutlineSection] {
        self.reader.outline().unwrap_or(&[])
    }

    /// Ends the input: the state must have ended.
    pub fn finish(&self) -> Result<(), Refusal> {
        self.reader.finish()
    }
}

/// Counts a section.
pub(super) fn note(sections: &mut Vec<OutlineSection>, name: &str, version: u32, optional: bool, bytes: u64) {
    let same = |section: &&mut OutlineSection| {
        section.name == name && section.version == version && section.optional == optional
    };
    if let Some(section) = sections.iter_mut().find(same) {
        section.count += 1;
        section.bytes = section.bytes.saturating_add(bytes);
    } else if sections.len() < SECTIONS_MAX {
        sections.push(OutlineSection { name: name.into(), version, optional, count: 1, bytes });
    }
}
