//! What cannot be done with a device of the kernel's: what is said, with which exit code, and the device is as it was.

#[path = "command/support.rs"]
mod support;

use limosa_lab::Running;
use limosa_protocol::State;
use rustix::process::Signal;
use support::{DOORS, FAILED, Here, Marked, REFUSED, UNREACHABLE, USAGE, full, kind, mtty, path};

/// Every command on a device, none of which comes to do anything.
fn commands(device: &str) -> [Vec<String>; 7] {
    let [file, link] = [path("file"), format!("unix:{}", path("link"))];
    let text = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect();
    [
        text(&["probe", device]),
        text(&["state", device, "set", "STOP"]),
        text(&["save", device, &file]),
        text(&["load", &file, device]),
        text(&["send", device, "--to", &link]),
        text(&["receive", device, "--listen", &link]),
        text(&["bench", device]),
    ]
}

#[track_caller]
fn all_fail(here: &Here, device: &str, code: i32, parts: &[&str]) {
    for command in commands(device) {
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        here.limosa(&command).fails(code, &[&[device], parts].concat());
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_that_is_open_elsewhere_is_said_to_be_and_by_whom() {
    let here = Here::new();
    for held_by in DOORS {
        let device = Marked::new(&full(), 9);
        let (holding, held) =
            here.holds(&["--door", held_by, "state", device.uuid(), "set", "STOP", "--hold"]);
        for door in DOORS {
            here.limosa(&["--door", door, "probe", device.uuid()])
                .fails(UNREACHABLE, &[device.uuid(), "is held by limosa", &held, "another process"]);
        }
        all_fail(&here, &device.cdev(), UNREACHABLE, &[&held]);
        assert_eq!(here.ok(&["state", &held]), "STOP\n");
        // Nobody who may not look is told who.
        let as_nobody = ["/usr/bin/setpriv", "--reuid", "65534", "--clear-groups"];
        let said = here.start_as(&as_nobody, &["probe", &held]).end();
        said.fails(UNREACHABLE, &[&held, "no permission to borrow", "run as root"]);
        holding.signal(Signal::INT);
        holding.end().ok();
        assert_eq!(device.mark(), 9);
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_group_that_somebody_holds_is_said_to_be_held() {
    let here = Here::new();
    let device = Marked::new(&mtty(), 19);
    let [uuid, .., node, number] = device.names();
    let group = std::fs::OpenOptions::new().read(true).write(true).open(&node).unwrap();
    let by = format!("(process {})", std::process::id());
    for door in DOORS {
        let said = here.limosa(&["--door", door, "state", &uuid, "set", "STOP"]);
        said.fails(UNREACHABLE, &[&uuid, "is held by command", &by, "EBUSY"]);
    }
    here.limosa(&["probe", &number]).fails(UNREACHABLE, &[&number, &by]);
    assert!(here.ok(&["probe"]).contains(&format!("{by}\n")));
    drop(group);
    assert_eq!((device.state(), device.mark()), (State::Running, 19));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_user_without_permission_is_told_whose_the_device_is() {
    let here = Here::new();
    let device = Marked::new(&mtty(), 10);
    let as_nobody = ["/usr/bin/setpriv", "--reuid", "65534", "--clear-groups"];
    for door in DOORS {
        let said = here.start_as(&as_nobody, &["--door", door, "state", device.uuid(), "set", "STOP"]).end();
        said.fails(UNREACHABLE, &[device.uuid(), "EACCES", "chown USER /dev/vfio/"]);
    }
    let listing = here.start_as(&as_nobody, &["probe"]).end().ok();
    assert!(listing.contains("not usable") && listing.contains("no permission to open"), "{listing}");
    assert_eq!((device.state(), device.mark()), (State::Running, 10));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_without_a_vfio_driver_is_said_to_have_none() {
    let here = Here::new();
    let device = Marked::new(&mtty(), 0);
    let node = device.cdev();
    std::fs::write("/sys/bus/mdev/drivers/mtty/unbind", device.uuid()).unwrap();
    all_fail(&here, device.uuid(), UNREACHABLE, &["bound to no driver", "bind it to a VFIO driver"]);
    here.limosa(&["probe", &node]).fails(UNREACHABLE, &[&node, "ENOENT", "`limosa probe` lists"]);
    let listing = here.ok(&["probe"]);
    let line = listing.lines().find(|line| line.starts_with(device.uuid())).unwrap();
    assert!(line.ends_with("not usable") && listing.contains("bound to no driver"), "{listing}");
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_without_migration_is_refused_and_not_touched() {
    let here = Here::new();
    let (device, other) = (Marked::new(&kind("limosa-none"), 11), Marked::new(&full(), 12));
    let uuid = device.uuid();
    let [file, link] = [path("file"), format!("unix:{}", path("link"))];
    here.limosa(&["state", uuid])
        .fails(REFUSED, &[uuid, "no migration states", "does not support migration"]);
    here.limosa(&["state", uuid, "set", "STOP"]).fails(REFUSED, &[uuid, "no migration states"]);
    here.limosa(&["save", uuid, &file]).fails(REFUSED, &[uuid, "it has no migration"]);
    here.limosa(&["migrate", uuid, other.uuid()]).fails(REFUSED, &[uuid, "it has no migration"]);
    here.limosa(&["migrate", other.uuid(), uuid]).fails(REFUSED, &[uuid, "it has no migration"]);
    here.ok(&["save", other.uuid(), &file]);
    here.limosa(&["load", &file, uuid]).fails(REFUSED, &[uuid, "it has no migration"]);
    let receiver = here.start(&["receive", uuid, "--listen", &link]);
    receiver.line("listening on");
    here.limosa(&["send", other.uuid(), "--to", &link]).fails(REFUSED, &[uuid, "as it was before"]);
    receiver.end().fails(REFUSED, &[uuid, "was not loaded"]);
    let text = here.ok(&["probe", uuid]);
    assert!(text.contains("migration    no: it has no feature MIGRATION"), "{text}");
    assert_eq!((device.mark(), other.mark(), other.state()), (11, 12, State::Running));
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_door_that_does_not_fit_the_name_is_refused() {
    let here = Here::new();
    let device = Marked::empty(&mtty());
    let [_, _, cdev, group, _] = device.names();
    here.limosa(&["probe", "--door", "rear", &cdev]).fails(USAGE, &["rear", "cdev", "group"]);
    // A node names a device; the door is a choice of its own.
    assert!(here.ok(&["--door", "group", "probe", &cdev]).contains("open by its group"));
    assert!(here.ok(&["--door", "cdev", "probe", &group]).contains("open by its cdev"));
}

/// A command that the device holds up at a point.
fn held_up(here: &Here, device: &Marked, at: &str, args: &[&str]) -> Running {
    device.mdev.set("limosa/hold", at);
    let running = here.start(args);
    assert_eq!(device.mdev.get("limosa/await"), at);
    running
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_source_that_is_pulled_out_in_the_middle_ends_the_move() {
    let here = Here::new();
    for at in ["RUNNING>PRE_COPY", "read@65536", "PRE_COPY_P2P>STOP_COPY"] {
        let (source, destination) = (Marked::new(&full(), 13), Marked::new(&full(), 14));
        let sender = held_up(&here, &source, at, &["migrate", source.uuid(), destination.uuid()]);
        source.mdev.set("limosa/gone", 1);
        sender.end().fails(UNREACHABLE, &[source.uuid(), "the device is gone"]);
        source.mdev.set("limosa/gone", 0);
        source.mdev.set("limosa/hold", "none");
        assert_eq!((source.state(), destination.state()), (State::Running, State::Running), "{at}");
        destination.is_usable();
        source.is_usable();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_destination_that_is_pulled_out_in_the_middle_leaves_the_source_running() {
    let here = Here::new();
    for at in ["STOP>RESUMING", "write@65536", "RESUMING>STOP"] {
        let (source, destination) = (Marked::new(&full(), 15), Marked::new(&full(), 16));
        let before = source.mdev.get("limosa/check");
        let migrate = held_up(&here, &destination, at, &["migrate", source.uuid(), destination.uuid()]);
        destination.mdev.set("limosa/gone", 1);
        // What hinders a destination from the start is a refusal.
        let code = if at == "STOP>RESUMING" { REFUSED } else { UNREACHABLE };
        migrate.end().fails(code, &[destination.uuid(), "the device is gone"]);
        assert_eq!((source.state(), source.mdev.get("limosa/check")), (State::Running, before), "{at}");
        destination.mdev.set("limosa/gone", 0);
        destination.mdev.set("limosa/hold", "none");
        destination.is_usable();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_that_is_to_be_removed_in_a_move_is_removed_after_it() {
    let here = Here::new();
    for door in DOORS {
        let (source, destination) = (Marked::new(&full(), 17), Marked::empty(&full()));
        let args = ["--door", door, "migrate", source.uuid(), destination.uuid()];
        let migrate = held_up(&here, &destination, "write@65536", &args);
        let removed = source.mdev.unplug();
        // The kernel hides it at once, and waits for its user.
        while std::path::Path::new("/sys/bus/mdev/devices").join(source.uuid()).exists() {
            std::thread::yield_now();
        }
        here.limosa(&["probe", source.uuid()])
            .fails(UNREACHABLE, &[source.uuid(), "no such mediated device"]);
        assert!(removed.try_recv().is_err(), "removed under its user");
        destination.mdev.set("limosa/hold", "none");
        migrate.end().ok();
        removed.recv().unwrap().unwrap();
        assert_eq!((destination.state(), destination.mark()), (State::Running, 17));
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn who_holds_a_device_lets_go_of_it_when_it_is_to_be_removed() {
    let here = Here::new();
    for door in DOORS {
        let device = Marked::empty(&full());
        let (holding, _) = here.holds(&["--door", door, "state", device.uuid(), "--hold"]);
        device.mdev.unplug().recv().unwrap().unwrap();
        let ended = holding.end();
        assert!(ended.err.contains(device.uuid()) && ended.err.contains("so it is let go"), "{ended:?}");
        ended.ok();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn what_a_device_refuses_undoes_the_move_and_says_what_it_answered() {
    let here = Here::new();
    let file = path("file");
    for (at, says) in
        [("RUNNING>PRE_COPY:16:1", "EBUSY"), ("read:5:1", "EIO"), ("PRE_COPY_P2P>STOP_COPY:12:1", "ENOMEM")]
    {
        let device = Marked::new(&full(), 18);
        device.mdev.set("limosa/fail", at);
        let said = here.limosa(&["save", device.uuid(), &file]);
        assert!([FAILED, REFUSED].contains(&said.code), "{said:?}");
        said.fails(said.code, &[device.uuid(), says, "the source is as it was before"]);
        assert_eq!((device.state(), device.mark()), (State::Running, 18));
    }
}
