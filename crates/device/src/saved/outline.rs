//! What is in a saved state, for people: whose it is and which sections it has, without the device.

use super::{Reader, Refusal};

/// How many kinds of sections are told apart.
const SECTIONS_MAX: usize = 256;

/// Reads a saved state of any device, checks that it is whole and unaltered, and lists its sections. Holds little memory,
/// whatever the state is.
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
    /// How many there are.
    pub count: u64,
    /// Bytes of payload of all of them.
    pub bytes: u64,
}

impl Default for Outline {
    fn default() -> Outline {
        Outline { reader: Reader::any() }
    }
}

impl Outline {
    /// Takes the next bytes. Refuses what no device would take: no saved state, an unknown format, altered bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.reader.push(bytes, |_| Ok(()))
    }

    /// The kind of device, once its name has come; empty before.
    pub fn kind(&self) -> &str {
        self.reader.kind()
    }

    /// The sections so far, by first appearance, the first 256 kinds of them.
    pub fn sections(&self) -> &[OutlineSection] {
        self.reader.outline().unwrap_or(&[])
    }

    /// Says that nothing more comes: the state must have ended.
    pub fn finish(&self) -> Result<(), Refusal> {
        self.reader.finish()
    }
}

/// Counts a section in.
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
