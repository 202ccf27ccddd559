//! The engine's integration tests, one binary: a module for each subject.

mod acceptor;
mod common;
mod compression;
mod converging;
mod faults;
mod format;
mod hostile_destination;
mod lanes;
mod logs;
mod moves;
mod mtty;
mod panics;
mod peers;
mod places;
mod precopy;
mod predicted;
mod quirks;
mod resets;
mod snapshots;
mod sparse;
mod standstill;
mod synthetic;
mod tls;
mod toy_vmm;
mod traps;
mod vfio_user;
