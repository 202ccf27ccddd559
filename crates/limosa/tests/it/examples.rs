//! The devices of `docs/device.md`, which others begin with, pass the suite.

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Instant;

use crate::support::{Folder, limosa};
use limosa_testing::{LIMIT, Process, built_example};

/// The example on a socket of this folder passes everything.
fn passes(folder: &Folder, example: &str, arguments: &[&str]) {
    let socket = folder.text(example);
    let mut command = Command::new(built_example("limosa-vfio-user", example));
    let server = Process::start(command.arg(&socket).args(arguments));
    let begun = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(begun.elapsed() < LIMIT, "{example} does not listen");
        std::thread::yield_now();
    }
    let report = limosa(&["check", &socket, "--destructive", "--limit", "120"]).ok();
    assert!(report.contains("left in RUNNING"), "{report}");
    server.kill();
}

#[test]
fn the_disk_of_the_documentation_refused_halves_of_its_registers() {
    let folder = Folder::new();
    let file = folder.text("file");
    std::fs::write(&file, vec![7; 1 << 16]).unwrap();
    passes(&folder, "disk", &[&file]);
}

#[test]
fn the_counter_of_the_documentation_passes_the_suite() {
    passes(&Folder::new(), "counter", &[]);
}

#[test]
fn the_device_with_pre_copy_of_the_documentation_passes_the_suite() {
    passes(&Folder::new(), "notepad", &[]);
}
