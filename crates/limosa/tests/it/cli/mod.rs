//! Every command as its help describes it, over real processes and sockets.

mod checks;

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
fn fsm_prints_every_path_of_every_flag_set() {
    let text = limosa(&["fsm", "--paths"]).ok();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 256);
    assert_eq!(lines[0], "STOP_COPY ERROR ERROR EINVAL");
    for line in [
        "STOP_COPY RUNNING STOP_COPY RUNNING>STOP>STOP_COPY",
        "STOP_COPY RUNNING PRE_COPY EINVAL",
        "STOP_COPY+P2P RUNNING STOP RUNNING>RUNNING_P2P>STOP",
        "STOP_COPY+P2P+PRE_COPY PRE_COPY STOP PRE_COPY>RUNNING>RUNNING_P2P>STOP",
        "STOP_COPY+P2P+PRE_COPY PRE_COPY STOP_COPY PRE_COPY>PRE_COPY_P2P>STOP_COPY",
        "STOP_COPY+P2P+PRE_COPY STOP_COPY PRE_COPY EINVAL",
        "STOP_COPY+P2P+PRE_COPY STOP STOP STOP",
        "STOP_COPY+P2P+PRE_COPY ERROR RUNNING EINVAL",
        "STOP_COPY+P2P+PRE_COPY RUNNING ERROR EINVAL",
    ] {
        assert!(lines.contains(&line), "{line}");
    }
    let sets = ["STOP_COPY", "STOP_COPY+P2P", "STOP_COPY+PRE_COPY", "STOP_COPY+P2P+PRE_COPY"];
    for (set, lines) in sets.iter().zip(lines.chunks(64)) {
        assert!(lines.iter().all(|line| line.split(' ').next() == Some(set)), "{set}");
        assert!(lines.iter().all(|line| line.split(' ').count() == 4), "{set}");
    }
}

#[test]
fn fsm_has_a_table_two_graphs_and_json() {
    assert!(limosa(&["fsm"]).ok().contains("RUNNING_P2P"));
    let dot = limosa(&["fsm", "--dot"]).ok();
    assert!(dot.starts_with("digraph") && dot.trim_end().ends_with('}'), "{dot}");
    let mermaid = limosa(&["fsm", "--mermaid"]).ok();
    assert!(mermaid.starts_with("stateDiagram"), "{mermaid}");
    for form in [&[][..], &["--dot"], &["--mermaid"], &["--paths"]] {
        let json = limosa(&[&["--json", "fsm"], form].concat()).json();
        let lines = json["transitions"].as_array().unwrap();
        assert_eq!(lines.len(), 256);
        let line = lines.iter().find(|line| {
            let flags = serde_json::json!(["STOP_COPY", "P2P", "PRE_COPY"]);
            line["from"] == "PRE_COPY" && line["to"] == "STOP" && line["flags"] == flags
        });
        assert_eq!(line.unwrap()["path"], serde_json::json!(["PRE_COPY", "RUNNING", "RUNNING_P2P", "STOP"]));
    }
}

#[test]
fn completions_and_manual_pages_are_generated() {
    for (shell, part) in [("bash", "complete"), ("zsh", "#compdef limosa"), ("fish", "complete -c limosa")] {
        let script = limosa(&["completions", shell]).ok();
        assert!(script.contains(part) && script.contains("migrate"), "{shell}");
        let json = limosa(&["--json", "completions", shell]).json();
        assert_eq!(json["script"], script);
    }
    let folder = Folder::new();
    let man = folder.text("new/man");
    assert!(limosa(&["man", &man]).ok().contains(&man));
    for page in ["limosa.1", "limosa-migrate.1", "limosa-state-set.1"] {
        let text = std::fs::read_to_string(folder.path("new/man").join(page)).unwrap();
        assert!(text.contains("EXIT STATUS") && text.contains("EXAMPLES"), "{page}: {text}");
    }
    assert_eq!(limosa(&["--json", "man", &man]).json()["folder"], man.as_str());
}

#[test]
fn options_of_a_model_are_listed_with_their_values_and_defaults() {
    let text = limosa(&["serve", "synthetic", "-o", "help"]).ok();
    for part in ["dma-pattern=sequential|random|one-page", "state=BYTES", "a multiple of block (16M)"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 80) && !text.contains("line="), "{text}");
    assert!(limosa(&["serve", "uart", "-o", "state=1M,help"]).ok().contains("line=echo|PATH"));
    let both = limosa(&["serve", "-o", "help"]).ok();
    assert!(both.contains("Options of uart") && both.contains("Options of synthetic"), "{both}");
    let json = limosa(&["--json", "serve", "synthetic", "-o", "help"]).json();
    let option = &json["models"][0]["options"][0];
    assert_eq!((&option["name"], &option["default"]), (&"state".into(), &"16M".into()));
    assert!(limosa(&["serve", "--help"]).ok().contains("state=BYTES"));
    limosa(&["serve", "--socket", "x"]).fails(2, &["MODEL", "--config"]);
}

/// What bash offers for the last of these words.
fn completed(script: &str, words: &[&str]) -> String {
    let line = "source \"$1\"; shift; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); COMP_LINE=\"$*\"; COMP_POINT=${#COMP_LINE}; \
                _limosa limosa \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"; echo \"${COMPREPLY[@]}\"";
    let mut bash = std::process::Command::new("bash");
    bash.args(["-c", line, "bash", script, "limosa"]).args(words);
    crate::support::Running::start(&mut bash).end().ok()
}

#[test]
fn a_shell_completes_options_of_models_methods_states_and_devices() {
    let folder = Folder::new();
    let script = folder.text("script");
    std::fs::write(&script, limosa(&["completions", "bash"]).ok()).unwrap();
    std::fs::write(folder.path("net.sock"), "").unwrap();
    // Of an argument without an option it knows nothing, and offers files: most devices are sockets.
    assert!(std::fs::read_to_string(&script).unwrap().contains("-o bashdefault -o default limosa"));
    for (words, expected) in [
        (&["serve", "synthetic", "-o", "dma-pattern=r"][..], &["dma-pattern=random"][..]),
        (&["serve", "synthetic", "--option", "p2p"], &["p2p=on", "p2p=off"]),
        (&["serve", "uart", "-o", "st"], &["state="]),
        (&["send", "x", "--compress", ""], &["zstd", "lz4"]),
        (&["state", "x", "set", "PRE"], &["PRE_COPY", "PRE_COPY_P2P"]),
        (&["check", "--peer", &folder.text("ne")], &["net.sock"]),
    ] {
        let offered = completed(&script, words);
        assert!(expected.iter().all(|word| offered.contains(word)), "{words:?}: {offered}");
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
