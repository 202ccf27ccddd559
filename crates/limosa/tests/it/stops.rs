//! Guests that were stopped for a move, and the process that stopped them is signalled or killed: none stays stopped
//! without a note, and none for a signal that can be handled.

use std::path::Path;
use std::process::Stdio;

use crate::support::link::{Plan, Proxy};
use crate::support::pair::{Pair, Sending};
use crate::support::{
    Ended, Folder, GUEST, JsonOutput, Running, Server, limosa, limosa_into, start, start_by, vcpus,
};
use limosa_protocol::State;
use rustix::process::Signal;

const REFUSED: i32 = 3;
const CANCELLED: i32 = 7;
/// How long a device stalls. It says when it begins, so that this only has to be longer than a signal takes.
const STALL_MS: u32 = 800;

/// Where a move stands still, and its guest with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// The link is full.
    StopCopy,
    /// The destination's device loads.
    Load,
    /// The destination's device starts.
    Commit,
}

struct Scene {
    folder: Folder,
    source: Server,
    destination: Server,
    proxy: Option<Proxy>,
    sender: Option<Running>,
    receiver: Option<Running>,
    vcpus: Running,
}

impl Scene {
    fn at(at: At) -> Scene {
        Scene::with(at, &[])
    }

    /// `more` is what the source's device does as well.
    fn with(at: At, more: &[&str]) -> Scene {
        let stall = match at {
            At::StopCopy => "seed=2".to_owned(),
            At::Load => format!("fault=stall:RESUMING>STOP:{STALL_MS}"),
            At::Commit => format!("fault=stall:STOP>RUNNING_P2P:{STALL_MS}"),
        };
        let pair = Pair::new(&[&["state=8M", "precopy=0"], more].concat(), &["state=8M", &stall]);
        let (vcpus, here, there) = (vcpus(), pair.folder.text("here"), pair.folder.text("there"));
        let plan = (at == At::StopCopy).then_some(Plan::Hold(2 << 20));
        let stopping = ["--moves", &here, "--stop-with", &vcpus.pid()];
        let Sending { proxy, sender, receiver } = pair.send(plan, &["--moves", &there], &stopping);
        let Pair { folder, source, destination } = pair;
        match &proxy {
            Some(proxy) => proxy.held(),
            None => destination.line("stalls as scripted"),
        }
        if at != At::Commit {
            sender.line(if at == At::Load { "phase=\"load\"" } else { "phase=\"stop-copy\"" });
        }
        assert!(vcpus.is_stopped(), "{at:?}");
        let (sender, receiver) = (Some(sender), Some(receiver));
        Scene { folder, source, destination, proxy, sender, receiver, vcpus }
    }

    fn sender(&self) -> &Running {
        self.sender.as_ref().unwrap()
    }

    fn release(&self) {
        if let Some(proxy) = &self.proxy {
            proxy.release();
        }
    }

    fn resolve(&self, args: &[&str]) -> Ended {
        limosa(&[&["resolve", "--moves", &self.folder.text("here")], args].concat())
    }

    /// Everything is as before the move, and nothing is noted any more.
    #[track_caller]
    fn is_as_before(&self, what: &str) {
        assert!(!self.vcpus.is_stopped(), "{what}: the guest was left stopped");
        assert!(self.source.runs(GUEST), "{what}: {}", self.source.state());
        let left: Vec<_> = std::fs::read_dir(self.folder.path("here")).unwrap().collect();
        assert!(left.is_empty(), "{what}: {left:?}");
    }
}

#[test]
fn a_second_signal_in_the_undo_left_the_guest_stopped() {
    let stall = format!("fault=stall:STOP>RUNNING_P2P:{STALL_MS}");
    let mut scene = Scene::with(At::StopCopy, &[&stall]);
    scene.sender().signal(Signal::INT);
    scene.source.line("stalls as scripted");
    assert!(scene.vcpus.is_stopped(), "the undo has not come to it");
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::USR1] {
        scene.sender().signal(signal);
    }
    scene.sender().line("is being called off already");
    scene.release();
    scene.sender.take().unwrap().end().fails(CANCELLED, &["as it was before", "cancelled"]);
    scene.is_as_before("after many signals");
}

#[test]
fn signals_that_mean_nothing_to_a_move_ended_it() {
    let mut scene = Scene::at(At::StopCopy);
    for signal in [
        Signal::PIPE,
        Signal::USR1,
        Signal::USR2,
        Signal::ALARM,
        Signal::VTALARM,
        Signal::PROF,
        Signal::IO,
        Signal::XFSZ,
        Signal::POWER,
        Signal::STKFLT,
        Signal::TSTP,
        Signal::TTIN,
        Signal::TTOU,
    ] {
        scene.sender().signal(signal);
    }
    scene.sender().line("SIGTTOU is ignored");
    for real_time in ["-34", "-49", "-64"] {
        let sent = std::process::Command::new("kill").args([real_time, &scene.sender().pid()]).status();
        assert!(sent.unwrap().success());
        scene.sender().line("a signal is ignored");
    }
    scene.release();
    scene.sender.take().unwrap().end().ok();
    scene.receiver.take().unwrap().end().ok();
    assert!(scene.destination.runs(GUEST) && scene.source.state() == State::Stop);
    assert!(scene.vcpus.is_stopped(), "the guest is elsewhere");
    assert!(scene.resolve(&[]).ok().contains("no move is in doubt"));
}

#[test]
fn a_sender_that_was_killed_left_the_guest_stopped_and_nothing_remembered_it() {
    for at in [At::StopCopy, At::Load] {
        let mut scene = Scene::at(at);
        let (name, pid) = (scene.source.socket.clone(), scene.vcpus.pid());
        scene.sender.take().unwrap().kill();
        scene.release();
        assert!(scene.vcpus.is_stopped() && scene.source.state() == State::StopCopy, "{at:?}");
        let listed = scene.resolve(&[]).ok();
        assert!(listed.contains(&name) && listed.contains("stopped, and not moved"), "{at:?}: {listed}");
        assert!(listed.contains(&format!("process {pid} stopped")), "{at:?}: {listed}");
        let json = scene.resolve(&["--json"]).json();
        assert_eq!(json["stopped"][0]["stopped"][0]["pid"].to_string(), pid, "{json}");
        scene.resolve(&[&name, "--decide", "moved"]).fails(2, &["never came to its commit"]);
        scene.resolve(&[&name, "--to", "unix:/nowhere"]).fails(2, &["expected no --to"]);
        let resolved = scene.resolve(&[&name]).ok();
        assert!(resolved.contains("undone; it is as before the move"), "{resolved}");
        scene.is_as_before(&format!("{at:?}"));
        scene.resolve(&[&name]).fails(REFUSED, &["no move of this device is noted"]);
    }
}

/// How many notes there are of what is not settled.
fn unsettled(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_none_or(|end| end != "moved" && end != "loaded")).count()
}

#[test]
fn a_sender_that_is_killed_in_the_commit_leaves_one_note_and_the_destination_decides() {
    let mut scene = Scene::at(At::Commit);
    scene.sender.take().unwrap().kill();
    scene.receiver.as_ref().unwrap().line("the source may be in doubt");
    let json = scene.resolve(&["--json"]).json();
    assert_eq!(json["in_doubt"][0]["stopped"][0]["pid"].to_string(), scene.vcpus.pid(), "{json}");
    assert_eq!(json["stopped"].as_array().unwrap().len(), 0, "{json}");
    let resolved = scene.resolve(&[&scene.source.socket]).ok();
    assert!(resolved.contains("moved; it is stopped"), "{resolved}");
    scene.receiver.take().unwrap().end().ok();
    assert!(scene.vcpus.is_stopped() && scene.source.state() == State::Stop);
    assert_eq!(unsettled(&scene.folder.path("here")), 0);
}

#[test]
fn a_note_of_a_stop_that_a_doubt_has_replaced_lets_no_guest_go_on() {
    // As a process leaves it that dies between the two.
    let mut scene = Scene::at(At::Commit);
    scene.sender.take().unwrap().kill();
    let here = scene.folder.path("here");
    let doubt = std::fs::read_dir(&here).unwrap().next().unwrap().unwrap().path();
    let noted: serde_json::Value = serde_json::from_slice(&std::fs::read(&doubt).unwrap()).unwrap();
    let stop = noted["stop"].as_str().unwrap();
    let mut left = noted.clone();
    left["id"] = stop.into();
    let path = here.join(format!("{stop}.stopped"));
    std::fs::write(&path, left.to_string()).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let json = scene.resolve(&["--json"]).json();
    assert_eq!((&json["stopped"], json["in_doubt"].as_array().unwrap().len()), (&serde_json::json!([]), 1));
    scene.resolve(&["--id", stop]).fails(REFUSED, &["not noted as in doubt"]);
    assert!(scene.vcpus.is_stopped());
    scene.receiver.as_ref().unwrap().line("the source may be in doubt");
    scene.resolve(&[&scene.source.socket]).ok();
    assert_eq!(unsettled(&here), 0, "both are gone");
    assert!(scene.vcpus.is_stopped());
}

#[test]
fn a_move_that_still_goes_on_is_not_settled_by_another_process() {
    let mut scene = Scene::at(At::StopCopy);
    let name = scene.source.socket.clone();
    let listed = scene.resolve(&[]).ok();
    assert!(listed.contains("its command has not ended yet"), "{listed}");
    for args in [&[name.as_str()][..], &[&name, "--forget"]] {
        scene.resolve(args).fails(REFUSED, &["works on it still"]);
    }
    assert!(scene.vcpus.is_stopped());
    scene.release();
    scene.sender.take().unwrap().end().ok();
    scene.receiver.take().unwrap().end().ok();
    assert!(scene.resolve(&[]).ok().contains("no move is in doubt"));
}

#[test]
fn a_stop_is_noted_before_anything_is_stopped() {
    let (folder, vcpus) = (Folder::new(), vcpus());
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    source.mark(GUEST);
    let (moves, pid) = (folder.text("moves"), vcpus.pid());
    // The note is there, the process goes on, and both are in the note.
    let on_stop = format!(
        "grep -q '\"pid\":{pid}' {moves}/*.stopped && grep -q on_stop {moves}/*.stopped && \
         ! grep -q ') T' /proc/{pid}/stat"
    );
    let args = ["migrate", &source.socket, &destination.socket, "--moves", &moves, "--stop-with", &pid];
    limosa(&[&args[..], &["--on-stop", &on_stop]].concat()).ok();
    assert!(vcpus.is_stopped() && destination.runs(GUEST));
    assert_eq!(unsettled(Path::new(&moves)), 0);
    // What cannot be noted is not stopped.
    let file = folder.text("file");
    std::fs::write(&file, "no folder").unwrap();
    let other = crate::support::vcpus();
    let args = ["save", &destination.socket, &folder.text("saved"), "--stop-with", &other.pid()];
    limosa(&[&args[..], &["--moves", &file]].concat()).fails(4, &[&file, "--moves"]);
    assert!(!other.is_stopped() && destination.runs(GUEST));
}

#[test]
fn a_save_and_a_local_move_that_are_killed_leave_a_note_as_well() {
    for is_save in [true, false] {
        let (folder, vcpus) = (Folder::new(), vcpus());
        let stall = format!("fault=stall:PRE_COPY_P2P>STOP_COPY:{STALL_MS}");
        let (source, destination) = (folder.device("source", &[&stall]), folder.device("destination", &[]));
        source.mark(GUEST);
        let (moves, pid, file) = (folder.text("moves"), vcpus.pid(), folder.text("file"));
        let what: [&str; 3] = match is_save {
            true => ["save", &source.socket, &file],
            false => ["migrate", &source.socket, &destination.socket],
        };
        let process = start(&[&what[..], &["--moves", &moves, "--stop-with", &pid]].concat());
        source.line("stalls as scripted");
        process.kill();
        assert!(vcpus.is_stopped(), "{what:?}");
        // The server serves the next client when the stall is over.
        limosa(&["resolve", &source.socket, "--moves", &moves]).ok();
        assert!(!vcpus.is_stopped() && source.runs(GUEST), "{what:?}");
    }
}

#[test]
fn a_local_move_that_is_killed_in_its_commit_is_for_a_person_to_decide() {
    let (folder, vcpus) = (Folder::new(), vcpus());
    let stall = format!("fault=stall:STOP>RUNNING_P2P:{STALL_MS}");
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[&stall]));
    source.mark(GUEST);
    let (moves, pid) = (folder.text("moves"), vcpus.pid());
    let args = ["migrate", &source.socket, &destination.socket, "--moves", &moves, "--stop-with", &pid];
    let moving = start(&args);
    destination.line("stalls as scripted");
    moving.kill();
    let asked = limosa(&["resolve", &source.socket, "--moves", &moves]);
    asked.fails(5, &[&destination.socket, "nobody can be asked", "--decide"]);
    assert!(vcpus.is_stopped() && source.state() == State::StopCopy);
    limosa(&["state", &destination.socket, "reset"]).ok();
    limosa(&["resolve", &source.socket, "--moves", &moves, "--decide", "undone"]).ok();
    assert!(!vcpus.is_stopped() && source.runs(GUEST));
}

#[test]
fn a_device_that_stood_still_before_the_move_does_not_run_after_it_was_killed() {
    let (folder, vcpus) = (Folder::new(), vcpus());
    let stall = format!("fault=stall:RESUMING>STOP:{STALL_MS}");
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[&stall]));
    limosa(&["state", &source.socket, "set", "STOP"]).ok();
    let (moves, pid) = (folder.text("moves"), vcpus.pid());
    let args =
        ["migrate", &source.socket, &destination.socket, "--stopped", "--moves", &moves, "--stop-with", &pid];
    let moving = start(&args);
    destination.line("stalls as scripted");
    moving.kill();
    assert_eq!(source.state(), State::StopCopy);
    limosa(&["resolve", &source.socket, "--moves", &moves]).ok();
    assert!(!vcpus.is_stopped());
    assert_eq!(source.state(), State::Stop);
}

#[test]
fn a_process_that_cannot_be_set_going_stays_noted() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root can do without the right to signal");
        return;
    }
    let mut scene = Scene::at(At::StopCopy);
    scene.sender.take().unwrap().kill();
    scene.release();
    let name = scene.source.socket.clone();
    // The note is of a process of another user's, in another session.
    let mut other = std::process::Command::new("setsid");
    other.args(["setpriv", "--reuid", "65534", "--clear-groups", "sleep", "1000"]);
    let other = Running::start(&mut other);
    other.runs_program("sleep");
    let note = std::fs::read_dir(scene.folder.path("here")).unwrap().next().unwrap().unwrap().path();
    let mut noted: serde_json::Value = serde_json::from_slice(&std::fs::read(&note).unwrap()).unwrap();
    noted["stopped"][0]["pid"] = other.pid().parse::<u32>().unwrap().into();
    noted["stopped"][0]["started"] = other.started().into();
    std::fs::write(&note, noted.to_string()).unwrap();
    let without = ["--bounding-set", "-kill", "--inh-caps", "-kill"];
    let args = ["resolve", &name, "--moves", &scene.folder.text("here")];
    let resolved = start_by("setpriv", &without, &args).end();
    resolved.fails(1, &[&other.pid(), "it stays stopped", "not permitted"]);
    assert!(note.exists() && scene.source.runs(GUEST), "the device goes on, and the process stays noted");
    limosa(&args).ok();
    assert!(!note.exists());
}

#[test]
fn a_standard_error_that_nobody_reads_changed_the_exit_code() {
    let folder = Folder::new();
    let nowhere = folder.text("nowhere");
    let device = folder.device("device", &[]);
    let [file, text] = ["file", "text"].map(|name| folder.text(name));
    std::fs::write(&text, "no snapshot").unwrap();
    for (args, code) in [
        (&["state", nowhere.as_str()][..], 4),
        (&["-vvv", "state", &nowhere], 4),
        (&["send", &device.socket, "--to", &format!("unix:{nowhere}")], 4),
        (&["save", &device.socket, &file, "--on-stop", "exit 1"], 3),
        (&["-vv", "save", &device.socket, &file], 0),
        (&["inspect", &text], 6),
        (&["frobnicate"], 2),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(limosa_into(Stdio::null(), writer, args), code, "{args:?}");
    }
}

#[test]
fn a_command_that_was_started_to_outlive_its_terminal_is_not_called_off_by_its_end() {
    let (folder, vcpus) = (Folder::new(), vcpus());
    let source = folder.device("source", &[&format!("fault=stall:PRE_COPY_P2P>STOP_COPY:{STALL_MS}")]);
    let args = ["-vv", "save", &source.socket, &folder.text("file"), "--stop-with", &vcpus.pid()];
    let saving = start_by("nohup", &[], &args);
    source.line("stalls as scripted");
    saving.signal(Signal::HUP);
    saving.end().ok();
    assert!(!vcpus.is_stopped() && folder.path("file").exists());
}
