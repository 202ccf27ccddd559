//! The device side of VFIO.
//!
//! A device author writes a [`Model`]: regions, a reset, and with [`Migration`] the device's actions on the arcs of the
//! standard's state machine (`vfio.h: enum vfio_device_mig_state`). A [`Machine`] owns the model and is the device that
//! clients see: it walks the arcs, opens and ends data sessions, answers the FEATURE multiplexer, and refuses what the
//! standard refuses. Guest memory and interrupts reach the model through its [`Bus`].
//!
//! A machine is served over a socket by `limosa-vfio-user`, or used in the same process through a
//! [`Loopback`]:
//!
//! ```
//! use limosa_client::{Device, DeviceExt};
//! use limosa_device::{Bus, Description, Loopback, Machine, SimpleModel, Region};
//! use limosa_protocol::{Errno, MigrationFlags, info::RegionFlags};
//!
//! /// Four bytes of memory.
//! struct Scratch([u8; 4]);
//!
//! impl SimpleModel for Scratch {
//!     fn description(&self) -> Description {
//!         let flags = RegionFlags::READ | RegionFlags::WRITE;
//!         Description { regions: vec![Region { flags, size: 4, ..Region::default() }], ..Description::default() }
//!     }
//!     fn attach(&mut self, _: Bus) {}
//!     fn region_read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
//!         data.copy_from_slice(&self.0[offset as usize..][..data.len()]);
//!         Ok(())
//!     }
//!     fn region_write(&mut self, _: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
//!         self.0[offset as usize..][..data.len()].copy_from_slice(data);
//!         Ok(())
//!     }
//!     fn reset(&mut self) -> Result<(), Errno> {
//!         self.0 = [0; 4];
//!         Ok(())
//!     }
//! }
//!
//! let device = Loopback::new("scratch", Machine::simple(Scratch([0; 4])));
//! device.region_write(0, 1, b"abc")?;
//! let mut data = [0; 4];
//! device.region_read(0, 0, &mut data)?;
//! assert_eq!(&data, b"\0abc");
//! assert!(device.region_read(0, 1, &mut data).is_err(), "beyond the end");
//! assert_eq!(device.migration_flags()?, MigrationFlags::empty());
//! # Ok::<(), limosa_client::Error>(())
//! ```
#![forbid(unsafe_code)]

mod describe;
mod interrupts;
mod loopback;
mod machine;
mod memory;
mod model;
pub mod pci;
pub mod saved;
mod whole;

pub use describe::RegionView;
pub use interrupts::{Interrupts, SetIrqs, Vector, VectorState, Wiring, WiringState};
pub use limosa_guest_memory::{FileMapping, PinnedBytes};
pub use loopback::Loopback;
pub use machine::{
    ArcCount, ClientId, Copying, Counts, FeatureDone, Frozen, Held, Kept, Machine, MoveId, NextClient,
    Released, SessionId,
};
pub use memory::{
    Backing, DirtyWords, Dma, ExportedLog, ExportedMapping, LOGGED_PAGES_MAX, MAPPED_BYTES_MAX, MAPPINGS_MAX,
    Mapping, Mappings, MemoryKind, Pin, RemoteMemory, UNMAP_WAIT,
};
pub use model::{
    Description, Exclusive, Fault, IoEventFd, Irq, Migration, Model, Region, RegionMapping, Save,
    SimpleMigration, SimpleModel,
};
pub use whole::{Whole, WholeState};

/// Guest memory and interrupts, as a device reaches them. A clone is cheap, and every part may be used from any thread.
#[derive(Clone, Debug)]
pub struct Bus {
    /// Guest memory.
    pub memory: Dma,
    /// Interrupts.
    pub interrupts: Interrupts,
}
