//! [`AddressSpace`]: the memory that devices reach by DMA, an IOAS of iommufd's or a type1 container.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use limosa_client::{DirtyBits, DmaMap, Result};

use crate::Door;

/// The memory that one or several devices reach by DMA. Copies are the same space.
#[derive(Clone, Debug)]
pub struct AddressSpace {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    door: Door,
    fd: OwnedFd,
}

impl AddressSpace {
    /// A new one: an IOAS of `/dev/iommu`, or a container of `/dev/vfio/vfio`.
    pub fn new(door: Door) -> Result<AddressSpace> {
        let _ = door;
        todo!()
    }

    /// An IOAS that the caller holds. The fd is duplicated.
    pub fn from_iommufd(iommufd: BorrowedFd<'_>, ioas: u32) -> Result<AddressSpace> {
        let _ = (iommufd, ioas);
        todo!()
    }

    /// A container that the caller holds, its IOMMU set. The fd is duplicated.
    pub fn from_container(container: BorrowedFd<'_>) -> Result<AddressSpace> {
        let _ = container;
        todo!()
    }

    /// Which devices can be attached.
    pub fn door(&self) -> Door {
        self.inner.door
    }

    /// Binds a cdev to the iommufd and attaches it: to a page table with dirty tracking where its IOMMU has
    /// that, else to the IOAS (`vfio.h: VFIO_DEVICE_BIND_IOMMUFD`, `VFIO_DEVICE_ATTACH_IOMMUFD_PT`).
    pub(crate) fn attach_cdev(&self, name: &str, device: BorrowedFd<'_>) -> Result<()> {
        let _ = (name, device, &self.inner.fd);
        todo!()
    }

    /// Adds a group to the container, and sets the container's IOMMU with its first
    /// (`vfio.h: VFIO_GROUP_SET_CONTAINER`, `VFIO_SET_IOMMU`).
    pub(crate) fn attach_group(&self, name: &str, group: BorrowedFd<'_>) -> Result<()> {
        let _ = (name, group);
        todo!()
    }

    /// Gives its devices access to memory. `name` is for messages.
    pub fn map(&self, name: &str, map: &DmaMap<'_>) -> Result<()> {
        let _ = (name, map);
        todo!()
    }

    /// Takes memory away again; with `dirty`, with the pages that were written.
    pub fn unmap(&self, name: &str, iova: u64, size: u64, dirty: Option<DirtyBits<'_>>) -> Result<()> {
        let _ = (name, iova, size, dirty);
        todo!()
    }
}
