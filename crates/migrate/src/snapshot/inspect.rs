//! The contents of a saved stream: its devices and memory, how much there is of each, and where it is damaged.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use super::inspection::{DamageReport, FrameCount, InspectedSection, Inspection};
use crate::snapshot::{Limits, PIECE_BYTES, SnapshotFile, SnapshotReader, SnapshotSource, failed};
use crate::{Cancel, Error, Options, Result};
use limosa_stream::{
    Damage, Damaged, Decoded, Decoder, HEADER_BYTES, Header, Kind, MigrationId, Offer, Order, PrefaceFlags,
    Seal, Step, Unpacker, unpack,
};

/// How many damaged places are listed at most.
const DAMAGE_MAX: usize = 16;
/// Bytes of a SEAL with its header: the last bytes of a sealed stream, which its hash does not cover.
const SEAL_BYTES: usize = HEADER_BYTES + 40;

/// Inspects a stream from a reader, to its end. Of what does not begin like a stream only the beginning is read. Fails only if
/// the reader does.
pub fn inspect(mut from: impl Read) -> std::io::Result<Inspection> {
    let mut inspector = Inspector::default();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        if inspector.is_no_stream() {
            return Ok(inspector.finish());
        }
        match from.read(&mut piece) {
            Ok(0) => return Ok(inspector.finish()),
            Ok(bytes) => inspector.push(&piece[..bytes]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Inspects a saved stream in a file.
pub fn inspect_file(path: &Path) -> Result<Inspection> {
    inspect_snapshot(&SnapshotFile::new(path), Options::default().silence_max, None)
}

/// Inspects a snapshot to its end; of anything else it reads only the beginning. `silence_max` is how long its place
/// may make no progress.
pub fn inspect_snapshot(
    from: &dyn SnapshotSource,
    silence_max: Duration,
    cancel: Option<&Cancel>,
) -> Result<Inspection> {
    let limits = Limits { silence_max, cancel };
    let mut inspector = Inspector::default();
    let mut reader = limits.open(from)?;
    inspector.read(&from.name(), &mut *reader, limits, false)?;
    Ok(inspector.finish())
}

/// A snapshot that was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// The id of its move.
    pub id: MigrationId,
    /// The snapshot's length in bytes.
    pub bytes: u64,
    /// Bytes that the hash covers: all but the SEAL.
    pub covered_bytes: u64,
    /// Their BLAKE3 hash.
    pub blake3: [u8; 32],
    /// Whether the snapshot ends with a SEAL that has the same hash.
    pub sealed: bool,
}

/// Reads a snapshot once, to its end, and fails at the first damage: [`Error::Stream`] says where and what. No more than
/// a few frames are held in memory. `silence_max` is how long its place may make no progress.
pub fn verify(from: &dyn SnapshotSource, silence_max: Duration, cancel: Option<&Cancel>) -> Result<Verified> {
    let limits = Limits { silence_max, cancel };
    verify_reader(&from.name(), &mut *limits.open(from)?, limits)
}

/// [`verify`], for a snapshot that is open.
pub(crate) fn verify_reader(
    name: &str,
    reader: &mut dyn SnapshotReader,
    limits: Limits<'_>,
) -> Result<Verified> {
    let mut inspector = Inspector::default();
    inspector.read(name, reader, limits, true)?;
    inspector.end();
    match (inspector.first, inspector.id) {
        (Some(Damaged { at, damage, .. }), _) => {
            Err(Error::Stream { from: format!("{name}, byte {at}"), damage })
        }
        (None, Some(id)) => {
            let (bytes, sealed) = (inspector.found.bytes, inspector.seal.is_some());
            let covered_bytes = if sealed { bytes - SEAL_BYTES as u64 } else { bytes };
            Ok(Verified { id, bytes, covered_bytes, blake3: inspector.computed, sealed })
        }
        (None, None) => Err(Error::Stream { from: name.into(), damage: Damage::NotAStream }),
    }
}

#[derive(Default)]
struct Inspector {
    decoder: Decoder,
    order: Option<Order>,
    unpacker: Option<Unpacker>,
    unpacked: Vec<u8>,
    /// The first damage. The frames behind it are counted, but no longer checked against each other.
    first: Option<Damaged>,
    found: Inspection,
    id: Option<MigrationId>,
    /// Whether the preface promises a SEAL.
    promised: bool,
    seal: Option<Seal>,
    hasher: blake3::Hasher,
    /// The last bytes, which are not hashed until it is known whether they are a SEAL.
    tail: Vec<u8>,
    /// The hash, at the end.
    computed: [u8; 32],
}

impl Inspector {
    /// Reads to the end, or with `until_damage` to the first damage. Data that does not begin like a stream is not
    /// read any further: it may be anything, and have no end.
    fn read(
        &mut self,
        name: &str,
        reader: &mut dyn SnapshotReader,
        limits: Limits<'_>,
        until_damage: bool,
    ) -> Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        while !self.is_no_stream() && (self.first.is_none() || !until_damage) {
            let read = reader.read(&mut piece, limits.wait());
            match read.map_err(|error| failed(name, "reading it", limits.silence_max, error))? {
                0 => break,
                bytes => self.push(&piece[..bytes]),
            }
        }
        Ok(())
    }

    fn is_no_stream(&self) -> bool {
        self.id.is_none() && self.first.is_some()
    }

    fn hash(&mut self, bytes: &[u8]) {
        let kept = bytes.len().min(SEAL_BYTES);
        let passed = (self.tail.len() + kept).saturating_sub(SEAL_BYTES);
        self.hasher.update(&self.tail[..passed]);
        self.tail.drain(..passed);
        let (passed, kept) = bytes.split_at(bytes.len() - kept);
        self.hasher.update(passed);
        self.tail.extend_from_slice(kept);
    }

    fn push(&mut self, bytes: &[u8]) {
        self.found.bytes += bytes.len() as u64;
        self.hash(bytes);
        self.decoder.push(bytes);
        loop {
            // The decoder is taken out, because the frame borrows from it while `self` counts the frame.
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
                self.found.stored = preface.flags.contains(PrefaceFlags::STORED);
                self.promised = preface.flags.contains(PrefaceFlags::SEALED);
                self.id = Some(preface.id);
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
            // Without it, compressed data counts as damaged; so does data for which there is no memory.
            self.unpacker = offer.compression().and_then(|compression| Unpacker::new(compression).ok());
            self.found.devices = (offer.devices.iter())
                .map(|facts| InspectedSection {
                    id: facts.id,
                    name: limosa_stream::printable(&facts.name),
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
            // That of a recorded live stream may still speak for a move.
            self.found.offer = Some(Offer { secret: None, ..offer });
            return Ok(());
        };
        let (header, payload) = match header.compressed {
            true => {
                let raw = &mut self.unpacked;
                (&unpack(self.unpacker.as_mut(), header, payload, raw)?, &self.unpacked[..])
            }
            false => (header, payload),
        };
        match order.next(header, payload)? {
            Step::DeviceData(at, data) => self.found.devices[at].bytes += data.len() as u64,
            Step::DeviceEnd(at) => self.found.devices[at].complete = true,
            Step::MemoryData(at, _, pages) => self.found.memory[at].bytes += pages.len() as u64,
            Step::MemoryZero(at, _, bytes) => {
                let zero_bytes = &mut self.found.memory[at].zero_bytes;
                *zero_bytes = zero_bytes.saturating_add(bytes);
            }
            Step::MemoryRuns(at, runs) => {
                let found = &mut self.found.memory[at];
                found.bytes += runs.data_bytes();
                found.zero_bytes = found.zero_bytes.saturating_add(runs.zero_bytes());
            }
            Step::Sealed(seal) => self.seal = Some(seal),
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

    /// The stream has ended.
    fn end(&mut self) {
        if let Err(damaged) = self.decoder.finish() {
            self.blame(damaged);
        }
        let whole = self.order.as_ref().is_some_and(Order::is_whole);
        let missing = match (whole, &self.seal) {
            (false, _) => Some("its frames: the SUM is missing"),
            (true, None) if self.promised => Some("its frames: the SEAL is missing"),
            _ => None,
        };
        if let (Some(what), None) = (missing, &self.first) {
            let damage = Damage::Truncated { what };
            self.blame(Damaged { at: self.found.bytes, damage, recoverable: false });
        }
        self.check_seal();
    }

    /// Only a SEAL in its proper position was kept. Then the tail is that SEAL, or damage follows it.
    fn check_seal(&mut self) {
        if self.seal.is_none() {
            self.hasher.update(&self.tail);
        }
        self.computed = *self.hasher.finalize().as_bytes();
        let Some(Seal { bytes, blake3 }) = self.seal else { return };
        let at = self.found.bytes.saturating_sub(SEAL_BYTES as u64);
        if (bytes, blake3) != (at, self.computed) && self.first.is_none() {
            let say = |bytes, hash| format!("{} over {bytes} bytes", blake3::Hash::from_bytes(hash));
            let damage = Damage::Seal { expected: say(bytes, blake3), computed: say(at, self.computed) };
            self.blame(Damaged { at, damage, recoverable: true });
        }
    }

    fn finish(mut self) -> Inspection {
        self.end();
        self.found.whole = self.first.is_none();
        self.found.sealed = self.seal.is_some();
        self.found.blake3 = blake3::Hash::from_bytes(self.computed).to_string();
        self.found
    }
}
