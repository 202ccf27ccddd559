//! [`Reader`]: reads a saved state in pieces of any size.

use std::mem::{size_of, take};

use crc32c::{crc32c, crc32c_append};
use zerocopy::FromBytes;

use super::format::*;
use super::item::{Ahead, Item};
use super::outline::{OutlineSection, note};
use super::{Refusal, Section};

/// Reads a saved state that is pushed into it.
///
/// Its output goes to staging memory; the device may be changed only after [`Reader::finish`] has confirmed that the
/// state is complete and valid. The first refusal is final: every later call returns it again.
#[derive(Debug)]
pub struct Reader {
    kind: String,
    known: Vec<Known>,
    bytes_max: u64,
    /// The part that is being collected, as far as it has arrived.
    part: Vec<u8>,
    at: At,
    /// The running checksum.
    sum: u32,
    sections: u32,
    /// Bytes read.
    bytes: u64,
    refusal: Option<Refusal>,
    /// For a reader of any state: its sections so far.
    outline: Option<Vec<OutlineSection>>,
}

#[derive(Debug)]
struct Known {
    section: Section,
    came: bool,
}

/// What comes next.
#[derive(Clone, Copy, Debug)]
enum At {
    Header,
    Kind {
        bytes: usize,
    },
    Head,
    /// The payload of a section that is passed on as a whole, and its checksum.
    Whole(Open),
    /// Payload that is passed on, or ignored, in pieces.
    Pieces(Open, u64),
    /// The checksum after that.
    PiecesSum(Open),
    End {
        sections: u32,
        bytes: u64,
    },
    Done,
}

/// The section whose payload comes next.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// Index among the known sections; `None` for an ignored one.
    known: Option<usize>,
    name: [u8; NAME_BYTES],
    version: u32,
    place: u64,
    length: u64,
}

impl Reader {
    /// Reads a state of a kind of device with these sections, of at most `bytes_max` bytes in all.
    pub fn new(kind: &str, sections: &[Section], bytes_max: u64) -> Reader {
        Reader {
            kind: kind.to_owned(),
            known: sections.iter().map(|section| Known { section: *section, came: false }).collect(),
            bytes_max,
            part: Vec::new(),
            at: At::Header,
            sum: crc32c(&[]),
            sections: 0,
            bytes: 0,
            refusal: None,
            outline: None,
        }
    }

    /// Reads the state of any device, and ignores all sections.
    pub(super) fn any() -> Reader {
        Reader { outline: Some(Vec::new()), ..Reader::new("", &[], u64::MAX) }
    }

    /// The sections so far, for a reader of any state.
    pub(super) fn outline(&self) -> Option<&[OutlineSection]> {
        self.outline.as_deref()
    }

    /// The kind of device.
    pub(super) fn kind(&self) -> &str {
        &self.kind
    }

    /// Reads the next bytes, and passes completed items to `take`. A refusal by the reader or by `take` is final.
    pub fn push(
        &mut self,
        bytes: &[u8],
        mut take: impl FnMut(Item<'_>) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        if let Some(refusal) = &self.refusal {
            return Err(refusal.clone());
        }
        self.run(bytes, &mut take).inspect_err(|refusal| self.refusal = Some(refusal.clone()))
    }

    /// The bulk payload that comes next, if it does. The caller may receive it directly into its place and push it
    /// from there; the resulting items then need no copy.
    pub fn ahead(&self) -> Option<Ahead<'_>> {
        match self.at {
            At::Pieces(Open { known: Some(known), place, length, .. }, offset) if self.refusal.is_none() => {
                Some(Ahead { section: &self.known[known].section, place, offset, length })
            }
            _ => None,
        }
    }

    /// Ends the input: the state must have ended.
    pub fn finish(&self) -> Result<(), Refusal> {
        match (&self.refusal, self.at) {
            (Some(refusal), _) => Err(refusal.clone()),
            (None, At::Done) => Ok(()),
            (None, _) => Err(Refusal::Truncated { place: self.place(), bytes: self.bytes }),
        }
    }

    /// Bytes of memory used for the part that is being collected.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.part.capacity()
    }

    fn run(
        &mut self,
        mut bytes: &[u8],
        hand_out: &mut impl FnMut(Item<'_>) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        while !bytes.is_empty() {
            if let At::Done = self.at {
                return Err(Refusal::AfterEnd);
            }
            if let At::Pieces(open, offset) = self.at {
                let here = usize::try_from(open.length - offset).unwrap_or(usize::MAX).min(bytes.len());
                let piece = bytes.split_off(..here).expect("no more than there is");
                self.bytes += here as u64;
                self.piece(open, offset, piece, hand_out)?;
                continue;
            }
            let wanted = self.part_bytes();
            let missing = wanted - self.part.len();
            let here = bytes.split_off(..missing.min(bytes.len())).expect("no more than there is");
            self.bytes += here.len() as u64;
            if here.len() < missing {
                self.part.extend_from_slice(here);
                return Ok(());
            }
            if self.part.is_empty() {
                self.part(here, hand_out)?;
                continue;
            }
            let mut part = take(&mut self.part);
            part.extend_from_slice(here);
            self.part(&part, hand_out)?;
            part.clear();
            self.part = part;
        }
        Ok(())
    }

    /// Bytes of the part that comes next.
    fn part_bytes(&self) -> usize {
        match self.at {
            At::Header => size_of::<Header>(),
            At::Kind { bytes } => bytes + CHECKSUM_BYTES,
            At::Head => size_of::<Head>() + CHECKSUM_BYTES,
            // Bounded by the section's declaration.
            At::Whole(open) => open.length as usize + CHECKSUM_BYTES,
            At::End { .. } => size_of::<End>() + CHECKSUM_BYTES,
            At::PiecesSum(_) => CHECKSUM_BYTES,
            At::Pieces(..) | At::Done => 0,
        }
    }

    /// What comes next, in words.
    fn place(&self) -> String {
        let named = |open: Open| format!("section {:?}", name_of(&open.name).unwrap_or("?"));
        match self.at {
            At::Header | At::Kind { .. } => "its header".into(),
            At::Head => format!("the head of section number {}", self.sections),
            At::Whole(open) | At::Pieces(open, _) | At::PiecesSum(open) => named(open),
            At::End { .. } | At::Done => "its end".into(),
        }
    }

    fn part(
        &mut self,
        part: &[u8],
        hand_out: &mut impl FnMut(Item<'_>) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        match self.at {
            At::Header => self.header(part)?,
            At::Kind { .. } => {
                let kind = self.summed(part)?;
                let found =
                    std::str::from_utf8(kind).ok().filter(|kind| is_word(kind.as_bytes(), KIND_BYTES));
                let found =
                    found.ok_or_else(|| Refusal::malformed("header", "the kind of device is not a word"))?;
                if self.outline.is_some() {
                    self.kind = found.into();
                } else if found != self.kind {
                    return Err(Refusal::OtherDevice { found: found.into(), expected: self.kind.clone() });
                }
                self.at = At::Head;
            }
            At::Head => self.head(part)?,
            At::Whole(open) => {
                let payload = self.summed(part)?;
                self.at = At::Head;
                self.hand_out(open, 0, payload, hand_out)?;
            }
            At::PiecesSum(_) => {
                self.summed(part)?;
                self.at = At::Head;
            }
            At::End { sections, bytes } => {
                let end = End { sections: u64::from(sections).into(), bytes: bytes.into() };
                if End::read_from_bytes(self.summed(part)?) != Ok(end) {
                    return Err(Refusal::malformed(
                        "end",
                        "its counts of sections or bytes differ from the state",
                    ));
                }
                if let Some(missing) = self.known.iter().find(|known| known.section.once && !known.came) {
                    return Err(Refusal::Missing { name: missing.section.name.into() });
                }
                self.at = At::Done;
            }
            At::Pieces(..) | At::Done => {}
        }
        Ok(())
    }

    fn header(&mut self, part: &[u8]) -> Result<(), Refusal> {
        let header = Header::read_from_bytes(part).map_err(|_| Refusal::NotAState)?;
        if header.magic != MAGIC {
            return Err(Refusal::NotAState);
        }
        // A newer format may differ from here on, so this comes before any checksum.
        let found = header.format_version.get();
        if found != FORMAT_VERSION {
            return Err(Refusal::OtherFormat { found, supported: FORMAT_VERSION });
        }
        let bytes = usize::from(header.kind_bytes.get());
        if !(1..=KIND_BYTES).contains(&bytes) || header.zero != 0 {
            return Err(Refusal::Altered { place: self.place() });
        }
        self.sum = crc32c_append(self.sum, part);
        self.at = At::Kind { bytes };
        Ok(())
    }

    fn head(&mut self, part: &[u8]) -> Result<(), Refusal> {
        let before = self.bytes - part.len() as u64;
        let head = self.summed(part)?;
        let head = Head::read_from_bytes(head).map_err(|_| Refusal::NotAState)?;
        let name = name_of(&head.name).ok_or_else(|| Refusal::malformed("?", "its name is invalid"))?;
        let expected = self.sections;
        let (found, version) = (head.sequence.get(), head.version.get());
        if found != expected {
            return Err(Refusal::OutOfSequence { name: name.into(), found, expected });
        }
        self.sections =
            expected.checked_add(1).ok_or_else(|| Refusal::malformed(name, "too many sections"))?;
        if head.zero != 0 || head.flags.get() & !OPTIONAL != 0 || version == 0 {
            return Err(Refusal::malformed(name, "its head has unknown fields"));
        }
        let length = head.length.get();
        let whole = self.bytes.saturating_add(length);
        if whole > self.bytes_max {
            return Err(Refusal::TooLarge {
                place: "the state".into(),
                bytes: whole,
                bytes_max: self.bytes_max,
            });
        }
        if head.name == END {
            if length != size_of::<End>() as u64 || version != END_VERSION || head.flags != 0 {
                return Err(Refusal::malformed(name, "the end has another form"));
            }
            self.at = At::End { sections: expected, bytes: before };
            return Ok(());
        }
        let optional = head.flags.get() & OPTIONAL != 0;
        let known = self.admit(name, version, optional, length)?;
        let open = Open { known, name: head.name, version, place: head.place.get(), length };
        let whole = known.is_some_and(|known| !self.known[known].section.bulk);
        self.at = match length {
            _ if whole => At::Whole(open),
            0 => At::PiecesSum(open),
            _ => At::Pieces(open, 0),
        };
        Ok(())
    }

    /// The index of the known section; `None` if it is ignored.
    fn admit(
        &mut self,
        name: &str,
        version: u32,
        optional: bool,
        length: u64,
    ) -> Result<Option<usize>, Refusal> {
        if let Some(outline) = &mut self.outline {
            note(outline, name, version, optional, length);
            return Ok(None);
        }
        let Some(at) = self.known.iter().position(|known| known.section.name == name) else {
            let unknown = Refusal::UnknownSection { name: name.into(), version };
            return if optional { Ok(None) } else { Err(unknown) };
        };
        let Known { section, came } = &mut self.known[at];
        let (newest, oldest) = (section.version, section.version_oldest);
        if version > newest || version < oldest {
            let name = name.into();
            return match version > newest {
                _ if optional => Ok(None),
                true => Err(Refusal::NewerSection { name, found: version, supported: newest }),
                false => Err(Refusal::OlderSection { name, found: version, supported: oldest }),
            };
        }
        if *came && section.once {
            return Err(Refusal::Repeated { name: name.into() });
        }
        if length > section.bytes_max {
            let place = format!("section {name:?}");
            return Err(Refusal::TooLarge { place, bytes: length, bytes_max: section.bytes_max });
        }
        *came = true;
        Ok(Some(at))
    }

    fn piece(
        &mut self,
        open: Open,
        offset: u64,
        piece: &[u8],
        hand_out: &mut impl FnMut(Item<'_>) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        self.sum = crc32c_append(self.sum, piece);
        let offset_after = offset + piece.len() as u64;
        self.at =
            if offset_after == open.length { At::PiecesSum(open) } else { At::Pieces(open, offset_after) };
        self.hand_out(open, offset, piece, hand_out)
    }

    fn hand_out(
        &self,
        open: Open,
        offset: u64,
        bytes: &[u8],
        hand_out: &mut impl FnMut(Item<'_>) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let Some(known) = open.known else { return Ok(()) };
        let section = &self.known[known].section;
        let Open { version, place, length, .. } = open;
        hand_out(Item { section, version, place, offset, length, bytes })
    }

    /// The bytes before the checksum at the end of a part, if it is correct.
    fn summed<'a>(&mut self, part: &'a [u8]) -> Result<&'a [u8], Refusal> {
        let altered = || Refusal::Altered { place: self.place() };
        let (summed, sum) = part.split_last_chunk::<CHECKSUM_BYTES>().ok_or_else(altered)?;
        let expected = crc32c_append(self.sum, summed);
        if u32::from_le_bytes(*sum) != expected {
            return Err(altered());
        }
        self.sum = expected;
        Ok(summed)
    }
}
