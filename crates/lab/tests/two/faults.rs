//! Receivers and senders killed in every phase of a move. The phases are held open by the device itself
//! (lab/module/README.md: hold).

use limosa_lab::{Kind, Machine, Running, kinds};
use rustix::process::Signal;

use crate::scene::{Guest, Mark, moved, receiver, start};

/// Where a move stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    Handshake,
    PreCopy,
    StopCopy,
    Load,
    Commit,
}

/// A move that stands still.
pub struct Scene<'a> {
    pub source: Guest<'a>,
    pub destination: Guest<'a>,
    pub mark: Mark,
    pub sender: Running,
    pub receiver: Running,
    pub at: At,
}

impl<'a> Scene<'a> {
    pub fn at(at: At, kind: &Kind, here: &'a Machine, there: &'a Machine, options: &[&str]) -> Self {
        let (source, destination) = (Guest::new(here, kind), Guest::new(there, kind));
        let mark = source.mark(11);
        let p2p = ["limosa-full", "limosa-p2p"].contains(&kind.name.as_str());
        let (place, point) = match at {
            At::Handshake => (&destination, "STOP>RESUMING"),
            At::PreCopy | At::StopCopy => (&source, "read@65536"),
            At::Load => (&destination, "RESUMING>STOP"),
            At::Commit if p2p => (&destination, "STOP>RUNNING_P2P"),
            At::Commit => (&destination, "STOP>RUNNING"),
        };
        place.device.set("limosa/hold", point);
        let (receiver, address) = receiver(&destination, options);
        let mut args = vec!["-v", "send", source.device.uuid(), "--to", &address, "--insecure"];
        if at == At::StopCopy {
            args.push("--no-precopy");
        }
        let sender = start(here, &[&args, options].concat());
        assert_eq!(place.device.get("limosa/await"), point, "{kind:?} {at:?}");
        Self { source, destination, mark, sender, receiver, at }
    }

    /// Lets the device go on.
    pub fn release(&self) {
        for device in [&self.source.device, &self.destination.device] {
            device.set("limosa/hold", "none");
        }
    }

    /// The source goes on with all that it holds, and can be moved, to this very destination.
    #[track_caller]
    pub fn source_goes_on(&self) {
        let what = (&self.source.kind, self.at);
        assert_eq!(self.source.state(), "RUNNING", "{what:?}");
        assert_eq!(self.source.taken(), self.mark, "{what:?}");
        assert_eq!(self.destination.state(), "RUNNING", "{what:?}");
        let (sent, received) = moved(&self.source, &self.destination, &[]);
        sent.ok();
        received.ok();
        assert_eq!(self.destination.taken(), self.mark, "{what:?}");
    }

    /// The destination holds nothing of what was sent.
    #[track_caller]
    pub fn destination_is_empty(&self) {
        let fresh = Guest::new(self.destination.machine, &self.destination.kind);
        assert_eq!(self.destination.taken(), fresh.taken(), "{:?} {:?}", self.source.kind, self.at);
    }
}

/// The kinds that can be held: with all that the protocol has, and with the least.
pub fn held() -> Vec<Kind> {
    let kinds = kinds();
    let kinds: Vec<Kind> = kinds
        .into_iter()
        .filter(|kind| ["limosa-full", "limosa-plain"].contains(&kind.name.as_str()))
        .collect();
    assert_eq!(kinds.len(), 2, "{kinds:?}");
    kinds
}

/// Every phase that a kind has.
pub fn phases(kind: &Kind) -> Vec<At> {
    let all = [At::Handshake, At::PreCopy, At::StopCopy, At::Load, At::Commit];
    all.into_iter().filter(|&at| at != At::PreCopy || kind.name == "limosa-full").collect()
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_receiver_killed_before_the_commit_leaves_the_source_running() {
    let (here, there) = (Machine::here(), Machine::there());
    for kind in held() {
        for at in phases(&kind).into_iter().filter(|&at| at != At::Commit) {
            let mut scene = Scene::at(at, &kind, &here, &there, &[]);
            scene.receiver.signal(Signal::KILL);
            scene.receiver.wait();
            scene.release();
            scene.sender.wait().fails(4, &["the link to", "as it was before"]);
            scene.source_goes_on();
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_receiver_killed_in_the_commit_leaves_the_source_in_doubt() {
    let (here, there) = (Machine::here(), Machine::there());
    for kind in held() {
        let mut scene = Scene::at(At::Commit, &kind, &here, &there, &[]);
        scene.receiver.signal(Signal::KILL);
        scene.receiver.wait();
        scene.sender.wait().fails(5, &[scene.source.device.uuid(), "in doubt", "Look there"]);
        scene.release();
        assert_eq!(scene.source.taken(), scene.mark, "nothing is lost");
        scene.source_goes_on();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_sender_killed_before_the_commit_leaves_the_source_whole_and_the_destination_empty() {
    let (here, there) = (Machine::here(), Machine::there());
    for kind in held() {
        for at in phases(&kind).into_iter().filter(|&at| at != At::Commit) {
            let mut scene = Scene::at(at, &kind, &here, &there, &[]);
            scene.sender.signal(Signal::KILL);
            scene.sender.wait();
            scene.release();
            // If all was loaded before it was noticed, the sender might have sent COMMIT.
            if at == At::Load && scene.receiver.says("the source may be in doubt") {
                scene.receiver.signal(Signal::INT);
            }
            scene.receiver.wait().fails(4, &[scene.destination.device.uuid(), "was not loaded"]);
            scene.destination_is_empty();
            scene.source_goes_on();
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_sender_killed_in_the_commit_leaves_the_destination_running() {
    let (here, there) = (Machine::here(), Machine::there());
    for kind in held() {
        let mut scene = Scene::at(At::Commit, &kind, &here, &there, &[]);
        scene.sender.signal(Signal::KILL);
        scene.sender.wait();
        scene.release();
        scene.receiver.line("the source may be in doubt");
        scene.receiver.signal(Signal::INT);
        let received = scene.receiver.wait();
        assert!(received.out.contains("may not know that the devices run"), "{received:?}");
        received.ok();
        assert_eq!(scene.destination.state(), "RUNNING");
        assert_eq!(scene.destination.taken(), scene.mark);
    }
}
