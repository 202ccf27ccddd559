//! VFIO devices behind `/dev/vfio`: [`KernelDevice`], a `client::Device` over the kernel's ioctls; the two
//! doors to one, cdev with iommufd and group with container ([`Door`]); the [`AddressSpace`] that its DMA goes
//! through, and the dirty pages that such a space logs.

mod device;
mod feature;
mod find;
mod ioctl;
mod irq;
mod list;
mod name;
mod open;
mod refusal;
mod region;
mod space;
mod stream;
#[cfg(test)]
mod tree;
mod unusable;

use std::fmt;

pub use device::{KernelDevice, Options};
pub use list::{Listed, PciIds, list, list_unbound};
pub use name::{Group, Name, NotAName};
pub use space::{AddressSpace, IovaRanges, SpaceLog};
pub use unusable::Unusable;

/// The two ways in which the kernel hands out a device. A device that is open through one is EBUSY through the
/// other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// `/dev/vfio/devices/vfioN`, its DMA through iommufd (`vfio.h: VFIO_DEVICE_BIND_IOMMUFD`).
    Cdev,
    /// `/dev/vfio/GROUP`, its DMA through a container with the type1 IOMMU (`vfio.h: VFIO_GROUP_SET_CONTAINER`).
    Group,
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Door::Cdev => "cdev",
            Door::Group => "group",
        })
    }
}
