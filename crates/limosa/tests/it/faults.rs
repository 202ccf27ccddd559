//! Devices that fail as scripted, and processes that stand still: what the command says, and who runs afterwards.

use crate::support::pair::Pair;
use crate::support::{Folder, GUEST, JsonOutput, Running, limosa, start};
use limosa_models::synthetic::registers;
use limosa_protocol::State;
use rustix::process::Signal;

impl Pair {
    /// The move fails, the source goes on, the destination is empty.
    #[track_caller]
    fn is_undone(&self, codes: &[i32], parts: &[&str]) {
        let ended = self.migrate(&["--initial-limit", "0.2"]);
        assert!(codes.contains(&ended.code), "{ended:?}");
        ended.fails(ended.code, &[parts, &["the source is as it was before"]].concat());
        assert!(self.source.runs(GUEST), "{} {ended:?}", self.source.state());
        assert_eq!((self.destination.state(), self.destination.guest()), (State::Running, 0), "{ended:?}");
    }

    #[track_caller]
    fn moves(&self) {
        self.migrate(&[]).ok();
        self.has_moved();
        assert_eq!(self.destination.register(registers::BAD_BLOCKS), 0);
    }
}

#[test]
fn an_arc_that_the_source_refuses_once_undoes_the_move_and_the_next_one_succeeds() {
    for arc in ["RUNNING>PRE_COPY", "PRE_COPY>PRE_COPY_P2P", "PRE_COPY_P2P>STOP_COPY"] {
        let pair = Pair::new(&[&format!("fault=fail:{arc}")], &[]);
        let entered = arc.split_once('>').unwrap().1;
        pair.is_undone(&[3], &[&pair.source.socket, &format!("entering {entered}"), "EBUSY"]);
        pair.moves();
    }
}

#[test]
fn an_arc_that_the_destination_refuses_once_undoes_the_move_and_the_next_one_succeeds() {
    for arc in [
        "RUNNING>RUNNING_P2P",
        "RUNNING_P2P>STOP",
        "STOP>RESUMING",
        "RESUMING>STOP",
        "STOP>RUNNING_P2P",
        "RUNNING_P2P>RUNNING",
    ] {
        let pair = Pair::new(&[], &[&format!("fault=fail:{arc}")]);
        pair.is_undone(&[1, 3], &[&pair.destination.socket, "EBUSY"]);
        pair.moves();
    }
}

#[test]
fn a_destination_that_breaks_is_reset_and_the_source_goes_on() {
    for arc in ["STOP>RESUMING", "RESUMING>STOP", "STOP>RUNNING_P2P", "RUNNING_P2P>RUNNING"] {
        let pair = Pair::new(&[], &[&format!("fault=error:{arc}")]);
        pair.is_undone(&[1, 3], &[&pair.destination.socket, "EIO"]);
        pair.moves();
    }
}

#[test]
fn a_source_that_breaks_is_reset_and_said_to_have_lost_its_state() {
    for arc in ["RUNNING>PRE_COPY", "PRE_COPY>PRE_COPY_P2P", "PRE_COPY_P2P>STOP_COPY"] {
        let pair = Pair::new(&[&format!("fault=error:{arc}")], &[]);
        let ended = limosa(&["migrate", &pair.source.socket, &pair.destination.socket]);
        assert!([1, 3].contains(&ended.code), "{ended:?}");
        ended.fails(ended.code, &[&pair.source.socket, "EIO", "had to be reset: its state is lost"]);
        assert!(!ended.err.contains("the source is as it was before"), "{ended:?}");
        assert_eq!((pair.source.state(), pair.source.guest()), (State::Running, 0));
        assert_eq!((pair.destination.state(), pair.destination.guest()), (State::Running, 0));
        limosa(&["migrate", &pair.source.socket, &pair.destination.socket]).ok();
    }
}

#[test]
fn a_state_that_is_cut_short_or_altered_by_the_device_is_refused_by_the_other() {
    for fault in
        ["truncate:0", "truncate:1", "truncate:100000", "corrupt:3", "corrupt:5000", "corrupt:700000"]
    {
        let pair = Pair::new(&[&format!("fault={fault}")], &[]);
        let file = pair.folder.text("file");
        if fault != "truncate:0" {
            limosa(&["save", &pair.source.socket, &file, "--initial-limit", "0.2"]).ok();
            limosa(&["load", &file, &pair.destination.socket])
                .fails(3, &[&file, &pair.destination.socket, "was not loaded"]);
        }
        pair.is_undone(&[1, 3], &[&pair.destination.socket]);
        let next = pair.folder.device("good", &[]);
        limosa(&["migrate", &next.socket, &pair.destination.socket]).ok();
    }
}

#[test]
fn state_says_where_a_refused_arc_left_the_device_and_how_to_leave_error() {
    let folder = Folder::new();
    let device = folder.device("device", &["fault=fail:RUNNING_P2P>STOP", "fault=error:STOP>RESUMING"]);
    let set = |to: &str| limosa(&["state", &device.socket, "set", to]);
    set("STOP").fails(3, &["RUNNING -> STOP failed", "now in RUNNING_P2P", "EBUSY"]);
    assert_eq!(limosa(&["state", &device.socket]).ok(), "RUNNING_P2P\n");
    set("STOP").ok();
    let ended = set("RESUMING");
    ended.fails(ended.code, &["now in ERROR", "EIO"]);
    assert!([1, 3].contains(&ended.code), "{ended:?}");
    for to in ["RUNNING", "STOP"] {
        set(to).fails(3, &[&device.socket, "ERROR", "limosa state ", " reset"]);
    }
    limosa(&["save", &device.socket, &folder.text("file")]).fails(3, &[&device.socket, "ERROR"]);
    assert_eq!(limosa(&["state", &device.socket, "reset"]).ok(), "RUNNING\n");
    device.is_usable(&folder);
}

#[test]
fn a_transition_may_take_longer_than_another_request() {
    let folder = Folder::new();
    let device = folder.device("device", &["fault=stall:RUNNING>RUNNING_P2P:3500"]);
    limosa(&["--timeout", "3", "state", &device.socket, "set", "RUNNING_P2P"]).ok();
    assert_eq!(device.state(), State::RunningP2p);
}

#[test]
fn a_downtime_that_cannot_be_had_calls_the_move_off_or_is_said() {
    let folder = Folder::new();
    let source = folder.device("source", &["state=16M", "dirty-rate=1G"]);
    let destination = folder.device("destination", &["state=16M"]);
    source.mark(GUEST);
    let (from, to) = (source.socket.as_str(), destination.socket.as_str());
    let refused = limosa(&["migrate", from, to, "--downtime-limit", "0.001"]);
    refused.fails(3, &["does not converge", "1µs", "the source is as it was before"]);
    assert!(source.runs(GUEST) && destination.guest() == 0);
    limosa(&["migrate", from, to, "--downtime-limit", "0"]).fails(2, &["more than 0"]);
    limosa(&["migrate", from, to, "--downtime-limit", "1", "--no-precopy"]).fails(2, &["--no-precopy"]);
    let moved = limosa(&[
        "--json",
        "migrate",
        from,
        to,
        "--downtime-limit",
        "0.001",
        "--when-stalled",
        "switch-over",
    ]);
    let report = moved.json();
    assert!(report["predicted_downtime_ns"].as_u64().unwrap() > 0, "{report}");
    assert!(report["notes"][0].as_str().unwrap().contains("nothing ran for"), "{report}");
    assert!(destination.runs(GUEST));
}

/// The options of both sides of a move that notice soon that the other one is silent.
const IMPATIENT: [&str; 2] = ["--silence", "1.5"];

/// A move whose source stalls in its first transition, with its sender and its receiver.
fn stalled() -> (Pair, Running, Running) {
    let pair = Pair::new(&["fault=stall:RUNNING>PRE_COPY:5000"], &[]);
    let listen = format!("unix:{}", pair.folder.text("link"));
    let socket = &pair.destination.socket;
    let receiver = start(&[&["receive", socket, "--listen", &listen][..], &IMPATIENT].concat());
    receiver.line("listening on");
    let sender = start(&[&["send", &pair.source.socket, "--to", &listen][..], &IMPATIENT].concat());
    pair.source.line("stalls as scripted");
    (pair, sender, receiver)
}

#[test]
fn a_receiver_that_stood_still_for_too_long_heard_of_a_closed_link_instead_of_the_reason() {
    let (pair, sender, receiver) = stalled();
    receiver.signal(Signal::STOP);
    sender.end().fails(4, &["nothing came within 1.5s", "as it was before"]);
    receiver.signal(Signal::CONT);
    receiver.end().fails(4, &["called the move off", "nothing came within 1.5s", "was not loaded"]);
    assert!(pair.source.runs(GUEST) && pair.destination.state() == State::Running);
}

#[test]
fn a_sender_that_stood_still_for_too_long_failed_where_it_lost_its_receiver() {
    let (pair, sender, receiver) = stalled();
    sender.signal(Signal::STOP);
    receiver.end().fails(4, &["nothing came within 1.5s"]);
    sender.signal(Signal::CONT);
    sender.end().fails(4, &["nothing came within 1.5s", "as it was before"]);
    assert!(pair.source.runs(GUEST));
}

#[test]
fn a_sigterm_while_a_device_was_being_opened_ended_the_process_by_the_signal() {
    let folder = Folder::new();
    let (device, link) = (folder.text("device"), format!("unix:{}", folder.text("link")));
    for args in [
        &["send", &device, "--to", &link][..],
        &["receive", &device, "--listen", &link],
        &["migrate", &device, "other"],
        &["save", &device, "file"],
        &["load", "file", &device],
    ] {
        // Each has a socket of its own: one that has failed connects again, to find out what listens there.
        std::fs::remove_file(&device).ok();
        let listener = std::os::unix::net::UnixListener::bind(&device).unwrap();
        let running = start(args);
        // It waits for the server's VERSION, which never comes.
        let (server, _) = listener.accept().unwrap();
        running.signal(Signal::TERM);
        drop(server);
        running.end().fails(4, &[&device]);
    }
}
