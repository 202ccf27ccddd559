//! Processes that are killed, hang, or are told to end in a switch-over: all devices stay on one side.

use super::*;

/// A new server that hangs in the freeze until the old one takes back.
const HANGS: &[&str] = &["state=1M", "fault=stall:RESUMING>STOP:60000"];

#[test]
fn a_new_server_that_is_killed_at_any_step_leaves_the_old_one_serving() {
    for names in [ONE, MANY] {
        let scene = Scene::new(names, &["state=1M"]);
        let server = scene.first("synthetic");
        let clients = scene.connect();
        let guests: Vec<_> = clients.iter().map(Guest::start).collect();
        for step in ["hello", "offer", "prepare", "rest"] {
            let new = scene.next_with("synthetic", HANGS);
            new.line(&format!("done by this server step={step}"));
            new.kill();
            for client in &clients {
                assert_eq!(client.state().unwrap(), State::Running, "killed after {step}");
            }
        }
        guests.iter().zip(&clients).for_each(|(guest, client)| assert!(guest.check(client) > 0));
        let new = scene.next("synthetic");
        scene.listens(&new);
        server.end().ok();
        guests.iter().zip(&clients).for_each(|(guest, client)| guest.is_interrupted(client));
    }
}

#[test]
fn a_new_server_that_hangs_is_given_up_and_the_old_one_goes_on() {
    for names in [ONE, MANY] {
        let scene = Scene::new(names, &["state=1M"]);
        let server = scene.first("synthetic");
        let clients = scene.connect();
        let all_run =
            || clients.iter().for_each(|client| assert_eq!(client.state().unwrap(), State::Running));
        let new = scene.next_with("synthetic", &["state=1M", "fault=stall:RESUMING>STOP:5000"]);
        server.line("not replaced: this server goes on");
        all_run();
        new.end().fails(3, &["cannot take over from", scene.names[0], "the new device was not loaded"]);
        all_run();
    }
}

#[test]
fn an_old_server_that_is_killed_once_all_is_handed_over_is_replaced() {
    for names in [ONE, MANY] {
        let scene = Scene::new(names, &["state=1M"]);
        let server = scene.first("synthetic");
        let clients = scene.connect();
        let guests: Vec<_> = clients.iter().map(Guest::start).collect();
        let new = scene.next_with("synthetic", &["state=1M", "fault=stall:RESUMING>STOP:1000"]);
        new.line("done by this server step=rest");
        server.kill();
        scene.listens(&new);
        for (guest, client) in guests.iter().zip(&clients) {
            assert!(guest.check(client) > 0);
            guest.is_interrupted(client);
        }
    }
}

#[test]
fn an_old_server_that_is_killed_before_leaves_no_server() {
    // It hangs in its freeze.
    let scene = Scene::new(ONE, &["state=1M", "fault=stall:PRE_COPY_P2P>STOP_COPY:60000"]);
    let server = scene.first("synthetic");
    let client = connect(&scene.folder, "device");
    let new = scene.next_with("synthetic", &["state=1M"]);
    new.line("done by this server step=prepare");
    server.kill();
    new.end().fails(4, &["cannot take over from", "ended"]);
    assert!(client.state().is_err());
}

#[test]
fn a_server_that_is_told_to_end_in_a_switch_over_ends() {
    for (names, signal) in [(ONE, Signal::TERM), (MANY, Signal::HUP)] {
        let scene = Scene::new(names, &["state=1M"]);
        let server = scene.first("synthetic");
        let clients = scene.connect();
        let new = scene.next_with("synthetic", HANGS);
        new.line("done by this server step=prepare");
        server.signal(signal);
        server.end().ok();
        assert!(clients.iter().all(|client| client.state().is_err()));
        for socket in names.iter().chain(&["takeover"]) {
            assert!(!scene.folder.path(socket).exists(), "{socket} is left");
        }
        // The new one may be told too.
        new.signal(signal);
        let Ended { code, err, .. } = new.end();
        assert!([3, 4, 7].contains(&code), "{code}: {err}");
    }
}

#[test]
fn a_new_server_that_is_told_to_end_before_it_serves_leaves_the_old_one_serving() {
    for (names, signal) in [(ONE, Signal::TERM), (MANY, Signal::HUP)] {
        let scene = Scene::new(names, &["state=1M"]);
        let server = scene.first("synthetic");
        let clients = scene.connect();
        let new = scene.next_with("synthetic", HANGS);
        new.line("done by this server step=rest");
        new.signal(signal);
        new.end().fails(7, &["cancelled", "the old server goes on"]);
        clients.iter().for_each(|client| assert_eq!(client.state().unwrap(), State::Running));
        server.signal(signal);
        server.end().ok();
    }
}
