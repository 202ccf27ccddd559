//! The servers, the sender and the receiver of a move killed in each phase.

use super::*;

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
    // It would ask the receiver, which for a moment can still say that it has committed.
    scene.sender.signal(Signal::STOP);
    scene.destination.kill();
    scene.receiver.end().fails(4, &[&scene.destination.socket, "was committed", "reset it"]);
    scene.sender.signal(Signal::CONT);
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
