//! Every command as its help describes it, over real processes and sockets.

mod checks;
mod generated;

use crate::support::{Folder, JsonOutput, Server, device_data, limosa, start};
use limosa_models::synthetic::registers;
use limosa_protocol::State;

const COMMANDS: [&[&str]; 24] = [
    &["region", "read"],
    &[],
    &["demo"],
    &["serve"],
    &["switch-over"],
    &["probe"],
    &["doctor"],
    &["state"],
    &["state", "x", "get"],
    &["state", "x", "set"],
    &["state", "x", "reset"],
    &["save"],
    &["load"],
    &["inspect"],
    &["migrate"],
    &["send"],
    &["receive"],
    &["check"],
    &["fsm"],
    &["trace"],
    &["bench"],
    &["bench", "compare"],
    &["completions"],
    &["man"],
];

#[test]
fn every_help_documents_the_exit_codes() {
    for command in COMMANDS {
        let help = limosa(&[command, &["--help"]].concat()).ok();
        for code in ["Exit codes:", "  0  done", "  5  in doubt", "  7  cancelled"] {
            assert!(help.contains(code), "{command:?} has no `{code}`:\n{help}");
        }
        assert_eq!(help.matches("Exit codes:").count(), 1, "{help}");
    }
    let serve = limosa(&["serve", "--help"]).ok();
    assert!(serve.contains("Options of synthetic") && serve.contains("dirty-rate=BYTES"), "{serve}");
}

#[test]
fn probe_says_what_a_device_is_and_that_it_can_migrate() {
    let folder = Folder::new();
    let device = folder.device("device", &["p2p=off"]);
    let text = limosa(&["probe", &device.socket]).ok();
    for part in
        [&device.socket, "4c4d:5359", "STOP_COPY+PRE_COPY", "RUNNING", "MIG_DEVICE_STATE", "BAR2", "1.00 MiB"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json = limosa(&["--json", "probe", &device.socket]).json();
    assert_eq!(json["device"], device.socket.as_str());
    assert_eq!(json["migration"]["flags"], serde_json::json!(["STOP_COPY", "PRE_COPY"]));
    assert_eq!(json["migration"]["state"], "RUNNING");
    assert!(json["migration"]["stop_copy_bytes"].as_u64().unwrap() > 1 << 20);
    assert_eq!(json["regions"][1]["bytes"], 1 << 20);
    assert!(json["cannot_migrate"].is_null());
    assert_eq!(json["dma_logging"], true);
}

#[test]
fn state_is_read_driven_over_its_path_and_reset() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let state = |args: &[&str]| limosa(&[&["state", &device.socket], args].concat()).ok();
    assert_eq!(state(&[]), "RUNNING\n");
    assert_eq!(state(&["get"]), "RUNNING\n");
    assert_eq!(state(&["set", "STOP"]), "RUNNING > RUNNING_P2P > STOP\n");
    assert_eq!(state(&["set", "STOP"]), "STOP\n");
    assert_eq!(device.state(), State::Stop);
    let json = limosa(&["state", &device.socket, "set", "RUNNING", "--json"]).json();
    assert_eq!(json["path"], serde_json::json!(["STOP", "RUNNING_P2P", "RUNNING"]));
    assert_eq!(json["state"], "RUNNING");
    device.mark(7);
    assert_eq!(state(&["reset"]), "RUNNING\n");
    assert_eq!(device.guest(), 0, "a reset forgets");
    let json = limosa(&["--json", "state", &device.socket]).json();
    let expected =
        serde_json::json!({ "schema": 1, "command": "state", "device": device.socket, "state": "RUNNING" });
    assert_eq!(json, expected);
    let json = limosa(&["--json", "state", &device.socket, "reset"]).json();
    assert_eq!(json["state"], "RUNNING");
}

#[test]
fn every_state_can_be_left_by_the_next_command() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    for state in ["STOP", "RUNNING", "STOP_COPY", "RESUMING", "RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P"] {
        limosa(&["state", &device.socket, "set", state]).ok();
        assert_eq!(limosa(&["state", &device.socket]).ok().trim(), state);
        limosa(&["state", &device.socket, "reset"]).ok();
        assert_eq!(device.state(), State::Running);
    }
}

#[test]
fn save_inspect_load_bring_back_the_state_that_was_saved() {
    let folder = Folder::new();
    let device = folder.device("device", &["state=2M"]);
    let [file, again, json_file] = ["file", "again", "json"].map(|name| folder.text(name));
    device.mark(0x1234);
    let text = limosa(&["save", &device.socket, &file]).ok();
    assert!(text.contains("stop-copy") && text.contains("downtime"), "{text}");
    assert_eq!(device.state(), State::Running);

    let text = limosa(&["inspect", &file]).ok();
    for part in ["version 1", &device.socket, "DEVICE_DATA", "whole: it can be loaded"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json = limosa(&["--json", "inspect", &file]).json();
    assert_eq!((&json["whole"], &json["stored"]), (&true.into(), &true.into()));
    assert!(json["devices"][0]["bytes"].as_u64().unwrap() > 2 << 20);

    device.mark(0x5678);
    limosa(&["load", &file, &device.socket]).ok();
    assert_eq!(device.state(), State::Running);
    assert_eq!((device.guest(), device.register(registers::BAD_BLOCKS)), (0x1234, 0));
    limosa(&["save", &device.socket, &again]).ok();
    assert!(device_data(folder.path("file").as_path()) == device_data(folder.path("again").as_path()));

    let json = limosa(&["--json", "save", "--stop", &device.socket, &json_file]).json();
    assert_eq!(json["outcome"], "saved");
    assert_eq!(device.state(), State::Stop);
    let json = limosa(&["--json", "load", "--stop", &json_file, &device.socket]).json();
    assert_eq!(json["outcome"], "stopped");
    assert_eq!(device.state(), State::Stop);
    let json = limosa(&["--json", "load", &json_file, &device.socket]).json();
    assert_eq!(json["outcome"], "runs");
    assert!(json["device_bytes"].as_u64().unwrap() > 2 << 20);
    assert_eq!(device.state(), State::Running);
}

/// The guest is at the destination, all of it, and nowhere else.
#[track_caller]
fn has_moved(folder: &Folder, before: &str, source: &Server, destination: &Server, guest: u64) {
    assert_eq!((source.state(), destination.state()), (State::Stop, State::Running));
    assert_eq!(destination.guest(), guest);
    assert_eq!(destination.register(registers::BAD_BLOCKS), 0);
    for register in [registers::CHECKSUM, registers::DIRTIED, registers::SEED] {
        assert_eq!(destination.register(register), source.register(register), "{register:#x}");
    }
    limosa(&["save", "--replace", &destination.socket, &folder.text("after")]).ok();
    assert!(device_data(&folder.path(before)) == device_data(&folder.path("after")));
}

#[test]
fn migrate_moves_a_device_there_and_back() {
    let folder = Folder::new();
    let one = folder.device("one", &["state=4M", "seed=5"]);
    let other = folder.device("other", &["state=4M", "seed=6"]);
    one.mark(41);
    one.write(registers::DIRTY, 9);
    limosa(&["save", "--replace", &one.socket, &folder.text("before")]).ok();

    let text = limosa(&["migrate", &one.socket, &other.socket]).ok();
    for part in ["handshake", "pre-copy", "stop-copy", "commit", "downtime", &one.socket] {
        assert!(text.contains(part), "{part}: {text}");
    }
    has_moved(&folder, "before", &one, &other, 41);

    let json = limosa(&["--json", "migrate", "--no-precopy", &other.socket, &one.socket]).json();
    assert_eq!(json["outcome"], "moved");
    assert_eq!(json["devices"][0]["precopy_bytes"], 0);
    let bytes = json["device_bytes"].as_u64().unwrap();
    assert!(bytes > 4 << 20, "{bytes}");
    assert!(json["downtime_ns"].as_u64().unwrap() <= json["total_ns"].as_u64().unwrap());
    has_moved(&folder, "before", &other, &one, 41);
}

#[test]
fn migrate_moves_a_device_that_changes_all_the_time() {
    let folder = Folder::new();
    let one = folder.device("one", &["state=4M", "dirty-rate=64M"]);
    let other = folder.device("other", &["state=4M"]);
    one.mark(42);
    limosa(&["migrate", &one.socket, &other.socket]).ok();
    assert_eq!((one.state(), other.state()), (State::Stop, State::Running));
    assert_eq!((other.guest(), other.register(registers::BAD_BLOCKS)), (42, 0));
    assert!(other.register(registers::DIRTIED) >= one.register(registers::DIRTIED));
}

#[test]
fn devices_without_p2p_or_precopy_move_too() {
    for options in [["p2p=off", "pre-copy=on"], ["p2p=on", "pre-copy=off"], ["p2p=off", "pre-copy=off"]] {
        let folder = Folder::new();
        let (one, other) = (folder.device("one", &options), folder.device("other", &options));
        one.mark(43);
        limosa(&["save", "--replace", &one.socket, &folder.text("before")]).ok();
        limosa(&["migrate", &one.socket, &other.socket]).ok();
        has_moved(&folder, "before", &one, &other, 43);
    }
}

#[test]
fn send_and_receive_move_a_device_over_unix_and_tcp() {
    let folder = Folder::new();
    let one = folder.device("one", &["state=4M", "seed=5"]);
    let other = folder.device("other", &["state=4M", "seed=6"]);
    one.mark(44);
    limosa(&["save", "--replace", &one.socket, &folder.text("before")]).ok();
    let unix = format!("unix:{}", folder.text("link"));

    let receiver = start(&["receive", &other.socket, "--listen", &unix]);
    let address = receiver.after("listening on ");
    assert_eq!(address, unix);
    let sent = limosa(&["send", &one.socket, "--to", &address]).ok();
    let received = receiver.end().ok();
    assert!(sent.contains("downtime") && received.contains("start"), "{sent}{received}");
    assert!(!folder.path("link").exists(), "the socket is removed");
    has_moved(&folder, "before", &one, &other, 44);

    let receiver = start(&["--json", "receive", &one.socket, "--listen", "tcp:127.0.0.1:0"]);
    let address = receiver.after("listening on ");
    assert!(address.starts_with("tcp:127.0.0.1:") && !address.ends_with(":0"), "{address}");
    let sent = limosa(&["--json", "send", "--no-precopy", &other.socket, "--to", &address]).json();
    let received = receiver.end().json();
    assert_eq!((&sent["outcome"], &received["outcome"]), (&"moved".into(), &"runs".into()));
    assert_eq!(sent["id"], received["id"]);
    assert_eq!(sent["device_bytes"], received["device_bytes"]);
    has_moved(&folder, "before", &other, &one, 44);
}

#[test]
fn a_serial_card_is_served_and_moves() {
    let folder = Folder::new();
    let one = folder.serve("uart", "one", &[]);
    let other = folder.serve("uart", "other", &["line=echo"]);
    let text = limosa(&["probe", &one.socket]).ok();
    assert!(text.contains("PCI") && text.contains("STOP_COPY"), "{text}");
    limosa(&["migrate", &one.socket, &other.socket]).ok();
    assert_eq!((one.state(), other.state()), (State::Stop, State::Running));
}

#[test]
fn a_serial_card_as_mtty_has_it_is_served_and_moves_to_its_like_alone() {
    let folder = Folder::new();
    let one = folder.serve("uart", "one", &["as=mtty", "line=echo", "line=echo"]);
    let other = folder.serve("uart", "other", &["line=echo", "line=echo", "as=mtty"]);
    let ordinary = folder.serve("uart", "ordinary", &[]);
    let parts = ["cannot be moved", "PCI identification is 4348:3253"];
    limosa(&["migrate", &one.socket, &ordinary.socket]).fails(3, &parts);
    assert_eq!((one.state(), ordinary.state()), (State::Running, State::Running));
    let json = limosa(&["--json", "migrate", &one.socket, &other.socket]).json();
    assert_eq!(json["device_bytes"], 96);
    assert_eq!((one.state(), other.state()), (State::Stop, State::Running));
}

#[test]
fn the_demo_verifies_what_it_moved() {
    let json = limosa(&["--json", "demo", "--state-size", "4M", "--memory", "4M"]).json();
    assert_eq!(json["verified"], true);
    for key in ["downtime_ns", "total_ns", "device_bytes", "memory_bytes"] {
        assert!(json[key].as_u64().unwrap() > 0, "{key}: {json}");
    }
}

#[test]
fn serve_says_where_ends_at_sigterm_and_removes_its_socket() {
    let folder = Folder::new();
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let socket = folder.text("device");
        let server = start(&["--json", "serve", "synthetic", "--socket", &socket, "-o", "state=1M,p2p=off"]);
        server.line("listening");
        limosa(&["probe", &socket]).ok();
        server.signal(signal);
        assert_eq!(server.end().json()["listening"], socket.as_str());
        assert!(!folder.path("device").exists());
    }
}

#[test]
fn logs_without_a_terminal_have_no_escape_codes() {
    let folder = Folder::new();
    let (one, other) = (folder.device("one", &[]), folder.device("other", &[]));
    let ended = limosa(&["-vv", "migrate", &one.socket, &other.socket]);
    assert!(ended.err.contains("phase=\"pre-copy\"") && !ended.err.contains('\x1b'), "{}", ended.err);
    ended.ok();
}

#[test]
fn what_is_saved_and_where_to_may_have_an_option_between_them() {
    let folder = Folder::new();
    let [a, b] = ["a.sock", "b.sock"].map(|name| folder.device(name, &[]));
    let [first, second] = ["first.lmsa", "second.lmsa"].map(|name| folder.text(name));
    limosa(&["save", &a.socket, "--device", &b.socket, &first]).ok();
    limosa(&["save", "--device", &b.socket, &second]).ok();
    let devices =
        |file: &str| limosa(&["--json", "inspect", file]).json()["devices"].as_array().unwrap().len();
    assert_eq!([&first, &second].map(|file| devices(file)), [2, 1]);
    limosa(&["save", &folder.text("third.lmsa")])
        .fails(2, &["third.lmsa is the file to save to", "DEVICE", "limosa save"]);
    assert!(!folder.path("third.lmsa").exists());
}
