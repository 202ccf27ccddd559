//! Guest memory of VMMs that use KVM, for [`limosa_migrate`]: the regions of `vm-memory`, and KVM's logs of vCPU
//! writes.
//!
//! - [`Regions`] makes the engine's regions from a [`GuestMemoryMmap`](vm_memory::GuestMemoryMmap).
//! - [`BitmapLog`] is `KVM_GET_DIRTY_LOG`, with manual protection where KVM has it.
//! - [`RingLog`] is the dirty ring of each vCPU.
//!
//! `examples/kvm_guest` moves a KVM guest. `docs/embedding.md` explains the use.
//!
//! The documents are `Documentation/virt/kvm/api.rst` and `include/uapi/linux/kvm.h` of Linux.

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
