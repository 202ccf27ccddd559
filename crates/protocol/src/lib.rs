//! The VFIO device migration protocol v2 as data: states and the arcs between them, the FEATURE multiplexer,
//! device, region and interrupt information with its capability chains, and dirty bitmaps.
//!
//! This crate is pure. It does no I/O, knows no clock, allocates only for dirty bitmaps and capability chains, and has
//! no unsafe code. The standard is `include/uapi/linux/vfio.h` of Linux; each module names the part that it follows.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bitmap;
pub mod capability;
pub mod errno;
pub mod feature;
pub mod fsm;
pub mod info;
pub mod logging;
pub mod payload;
pub mod range;
mod records;
pub mod state;

pub use errno::Errno;
pub use feature::{FeatureCall, FeatureHeader, FeatureIndex, FeatureOp};
pub use info::pci_index;
pub use payload::FeaturePayload;
pub use records::Records;
pub use state::{MigrationFlags, NotAState, NotMigrationFlags, State};
