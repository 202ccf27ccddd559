//! Files of guest memory.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::fs::{MemfdFlags, memfd_create};

/// A memfd of this many bytes, all of them 0.
#[track_caller]
pub fn memfd(bytes: u64) -> File {
    memfd_named("guest", bytes)
}

/// The same, with this name in `/proc/PID/maps`.
#[track_caller]
pub fn memfd_named(name: &str, bytes: u64) -> File {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(bytes).expect("room in a memfd");
    file
}

/// The name by which other processes reach a file that this one has open.
pub fn proc_path(file: &impl AsRawFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}
