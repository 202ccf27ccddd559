//! Guest memory of VMMs that use KVM, for [`limosa_migrate`]: the regions of `vm-memory` as the engine's memory, and KVM's logs of
//! what vCPUs write.
//!
//! - [`Regions`] makes the engine's regions of a [`GuestMemoryMmap`](vm_memory::GuestMemoryMmap).
//! - [`BitmapLog`] is `KVM_GET_DIRTY_LOG`, with manual protection where KVM has it.
//! - [`RingLog`] is the dirty ring of each vCPU.
//!
//! `examples/kvm_guest` moves a guest that runs in KVM. The recipe is in `docs/embedding.md`.
//!
//! The documents are Linux' `Documentation/virt/kvm/api.rst` and `include/uapi/linux/kvm.h`.

mod bitmap_log;
mod ioctl;
mod regions;
mod ring;
mod ring_log;
mod slots;

pub use bitmap_log::BitmapLog;
pub use regions::{NotPages, RegionPages, Regions};
pub use ring_log::RingLog;
pub use slots::Slot;
