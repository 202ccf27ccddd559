//! What becomes of QEMU when the server of one of its devices is killed. README.md says so; a QEMU that does better
//! fails these tests, so that it is said there.

use limosa_qemu_lab::pci::Function;
use limosa_qemu_lab::{GuestJob, Qemu, Served};
use serde_json::json;

/// QEMU's words when it ends so.
const ASSERTION: &str = "error_setv: Assertion";
const DOES_BETTER: &str = "this QEMU does better than README.md says: correct that, and this test";

/// No request is under way as the server dies: the device reads as one that is not there.
#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn qemu_runs_on_without_a_device_whose_server_was_killed_while_nobody_used_it() {
    let mut uart = Served::start("uart", &[]);
    let (mut qemu, mut qtest) = Qemu::builder().device(uart.socket()).qtest();
    let function = Function::new(&mut qtest, Qemu::slot(0));
    let port = function.place(&mut qtest, 0).ports();
    function.enable(&mut qtest);
    assert_eq!(qtest.port_read(port + 7, 1), 0, "the scratch register");
    uart.kill();
    qemu.transcript().line("failed to read header: EOF");
    for _ in 0..3 {
        assert_eq!(qtest.try_port_read(port + 7, 1), Some(0xff));
    }
    // It does not come back when the next server listens.
    uart.restart();
    assert_eq!(qtest.try_port_read(port + 7, 1), Some(0xff), "{DOES_BETTER}");
    let status = qemu.qmp().execute("query-status", json!({}));
    assert!(status["status"].is_string(), "{status}");
}

/// The driver in the guest waits for an answer as the server dies.
#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn qemu_ends_when_a_server_is_killed_as_its_guest_works_with_the_device() {
    let mut uart = Served::start("uart", &[]);
    let (qemu, mut guest) = Qemu::builder().device(uart.socket()).guest();
    guest.start(GuestJob::Serial);
    guest.advance(2);
    uart.kill();
    match guest.try_advance(2) {
        Ok(counts) => panic!("{DOES_BETTER}: {counts:?}"),
        Err(said) => assert!(said.contains(ASSERTION), "{DOES_BETTER}: {said}"),
    }
    assert!(qemu.ended_by_itself().code < 0);
}
