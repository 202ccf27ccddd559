//! A capture file for Wireshark (`draft-ietf-opsawg-pcapng`: Section Header Block, Interface Description Block, Enhanced Packet
//! Block), with packets as `docs/trace.md: The capture file` draws them.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};

use crate::event::Direction;
use crate::recorder::Sink;
use crate::seen::{Action, Seen};
use zerocopy::IntoBytes;

/// `LINKTYPE_USER0`: packets whose format the user defines, here that of `contrib/wireshark/vfio-user.lua`.
pub const LINK_TYPE: u16 = 147;

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
/// `if_tsresol`: nanoseconds.
const OPTION_TSRESOL: u16 = 9;
/// `epb_flags`: bit 0 inbound, bit 1 outbound.
const OPTION_FLAGS: u16 = 2;
/// The version of the packets.
const VERSION: u8 = 1;
/// The longest name in a packet, in bytes.
const NAME_BYTES_MAX: usize = 255;
/// The most connections whose names are remembered.
const NAMES_MAX: usize = 4096;

/// Kinds of packets.
mod kind {
    pub const TO_SERVER: u8 = 0;
    pub const TO_CLIENT: u8 = 1;
    pub const MALFORMED_TO_SERVER: u8 = 2;
    pub const MALFORMED_TO_CLIENT: u8 = 3;
    pub const IOCTL: u8 = 4;
    pub const READ: u8 = 5;
    pub const WRITE: u8 = 6;
    pub const CLOSE: u8 = 7;
}

/// A capture file.
pub struct Pcapng<W: Write + Send> {
    name: String,
    to: BufWriter<W>,
    /// The name and the process of each connection.
    connections: BTreeMap<u32, (String, u32)>,
}

impl<W: Write + Send> Pcapng<W> {
    /// Begins a file. `name` is its name in messages.
    pub fn new(name: impl Into<String>, to: W) -> io::Result<Pcapng<W>> {
        let mut file = Pcapng { name: name.into(), to: BufWriter::new(to), connections: BTreeMap::new() };
        let mut section = Vec::new();
        section.extend(BYTE_ORDER_MAGIC.to_ne_bytes());
        section.extend([1u16, 0].as_bytes());
        // The section's length is not known.
        section.extend(u64::MAX.to_ne_bytes());
        file.block(SECTION_HEADER, &section)?;
        let mut interface = Vec::new();
        interface.extend([LINK_TYPE, 0].as_bytes());
        // No limit is stated: that of a packet depends on its kind.
        interface.extend(0u32.to_ne_bytes());
        interface.extend([OPTION_TSRESOL, 1].as_bytes());
        interface.extend([9, 0, 0, 0]);
        interface.extend([0u16; 2].as_bytes());
        file.block(INTERFACE_DESCRIPTION, &interface)?;
        file.to.flush()?;
        Ok(file)
    }

    /// A block: its type, its length, its body padded to 32 bits, its length again.
    fn block(&mut self, kind: u32, body: &[u8]) -> io::Result<()> {
        let padded = body.len().next_multiple_of(4);
        let length = (padded + 12) as u32;
        self.to.write_all(&kind.to_ne_bytes())?;
        self.to.write_all(&length.to_ne_bytes())?;
        self.to.write_all(body)?;
        self.to.write_all(&[0; 3][..padded - body.len()])?;
        self.to.write_all(&length.to_ne_bytes())
    }

    /// A packet, of which `missing` bytes were not kept.
    fn packet(&mut self, time_ns: u64, is_inbound: bool, packet: &[u8], missing: u64) -> io::Result<()> {
        let captured = packet.len() as u32;
        let original = u32::try_from(packet.len() as u64 + missing).unwrap_or(u32::MAX);
        let mut body = Vec::with_capacity(packet.len() + 44);
        body.extend(0u32.to_ne_bytes());
        body.extend(((time_ns >> 32) as u32).to_ne_bytes());
        body.extend((time_ns as u32).to_ne_bytes());
        body.extend(captured.to_ne_bytes());
        body.extend(original.to_ne_bytes());
        body.extend(packet);
        body.resize(body.len().next_multiple_of(4), 0);
        body.extend([OPTION_FLAGS, 4].as_bytes());
        body.extend((if is_inbound { 1u32 } else { 2 }).to_ne_bytes());
        body.extend([0u16; 2].as_bytes());
        self.block(ENHANCED_PACKET, &body)
    }
}

/// The beginning of every packet, in little-endian order.
fn head(kind: u8, fds: usize, pid: u32, number: u32, name: &str) -> Vec<u8> {
    let end =
        name.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= NAME_BYTES_MAX).last();
    let name = &name[..end.unwrap_or(0)];
    let mut head = vec![VERSION, kind];
    head.extend((fds as u16).to_le_bytes());
    head.extend(pid.to_le_bytes());
    head.extend(number.to_le_bytes());
    head.extend((name.len() as u16).to_le_bytes());
    head.extend(0u16.to_le_bytes());
    head.extend(name.as_bytes());
    head
}

impl<W: Write + Send> Sink for Pcapng<W> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn seen(&mut self, seen: &Seen) -> io::Result<()> {
        let unknown = (String::new(), 0);
        match seen {
            Seen::Opened { conversation, name, pid, .. } => {
                if self.connections.len() < NAMES_MAX {
                    self.connections.insert(*conversation, (name.clone(), pid.unwrap_or(0)));
                }
                Ok(())
            }
            Seen::Closed { conversation, .. } => {
                self.connections.remove(conversation);
                Ok(())
            }
            Seen::Message { conversation, direction, message } => {
                let (name, pid) = self.connections.get(conversation).unwrap_or(&unknown);
                let is_inbound = *direction == Direction::FromDevice;
                let kind = if is_inbound { kind::TO_CLIENT } else { kind::TO_SERVER };
                let mut packet = head(kind, message.fds.len(), *pid, *conversation, name);
                packet.extend(message.header.as_bytes());
                packet.extend(&message.head);
                let missing = message.body_bytes - message.head.len().min(message.body_bytes);
                self.packet(message.ended_ns, is_inbound, &packet, missing as u64)
            }
            Seen::Malformed { time_ns, conversation, direction, malformed } => {
                let (name, pid) = self.connections.get(conversation).unwrap_or(&unknown);
                let is_inbound = *direction == Direction::FromDevice;
                let kind = if is_inbound { kind::MALFORMED_TO_CLIENT } else { kind::MALFORMED_TO_SERVER };
                let mut packet = head(kind, 0, *pid, *conversation, name);
                packet.extend(&malformed.head);
                let missing = malformed.bytes.saturating_sub(malformed.head.len() as u64);
                self.packet(*time_ns, is_inbound, &packet, missing)
            }
            Seen::Call(call) => {
                let kind = match call.action {
                    Action::Ioctl { .. } => kind::IOCTL,
                    Action::Read { .. } => kind::READ,
                    Action::Write { .. } => kind::WRITE,
                    Action::Close => kind::CLOSE,
                };
                let mut packet = head(kind, 0, call.pid, call.fd as u32, &call.name);
                let result = match call.result {
                    Ok(value) => value,
                    Err(errno) => -i64::from(errno.raw()),
                };
                packet.extend(result.to_le_bytes());
                packet.extend(call.duration_ns.to_le_bytes());
                let mut missing = 0;
                match &call.action {
                    Action::Ioctl { request, before, after, .. } => {
                        packet.extend(request.to_le_bytes());
                        packet.extend((before.len() as u32).to_le_bytes());
                        packet.extend(before);
                        packet.extend(after);
                    }
                    Action::Read { offset, head, .. } | Action::Write { offset, head, .. } => {
                        packet.extend(offset.unwrap_or(u64::MAX).to_le_bytes());
                        packet.extend(head);
                        missing = (result.max(0) as u64).saturating_sub(head.len() as u64);
                    }
                    Action::Close => {}
                }
                self.packet(call.time_ns, kind == kind::READ, &packet, missing)
            }
            Seen::Note { .. } => Ok(()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
