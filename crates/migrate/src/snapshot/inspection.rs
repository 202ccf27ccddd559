//! [`Inspection`]: the contents of a saved stream, for programs (serde) and for people (`Display`).

use std::fmt;

use limosa_stream::Offer;
use serde::Serialize;

/// The contents of a stream.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Inspection {
    /// The stream's length in bytes. If it does not begin like a stream, how many bytes of it were read.
    pub bytes: u64,
    /// The version it is written in; `None` if it does not begin like a stream.
    pub version: Option<u16>,
    /// The id of its move.
    pub id: Option<String>,
    /// Whether it was saved; `false` for a recorded live stream.
    pub stored: bool,
    /// The offer: devices and memory with their facts.
    pub offer: Option<Offer>,
    /// The stream's section of each device, in the offer's order.
    pub devices: Vec<InspectedSection>,
    /// The stream's section of each region of memory, in the offer's order.
    pub memory: Vec<InspectedSection>,
    /// Rounds of pre-copy.
    pub rounds: u32,
    /// The number of frames of each kind, in the order in which the kinds first appear.
    pub frames: Vec<FrameCount>,
    /// Whether it ends with a SEAL. Streams of the first versions have none, and only the checksums of their frames.
    pub sealed: bool,
    /// The BLAKE3 hash of the stream without its SEAL, in hexadecimal digits.
    pub blake3: String,
    /// Whether it is complete and undamaged, from the preface to the SUM and the SEAL, so that it can be loaded.
    pub whole: bool,
    /// The damaged places, by their position; at most 16.
    pub damage: Vec<DamageReport>,
}

/// A stream's share of one device or region of memory.
#[derive(Clone, Debug, Default, Serialize)]
pub struct InspectedSection {
    /// Its id.
    pub id: u32,
    /// Its name; a region's address.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// Bytes of zeroes, which the stream only counts. Memory only.
    pub zero_bytes: u64,
    /// Whether its data ends properly. Devices only.
    pub complete: bool,
}

/// The number of frames of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct FrameCount {
    /// Their kind.
    pub kind: String,
    /// Their number.
    pub frames: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

/// A damaged place.
#[derive(Clone, Debug, Serialize)]
pub struct DamageReport {
    /// Where the damaged preface or frame starts, in bytes from the start of the stream.
    pub at: u64,
    /// What is wrong with it.
    pub what: String,
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
        let sealed = if self.sealed { "sealed" } else { "not sealed" };
        writeln!(f, "{sealed}, blake3 {}", self.blake3)?;
        self.damage
            .iter()
            .try_for_each(|damage| writeln!(f, "damaged at byte {}: {}", damage.at, damage.what))?;
        writeln!(f, "{}", if self.whole { "whole" } else { "NOT whole: it cannot be loaded" })
    }
}
