//! What is in a saved stream: its devices and memory, how much of each, whether all of it is right,
//! and if not, where the damage is.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use crate::stream::{Damage, Damaged, Decoded, Decoder, Header, Kind, Offer, Order, Step};
use crate::{Error, Result};

/// The most damaged places that are listed.
const DAMAGE_MAX: usize = 16;
/// Bytes read at once.
const PIECE_BYTES: usize = 256 << 10;

/// What is in a stream.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Inspection {
    /// Bytes of all of it.
    pub bytes: u64,
    /// The version it is written in; `None` when it does not begin like a stream.
    pub version: Option<u16>,
    /// The move that it is of.
    pub id: Option<String>,
    /// Whether it was saved; a live stream that was recorded is not.
    pub stored: bool,
    /// What was offered: devices and memory with their facts.
    pub offer: Option<Offer>,
    /// What came of each device, in the offer's order.
    pub devices: Vec<InspectedSection>,
    /// What came of each region of memory, in the offer's order.
    pub memory: Vec<InspectedSection>,
    /// Rounds of pre-copy.
    pub rounds: u32,
    /// How many frames of each kind, in the order of their first.
    pub frames: Vec<FrameCount>,
    /// Whether it is all there and right, from the preface to the SUM, so that it can be loaded.
    pub whole: bool,
    /// What is wrong, by place; the first 16.
    pub damage: Vec<DamageReport>,
}

/// What came of one device or region of memory.
#[derive(Clone, Debug, Default, Serialize)]
pub struct InspectedSection {
    /// Its id.
    pub id: u32,
    /// Its name; a region's address.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// Bytes of zeroes, which take no room. Memory only.
    pub zero_bytes: u64,
    /// Whether its end has come. Devices only.
    pub complete: bool,
}

/// How many frames of a kind.
#[derive(Clone, Debug, Serialize)]
pub struct FrameCount {
    /// Their kind.
    pub kind: String,
    /// How many.
    pub frames: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

/// A damaged place.
#[derive(Clone, Debug, Serialize)]
pub struct DamageReport {
    /// Where the preface or frame starts, in bytes from the stream's start.
    pub at: u64,
    /// What is wrong with it.
    pub what: String,
}

/// Inspects a stream from a reader, to its end. Fails only when the reader does.
pub fn inspect(mut from: impl Read) -> std::io::Result<Inspection> {
    let mut inspector = Inspector::default();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(inspector.finish()),
            Ok(bytes) => inspector.push(&piece[..bytes]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Inspects a saved stream.
pub fn inspect_file(path: &Path) -> Result<Inspection> {
    let failed = |error| Error::File { path: path.into(), doing: "reading it", error };
    inspect(File::open(path).map_err(failed)?).map_err(failed)
}

/// Whether a file is a whole saved stream, without a flaw.
pub(crate) fn verify(path: &Path) -> Result<()> {
    let failed = |error| Error::File { path: path.into(), doing: "reading it", error };
    let mut file = File::open(path).map_err(failed)?;
    let mut inspector = Inspector::default();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match file.read(&mut piece) {
            Ok(0) => break,
            Ok(bytes) => inspector.push(&piece[..bytes]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
        if inspector.first.is_some() {
            break;
        }
    }
    inspector.end();
    match inspector.first {
        None => Ok(()),
        Some(Damaged { at, damage, .. }) => {
            Err(Error::Stream { from: format!("{}, byte {at}", path.display()), damage })
        }
    }
}

#[derive(Default)]
struct Inspector {
    decoder: Decoder,
    order: Option<Order>,
    /// After damage, frames no longer add up; they are counted, but not blamed.
    first: Option<Damaged>,
    found: Inspection,
}

impl Inspector {
    fn push(&mut self, bytes: &[u8]) {
        self.found.bytes += bytes.len() as u64;
        self.decoder.push(bytes);
        loop {
            // The decoder is taken out, so that a frame can borrow from it while it is counted.
            let mut decoder = std::mem::take(&mut self.decoder);
            let next = decoder.next();
            let more = match next {
                Ok(Some(decoded)) => {
                    self.take(decoded);
                    true
                }
                Ok(None) => false,
                Err(damaged) => {
                    let recoverable = damaged.recoverable;
                    self.blame(damaged);
                    recoverable
                }
            };
            self.decoder = decoder;
            if !more {
                return;
            }
        }
    }

    fn take(&mut self, decoded: Decoded<'_>) {
        match decoded {
            Decoded::Preface(preface) => {
                self.found.version = Some(preface.version);
                self.found.id = Some(preface.id.to_string());
                self.found.stored = preface.flags.contains(crate::stream::PrefaceFlags::STORED);
            }
            Decoded::Frame { at, header, payload } => {
                self.count(&header);
                let taken = self.frame(&header, payload);
                if let Err(damage) = taken
                    && self.first.is_none()
                {
                    self.blame(Damaged { at, damage, recoverable: true });
                }
            }
        }
    }

    fn frame(&mut self, header: &Header, payload: &[u8]) -> Result<(), Damage> {
        let Some(order) = &mut self.order else {
            if header.kind != Kind::OFFER {
                let why = "an OFFER is due".into();
                return Err(Damage::Misplaced { kind: header.kind, why });
            }
            let offer = Offer::decode(payload)?;
            self.order = Some(Order::new(&offer));
            self.found.devices = (offer.devices.iter())
                .map(|facts| InspectedSection {
                    id: facts.id,
                    name: crate::stream::body::printable(&facts.name),
                    ..Default::default()
                })
                .collect();
            self.found.memory = (offer.memory.iter())
                .map(|facts| InspectedSection {
                    id: facts.id,
                    name: format!("{:#x}", facts.address),
                    ..Default::default()
                })
                .collect();
            self.found.offer = Some(offer);
            return Ok(());
        };
        match order.next(header, payload)? {
            Step::DeviceData(at, data) => self.found.devices[at].bytes += data.len() as u64,
            Step::DeviceEnd(at) => self.found.devices[at].complete = true,
            Step::MemoryData(at, _, pages) => self.found.memory[at].bytes += pages.len() as u64,
            Step::MemoryZero(at, _, bytes) => {
                let zero_bytes = &mut self.found.memory[at].zero_bytes;
                *zero_bytes = zero_bytes.saturating_add(bytes);
            }
            Step::Round(..) => self.found.rounds = self.found.rounds.saturating_add(1),
            _ => {}
        }
        Ok(())
    }

    fn count(&mut self, header: &Header) {
        let kind = header.kind.name().unwrap_or("unknown").to_string();
        let at = self.found.frames.iter().position(|count| count.kind == kind).unwrap_or_else(|| {
            self.found.frames.push(FrameCount { kind, frames: 0, bytes: 0 });
            self.found.frames.len() - 1
        });
        self.found.frames[at].frames += 1;
        self.found.frames[at].bytes += u64::from(header.length);
    }

    fn blame(&mut self, damaged: Damaged) {
        let report = DamageReport { at: damaged.at, what: damaged.damage.to_string() };
        let known = self.found.damage.last().is_some_and(|last| last.at == report.at);
        if self.found.damage.len() < DAMAGE_MAX && !known {
            self.found.damage.push(report);
        }
        self.first.get_or_insert(damaged);
    }

    /// Nothing more comes.
    fn end(&mut self) {
        if let Err(damaged) = self.decoder.finish() {
            self.blame(damaged);
        }
        let whole = self.order.as_ref().is_some_and(Order::is_whole);
        if !whole && self.first.is_none() {
            let damage = Damage::Truncated { what: "its frames: the SUM is missing" };
            self.blame(Damaged { at: self.found.bytes, damage, recoverable: false });
        }
    }

    fn finish(mut self) -> Inspection {
        self.end();
        self.found.whole = self.first.is_none();
        self.found
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(version), Some(id)) = (self.version, &self.id) {
            let how = if self.stored { "saved" } else { "recorded" };
            writeln!(f, "stream of version {version}, {how}, move {id}, {} bytes", self.bytes)?;
        }
        for device in &self.devices {
            let end = if device.complete { "complete" } else { "not complete" };
            writeln!(f, "device {} {}: {} bytes, {end}", device.id, device.name, device.bytes)?;
        }
        for region in &self.memory {
            let InspectedSection { id, name, bytes, zero_bytes, .. } = region;
            writeln!(f, "memory {id} at {name}: {bytes} bytes, and {zero_bytes} of zeroes")?;
        }
        for FrameCount { kind, frames, bytes } in &self.frames {
            writeln!(f, "{frames:>8} x {kind:<13} {bytes:>14} bytes")?;
        }
        self.damage
            .iter()
            .try_for_each(|damage| writeln!(f, "damaged at byte {}: {}", damage.at, damage.what))?;
        writeln!(f, "{}", if self.whole { "whole" } else { "NOT whole: it cannot be loaded" })
    }
}
