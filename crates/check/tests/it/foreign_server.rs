//! The server of the crate `vfio_user`, written by others: it has no migration, and what it has passes.

use limosa_check::{Options, Target, Transport, run};
use limosa_test_device::{ForeignDevice, ForeignServer};
use limosa_vfio_user::client::{self, Client};

#[test]
fn the_suite_judges_a_server_without_migration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    let device = ForeignDevice { memory_bytes: 4096, vectors: 1, ..ForeignDevice::default() };
    let server = ForeignServer::start(&path, device);

    let target = Target::new("vfio_user", Transport::VfioUser, move || {
        Ok(Box::new(Client::connect(&path, client::Options::default())?))
    });
    let report = run(&target, &Options { destructive: true, ..Options::default() }, |_| {}).unwrap();
    drop(target);
    server.ended();
    let failed: Vec<_> = report.failed().map(|check| &*check.id).collect();
    println!("{failed:?} {:?}", report.counts());
    // It hands vectors on to its backend as they are, and does not know how many there are.
    assert_eq!(failed, ["device.irq-vectors-beyond"], "{report:#?}");
    assert!(report.counts().pass >= 10 && report.ended_early.is_none(), "{:?}", report.counts());
    assert_eq!(report.left_in, "it has no migration state");

    let mut text = Vec::new();
    report.markdown(&mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/conformance/vfio-user-crate.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    assert!(std::fs::read_to_string(path).unwrap() == text, "UPDATE_DOCS=1 writes {path} anew:\n{text}");
}
