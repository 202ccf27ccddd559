//! The messages of vfio-user (`vfio-user.rst: Commands`) as text, by the codec of servers and clients.

use limosa_protocol::info::{DeviceFlags, DeviceInfo, IrqInfo, IrqSetFlags, RegionInfo};
use limosa_vfio_user::codec::{
    Command, DecodeError, DmaAccess, DmaUnmapMessage, DmaWriteReply, IoFdsMessage, IrqData, MigData,
    RegionAccess, RegionWriteMulti, Request as Message, VersionMessage,
};
use zerocopy::FromBytes;

use super::{Known, feature, text};
use crate::event::{Request, printable};
use crate::framer::HEAD_BYTES_MAX;

/// Limit on the characters of version data that are shown.
const JSON_SHOWN: usize = 1024;

/// A command's request.
pub struct Asked {
    pub request: Request,
    pub arguments: String,
    /// Bytes of data that it carries.
    pub bytes: u64,
}

/// A command of a client, or of a server.
pub fn asked(
    command: Command,
    head: &[u8],
    body_bytes: usize,
    is_qemus: bool,
    known: Known,
) -> Result<Asked, String> {
    let request = named(command);
    let plain = |arguments: String| Asked { request: request.clone(), arguments, bytes: 0 };
    let data = |arguments: String, bytes: u64| Asked { request: request.clone(), arguments, bytes };
    if matches!(command, Command::DMA_READ | Command::DMA_WRITE) {
        let access = dma(head, is_qemus)?;
        let bytes = if command == Command::DMA_WRITE { access.count } else { 0 };
        return Ok(data(text::range(access.address, access.count), bytes));
    }
    let message = match Message::decode(command, head, body_bytes) {
        Ok(message) => message,
        Err(DecodeError::Unknown(_)) => return Ok(plain(format!("{body_bytes} bytes: {}", text::hex(head)))),
        // Only the beginning of a body is kept, and this command can only be decoded completely.
        Err(DecodeError::Short { want, got }) if got == HEAD_BYTES_MAX && want > got => {
            return Ok(plain(format!("{body_bytes} bytes: {}", text::hex(head))));
        }
        Err(error) => return Err(error.to_string()),
    };
    Ok(match message {
        Message::Version(version, json) => plain(in_version(version, json)),
        Message::DmaMap(map) => plain(format!(
            "{} {} offset {:#x}",
            text::range(map.address, map.size),
            text::map_flags(map.flags),
            map.offset
        )),
        Message::DmaUnmap(unmap, bitmap) => {
            let all =
                if unmap.flags & 2 != 0 { "all".to_owned() } else { text::range(unmap.address, unmap.size) };
            let bitmap = bitmap.map(|bitmap| format!("bitmap page size {}", bitmap.page_size));
            plain(text::join(&[&all, &bitmap.unwrap_or_default()]))
        }
        Message::GetInfo { .. } | Message::Reset => plain(String::new()),
        Message::GetRegionInfo { index, .. } | Message::GetRegionIoFds { index, .. } => {
            plain(format!("region {index}"))
        }
        Message::GetIrqInfo { index, .. } => plain(format!("index {index}")),
        Message::SetIrqs(set) => {
            let data = match set.data {
                IrqData::None => "none".to_owned(),
                IrqData::Bools(bools) => format!("bools {}", text::hex(bools)),
                IrqData::Eventfds => "eventfds".to_owned(),
            };
            let end = u64::from(set.start) + u64::from(set.count);
            plain(format!("index {} {} {data} vectors {}..{end}", set.index, action(set.action), set.start))
        }
        Message::RegionRead(access) => plain(in_region(access)),
        Message::RegionWrite(access, bytes) => {
            let shown = text::data(bytes, access.count.into());
            data(text::join(&[&in_region(access), &shown]), access.count.into())
        }
        Message::RegionWriteMulti(writes) => {
            let bytes = writes.iter().map(|write| u64::from(write.count)).sum();
            data(format!("{} writes", writes.len()), bytes)
        }
        Message::Feature(header, payload) => {
            let (request, arguments) = feature::asked(header, payload, known);
            Asked { request, arguments, bytes: 0 }
        }
        Message::MigDataRead(read) => plain(format!("up to {} bytes", read.size)),
        Message::MigDataWrite(write, _) => data(format!("{} bytes", write.size), write.size.into()),
    })
}

/// The contents of an answer, and the bytes of data that come with it.
pub fn answered(
    request: &Request,
    command: Command,
    head: &[u8],
    body_bytes: usize,
    is_qemus: bool,
    known: &mut Known,
) -> Result<(String, u64), String> {
    let plain = |text: String| Ok((text, 0));
    match command {
        Command::VERSION => {
            let (version, json) = fixed::<VersionMessage>(head)?;
            plain(in_version(version, json))
        }
        Command::DEVICE_GET_INFO => {
            let (info, _) = fixed::<DeviceInfo>(head)?;
            let flags = DeviceFlags::from_bits_retain(info.flags);
            let pci = if flags.contains(DeviceFlags::PCI) { "PCI" } else { "" };
            let reset = if flags.contains(DeviceFlags::RESET) { "RESET" } else { "" };
            let counts = format!("{} regions, {} interrupt indexes", info.num_regions, info.num_irqs);
            plain(text::join(&[pci, reset, &counts]))
        }
        Command::DEVICE_GET_REGION_INFO => {
            let (info, _) = fixed::<RegionInfo>(head)?;
            plain(format!("{} {:#x} bytes", text::region_flags(info.flags), info.size))
        }
        Command::DEVICE_GET_REGION_IO_FDS => {
            plain(format!("{} entries", fixed::<IoFdsMessage>(head)?.0.count))
        }
        Command::DEVICE_GET_IRQ_INFO => {
            let (info, _) = fixed::<IrqInfo>(head)?;
            plain(format!("{} vectors {}", info.count, text::irq_flags(info.flags)))
        }
        Command::DMA_UNMAP => {
            let bitmap = body_bytes.saturating_sub(DmaUnmapMessage::BYTES);
            plain(if bitmap > 0 { format!("{bitmap} bytes of bitmap") } else { String::new() })
        }
        Command::REGION_READ => {
            let (access, bytes) = fixed::<RegionAccess>(head)?;
            Ok((text::data(bytes, access.count.into()), access.count.into()))
        }
        Command::REGION_WRITE_MULTI => plain(format!("{} done", fixed::<RegionWriteMulti>(head)?.0.count)),
        Command::DMA_READ => {
            let count = dma(head, is_qemus)?.count;
            Ok((format!("{count} bytes"), count))
        }
        Command::DMA_WRITE => {
            // QEMU's has the specification's count in its first 4 bytes.
            let access = DmaWriteReply::decode(head).map_err(|error| error.to_string())?;
            let count = if is_qemus { access.count & u64::from(u32::MAX) } else { access.count };
            plain(format!("{count} bytes"))
        }
        Command::DEVICE_FEATURE => {
            let (_, payload) = fixed::<limosa_protocol::FeatureHeader>(head)?;
            let payload_bytes = body_bytes.saturating_sub(8);
            plain(feature::answered(request, payload, payload_bytes, known))
        }
        Command::MIG_DATA_READ => {
            let (read, _) = fixed::<MigData>(head)?;
            Ok((format!("{} bytes", read.size), read.size.into()))
        }
        Command::DEVICE_RESET => {
            known.reset();
            plain(String::new())
        }
        _ => plain(String::new()),
    }
}

/// The request of a command.
pub fn named(command: Command) -> Request {
    match command.name() {
        Some(name) => Request::Named(name),
        None => Request::Numbered("message", command.0.into()),
    }
}

fn fixed<T: FromBytes>(body: &[u8]) -> Result<(T, &[u8]), String> {
    T::read_from_prefix(body).map_err(|_| {
        format!("an answer of {} bytes where at least {} are needed", body.len(), size_of::<T>())
    })
}

/// DMA_READ and DMA_WRITE, the specification's or QEMU's (see [`are_qemus`]).
///
/// [`are_qemus`]: limosa_vfio_user::version::Capabilities::are_qemus
fn dma(head: &[u8], is_qemus: bool) -> Result<DmaAccess, String> {
    let short = || format!("a body of {} bytes where at least 12 are needed", head.len());
    if is_qemus {
        let (access, _) = DmaWriteReply::read_from_prefix(head).map_err(|_| short())?;
        return Ok(DmaAccess { address: access.address, count: access.count.into() });
    }
    DmaAccess::read_from_prefix(head).map(|(access, _)| access).map_err(|_| short())
}

fn in_version(version: VersionMessage, json: &[u8]) -> String {
    let json = json.split(|byte| *byte == 0).next().unwrap_or_default();
    let json = String::from_utf8_lossy(&json[..json.len().min(JSON_SHOWN)]);
    text::join(&[&format!("{}.{}", version.major, version.minor), &printable(&json)])
}

fn in_region(access: RegionAccess) -> String {
    format!("region {} {}", access.region, text::range(access.offset, access.count.into()))
}

fn action(flags: IrqSetFlags) -> &'static str {
    match flags {
        IrqSetFlags::ACTION_MASK => "MASK",
        IrqSetFlags::ACTION_UNMASK => "UNMASK",
        _ => "TRIGGER",
    }
}
