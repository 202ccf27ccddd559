//! Devices attached to a space, and whether the space's log sees what they write (`vfio.h: VFIO_DEVICE_ATTACH_IOMMUFD_PT,
//! VFIO_GROUP_SET_CONTAINER`).

use std::os::fd::BorrowedFd;

use limosa_client::{Device, DeviceIdentity, Result};
use limosa_protocol::Errno;

use super::refusal::usage;
use super::{AddressSpace, Kind, State, iommufd};

impl AddressSpace {
    /// Binds a cdev to the iommufd and attaches it: to a page table with dirty tracking if its IOMMU has that,
    /// otherwise to the IOAS (`vfio.h: VFIO_DEVICE_BIND_IOMMUFD`, `VFIO_DEVICE_ATTACH_IOMMUFD_PT`).
    ///
    /// A device that could not be attached stays bound until its fd is closed. Returns whether the space's log sees what
    /// the device writes.
    pub fn attach_cdev(&self, name: &str, device: BorrowedFd<'_>) -> Result<bool> {
        match &self.inner.kind {
            Kind::Iommufd(iommufd) => {
                let id = iommufd.bind(name, device)?;
                self.attach_bound(name, id, &mut |page_table| iommufd::attach(device, page_table))
            }
            Kind::Container(_) => {
                Err(usage(name, "it was opened through its cdev, and the address space is a container"))
            }
        }
    }

    /// Attaches a device that the caller has bound to the iommufd, as `device_id`
    /// (`vfio.h: VFIO_DEVICE_BIND_IOMMUFD, out_devid`). `attach` is called with the id of each page table or IOAS in
    /// turn until it accepts one (`vfio.h: VFIO_DEVICE_ATTACH_IOMMUFD_PT`): page tables with dirty tracking first, if
    /// the device's IOMMU has that. `attach` must not use the space. Returns whether the space's log sees what the
    /// device writes. `name` is for messages, and for [`AddressSpace::has_device`].
    ///
    /// # Errors
    ///
    /// [`Error::Refused`](limosa_client::Error::Refused) with the last errno of `attach`;
    /// [`Error::Usage`](limosa_client::Error::Usage) on a container.
    pub fn attach_bound(
        &self,
        name: &str,
        device_id: u32,
        attach: &mut dyn FnMut(u32) -> Result<(), Errno>,
    ) -> Result<bool> {
        match &self.inner.kind {
            Kind::Iommufd(iommufd) => {
                let mut state = self.inner.state();
                let is_seen = iommufd.attach(name, device_id, state.log.is_some(), attach)?;
                state.attach(name, is_seen);
                Ok(is_seen)
            }
            Kind::Container(_) => {
                Err(usage(name, "it is bound to an iommufd, and the address space is a container"))
            }
        }
    }

    /// Adds a group to the container, and sets the container's IOMMU with its first
    /// (`vfio.h: VFIO_GROUP_SET_CONTAINER`, `VFIO_SET_IOMMU`).
    pub fn attach_group(&self, name: &str, group: BorrowedFd<'_>) -> Result<()> {
        match &self.inner.kind {
            Kind::Container(container) => {
                let mut state = self.inner.state();
                let State { mappings, log, .. } = &mut *state;
                let is_first = container.attach(name, group, mappings)?;
                if is_first && let Some(log) = log {
                    // The IOMMU before this one took its log along.
                    log.restart(name, mappings)?;
                }
                state.attach(name, true);
                Ok(())
            }
            Kind::Iommufd(_) => {
                Err(usage(name, "it was opened through its group, and the address space is an IOAS"))
            }
        }
    }

    /// Notes that a device is in this space, so that the space's log ([`AddressSpace::dirty_log`]) answers for it. A
    /// [`KernelDevice`](crate::KernelDevice) does this itself for the space that it is given.
    ///
    /// If the device was attached through this space under its name, the attachment has shown whether the log sees its
    /// writes. Otherwise the caller has attached it: in an IOAS it must be attached to one of the page tables of
    /// [`AddressSpace::from_page_tables`]; without such a page table, the log does not see its writes. It never sees
    /// those of a device without an identity ([`Device::identity`]).
    pub fn has_device(&self, device: &dyn Device) {
        let Some(identity) = device.identity() else { return };
        let mut state = self.inner.state();
        let attached = state.attached.get(device.name()).copied();
        let is_seen = attached.unwrap_or_else(|| match &self.inner.kind {
            Kind::Iommufd(iommufd) => iommufd.has_page_tables(),
            Kind::Container(_) => true,
        });
        state.devices.entry(identity).or_insert(is_seen);
    }

    /// Whether the space is logging what this device writes.
    pub(crate) fn logs(&self, device: DeviceIdentity) -> bool {
        let state = self.inner.state();
        state.log.is_some() && state.devices.get(&device) == Some(&true)
    }
}

impl State {
    fn attach(&mut self, name: &str, is_seen: bool) {
        let all_seen = self.attached.entry(name.into()).or_insert(true);
        *all_seen &= is_seen;
    }
}
