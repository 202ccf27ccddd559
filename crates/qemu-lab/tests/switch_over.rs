//! Linux in QEMU, at work with devices whose server processes are replaced.

use limosa_qemu_lab::{GuestJob, Qemu, ReplacedHere, Served, TestDevice};
use serde_json::json;

const JOBS: [GuestJob; 3] = [GuestJob::Serial, GuestJob::Dma, GuestJob::Messages];
const SWITCH_OVERS: u64 = 20;

/// Linux' own driver for the serial port, and a program that checks each page that the synthetic device writes on its own,
/// each copy that the test device makes, and the messages of all its MSI-X vectors.
#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn a_guest_works_on_while_its_servers_are_replaced_twenty_times() {
    let mut servers =
        [Served::start("uart", &[]), Served::start("synthetic", &["state=4M", "dirty-rate=16M"])];
    let mut test_device = ReplacedHere::start(TestDevice::movable());
    let builder = servers.iter().fold(Qemu::builder(), |qemu, server| qemu.device(server.socket()));
    let (mut qemu, mut guest) = builder.device(test_device.socket()).guest();
    JOBS.into_iter().for_each(|job| guest.start(job));
    let first = guest.advance(1);
    for _ in 0..SWITCH_OVERS {
        servers.iter_mut().for_each(Served::replace);
        test_device.replace(TestDevice::movable());
    }
    // Rounds that began after the last one, and have ended.
    let last = guest.advance(2);
    for job in JOBS {
        let of = last.of(job);
        assert_eq!(of.wrong, 0, "{job:?}: {of:?}");
        assert!(of.rounds >= first.of(job).rounds + 2, "{job:?} goes on");
    }
    assert_eq!(last.complaints, Vec::<String>::new(), "the guest kernel's log");
    assert_eq!(qemu.qmp().execute("query-status", json!({}))["status"], "running");
}
