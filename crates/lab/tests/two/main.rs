//! Two machines, each with a kernel of its own, joined by two cables: devices move between them as between
//! processes, and what goes wrong on either side or in between leaves one that runs.

mod cables;
mod faults;
mod moves;
mod scene;

use std::path::Path;

use limosa_lab::{Machine, kinds};

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn programs_run_on_both_machines_and_can_be_killed_there() {
    for machine in [Machine::here(), Machine::there()] {
        assert_eq!(machine.shell("echo out; echo err >&2"), "out");
        let ended = machine.run(&["/bin/sh", "-c", "echo no >&2; exit 3"]);
        assert_eq!((ended.code, ended.err.as_str()), (3, "no\n"));
        let running = machine.start(&["/bin/sh", "-c", "echo begun; while :; do :; done"]);
        running.line("begun");
        assert_eq!(running.kill().code, -9);
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_of_the_other_machine_is_not_on_this_one() {
    let there = Machine::there();
    for kind in kinds() {
        let device = there.mdev(&kind);
        let folder = format!("/sys/bus/mdev/devices/{}", device.uuid());
        assert_eq!(there.shell(&format!("ls -d {folder}")), folder);
        assert!(!Path::new(&folder).exists());
    }
    assert_eq!(there.shell("ls /sys/bus/mdev/devices"), "");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_cable_that_is_cut_and_joined_again_carries_on() {
    let (here, there) = (Machine::here(), Machine::there());
    let ping = |from: &Machine, to: &Machine| {
        from.run(&["busybox", "ping", "-c", "1", "-W", "1", &to.address.to_string()]).code
    };
    assert_eq!(ping(&here, &there), 0);
    let cut = here.cut();
    assert_ne!(ping(&here, &there), 0);
    assert_ne!(ping(&there, &here), 0);
    drop(cut);
    assert_eq!(ping(&here, &there), 0);
}
