//! What a refusal of the kernel's means to the operator: which request, which errno, what to do.
//!
//! The errno are those of `drivers/vfio`, of the drivers with migration, and of what `vfio.h` promises.

use std::fmt;

use limosa_client::Error;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State};

/// What was asked of the kernel, in the standard's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// `VFIO_DEVICE_FEATURE`.
    Feature(FeatureOp, FeatureIndex),
    /// SET of MIG_DEVICE_STATE to the state of this number.
    SetState(u32),
    /// `VFIO_DEVICE_GET_INFO`.
    GetInfo,
    /// `VFIO_DEVICE_GET_REGION_INFO`.
    GetRegionInfo(u32),
    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    GetIrqInfo(u32),
    /// `VFIO_DEVICE_SET_IRQS`.
    SetIrqs(u32),
    /// `VFIO_DEVICE_RESET`.
    Reset,
    /// pread of a region.
    RegionRead(u32),
    /// pwrite to a region.
    RegionWrite(u32),
    /// read of a session's data fd.
    DataRead,
    /// write to a session's data fd.
    DataWrite,
    /// `VFIO_MIG_GET_PRECOPY_INFO`.
    PrecopyInfo,
    /// `VFIO_GROUP_GET_STATUS`.
    GroupStatus,
    /// `VFIO_GROUP_GET_DEVICE_FD`.
    GetDeviceFd,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Request::Feature(op, index) => match op {
                op if op.contains(FeatureOp::PROBE) => write!(f, "PROBE {index}"),
                FeatureOp::GET => write!(f, "GET {index}"),
                FeatureOp::SET => write!(f, "SET {index}"),
                op => write!(f, "FEATURE {index} with flags {:#x}", op.bits()),
            },
            Request::SetState(number) => match State::from_raw(number) {
                Some(state) => write!(f, "SET MIG_DEVICE_STATE to {state}"),
                None => write!(f, "SET MIG_DEVICE_STATE to {number}"),
            },
            Request::GetInfo => f.write_str("DEVICE_GET_INFO"),
            Request::GetRegionInfo(index) => write!(f, "DEVICE_GET_REGION_INFO of {index}"),
            Request::GetIrqInfo(index) => write!(f, "DEVICE_GET_IRQ_INFO of {index}"),
            Request::SetIrqs(index) => write!(f, "DEVICE_SET_IRQS of {index}"),
            Request::Reset => f.write_str("DEVICE_RESET"),
            Request::RegionRead(index) => write!(f, "read of region {index}"),
            Request::RegionWrite(index) => write!(f, "write to region {index}"),
            Request::DataRead => f.write_str("read of data_fd"),
            Request::DataWrite => f.write_str("write to data_fd"),
            Request::PrecopyInfo => f.write_str("MIG_GET_PRECOPY_INFO"),
            Request::GroupStatus => f.write_str("GROUP_GET_STATUS"),
            Request::GetDeviceFd => f.write_str("GROUP_GET_DEVICE_FD"),
        }
    }
}

impl Request {
    /// Whether it goes to a session's data fd, where ENODEV says that the session is over.
    fn is_of_session(self) -> bool {
        matches!(self, Request::DataRead | Request::DataWrite | Request::PrecopyInfo)
    }

    /// What the errno means here and what to do about it; empty where the errno says it all.
    pub fn hint(self, errno: Errno) -> &'static str {
        use FeatureIndex as Index;
        match (self, errno) {
            (Request::SetState(_), Errno::EINVAL) => {
                "the device does not go there from the state that it is in; after RESUMING it may be that the \
                 data that it was given are not whole"
            }
            (Request::SetState(_), Errno::EBUSY) => {
                "the device is in use in a way that cannot be moved now; try again"
            }
            (Request::SetState(_), Errno::ENOMEM) => "the kernel has no memory for the device's state",
            (Request::SetState(_), Errno::EIO | Errno::ETIMEDOUT) => {
                "the device did not do it; if its state is ERROR now, only a reset leads out"
            }
            (
                Request::SetState(_) | Request::Feature(_, Index::MIGRATION | Index::MIG_DEVICE_STATE),
                Errno::ENOTTY,
            ) => {
                "its driver offers no migration: a PCI device needs a VFIO driver made for it, such as \
                 mlx5_vfio_pci, and firmware that takes part"
            }
            (Request::Feature(_, Index::MIG_DATA_SIZE), Errno::ENOTTY) => {
                "the kernel or the device's driver gives no estimate"
            }
            (Request::Feature(_, Index::MIG_PRECOPY_INFO_V2), Errno::ENOTTY) => {
                "this kernel is older than it"
            }
            (
                Request::Feature(
                    _,
                    Index::DMA_LOGGING_START | Index::DMA_LOGGING_STOP | Index::DMA_LOGGING_REPORT,
                ),
                Errno::ENOTTY,
            ) => "the device does not log its own DMA; the IOMMU may: see the address space",
            (Request::Feature(_, Index::DMA_LOGGING_START), Errno::E2BIG) => {
                "Linux takes as many ranges as fit a page; join the nearest ones"
            }
            (Request::Feature(_, Index::DMA_LOGGING_START), Errno::ENOTSUP | Errno::ENOSPC) => {
                "more memory than the device can watch over; fewer or larger pages may do"
            }
            (Request::Feature(_, Index::DMA_LOGGING_START), Errno::EINVAL) => {
                "logging is on already, or a range is empty, overlaps another or is not aligned to the page size"
            }
            (Request::Feature(_, Index::DMA_LOGGING_REPORT), Errno::ENOTSUP) => {
                "this kernel was built without CONFIG_IOMMUFD_DRIVER, which reports of device logs need"
            }
            (Request::Feature(_, Index::DMA_LOGGING_REPORT), Errno::EINVAL) => {
                "logging is off, or the page size is no power of two from 4096 on"
            }
            (Request::Reset, Errno::ENOTTY | Errno::EINVAL) => {
                "this device cannot be reset by itself (it says so in DEVICE_GET_INFO); close it, and the \
                 kernel resets it as far as it can"
            }
            (Request::GetInfo, Errno::EINVAL) => {
                "the device is not bound to an iommufd (VFIO_DEVICE_BIND_IOMMUFD), so it answers nothing"
            }
            (Request::GetInfo, Errno::ENOTTY) => "the fd is not one of a VFIO device",
            (Request::GetRegionInfo(_), Errno::EINVAL) => "there is no such region",
            (Request::GetIrqInfo(_), Errno::EINVAL | Errno::ENOTTY) => "there is no such interrupt index",
            (Request::SetIrqs(_), Errno::EINVAL) => {
                "no such vector, or it is not wired, or the device uses interrupts of another kind now"
            }
            (Request::SetIrqs(_), Errno::ENOTTY) => {
                "the device has no such action for interrupts of this kind"
            }
            (Request::SetIrqs(_), Errno::ENOSPC) => "the machine has not that many interrupt vectors left",
            (Request::RegionRead(_) | Request::RegionWrite(_), Errno::EIO) => {
                "the device does not decode memory now: see its command register and power state"
            }
            (Request::RegionRead(_) | Request::RegionWrite(_), Errno::EINVAL) => {
                "the region cannot be accessed there or in this way"
            }
            (Request::DataRead, Errno::EBADF) => "the session is one of RESUMING: it is written, not read",
            (Request::DataWrite, Errno::EBADF) => "the session is a saving one: it is read, not written",
            (Request::DataRead | Request::DataWrite | Request::PrecopyInfo, Errno::ENODEV) => {
                "the session is over: the device has left the states that it belongs to, was reset, or is gone"
            }
            (Request::DataWrite, Errno::ENOMEM | Errno::ENOSPC) => {
                "more than this device's state has; the data are of another kind of device"
            }
            (Request::DataWrite, Errno::EFAULT | Errno::EINVAL | Errno::EBADMSG | Errno::ENOTSUP) => {
                "the device does not take these data: they are damaged, or of another kind or version of it"
            }
            (Request::DataRead | Request::DataWrite, Errno::EIO | Errno::ETIMEDOUT) => {
                "the device failed; if its state is ERROR now, only a reset leads out"
            }
            (Request::PrecopyInfo, Errno::EINVAL) => "it is known in PRE_COPY and PRE_COPY_P2P only",
            (Request::PrecopyInfo, Errno::ENOTTY) => "the device tells nothing of what is left in pre-copy",
            (Request::GetDeviceFd, Errno::EINVAL) => "the group is in no container with an IOMMU",
            (Request::GetDeviceFd, Errno::EBUSY | Errno::EPERM) => {
                "another device of its group is in use by a driver of the host's"
            }
            (_, Errno::ENOTTY) => "the kernel or the device does not know this request",
            (_, Errno::EMFILE) => {
                "this process has as many open files as it may: raise its limit (ulimit -n)"
            }
            _ => "",
        }
    }

    /// The kernel's answer as an error.
    ///
    /// ENODEV is the device's own end, where it is not that of a session: whatever else is asked of it there,
    /// the answer will be the same.
    pub fn refused(self, device: &str, errno: Errno) -> Error {
        if errno == Errno::ENODEV && !self.is_of_session() {
            let reason = format!(
                "the device is gone: it was unplugged, or its driver was unbound ({self} answered {errno:?})"
            );
            return Error::Disconnected { device: device.into(), reason };
        }
        Error::Refused {
            device: device.into(),
            request: self.to_string(),
            errno,
            hint: self.hint(errno).into(),
        }
    }
}
