//! The JSON of the handshake (`docs/stream.md: OFFER`, `ANSWER`), with its limits.

use serde::{Deserialize, Serialize};

use super::{DeviceFacts, MemoryFacts};
use crate::{
    Compression, DATA_BYTES_MAX, DEVICES_MAX, Damage, Kind, LINKS_MAX, MEMORY_BYTES_MAX, MEMORY_REGIONS_MAX,
    NAME_BYTES_MAX, Nonce, OFFER_BYTES_MAX, REGIONS_MAX, Secret, printable,
};

#[cfg(test)]
mod tests;

/// The devices and the memory that a source offers to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// What a reader must understand beyond the first readers of version 1.
    #[serde(default)]
    pub needs: Vec<String>,
    /// The devices.
    pub devices: Vec<DeviceFacts>,
    /// The memory.
    #[serde(default)]
    pub memory: Vec<MemoryFacts>,
    /// Over how many links the source can send, the first one included.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub links: u32,
    /// Whether the source sends keep-alives over further links as well (`docs/stream.md: Keep-alive`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keeps_links_alive: bool,
    /// The secret that keys the proofs of this move; `None` in a saved stream, and of sources of the first versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Secret>,
}

fn one() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
fn is_one(links: &u32) -> bool {
    *links == 1
}

/// Whether the destination accepts an offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it does. Its devices are then in RESUMING.
    pub accepted: bool,
    /// Why it does not.
    #[serde(default)]
    pub reasons: Vec<String>,
    /// The number of links that the source has to use, at most as many as it offered.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub links: u32,
    /// How many bytes of a device may be on their way (`docs/stream.md: CREDIT`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<u64>,
    /// Part of the proofs of this move, which binds them to this connection. `None` without proofs: the offer has
    /// no secret, or the destination has one of the first versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub challenge: Option<Nonce>,
    /// Whether the destination reads MEMORY_RUNS, which the first versions do not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub runs: bool,
    /// Whether the destination reads WINDOW_FULL, which the first versions do not (`docs/stream.md: WINDOW`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub windows_grow: bool,
    /// Whether the destination reads payloads of memory without a checksum, over links that it trusts not to alter them
    /// (`docs/stream.md: Unchecked payloads`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unchecked: bool,
}

/// In [`Offer::needs`]: the source sends FLUSH, and waits for FLUSHED.
pub const NEEDS_FLUSH: &str = "flush";
/// In [`Offer::needs`]: the source sends no more of a device than CREDIT allows.
pub const NEEDS_CREDIT: &str = "credit";
/// In [`Offer::needs`]: the source does without a destination that proves nothing (`docs/stream.md: Proofs`).
pub const NEEDS_PROOFS: &str = "proofs";
/// All entries of [`Offer::needs`] that this version understands.
const KNOWN_NEEDS: [&str; 5] =
    [NEEDS_FLUSH, NEEDS_CREDIT, NEEDS_PROOFS, Compression::Zstd.name(), Compression::Lz4.name()];

impl Default for Offer {
    fn default() -> Offer {
        Offer {
            needs: Vec::new(),
            devices: Vec::new(),
            memory: Vec::new(),
            links: 1,
            keeps_links_alive: false,
            secret: None,
        }
    }
}

impl Default for Answer {
    fn default() -> Answer {
        Answer {
            accepted: false,
            reasons: Vec::new(),
            links: 1,
            window: None,
            challenge: None,
            runs: false,
            windows_grow: false,
            unchecked: false,
        }
    }
}

impl Offer {
    /// The payload. Fails if the offer exceeds a limit of the format.
    pub fn encode(&self) -> Result<Vec<u8>, Damage> {
        self.check()?;
        encode_json(Kind::OFFER, self)
    }

    /// Reads and checks a payload.
    pub fn decode(payload: &[u8]) -> Result<Offer, Damage> {
        let offer: Offer = decode_json(Kind::OFFER, payload)?;
        if let Some(need) = offer.needs.iter().find(|need| !KNOWN_NEEDS.contains(&need.as_str())) {
            return Err(Damage::Unknown { what: printable(need) });
        }
        offer.check()?;
        Ok(offer)
    }

    /// The compression of payloads that are compressed.
    pub fn compression(&self) -> Option<Compression> {
        self.needs.iter().find_map(|need| need.parse().ok())
    }

    fn check(&self) -> Result<(), Damage> {
        let refuse = |why: String| Err(Damage::Content { kind: Kind::OFFER, why });
        if self.needs.iter().any(|need| need == NEEDS_PROOFS) && self.secret.is_none() {
            return refuse("it needs proofs and has no secret".into());
        }
        if self.needs.iter().filter(|need| need.parse::<Compression>().is_ok()).count() > 1 {
            return refuse("it needs more than one compression".into());
        }
        if !(1..=LINKS_MAX).contains(&self.links) {
            return refuse(format!("{} links, expected 1 to {LINKS_MAX}", self.links));
        }
        if self.devices.len() > DEVICES_MAX {
            return refuse(format!("{} devices, the most is {DEVICES_MAX}", self.devices.len()));
        }
        if self.memory.len() > MEMORY_REGIONS_MAX {
            return refuse(format!("{} memory regions, the most is {MEMORY_REGIONS_MAX}", self.memory.len()));
        }
        for (at, device) in self.devices.iter().enumerate() {
            if self.devices[..at].iter().any(|other| other.id == device.id) {
                return refuse(format!("two devices have the id {}", device.id));
            }
            let kind_bytes = device.kind.as_ref().map_or(0, String::len);
            if device.name.len() > NAME_BYTES_MAX || kind_bytes > NAME_BYTES_MAX {
                return refuse(format!("device {}: a name over {NAME_BYTES_MAX} bytes", device.id));
            }
            let listed = device.regions.as_ref().map_or(0, Vec::len);
            let listed = listed.max(device.irqs.as_ref().map_or(0, Vec::len));
            if listed > REGIONS_MAX {
                return refuse(format!("device {}: {listed} regions, the most is {REGIONS_MAX}", device.id));
            }
        }
        for (at, memory) in self.memory.iter().enumerate() {
            if self.memory[..at].iter().any(|other| other.id == memory.id) {
                return refuse(format!("two memory regions have the id {}", memory.id));
            }
            let page = memory.page_bytes;
            if !page.is_power_of_two() || page > DATA_BYTES_MAX as u64 {
                return refuse(format!("memory {}: pages of {page} bytes", memory.id));
            }
            if memory.bytes == 0 || memory.bytes > MEMORY_BYTES_MAX || !memory.bytes.is_multiple_of(page) {
                return refuse(format!("memory {}: {} bytes", memory.id, memory.bytes));
            }
            if !memory.address.is_multiple_of(page) || memory.address.checked_add(memory.bytes - 1).is_none()
            {
                return refuse(format!("memory {}: address {:#x}", memory.id, memory.address));
            }
            if let Some(other) = self.memory[..at].iter().find(|other| other.overlaps(memory)) {
                return refuse(format!("memory {} and memory {} overlap", other.id, memory.id));
            }
        }
        Ok(())
    }
}

/// The maximum number of reasons that are kept of a refusal.
const ANSWER_REASONS_MAX: usize = 100;

impl Answer {
    /// The payload. Reasons that exceed the limit of a payload are left out.
    pub fn encode(&self) -> Result<Vec<u8>, Damage> {
        let mut answer = self.clone();
        loop {
            match encode_json(Kind::ANSWER, &answer) {
                Err(Damage::Length { .. }) if !answer.reasons.is_empty() => {
                    answer.reasons.truncate(answer.reasons.len() / 2)
                }
                done => return done,
            }
        }
    }

    /// Reads a payload.
    pub fn decode(payload: &[u8]) -> Result<Answer, Damage> {
        let mut answer: Answer = decode_json(Kind::ANSWER, payload)?;
        answer.reasons.truncate(ANSWER_REASONS_MAX);
        answer.reasons.iter_mut().for_each(|reason| *reason = printable(reason));
        if !answer.accepted && answer.reasons.is_empty() {
            answer.reasons.push("the destination refuses and does not say why".into());
        }
        Ok(answer)
    }
}

fn encode_json(kind: Kind, value: &impl Serialize) -> Result<Vec<u8>, Damage> {
    let bytes =
        serde_json::to_vec(value).map_err(|error| Damage::Content { kind, why: error.to_string() })?;
    if bytes.len() > OFFER_BYTES_MAX {
        let expected = format!("at most {OFFER_BYTES_MAX}");
        return Err(Damage::Length { kind, bytes: bytes.len(), expected });
    }
    Ok(bytes)
}

fn decode_json<'a, T: Deserialize<'a>>(kind: Kind, payload: &'a [u8]) -> Result<T, Damage> {
    // The message can quote the peer.
    serde_json::from_slice(payload)
        .map_err(|error| Damage::Content { kind, why: printable(&error.to_string()) })
}
