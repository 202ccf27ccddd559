//! [`KernelDevice`]: a device of the kernel's as a `client::Device`.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use limosa_client::Result;

use crate::{AddressSpace, Door};

/// How a device is opened.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Through which door; by default the cdev where there is one, else the group.
    pub door: Option<Door>,
    /// The address space to attach it to; by default one of its own.
    pub space: Option<AddressSpace>,
}

/// A device behind `/dev/vfio`.
pub struct KernelDevice {
    name: String,
    fd: Arc<OwnedFd>,
    space: Option<AddressSpace>,
}

impl KernelDevice {
    /// Opens the device of this name: a PCI address, an mdev's UUID, `/dev/vfio/devices/vfioN`, or a group,
    /// `/dev/vfio/N` or N, that has just one device.
    pub fn open(name: &str, options: &Options) -> Result<KernelDevice> {
        let _ = (name, options);
        todo!()
    }

    /// A device that the caller holds open; `name` is for messages. The fds are duplicated: the caller's own stay
    /// his, and stay open. `space` is what its DMA is mapped through, if this side is to map.
    pub fn from_fd(name: &str, device: BorrowedFd<'_>, space: Option<AddressSpace>) -> Result<KernelDevice> {
        let _ = (name, device, space);
        todo!()
    }
}
