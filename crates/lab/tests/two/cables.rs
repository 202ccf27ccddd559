//! The cable cut in every phase of a move. A cut says nothing to anybody: what is sent is lost, and both
//! sides find out when the other one is silent for too long.

use limosa_lab::{Kind, Machine};
use rustix::process::Signal;

use crate::faults::{At, Scene, held};

fn kind() -> Kind {
    held().into_iter().find(|kind| kind.name == "limosa-full").expect("it is one of those")
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_cable_cut_before_the_commit_leaves_the_source_running_and_one_joined_again_ends_the_doubt() {
    let (here, there) = (Machine::here(), Machine::there());
    let scene = |at, silence| Scene::at(at, &kind(), &here, &there, &["--silence", silence]);
    // This one still asks for its answer when the others have ended.
    let mut committed = scene(At::Commit, "8");
    let mut scenes = [At::Handshake, At::Load, At::StopCopy, At::PreCopy].map(|at| scene(at, "4"));
    let cut = here.cut();
    scenes.iter().chain([&committed]).for_each(Scene::release);
    for scene in &mut scenes {
        scene.sender.wait().fails(4, &["as it was before"]);
        if scene.at == At::Load {
            // It had loaded all: the sender might have sent COMMIT.
            scene.receiver.line("the source may be in doubt");
            scene.receiver.signal(Signal::INT);
        }
        scene.receiver.wait().fails(4, &[scene.destination.device.uuid(), "was not loaded"]);
    }
    committed.sender.line("in doubt: ");
    drop(cut);
    committed.sender.wait().ok();
    committed.receiver.wait().ok();
    assert_eq!(committed.destination.state(), "RUNNING");
    assert_eq!(committed.destination.taken(), committed.mark);
    for scene in &scenes {
        scene.destination_is_empty();
        scene.source_goes_on();
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_cable_cut_in_the_commit_for_good_leaves_the_source_in_doubt() {
    let (here, there) = (Machine::here(), Machine::there());
    let mut scene = Scene::at(At::Commit, &kind(), &here, &there, &["--silence", "2"]);
    let cut = here.cut();
    scene.release();
    scene.sender.wait().fails(5, &[scene.source.device.uuid(), "in doubt", "Look there"]);
    scene.receiver.line("the source may be in doubt");
    scene.receiver.signal(Signal::INT);
    let received = scene.receiver.wait();
    assert!(received.out.contains("may not know that the devices run"), "{received:?}");
    received.ok();
    drop(cut);
    assert_eq!(scene.destination.state(), "RUNNING");
    assert_eq!(scene.destination.taken(), scene.mark);
    assert_eq!(scene.source.taken(), scene.mark, "nothing is lost");
}
