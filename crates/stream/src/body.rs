//! The payloads of frames (`docs/stream.md: Kinds`, `OFFER`, `ANSWER`): small fixed structures, and JSON for the handshake.

use limosa_protocol::feature::PrecopyInfo;
use serde::{Deserialize, Serialize};

use super::{
    Compression, DEVICES_MAX, Damage, Kind, LINKS_MAX, MEMORY_BYTES_MAX, MEMORY_REGIONS_MAX, NAME_BYTES_MAX,
    Nonce, OFFER_BYTES_MAX, REASON_BYTES_MAX, REGIONS_MAX, Secret, printable, u16_at, u32_at, u64_at,
};

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

/// The facts that a side knows of a device without opening a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFacts {
    /// Its section in the stream.
    pub id: u32,
    /// Its name, for people.
    pub name: String,
    /// What it is, if its owner says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The flags of `VFIO_DEVICE_FEATURE_MIGRATION`.
    pub flags: u64,
    /// The estimate of `MIG_DATA_SIZE`, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_bytes: Option<u64>,
    /// The sizes of its regions, in bytes, by index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regions: Option<Vec<u64>>,
    /// The numbers of its interrupt vectors, by index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub irqs: Option<Vec<u32>>,
    /// Its identification in PCI configuration space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<PciIds>,
    /// Whether it stood in STOP when it was offered, and is to stay so at the destination.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stopped: bool,
}

/// Identification in PCI configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciIds {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Subsystem's vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem_device: u16,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// A region of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFacts {
    /// Its section in the stream.
    pub id: u32,
    /// Its first address, as devices see it.
    pub address: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// The page size in bytes. All runs of pages begin and end on page boundaries.
    pub page_bytes: u64,
}

impl MemoryFacts {
    /// Whether both have addresses in common.
    pub fn overlaps(&self, other: &MemoryFacts) -> bool {
        let ends_before = |one: &MemoryFacts, other: &MemoryFacts| {
            u128::from(one.address) + u128::from(one.bytes) <= u128::from(other.address)
        };
        !ends_before(self, other) && !ends_before(other, self)
    }
}

/// Whether the destination accepts an offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it does. Its devices are then in RESUMING.
    pub accepted: bool,
    /// Why it does not.
    #[serde(default)]
    pub reasons: Vec<String>,
    /// Over how many links the source is to send, at most as many as it offered.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub links: u32,
    /// How many bytes of a device may be on their way (`docs/stream.md: CREDIT`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<u64>,
    /// What the proofs of this move cover, so that they hold for this connection only. `None` if they are not due: the
    /// offer has no secret, or the destination is of the first versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub challenge: Option<Nonce>,
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
        Answer { accepted: false, reasons: Vec::new(), links: 1, window: None, challenge: None }
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
            if !page.is_power_of_two() || page > super::DATA_BYTES_MAX as u64 {
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

/// The kind of reason for ending a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortCode {
    /// A user cancelled.
    Cancelled,
    /// A device failed.
    Device,
    /// A frame was damaged or misplaced.
    Stream,
    /// Memory could not be read or written.
    Memory,
    /// A time limit passed.
    TimeLimit,
    /// Devices or memory do not match.
    Incompatible,
    /// The VMM refused.
    Vmm,
    /// The destination takes no move, or none now.
    NotTaken,
    /// The guest would stand still for too long, or did.
    Standstill,
    /// The link failed.
    Link,
    /// Something else.
    Other,
}

const ABORT_CODES: [(AbortCode, u16); 10] = [
    (AbortCode::Cancelled, 1),
    (AbortCode::Device, 2),
    (AbortCode::Stream, 3),
    (AbortCode::Memory, 4),
    (AbortCode::TimeLimit, 5),
    (AbortCode::Incompatible, 6),
    (AbortCode::Vmm, 7),
    (AbortCode::NotTaken, 8),
    (AbortCode::Standstill, 9),
    (AbortCode::Link, 10),
];

/// The payload of ABORT, and of REFUSED before its proof. A reason that is too long is cut.
pub fn encode_abort(code: AbortCode, reason: &str) -> Vec<u8> {
    let number = ABORT_CODES.iter().find(|(known, _)| *known == code).map_or(0, |(_, number)| *number);
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut out = u32::from(number).to_le_bytes().to_vec();
    out.extend_from_slice(&reason.as_bytes()[..end]);
    out
}

/// Reads the payload of ABORT, or of REFUSED before its proof, which has at least 4 bytes.
pub fn decode_abort(payload: &[u8]) -> (AbortCode, String) {
    let number = u16_at(payload, 0);
    let code =
        ABORT_CODES.iter().find(|(_, known)| *known == number).map_or(AbortCode::Other, |(code, _)| *code);
    (code, printable(&String::from_utf8_lossy(&payload[4..])))
}

/// The bytes of a stream's frames in total (the payload of SUM).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Bytes in DEVICE_DATA.
    pub device_bytes: u64,
    /// Bytes in MEMORY_DATA.
    pub memory_bytes: u64,
    /// Bytes covered by MEMORY_ZERO.
    pub zero_bytes: u64,
}

impl Totals {
    /// The payload.
    pub fn encode(&self) -> [u8; 24] {
        let mut out = [0; 24];
        out[..8].copy_from_slice(&self.device_bytes.to_le_bytes());
        out[8..16].copy_from_slice(&self.memory_bytes.to_le_bytes());
        out[16..].copy_from_slice(&self.zero_bytes.to_le_bytes());
        out
    }

    /// Reads a payload of 24 bytes.
    pub fn decode(payload: &[u8]) -> Totals {
        Totals {
            device_bytes: u64_at(payload, 0),
            memory_bytes: u64_at(payload, 8),
            zero_bytes: u64_at(payload, 16),
        }
    }
}

/// Length and hash of a saved stream before its SEAL (the payload of SEAL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seal {
    /// The length in bytes.
    pub bytes: u64,
    /// The BLAKE3 hash of these bytes.
    pub blake3: [u8; 32],
}

impl Seal {
    /// The payload.
    pub fn encode(&self) -> [u8; 40] {
        let mut out = [0; 40];
        out[..8].copy_from_slice(&self.bytes.to_le_bytes());
        out[8..].copy_from_slice(&self.blake3);
        out
    }

    /// Reads a payload of 40 bytes.
    pub fn decode(payload: &[u8]) -> Seal {
        Seal { bytes: u64_at(payload, 0), blake3: payload[8..40].try_into().expect("32 bytes") }
    }
}

/// The payload of DEVICE_END.
pub fn encode_device_end(bytes: u64, crc: u32) -> [u8; 16] {
    let mut out = [0; 16];
    out[..8].copy_from_slice(&bytes.to_le_bytes());
    out[8..12].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Reads the payload of DEVICE_END, 16 bytes: bytes and crc32c.
pub fn decode_device_end(payload: &[u8]) -> (u64, u32) {
    (u64_at(payload, 0), u32_at(payload, 8))
}

/// The payload of ROUND.
pub fn encode_round(round: u32, dirty_bytes: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&round.to_le_bytes());
    out[8..].copy_from_slice(&dirty_bytes.to_le_bytes());
    out
}

/// Reads the payload of ROUND, 16 bytes: the round, and the bytes of memory still dirty.
pub fn decode_round(payload: &[u8]) -> (u32, u64) {
    (u32_at(payload, 0), u64_at(payload, 8))
}

/// The payload of DEVICE_HINT.
pub fn encode_hint(info: &PrecopyInfo) -> [u8; 24] {
    let mut out = [0; 24];
    out[..8].copy_from_slice(&info.initial_bytes.to_le_bytes());
    out[8..16].copy_from_slice(&info.dirty_bytes.to_le_bytes());
    out[16..20].copy_from_slice(&info.flags.to_le_bytes());
    out
}

/// Reads the payload of DEVICE_HINT, 24 bytes.
pub fn decode_hint(payload: &[u8]) -> PrecopyInfo {
    PrecopyInfo {
        argsz: 24,
        flags: u32_at(payload, 16),
        initial_bytes: u64_at(payload, 0),
        dirty_bytes: u64_at(payload, 8),
    }
}

/// Reads a payload that is one u64: MEMORY_ZERO's length, PROGRESS's bytes.
pub fn decode_u64(payload: &[u8]) -> u64 {
    u64_at(payload, 0)
}

/// Reads a payload that is one u32: OUTCOME.
pub fn decode_u32(payload: &[u8]) -> u32 {
    u32_at(payload, 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offer() -> Offer {
        Offer {
            devices: vec![DeviceFacts {
                name: "net0".into(),
                flags: 7,
                pci: Some(PciIds::default()),
                ..Default::default()
            }],
            memory: vec![MemoryFacts { id: 0, address: 0x1000, bytes: 0x4000, page_bytes: 0x1000 }],
            ..Offer::default()
        }
    }

    #[test]
    fn small_payloads_round_trip() {
        let totals = Totals { device_bytes: 1, memory_bytes: u64::MAX, zero_bytes: 3 };
        assert_eq!(Totals::decode(&totals.encode()), totals);
        assert_eq!(decode_device_end(&encode_device_end(7, 9)), (7, 9));
        assert_eq!(decode_round(&encode_round(7, 9)), (7, 9));
        let info = PrecopyInfo { argsz: 24, flags: 1, initial_bytes: 5, dirty_bytes: 6 };
        assert_eq!(decode_hint(&encode_hint(&info)), info);
        for (code, _) in ABORT_CODES {
            assert_eq!(decode_abort(&encode_abort(code, "why")), (code, "why".into()));
        }
        let long = "ü".repeat(REASON_BYTES_MAX);
        assert!(encode_abort(AbortCode::Other, &long).len() <= REASON_BYTES_MAX + 4);
        assert_eq!(decode_abort(b"\x63\0\0\0a\x1b[2J\xff").1, "a\\u{1b}[2J\u{fffd}");
    }

    #[test]
    fn offers_round_trip_and_ignore_what_they_do_not_know() {
        assert_eq!(Offer::decode(&offer().encode().unwrap()), Ok(offer()));
        let newer = br#"{"devices":[{"id":3,"name":"x","flags":1,"colour":"red"}],"weather":[1]}"#;
        assert_eq!(Offer::decode(newer).unwrap().devices[0].id, 3);
        let needs = br#"{"devices":[],"needs":["postcopy"]}"#;
        assert_eq!(Offer::decode(needs), Err(Damage::Unknown { what: "postcopy".into() }));
    }

    #[test]
    fn offers_beyond_the_limits_are_refused() {
        let refused = |change: &dyn Fn(&mut Offer)| {
            let mut offer = offer();
            change(&mut offer);
            let json = serde_json::to_vec(&offer).unwrap();
            assert!(Offer::decode(&json).is_err(), "{offer:?}");
            assert!(offer.encode().is_err());
        };
        refused(&|o| o.devices = vec![o.devices[0].clone(); 2]);
        refused(&|o| o.devices[0].name = "n".repeat(NAME_BYTES_MAX + 1));
        refused(&|o| o.devices[0].regions = Some(vec![0; REGIONS_MAX + 1]));
        refused(&|o| o.needs.push(NEEDS_PROOFS.into()));
        refused(&|o| o.memory.push(o.memory[0]));
        refused(&|o| o.memory.push(MemoryFacts { id: 1, address: 0x4000, ..o.memory[0] }));
        refused(&|o| o.memory.push(MemoryFacts { id: 1, address: 0, ..o.memory[0] }));
        refused(&|o| {
            let of = |id| MemoryFacts { id, address: u64::from(id) << 20, ..o.memory[0] };
            o.memory = (0..257).map(of).collect();
        });
        refused(&|o| o.memory[0].bytes = MEMORY_BYTES_MAX + 0x1000);
        refused(&|o| o.memory[0].bytes = 0);
        refused(&|o| o.memory[0].bytes = 0x1001);
        refused(&|o| o.memory[0].address = 0x800);
        refused(&|o| o.memory[0].address = u64::MAX - 0xfff);
        refused(&|o| o.memory[0].page_bytes = 3);
        refused(&|o| o.memory[0].page_bytes = 2 << 20);
        refused(&|o| {
            o.devices = (0..65).map(|id| DeviceFacts { id, ..o.devices[0].clone() }).collect();
        });
    }

    #[test]
    fn a_secret_and_a_challenge_survive_the_handshake_and_are_not_shown() {
        let secret = Secret::random().unwrap();
        let offer = Offer { secret: Some(secret.clone()), needs: vec![NEEDS_PROOFS.into()], ..offer() };
        let payload = offer.encode().unwrap();
        assert_eq!(Offer::decode(&payload).unwrap().secret, Some(secret));
        assert!(format!("{offer:?}").contains("Secret(..)"));
        let answer = Answer { challenge: Some(Nonce::random().unwrap()), ..Answer::default() };
        assert_eq!(Answer::decode(&answer.encode().unwrap()).unwrap().challenge, answer.challenge);
        for wrong in [r#""00""#, "7", r#"["00"]"#, &format!("\"{}\"", "g".repeat(64))] {
            assert!(
                Offer::decode(format!(r#"{{"devices":[],"secret":{wrong}}}"#).as_bytes()).is_err(),
                "{wrong}"
            );
            let answer = format!(r#"{{"accepted":true,"challenge":{wrong}}}"#);
            assert!(Answer::decode(answer.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_device_that_stood_still_is_said_to_and_others_are_as_older_readers_know_them() {
        let (running, mut stopped) = (offer(), offer());
        stopped.devices[0].stopped = true;
        let json = |offer: &Offer| String::from_utf8(offer.encode().unwrap()).unwrap();
        assert!(json(&stopped).contains(r#""stopped":true"#) && !json(&running).contains("stopped"));
        assert_eq!(Offer::decode(json(&stopped).as_bytes()), Ok(stopped));
        assert!(!Offer::decode(json(&running).as_bytes()).unwrap().devices[0].stopped);
    }

    #[test]
    fn memory_may_touch_and_have_holes() {
        let mut offer = offer();
        for (id, address) in [(1, 0x5000), (2, 0x10_0000), (3, u64::MAX - 0x3fff)] {
            offer.memory.push(MemoryFacts { id, address, ..offer.memory[0] });
        }
        assert_eq!(Offer::decode(&offer.encode().unwrap()), Ok(offer));
    }

    #[test]
    fn a_refusal_has_reasons_and_not_endlessly_many() {
        let why = Answer::decode(br#"{"accepted":false}"#).unwrap().reasons;
        assert_eq!(why, ["the destination refuses and does not say why"]);
        let many = Answer { accepted: false, reasons: vec!["no".into(); 10_000], ..Answer::default() };
        assert_eq!(Answer::decode(&many.encode().unwrap()).unwrap().reasons.len(), ANSWER_REASONS_MAX);
    }

    #[test]
    fn an_answer_with_too_many_reasons_keeps_some() {
        let answer = Answer { accepted: false, reasons: vec!["x".repeat(10_000); 100], ..Answer::default() };
        let kept = Answer::decode(&answer.encode().unwrap()).unwrap();
        assert!(!kept.accepted && !kept.reasons.is_empty() && kept.reasons.len() < 100);
    }

    proptest! {
        #[test]
        fn arbitrary_json_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in ".{0,100}") {
            let _ = Offer::decode(&bytes);
            let _ = Answer::decode(&bytes);
            let _ = Offer::decode(text.as_bytes());
        }
    }

    #[test]
    fn deep_json_is_refused() {
        let deep = format!("{{\"x\":{}", "[".repeat(100_000));
        assert!(Offer::decode(deep.as_bytes()).is_err());
    }
}
