//! Processes that drive devices of the kernel's, killed in every phase: the kernel closes what they had open, whoever
//! survives says what happened, and the devices are usable. A device that nobody holds runs no guest; what is left
//! in it is what the test looks at.

#[path = "command/support.rs"]
mod support;

use limosa_lab::Running;
use limosa_protocol::State;
use rustix::process::Signal;
use support::{Here, Marked, full, mtty, path};

const GUEST: u8 = 0x77;
const STATE_BYTES: u64 = 2 << 20;

/// A move between two processes that stands still at a point of one of its devices.
struct Scene {
    source: Marked,
    destination: Marked,
    sender: Option<Running>,
    receiver: Option<Running>,
}

#[derive(Clone, Copy)]
enum At {
    Source(&'static str),
    Destination(&'static str),
}

impl Scene {
    fn at(here: &Here, at: At) -> Scene {
        Scene::sent(here, at, &["--hold"])
    }

    /// With further words for the sender.
    fn sent(here: &Here, at: At, words: &[&str]) -> Scene {
        let (source, destination) = (Marked::empty(&full()), Marked::empty(&full()));
        for device in [&source, &destination] {
            // More than a socket takes: a sender whose receiver does not read is not done.
            device.mdev.set("limosa/state_bytes", STATE_BYTES);
        }
        source.set_mark(GUEST);
        let (held, point) = match at {
            At::Source(point) => (&source, point),
            At::Destination(point) => (&destination, point),
        };
        held.mdev.set("limosa/hold", point);
        let link = format!("unix:{}", path("link"));
        let receiver = here.start(&["receive", destination.uuid(), "--listen", &link]);
        receiver.line("listening on");
        let sender = here.start(&[&["send", source.uuid(), "--to", &link], words].concat());
        assert_eq!(held.mdev.get("limosa/await"), point);
        Scene { source, destination, sender: Some(sender), receiver: Some(receiver) }
    }

    fn kill_sender(&mut self) -> Running {
        assert_eq!(self.sender.take().unwrap().kill().code, -9);
        self.release();
        self.receiver.take().unwrap()
    }

    fn kill_receiver(&mut self) -> Running {
        assert_eq!(self.receiver.take().unwrap().kill().code, -9);
        self.release();
        self.sender.take().unwrap()
    }

    fn release(&self) {
        self.source.mdev.set("limosa/hold", "none");
        self.destination.mdev.set("limosa/hold", "none");
    }

    fn both_are_usable(&self) {
        self.source.is_usable();
        self.destination.is_usable();
    }
}

/// Where the devices work before the commit.
const BEFORE_COMMIT: [At; 6] = [
    At::Source("RUNNING>PRE_COPY"),
    At::Source("read@65536"),
    At::Source("PRE_COPY>PRE_COPY_P2P"),
    At::Source("PRE_COPY_P2P>STOP_COPY"),
    At::Destination("STOP>RESUMING"),
    At::Destination("write@65536"),
];

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_sender_killed_before_the_commit_leaves_the_guest_in_its_device_only() {
    let here = Here::new();
    for at in BEFORE_COMMIT {
        let mut scene = Scene::at(&here, at);
        let receiver = scene.kill_sender();
        receiver.end().fails(4, &[scene.destination.uuid(), "was not loaded", "the link to"]);
        assert_eq!((scene.source.mark(), scene.source.state()), (GUEST, State::Running));
        assert_eq!((scene.destination.mark(), scene.destination.state()), (0, State::Running));
        scene.both_are_usable();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_receiver_killed_before_the_commit_leaves_the_source_running() {
    let here = Here::new();
    for at in BEFORE_COMMIT.into_iter().chain([At::Destination("RESUMING>STOP")]) {
        let mut scene = Scene::at(&here, at);
        let before = scene.source.mdev.get("limosa/check");
        let sender = scene.kill_receiver();
        sender.end().fails(4, &["the source is as it was before", "the link to"]);
        let after = scene.source.mdev.get("limosa/check");
        assert_eq!((scene.source.mark(), scene.source.state(), after), (GUEST, State::Running, before));
        scene.both_are_usable();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_move_that_is_called_off_is_undone_on_both_sides() {
    let here = Here::new();
    for at in [At::Source("read@65536"), At::Destination("write@65536")] {
        for by_sender in [true, false] {
            let mut scene = Scene::at(&here, at);
            let before = scene.source.mdev.get("limosa/check");
            let (sender, receiver) = (scene.sender.take().unwrap(), scene.receiver.take().unwrap());
            let caller = if by_sender { &sender } else { &receiver };
            caller.signal(Signal::INT);
            scene.release();
            sender.end().fails(7, &["the source is as it was before"]);
            receiver.end().fails(7, &[scene.destination.uuid(), "was not loaded"]);
            let after = scene.source.mdev.get("limosa/check");
            assert_eq!((scene.source.mark(), scene.source.state(), after), (GUEST, State::Running, before));
            assert_eq!((scene.destination.mark(), scene.destination.state()), (0, State::Running));
            scene.both_are_usable();
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_sender_killed_at_the_commit_does_not_hinder_the_destination() {
    let here = Here::new();
    let mut scene = Scene::at(&here, At::Destination("STOP>RUNNING_P2P"));
    let receiver = scene.kill_sender();
    // Nobody will ask it any more.
    receiver.line("staying");
    receiver.signal(Signal::INT);
    receiver.end().ok();
    assert_eq!((scene.destination.mark(), scene.destination.state()), (GUEST, State::Running));
    scene.both_are_usable();
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_source_in_doubt_is_held_stopped_until_a_person_has_decided() {
    let here = Here::new();
    let mut scene = Scene::at(&here, At::Destination("STOP>RUNNING_P2P"));
    let sender = scene.kill_receiver();
    let held = sender.line("holding ");
    let held = held.split_once(" as ").and_then(|(_, rest)| rest.split_once(" until")).unwrap().0;
    assert_eq!(here.ok(&["state", held]), "STOP_COPY\n");
    here.limosa(&["probe", scene.source.uuid()]).fails(4, &["is held by limosa", held]);
    here.limosa(&["state", held, "set", "RUNNING"]).fails(5, &["in doubt", "--force"]);
    here.ok(&["state", held, "set", "RUNNING", "--force"]);
    sender.signal(Signal::TERM);
    sender.end().fails(5, &[scene.source.uuid(), "in doubt", "set this one to RUNNING"]);
    assert_eq!(scene.source.mark(), GUEST);
    scene.both_are_usable();
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_source_in_doubt_that_is_not_held_says_what_becomes_of_its_state() {
    let here = Here::new();
    let mut scene = Scene::sent(&here, At::Destination("STOP>RUNNING_P2P"), &[]);
    let ended = scene.kill_receiver().end();
    ended.fails(5, &["in doubt", "the kernel closes it with this command", "--hold keeps it open"]);
    scene.both_are_usable();
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_holder_killed_in_any_state_leaves_a_device_that_can_be_reset() {
    let here = Here::new();
    for kind in [mtty(), full()] {
        let device = Marked::new(&kind, GUEST);
        for state in ["STOP", "STOP_COPY", "RESUMING", "RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P"] {
            let (holding, held) = here.holds(&["state", device.uuid(), "set", state, "--hold"]);
            assert_eq!(here.ok(&["state", &held]).trim(), state);
            assert_eq!(holding.kill().code, -9);
            here.limosa(&["probe", &held]).fails(4, &[&held, "there is no process"]);
            here.ok(&["state", device.uuid(), "reset", "--force"]);
            assert_eq!(device.state(), State::Running);
        }
        device.is_usable();
    }
}
