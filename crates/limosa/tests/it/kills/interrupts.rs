//! Moves, saves and loads that are interrupted, or whose server is killed.

use super::*;

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
