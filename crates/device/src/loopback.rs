//! [`Loopback`]: a `client::Device` that calls a [`Machine`] in the same process, so that the engine, the checks
//! and the tests need no socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use limosa_client::{
    Chunk, DataStream, Device, DeviceIdentity, DirtyBits, DmaMap, DmaMemory, DmaTarget, Error, FeatureReply,
    FeatureRequest, IrqAction, Region, Result,
};
use limosa_foreign_fd::ForeignFd;
use limosa_protocol::feature::{FeatureMigState, PrecopyInfo};
use limosa_protocol::info::{DeviceInfo, IrqInfo, RegionFlags};
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp};
use zerocopy::FromBytes;

use crate::{Backing, Machine, Mapping, RemoteMemory, Save, SessionId, SetIrqs};

/// A client of a device in the same process.
///
/// Several may share a device. Dropping one does not change the device: mappings and interrupt
/// wiring stay until [`Machine::client_gone`].
#[derive(Clone, Debug)]
pub struct Loopback {
    name: String,
    identity: DeviceIdentity,
    machine: Arc<Machine>,
}

impl Loopback {
    /// A client of the machine.
    pub fn new(name: impl Into<String>, machine: Arc<Machine>) -> Loopback {
        Loopback { name: name.into(), identity: DeviceIdentity::unique(), machine }
    }

    /// The device.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    fn refused(&self, request: impl FnOnce() -> String, errno: Errno) -> Error {
        Error::Refused { device: self.name.clone(), request: request(), errno, hint: "".into() }
    }

    fn usage(&self, what: impl Into<String>) -> Error {
        Error::Usage { device: self.name.clone(), what: what.into() }
    }

    /// A copy of an fd that the device may keep.
    fn own(&self, fd: BorrowedFd<'_>) -> Result<OwnedFd> {
        rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(|error| Error::Os {
            device: self.name.clone(),
            what: "duplicating a file descriptor".into(),
            errno: Errno::from_raw(error.raw_os_error().unsigned_abs()),
            hint: "".into(),
        })
    }
}

impl Device for Loopback {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> Option<DeviceIdentity> {
        Some(self.identity)
    }

    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let FeatureRequest { index, op, payload, refers } = request;
        let (index, op) = (*index, *op);
        let asked = FeatureMigState::read_from_bytes(payload).ok();
        let payload_bytes = u32::try_from(payload.len()).map_err(|_| self.usage("a payload above 4 GiB"))?;
        let done = FeatureHeader::new(index, op, payload_bytes)
            .call()
            .and_then(|call| self.machine.feature(call, payload, reborrow(refers)))
            .map_err(|errno| self.refused(|| feature_name(index, op, asked), errno))?;
        let stream = done.opened.map(|session| {
            let stream = LoopbackStream { device: self.clone(), session };
            Box::new(stream) as Box<dyn DataStream>
        });
        Ok(FeatureReply { payload_bytes: done.payload_bytes, stream, fd: None })
    }

    fn reset(&self) -> Result<()> {
        self.machine.reset().map_err(|errno| self.refused(|| "RESET".into(), errno))
    }

    fn info(&self) -> Result<DeviceInfo> {
        Ok(self.machine.description().device_info())
    }

    fn region(&self, index: u32) -> Result<Region> {
        let view = self
            .machine
            .description()
            .region_view(index)
            .map_err(|errno| self.refused(|| format!("GET_REGION_INFO of region {index}"), errno))?;
        let mapped = RegionFlags::from_bits_retain(view.info.flags).contains(RegionFlags::MMAP);
        let mappable = match view.areas {
            [] if mapped => vec![(0, view.info.size)],
            areas => areas.to_vec(),
        };
        let file = self.machine.region_file(index);
        let fd = file.map(|file| self.own(file.as_fd())).transpose()?.map(ForeignFd::harmless);
        Ok(Region { info: view.info, mappable, fd })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        self.machine
            .description()
            .irq_info(index)
            .map_err(|errno| self.refused(|| format!("GET_IRQ_INFO of index {index}"), errno))
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let bytes = data.len();
        self.machine.region_read(region, offset, data).map_err(|errno| {
            self.refused(|| format!("read of {bytes} bytes at {offset:#x} of region {region}"), errno)
        })
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.machine.region_write(region, offset, data).map_err(|errno| {
            self.refused(|| format!("write of {} bytes at {offset:#x} of region {region}", data.len()), errno)
        })
    }

    fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> Result<()> {
        let (what, set) = match action {
            IrqAction::Wire(fds) => {
                let owned =
                    fds.iter().map(|fd| fd.map(|fd| self.own(fd).map(ForeignFd::harmless)).transpose());
                ("wire", SetIrqs::Wire(owned.collect::<Result<_>>()?))
            }
            IrqAction::Disable => ("disable", SetIrqs::Disable),
            IrqAction::Trigger(count) => ("trigger", SetIrqs::Trigger(count)),
            IrqAction::Mask(count) => ("mask", SetIrqs::Mask(count)),
            IrqAction::Unmask(count) => ("unmask", SetIrqs::Unmask(count)),
        };
        self.machine
            .set_irqs(index, start, set)
            .map_err(|errno| self.refused(|| format!("SET_IRQS: {what} index {index} from {start}"), errno))
    }

    fn dma_map(&self, map: &DmaMap<'_>) -> Result<()> {
        let backing = match map.memory {
            DmaMemory::File { fd, offset } => {
                Backing::AnyFile { fd: ForeignFd::harmless(self.own(fd)?), offset }
            }
            DmaMemory::Messages(target) => {
                Backing::Remote(Arc::new(AtIova { iova: map.iova, target: Arc::clone(target) }))
            }
            DmaMemory::Address(_) => {
                return Err(self.usage(
                    "memory cannot be mapped by its address here; pass the file behind it, or an object that serves it",
                ));
            }
        };
        self.machine
            .mappings()
            .map(Mapping { iova: map.iova, size: map.size, flags: map.flags, backing })
            .map_err(|errno| self.refused(|| format!("DMA_MAP of {:#x} at {:#x}", map.size, map.iova), errno))
    }

    fn dma_unmap(&self, iova: u64, size: u64, dirty: Option<DirtyBits<'_>>) -> Result<()> {
        let mappings = self.machine.mappings();
        let unmapped = match dirty {
            None => mappings.unmap(iova, size),
            Some(DirtyBits { page_size, words }) => mappings.unmap_report(iova, size, page_size, words),
        };
        // On every transport, unmapping nothing is a client's mistake.
        unmapped
            .and_then(|bytes| if bytes == 0 { Err(Errno::ENOENT) } else { Ok(()) })
            .map_err(|errno| self.refused(|| format!("DMA_UNMAP of {size:#x} at {iova:#x}"), errno))
    }
}

/// The request in the standard's terms, with the requested state.
fn feature_name(index: FeatureIndex, op: FeatureOp, asked: Option<FeatureMigState>) -> String {
    let mut name = String::new();
    for (word, _) in op.iter_names() {
        name.push_str(word);
        name.push(' ');
    }
    name.push_str(&index.to_string());
    if let (FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET, Some(asked)) = (index, op, asked) {
        match asked.state() {
            Ok(state) => name.push_str(&format!(" {state}")),
            Err(_) => name.push_str(&format!(" {}", asked.device_state)),
        }
    }
    name
}

fn reborrow<'a>(refers: &'a mut limosa_client::Refers<'_>) -> limosa_client::Refers<'a> {
    use limosa_client::Refers;
    match refers {
        Refers::Nothing => Refers::Nothing,
        Refers::In(bytes) => Refers::In(bytes),
        Refers::Bitmap(words) => Refers::Bitmap(words),
    }
}

/// A client's memory object, whose offsets are relative to its mapping, addressed by IOVA.
struct AtIova {
    iova: u64,
    target: Arc<dyn DmaTarget>,
}

impl AtIova {
    fn offset(&self, iova: u64) -> Result<u64, Errno> {
        iova.checked_sub(self.iova).ok_or(Errno::EFAULT)
    }
}

impl RemoteMemory for AtIova {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.target.read(self.offset(iova)?, data).map_err(io_errno)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.target.write(self.offset(iova)?, data).map_err(io_errno)
    }
}

fn io_errno(error: std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, |number| Errno::from_raw(number.unsigned_abs()))
}

/// The data stream of one session.
struct LoopbackStream {
    device: Loopback,
    session: SessionId,
}

/// Bytes moved by one call; larger buffers are not faster.
const TRANSFER_BYTES_MAX: usize = 1 << 20;

impl DataStream for LoopbackStream {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        if data.is_empty() {
            return Err(self.device.usage("a read of the data stream needs room for at least one byte"));
        }
        let bytes_max = data.len().min(TRANSFER_BYTES_MAX);
        self.device
            .machine
            .data_read(self.session, bytes_max, |save| match save {
                Save::Data(bytes) => {
                    data[..bytes.len()].copy_from_slice(bytes);
                    Chunk::Data(bytes.len())
                }
                Save::NothingForNow => Chunk::NothingForNow,
                Save::End => Chunk::End,
            })
            .map_err(|errno| self.device.refused(|| "read of the data stream".into(), errno))
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        self.device
            .machine
            .data_write(self.session, data)
            .map_err(|errno| self.device.refused(|| "write to the data stream".into(), errno))
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        self.device
            .machine
            .precopy_info(self.session)
            .map_err(|errno| self.device.refused(|| "GET_PRECOPY_INFO".into(), errno))
    }

    fn transfer_bytes_max(&self) -> usize {
        TRANSFER_BYTES_MAX
    }
}
