//! Names of the kernel's devices on a machine that need not have any: which forms are known, and what is said of
//! devices that are not there. Devices that are there are in the lab's suite.

use crate::support::{Folder, JsonOutput, limosa, start};

const USAGE: i32 = 2;
const UNREACHABLE: i32 = 4;

/// Nothing of this name is on any machine.
const ABSENT: [&str; 5] = [
    "fffe:ff:1f.7",
    "00000000-0000-0000-0000-000000000000",
    "/dev/vfio/devices/vfio4294967295",
    "/dev/vfio/4294967295",
    "4294967295",
];

#[test]
fn kernel_devices_that_are_not_there_are_said_not_to_be_by_every_command() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    for absent in ABSENT {
        for command in [
            &["probe", absent][..],
            &["--door", "group", "probe", absent],
            &["--door", "cdev", "probe", absent],
            &["state", absent],
            &["state", absent, "set", "STOP", "--hold"],
            &["save", absent, "/nowhere"],
            &["load", "/nowhere", absent],
            &["migrate", absent, &device.socket],
            &["migrate", &device.socket, absent],
            &["bench", absent],
            &["send", absent, "--to", "unix:/nowhere"],
            &["receive", absent, "--listen", "unix:/nowhere/there"],
        ] {
            limosa(command).fails(UNREACHABLE, &[absent, "`limosa probe` lists the devices"]);
        }
    }
    assert_eq!(device.state(), limosa_protocol::State::Running);
}

#[test]
fn a_name_that_is_neither_a_socket_nor_the_kernels_is_told_where_the_forms_are() {
    let folder = Folder::new();
    let file = folder.text("file");
    std::fs::write(&file, "").unwrap();
    for name in ["vfio0", "/dev/vfio/vfio", "1:2:3.4", "0-0-0-0-0", "/proc/1/fd", file.as_str()] {
        limosa(&["probe", name]).fails(UNREACHABLE, &[name, "no", "socket", "`limosa probe --help`"]);
    }
    let help = limosa(&["probe", "--help"]).ok();
    for form in ["vfio-user socket", "PCI address", "UUID", "/dev/vfio/devices/vfioN", "/proc/PID/fd/N"] {
        assert!(help.contains(form), "{form}: {help}");
    }
}

#[test]
fn fds_that_are_no_devices_are_not_taken_for_some() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let own = format!("/proc/{}/fd", std::process::id());
    limosa(&["state", "/proc/self/fd/0"])
        .fails(UNREACHABLE, &["/proc/self/fd/0", "no VFIO device but /dev/null"]);
    limosa(&["probe", "/dev/fd/777"]).fails(UNREACHABLE, &["/dev/fd/777", "process self has no fd 777"]);
    limosa(&["probe", &format!("{own}/999999")])
        .fails(UNREACHABLE, &["has no fd 999999", "`limosa probe` lists"]);
    limosa(&["probe", "/proc/2147483647/fd/0"]).fails(UNREACHABLE, &["there is no process 2147483647"]);
    limosa(&["migrate", &device.socket, "/proc/self/fd/2"])
        .fails(UNREACHABLE, &["/proc/self/fd/2", "no VFIO device"]);
}

#[test]
fn one_device_under_two_names_is_one_device() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let link = folder.text("link");
    std::os::unix::fs::symlink(&device.socket, &link).unwrap();
    limosa(&["migrate", &device.socket, &link]).fails(USAGE, &[&link, "the same device"]);
    // Nor need a device be there.
    for (one, other) in [("ff:1f.7", "0000:FF:1f.7"), ("4294967295", "/dev/vfio/4294967295")] {
        limosa(&["migrate", one, other]).fails(USAGE, &[one, other, "the same device"]);
    }
}

#[test]
fn the_listing_says_why_it_is_empty() {
    let json = limosa(&["--json", "probe"]).json();
    let text = limosa(&["probe"]).ok();
    if json["devices"].as_array().unwrap().is_empty() {
        let why = json["none_because"].as_str().unwrap();
        assert!(text.contains(why) && why.contains("VFIO driver"), "{text}");
    } else {
        assert!(text.starts_with("DEVICE "), "{text}");
    }
    // Whatever this machine has, each device is something.
    let all = limosa(&["--json", "probe", "--all"]).json();
    let devices = all["devices"].as_array().unwrap();
    assert!(devices.len() >= json["devices"].as_array().unwrap().len());
    assert!(devices.iter().all(|device| device["device"].is_string() && device["is"].is_string()), "{all}");
    limosa(&["probe", "--all", "x"]).fails(USAGE, &["--all"]);
}

#[test]
fn every_command_that_takes_a_device_says_how_one_is_named() {
    for command in
        [&["--help"][..], &["probe", "--help"], &["state", "--help"], &["migrate", "--help"], &["load", "-h"]]
    {
        let help = limosa(command).ok();
        assert_eq!(help.matches("/proc/PID/fd/N           a device").count(), 1, "{help}");
        assert!(help.contains("--hold") && help.contains("--door"), "{help}");
    }
    for command in ["fsm", "inspect", "serve", "man"] {
        let help = limosa(&[command, "--help"]).ok();
        assert!(!help.contains("/proc/PID"), "{help}");
    }
}

#[test]
fn a_held_device_is_let_go_at_a_signal() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::TERM] {
        let holding = start(&["state", &device.socket, "set", "STOP", "--hold"]);
        holding.line("holding ");
        limosa(&["--timeout", "0.05", "check", &device.socket])
            .fails(UNREACHABLE, &["is another one connected?"]);
        limosa(&["state", &device.socket, "set", "RUNNING"]).fails(3, &["EBUSY"]);
        holding.signal(signal);
        assert!(holding.end().ok().starts_with("RUNNING > RUNNING_P2P > STOP\n"));
        limosa(&["state", &device.socket, "reset"]).ok();
    }
}

/// A process holds many things that are no devices: what each is, is said, and nothing of it is touched.
#[test]
fn a_descriptor_of_another_process_that_is_no_device_is_named() {
    if !crate::support::users::can_be_another("a_descriptor_of_another_process_that_is_no_device_is_named") {
        return;
    }
    // Its standard input is /dev/null, and its output a pipe.
    let child = crate::support::vcpus();
    let name = |fd: &str| format!("/proc/{}/fd/{fd}", child.pid());
    for (fd, what) in [("0", "it is no VFIO device but /dev/null"), ("1", "it is no VFIO device but pipe:[")]
    {
        for command in ["probe", "state", "check"] {
            limosa(&[command, &name(fd)]).fails(UNREACHABLE, &[&name(fd), what]);
        }
    }
    limosa(&["probe", &name("777")])
        .fails(UNREACHABLE, &[&name("777"), "has no fd 777", "`limosa probe` lists"]);
    let ended = name("1");
    child.kill();
    limosa(&["probe", &ended]).fails(UNREACHABLE, &[&ended, "there is no process"]);
}

#[test]
fn a_device_was_served_at_a_path_that_no_command_could_name() {
    use std::os::unix::ffi::OsStrExt;
    let folder = Folder::new();
    let socket = folder.path("").join(std::ffi::OsStr::from_bytes(b"\xff.sock"));
    let serve = |option: &str, other: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_limosa"));
        let socket = socket.as_os_str();
        let other = folder.path(other);
        command.args(["--json", "serve", "synthetic", "--socket"]);
        match option {
            "--socket" => command.arg(socket),
            _ => command.arg(other).arg(option).arg(socket),
        };
        crate::support::Running::start(&mut command).end()
    };
    for option in ["--socket", "--control"] {
        let failure = serve(option, "other").json_failure(2);
        assert!(failure["message"].as_str().unwrap().contains("not UTF-8"), "{failure}");
        assert!(!socket.exists() && !folder.path("other").exists());
    }
    // An error in the command line of another command names that command.
    let mut probe = std::process::Command::new(env!("CARGO_BIN_EXE_limosa"));
    probe.args(["--json", "--timeout", "1", "probe"]).arg(&socket);
    let failure = crate::support::Running::start(&mut probe).end().json_failure(2);
    assert_eq!(failure["command"], "probe", "{failure}");
}
