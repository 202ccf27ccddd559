//! Two machines, each with a kernel of its own, joined by two cables.

use limosa_lab::{Machine, kinds};

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn programs_run_on_both_machines_and_can_be_killed_there() {
    for machine in [Machine::here(), Machine::there()] {
        assert_eq!(machine.shell("echo out; echo err >&2"), "out");
        machine.run(&["/bin/sh", "-c", "echo no >&2; exit 3"]).fails(3, &["no"]);
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
        assert!(!std::path::Path::new(&folder).exists());
    }
    assert_eq!(there.shell("ls /sys/bus/mdev/devices"), "");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_cable_that_is_cut_and_joined_again_carries_on() {
    let (here, there) = (Machine::here(), Machine::there());
    let ping = ["busybox", "ping", "-c", "1", "-W", "1", &there.address.to_string()];
    here.run(&ping).ok();
    let cut = here.cut();
    assert_ne!(here.run(&ping).code, 0);
    there.run(&["busybox", "ping", "-c", "1", "-W", "1", &here.address.to_string()]).fails(1, &[]);
    drop(cut);
    here.run(&ping).ok();
}
