//! `limosa receive --forever`: one move after the other, and never over a guest.

use crate::support::{Ended, Folder, GUEST, Running, Server, limosa, start};
use limosa_protocol::State;
use rustix::process::Signal;

const REFUSED: i32 = 3;
const UNREACHABLE: i32 = 4;

const NEXT: u64 = GUEST + 1;

/// A receiver that goes on, for one device.
struct Receiver {
    running: Running,
    listen: String,
    report: String,
}

impl Receiver {
    fn start(folder: &Folder, device: &Server, more: &[&str]) -> Receiver {
        let (listen, report) = (format!("unix:{}", folder.text("link")), folder.text("moves.json"));
        let args =
            ["--json", "receive", &device.socket, "--listen", &listen, "--forever", "--report", &report];
        let running = start(&[&args, more].concat());
        running.line("listening on");
        Receiver { running, listen, report }
    }

    fn send(&self, from: &Server) -> Ended {
        limosa(&["send", &from.socket, "--to", &self.listen])
    }
}

/// The documents, one in a line.
fn documents(ended: &Ended) -> Vec<serde_json::Value> {
    ended
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

#[test]
fn moves_come_one_after_the_other_each_with_its_report_and_a_failed_one_ends_nothing() {
    let folder = Folder::new();
    let [one, other, here, away] = ["one", "other", "here", "away"].map(|name| folder.device(name, &[]));
    let unfit = folder.device("unfit", &["state=2M"]);
    one.mark(GUEST);
    other.mark(NEXT);
    let receiver = Receiver::start(&folder, &here, &[]);
    receiver.send(&unfit).fails(REFUSED, &["region sizes"]);
    receiver.send(&one).ok();
    assert!(here.runs(GUEST) && one.state() == State::Stop);
    // What runs here now is nobody's to overwrite.
    receiver.send(&other).fails(UNREACHABLE, &["the devices are not free here"]);
    assert!(here.runs(GUEST) && other.runs(NEXT));
    limosa(&["migrate", &here.socket, &away.socket]).ok();
    receiver.send(&other).ok();
    assert!(here.runs(NEXT) && away.runs(GUEST));
    receiver.running.signal(Signal::TERM);
    let ended = receiver.running.end();
    assert_eq!(ended.code, 0, "{ended:?}");
    let documents = documents(&ended);
    assert_eq!(documents.len(), 4, "{documents:#?}");
    assert_eq!(documents[0]["code"], REFUSED);
    // A sender that was refused got no document.
    assert_eq!(documents[2]["code"], REFUSED);
    let why = documents[2]["message"].as_str().unwrap();
    assert!(why.contains("is refused") && why.contains("has not moved on"), "{why}");
    for document in [&documents[1], &documents[3]] {
        assert_eq!(document["outcome"], "runs");
        let id = document["id"].as_str().unwrap();
        let file = receiver.report.replace(".json", &format!("-{id}.json"));
        let written: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        assert_eq!(written["id"], id);
    }
    assert_ne!(documents[1]["id"], documents[3]["id"]);
    assert!(!std::path::Path::new(&receiver.report).exists());
}

#[test]
fn a_guest_that_was_only_paused_is_not_overwritten_and_a_new_server_is_free() {
    let folder = Folder::new();
    let [one, other] = ["one", "other"].map(|name| folder.device(name, &[]));
    let mut here = folder.device("here", &[]);
    one.mark(GUEST);
    other.mark(NEXT);
    let receiver = Receiver::start(&folder, &here, &[]);
    receiver.send(&one).ok();
    limosa(&["state", &here.socket, "set", "STOP"]).ok();
    receiver.send(&other).fails(UNREACHABLE, &["the devices are not free here"]);
    assert_eq!((here.state(), here.guest()), (State::Stop, GUEST));
    here.end();
    let here = folder.device("here", &[]);
    receiver.send(&other).ok();
    assert!(here.runs(NEXT));
    receiver.running.signal(Signal::TERM);
    assert_eq!(receiver.running.end().code, 0);
}

#[test]
fn a_guest_was_overwritten_by_a_receiver_that_was_started_anew() {
    let folder = Folder::new();
    let [one, other, here, away] = ["one", "other", "here", "away"].map(|name| folder.device(name, &[]));
    one.mark(GUEST);
    other.mark(NEXT);
    let receiver = Receiver::start(&folder, &here, &[]);
    receiver.send(&one).ok();
    receiver.running.signal(Signal::TERM);
    assert_eq!(receiver.running.end().code, 0);
    let receiver = Receiver::start(&folder, &here, &[]);
    receiver.send(&other).fails(UNREACHABLE, &["the devices are not free here"]);
    assert!(here.runs(GUEST) && other.runs(NEXT));
    limosa(&["migrate", &here.socket, &away.socket]).ok();
    receiver.send(&other).ok();
    assert!(here.runs(NEXT));
}

#[test]
fn sigterm_ends_it_after_the_move_under_way_and_sigint_calls_that_off() {
    for (signal, moves) in [(Signal::TERM, true), (Signal::INT, false)] {
        let folder = Folder::new();
        let one = folder.device("one", &[]);
        // It loads for a while, in which the signal comes.
        let here = folder.device("here", &["fault=stall:RESUMING>STOP:800"]);
        one.mark(GUEST);
        let receiver = Receiver::start(&folder, &here, &[]);
        let sender = start(&["send", &one.socket, "--to", &receiver.listen]);
        here.line("stalls as scripted");
        receiver.running.signal(signal);
        let (sent, received) = (sender.end(), receiver.running.end());
        assert_eq!(received.code, 0, "{received:?}");
        let documents = documents(&received);
        assert_eq!(documents.len(), 1, "{documents:#?}");
        if moves {
            assert!(sent.code == 0 && here.runs(GUEST), "{sent:?}");
            assert_eq!(documents[0]["outcome"], "runs");
        } else {
            assert!(sent.code != 0 && one.runs(GUEST) && here.guest() == 0, "{sent:?}");
            assert_eq!(
                (&documents[0]["code"], &documents[0]["report"]["outcome"]),
                (&7.into(), &"discarded".into())
            );
        }
    }
}

#[test]
fn what_it_cannot_keep_free_is_refused_at_the_start() {
    let folder = Folder::new();
    let memory = format!("{}@0,size=4096,create", folder.text("memory"));
    limosa(&["receive", "--memory", &memory, "--listen", "unix:x", "--forever"]).fails(2, &["DEVICE"]);
    limosa(&["receive", "x", "--listen", "unix:x", "--forever", "--hold"]).fails(2, &["--forever", "--hold"]);
    let none = folder.text("none");
    limosa(&["receive", &none, "--listen", "unix:x", "--forever"]).fails(UNREACHABLE, &[&none]);
}
