//! What the suites of the QEMU lab share: an unmodified QEMU with served devices, driven without a guest (qtest) or with
//! one that was booted, and a device of our own whose interrupts and memory a guest can check.
//!
//! The suites are `tests/*.rs`. They need QEMU and a guest's kernel, so every test is marked
//! `#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]`; `lab/qemu/run` fetches both and runs them.
//!
//! This crate fails loudly: whatever the lab should have prepared and has not ends the test with a reason.
#![forbid(unsafe_code)]

mod device;
#[cfg(test)]
mod fetching;
mod guest;
mod initramfs;
pub mod pci;
mod qemu;
mod qmp;
mod qtest;
mod replaced;
mod serve;

pub use device::{TestDevice, registers};
pub use guest::{Counts, Guest, GuestJob, JobCounts, Request};
pub use limosa_testing::LIMIT;
pub use qemu::{Qemu, QemuBuilder, RAM_BYTES};
pub use qmp::Qmp;
pub use qtest::{Interrupt, Qtest};
pub use replaced::ReplacedHere;
pub use serve::{Served, ServedHere, limosa};
