//! Devices for the tests of several crates: one of plain memory ([`Memory`]), and one behind a server that is independent
//! of this project ([`ForeignServer`]).
//!
//! Integration tests use them. Unit tests of the crates that this one depends on cannot, since for them its
//! `SimpleModel` is that of another build of the crate.
#![forbid(unsafe_code)]

mod foreign;
mod memory;

pub use foreign::{ForeignDevice, ForeignServer, Seen, WRITTEN};
pub use memory::{Memory, Saved};
