//! Moves in doubt whose guest was stopped by `limosa send`: what `limosa resolve` sets going, and what it leaves.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use crate::support::pair::{Pair, Sending};
use crate::support::{Folder, GUEST, Running, Server, limosa, start, vcpus};
use limosa_protocol::State;
use limosa_stream::{Header, Kind, PREFACE_BYTES};
use rustix::process::Signal;

/// A move that stands still in its commit: the destination's device stalls on its way to RUNNING.
struct Scene {
    folder: Folder,
    source: Server,
    destination: Server,
    vcpus: Running,
    sender: Running,
    receiver: Running,
}

impl Scene {
    /// `more` is what the destination's device does as well, and how the guest is stopped.
    fn new(faults: &[&str], stopping: &[&str]) -> Scene {
        let pair = Pair::new(&[], &[&["fault=stall:STOP>RUNNING_P2P:800"], faults].concat());
        let (vcpus, here, there) = (vcpus(), pair.folder.text("here"), pair.folder.text("there"));
        let pid = vcpus.pid();
        let stopping = [&["--moves", &here, "--stop-with", &pid], stopping].concat();
        let Sending { sender, receiver, .. } = pair.send(None, &["--moves", &there], &stopping);
        let Pair { folder, source, destination } = pair;
        destination.line("stalls as scripted");
        assert!(vcpus.is_stopped());
        Scene { folder, source, destination, vcpus, sender, receiver }
    }

    fn resolve(&self, args: &[&str]) -> crate::support::Ended {
        let here = self.folder.text("here");
        limosa(&[&["resolve", "--moves", &here], args].concat())
    }

    /// Answers for the receiver, which has ended.
    fn answer(&self) -> (Running, String) {
        let (listen, there) = (format!("unix:{}", self.folder.text("answers")), self.folder.text("there"));
        let answers = start(&["answer", "--listen", &listen, "--moves", &there]);
        answers.line("listening on");
        (answers, listen)
    }
}

#[test]
fn a_process_that_was_stopped_goes_on_when_the_destination_says_that_the_move_was_not_committed() {
    // The sender is gone with its COMMIT on the way, and the destination cannot start.
    let scene = Scene::new(&["fault=fail:RUNNING_P2P>RUNNING"], &[]);
    let name = scene.source.socket.clone();
    scene.sender.signal(Signal::KILL);
    scene.receiver.line("phase=\"undo\"");
    scene.receiver.line("was not loaded");
    assert!(scene.vcpus.is_stopped() && scene.source.state() == State::StopCopy);
    let listed = scene.resolve(&[]).ok();
    assert!(listed.contains(&name) && listed.contains(&scene.vcpus.pid()), "{listed}");
    let (answers, there) = scene.answer();
    let resolved = scene.resolve(&[&name, "--to", &there]).ok();
    assert!(resolved.contains("undone; it is as before the move"), "{resolved}");
    answers.line(": not committed");
    assert!(scene.source.runs(GUEST) && !scene.vcpus.is_stopped());
    assert!(!scene.destination.runs(GUEST));
}

#[test]
fn a_stranger_at_the_destination_s_address_settled_a_doubt() {
    let scene = Scene::new(&[], &[]);
    scene.sender.signal(Signal::KILL);
    scene.receiver.line("the source may be in doubt");
    let address = scene.folder.text("stranger");
    let listener = UnixListener::bind(&address).unwrap();
    let stranger = std::thread::spawn(move || {
        let (mut link, _) = listener.accept().unwrap();
        let mut preface = [0; PREFACE_BYTES];
        link.read_exact(&mut preface).unwrap();
        let outcome = 1_u32.to_le_bytes();
        let header = Header::new(Kind::OUTCOME, 0, 0, 0, &outcome);
        link.write_all(&[&preface[..], &header.encode(), &outcome].concat()).unwrap();
        // Until the other side is done.
        let _ = link.read_to_end(&mut Vec::new());
    });
    let name = scene.source.socket.clone();
    let resolved = scene.resolve(&[&name, "--to", &format!("unix:{address}")]);
    resolved.fails(5, &[&name, "OUTCOME: it carries no proof", "--decide"]);
    stranger.join().unwrap();
    assert!(scene.source.state() == State::StopCopy && scene.vcpus.is_stopped());
    // Nor is the destination's answer known without the note.
    let id = scene.resolve(&[]).ok().split_whitespace().next().unwrap().to_owned();
    let nowhere = scene.folder.text("nowhere");
    let to = format!("unix:{}", scene.folder.text("link"));
    let asked = limosa(&["resolve", &name, "--moves", &nowhere, "--id", &id, "--to", &to]);
    asked.fails(5, &["no secret of the move was noted", "--insecure", "--decide"]);
    assert!(scene.resolve(&[&name]).ok().contains("moved; it is stopped"));
    assert!(scene.source.state() == State::Stop && scene.vcpus.is_stopped());
}

#[test]
fn the_secret_of_a_move_in_doubt_is_in_its_note_and_nowhere_else() {
    let scene = Scene::new(&[], &[]);
    scene.receiver.signal(Signal::KILL);
    let sent = scene.sender.line("is stopped and in doubt");
    let notes = std::fs::read_dir(scene.folder.path("here")).unwrap().map(|entry| entry.unwrap().path());
    let note = notes.into_iter().find(|path| path.extension().is_some_and(|is| is == "doubt")).unwrap();
    assert_eq!(note.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let noted: serde_json::Value = serde_json::from_slice(&std::fs::read(&note).unwrap()).unwrap();
    let secret = noted["secret"].as_str().unwrap();
    assert_eq!(secret.len(), 64, "{noted}");
    let here = scene.folder.text("here");
    let listed = limosa(&["--json", "resolve", "--moves", &here]).ok();
    assert!(listed.contains(noted["id"].as_str().unwrap()), "{listed}");
    for said in [&listed, &scene.resolve(&[]).ok(), &sent] {
        assert!(!said.contains(&secret[..16]), "{said}");
    }
    // The receiver's record has it too, and it says as little.
    let record = scene.folder.path("there").join(format!("{}.move", noted["id"].as_str().unwrap()));
    assert_eq!(record.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let bytes = std::fs::read(record).unwrap();
    let digits: String = bytes[48..80].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(digits, secret);
}

#[test]
fn a_process_that_was_stopped_stays_so_when_the_move_was_committed() {
    let scene = Scene::new(&[], &[]);
    scene.sender.signal(Signal::KILL);
    scene.receiver.line("the source may be in doubt");
    let resolved = scene.resolve(&[&scene.source.socket]).ok();
    assert!(resolved.contains("moved; it is stopped"), "{resolved}");
    assert!(scene.source.state() == State::Stop && scene.vcpus.is_stopped());
    let Scene { receiver, destination, .. } = scene;
    receiver.end().ok();
    assert!(destination.runs(GUEST));
}

#[test]
fn whoever_decides_that_a_move_was_undone_sets_the_guest_going_by_its_command_as_well() {
    let scene = Scene::new(&[], &["--on-stop", "true"]);
    let (name, pid) = (scene.source.socket.clone(), scene.vcpus.pid());
    scene.receiver.signal(Signal::KILL);
    let said = scene.sender.line("is stopped and in doubt");
    assert!(
        said.contains(&format!("process {pid} stays stopped, and is set going by `limosa resolve`")),
        "{said}"
    );
    limosa(&["state", &scene.destination.socket, "reset"]).ok();
    // A command that does not do what it should is said so; the devices and the process run.
    let ran = scene.folder.text("ran");
    let command = format!("touch {ran}; exit 3");
    let resolved = scene.resolve(&[&name, "--decide", "undone", "--on-resume", &command]);
    resolved.fails(1, &["--on-resume", "exit status: 3"]);
    assert!(resolved.out.contains("undone"), "{resolved:?}");
    assert!(std::path::Path::new(&ran).exists());
    assert!(scene.source.runs(GUEST) && !scene.vcpus.is_stopped());
    assert!(!scene.resolve(&[]).ok().contains(&name), "nothing is left in doubt");
}

#[test]
fn a_command_that_stopped_the_guest_is_named_when_nothing_lets_it_go_on() {
    let scene = Scene::new(&[], &["--on-stop", "exit 0"]);
    scene.receiver.signal(Signal::KILL);
    scene.sender.line("is stopped and in doubt");
    limosa(&["state", &scene.destination.socket, "reset"]).ok();
    let resolved = scene.resolve(&[&scene.source.socket, "--decide", "undone"]);
    assert!(resolved.err.contains("stopped by `exit 0`: let it go on"), "{resolved:?}");
    resolved.ok();
}

#[test]
fn another_process_with_the_number_of_the_one_that_was_stopped_is_not_touched() {
    let scene = Scene::new(&[], &[]);
    let name = scene.source.socket.clone();
    scene.receiver.signal(Signal::KILL);
    scene.sender.line("is stopped and in doubt");
    limosa(&["state", &scene.destination.socket, "reset"]).ok();
    // As it would be if the number were given again: the process there began at another time.
    let folder = scene.folder.path("here");
    let record = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let record = record.into_iter().find(|path| path.extension().is_some_and(|is| is == "doubt")).unwrap();
    let mut doubt: serde_json::Value = serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    let started = &mut doubt["stopped"][0]["started"];
    *started = (started.as_u64().unwrap() + 1).into();
    std::fs::write(&record, doubt.to_string()).unwrap();
    let resolved = scene.resolve(&[&name, "--decide", "undone"]);
    resolved.fails(1, &[&scene.vcpus.pid(), "is gone"]);
    assert!(scene.source.runs(GUEST) && scene.vcpus.is_stopped());
}

#[test]
fn a_move_of_memory_alone_is_resolved_by_its_id_and_its_guest_goes_on() {
    let (folder, vcpus) = (Folder::new(), vcpus());
    let (from, to) = (folder.text("from"), folder.text("to"));
    for file in [&from, &to] {
        std::fs::write(file, vec![7; 1 << 20]).unwrap();
    }
    let (listen, here) = (format!("unix:{}", folder.text("link")), folder.text("here"));
    // Without devices there is nothing that stalls but the guest's start.
    let held = folder.text("held");
    rustix::fs::mknodat(rustix::fs::CWD, &held, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let there = format!("{to}@0");
    let start_guest = format!("cat {held}");
    let receiver = start(&["receive", "--memory", &there, "--listen", &listen, "--on-start", &start_guest]);
    receiver.line("listening on");
    let memory = format!("{from}@0");
    let pid = vcpus.pid();
    let args = ["send", "--memory", &memory, "--to", &listen, "--moves", &here, "--stop-with", &pid, "-v"];
    let sender = start(&args);
    // The guest's start opens the pipe, whose other end this opens.
    let pipe = std::fs::File::options().write(true).open(&held).unwrap();
    sender.kill();
    drop(pipe);
    receiver.kill();
    assert!(vcpus.is_stopped());
    let listed = limosa(&["resolve", "--moves", &here]).ok();
    assert!(listed.contains("the guest's memory ->") && listed.contains(&pid), "{listed}");
    let id = listed.split_whitespace().next().unwrap();
    limosa(&["resolve", "--moves", &here, "--id", id, "--decide", "undone"]).ok();
    assert!(!vcpus.is_stopped());
    let none = limosa(&["resolve", "--moves", &here, "--id", id, "--decide", "undone"]);
    none.fails(3, &[id, "not noted as in doubt"]);
}
