//! Every signal that calls a move off, once and twice, at every phase in which the guest stands still, to either side: no
//! guest stays stopped that was not moved, and none runs twice.

use std::path::PathBuf;

use crate::support::link::{Plan, Proxy};
use crate::support::pair::{Pair, Sending};
use crate::support::{Folder, GUEST, Running, Server, limosa, vcpus};
use limosa_protocol::State;
use rustix::process::Signal;

const IN_DOUBT: i32 = 5;
const CANCELLED: i32 = 7;
const SIGNALS: [Signal; 5] = [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM, Signal::XCPU];
/// How long a device stalls. It says when it begins, so that this only has to be longer than signals take.
const STALL_MS: u32 = 600;

/// What the move is at while the guest stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// `--on-stop` runs.
    Hook,
    /// The source's device stops.
    Stop,
    /// The link is full.
    StopCopy,
    /// The destination's device loads.
    Load,
    /// The destination's device starts.
    Commit,
    /// `--on-start` runs.
    Start,
}

struct Scene {
    folder: Folder,
    source: Server,
    destination: Server,
    proxy: Option<Proxy>,
    sender: Running,
    receiver: Running,
    vcpus: Running,
    /// What a hook waits for.
    held: PathBuf,
}

impl Scene {
    fn at(at: At) -> Scene {
        let stall = |there: bool, arc: &str| match there {
            true => format!("fault=stall:{arc}:{STALL_MS}"),
            false => "precopy=0".to_owned(),
        };
        let here = stall(at == At::Stop, "PRE_COPY_P2P>STOP_COPY");
        let there = match at {
            At::Load => stall(true, "RESUMING>STOP"),
            at => stall(at == At::Commit, "STOP>RUNNING_P2P"),
        };
        let pair = Pair::new(&["state=8M", &here], &["state=8M", &there]);
        let (folder, vcpus) = (&pair.folder, vcpus());
        let held = folder.path("held");
        rustix::fs::mknodat(rustix::fs::CWD, &held, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let hook = format!("echo runs >&2; cat {}", held.display());
        let (here, there, pid) = (folder.text("here"), folder.text("there"), vcpus.pid());
        let (mut receive, mut send) = (vec!["--moves", &there], vec!["--moves", &here, "--stop-with", &pid]);
        match at {
            At::Start => receive.extend(["--on-start", &hook]),
            At::Hook => send.extend(["--on-stop", &hook]),
            _ => {}
        }
        let plan = (at == At::StopCopy).then_some(Plan::Hold(2 << 20));
        let Sending { proxy, sender, receiver } = pair.send(plan, &receive, &send);
        let Pair { folder, source, destination } = pair;
        match at {
            At::Hook => drop(sender.line("runs")),
            At::Start => drop(receiver.line("runs")),
            At::Stop => source.line("stalls as scripted"),
            At::StopCopy => proxy.as_ref().unwrap().held(),
            At::Load | At::Commit => destination.line("stalls as scripted"),
        }
        Scene { folder, source, destination, proxy, sender, receiver, vcpus, held }
    }

    fn release(&self) {
        if let Some(proxy) = &self.proxy {
            proxy.release();
        }
    }

    fn notes(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path("here")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.ends_with(".moved")).collect()
    }

    /// Whether the guest is as before the move.
    fn is_undone(&self) -> bool {
        self.source.runs(GUEST) && !self.vcpus.is_stopped() && !self.destination.runs(GUEST)
    }

    /// Whether the guest is at the destination alone.
    fn is_moved(&self) -> bool {
        let is_here = self.source.state() == State::Running || !self.vcpus.is_stopped();
        self.destination.runs(GUEST) && !is_here
    }
}

/// Sends all signals at this phase, each once and each twice, to the sender or to the receiver. The signals have scenes of their own,
/// side by side, as each scene mostly waits.
fn signals_at(at: At, to_sender: bool) {
    std::thread::scope(|scope| {
        for signal in SIGNALS {
            scope.spawn(move || signal_at(at, to_sender, signal));
        }
    });
}

fn signal_at(at: At, to_sender: bool, signal: Signal) {
    for times in [1, 2] {
        let what =
            format!("{times} x {signal:?} to {} at {at:?}", if to_sender { "sender" } else { "receiver" });
        let scene = Scene::at(at);
        let told = if to_sender { &scene.sender } else { &scene.receiver };
        told.signal(signal);
        if times == 2 {
            // Two at once may be one. Where the undo says that it has begun, the second one comes in it.
            if to_sender && matches!(at, At::Stop | At::StopCopy | At::Load) {
                told.line("phase=\"undo\"");
            }
            told.signal(signal);
        }
        // A hook is not cut short: it ends as it would.
        if let At::Hook | At::Start = at {
            drop(std::fs::File::options().write(true).open(&scene.held).unwrap());
        }
        if at == At::StopCopy {
            scene.sender.line("phase=\"undo\"");
        }
        scene.release();
        let Scene { sender, receiver, .. } = &scene;
        for side in [sender, receiver] {
            side.says("no line says this, so this is its end");
        }
        let is_before_commit = !matches!(at, At::Commit | At::Start);
        if is_before_commit {
            assert!(scene.is_undone(), "{what}");
            assert!(scene.notes().is_empty(), "{what}: {:?}", scene.notes());
            let Scene { sender, receiver, .. } = scene;
            let ended = [sender.end(), receiver.end()];
            let told = &ended[usize::from(!to_sender)];
            assert_eq!(told.code, CANCELLED, "{what}: {ended:?}");
            assert!(ended[0].err.contains("as it was before"), "{what}: {ended:?}");
            continue;
        }
        // The other side has the guest, and the sender knows, or has noted that it does not.
        assert!(scene.is_moved(), "{what}");
        let notes = scene.notes();
        let Scene { folder, source, sender, receiver, vcpus, .. } = scene;
        let ended = [sender.end(), receiver.end()];
        match ended[0].code {
            0 => assert!(notes.is_empty(), "{what}: {notes:?}"),
            IN_DOUBT if to_sender => {
                assert_eq!(notes.len(), 1, "{what}: {notes:?}");
                assert!(ended[0].err.contains(&format!("process {} stays stopped", vcpus.pid())), "{what}");
                let args = ["resolve", &source.socket, "--moves", &folder.text("here")];
                limosa(&[&args[..], &["--decide", "moved"]].concat()).ok();
                assert_eq!(source.state(), State::Stop);
            }
            _ => panic!("{what}: {ended:?}"),
        }
        assert_eq!(ended[1].code, 0, "{what}: {ended:?}");
    }
}

#[test]
fn signals_in_the_command_that_stops_the_guest_left_it_stopped() {
    signals_at(At::Hook, true);
}

#[test]
fn signals_while_the_source_stops_left_its_guest_stopped() {
    signals_at(At::Stop, true);
}

#[test]
fn signals_while_the_rest_is_sent_left_the_guest_stopped() {
    signals_at(At::StopCopy, true);
}

#[test]
fn signals_while_the_destination_loads_left_the_guest_stopped() {
    signals_at(At::Load, true);
    signals_at(At::Load, false);
}

#[test]
fn signals_in_the_commit_ran_the_guest_twice_or_nowhere() {
    signals_at(At::Commit, true);
    signals_at(At::Commit, false);
}

#[test]
fn signals_while_the_guest_starts_are_too_late() {
    signals_at(At::Start, false);
}
