//! `limosa doctor` on devices of every condition: good ones, used ones, broken ones, and what is none.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use crate::support::{Folder, limosa, start};
use limosa_client::DeviceExt;
use limosa_protocol::State;
use rustix::process::Signal;
use serde_json::Value;

const NOT_READY: i32 = 10;

/// Runs the doctor; its document and its exit code.
#[track_caller]
fn doctor(args: &[&str]) -> (Value, i32) {
    let ended = limosa(&[&["--json", "doctor"], args].concat());
    let document = serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    (document, ended.code)
}

/// The finding with this id.
fn finding<'a>(document: &'a Value, id: &str) -> Option<&'a Value> {
    document["findings"].as_array().unwrap().iter().find(|finding| finding["id"] == id)
}

#[track_caller]
fn has(document: &Value, ids: &[&str]) {
    for id in ids {
        assert!(finding(document, id).is_some(), "no {id}: {document:#}");
    }
}

/// The ids of findings about a device.
fn about<'a>(document: &'a Value, subject: &str) -> Vec<&'a str> {
    let findings = document["findings"].as_array().unwrap().iter();
    findings.filter(|one| one["subject"] == subject).map(|one| one["id"].as_str().unwrap()).collect()
}

#[test]
fn a_machine_is_described_and_its_code_is_its_verdict() {
    let (document, code) = doctor(&[]);
    let expected = match document["verdict"].as_str().unwrap() {
        "ready" => 0,
        "warnings" => 9,
        verdict => panic!("{verdict}: nothing of a machine stands in the way of served devices"),
    };
    assert_eq!(code, expected);
    for fact in
        ["kernel", "open_files", "mappings", "clock_source", "wall_clock", "ptrace_scope", "IOMMU_groups"]
    {
        assert!(document["machine"][fact].is_string(), "{fact}: {document:#}");
    }
    let text = limosa(&["doctor"]).out;
    assert!(text.starts_with("machine\n") && text.contains("docs/doctor.md"), "{text}");
}

/// It was a device that could not be opened, with a verdict.
#[test]
fn an_empty_name_was_looked_at() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    for names in [&[""][..], &[&*device.socket, ""]] {
        limosa(&[&["doctor"], names].concat()).fails(2, &["DEVICE", "expected a device"]);
    }
    for command in ["probe", "state", "check", "bench"] {
        limosa(&[command, ""]).fails(2, &["DEVICE", "expected a device"]);
    }
    limosa(&["migrate", &device.socket, ""]).fails(2, &["DST", "expected a device"]);
}

#[test]
fn another_root_is_another_machine() {
    let folder = Folder::new();
    limosa(&["doctor", "--root", &folder.text("none")]).fails(4, &["--root", "folder proc", "No such file"]);
    // That of a disk's image was ready, with warnings.
    std::fs::create_dir(folder.path("proc")).unwrap();
    limosa(&["doctor", "--root", &folder.text("")]).fails(2, &["--root", "proc is empty"]);
    std::fs::create_dir_all(folder.path("proc/sys/kernel")).unwrap();
    std::fs::write(folder.path("proc/sys/kernel/osrelease"), "5.4.0\n").unwrap();
    let (document, code) = doctor(&["--root", &folder.text("")]);
    assert_eq!((code, &document["machine"]["kernel"]), (9, &"5.4.0".into()));
    has(&document, &["kernel-old", "vfio-not-loaded", "iommu-off", "pidfd-getfd-missing"]);
    assert!(document["findings"].as_array().unwrap().iter().all(|finding| finding["level"] != "blocker"));
}

#[test]
fn a_device_that_can_move_is_told_with_an_estimate_and_nothing_is_done_to_it() {
    let folder = Folder::new();
    let device = folder.device("device", &["state=2M"]);
    device.mark(7);
    let (document, code) = doctor(&[&device.socket, "--bandwidth", "8Mbit", "--bandwidth", "1G"]);
    assert!(code == 0 || code == 9, "{document:#}");
    assert_eq!(about(&document, &device.socket), [] as [&str; 0], "{document:#}");
    let facts = &document["devices"][0]["facts"];
    assert_eq!((&facts["state"], &facts["migration"]), (&"RUNNING".into(), &"STOP_COPY+P2P+PRE_COPY".into()));
    assert!(
        facts["server"].as_str().unwrap().contains("process")
            && facts["role"].as_str().unwrap().contains("vmm")
    );
    assert!(facts["vfio_user"].as_str().unwrap().contains("version 0."), "{facts}");
    assert!(facts["dirty_log"].as_str().unwrap().contains("4.00 KiB"), "{facts}");
    let estimates = document["estimates"].as_array().unwrap();
    assert_eq!((estimates.len(), &estimates[0]["at_most"]), (2, &true.into()));
    assert!(estimates[0]["downtime_ns"].as_u64() > estimates[1]["downtime_ns"].as_u64());
    assert!(estimates[0]["state_bytes"].as_u64().unwrap() > 2 << 20);
    assert!(document["devices"][0]["measured"].is_null());
    assert!(device.runs(7));
}

#[test]
fn arcs_are_measured_only_when_asked_for_and_the_device_runs_again() {
    let folder = Folder::new();
    for options in [&["state=2M"][..], &["pre-copy=off", "p2p=off"]] {
        let device = folder.device("device", options);
        device.mark(8);
        let ended = limosa(&["doctor", &device.socket, "--measure"]);
        assert!(
            ended.out.contains("it is stopped for a moment") && ended.out.contains(">STOP_COPY"),
            "{ended:?}"
        );
        let (document, _) = doctor(&[&device.socket, "--measure"]);
        let measured = &document["devices"][0]["measured"];
        assert!(measured["stop_ns"].as_u64().unwrap() > 0 && measured["to_the_end"] == true, "{document:#}");
        let all = measured["precopy_bytes"].as_u64().unwrap() + measured["stop_bytes"].as_u64().unwrap();
        assert!(all > 1 << 20, "{document:#}");
        assert_eq!(document["estimates"][0]["at_most"], false);
        assert!(device.runs(8));
    }
}

#[test]
fn a_device_that_a_vmm_uses_is_looked_at_and_not_stopped_unless_that_is_said() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    device.mark(9);
    let vmm = device.client();
    let (document, _) = doctor(&[&device.socket]);
    assert_eq!(about(&document, &device.socket), ["beside-vmm"], "{document:#}");
    let (document, code) = doctor(&[&device.socket, "--measure"]);
    assert_eq!(code, 9);
    assert!(finding(&document, "not-measured").unwrap()["what"].as_str().unwrap().contains("--in-use"));
    assert!(document["devices"][0]["measured"].is_null());
    let (document, _) = doctor(&[&device.socket, "--measure", "--in-use"]);
    assert!(document["devices"][0]["measured"]["stop_ns"].as_u64().unwrap() > 0, "{document:#}");
    assert_eq!(vmm.state().unwrap(), State::Running);
    drop(vmm);
    assert!(device.runs(9));
}

#[test]
fn states_in_which_nothing_can_be_moved_are_told_with_their_way_out() {
    let folder = Folder::new();
    let device = folder.device("device", &["fault=error:RUNNING_P2P>STOP"]);
    for (state, id, code) in [
        (State::PreCopy, "device-midway", NOT_READY),
        (State::Resuming, "device-midway", NOT_READY),
        (State::RunningP2p, "device-midway", NOT_READY),
    ] {
        let other = folder.device("other", &[]);
        other.client().set_state(state).unwrap();
        let (document, ended) = doctor(&[&other.socket, "--measure"]);
        has(&document, &[id, "not-measured"]);
        assert_eq!((ended, other.state()), (code, state));
    }
    limosa(&["state", &device.socket, "set", "STOP"]);
    assert_eq!(device.state(), State::Error);
    let (document, code) = doctor(&[&device.socket]);
    has(&document, &["device-in-error"]);
    assert_eq!((code, device.state()), (NOT_READY, State::Error));
    let standing = folder.device("standing", &[]);
    standing.client().set_state(State::Stop).unwrap();
    let (document, code) = doctor(&[&standing.socket]);
    has(&document, &["device-stands"]);
    assert_eq!((code, standing.state()), (9, State::Stop));
}

#[test]
fn a_measurement_that_fails_says_in_which_state_the_device_is() {
    let folder = Folder::new();
    let refuses = folder.device("refuses", &["fault=fail:PRE_COPY_P2P>STOP_COPY"]);
    let (document, code) = doctor(&[&refuses.socket, "--measure"]);
    has(&document, &["not-measured"]);
    assert!(finding(&document, "device-not-restored").is_none(), "{document:#}");
    assert_eq!((code, refuses.state()), (9, State::Running));
    let breaks = folder.device("breaks", &["fault=error:PRE_COPY_P2P>STOP_COPY"]);
    let (document, code) = doctor(&[&breaks.socket, "--measure"]);
    has(&document, &["not-measured", "device-not-restored"]);
    assert_eq!((code, breaks.state()), (NOT_READY, State::Error));
    let hangs = folder.device("hangs", &["fault=stall:RUNNING>PRE_COPY:600000"]);
    let (document, code) = doctor(&["--timeout", "3", "--state-timeout", "0.05", &hangs.socket, "--measure"]);
    has(&document, &["not-measured", "device-not-restored"]);
    assert_eq!(code, NOT_READY);
    hangs.kill_now();
}

#[test]
fn what_is_no_device_is_a_finding() {
    let folder = Folder::new();
    let (document, code) = doctor(&[&folder.text("nothing")]);
    has(&document, &["device-not-there"]);
    assert_eq!(code, NOT_READY);
    std::fs::write(folder.path("file"), "").unwrap();
    has(&doctor(&[&folder.text("file")]).0, &["device-not-there"]);
    drop(UnixListener::bind(folder.path("stale")).unwrap());
    has(&doctor(&[&folder.text("stale")]).0, &["device-not-there"]);
    has(&doctor(&["0000:ff:1f.7"]).0, &["device-not-there"]);

    // It answers, and not as a vfio-user server.
    let web = UnixListener::bind(folder.path("web")).unwrap();
    let answers = std::thread::spawn(move || {
        let (mut stream, _) = web.accept().unwrap();
        let mut request = [0; 16];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let (document, code) = doctor(&[&folder.text("web")]);
    has(&document, &["device-not-vfio-user"]);
    assert_eq!(code, NOT_READY);
    answers.join().unwrap();

    // It dies in the middle.
    let dies = UnixListener::bind(folder.path("dies")).unwrap();
    let ends = std::thread::spawn(move || drop(dies.accept().unwrap()));
    has(&doctor(&[&folder.text("dies")]).0, &["device-gone"]);
    ends.join().unwrap();

    // It accepts, and says nothing.
    let _silent = UnixListener::bind(folder.path("silent")).unwrap();
    let (document, _) = doctor(&["--timeout", "0.05", &folder.text("silent")]);
    has(&document, &["device-silent"]);
}

#[test]
fn two_devices_are_compared_by_the_facts_that_a_move_compares() {
    let folder = Folder::new();
    let (one, same) = (folder.device("one", &["state=2M"]), folder.device("same", &["state=2M"]));
    let (document, _) = doctor(&[&one.socket, &same.socket]);
    assert!(document["findings"].as_array().unwrap().iter().all(|finding| finding["level"] != "blocker"));
    let larger = folder.device("larger", &["state=4M", "pre-copy=off"]);
    let (document, code) = doctor(&[&one.socket, &larger.socket]);
    has(&document, &["pair-differs", "pair-flags", "no-pre-copy"]);
    assert!(finding(&document, "pair-differs").unwrap()["what"].as_str().unwrap().contains("region sizes"));
    assert_eq!(code, NOT_READY);
    // It is what the move says.
    limosa(&["migrate", &one.socket, &larger.socket]).fails(3, &["region sizes"]);
    let (document, _) = doctor(&[&one.socket, &one.socket]);
    has(&document, &["pair-same-device"]);
    let vmm = same.client();
    let (document, code) = doctor(&[&one.socket, &same.socket]);
    has(&document, &["pair-destination-used"]);
    assert_eq!(code, 9);
    drop(vmm);
    assert_eq!((one.state(), same.state()), (State::Running, State::Running));
}

#[test]
fn a_measurement_that_is_interrupted_lets_the_device_go() {
    let folder = Folder::new();
    let device = folder.device("device", &["state=64M", "dirty-rate=1G"]);
    device.mark(5);
    let running = start(&["doctor", &device.socket, "--measure"]);
    running.line("it is stopped for a moment");
    running.signal(Signal::INT);
    let ended = running.end();
    // It may have been done just before.
    assert!([0, 7, 9].contains(&ended.code), "{ended:?}");
    assert!(device.runs(5));
}

/// SIGHUP ended the measurement, and the device stood still.
#[test]
fn a_measurement_whose_terminal_was_closed_left_the_device_stopped() {
    let folder = Folder::new();
    let device = folder.device("device", &["state=64M", "dirty-rate=1G"]);
    device.mark(6);
    let running = start(&["doctor", &device.socket, "--measure"]);
    running.line("it is stopped for a moment");
    running.signal(Signal::HUP);
    let ended = running.end();
    // It may have been done just before.
    assert!([0, 7, 9].contains(&ended.code), "{ended:?}");
    assert!(device.runs(6));
}

#[test]
fn a_measurement_that_was_called_off_said_that_a_silent_device_was_let_go() {
    let folder = Folder::new();
    let device = folder.device("device", &["fault=stall:RUNNING>PRE_COPY:600000"]);
    let limits = ["--timeout", "3", "--state-timeout", "1"];
    let running = start(&[&["doctor", &device.socket, "--measure"][..], &limits].concat());
    running.line("it is stopped for a moment");
    running.signal(Signal::INT);
    running.end().fails(10, &["not ready"]);
    device.kill_now();
}

#[test]
fn the_list_of_findings_is_printed() {
    let page = limosa(&["doctor", "--findings"]).ok();
    assert!(page.starts_with("# The doctor") && page.contains("### iommu-off"), "{page}");
    limosa(&["doctor", "--in-use"]).fails(2, &["--measure"]);
    limosa(&["doctor", "--measure"]).fails(2, &["DEVICE"]);
    limosa(&["doctor", "x", "--bandwidth", "fast"]).fails(2, &["10Gbit"]);
}
