//! `limosa trace` between QEMU and a served device, and of QEMU itself.

use std::fs;
use std::process::Command;

use limosa_qemu_lab::pci::Function;
use limosa_qemu_lab::{Qemu, Qtest, Served};
use limosa_testing::{Process, beside_the_test};
use rustix::process::Signal;

/// What QEMU says of itself when it connects, and one register that is written and read.
const PARTS: [&str; 7] = [
    " VERSION 0.",
    " DEVICE_GET_INFO -> PCI RESET ",
    " DEVICE_GET_REGION_INFO region 7 -> read+write ",
    " DMA_MAP 0x0+",
    " REGION_WRITE region 0 0x7+0x1 0x5a -> ok <",
    " REGION_READ region 0 0x7+0x1 -> 0x5a <",
    " DEVICE_SET_IRQS index ",
];

/// The guest writes the scratch register of a serial port, and reads it.
fn use_port(qtest: &mut Qtest) {
    let function = Function::new(qtest, Qemu::slot(0));
    let ports = function.place(qtest, 0).ports();
    function.enable(qtest);
    qtest.port_write(ports + 7, 1, 0x5a);
    assert_eq!(qtest.port_read(ports + 7, 1), 0x5a);
}

#[track_caller]
fn shows(said: &str) {
    for part in PARTS {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("MALFORMED") && !said.contains("malformed"), "{said}");
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn qemu_uses_a_device_through_the_proxy() {
    let served = Served::start("uart", &[]);
    let folder = tempfile::tempdir().unwrap();
    let front = folder.path().join("front");
    let mut command = Command::new(beside_the_test("limosa"));
    command.args(["trace", "--proxy"]).args([&front, &served.socket()]);
    let proxy = Process::start(&mut command);
    proxy.line("listening on");
    let (qemu, mut qtest) = Qemu::builder().device(&front).qtest();
    use_port(&mut qtest);
    assert_eq!(qemu.quit(), 0);
    proxy.signal(Signal::INT);
    let said = proxy.end().ok();
    shows(&said);
    assert!(said.contains("memfd:"), "the fd of the guest's memory: {said}");
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn qemu_is_traced_from_its_start_to_its_end() {
    let served = Served::start("uart", &[]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace");
    let (qemu, mut qtest) = Qemu::builder().device(served.socket()).traced(&file).qtest();
    use_port(&mut qtest);
    assert_eq!(qemu.quit(), 0);
    let said = fs::read_to_string(&file).unwrap();
    shows(&said);
    assert!(said.contains(" device.sock VERSION "), "by the socket's name: {said}");
}
