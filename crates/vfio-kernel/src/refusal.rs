//! The kernel's refusals as an operator reads them: the request, the errno, its meaning and the remedy.
//!
//! The errnos are those of `drivers/vfio`, of the drivers with migration, and those that `vfio.h` promises.

use std::fmt;
use std::path::Path;

use limosa_client::Error;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State};

const TOO_MANY_FILES: &str = "this process has reached its limit of open files: raise it (ulimit -n)";

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
    /// Whether it is a request to a session's data fd, for which ENODEV means that the session is over.
    fn is_of_session(self) -> bool {
        matches!(self, Request::DataRead | Request::DataWrite | Request::PrecopyInfo)
    }

    /// What the errno means here and what to do about it; empty where the errno's own text suffices.
    pub fn hint(self, errno: Errno) -> &'static str {
        use FeatureIndex as Index;
        match (self, errno) {
            (Request::SetState(_), Errno::EINVAL) => {
                "the device cannot reach that state from its current one; after RESUMING, the data that it was given \
                 may be incomplete"
            }
            (Request::SetState(_), Errno::EBUSY) => {
                "the device is in use in a way that prevents a migration at the moment; try again"
            }
            (Request::SetState(_), Errno::ENOMEM) => "the kernel has no memory for the device's state",
            (Request::SetState(_), Errno::EIO | Errno::ETIMEDOUT) => {
                "the device failed to change its state; if it is in ERROR now, only a reset recovers it"
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
                "this kernel is older than that feature"
            }
            (
                Request::Feature(
                    _,
                    Index::DMA_LOGGING_START | Index::DMA_LOGGING_STOP | Index::DMA_LOGGING_REPORT,
                ),
                Errno::ENOTTY,
            ) => "the device does not log its own DMA; the IOMMU may: see the address space",
            (Request::Feature(_, Index::DMA_LOGGING_START), Errno::E2BIG) => {
                "Linux accepts only as many ranges as fit a page; merge ranges that are close to each other"
            }
            (Request::Feature(_, Index::DMA_LOGGING_START), Errno::ENOTSUP | Errno::ENOSPC) => {
                "the device cannot track that much memory; fewer or larger pages may help"
            }
            (Request::Feature(_, Index::DMA_LOGGING_START), Errno::EINVAL) => {
                "logging is on already, or a range is empty, overlaps another or is not aligned to the page size"
            }
            (Request::Feature(_, Index::DMA_LOGGING_REPORT), Errno::ENOTSUP) => {
                "this kernel was built without CONFIG_IOMMUFD_DRIVER, which reports of device logs need"
            }
            (Request::Feature(_, Index::DMA_LOGGING_REPORT), Errno::EINVAL) => {
                "logging is off, or the page size is not a power of two of at least 4096"
            }
            (Request::Reset, Errno::ENOTTY | Errno::EINVAL) => {
                "this device cannot be reset alone, as its flags in DEVICE_GET_INFO say; close it, and the kernel resets \
                 it as far as possible"
            }
            (Request::GetInfo, Errno::EINVAL) => {
                "the device is not bound to an iommufd (VFIO_DEVICE_BIND_IOMMUFD), and answers no request before that"
            }
            (Request::GetInfo, Errno::ENOTTY) => "the fd is not a VFIO device",
            (Request::GetRegionInfo(_), Errno::EINVAL) => "there is no such region",
            (Request::GetIrqInfo(_), Errno::EINVAL | Errno::ENOTTY) => "there is no such interrupt index",
            (Request::SetIrqs(_), Errno::EINVAL) => {
                "there is no such vector, it has no eventfd, or the device uses another kind of interrupts now"
            }
            (Request::SetIrqs(_), Errno::ENOTTY) => {
                "the device has no such action for interrupts of this kind"
            }
            (Request::SetIrqs(_), Errno::ENOSPC) => "the host does not have that many free interrupt vectors",
            (Request::RegionRead(_) | Request::RegionWrite(_), Errno::EIO) => {
                "the device does not decode memory at the moment: check its command register and its power state"
            }
            (Request::RegionRead(_) | Request::RegionWrite(_), Errno::EINVAL) => {
                "the region cannot be accessed at that offset, or in that way"
            }
            (Request::DataRead, Errno::EBADF) => "the session is a RESUMING session: it can only be written",
            (Request::DataWrite, Errno::EBADF) => "the session is a saving session: it can only be read",
            (Request::DataRead | Request::DataWrite | Request::PrecopyInfo, Errno::ENODEV) => {
                "the session is over: the device has left the states of that session, was reset, or is gone"
            }
            (Request::DataWrite, Errno::ENOMEM | Errno::ENOSPC) => {
                "more data than this device has state: it comes from another kind of device"
            }
            (Request::DataWrite, Errno::EFAULT | Errno::EINVAL | Errno::EBADMSG | Errno::ENOTSUP) => {
                "the device refuses this data: it is damaged, or comes from another kind or version of device"
            }
            (Request::DataRead | Request::DataWrite, Errno::EIO | Errno::ETIMEDOUT) => {
                "the device failed; if it is in ERROR now, only a reset recovers it"
            }
            (Request::PrecopyInfo, Errno::EINVAL) => "it is available only in PRE_COPY and PRE_COPY_P2P",
            (Request::PrecopyInfo, Errno::ENOTTY) => {
                "the device does not report how much is left in pre-copy"
            }
            (Request::GetDeviceFd, Errno::EINVAL) => "the group is not in a container with an IOMMU",
            (Request::GetDeviceFd, Errno::EBUSY | Errno::EPERM) => {
                "another device of its group is in use by a driver of the host"
            }
            (_, Errno::ENOTTY) => "the kernel or the device does not know this request",
            (_, Errno::ENOTCONN) => {
                "the device's physical function is not available: it was unplugged, or its firmware is recovering from a failure"
            }
            (_, Errno::EMFILE) => TOO_MANY_FILES,
            _ => "",
        }
    }

    /// The kernel's answer as an error.
    ///
    /// ENODEV means that the device is gone, and that every later request gets the same answer. For a request to a data fd it
    /// only means that the session is over.
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

/// Why the node of a device or a group cannot be opened, and what to do about it.
pub(crate) fn node_hint(errno: Errno, node: &Path, has_vfio: bool) -> String {
    let node = node.display();
    match errno {
        Errno::EBUSY => format!(
            "another process has it open, through its group or its cdev; `fuser -v {node}`, and the same for its \
             other node, show which"
        ),
        Errno::EACCES => {
            format!(
                "it belongs to root by default: `chown USER {node}` gives it to the user who is to use the device"
            )
        }
        Errno::EPERM => {
            "only a process with CAP_SYS_RAWIO may open a device without an IOMMU, and a container may forbid \
                         all device nodes"
                .into()
        }
        Errno::ENOENT if !has_vfio => {
            "there is no /dev/vfio here: load the module vfio, or pass the nodes into this container".into()
        }
        Errno::ENOENT => {
            "the kernel has the device, but its node is missing: is this a container without it, or \
                          is udev not running?"
                .into()
        }
        Errno::ENODEV | Errno::ENXIO => {
            "the device is gone: it was unplugged, or its driver was unbound".into()
        }
        Errno::EMFILE => TOO_MANY_FILES.into(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: [Request; 15] = [
        Request::Feature(FeatureOp::GET, FeatureIndex::MIGRATION),
        Request::Feature(FeatureOp::SET, FeatureIndex::DMA_LOGGING_START),
        Request::SetState(3),
        Request::GetInfo,
        Request::GetRegionInfo(0),
        Request::GetIrqInfo(0),
        Request::SetIrqs(0),
        Request::Reset,
        Request::RegionRead(0),
        Request::RegionWrite(0),
        Request::DataRead,
        Request::DataWrite,
        Request::PrecopyInfo,
        Request::GroupStatus,
        Request::GetDeviceFd,
    ];

    #[test]
    fn requests_have_the_names_of_the_standard() {
        let get = |index| Request::Feature(FeatureOp::GET, index).to_string();
        assert_eq!(get(FeatureIndex::MIG_DATA_SIZE), "GET MIG_DATA_SIZE");
        assert_eq!(get(FeatureIndex(99)), "GET feature 99");
        let probe = Request::Feature(FeatureOp::PROBE | FeatureOp::SET, FeatureIndex::MIGRATION);
        assert_eq!(probe.to_string(), "PROBE MIGRATION");
        let none = Request::Feature(FeatureOp::empty(), FeatureIndex::MIGRATION);
        assert_eq!(none.to_string(), "FEATURE MIGRATION with flags 0x0");
        assert_eq!(Request::SetState(3).to_string(), "SET MIG_DEVICE_STATE to STOP_COPY");
        assert_eq!(Request::SetState(8).to_string(), "SET MIG_DEVICE_STATE to 8");
        assert_eq!(Request::GetRegionInfo(7).to_string(), "DEVICE_GET_REGION_INFO of 7");
        for request in EVERY {
            assert!(!request.to_string().is_empty(), "{request:?}");
        }
    }

    /// What an operator can meet, and a word of the message.
    #[test]
    fn refusals_say_what_they_mean() {
        let feature = |index| Request::Feature(FeatureOp::SET, index);
        for (request, errno, word) in [
            (feature(FeatureIndex::MIGRATION), Errno::ENOTTY, "VFIO driver made for it"),
            (Request::SetState(3), Errno::ENOTTY, "VFIO driver made for it"),
            (Request::SetState(1), Errno::EINVAL, "incomplete"),
            (Request::SetState(3), Errno::EIO, "only a reset"),
            (feature(FeatureIndex::DMA_LOGGING_START), Errno::ENOTTY, "IOMMU may"),
            (feature(FeatureIndex::DMA_LOGGING_START), Errno::E2BIG, "fit a page"),
            (feature(FeatureIndex::DMA_LOGGING_REPORT), Errno::ENOTSUP, "CONFIG_IOMMUFD_DRIVER"),
            (feature(FeatureIndex::MIG_DATA_SIZE), Errno::ENOTTY, "no estimate"),
            (feature(FeatureIndex::MIG_PRECOPY_INFO_V2), Errno::ENOTTY, "older"),
            (feature(FeatureIndex(77)), Errno::ENOTTY, "does not know"),
            (Request::GetInfo, Errno::EINVAL, "iommufd"),
            (Request::GetInfo, Errno::ENOTTY, "not a VFIO device"),
            (Request::GetRegionInfo(9), Errno::EINVAL, "no such region"),
            (Request::GetIrqInfo(9), Errno::EINVAL, "no such interrupt"),
            (Request::SetIrqs(2), Errno::ENOSPC, "not have that many"),
            (Request::Reset, Errno::EINVAL, "cannot be reset"),
            (Request::RegionRead(0), Errno::EIO, "command register"),
            (Request::DataRead, Errno::EBADF, "only be written"),
            (Request::DataWrite, Errno::EBADF, "only be read"),
            (Request::DataRead, Errno::ENODEV, "session is over"),
            (Request::DataWrite, Errno::ENOMEM, "more data than"),
            (Request::DataWrite, Errno::EBADMSG, "damaged"),
            (Request::PrecopyInfo, Errno::EINVAL, "PRE_COPY"),
            (Request::GetDeviceFd, Errno::EBUSY, "driver of the host"),
            (Request::DataRead, Errno::EMFILE, "ulimit"),
            (Request::SetState(3), Errno::ENOTCONN, "physical function"),
        ] {
            let hint = request.hint(errno);
            assert!(hint.contains(word), "{request}, {errno}: `{hint}`");
        }
    }

    #[test]
    fn a_refusal_keeps_its_errno_and_names_the_request() {
        for request in EVERY {
            for errno in (1..=133).map(Errno::from_raw) {
                let error = request.refused("0000:65:00.1", errno);
                let text = error.to_string();
                assert!(text.contains("0000:65:00.1") && text.contains(&request.to_string()), "{text}");
                let is_gone = errno == Errno::ENODEV && !request.is_of_session();
                assert_eq!(error.is_connection_lost(), is_gone, "{text}");
                assert_eq!(error.is_refused(errno), !is_gone, "{text}");
                assert!(!text.ends_with(['.', ' ', ';']), "{text}");
            }
        }
    }

    #[test]
    fn a_node_that_does_not_open_says_what_to_do() {
        let node = Path::new("/dev/vfio/12");
        for (errno, has_vfio, word) in [
            (Errno::EBUSY, true, "fuser -v /dev/vfio/12"),
            (Errno::EACCES, true, "chown USER /dev/vfio/12"),
            (Errno::EPERM, true, "CAP_SYS_RAWIO"),
            (Errno::ENOENT, false, "no /dev/vfio"),
            (Errno::ENOENT, true, "node is missing"),
            (Errno::ENODEV, true, "unplugged"),
            (Errno::EMFILE, true, "ulimit"),
        ] {
            let hint = node_hint(errno, node, has_vfio);
            assert!(hint.contains(word), "{errno}: `{hint}`");
        }
    }
}
