//! What `limosa resolve` does where something is not as the move left it: a device that is gone, another one with its name,
//! one that was driven since, a machine that was restarted.

use std::path::PathBuf;

use crate::support::{Ended, Folder, GUEST, JsonOutput, Running, Server, limosa, start, start_in, vcpus};
use limosa_protocol::State;
use rustix::process::Signal;
use serde_json::Value;

const REFUSED: i32 = 3;

/// A move of two devices in doubt, of which nobody can be asked.
struct Doubt {
    folder: Folder,
    one: Server,
    other: Server,
    there: Server,
    vcpus: Running,
}

impl Doubt {
    fn new() -> Doubt {
        let (folder, vcpus) = (Folder::new(), vcpus());
        std::fs::create_dir(folder.path("run")).unwrap();
        let (one, other) = (folder.device("run/one", &[]), folder.device("run/other", &[]));
        let (there, too) =
            (folder.device("there", &["fault=stall:STOP>RUNNING_P2P:800"]), folder.device("too", &[]));
        [&one, &other].into_iter().for_each(|device| device.mark(GUEST));
        let listen = format!("unix:{}", folder.text("link"));
        let moves = folder.text("there-moves");
        let receive = ["receive", &there.socket, "--device", &too.socket, "--listen", &listen];
        let receiver = start(&[&receive[..], &["--moves", &moves]].concat());
        receiver.line("listening on");
        // All names are relative to the folder in which the command runs.
        let moves = folder.text("moves");
        let send = ["send", "one", "--device", "other", "--to", "unix:../link", "--stop-with", &vcpus.pid()];
        let sender = start_in(&folder.path("run"), &[&send[..], &["--moves", &moves]].concat());
        there.line("stalls as scripted");
        receiver.kill();
        sender.end().fails(5, &["in doubt"]);
        Doubt { folder, one, other, there, vcpus }
    }

    fn resolve(&self, args: &[&str]) -> Ended {
        limosa(&[&["resolve", "--moves", &self.folder.text("moves")], args].concat())
    }

    fn note(&self) -> PathBuf {
        let mut entries = std::fs::read_dir(self.folder.path("moves")).unwrap();
        entries.next().expect("it is noted").unwrap().path()
    }

    fn id(&self) -> String {
        self.note().file_stem().unwrap().to_str().unwrap().to_owned()
    }

    fn edit(&self, edit: impl FnOnce(&mut Value)) {
        let mut noted = serde_json::from_slice(&std::fs::read(self.note()).unwrap()).unwrap();
        edit(&mut noted);
        std::fs::write(self.note(), noted.to_string()).unwrap();
    }

    #[track_caller]
    fn is_forgotten(&self) {
        assert!(self.resolve(&[]).ok().contains("no move is in doubt"));
        let notes = std::fs::read_dir(self.folder.path("moves")).unwrap();
        // A move that is done is remembered, and is no note of what is left to do.
        let is_open = |path: &std::path::PathBuf| path.extension().is_none_or(|end| end != "moved");
        assert_eq!(notes.map(|note| note.unwrap().path()).filter(is_open).count(), 0);
    }

    /// The server of a device is started anew, at the same path.
    fn serve_anew(&mut self) {
        self.one.kill();
        std::fs::remove_file(&self.one.socket).unwrap();
        self.one = self.folder.device("run/one", &[]);
        self.one.mark(7);
    }
}

#[test]
fn names_of_a_note_were_those_of_whatever_folder_it_was_resolved_in() {
    let doubt = Doubt::new();
    // There are other devices of these names where it is resolved.
    std::fs::create_dir(doubt.folder.path("elsewhere")).unwrap();
    let here = doubt.folder.device("elsewhere/one", &[]);
    here.mark(8);
    let resolve = |folder: &str, args: &[&str]| {
        let moves = doubt.folder.text("moves");
        start_in(&doubt.folder.path(folder), &[&["resolve", "--moves", &moves], args].concat()).end()
    };
    resolve("elsewhere", &["one", "--decide", "moved"]).fails(REFUSED, &["no move of this device is noted"]);
    resolve("elsewhere", &["one", "--id", &doubt.id(), "--decide", "moved"]).fails(2, &[&doubt.one.socket]);
    let listed = resolve("elsewhere", &[]).ok();
    assert!(
        listed.contains(&doubt.one.socket) && listed.contains(&doubt.folder.text("run/../link")),
        "{listed}"
    );
    limosa(&["state", &doubt.there.socket, "reset"]).ok();
    resolve("run", &["other", "--decide", "undone"]).ok();
    assert!(doubt.one.runs(GUEST) && doubt.other.runs(GUEST) && !doubt.vcpus.is_stopped());
    assert!(here.runs(8));
    doubt.is_forgotten();
}

#[test]
fn another_device_that_has_the_name_of_one_that_was_moved_was_stopped_in_its_stead() {
    for decision in ["moved", "undone"] {
        let mut doubt = Doubt::new();
        doubt.serve_anew();
        let resolved = doubt.resolve(&["--id", &doubt.id(), "--decide", decision]);
        assert!(resolved.err.contains("another device has this name now"), "{resolved:?}");
        assert!(doubt.one.runs(7), "{decision}: it is not touched");
        if decision == "moved" {
            assert!(resolved.out.contains(&format!("{}: moved; it is gone", doubt.one.socket)));
            resolved.ok();
            assert!(doubt.other.state() == State::Stop && doubt.vcpus.is_stopped());
        } else {
            resolved.fails(1, &["what it held is lost", "--forget"]);
            assert!(doubt.other.runs(GUEST) && !doubt.vcpus.is_stopped());
            doubt.resolve(&["--id", &doubt.id(), "--forget"]).ok();
        }
        doubt.is_forgotten();
    }
}

#[test]
fn a_device_that_was_gone_held_up_the_others_and_the_guest() {
    let mut doubt = Doubt::new();
    doubt.one.kill();
    let id = doubt.id();
    let resolved = doubt.resolve(&[&doubt.other.socket, "--decide", "undone"]);
    resolved.fails(1, &["undone, but not all of it", &doubt.one.socket, "it is gone", "--forget"]);
    assert!(resolved.out.contains(&format!("{}: undone; it is as before", doubt.other.socket)));
    assert!(doubt.other.runs(GUEST) && !doubt.vcpus.is_stopped());
    // It can be tried again, and changes nothing more.
    doubt.resolve(&["--id", &id, "--decide", "undone"]).fails(1, &["it is gone"]);
    assert!(doubt.resolve(&[]).ok().contains(&id));
    let dropped = doubt.resolve(&["--id", &id, "--forget"]).ok();
    assert!(dropped.contains("forgotten"), "{dropped}");
    doubt.is_forgotten();
    doubt.resolve(&["--id", &id, "--forget"]).fails(REFUSED, &["there is no note of this move"]);
}

#[test]
fn a_source_in_doubt_was_let_run_by_hand_without_a_word() {
    let doubt = Doubt::new();
    let state = doubt.folder.path("state/limosa");
    std::fs::create_dir_all(&state).unwrap();
    std::fs::rename(doubt.folder.path("moves"), state.join("moves")).unwrap();
    for act in [&["set", "RUNNING"][..], &["reset"]] {
        let state = |more: &[&str]| {
            let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_limosa"));
            command.args(["state", &doubt.one.socket]).args(act).args(more);
            Running::start(command.env("XDG_STATE_HOME", doubt.folder.path("state"))).end()
        };
        let said = "is in doubt, and its guest may run elsewhere";
        let before = doubt.one.state();
        state(&[]).fails(5, &[said, "--force"]);
        assert_eq!(doubt.one.state(), before);
        let ended = state(&["--force"]);
        assert!(ended.code == 0 && ended.err.contains(said), "{ended:?}");
    }
}

#[test]
fn a_guest_that_was_let_run_by_hand_and_moved_on_was_run_a_second_time() {
    let doubt = Doubt::new();
    let (id, moves) = (doubt.id(), doubt.folder.text("moves"));
    let [one_away, other_away] = ["one-away", "other-away"].map(|name| doubt.folder.device(name, &[]));
    for (device, away) in [(&doubt.one, &one_away), (&doubt.other, &other_away)] {
        limosa(&["state", &device.socket, "set", "RUNNING"]).ok();
        limosa(&["migrate", &device.socket, &away.socket, "--moves", &moves]).ok();
        assert!(away.runs(GUEST) && device.state() == State::Stop);
    }
    let resolved = doubt.resolve(&["--id", &id, "--decide", "undone"]);
    resolved.fails(REFUSED, &["would run it twice", &id, "--forget"]);
    assert!(doubt.one.state() == State::Stop && doubt.other.state() == State::Stop);
    doubt.resolve(&["--id", &id, "--forget"]).ok();
}

#[test]
fn an_earlier_move_of_the_same_second_was_taken_for_a_later_one() {
    let folder = Folder::new();
    let (source, there) =
        (folder.device("source", &[]), folder.device("there", &["fault=stall:STOP>RUNNING_P2P:800"]));
    source.mark(GUEST);
    let (moves, listen) = (folder.text("moves"), format!("unix:{}", folder.text("link")));
    limosa(&["save", "--stop", &source.socket, &folder.text("file"), "--moves", &moves]).ok();
    limosa(&["state", &source.socket, "set", "RUNNING"]).ok();
    let receiver = start(&["receive", &there.socket, "--listen", &listen]);
    receiver.line("listening on");
    let sender = start(&["send", &source.socket, "--to", &listen, "--moves", &moves]);
    there.line("stalls as scripted");
    receiver.kill();
    sender.end().fails(5, &["in doubt"]);
    let notes: Vec<_> = std::fs::read_dir(&moves).unwrap().map(|note| note.unwrap().path()).collect();
    assert_eq!(notes.len(), 2, "{notes:?}");
    for note in notes {
        let mut noted: Value = serde_json::from_slice(&std::fs::read(&note).unwrap()).unwrap();
        noted["since"] = 1_700_000_000.into();
        std::fs::write(note, noted.to_string()).unwrap();
    }
    limosa(&["resolve", &source.socket, "--moves", &moves, "--decide", "undone"]).ok();
    assert!(source.runs(GUEST));
}

#[test]
fn a_device_that_did_not_answer_held_up_the_others_and_the_guest() {
    let doubt = Doubt::new();
    let id = doubt.id();
    doubt.one.signal(Signal::STOP);
    let args = ["--timeout", "3", "--id", &id, "--decide", "undone"];
    doubt.resolve(&args).fails(4, &["undone, but not all of it", &doubt.one.socket, "within 3s"]);
    assert!(doubt.other.runs(GUEST) && !doubt.vcpus.is_stopped());
    // It is settled when it answers again.
    doubt.one.signal(Signal::CONT);
    doubt.resolve(&args).ok();
    assert!(doubt.one.runs(GUEST));
    doubt.is_forgotten();
}

#[test]
fn a_device_in_a_state_that_the_move_cannot_have_left_was_driven_all_the_same() {
    for (state, decision) in [("RUNNING", "moved"), ("RUNNING_P2P", "moved"), ("PRE_COPY", "undone")] {
        let doubt = Doubt::new();
        // Somebody uses it for something else.
        let path = if state == "PRE_COPY" { &["RUNNING", state][..] } else { &[state] };
        path.iter().for_each(|state| drop(limosa(&["state", &doubt.other.socket, "set", state]).ok()));
        let (name, id) = (doubt.other.socket.clone(), doubt.id());
        let resolved = doubt.resolve(&[&name, "--decide", decision]);
        resolved.fails(REFUSED, &[&format!("{name} is in {state}"), &id, "--forget"]);
        assert_eq!(doubt.other.state(), state.parse().unwrap());
        assert!(doubt.one.state() == State::StopCopy && doubt.vcpus.is_stopped(), "nothing is changed");
        assert!(doubt.note().exists());
    }
}

#[test]
fn a_note_of_another_boot_says_that_nothing_of_it_is_left() {
    let doubt = Doubt::new();
    doubt.edit(|noted| {
        noted["boot"] = "another".into();
        noted["stopped"][0]["boot"] = "another".into();
    });
    let listed = doubt.resolve(&[]).ok();
    assert!(listed.contains("this machine was restarted since"), "{listed}");
    assert_eq!(doubt.resolve(&["--json"]).json()["in_doubt"][0]["before_restart"], true);
    let resolved = doubt.resolve(&[&doubt.one.socket, "--decide", "undone"]);
    resolved.fails(1, &["restarted since", "what it held is lost", &doubt.vcpus.pid(), "--forget"]);
    assert!(
        doubt.vcpus.is_stopped() && doubt.one.state() == State::StopCopy,
        "they are not those of the note"
    );
    doubt.resolve(&["--id", &doubt.id(), "--decide", "moved"]).ok();
    doubt.is_forgotten();
}

#[test]
fn a_note_that_names_a_device_relative_to_an_unknown_folder_moves_none() {
    let doubt = Doubt::new();
    doubt.edit(|noted| {
        noted["devices"][0] = "one".into();
        noted["known"] = Value::Array(Vec::new());
    });
    let moves = doubt.folder.text("moves");
    let args = ["resolve", "--moves", &moves, "one", "--decide", "undone"];
    let resolved = start_in(&doubt.folder.path("run"), &args).end();
    resolved.fails(REFUSED, &["one: the note names it relative to a folder", "--forget"]);
    assert!(doubt.one.state() == State::StopCopy && doubt.other.runs(GUEST) && !doubt.vcpus.is_stopped());
}

#[test]
fn a_note_does_nothing_on_a_terminal_and_one_that_is_not_believed_can_be_dropped() {
    let doubt = Doubt::new();
    doubt.edit(|noted| noted["on_stop"] = "\x1b[2Jstop".into());
    let listed = doubt.resolve(&[]).ok();
    assert!(listed.contains(r"stopped by `\u{1b}[2Jstop`") && !listed.contains('\x1b'), "{listed}");
    let (id, note) = (doubt.id(), doubt.note());
    for text in ["", "{}", "[1, 2", r#"{"id": 7}"#] {
        std::fs::write(&note, text).unwrap();
        let listed = doubt.resolve(&["--json"]);
        assert!(listed.err.contains(note.to_str().unwrap()), "{listed:?}");
        assert_eq!(listed.json()["refused"].as_array().unwrap().len(), 1);
    }
    std::fs::File::options().write(true).open(&note).unwrap().set_len(1 << 32).unwrap();
    assert!(doubt.resolve(&[]).err.contains("4294967296 bytes"));
    doubt.resolve(&["--id", &id, "--forget"]).ok();
    doubt.is_forgotten();
    assert!(doubt.vcpus.is_stopped() && doubt.one.state() == State::StopCopy, "nothing else is done");
}

#[test]
fn a_move_whose_destination_does_not_answer_leaves_everything_as_it_is() {
    let doubt = Doubt::new();
    for folder in ["run", ""] {
        let moves = doubt.folder.text("moves");
        let args = ["resolve", "--moves", &moves, &doubt.one.socket];
        // The address is noted so that it holds in every folder.
        start_in(&doubt.folder.path(folder), &args).end().fails(4, &["cannot connect to", "limosa answer"]);
    }
    let there = doubt.folder.text("there-moves");
    let listen = format!("unix:{}", doubt.folder.text("run/../link"));
    let answers = start(&["answer", "--listen", &listen, "--moves", &there]);
    answers.line("listening on");
    let args = ["resolve", "--moves", &doubt.folder.text("moves"), &doubt.one.socket];
    start_in(&doubt.folder.path(""), &args).end().fails(5, &["does not know either", "--decide"]);
    answers.signal(Signal::INT);
    answers.end().ok();
    assert!(doubt.vcpus.is_stopped() && doubt.note().exists());
    assert!([&doubt.one, &doubt.other].iter().all(|device| device.state() == State::StopCopy));
}
