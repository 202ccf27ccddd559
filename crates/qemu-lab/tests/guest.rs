//! Linux in QEMU with served devices: its own driver for the serial port, and a program that checks every byte.

use limosa_models::synthetic::IDENTITY;
use limosa_qemu_lab::pci::Function;
use limosa_qemu_lab::{Counts, Guest, GuestJob, Qemu, Served, ServedHere, TestDevice};
use serde_json::json;

const JOBS: [GuestJob; 3] = [GuestJob::Serial, GuestJob::Dma, GuestJob::Messages];

struct Booted {
    uart: Served,
    synthetic: Served,
    test_device: ServedHere,
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
    Booted { uart, synthetic, test_device, qemu, guest }
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

/// QEMU 11.1.3 ends with an assertion of its own when a server goes whose device is in use. Whether it does or not, the other
/// servers are none the worse.
#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn when_one_server_dies_the_others_serve_on() {
    let Booted { mut uart, synthetic, test_device, mut qemu, mut guest } = boot();
    assert_all_right(&guest.advance(3));
    uart.kill();
    match guest.try_advance(2) {
        Ok(counts) => {
            assert!(counts.of(GuestJob::Serial).wrong > 0, "{counts:?}");
            for job in [GuestJob::Dma, GuestJob::Messages] {
                assert_eq!(counts.of(job).wrong, 0, "{job:?}: {counts:?}");
            }
            assert_eq!(qemu.qmp().execute("query-status", json!({}))["status"], "running");
        }
        Err(said) => assert!(said.contains("error_setv: Assertion"), "{said}"),
    }
    drop((qemu, guest));
    let next = Qemu::builder().device(synthetic.socket()).device(test_device.socket());
    let (_qemu, mut qtest) = next.qtest();
    for (slot, identity) in [(0, synthetic_identity()), (1, TestDevice::IDENTITY)] {
        let function = Function::new(&mut qtest, Qemu::slot(slot));
        assert_eq!(function.read(&mut qtest, 0, 4), identity);
        assert_ne!(function.place(&mut qtest, 0).memory(), 0);
    }
}

fn synthetic_identity() -> u32 {
    u32::from(IDENTITY.device) << 16 | u32::from(IDENTITY.vendor)
}
