//! [`Device`]: the trait through which a VMM, the engine and the checks see a device, over any transport.

use std::os::fd::BorrowedFd;

use limosa_foreign_fd::ForeignFd;
use limosa_protocol::info::{DeviceInfo, DmaMapFlags, IrqInfo, RegionInfo};
use limosa_protocol::{FeatureIndex, FeatureOp};

use crate::{DataStream, DeviceIdentity, Result};

/// A VFIO device.
///
/// All calls block, each within the time limit that the transport was opened with. Calls may be
/// made from several threads at once; a session's [`DataStream`] is independent of the device
/// object and may be read or written by one thread while another drives states.
///
/// Typed calls over [`Device::feature`] are in [`DeviceExt`](crate::DeviceExt).
pub trait Device: Send + Sync {
    /// How the user named the device: a socket's path, a PCI address. Used in messages.
    fn name(&self) -> &str;

    /// The identity of this device object, by which logs of other parts know the device
    /// ([`DirtySource::sees`](crate::DirtySource::sees)). Names need not be unique, identities are. An object that
    /// wraps another device returns that device's identity. A device with `None`, the default, is unknown to all logs.
    fn identity(&self) -> Option<DeviceIdentity> {
        None
    }

    /// Performs one request of the FEATURE multiplexer (`vfio.h: VFIO_DEVICE_FEATURE`).
    ///
    /// The answer of a GET, and the output fields of a SET, replace `request.payload`.
    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply>;

    /// Resets the device (`VFIO_DEVICE_RESET`) to RUNNING, from any state including ERROR. A session ends.
    fn reset(&self) -> Result<()>;

    /// The numbers of regions and interrupt indexes (`VFIO_DEVICE_GET_INFO`).
    fn info(&self) -> Result<DeviceInfo>;

    /// One region (`VFIO_DEVICE_GET_REGION_INFO`).
    fn region(&self, index: u32) -> Result<Region>;

    /// One interrupt index (`VFIO_DEVICE_GET_IRQ_INFO`).
    fn irq(&self, index: u32) -> Result<IrqInfo>;

    /// Reads `data.len()` bytes of a region.
    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()>;

    /// Writes `data` to a region and waits until the device has it.
    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()>;

    /// Writes `data` to a region; may return before the device has it. Ordered with the other
    /// region accesses of the same thread; a refusal is lost.
    fn region_write_posted(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        self.region_write(region, offset, data)
    }

    /// Sets up interrupts (`VFIO_DEVICE_SET_IRQS`).
    fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> Result<()>;

    /// Gives the device access to memory (`VFIO_IOMMU_MAP_DMA`).
    fn dma_map(&self, map: &DmaMap<'_>) -> Result<()>;

    /// Removes the device's access to memory (`VFIO_IOMMU_UNMAP_DMA`): once this returns, the device no longer uses
    /// it. Sets the pages that the device wrote since the last report in `dirty`, if given, which needs logging to be
    /// on.
    fn dma_unmap(&self, iova: u64, size: u64, dirty: Option<DirtyBits<'_>>) -> Result<()>;
}

/// One request of the FEATURE multiplexer.
#[derive(Debug)]
pub struct FeatureRequest<'a> {
    /// Which feature.
    pub index: FeatureIndex,
    /// The operation.
    pub op: FeatureOp,
    /// The fixed part of the payload, in and out; [`limosa_protocol::feature`] has its structures.
    pub payload: &'a mut [u8],
    /// The data that the payload refers to.
    pub refers: Refers<'a>,
}

/// The part of a FEATURE payload that `vfio.h` passes by pointer and vfio-user inline.
#[derive(Debug)]
pub enum Refers<'a> {
    /// Nothing.
    Nothing,
    /// Read by the device: the ranges of DMA_LOGGING_START or DMA_BUF.
    In(&'a [u8]),
    /// Written by the device: the bitmap of DMA_LOGGING_REPORT, bit *n* of the words for page
    /// *n*. Words are in host byte order on the little-endian machines that Limosa runs on. The
    /// transport may overwrite it: a caller that wants to add to a bitmap ORs afterwards.
    Bitmap(&'a mut [u64]),
}

/// The results of a FEATURE request in addition to its payload.
#[derive(Default)]
pub struct FeatureReply {
    /// Bytes of the payload that the device filled in.
    pub payload_bytes: usize,
    /// The data stream of the session that a SET of MIG_DEVICE_STATE opened.
    pub stream: Option<Box<dyn DataStream>>,
    /// An fd that the feature returns (DMA_BUF). The server of a vfio-user device can choose any fd.
    pub fd: Option<ForeignFd>,
}

impl std::fmt::Debug for FeatureReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FeatureReply")
            .field("payload_bytes", &self.payload_bytes)
            .field("stream", &self.stream.is_some())
            .field("fd", &self.fd)
            .finish()
    }
}

/// A region of a device.
#[derive(Debug)]
pub struct Region {
    /// Flags, size, offset. `argsz` and `cap_offset` are the transport's own.
    pub info: RegionInfo,
    /// The parts that can be mapped, as (offset within the region, bytes). The whole region if all of it can be mapped;
    /// empty if it cannot be mapped.
    pub mappable: Vec<(u64, u64)>,
    /// The fd to map, at `info.offset` plus the offset within the region. The server of a vfio-user device can choose
    /// any fd, also one with which accesses to a mapping, and unmapping it, never end.
    pub fd: Option<ForeignFd>,
}

/// What to do with interrupts (`struct vfio_irq_set`).
#[derive(Debug)]
pub enum IrqAction<'a> {
    /// Wire vectors from `start` on to eventfds; `None` unwires one.
    Wire(&'a [Option<BorrowedFd<'a>>]),
    /// Unwire all vectors of the index.
    Disable,
    /// Trigger this many vectors from `start` on, as if the device had.
    Trigger(u32),
    /// Mask this many vectors.
    Mask(u32),
    /// Unmask this many vectors.
    Unmask(u32),
}

/// Memory for a device.
#[derive(Debug)]
pub struct DmaMap<'a> {
    /// First address that the device uses.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// The device's access rights.
    pub flags: DmaMapFlags,
    /// Where the memory is.
    pub memory: DmaMemory<'a>,
}

/// Where the memory of a mapping is.
#[derive(Clone, Copy, Debug)]
pub enum DmaMemory<'a> {
    /// In a file that the device may map: a memfd, hugetlbfs, a shared file.
    File {
        /// The file.
        fd: BorrowedFd<'a>,
        /// Where the mapping starts in it, in bytes.
        offset: u64,
    },
    /// Only in this process; the device accesses it through the client (vfio-user's DMA_READ and DMA_WRITE), which
    /// calls this object.
    Messages(&'a std::sync::Arc<dyn DmaTarget>),
    /// At this address of this process. Kernel VFIO only.
    Address(HostAddress),
}

/// An address of this process that a device may use as memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddress(usize);

impl HostAddress {
    /// The memory from this address on.
    ///
    /// # Safety
    ///
    /// A device writes there without the compiler's knowledge. From the call of [`Device::dma_map`] until
    /// [`Device::dma_unmap`] has returned, or the device and its address space are gone, all of the mapping must stay
    /// mapped in this process and must not be read or written through references: it is guest memory, to be accessed
    /// only with raw pointers or atomics.
    #[allow(unsafe_code, reason = "the one promise that a caller of this crate can break")]
    pub const unsafe fn new(address: usize) -> HostAddress {
        HostAddress(address)
    }

    /// The address.
    pub const fn get(self) -> usize {
        self.0
    }
}

/// Serves a device's DMA to memory that it cannot map (vfio-user's DMA_READ and DMA_WRITE).
///
/// Offsets are within the mapping. Called on a thread of the transport, which must not wait for the device.
pub trait DmaTarget: Send + Sync {
    /// The device reads.
    fn read(&self, offset: u64, data: &mut [u8]) -> std::io::Result<()>;
    /// The device writes.
    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()>;
}

impl std::fmt::Debug for dyn DmaTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DmaTarget")
    }
}

/// A place for dirty bits.
#[derive(Debug)]
pub struct DirtyBits<'a> {
    /// Bytes for each bit; a power of two.
    pub page_size: u64,
    /// One bit a page from the range's start on.
    pub words: &'a mut [u64],
}
