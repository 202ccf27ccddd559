//! How commands end: nothing that fails after a move is taken for a failure of the move, nothing is lost behind another
//! failure, and programs are told in one document.

use std::io::Read;
use std::process::Stdio;

use crate::support::pair::Pair;
use crate::support::{Ended, Folder, GUEST, JsonOutput, full, limosa, limosa_into, start, start_by};
use limosa_protocol::State;
use rustix::process::Signal;

const DONE_BUT: i32 = 8;

/// Runs the command with its standard output in this place.
fn printing_to(out: impl Into<Stdio>, args: &[&str]) -> Ended {
    let (mut said, err) = std::io::pipe().unwrap();
    let code = limosa_into(out, err, args);
    let mut err = String::new();
    said.read_to_string(&mut err).unwrap();
    Ended { code, out: String::new(), err }
}

#[test]
fn a_full_disk_behind_standard_output_was_told_as_a_move_that_failed() {
    for json in [&[][..], &["--json"]] {
        let pair = Pair::new(&[], &[]);
        printing_to(full(), &pair.migration(json))
            .fails(DONE_BUT, &["moved, but standard output", "No space left"]);
        pair.has_moved();
    }
    let pair = Pair::new(&[], &[]);
    let link = format!("unix:{}", pair.folder.text("link"));
    let receive = ["receive", &pair.destination.socket, "--listen", &link];
    std::thread::scope(|scope| {
        let received = scope.spawn(|| printing_to(full(), &receive));
        while !pair.folder.path("link").exists() {
            assert!(!received.is_finished(), "{:?}", received.join());
            std::thread::yield_now();
        }
        let sent = printing_to(full(), &["send", &pair.source.socket, "--to", &link]);
        sent.fails(DONE_BUT, &["moved, but standard output"]);
        received.join().unwrap().fails(DONE_BUT, &["moved, but standard output"]);
    });
    pair.has_moved();
    let (file, other) = (pair.folder.text("file"), pair.folder.device("other", &[]));
    printing_to(full(), &["save", "--stop", &pair.destination.socket, &file])
        .fails(DONE_BUT, &["saved, but standard output"]);
    assert_eq!(pair.destination.state(), State::Stop);
    printing_to(full(), &["load", &file, &other.socket]).fails(DONE_BUT, &["loaded, but standard output"]);
    assert!(other.runs(GUEST));
    printing_to(full(), &["state", &other.socket, "set", "STOP"])
        .fails(DONE_BUT, &["the device is in STOP, but standard output"]);
    printing_to(full(), &["state", &other.socket, "reset"]).fails(DONE_BUT, &["in RUNNING, but"]);
    // Nothing was done by a command that only looks.
    printing_to(full(), &["state", &other.socket]).fails(1, &["standard output"]);
}

#[test]
fn a_start_that_failed_was_lost_behind_a_full_disk() {
    let pair = Pair::new(&[], &[]);
    printing_to(full(), &pair.migration(&["--on-start", "exit 3"])).fails(
        DONE_BUT,
        &[
            "moved, but --on-start `exit 3`",
            "exit status: 3",
            "the guest may not",
            "; standard output: No space",
        ],
    );
    pair.has_moved();
}

#[test]
fn a_start_that_failed_is_no_move_that_failed() {
    let pair = Pair::new(&[], &[]);
    let moved = limosa(&pair.migration(&["--json", "--on-start", "exit 3"]));
    let document = moved.json_failure(DONE_BUT);
    assert_eq!(document["report"]["outcome"], "moved", "{document}");
    pair.has_moved();
    let file = pair.folder.text("file");
    limosa(&["save", &pair.destination.socket, &file]).ok();
    let other = pair.folder.device("other", &[]);
    let loaded = limosa(&["load", &file, &other.socket, "--on-start", "exit 4"]);
    loaded.fails(DONE_BUT, &["loaded, but --on-start `exit 4`"]);
    assert!(loaded.out.contains("outcome runs"), "the report is for people to read all the same: {loaded:?}");
    assert!(other.runs(GUEST));
}

#[test]
fn a_device_that_was_loaded_was_let_go_when_its_guest_did_not_start() {
    let pair = Pair::new(&[], &[]);
    let link = format!("unix:{}", pair.folder.text("link"));
    let receive =
        ["receive", &pair.destination.socket, "--listen", &link, "--hold", "--on-start", "exit 3", "--json"];
    let receiver = start(&receive);
    receiver.line("listening on");
    limosa(&["send", &pair.source.socket, "--to", &link]).ok();
    receiver.line("moved, but --on-start");
    receiver.line("holding");
    receiver.signal(Signal::INT);
    assert_eq!(receiver.end().json_failure(DONE_BUT)["report"]["outcome"], "runs");
    pair.has_moved();
}

#[test]
fn a_report_that_cannot_be_written_after_the_move_is_no_move_that_failed() {
    let pair = Pair::new(&[], &[]);
    let report = pair.folder.text("report.json");
    let limit = "trap '' XFSZ; ulimit -f 0; exec \"$0\" \"$@\"";
    let ended = start_by("bash", &["-c", limit], &pair.migration(&["--report", &report])).end();
    ended.fails(DONE_BUT, &["moved, but --report", &report, "too large"]);
    assert!(ended.out.contains("outcome moved"), "{ended:?}");
    pair.has_moved();
}

#[test]
fn nobody_reads_standard_output_and_the_move_is_done() {
    let pair = Pair::new(&[], &[]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    printing_to(writer, &pair.migration(&["--json"])).ok();
    pair.has_moved();
}

#[test]
fn a_log_that_could_not_be_written_ended_the_command() {
    let pair = Pair::new(&[], &[]);
    let all = [&["-vvv"][..], &pair.migration(&[])].concat();
    assert_eq!(limosa_into(Stdio::null(), full(), &all), 0);
    pair.has_moved();
    let refused = limosa_into(Stdio::null(), full(), &["probe", &pair.folder.text("none")]);
    assert_eq!(refused, 4, "it can be told by the code alone");
}

#[test]
fn programs_were_told_nothing_of_a_failure() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let [none, file, bad] = ["none", "file", "bad"].map(|name| folder.text(name));
    limosa(&["save", &device.socket, &file]).ok();
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&bad, bytes).unwrap();
    let socket = device.socket.as_str();
    let link = format!("unix:{none}");
    for (code, args) in [
        (2, &["frob"][..]),
        (2, &["state", socket, "set", "HALT"]),
        (2, &["fsm", "--dot", "--paths"]),
        (2, &["completions", "tcsh"]),
        (4, &["probe", &none]),
        (4, &["state", &none]),
        (2, &["state", socket, "set", "ERROR"]),
        (3, &["save", socket, &file]),
        (4, &["load", &none, socket]),
        (6, &["load", &bad, socket]),
        (6, &["inspect", &bad]),
        (6, &["verify", &bad]),
        (2, &["migrate", socket, socket]),
        (4, &["send", socket, "--to", &link]),
        (4, &["receive", socket, "--listen", &link, "--wait", "0.02"]),
        (3, &["resolve", socket]),
        (4, &["answer", "--listen", "unix:/no/where"]),
        (4, &["bench", &none]),
        (4, &["serve", "uart", "--socket", "/no/where"]),
        (1, &["demo", "--memory", "5"]),
        (4, &["man", "/dev/null/folder"]),
    ] {
        let document = limosa(&[args, &["--json"]].concat()).json_failure(code);
        let is_of_inspect = args[0] == "inspect";
        assert_eq!(document["report"]["whole"] == false, is_of_inspect, "{args:?}: {document}");
    }
    assert_eq!(limosa(&["--", "--json"]).out, "", "it was not asked for");
}

#[test]
fn programs_were_not_told_why_a_move_was_undone() {
    let folder = Folder::new();
    let source = folder.device("source", &[]);
    let destination = folder.device("destination", &["fault=fail:RESUMING>STOP"]);
    let undone = limosa(&["--json", "migrate", &source.socket, &destination.socket]);
    let document = undone.json_failure(3);
    assert_eq!(document["report"]["outcome"], "undone", "{document}");
    let why = document["report"]["why"].as_str().unwrap();
    assert!(document["message"].as_str().unwrap().contains(why), "{document}");
    let report = folder.text("report.json");
    let file = folder.text("file");
    limosa(&["save", &source.socket, &file]).ok();
    let destination = folder.device("refusing", &["fault=fail:RESUMING>STOP"]);
    let refused = limosa(&["--json", "load", &file, &destination.socket, "--report", &report]);
    assert_eq!(refused.json_failure(3)["report"]["outcome"], "discarded");
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(written["outcome"], "discarded");
}

#[test]
fn a_server_that_has_said_where_it_listens_says_no_second_document() {
    let folder = Folder::new();
    let socket = folder.text("socket");
    let server = start(&["--json", "serve", "uart", "--socket", &socket]);
    server.line("listening");
    server.signal(Signal::TERM);
    assert_eq!(server.end().json()["listening"], socket.as_str());
}
