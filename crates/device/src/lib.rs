//! Being a device.
mod describe;
mod irqs;
mod loopback;
mod machine;
mod memory;
mod model;

pub use describe::RegionView;
pub use irqs::Irqs;
pub use loopback::Loopback;
pub use machine::{FeatureDone, Machine, SessionId};
pub use memory::{Backing, GuestMemory, Mapping, RemoteMemory};
pub use model::{Description, Fault, IoEventFd, Irq, Migration, Model, Region, RegionMapping, Save};

/// A device's way out. Every part may be used from any thread.
#[derive(Clone, Debug)]
pub struct Bus {
    /// Guest memory.
    pub memory: std::sync::Arc<GuestMemory>,
    /// Interrupts.
    pub irqs: std::sync::Arc<Irqs>,
}
