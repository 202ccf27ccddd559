//! A VFIO device as a VMM sees it, over any transport: [`Device`], the trait for kernel VFIO, vfio-user and devices
//! in the same process; [`DeviceExt`], typed migration calls over it; [`DataStream`], the data of a session;
//! [`DirtySource`], which reports the pages that devices wrote by DMA.
#![deny(unsafe_code)]

mod device;
pub mod dirty;
mod error;
mod ext;
mod identity;
mod stream;

pub use device::{
    Device, DirtyBits, DmaMap, DmaMemory, DmaTarget, FeatureReply, FeatureRequest, HostAddress, IrqAction,
    Refers, Region,
};
pub use dirty::{DeviceLog, DirtySource};
pub use error::{Error, Result};
pub use ext::DeviceExt;
pub use identity::DeviceIdentity;
pub use limosa_foreign_fd::{Foreign, ForeignFd};
pub use limosa_protocol as protocol;
pub use stream::{Chunk, DataStream};
