//! Every command on devices of the kernel's, through both doors, as processes of their own.

#[path = "command/support.rs"]
mod support;

use std::os::fd::{AsFd, AsRawFd};

use limosa_client::DeviceExt;
use limosa_lab::kinds;
use limosa_protocol::State;
use limosa_vfio_kernel::{Door, KernelDevice, Options};
use support::{DOORS, Here, Marked, REFUSED, USAGE, flags, full, is_ours, kind, mtty, path};

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn probe_says_what_a_device_is_by_every_name() {
    let here = Here::new();
    for kind in [mtty(), kind("mtty-2"), full(), kind("limosa-plain")] {
        let device = Marked::empty(&kind);
        for (name, door) in device.names().iter().zip(["cdev", "cdev", "cdev", "group", "group"]) {
            let text = here.ok(&["probe", name]);
            let group = format!("group {}", device.mdev.group());
            let migration = format!("{}, now in RUNNING", flags(&kind));
            let by = format!("open by its {door}");
            for part in [name, &kind.parent, &group, &device.cdev(), &migration, &by] {
                assert!(text.contains(part), "{part}: {text}");
            }
        }
        for door in DOORS {
            let json = here.ok(&["--json", "--door", door, "probe", device.uuid()]);
            let document: serde_json::Value = serde_json::from_str(&json).unwrap();
            assert_eq!(document["kernel"]["door"], door, "{json}");
            let expected: Vec<_> = flags(&kind).split('+').collect();
            assert_eq!(document["migration"]["flags"], serde_json::json!(expected), "{json}");
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn probe_says_who_tells_of_dirty_pages() {
    let here = Here::new();
    for (name, door, told) in [
        ("limosa-full", "cdev", "told by device"),
        ("limosa-full", "group", "told by device, container"),
        ("limosa-precopy", "group", "told by container"),
        ("limosa-precopy", "cdev", "nobody tells: neither the device nor its IOMMU"),
    ] {
        let device = kind(name).create();
        let text = here.ok(&["--door", door, "probe", device.uuid()]);
        assert!(text.contains(&format!("dirty pages  {told}")), "{name} {door}: {text}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn states_are_read_driven_and_reset_while_somebody_holds_the_device() {
    let here = Here::new();
    for (kind, door) in [(mtty(), "cdev"), (full(), "group")] {
        let device = Marked::new(&kind, 3);
        let (holding, held) = here.holds(&["--door", door, "state", device.uuid(), "--hold"]);
        let state = |args: &[&str]| here.ok(&[&["state", &held], args].concat());
        assert_eq!(state(&[]), "RUNNING\n");
        assert_eq!(state(&["set", "PRE_COPY"]), "RUNNING > PRE_COPY\n");
        assert_eq!(state(&["set", "STOP"]), "PRE_COPY > RUNNING > RUNNING_P2P > STOP\n");
        assert_eq!(state(&["set", "RESUMING"]), "STOP > RESUMING\n");
        // Nobody but the holder's processes can have the session: it is not said to be left.
        here.limosa(&["state", &held, "set", "STOP"])
            .fails(REFUSED, &["RESUMING -> STOP failed", "it stays as it was"]);
        assert_eq!(state(&["reset"]), "RUNNING\n");
        drop(holding.kill());
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_closing_leaves_is_what_the_manual_says() {
    let here = Here::new();
    for kind in [mtty(), full()] {
        let device = Marked::new(&kind, 5);
        let said = here.limosa(&["state", device.uuid(), "set", "STOP"]);
        assert!(
            said.err.contains("up to its driver") && said.err.contains("--hold keeps it open"),
            "{said:?}"
        );
        assert_eq!(
            said.ok(),
            if flags(&kind).contains("P2P") { "RUNNING > RUNNING_P2P > STOP\n" } else { "" }
        );
        // docs/kernel.md: mtty keeps state and contents, the lab's device its contents only.
        assert_eq!(device.state(), if is_ours(&kind) { State::Running } else { State::Stop });
        assert_eq!(device.mark(), 5);
        // Nothing was changed: nothing is said.
        for quiet in
            [&["state", device.uuid()][..], &["state", device.uuid(), "reset"], &["probe", device.uuid()]]
        {
            assert_eq!(here.limosa(quiet).err, "");
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_that_was_left_in_resuming_takes_nobody_down() {
    let here = Here::new();
    let device = Marked::new(&mtty(), 6);
    here.ok(&["state", device.uuid(), "set", "RESUMING"]);
    assert_eq!(device.state(), State::Resuming);
    // Left to itself, this kernel would look for the session's data, which are gone, and panic.
    let uuid = device.uuid();
    for command in [&["state", uuid, "set", "STOP"][..], &["state", uuid, "set", "RUNNING"]] {
        here.limosa(command)
            .fails(REFUSED, &[uuid, "in the middle of loading", &format!("limosa state {uuid} reset")]);
    }
    let file = path("file");
    here.limosa(&["save", uuid, &file]).fails(REFUSED, &[uuid, "RESUMING"]);
    here.limosa(&["migrate", Marked::new(&mtty(), 7).uuid(), uuid])
        .fails(REFUSED, &[uuid, "RESUMING", &format!("limosa state {uuid} reset")]);
    device.is_usable();
    assert_eq!(device.mark(), 6);
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn save_inspect_load_bring_back_the_state_that_was_saved() {
    let here = Here::new();
    for (kind, door) in kinds().into_iter().zip(DOORS.into_iter().cycle()) {
        let (one, other) = (Marked::new(&kind, 0x21), Marked::empty(&kind));
        let file = path("saved");
        let text = here.ok(&["--door", door, "save", one.uuid(), &file]);
        assert!(text.contains("stop-copy") && text.contains("downtime"), "{text}");
        assert!(here.ok(&["inspect", &file]).contains("whole: it can be loaded"));
        one.set_mark(0x22);
        here.ok(&["--door", door, "load", &file, one.uuid()]);
        here.ok(&["--json", "--door", door, "load", "--stop", &file, other.uuid()]);
        assert_eq!((one.mark(), other.mark()), (0x21, 0x21), "{kind:?}");
        assert_eq!((one.state(), one.state() == other.state()), (State::Running, is_ours(&kind)));
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn migrate_moves_a_device_from_any_door_to_any_door() {
    let here = Here::new();
    let pairs = [("cdev", "group"), ("group", "cdev"), ("cdev", "cdev"), ("group", "group")];
    for kind in kinds() {
        let (mut one, mut other) = (Marked::new(&kind, 0x31), Marked::empty(&kind));
        // There and back for each kind; all pairs for one of each driver.
        let pairs = if [mtty(), full()].contains(&kind) { &pairs[..] } else { &pairs[..2] };
        for (from, to) in pairs {
            let name = |device: &Marked, door: &str| {
                let [_, _, cdev, group, _] = device.names();
                if door == "cdev" { cdev } else { group }
            };
            let before = is_ours(&kind).then(|| one.mdev.get("limosa/check"));
            let json = here.ok(&["--json", "migrate", &name(&one, from), &name(&other, to)]);
            assert!(json.contains("\"outcome\": \"moved\"") && json.contains("\"downtime_ns\""), "{json}");
            assert_eq!(other.mark(), 0x31, "{kind:?} {from} {to}");
            assert_eq!(is_ours(&kind).then(|| other.mdev.get("limosa/check")), before);
            std::mem::swap(&mut one, &mut other);
            other.set_mark(0);
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn send_and_receive_say_the_same_as_of_a_vfio_user_device() {
    let here = Here::new();
    for (kind, door) in [(mtty(), "group"), (full(), "cdev")] {
        let (one, other) = (Marked::new(&kind, 0x41), Marked::empty(&kind));
        let link = format!("unix:{}", path("link"));
        let receiver = here.start(&["receive", other.uuid(), "--listen", &link, "--hold"]);
        receiver.line("listening on");
        let sent = here.ok(&["--door", door, "send", one.uuid(), "--to", &link]);
        for part in ["handshake", "pre-copy", "stop-copy", "commit", "downtime", one.uuid()] {
            assert!(sent.contains(part), "{part}: {sent}");
        }
        let held = receiver.line("holding ");
        let held = held.split_once(" as ").and_then(|(_, rest)| rest.split_once(" until")).unwrap().0;
        assert_eq!(here.ok(&["state", held]), "RUNNING\n");
        // What was received can be moved on from where it is held.
        let third = Marked::empty(&kind);
        here.ok(&["migrate", held, third.uuid()]);
        assert_eq!(third.mark(), 0x41);
        receiver.signal(rustix::process::Signal::TERM);
        let received = receiver.end().ok();
        assert!(received.contains("start") && received.contains("total"), "{received}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_a_vmm_has_open_is_moved_by_the_name_of_its_fd_and_stays_the_vmms() {
    let here = Here::new();
    for (kind, door) in [(mtty(), Door::Group), (full(), Door::Cdev)] {
        let (device, other) = (Marked::new(&kind, 0x71), Marked::empty(&kind));
        let vmm =
            KernelDevice::open(device.uuid(), &Options { door: Some(door), ..Options::default() }).unwrap();
        let name = format!("/proc/{}/fd/{}", std::process::id(), vmm.as_fd().as_raw_fd());
        assert!(here.ok(&["probe"]).contains(&format!("as {name}\n")));
        assert!(here.ok(&["probe", &name]).contains("held by another process"));
        let file = path("guest");
        here.ok(&["save", &name, &file]);
        assert_eq!(vmm.state().unwrap(), State::Running);
        let said = here.limosa(&["migrate", &name, other.uuid()]);
        assert!(
            said.err.contains(other.uuid()) && !said.err.contains(&name),
            "only the other is closed: {said:?}"
        );
        said.ok();
        assert_eq!((vmm.state().unwrap(), other.mark()), (State::Stop, 0x71));
        // Nor is anything said of a device that stays open.
        assert_eq!(here.limosa(&["load", "--stop", &file, &name]).err, "");
        assert_eq!(vmm.state().unwrap(), State::Stop);
        assert_eq!(here.ok(&["state", &name, "set", "RUNNING"]).trim().rsplit(' ').next(), Some("RUNNING"));
        assert_eq!((vmm.state().unwrap(), device.mark_of(&vmm)), (State::Running, 0x71));
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn one_device_under_two_names_is_refused() {
    let here = Here::new();
    let device = Marked::empty(&mtty());
    let names = device.names();
    for (at, one) in names.iter().enumerate() {
        for other in &names[at..] {
            here.limosa(&["migrate", one, other]).fails(USAGE, &[one, other, "the same device"]);
        }
    }
    let (holding, held) = here.holds(&["state", device.uuid(), "--hold"]);
    for name in &names {
        here.limosa(&["migrate", &held, name]).fails(USAGE, &[&held, name, "the same device"]);
    }
    drop(holding.kill());
    device.is_usable();
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn devices_of_different_kinds_are_refused_whatever_carries_them() {
    let here = Here::new();
    let (serial, two_ports, ours) =
        (Marked::new(&mtty(), 1), Marked::new(&kind("mtty-2"), 2), Marked::new(&full(), 3));
    let socket = path("synthetic");
    let server = here.start(&["serve", "synthetic", "--socket", &socket, "-o", "state=64K"]);
    server.line("listening on");
    let names = [serial.uuid(), two_ports.uuid(), ours.uuid(), &socket];
    for from in names {
        for to in names.iter().filter(|to| **to != from) {
            here.limosa(&["migrate", from, to])
                .fails(REFUSED, &[from, to, "cannot be moved", "as it was before"]);
        }
    }
    assert_eq!((serial.mark(), two_ports.mark(), ours.mark()), (1, 2, 3));
    assert_eq!([serial.state(), two_ports.state(), ours.state()], [State::Running; 3]);
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn bench_measures_beside_bare_calls_and_leaves_the_state() {
    let here = Here::new();
    for kind in [mtty(), full()] {
        let device = Marked::new(&kind, 0x51);
        let text = here.ok(&["bench", device.uuid(), "--seconds", "0.001"]);
        for part in [
            "region read, 8 B",
            "region write, 8 B",
            "arc STOP>STOP_COPY",
            "arc RESUMING>STOP",
            "stop-copy read by 1 MiB",
            "resuming write by 4 KiB",
            "dirty report of 64 GiB",
            "left in RUNNING",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!((device.state(), device.mark()), (State::Running, 0x51));
        let (holding, held) = here.holds(&["state", device.uuid(), "--hold"]);
        here.limosa(&["bench", &held]).fails(REFUSED, &[&held, "another process has it open", "resets it"]);
        drop(holding.kill());
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_doctor_looks_at_free_devices_and_at_those_that_are_held() {
    let here = Here::new();
    let device = Marked::new(&full(), 0x52);
    let look = |name: &str, more: &[&str]| {
        let ended = here.limosa(&[&["--json", "doctor", name], more].concat());
        let document: serde_json::Value = serde_json::from_str(&ended.out).unwrap();
        (document, ended.code)
    };
    let ids = |document: &serde_json::Value| -> Vec<String> {
        let findings = document["findings"].as_array().unwrap().iter();
        findings.map(|finding| finding["id"].as_str().unwrap().to_owned()).collect()
    };
    let (free, code) = look(device.uuid(), &["--measure"]);
    assert!(code == 0 || code == 9, "{free:#}");
    let facts = &free["devices"][0]["facts"];
    assert_eq!((&facts["driver"], &facts["dirty_pages_told_by"]), (&"limosa".into(), &"device".into()));
    assert!(free["devices"][0]["measured"]["stop_ns"].as_u64().unwrap() > 0, "{free:#}");
    let (holding, held) = here.holds(&["state", device.uuid(), "--hold"]);
    let (in_use, code) = look(device.uuid(), &[]);
    assert_eq!((code, ids(&in_use).contains(&"device-in-use".to_owned())), (10, true), "{in_use:#}");
    assert!(in_use["findings"][0]["remedy"].as_str().unwrap().contains(&held), "{in_use:#}");
    let (beside, _) = look(&held, &["--measure"]);
    assert!(ids(&beside).contains(&"not-measured".to_owned()), "{beside:#}");
    let (measured, _) = look(&held, &["--measure", "--in-use"]);
    assert!(measured["devices"][0]["measured"]["stop_ns"].as_u64().unwrap() > 0, "{measured:#}");
    holding.signal(rustix::process::Signal::INT);
    holding.end().ok();
    assert_eq!((device.state(), device.mark()), (State::Running, 0x52));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_serial_card_moves_from_the_kernel_to_a_process_and_back() {
    let here = Here::new();
    for door in DOORS {
        let (card, other) = (Marked::new(&mtty(), 0x61), Marked::empty(&mtty()));
        let socket = path("uart");
        let server = here.start(&["serve", "uart", "--socket", &socket, "-o", "as=mtty"]);
        server.line("listening on");
        here.ok(&["--door", door, "migrate", card.uuid(), &socket]);
        assert_eq!(here.ok(&["state", &socket]), "RUNNING\n");
        here.ok(&["--door", door, "migrate", &socket, other.uuid()]);
        assert_eq!((other.mark(), other.state()), (0x61, State::Running));
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_listing_names_every_device_and_what_it_can() {
    let here = Here::new();
    let devices: Vec<Marked> = kinds().iter().map(Marked::empty).collect();
    let none = kind("limosa-none").create();
    let (holding, held) = here.holds(&["state", devices[0].uuid(), "--hold"]);
    let text = here.ok(&["probe"]);
    let json = here.ok(&["--json", "probe"]);
    let row = |uuid: &str| {
        let mut lines = text.lines().skip_while(|line| !line.starts_with(uuid));
        (lines.next().unwrap_or_else(|| panic!("no {uuid}: {text}")), lines.next().unwrap_or_default())
    };
    for device in &devices[1..] {
        let (line, _) = row(device.uuid());
        let cdev = device.cdev().rsplit('/').next().unwrap().to_owned();
        for part in [&device.kind.name, &device.kind.parent, &cdev, flags(&device.kind)] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert!(json.contains(&format!("\"device\": \"{}\"", device.uuid())), "{json}");
    }
    let (line, by) = row(devices[0].uuid());
    assert!(line.ends_with("in use") && by.contains(&format!("as {held}")), "{line} {by}");
    assert!(json.contains(&format!("\"name\": \"{held}\"")), "{json}");
    let (line, _) = row(none.uuid());
    assert!(line.contains("no migration"), "{line}");
    assert!(json.contains("\"is\": \"in_use\"") && json.contains("\"is\": \"not_movable\""), "{json}");
    drop(holding.kill());
}
