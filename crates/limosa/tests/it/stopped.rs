//! Devices that do not run when they are moved: one that stands in STOP stays so where that is meant, and is refused where
//! it may be what an earlier move has left; and what a killed sender leaves is said to be brought back, and how.

use crate::support::pair::Pair;
use crate::support::{Folder, GUEST, JsonOutput, limosa, start};
use limosa_protocol::State;

const REFUSED: i32 = 3;

impl Pair {
    /// The source's guest is paused.
    fn paused() -> Pair {
        let pair = Pair::new(&[], &[]);
        limosa(&["state", &pair.source.socket, "set", "STOP"]).ok();
        pair
    }

    /// A hook that leaves a file, and whether it has run.
    fn hook(&self) -> (String, impl Fn() -> bool) {
        let file = self.folder.path("started");
        (format!("touch {}", file.display()), move || file.exists())
    }

    #[track_caller]
    fn stands_there(&self) {
        assert_eq!((self.source.state(), self.destination.state()), (State::Stop, State::Stop));
        assert_eq!(self.destination.guest(), GUEST);
    }

    #[track_caller]
    fn is_untouched(&self) {
        assert_eq!((self.source.state(), self.source.guest()), (State::Stop, GUEST));
        assert!(self.destination.runs(0));
    }
}

#[test]
fn a_paused_guest_ran_after_it_was_migrated() {
    let pair = Pair::paused();
    let (hook, has_started) = pair.hook();
    let said = pair.migrate(&["--stopped", "--on-start", &hook]).ok();
    assert!(said.contains("stay in STOP"), "{said}");
    pair.stands_there();
    assert!(!has_started());
    limosa(&["state", &pair.destination.socket, "set", "RUNNING"]).ok();
    assert!(pair.destination.runs(GUEST), "all of it is there");
}

#[test]
fn a_paused_guest_ran_after_it_was_sent() {
    let pair = Pair::paused();
    let (hook, has_started) = pair.hook();
    let link = format!("unix:{}", pair.folder.text("link"));
    let receive = ["--json", "receive", &pair.destination.socket, "--listen", &link, "--on-start", &hook];
    let receiver = start(&receive);
    receiver.line("listening on");
    limosa(&["send", &pair.source.socket, "--to", &link, "--stopped"]).ok();
    assert_eq!(receiver.end().json()["outcome"], "stopped");
    pair.stands_there();
    assert!(!has_started());
}

#[test]
fn a_paused_guest_ran_after_it_was_saved_and_loaded() {
    let pair = Pair::paused();
    let (hook, has_started) = pair.hook();
    let file = pair.folder.text("file");
    let said = limosa(&["save", &pair.source.socket, &file, "--stopped"]).ok();
    assert!(said.contains("outcome saved") && !said.contains("moved"), "{said}");
    assert_eq!(pair.source.state(), State::Stop, "as it was found");
    let load = |more: &[&str]| limosa(&[&["load", &file, &pair.destination.socket], more].concat());
    load(&["--on-start", &hook]).ok();
    pair.stands_there();
    assert!(!has_started());
    load(&["--stop", "--run"]).fails(2, &["--stop", "--run"]);
    load(&["--run", "--on-start", &hook]).ok();
    assert!(pair.destination.runs(GUEST) && has_started());
}

#[test]
fn a_paused_guest_is_started_where_that_is_asked_for() {
    let pair = Pair::paused();
    let (hook, has_started) = pair.hook();
    pair.migrate(&["--stopped", "--run", "--on-start", &hook]).ok();
    assert!(pair.destination.runs(GUEST) && has_started() && pair.source.state() == State::Stop);
    let pair = Pair::paused();
    let link = format!("unix:{}", pair.folder.text("link"));
    let receiver = start(&["receive", &pair.destination.socket, "--listen", &link, "--run"]);
    receiver.line("listening on");
    limosa(&["send", &pair.source.socket, "--to", &link, "--stopped"]).ok();
    receiver.end().ok();
    assert!(pair.destination.runs(GUEST));
}

#[test]
fn a_paused_guest_stays_paused_after_a_move_that_failed() {
    let folder = Folder::new();
    let source = folder.device("source", &[]);
    let destination = folder.device("destination", &["fault=fail:RESUMING>STOP"]);
    source.mark(GUEST);
    limosa(&["state", &source.socket, "set", "STOP"]).ok();
    let migrate = ["migrate", &source.socket, &destination.socket, "--stopped"];
    limosa(&migrate).fails(REFUSED, &["the source is as it was before"]);
    assert_eq!((source.state(), source.guest()), (State::Stop, GUEST));
    limosa(&[&migrate[..], &["--on-stop", "true"]].concat()).fails(2, &["--stopped", "--on-stop"]);
}

#[test]
fn a_move_that_was_repeated_rolled_the_running_guest_back() {
    let pair = Pair::new(&[], &[]);
    pair.migrate(&[]).ok();
    let moved = pair.migrate(&["--json", "--run"]);
    let refused = moved.json_failure(REFUSED);
    let said = refused["message"].as_str().unwrap();
    assert!(said.contains("its last move ") && said.contains(&pair.destination.socket), "{said}");
    // The guest goes on where it is.
    pair.destination.mark(GUEST + 1);
    let (link, file) = (format!("unix:{}", pair.folder.text("link")), pair.folder.text("file"));
    let (source, destination) = (pair.source.socket.as_str(), pair.destination.socket.as_str());
    for again in [
        &["migrate", source, destination][..],
        &["send", source, "--to", &link],
        &["save", source, &file],
        &["save", "--stop", source, &file],
    ] {
        let way_out = format!("`limosa state {source} set RUNNING`");
        limosa(again).fails(REFUSED, &[source, "is in STOP", "elsewhere", "--stopped", &way_out]);
        assert!(pair.destination.runs(GUEST + 1), "{again:?}");
        assert_eq!(pair.source.state(), State::Stop, "{again:?}");
    }
    assert!(!pair.folder.path("file").exists());
}

#[test]
fn devices_are_refused_together_with_what_to_do_about_each() {
    let pair = Pair::paused();
    let (second, other) = (pair.folder.device("second", &[]), pair.folder.device("other", &[]));
    limosa(&["state", &second.socket, "set", "STOP_COPY"]).ok();
    let more = ["--device", &second.socket, &other.socket];
    let refused = pair.migrate(&more);
    refused.fails(REFUSED, &[&pair.source.socket, "is in STOP", &second.socket, "is in STOP_COPY"]);
    pair.is_untouched();
    limosa(&["state", &second.socket, "set", "RUNNING"]).ok();
    second.mark(GUEST);
    pair.migrate(&[&more[..], &["--stopped"]].concat()).ok();
    pair.stands_there();
    assert!(other.runs(GUEST), "one that ran runs");
}

#[test]
fn what_a_killed_sender_left_was_to_be_reset() {
    for left in ["PRE_COPY", "PRE_COPY_P2P", "STOP_COPY"] {
        let pair = Pair::new(&[], &[]);
        let (source, destination) = (pair.source.socket.as_str(), pair.destination.socket.as_str());
        limosa(&["state", source, "set", left]).ok();
        let way_out = format!("`limosa state {source} set RUNNING`");
        let (link, file) = (format!("unix:{}", pair.folder.text("link")), pair.folder.text("file"));
        for next in [
            &["migrate", source, destination][..],
            &["send", source, "--to", &link],
            &["save", source, &file],
            // Where its guest is nothing is to be loaded either.
            &["migrate", destination, source],
            &["receive", source, "--listen", &link],
        ] {
            let refused = limosa(next);
            refused.fails(REFUSED, &[source, &format!("is in {left}"), "was killed", &way_out]);
            assert!(!refused.err.contains("reset"), "{refused:?}");
        }
        limosa(&["state", source, "set", "RUNNING"]).ok();
        assert!(pair.source.runs(GUEST), "{left}");
        pair.migrate(&[]).ok();
        assert!(pair.destination.runs(GUEST));
    }
}

#[test]
fn what_a_killed_receiver_left_is_emptied_by_a_reset() {
    let pair = Pair::new(&[], &[]);
    let destination = pair.destination.socket.as_str();
    limosa(&["state", destination, "set", "RESUMING"]).ok();
    let way_out = format!("`limosa state {destination} reset`");
    pair.migrate(&[]).fails(REFUSED, &[destination, "is in RESUMING", "was killed", &way_out]);
    limosa(&["state", destination, "reset"]).ok();
    pair.migrate(&[]).ok();
    assert!(pair.destination.runs(GUEST));
}
