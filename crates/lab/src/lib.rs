//! What the suites of the lab share: devices of the kernel that is under test, and the command.
//!
//! The suites are `tests/*.rs`. They need a kernel with VFIO and its sample devices, so every test is
//! marked `#[ignore = "runs in the lab's kernel (lab/run)"]`; `lab/run` boots that kernel and runs them.
//! Tests of two machines drive both through agents, see [`Machine`].
//!
//! This crate fails loudly: whatever the lab should have prepared and has not ends the test with a reason.
#![forbid(unsafe_code)]

pub mod agent;
mod command;
mod frame;
mod kind;
mod machine;
mod mdev;
pub mod module;

pub use command::limosa;
pub use kind::{Kind, kinds};
pub use limosa_testing::Ended;
pub use machine::{Cut, Machine, Placed, Running};
pub use mdev::Mdev;
