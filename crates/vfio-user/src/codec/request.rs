//! A client's commands, decoded and checked against themselves: [`Request`].
//!
//! The device decides whether a region, range or feature exists; the codec refuses only messages that are invalid for
//! every device.

use limosa_protocol::FeatureHeader;
use limosa_protocol::info::{DmaUnmapFlags, IrqSet, IrqSetFlags};
use zerocopy::FromBytes;

use super::{
    Command, DecodeError, DirtyBitmap, DmaMapMessage, DmaUnmapMessage, IoFdsMessage, MigData, RegionAccess,
    RegionWriteMulti, SingleWrite, VersionMessage, fixed,
};

/// A command from a client.
///
/// The data of REGION_WRITE and MIG_DATA_WRITE may stay in the socket, to be received directly into its destination:
/// this has only the bytes that were already received.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Request<'a> {
    /// VERSION with its JSON, including NUL; empty if there is none.
    Version(VersionMessage, &'a [u8]),
    /// DMA_MAP.
    DmaMap(DmaMapMessage),
    /// DMA_UNMAP, with the bitmap that GET_DIRTY_BITMAP wants.
    DmaUnmap(DmaUnmapMessage, Option<DirtyBitmap>),
    /// DEVICE_GET_INFO.
    GetInfo {
        /// The most bytes of body that the reply may have.
        argsz: u32,
    },
    /// DEVICE_GET_REGION_INFO.
    GetRegionInfo {
        /// The most bytes of body that the reply may have.
        argsz: u32,
        /// The region.
        index: u32,
    },
    /// DEVICE_GET_REGION_IO_FDS.
    GetRegionIoFds {
        /// The most bytes of body that the reply may have.
        argsz: u32,
        /// The region.
        index: u32,
    },
    /// DEVICE_GET_IRQ_INFO.
    GetIrqInfo {
        /// The most bytes of body that the reply may have.
        argsz: u32,
        /// The interrupt index.
        index: u32,
    },
    /// DEVICE_SET_IRQS.
    SetIrqs(SetIrqs<'a>),
    /// REGION_READ.
    RegionRead(RegionAccess),
    /// REGION_WRITE, with the data received so far.
    RegionWrite(RegionAccess, &'a [u8]),
    /// DEVICE_RESET.
    Reset,
    /// REGION_WRITE_MULTI.
    RegionWriteMulti(&'a [SingleWrite]),
    /// DEVICE_FEATURE with its data.
    Feature(FeatureHeader, &'a [u8]),
    /// MIG_DATA_READ.
    MigDataRead(MigData),
    /// MIG_DATA_WRITE, with the data received so far.
    MigDataWrite(MigData, &'a [u8]),
}

/// DEVICE_SET_IRQS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetIrqs<'a> {
    /// The interrupt index.
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// Vectors. 0 with no data and TRIGGER disables the index.
    pub count: u32,
    /// One of the ACTION flags.
    pub action: IrqSetFlags,
    /// The data of the action.
    pub data: IrqData<'a>,
}

/// The data of [`SetIrqs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqData<'a> {
    /// All the vectors.
    None,
    /// The vectors whose byte is not 0; one byte a vector.
    Bools(&'a [u8]),
    /// The message's fds, one for each vector; without fds the vectors are unwired.
    Eventfds,
}

impl Command {
    /// The bytes of a command's body that [`Request::decode`] needs, given the length of the body: for REGION_WRITE
    /// and MIG_DATA_WRITE the fixed part, for others everything.
    pub const fn head_bytes(self, body_bytes: usize) -> usize {
        let fixed = match self {
            Command::REGION_WRITE => RegionAccess::BYTES,
            Command::MIG_DATA_WRITE => MigData::BYTES,
            _ => return body_bytes,
        };
        if body_bytes < fixed { body_bytes } else { fixed }
    }
}

impl<'a> Request<'a> {
    /// Decodes a command. `head` is the start of its body, at least
    /// [`Command::head_bytes`] of it, `body_bytes` the length of all of it.
    pub fn decode(command: Command, head: &'a [u8], body_bytes: usize) -> Result<Request<'a>, DecodeError> {
        let want = command.head_bytes(body_bytes);
        if head.len() < want {
            return Err(DecodeError::Short { want, got: head.len() });
        }
        let head = &head[..head.len().min(body_bytes)];
        Ok(match command {
            Command::VERSION => {
                let (version, json) = fixed(head)?;
                Request::Version(version, json)
            }
            Command::DMA_MAP => {
                let (map, _) = fixed(head)?;
                Request::DmaMap(map)
            }
            Command::DMA_UNMAP => {
                let (unmap, rest) = fixed::<DmaUnmapMessage>(head)?;
                let flags = DmaUnmapFlags::from_bits_retain(unmap.flags);
                if unmap.flags & !(DmaUnmapFlags::GET_DIRTY_BITMAP | DmaUnmapFlags::ALL).bits() != 0 {
                    return Err(DecodeError::Field("DMA_UNMAP has an unknown flag"));
                }
                let bitmap = match flags.contains(DmaUnmapFlags::GET_DIRTY_BITMAP) {
                    true => Some(fixed(rest)?.0),
                    false => None,
                };
                Request::DmaUnmap(unmap, bitmap)
            }
            Command::DEVICE_GET_INFO => Request::GetInfo { argsz: fixed(head)?.0 },
            Command::DEVICE_GET_REGION_INFO => {
                let ([argsz, _, index], _) = fixed::<[u32; 3]>(head)?;
                Request::GetRegionInfo { argsz, index }
            }
            Command::DEVICE_GET_REGION_IO_FDS => {
                let (request, _) = fixed::<IoFdsMessage>(head)?;
                Request::GetRegionIoFds { argsz: request.argsz, index: request.index }
            }
            Command::DEVICE_GET_IRQ_INFO => {
                let ([argsz, _, index], _) = fixed::<[u32; 3]>(head)?;
                Request::GetIrqInfo { argsz, index }
            }
            Command::DEVICE_SET_IRQS => Request::SetIrqs(SetIrqs::decode(head)?),
            Command::REGION_READ => Request::RegionRead(fixed(head)?.0),
            Command::REGION_WRITE => {
                let (access, data) = fixed::<RegionAccess>(head)?;
                length(RegionAccess::BYTES, access.count.into(), body_bytes)?;
                Request::RegionWrite(access, data)
            }
            Command::DEVICE_RESET => Request::Reset,
            Command::REGION_WRITE_MULTI => {
                let (multi, rest) = fixed::<RegionWriteMulti>(head)?;
                let writes = <[SingleWrite]>::ref_from_bytes(rest)
                    .map_err(|_| DecodeError::Field("REGION_WRITE_MULTI is not a whole number of writes"))?;
                if multi.count != writes.len() as u64 {
                    return Err(DecodeError::Field(
                        "the number of writes in REGION_WRITE_MULTI differs from its count",
                    ));
                }
                if writes.iter().any(|write| write.count > 8) {
                    return Err(DecodeError::Field("REGION_WRITE_MULTI has a write of more than 8 bytes"));
                }
                Request::RegionWriteMulti(writes)
            }
            Command::DEVICE_FEATURE => {
                let (header, data) = fixed(head)?;
                Request::Feature(header, data)
            }
            Command::MIG_DATA_READ => Request::MigDataRead(fixed(head)?.0),
            Command::MIG_DATA_WRITE => {
                let (write, data) = fixed::<MigData>(head)?;
                length(MigData::BYTES, write.size.into(), body_bytes)?;
                Request::MigDataWrite(write, data)
            }
            other => return Err(DecodeError::Unknown(other)),
        })
    }
}

impl<'a> SetIrqs<'a> {
    fn decode(body: &'a [u8]) -> Result<SetIrqs<'a>, DecodeError> {
        let (set, rest) = fixed::<IrqSet>(body)?;
        let flags =
            IrqSetFlags::from_bits(set.flags).ok_or(DecodeError::Field("SET_IRQS has an unknown flag"))?;
        let actions = IrqSetFlags::ACTION_MASK | IrqSetFlags::ACTION_UNMASK | IrqSetFlags::ACTION_TRIGGER;
        let action = flags & actions;
        if action.bits().count_ones() != 1 {
            return Err(DecodeError::Field("SET_IRQS must have one action"));
        }
        if (set.argsz as usize) < size_of::<IrqSet>() {
            return Err(DecodeError::Field("SET_IRQS has an argsz shorter than itself"));
        }
        if set.start.checked_add(set.count).is_none() {
            return Err(DecodeError::Field("SET_IRQS has vectors beyond 2^32"));
        }
        let data = match flags - actions {
            IrqSetFlags::DATA_NONE => IrqData::None,
            IrqSetFlags::DATA_EVENTFD => IrqData::Eventfds,
            IrqSetFlags::DATA_BOOL => {
                length(size_of::<IrqSet>(), set.count.into(), body.len())?;
                if (set.argsz as usize) < body.len() {
                    return Err(DecodeError::Field("SET_IRQS has an argsz shorter than its data"));
                }
                IrqData::Bools(&rest[..(set.count as usize).min(rest.len())])
            }
            _ => return Err(DecodeError::Field("SET_IRQS must have one kind of data")),
        };
        Ok(SetIrqs { index: set.index, start: set.start, count: set.count, action, data })
    }
}

/// Checks that a body is its fixed part and that much data.
fn length(fixed: usize, data: u64, got: usize) -> Result<(), DecodeError> {
    let want = fixed as u64 + data;
    if want == got as u64 { Ok(()) } else { Err(DecodeError::Length { want, got }) }
}
