//! The bodies of frames. `docs/switch-over.md` draws them. Everything here is pure: bytes in, values out.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::frame::{Malformed, TEXT_BYTES_MAX};
use crate::item::{ITEM_BYTES_MAX, ITEM_FDS_MAX};

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawItem {
    kind: U16,
    device: U16,
    flags: U16,
    reserved: U16,
    bytes: U32,
}

/// The item's bytes are in a memfd, the first of the frame's fds.
const IN_MEMFD: u16 = 1;
/// Bytes of an item's head.
pub const ITEM_HEAD_BYTES: usize = size_of::<RawItem>();

/// An item without its bytes and fds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ItemHead {
    /// The caller's.
    pub kind: u16,
    /// The caller's.
    pub device: u16,
    /// How many bytes.
    pub bytes: usize,
    /// Whether they are in a memfd.
    pub is_in_memfd: bool,
}

impl ItemHead {
    /// The head's bytes.
    pub fn encode(&self) -> [u8; ITEM_HEAD_BYTES] {
        let head = RawItem {
            kind: self.kind.into(),
            device: self.device.into(),
            flags: (if self.is_in_memfd { IN_MEMFD } else { 0 }).into(),
            reserved: 0.into(),
            bytes: (self.bytes as u32).into(),
        };
        zerocopy::transmute!(head)
    }

    /// Reads an ITEM's body, of a frame with so many fds, and gives what bytes it has in the frame.
    pub fn decode(body: &[u8], fds: usize) -> Result<(ItemHead, &[u8]), Malformed> {
        let short = |_| Malformed::new("an item's length", body.len(), "12 bytes at least");
        let (raw, inline) = RawItem::read_from_prefix(body).map_err(short)?;
        let flags = raw.flags.get();
        if flags & !IN_MEMFD != 0 || raw.reserved.get() != 0 {
            return Err(Malformed::new("an item's flags", flags, "0 or 1, and 0 after them"));
        }
        let (bytes, is_in_memfd) = (raw.bytes.get() as usize, flags == IN_MEMFD);
        if bytes > ITEM_BYTES_MAX {
            return Err(Malformed::new("an item's bytes", bytes, "16777216 at most"));
        }
        if is_in_memfd && (fds == 0 || bytes == 0) {
            return Err(Malformed::new("an item's memfd", fds, "an fd of it, and bytes in it"));
        }
        if fds > ITEM_FDS_MAX + usize::from(is_in_memfd) {
            return Err(Malformed::new("an item's fds", fds, "128 at most"));
        }
        let expected = if is_in_memfd { 0 } else { bytes };
        if inline.len() != expected {
            return Err(Malformed::new("an item's bytes", inline.len(), "as many as its head says"));
        }
        let head = ItemHead { kind: raw.kind.get(), device: raw.device.get(), bytes, is_in_memfd };
        Ok((head, inline))
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawEnd {
    step: U16,
    reserved: U16,
    items: U32,
    fds: U32,
    reserved2: U32,
    bytes: U64,
}

/// A part of the transfer, as named by END and READY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Part {
    /// The offer: a description of the devices.
    Offer = 1,
    /// Everything that can be transferred while devices run.
    Prepare = 2,
    /// The rest, while they do not.
    Rest = 3,
}

impl Part {
    fn of(number: u16) -> Result<Part, Malformed> {
        [Part::Offer, Part::Prepare, Part::Rest]
            .into_iter()
            .find(|part| *part as u16 == number)
            .ok_or(Malformed::new("a step", number, "1, 2 or 3"))
    }

    /// A READY's body.
    pub fn encode(self) -> [u8; 2] {
        (self as u16).to_le_bytes()
    }

    /// Reads a READY's body.
    pub fn decode(body: &[u8]) -> Result<Part, Malformed> {
        let bytes = body.try_into().map_err(|_| Malformed::new("READY's length", body.len(), "2 bytes"))?;
        Part::of(u16::from_le_bytes(bytes))
    }
}

/// The body of END: what all items of all steps so far add up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// The step.
    pub part: Part,
    /// Items so far.
    pub items: u32,
    /// Their fds.
    pub fds: u32,
    /// Their bytes.
    pub bytes: u64,
}

/// Bytes of END's body.
pub const END_BYTES: usize = size_of::<RawEnd>();

impl End {
    /// The body's bytes.
    pub fn encode(&self) -> [u8; END_BYTES] {
        let end = RawEnd {
            step: (self.part as u16).into(),
            reserved: 0.into(),
            items: self.items.into(),
            fds: self.fds.into(),
            reserved2: 0.into(),
            bytes: self.bytes.into(),
        };
        zerocopy::transmute!(end)
    }

    /// Reads END's body.
    pub fn decode(body: &[u8]) -> Result<End, Malformed> {
        let wrong = |_| Malformed::new("END's length", body.len(), "24 bytes");
        let raw = RawEnd::read_from_bytes(body).map_err(wrong)?;
        if raw.reserved.get() != 0 || raw.reserved2.get() != 0 {
            return Err(Malformed::new("END's reserved bytes", raw.reserved.get(), "0"));
        }
        let (items, fds, bytes) = (raw.items.get(), raw.fds.get(), raw.bytes.get());
        Ok(End { part: Part::of(raw.step.get())?, items, fds, bytes })
    }
}

/// Proves that a channel belongs to the connection that named it.
pub type Token = [u8; 16];

/// The body of HELLO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The old server's token, which the new one sends back.
    pub token: Token,
    /// Whether fds are sent with frames (SCM_RIGHTS). Else the new server pulls them.
    pub sends_fds: bool,
    /// The program and its version, for messages.
    pub name: String,
}

impl Hello {
    /// The body's bytes. A long name is cut.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.token.to_vec();
        bytes.extend([u8::from(self.sends_fds), 0, 0, 0]);
        bytes.extend(cut(&self.name).as_bytes());
        bytes
    }

    /// Reads HELLO's body.
    pub fn decode(body: &[u8]) -> Result<Hello, Malformed> {
        let short = Malformed::new("HELLO's length", body.len(), "20 to 1044 bytes");
        let (token, rest) = body.split_first_chunk().ok_or(short)?;
        let (flags, name) = rest.split_first_chunk::<4>().ok_or(short)?;
        let sends_fds = match u32::from_le_bytes(*flags) {
            0 => false,
            1 => true,
            other => return Err(Malformed::new("HELLO's flags", other, "0 or 1")),
        };
        Ok(Hello { token: *token, sends_fds, name: text(name)? })
    }
}

/// The body of DOOR: the token; the channel's number is the frame's fd.
pub fn decode_door(body: &[u8]) -> Result<Token, Malformed> {
    body.try_into().map_err(|_| Malformed::new("DOOR's length", body.len(), "16 bytes"))
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRefusal {
    has_device: U16,
    device: U16,
}

/// The reason why a side refuses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{reason}", device_name(.device))]
pub struct Refusal {
    /// The device that does not fit, by the caller's number.
    pub device: Option<u16>,
    /// The thing, what was expected, and what to do.
    pub reason: String,
}

fn device_name(device: &Option<u16>) -> String {
    device.map_or_else(String::new, |device| format!("device {device}: "))
}

impl Refusal {
    /// A refusal that concerns no device in particular.
    pub fn new(reason: impl Into<String>) -> Refusal {
        Refusal { device: None, reason: reason.into() }
    }

    /// A refusal of one device.
    pub fn of_device(device: u16, reason: impl Into<String>) -> Refusal {
        Refusal { device: Some(device), reason: reason.into() }
    }

    /// REFUSED's body. A long reason is cut.
    pub fn encode(&self) -> Vec<u8> {
        let (has_device, device) = (u16::from(self.device.is_some()), self.device.unwrap_or(0));
        let raw = RawRefusal { has_device: has_device.into(), device: device.into() };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend(cut(&self.reason).as_bytes());
        bytes
    }

    /// Reads REFUSED's body. Unprintable characters in the reason are escaped.
    pub fn decode(body: &[u8]) -> Result<Refusal, Malformed> {
        let short = |_| Malformed::new("REFUSED's length", body.len(), "4 to 1028 bytes");
        let (raw, reason) = RawRefusal::read_from_prefix(body).map_err(short)?;
        let device = match (raw.has_device.get(), raw.device.get()) {
            (0, 0) => None,
            (1, device) => Some(device),
            (other, _) => return Err(Malformed::new("REFUSED's device", other, "0, or 1 and a number")),
        };
        Ok(Refusal { device, reason: text(reason)? })
    }
}

/// A peer's text, made safe to print.
fn text(bytes: &[u8]) -> Result<String, Malformed> {
    if bytes.len() > TEXT_BYTES_MAX {
        return Err(Malformed::new("a text's length", bytes.len(), "1024 bytes at most"));
    }
    let is_plain = |c: char| matches!(c, '"' | '\'' | '\\');
    let mut printable = String::new();
    for c in String::from_utf8_lossy(bytes).chars() {
        if is_plain(c) { printable.push(c) } else { printable.extend(c.escape_debug()) }
    }
    Ok(printable)
}

/// The longest beginning that may be sent.
fn cut(text: &str) -> &str {
    let end = (0..=text.len().min(TEXT_BYTES_MAX)).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}
