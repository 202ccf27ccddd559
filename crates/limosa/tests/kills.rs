//! Each of the four processes of a move killed in each phase, links cut, moves called off. Whoever
//! survives says what happened, the other side's device is usable, and the guest never runs twice.

mod support;

use limosa_models::synthetic::registers;
use limosa_protocol::State;
use rustix::process::Signal;
use support::link::{Plan, Proxy};
use support::pair::{Pair, Sending};
use support::{Folder, GUEST, JsonOutput, Running, Server, limosa, start};

/// How long a device stalls where it is the stall that holds a phase open. It says when it begins, so that
/// this only has to be longer than a signal takes.
const STALL_MS: u32 = 800;

/// A move that stands still in a phase.
struct Scene {
    folder: Folder,
    source: Server,
    destination: Server,
    proxy: Option<Proxy>,
    sender: Running,
    receiver: Running,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Handshake,
    PreCopy,
    StopCopy,
    Load,
    Commit,
}

impl Scene {
    fn at(at: At) -> Scene {
        Scene::at_with(at, &[])
    }

    /// The same with further arguments for the sender.
    fn at_with(at: At, more: &[&str]) -> Scene {
        let precopy = if at == At::StopCopy { "precopy=0" } else { "precopy=100" };
        let stall = match at {
            At::Load => format!("fault=stall:RESUMING>STOP:{STALL_MS}"),
            At::Commit => format!("fault=stall:STOP>RUNNING_P2P:{STALL_MS}"),
            _ => "seed=2".into(),
        };
        let pair = Pair::new(&["state=8M", precopy], &["state=8M", &stall]);
        let plan = match at {
            At::Handshake => Some(Plan::Hold(1)),
            At::PreCopy | At::StopCopy => Some(Plan::Hold(2 << 20)),
            _ => None,
        };
        let Sending { proxy, sender, receiver } = pair.send(plan, &[], more);
        let Pair { folder, source, destination } = pair;
        if let Some(proxy) = &proxy {
            proxy.held();
        }
        match at {
            At::Handshake => {}
            At::PreCopy => drop(sender.line("phase=\"pre-copy\"")),
            At::StopCopy => drop(sender.line("phase=\"stop-copy\"")),
            At::Load => {
                // A device may finish what it has before the SUM has come.
                drop(sender.line("phase=\"load\""));
                destination.line("stalls as scripted");
            }
            At::Commit => destination.line("stalls as scripted"),
        }
        Scene { folder, source, destination, proxy, sender, receiver }
    }

    fn release(&self) {
        if let Some(proxy) = &self.proxy {
            proxy.release();
        }
    }
}

/// The source goes on with the guest, and can be moved.
#[track_caller]
fn source_goes_on(source: &Server, folder: &Folder) {
    assert!(source.runs(GUEST), "{} {:#x}", source.state(), source.guest());
    let next = folder.device("next", &["state=8M"]);
    limosa(&["migrate", &source.socket, &next.socket]).ok();
    assert!(next.runs(GUEST) && source.state() == State::Stop);
    assert_eq!(next.register(registers::BAD_BLOCKS), 0);
}

/// A source that nobody drives any more can be set to run by hand.
#[track_caller]
fn source_can_be_run_again(source: &Server, folder: &Folder) {
    limosa(&["state", &source.socket, "set", "RUNNING"]).ok();
    source_goes_on(source, folder);
}

#[track_caller]
fn destination_is_empty(destination: &Server, folder: &Folder) {
    assert_eq!((destination.state(), destination.guest()), (State::Running, 0));
    destination.is_usable(folder);
}

const AT_WORK: [At; 3] = [At::Handshake, At::PreCopy, At::StopCopy];

#[test]
fn the_source_server_killed_before_the_stop_is_over_ends_the_move() {
    for at in AT_WORK {
        let mut scene = Scene::at(at);
        scene.source.kill();
        scene.release();
        scene.sender.end().fails(
            4,
            &[&scene.source.socket, "connection lost", "not all is as it was", "set RUNNING` brings it back"],
        );
        scene
            .receiver
            .end()
            .fails(1, &["called the move off", &scene.source.socket, &scene.destination.socket]);
        destination_is_empty(&scene.destination, &scene.folder);
    }
}

#[test]
fn the_source_server_killed_when_all_was_read_does_not_hinder_the_move() {
    for at in [At::Load, At::Commit] {
        let mut scene = Scene::at(at);
        scene.source.kill();
        let ended = scene.sender.end();
        assert!(ended.err.contains(&scene.source.socket) && ended.err.contains("must not run"), "{ended:?}");
        ended.ok();
        scene.receiver.end().ok();
        assert!(scene.destination.runs(GUEST));
        assert_eq!(scene.destination.register(registers::BAD_BLOCKS), 0);
    }
}

#[test]
fn the_destination_server_killed_before_the_commit_leaves_the_source_running() {
    for at in [At::Handshake, At::PreCopy, At::StopCopy, At::Load] {
        let mut scene = Scene::at(at);
        scene.destination.kill();
        scene.release();
        let code = if at == At::Handshake { 3 } else { 1 };
        scene.sender.end().fails(code, &[&scene.destination.socket, "connection lost", "as it was before"]);
        let received = scene.receiver.end();
        received.fails(4, &[&scene.destination.socket, "connection lost"]);
        if at != At::Handshake {
            received.fails(4, &[&format!("`limosa state {} reset` empties it", scene.destination.socket)]);
        }
        source_goes_on(&scene.source, &scene.folder);
    }
}

#[test]
fn the_destination_server_killed_in_the_commit_leaves_the_source_in_doubt() {
    let mut scene = Scene::at(At::Commit);
    scene.destination.kill();
    scene.receiver.end().fails(4, &[&scene.destination.socket, "was committed", "reset it"]);
    scene.sender.end().fails(5, &[&scene.source.socket, "in doubt", "only if it does not", "RUNNING"]);
    assert_eq!(scene.source.state(), State::StopCopy);
    source_can_be_run_again(&scene.source, &scene.folder);
}

#[test]
fn the_sender_killed_before_the_commit_leaves_a_source_that_can_be_run_and_an_empty_destination() {
    for (at, state) in [
        (At::Handshake, State::Running),
        (At::PreCopy, State::PreCopy),
        (At::StopCopy, State::StopCopy),
        (At::Load, State::StopCopy),
    ] {
        let scene = Scene::at(at);
        scene.sender.kill();
        if let Some(proxy) = &scene.proxy {
            proxy.release();
        }
        // If its offer was not complete it was nobody's move. If all was loaded before it was noticed, it might have sent
        // COMMIT.
        let waits = ["passed over", "the source may be in doubt"];
        let waits = scene.receiver.says_one_of(&waits).inspect(|_| scene.receiver.signal(Signal::INT));
        let ended = scene.receiver.end();
        match waits.is_some_and(|line| line.contains("passed over")) {
            true => ended.fails(7, &["cancelled"]),
            false => ended.fails(4, &["the link to", &scene.destination.socket, "was not loaded"]),
        }
        assert_eq!(scene.source.state(), state);
        destination_is_empty(&scene.destination, &scene.folder);
        source_can_be_run_again(&scene.source, &scene.folder);
    }
}

#[test]
fn the_sender_killed_in_the_commit_leaves_only_the_destination_running() {
    let scene = Scene::at(At::Commit);
    scene.sender.kill();
    scene.receiver.line("the source may be in doubt");
    scene.receiver.signal(Signal::INT);
    assert!(scene.receiver.end().ok().contains("may not know"));
    assert!(scene.destination.runs(GUEST));
    assert_eq!(scene.source.state(), State::StopCopy);
    limosa(&["state", &scene.source.socket, "set", "STOP"]).ok();
    scene.source.is_usable(&scene.folder);
}

#[test]
fn the_receiver_killed_before_the_commit_leaves_the_source_running() {
    for at in [At::Handshake, At::PreCopy, At::StopCopy, At::Load] {
        let scene = Scene::at(at);
        scene.receiver.kill();
        if let Some(proxy) = &scene.proxy {
            proxy.release();
        }
        scene.sender.end().fails(4, &["the link to", "as it was before"]);
        assert!(!scene.destination.runs(GUEST));
        scene.destination.is_usable(&scene.folder);
        source_goes_on(&scene.source, &scene.folder);
    }
}

#[test]
fn the_receiver_killed_in_the_commit_leaves_the_source_in_doubt_and_stopped() {
    let scene = Scene::at(At::Commit);
    scene.receiver.kill();
    scene.sender.end().fails(5, &[&scene.source.socket, "in doubt", "Look there"]);
    assert_eq!(scene.source.state(), State::StopCopy);
    scene.destination.is_usable(&scene.folder);
    source_can_be_run_again(&scene.source, &scene.folder);
}

#[test]
fn a_move_in_doubt_is_resolved_after_both_processes_are_gone() {
    // The sender dies with its COMMIT on the way, the receiver after it has run: it has noted that.
    let scene = Scene::at(At::Commit);
    scene.sender.kill();
    scene.receiver.line("the source may be in doubt");
    scene.receiver.kill();
    assert!(scene.destination.runs(GUEST));
    let name = &scene.source.socket;
    let listed = limosa(&["resolve"]).ok();
    assert!(listed.contains(name.as_str()), "{listed}");
    let asked = limosa(&["resolve", name]);
    asked.fails(4, &["cannot connect to", "limosa answer"]);
    assert_eq!(scene.source.state(), State::StopCopy, "still in doubt");
    let there = format!("unix:{}", scene.folder.text("answers"));
    let answers = start(&["answer", "--listen", &there]);
    answers.line("listening on");
    let resolved = limosa(&["resolve", name, "--to", &there]).ok();
    assert!(resolved.contains("moved"), "{resolved}");
    assert_eq!(scene.source.state(), State::Stop);
    answers.line(": committed");
    answers.signal(Signal::INT);
    answers.end().ok();
    assert!(!limosa(&["resolve"]).ok().contains(name.as_str()), "forgotten");
    limosa(&["resolve", name]).fails(3, &[name, "no move of this device"]);
}

#[test]
fn a_move_whose_receiver_died_while_it_started_is_for_a_person_to_decide() {
    let scene = Scene::at_with(At::Commit, &["--json"]);
    scene.receiver.kill();
    let name = &scene.source.socket;
    let sent = scene.sender.end();
    sent.fails(5, &[name, "in doubt", "limosa resolve"]);
    assert_eq!(sent.json_failure(5)["report"]["outcome"], "in doubt");
    let there = format!("unix:{}", scene.folder.text("answers"));
    let answers = start(&["--json", "answer", "--listen", &there]);
    answers.line("listening on");
    for _ in 0..2 {
        limosa(&["resolve", name, "--to", &there]).fails(5, &[name, "does not know either", "--decide"]);
    }
    answers.line("not known");
    answers.signal(Signal::INT);
    let said = answers.end().ok();
    let lines: Vec<serde_json::Value> =
        said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2, "a document in a line for each answer: {said}");
    assert!(lines.iter().all(|line| line["outcome"] == "not known"), "{said}");
    assert_eq!(scene.source.state(), State::StopCopy);
    let document = limosa(&["--json", "resolve"]).json();
    let noted =
        document["in_doubt"].as_array().unwrap().iter().find(|doubt| doubt["devices"][0] == name.as_str());
    let id = noted.unwrap()["id"].as_str().unwrap().to_owned();
    limosa(&["resolve", name, "--id", "17"]).fails(2, &["--id 17", "32 hexadecimal digits"]);
    // Somebody has seen to it that the destination does not run.
    scene.destination.is_usable(&scene.folder);
    let decided = limosa(&["resolve", name, "--id", &id, "--decide", "undone"]).ok();
    assert!(decided.contains("as before the move"), "{decided}");
    source_goes_on(&scene.source, &scene.folder);
}

#[test]
fn servers_that_are_dead_before_the_move_are_named() {
    let folder = Folder::new();
    let (mut dead, alive) = (folder.device("dead", &[]), folder.device("alive", &[]));
    alive.mark(GUEST);
    dead.kill();
    for (from, to) in [(&dead, &alive), (&alive, &dead)] {
        limosa(&["migrate", &from.socket, &to.socket]).fails(4, &[&dead.socket, "is its server running?"]);
        assert!(alive.runs(GUEST));
    }
}

#[test]
fn a_sender_that_is_interrupted_cancels_and_the_source_runs_again() {
    for signal in [Signal::INT, Signal::TERM] {
        let folder = Folder::new();
        let source = folder.device("source", &[&format!("fault=stall:RUNNING>PRE_COPY:{STALL_MS}")]);
        let destination = folder.device("destination", &[]);
        source.mark(GUEST);
        let listen = format!("unix:{}", folder.text("link"));
        let receiver = start(&["receive", &destination.socket, "--listen", &listen]);
        receiver.line("listening on");
        let sender = start(&["-vv", "send", &source.socket, "--to", &listen]);
        source.line("stalls as scripted");
        sender.signal(signal);
        sender.end().fails(7, &["as it was before", "cancelled"]);
        receiver.end().fails(7, &["called the move off", "cancelled", &destination.socket]);
        assert!(source.runs(GUEST));
        destination_is_empty(&destination, &folder);
        limosa(&["migrate", &source.socket, &destination.socket]).ok();
        assert!(destination.runs(GUEST) && source.state() == State::Stop);
    }
}

#[test]
fn a_sender_that_is_interrupted_while_the_link_is_full_cancels_too() {
    for at in [At::PreCopy, At::StopCopy] {
        let scene = Scene::at(at);
        scene.sender.signal(Signal::INT);
        scene.sender.line("phase=\"undo\"");
        scene.release();
        scene.sender.end().fails(7, &["as it was before", "cancelled"]);
        let ended = scene.receiver.end();
        assert!([4, 6, 7].contains(&ended.code), "{ended:?}");
        destination_is_empty(&scene.destination, &scene.folder);
        source_goes_on(&scene.source, &scene.folder);
    }
}

#[test]
fn a_receiver_that_is_interrupted_cancels_and_the_source_runs_again() {
    let scene = Scene::at(At::Load);
    scene.receiver.signal(Signal::INT);
    scene.receiver.end().fails(7, &["cancelled", &scene.destination.socket]);
    scene.sender.end().fails(7, &["called the move off", "as it was before"]);
    destination_is_empty(&scene.destination, &scene.folder);
    source_goes_on(&scene.source, &scene.folder);
    // One that still waits for a sender ends at once.
    let listen = format!("unix:{}", scene.folder.text("link"));
    let receiver = start(&["receive", &scene.destination.socket, "--listen", &listen]);
    receiver.line("listening on");
    receiver.signal(Signal::INT);
    receiver.end().fails(7, &["cancelled"]);
    assert!(!scene.folder.path("link").exists());
}

#[test]
fn a_server_killed_in_a_save_or_load_is_named_and_no_file_appears() {
    let folder = Folder::new();
    let good = folder.device("good", &[]);
    let file = folder.text("file");
    limosa(&["save", &good.socket, &file]).ok();
    let stall = |arc: &str| format!("fault=stall:{arc}:{STALL_MS}");

    let mut device = folder.device("device", &[&stall("PRE_COPY_P2P>STOP_COPY")]);
    let saving = start(&["save", &device.socket, &folder.text("other")]);
    device.line("stalls as scripted");
    device.kill();
    saving.end().fails(4, &[&device.socket, "connection lost", "not all is as it was before"]);
    assert!(!folder.path("other").exists());

    let mut device = folder.device("device", &[&stall("RESUMING>STOP")]);
    let loading = start(&["load", &file, &device.socket]);
    device.line("stalls as scripted");
    device.kill();
    loading.end().fails(4, &[&file, &device.socket, "connection lost", "was not loaded"]);
    good.is_usable(&folder);
}

#[test]
fn a_save_that_is_interrupted_leaves_the_device_as_it_was_and_no_file() {
    let folder = Folder::new();
    let device = folder.device("device", &[&format!("fault=stall:RUNNING>PRE_COPY:{STALL_MS}")]);
    device.mark(GUEST);
    let saving = start(&["save", &device.socket, &folder.text("file")]);
    device.line("stalls as scripted");
    saving.signal(Signal::INT);
    saving.end().fails(7, &["as it was before", "cancelled"]);
    assert!(device.runs(GUEST));
    assert_eq!(std::fs::read_dir(folder.path("")).unwrap().count(), 1, "nothing is left behind");
}

#[test]
fn a_load_that_is_interrupted_leaves_a_device_that_was_reset() {
    let folder = Folder::new();
    let saved = folder.device("saved", &[]);
    let device = folder.device("device", &[&format!("fault=stall:STOP>RESUMING:{STALL_MS}")]);
    saved.mark(GUEST);
    let file = folder.text("file");
    limosa(&["save", &saved.socket, &file]).ok();
    let loading = start(&["load", &file, &device.socket]);
    device.line("stalls as scripted");
    loading.signal(Signal::INT);
    loading.end().fails(7, &[&file, "was not loaded", "cancelled"]);
    assert_eq!((device.state(), device.guest()), (State::Running, 0));
    limosa(&["load", &file, &device.socket]).ok();
    assert!(device.runs(GUEST));
}

/// What is left after a link was cut: who runs the guest.
struct Cut {
    folder: Folder,
    source: Server,
    destination: Server,
}

/// Bytes of COMMIT, and of DONE.
const WORD: u64 = 64;

impl Cut {
    fn new() -> Cut {
        let folder = Folder::new();
        let source = folder.device("source", &["state=2M", "precopy=50"]);
        let destination = folder.device("destination", &["state=2M", "precopy=50"]);
        Cut { folder, source, destination }
    }

    /// One move over a link that is cut. Gives the bytes that passed each way, and the sender's code.
    fn with(&self, plan: Plan) -> ((u64, u64), i32) {
        for device in [&self.source, &self.destination] {
            let client = device.client();
            limosa_client::Device::reset(&client).unwrap();
        }
        self.source.mark(GUEST);
        let listen = format!("unix:{}", self.folder.text("link"));
        let receiver = start(&["receive", &self.destination.socket, "--listen", &listen]);
        receiver.line("listening on");
        let proxy = Proxy::new(&self.folder, &listen, plan);
        // With it, no two moves have the same bytes at the same place.
        let sender = start(&["send", &self.source.socket, "--to", &proxy.address, "--no-precopy"]);
        let sent = sender.end();
        // Before its offer was complete it was nobody's move, and another sender may come. At the commit the receiver may have
        // to answer and stays; the sender has ended and will not ask any more.
        if receiver.says_one_of(&["passed over", "the source may be in doubt"]).is_some() {
            receiver.signal(Signal::INT);
        }
        let received = receiver.end();
        let (source, destination) = (&self.source, &self.destination);
        let said = format!("{plan:?}: {sent:?} {received:?}");
        match (sent.code, received.code) {
            (0, 0) => {
                assert!(destination.runs(GUEST) && source.state() == State::Stop, "{said}");
            }
            // Only where the answer to COMMIT is what was lost.
            (5, 0) => {
                assert!(destination.runs(GUEST) && source.state() == State::StopCopy, "{said}");
            }
            (4, 4 | 7) => {
                assert!(source.runs(GUEST), "{said}");
                assert!(destination.state() == State::Running && destination.guest() == 0, "{said}");
                assert!(sent.err.contains("as it was before"), "{said}");
            }
            _ => panic!("{said}"),
        }
        (proxy.counts(), sent.code)
    }
}

#[test]
fn a_link_that_is_cut_anywhere_leaves_one_that_runs() {
    let cut = Cut::new();
    let ((all, _), code) = cut.with(Plan::Pass);
    assert_eq!(code, 0);
    assert!(all > 2 << 20, "{all}");
    // DONE, with its proof, comes after COMMIT, when both know that the move is over.
    let out = all - WORD;
    assert_eq!(cut.with(Plan::Cut(all - 1)).1, 0);
    for at in [
        1,
        39,
        40,
        50,
        72,
        200,
        400,
        5000,
        600_000,
        1_500_000,
        out - WORD - 33,
        out - WORD,
        out - 33,
        out - 32,
        out - 1,
    ] {
        let (_, code) = cut.with(Plan::Cut(at));
        assert_eq!(code, 4, "after {at} of {out} bytes");
    }
}

#[test]
fn a_link_that_is_cut_on_the_way_back_leaves_one_that_runs() {
    let cut = Cut::new();
    let ((_, back), code) = cut.with(Plan::Pass);
    assert_eq!(code, 0);
    for at in (1..back).step_by(13).chain([back - 1]) {
        cut.with(Plan::CutBack(at));
    }
    assert_eq!(cut.with(Plan::CutBack(back)).1, 0);
}
