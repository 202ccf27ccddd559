//! Linux in QEMU with served devices: its own driver for the serial port, and a program that checks every byte.

use limosa_qemu_lab::{Counts, Guest, GuestJob, Qemu, Served, ServedHere, TestDevice};
use serde_json::json;

const JOBS: [GuestJob; 3] = [GuestJob::Serial, GuestJob::Dma, GuestJob::Messages];

struct Booted {
    uart: Served,
    _synthetic: Served,
    _test_device: ServedHere,
    qemu: Qemu,
    guest: Guest,
}

fn boot() -> Booted {
    let uart = Served::start("uart", &[]);
    let synthetic = Served::start("synthetic", &["state=1M"]);
    let test_device = ServedHere::start(TestDevice::machine());
    let (qemu, mut guest) =
        Qemu::builder().device(uart.socket()).device(synthetic.socket()).device(test_device.socket()).guest();
    JOBS.into_iter().for_each(|job| guest.start(job));
    Booted { uart, _synthetic: synthetic, _test_device: test_device, qemu, guest }
}

#[track_caller]
fn assert_all_right(counts: &Counts) {
    assert_eq!(counts.complaints, Vec::<String>::new(), "the kernel's log");
    for job in JOBS {
        let of = counts.of(job);
        assert_eq!(of.wrong, 0, "{job:?}: {of:?}");
        assert!(of.rounds > 0, "{job:?} did nothing");
    }
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn a_guest_works_with_three_devices_at_once() {
    let mut booted = boot();
    let first = booted.guest.advance(10);
    assert_all_right(&first);
    let second = booted.guest.advance(10);
    assert_all_right(&second);
    for job in JOBS {
        assert!(second.of(job).rounds >= first.of(job).rounds + 10, "{job:?} goes on");
    }
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn a_guest_whose_serial_port_has_lost_its_server_is_told_and_works_on() {
    let mut booted = boot();
    assert_all_right(&booted.guest.advance(3));
    booted.uart.kill();
    let counts = booted.guest.advance(2);
    assert!(counts.of(GuestJob::Serial).wrong > 0, "{counts:?}");
    for job in [GuestJob::Dma, GuestJob::Messages] {
        assert_eq!(counts.of(job).wrong, 0, "{job:?}: {counts:?}");
    }
    let status = booted.qemu.qmp().execute("query-status", json!({}));
    assert_eq!(status["status"], "running");
}
