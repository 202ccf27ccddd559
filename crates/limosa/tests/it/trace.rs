//! `limosa trace`: what it prints, and what it leaves alone when its output, its peers or its process end.

use std::process::Stdio;

use crate::support::{Folder, JsonOutput, Running, Server, full, limosa, start};
use limosa_protocol::State;
use rustix::process::Signal;

/// A traced device: its server, the proxy's process, and the path for clients.
fn proxy(folder: &Folder, server: &Server, options: &[&str]) -> (Running, String) {
    let front = folder.text("front");
    let proxy = start(&[&["trace", "--proxy", &front, &server.socket], options].concat());
    proxy.line("listening on");
    (proxy, front)
}

#[test]
fn a_save_through_a_proxy_is_shown_line_by_line() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let (proxy, front) = proxy(&folder, &server, &[]);
    limosa(&["save", &front, &folder.text("saved")]).ok();
    proxy.signal(Signal::INT);
    let said = proxy.end().ok();
    for part in [
        " a.sock VERSION 0.2 ",
        " FEATURE GET MIGRATION -> STOP_COPY+P2P+PRE_COPY <",
        " FEATURE SET MIG_DEVICE_STATE PRE_COPY_P2P > STOP_COPY -> ok <",
        " MIG_DATA_READ ",
        " DEVICE_GET_REGION_INFO region 7 -> read+write",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("MALFORMED"), "{said}");
    assert!(!folder.path("front").exists(), "the socket is removed");
    assert_eq!(server.state(), State::Running);
}

#[test]
fn json_lines_and_statistics_say_the_same() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &["pre-copy=off"]);
    let (trace, pcap) = (folder.text("trace"), folder.text("trace.pcapng"));
    let (proxy, front) = proxy(&folder, &server, &["--json", "-c", "-o", &trace, "--pcap", &pcap]);
    limosa(&["save", &front, &folder.text("saved")]).ok();
    proxy.signal(Signal::TERM);
    let counted = proxy.end().json();
    let lines = std::fs::read_to_string(&trace).unwrap();
    let events: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let reads = events.iter().filter(|event| event["request"] == "MIG_DATA_READ");
    let bytes: u64 = reads.filter_map(|event| event["bytes"].as_u64()).sum();
    assert!(bytes > 1 << 20, "{bytes}");
    let tally = |table: &str, key: &str| {
        let lines = counted[table].as_array().unwrap();
        lines.iter().find(|line| line[0] == key).unwrap_or_else(|| panic!("no {key}: {counted}"))[1].clone()
    };
    assert_eq!(tally("requests", "MIG_DATA_READ")["bytes"], bytes);
    assert_eq!(
        tally("arcs", "RUNNING_P2P > STOP_COPY")["bytes"],
        bytes,
        "of the session that the arc opened"
    );
    assert_eq!(tally("arcs", "RUNNING_P2P > STOP_COPY")["calls"], 1);
    let set = events.iter().find(|event| event["to"] == "STOP_COPY").unwrap();
    assert_eq!(
        (&set["feature"], &set["op"], &set["from"]),
        (&"MIG_DEVICE_STATE".into(), &"SET".into(), &"RUNNING_P2P".into())
    );
    assert!(set["duration_ns"].as_u64().unwrap() > 0 && set["pid"].as_u64().unwrap() > 0, "{set}");
    assert_eq!(std::fs::read(&pcap).unwrap()[..4], 0x0a0d_0d0a_u32.to_ne_bytes(), "a section header");
}

#[test]
fn a_proxy_that_cannot_stand_between_says_what_is_in_the_way() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let (front, file) = (folder.text("front"), folder.text("file"));
    std::fs::write(&file, "no socket").unwrap();
    let trace = |front: &str, back: &str| limosa(&["trace", "--proxy", front, back]);
    trace(&front, &folder.text("absent")).fails(4, &["absent", "start the server first"]);
    trace(&front, &file).fails(4, &["file", "expected the socket of a server"]);
    trace(&server.socket, &server.socket).fails(4, &["a.sock", "listens there already"]);
    trace(&file, &server.socket).fails(4, &["file", "no socket"]);
    trace(&folder.text("no/folder"), &server.socket).fails(4, &["no/folder"]);
    limosa(&["trace", "--proxy", &front]).fails(2, &["--proxy"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "no socket");
    server.is_usable(&folder);
}

#[test]
fn a_full_disk_ends_the_trace_and_not_the_connection() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let (proxy, front) = proxy(&folder, &server, &["-o", "/dev/full"]);
    limosa(&["save", &front, &folder.text("saved")]).ok();
    proxy.line("/dev/full: No space left on device");
    limosa(&["load", &folder.text("saved"), &front]).ok();
    proxy.signal(Signal::INT);
    proxy.end().fails(8, &["traced, but /dev/full: No space left"]);
    limosa(&["trace", "--proxy", &front, &server.socket, "--pcap", "/dev/full"]).fails(1, &["/dev/full"]);
}

#[test]
fn a_reader_that_has_enough_ends_the_trace_and_not_the_connection() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let front = folder.text("front");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_limosa"));
    command.args(["trace", "--proxy", &front, &server.socket]).stdin(Stdio::null());
    let mut proxy = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0];
    std::io::Read::read_exact(proxy.stdout.as_mut().unwrap(), &mut first).unwrap();
    drop(proxy.stdout.take());
    for _ in 0..2 {
        limosa(&["save", &front, &folder.text("saved")]).ok();
        std::fs::remove_file(folder.path("saved")).unwrap();
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&proxy), Signal::INT).unwrap();
    assert_eq!(proxy.wait().unwrap().code(), Some(0));
    assert_eq!(
        crate::support::limosa_into(full(), Stdio::null(), &["trace", "--proxy", &front, "absent"]),
        4
    );
}

#[test]
fn the_end_of_a_proxy_or_a_server_ends_its_clients_connections() {
    let folder = Folder::new();
    let mut server = folder.device("a.sock", &[]);
    let (proxy, front) = proxy(&folder, &server, &[]);
    server.kill();
    let failed = limosa(&["probe", &front]);
    assert!(failed.code == 4 || failed.code == 1, "{failed:?}");
    proxy.line("a client was sent away");
    proxy.kill();
    // What it leaves is taken for what it is by the next one.
    let server = folder.device("b.sock", &[]);
    let again = start(&["trace", "--proxy", &front, &server.socket]);
    again.line("listening on");
    limosa(&["probe", &front]).ok();
}

/// SIGHUP ended the proxy at once.
#[test]
fn a_proxy_whose_terminal_was_closed_left_its_socket_behind() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    for signal in [Signal::HUP, Signal::TERM, Signal::INT] {
        let (proxy, front) = proxy(&folder, &server, &[]);
        let client = std::os::unix::net::UnixStream::connect(&front).unwrap();
        proxy.signal(signal);
        proxy.end().ok();
        assert!(!folder.path("front").exists(), "{signal:?}");
        drop(client);
    }
}

/// It was a file named `-`.
#[test]
fn a_capture_for_a_pipe_was_written_to_a_file() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let (front, lines) = (folder.text("front"), folder.text("lines"));
    let capture = std::fs::File::create(folder.path("capture")).unwrap();
    let args = ["trace", "--proxy", &front, &server.socket, "--pcap", "-", "-c", "-o", &lines];
    let mut proxy = crate::support::start_into(capture, &args);
    let said = std::io::BufReader::new(proxy.stderr.take().unwrap());
    let mut said = std::io::BufRead::lines(said);
    assert_eq!(said.next().unwrap().unwrap(), format!("listening on {front}"));
    limosa(&["probe", &front]).ok();
    rustix::process::kill_process(rustix::process::Pid::from_child(&proxy), Signal::INT).unwrap();
    let rest: Vec<_> = said.map(|line| line.unwrap()).collect();
    assert_eq!(proxy.wait().unwrap().code(), Some(0), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("FEATURE GET MIGRATION")), "{rest:?}");
    let capture = std::fs::read(folder.path("capture")).unwrap();
    // A section header, its length and the byte order's mark; and blocks to the end of the file.
    assert_eq!((&capture[..4], &capture[8..12]), (&b"\n\r\r\n"[..], &0x1a2b_3c4d_u32.to_ne_bytes()[..]));
    let (mut at, mut packets) = (0, 0);
    while at < capture.len() {
        let word = |at: usize| u32::from_ne_bytes(capture[at..at + 4].try_into().unwrap());
        packets += usize::from(word(at) == 6);
        at += word(at + 4) as usize;
    }
    let lines = std::fs::read_to_string(&lines).unwrap();
    assert!(at == capture.len() && packets >= lines.lines().count(), "{packets}: {lines}");
    assert!(!folder.path("-").exists());
    limosa(&["trace", "--pcap", "-", "--", "true"]).fails(2, &["--pcap -", "the command's"]);
}

#[test]
fn a_command_is_traced_and_ends_as_it_would() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let limosa_program = env!("CARGO_BIN_EXE_limosa");
    let traced = limosa(&["trace", "--", limosa_program, "state", &server.socket, "set", "STOP"]);
    assert!(traced.out.ends_with("STOP\n") && !traced.out.contains("FEATURE"), "{traced:?}");
    for part in [" a.sock VERSION ", "FEATURE SET MIG_DEVICE_STATE", "> STOP -> ok <"] {
        assert!(traced.err.contains(part), "{part}: {traced:?}");
    }
    assert_eq!(traced.code, 0);
    for (script, code) in [("exit 7", 7), ("kill -TERM $$", -15), ("kill -KILL $$", -9)] {
        assert_eq!(limosa(&["trace", "--", "sh", "-c", script]).code, code, "{script}");
    }
    limosa(&["trace", "--", "no-such-program"]).fails(4, &["no-such-program", "PATH"]);
    // It was errno 8.
    let garbage = folder.text("garbage");
    limosa_testing::program(garbage.as_ref(), "garbage");
    limosa(&["trace", "--", &garbage]).fails(1, &["garbage does not start: Exec format error", "expected a"]);
    let counted = limosa(&["trace", "-c", "--", limosa_program, "probe", &server.socket]);
    assert!(counted.err.contains("FEATURE GET MIGRATION") && !counted.err.contains("->"), "{counted:?}");
}

#[test]
fn a_process_of_one_thread_had_1_threads() {
    let sleeps = crate::support::vcpus();
    let trace = start(&["trace", "--pid", &sleeps.pid()]);
    let line = trace.line("is traced from here on");
    assert!(line.ends_with(", with its one thread"), "{line}");
    trace.signal(Signal::INT);
    trace.end().ok();
}

#[test]
fn a_signal_for_the_tracer_is_the_commands() {
    let traced = start(&[
        "trace",
        "--",
        "sh",
        "-c",
        "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done",
    ]);
    traced.line("ready");
    traced.signal(Signal::TERM);
    let ended = traced.end();
    assert_eq!((ended.code, ended.out.as_str()), (5, "ready\ncaught\n"), "{ended:?}");
}

#[test]
fn a_server_is_traced_while_it_serves_and_goes_on() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let trace = start(&["trace", "--pid", &server.pid()]);
    trace.line("is traced from here on");
    assert_eq!(server.state(), State::Running);
    let line = trace.line("FEATURE GET MIG_DEVICE_STATE -> RUNNING <");
    assert!(line.contains(&format!("[pid {}] a.sock ", server.pid())), "{line}");
    trace.signal(Signal::INT);
    let said = trace.end().ok();
    assert!(said.contains(" VERSION 0.2 ") && !said.contains("MALFORMED"), "{said}");
    server.is_usable(&folder);
}

#[test]
fn a_full_disk_ends_the_trace_and_not_the_command() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let limosa_program = env!("CARGO_BIN_EXE_limosa");
    let ended = limosa(&["trace", "-o", "/dev/full", "--", limosa_program, "state", &server.socket]);
    assert_eq!(ended.out, "RUNNING\n");
    ended.fails(8, &["traced, but /dev/full: No space left"]);
}

#[test]
fn a_trace_is_its_owners_and_not_written_through_a_link() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let folder = Folder::new();
    let (file, link) = (folder.path("trace"), folder.path("link"));
    std::fs::write(&file, "before").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    limosa(&["trace", "-o", file.to_str().unwrap(), "--", "true"]).ok();
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    symlink(&file, &link).unwrap();
    limosa(&["trace", "--pcap", link.to_str().unwrap(), "--", "true"]).fails(1, &["link", "symbolic link"]);
    limosa(&["trace", "-o", &folder.text("no/folder"), "--", "true"]).fails(4, &["no/folder"]);
}

#[test]
fn a_trace_and_a_capture_in_one_file_were_neither() {
    let folder = Folder::new();
    let (file, other) = (folder.text("file"), folder.text("other"));
    std::fs::write(&file, "before").unwrap();
    std::fs::hard_link(&file, &other).unwrap();
    for pcap in [&file, &other] {
        limosa(&["trace", "-o", &file, "--pcap", pcap, "--", "true"]).fails(2, &[pcap, "--output already"]);
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "before");
    limosa(&["trace", "-o", "/dev/null", "--pcap", "/dev/null", "--", "true"]).ok();
}

#[test]
fn the_rights_of_a_proxys_socket_were_taken_for_a_trace_without_one() {
    for option in [["--mode", "660"], ["--group", "0"]] {
        for source in [&["--", "true"][..], &["--pid", "2147483647"]] {
            limosa(&[&["trace"], &option[..], source].concat()).fails(2, &[option[0], "cannot be used with"]);
        }
    }
}

#[test]
fn statistics_that_could_not_be_written_were_lost_without_a_word() {
    let args = ["trace", "-c", "--", env!("CARGO_BIN_EXE_limosa"), "fsm"];
    assert_eq!(crate::support::limosa_into(Stdio::null(), full(), &args), 0, "nothing was counted");
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let args = ["trace", "-c", "--", env!("CARGO_BIN_EXE_limosa"), "state", &server.socket];
    assert_eq!(crate::support::limosa_into(Stdio::null(), full(), &args), 8);
}

#[test]
fn a_process_that_has_ended_was_called_not_permitted() {
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let pid = Pid::from_child(&child);
    waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
    limosa(&["trace", "--pid", &pid.to_string()]).fails(4, &["has ended already"]);
    child.wait().unwrap();
}

#[test]
fn what_cannot_be_traced_is_refused() {
    let sleeps = crate::support::vcpus();
    let first = start(&["trace", "--pid", &sleeps.pid()]);
    first.line("is traced from here on");
    limosa(&["trace", "--pid", &sleeps.pid()]).fails(4, &["traced by process", &first.pid()]);
    first.signal(Signal::INT);
    assert_eq!(first.end().code, 0);
    limosa(&["trace", "--pid", "2147483647"]).fails(4, &["no process 2147483647"]);
    limosa(&["trace"]).fails(2, &["required"]);
    limosa(&["trace", "--pid", "1", "--proxy", "a", "b"]).fails(2, &["--proxy"]);
    sleeps.kill();
}
