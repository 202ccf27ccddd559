//! VFIO devices behind `/dev/vfio`: [`KernelDevice`], a `client::Device` over the kernel's ioctls; the two interfaces
//! that open one, cdev with iommufd and group with container ([`Door`]); the [`AddressSpace`] for its DMA, and the
//! dirty pages that an address space logs.
//!
//! ```no_run
//! use std::os::fd::AsFd;
//!
//! use limosa_client::protocol::info::DmaMapFlags;
//! use limosa_client::protocol::{State, pci_index};
//! use limosa_client::{Chunk, Device, DeviceExt, DmaMap, DmaMemory, IrqAction};
//! use limosa_vfio_kernel::{AddressSpace, Door, KernelDevice, Options};
//!
//! fn use_it(guest: impl AsFd, interrupt: impl AsFd) -> limosa_client::Result<Vec<u8>> {
//!     // One address space for all devices of a guest.
//!     let space = AddressSpace::new(Door::Cdev)?;
//!     let options = Options { space: Some(space), ..Options::default() };
//!     let device = KernelDevice::open("0000:65:00.1", &options)?;
//!
//!     let memory = DmaMemory::File { fd: guest.as_fd(), offset: 0 };
//!     let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
//!     device.dma_map(&DmaMap { iova: 0, size: 1 << 30, flags, memory })?;
//!     device.set_irqs(pci_index::IRQ_MSIX, 0, IrqAction::Wire(&[Some(interrupt.as_fd())]))?;
//!
//!     // Its state, read by hand; `limosa-migrate` moves it live.
//!     let mut state = Vec::new();
//!     if let Some(mut stream) = device.set_state(State::StopCopy)? {
//!         let mut chunk = vec![0; stream.transfer_bytes_max()];
//!         while let Chunk::Data(bytes) = stream.read(&mut chunk)? {
//!             state.extend_from_slice(&chunk[..bytes]);
//!         }
//!     }
//!     device.set_state(State::Running)?;
//!     Ok(state)
//! }
//! ```
//!
//! The project's `docs/kernel.md` lists what a machine needs for it, and what each errno means.

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
pub use list::{Listed, PciIds, list, list_in, list_unbound};
pub use name::{Group, Name, NotAName};
pub use space::{AddressSpace, IovaRanges, SpaceLog};
pub use unusable::Unusable;

/// The two interfaces through which the kernel opens a device. A device that is open through one is EBUSY through the
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
