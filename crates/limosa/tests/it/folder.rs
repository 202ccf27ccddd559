//! The folder of moves, where it cannot be used or is not believed: a move that cannot be recorded is not made.

use std::os::unix::fs::PermissionsExt;

use crate::support::{Folder, GUEST, JsonOutput, limosa, limosa_with, on_a_disk, start};
use limosa_protocol::State;
use rustix::fs::{CWD, FileType, mknodat};
use rustix::process::Signal;

const REFUSED: i32 = 3;
const UNREACHABLE: i32 = 4;

fn chmod(path: &str, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Everything that needs the folder names it, and nothing is moved.
#[track_caller]
fn is_refused(variables: &[(String, String)], moves: &[&str], parts: &[&str]) {
    let folder = Folder::new();
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    source.mark(GUEST);
    let listen = format!("unix:{}", folder.text("link"));
    let run = |args: &[&str]| limosa_with(variables, &[args, moves].concat());
    run(&["receive", &destination.socket, "--listen", &listen]).fails(UNREACHABLE, parts);
    run(&["answer", "--listen", &listen]).fails(UNREACHABLE, &[parts, &["no record of moves"]].concat());
    run(&["resolve"]).fails(UNREACHABLE, parts);
    run(&["save", "--stop", &source.socket, &folder.text("file")]).fails(UNREACHABLE, parts);
    assert!(!folder.path("file").exists());
    let receiver = start(&["receive", &destination.socket, "--listen", &listen]);
    receiver.line("listening on");
    run(&["send", &source.socket, "--to", &listen]).fails(UNREACHABLE, parts);
    receiver.signal(Signal::INT);
    receiver.end();
    assert!(source.runs(GUEST) && destination.guest() == 0);
}

#[test]
fn a_folder_that_cannot_be_used_was_done_without() {
    let folder = Folder::new();
    let file = folder.text("file");
    std::fs::write(&file, "no folder").unwrap();
    is_refused(&[], &["--moves", &file], &[&file, "--moves"]);
    let state = [("XDG_STATE_HOME".to_owned(), file.clone())];
    is_refused(&state, &[], &[&format!("{file}/limosa/moves"), "--moves"]);
}

#[test]
fn a_folder_that_others_may_write_to_was_believed() {
    let folder = Folder::new();
    let moves = folder.text("moves");
    std::fs::create_dir(&moves).unwrap();
    for mode in [0o777, 0o770, 0o1777] {
        chmod(&moves, mode);
        is_refused(&[], &["--moves", &moves], &[&moves, "chmod 700", "--moves"]);
    }
}

#[test]
fn a_fifo_among_the_notes_held_up_the_command() {
    let folder = Folder::new();
    let moves = folder.text("moves");
    std::fs::create_dir(&moves).unwrap();
    for name in ["x.doubt", "00000000000000000000000000000000.move"] {
        mknodat(CWD, folder.path("moves").join(name), FileType::Fifo, 0o600.into(), 0).unwrap();
    }
    let listed = limosa(&["--json", "resolve", "--moves", &moves]);
    assert!(listed.err.contains("x.doubt: it is a FIFO"), "{listed:?}");
    assert_eq!(listed.json()["refused"][0]["file"], "x.doubt");
    let listen = format!("unix:{}", folder.text("link"));
    let answers = start(&["answer", "--listen", &listen, "--moves", &moves]);
    answers.line("listening on");
    answers.signal(Signal::INT);
    answers.end().ok();
}

#[test]
fn a_note_that_other_users_could_write_was_acted_upon() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    device.mark(GUEST);
    let moves = folder.text("moves");
    std::fs::create_dir(&moves).unwrap();
    let id = "00112233445566778899aabbccddeeff";
    let note = folder.path("moves").join(format!("{id}.doubt"));
    let text =
        format!(r#"{{"id": "{id}", "devices": ["{}"], "to": "unix:/nowhere", "since": 1}}"#, device.socket);
    std::fs::write(&note, text).unwrap();
    for mode in [0o644, 0o660, 0o606] {
        chmod(note.to_str().unwrap(), mode);
        for decision in ["moved", "undone"] {
            let resolved = limosa(&["resolve", &device.socket, "--decide", decision, "--moves", &moves]);
            resolved
                .fails(REFUSED, &["no move of this device is noted", note.to_str().unwrap(), "chmod 600"]);
        }
        assert_eq!(device.state(), State::Running);
    }
}

#[test]
fn a_move_that_could_not_be_recorded_was_committed() {
    for (side, code) in [("here", REFUSED), ("there", 1)] {
        let folder = Folder::new();
        let source = folder.device("source", &[]);
        // All is well at the start, and the folder is lost while the device loads.
        let destination = folder.device("destination", &["fault=stall:RESUMING>STOP:800"]);
        source.mark(GUEST);
        let (listen, here, there) =
            (format!("unix:{}", folder.text("link")), folder.text("here"), folder.text("there"));
        let receiver = start(&["receive", &destination.socket, "--listen", &listen, "--moves", &there]);
        receiver.line("listening on");
        let sender = start(&["send", &source.socket, "--to", &listen, "--moves", &here]);
        destination.line("stalls as scripted");
        std::fs::remove_dir_all(folder.path(side)).unwrap();
        let lost = folder.text(side);
        let sent = sender.end();
        sent.fails(code, &["as it was before", &lost]);
        let received = receiver.end();
        match side {
            "here" => {
                assert!(sent.err.contains("cannot be noted") && sent.err.contains("--moves"), "{sent:?}");
                received.fails(1, &["called the move off", &lost]);
            }
            _ => received.fails(UNREACHABLE, &["cannot be recorded, and is not committed", &lost, "--moves"]),
        }
        assert!(source.runs(GUEST) && !destination.runs(GUEST), "{side}");
    }
}

#[test]
fn a_full_folder_of_moves_was_found_when_the_guest_was_stopped_already() {
    let folder = Folder::new();
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    source.mark(GUEST);
    let (disk, file, was_stopped) = (folder.path("moves"), folder.text("file"), folder.path("was-stopped"));
    std::fs::create_dir(&disk).unwrap();
    let (moves, listen) = (folder.text("moves"), format!("unix:{}", folder.text("link")));
    let stop = format!("touch {}", was_stopped.display());
    for args in [
        &["save", "--stop", &source.socket, &file, "--on-stop", &stop][..],
        &["send", &source.socket, "--to", &listen, "--on-stop", &stop],
        &["migrate", &source.socket, &destination.socket, "--on-stop", &stop],
        &["receive", &destination.socket, "--listen", &listen],
    ] {
        let fill = "dd if=/dev/zero of=\"$0/fill\" bs=4k 2>/dev/null; exec \"$@\"";
        let args = [args, &["--moves", &moves]].concat();
        let Some(ended) = on_a_disk("size=64k,mode=700", &disk, fill, &args) else { return };
        ended.fails(1, &[&moves, "No space left", "make room"]);
        assert!(!was_stopped.exists() && source.runs(GUEST) && destination.runs(0), "{args:?}");
    }
    assert!(!folder.path("file").exists());
}

#[test]
fn a_receiver_that_could_not_record_a_move_said_so_when_the_guest_was_stopped_already() {
    let folder = Folder::new();
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    source.mark(GUEST);
    let (listen, there) = (format!("unix:{}", folder.text("link")), folder.text("there"));
    let receiver = start(&["receive", &destination.socket, "--listen", &listen, "--moves", &there]);
    receiver.line("listening on");
    std::fs::remove_dir_all(&there).unwrap();
    let was_stopped = folder.path("was-stopped");
    let stop = format!("touch {}", was_stopped.display());
    let sent = limosa(&["send", &source.socket, "--to", &listen, "--on-stop", &stop]);
    sent.fails(REFUSED, &["cannot be recorded", &there]);
    receiver.end().fails(UNREACHABLE, &["cannot be recorded", &there, "--moves"]);
    assert!(!was_stopped.exists() && source.runs(GUEST) && destination.runs(0));
}
