//! The destination of a move in doubt says which move loaded its device, and how far that came.

use crate::support::pair::{Pair, Sending};
use crate::support::{GUEST, JsonOutput, limosa, schema, start, vcpus};
use rustix::process::Signal;
use serde_json::Value;

/// The output about a device: of `doctor` in text and JSON, of `state` in JSON, and of `state` in text on standard error.
struct Said {
    text: String,
    facts: Value,
    state: Value,
    aside: String,
}

fn look(device: &str, moves: &str) -> Said {
    // It has warnings on some machines.
    let text = limosa(&["doctor", device, "--moves", moves]).out;
    let document: Value =
        serde_json::from_str(&limosa(&["--json", "doctor", device, "--moves", moves]).out).unwrap();
    schema::keeps(&document);
    let state = limosa(&["--json", "state", device, "--moves", moves]).json();
    let shown = limosa(&["state", device, "--moves", moves]);
    assert_eq!(shown.out.trim_end(), state["state"], "programs compare standard output: {shown:?}");
    Said { text, facts: document["devices"][0]["facts"].clone(), state, aside: shown.err }
}

#[test]
fn a_destination_did_not_say_which_move_had_loaded_its_device() {
    let pair = Pair::new(&[], &["fault=stall:STOP>RUNNING_P2P:800"]);
    let (device, here, there) =
        (&pair.destination.socket, pair.folder.text("here"), pair.folder.text("there"));
    let never = look(device, &there);
    assert!(!never.text.contains("loaded by") && never.state["loaded_by"].is_null(), "{}", never.text);
    assert_eq!(never.aside, "", "there is nothing to say");

    let Sending { sender, receiver, .. } = pair.send(None, &["--moves", &there], &["--moves", &here]);
    pair.destination.line("stalls as scripted");
    receiver.signal(Signal::KILL);
    let message = sender.line("is stopped and in doubt");
    assert!(message.contains("`limosa doctor DEVICE` says which move loaded a device"), "{message}");

    let said = look(device, &there);
    let loaded = &said.state["loaded_by"];
    let id = loaded["id"].as_str().unwrap();
    assert!(message.contains(id), "{message} {loaded}");
    assert_eq!((&loaded["outcome"], &loaded["reset"]), (&"unfinished".into(), &false.into()));
    let told = said.facts["loaded_by"].as_str().unwrap();
    assert!(told.contains(id) && told.contains("before it knew that all devices run"), "{told}");
    // The text is folded where it does not fit.
    assert!(said.text.contains("loaded by") && said.text.contains(id), "{}", said.text);
    assert_eq!(said.aside.trim_end(), format!("loaded by {told}"), "`state` shows the same in text");

    limosa(&["state", device, "reset"]).ok();
    assert_eq!(look(device, &there).state["loaded_by"]["reset"], true);
}

#[test]
fn a_look_at_a_device_did_not_end_the_move_that_loads_it() {
    let pair = Pair::new(&[], &["fault=stall:STOP>RUNNING_P2P:800"]);
    let (device, there) = (&pair.destination.socket, pair.folder.text("there"));
    let (vcpus, here) = (vcpus(), pair.folder.text("here"));
    let stopping = ["--moves", &here, "--stop-with", &vcpus.pid()];
    let Sending { sender, receiver, .. } = pair.send(None, &["--moves", &there], &stopping);
    pair.destination.line("stalls as scripted");
    let outcome = |said: Said| said.state["loaded_by"]["outcome"].as_str().unwrap().to_owned();
    // Beside the receiver, which has the device: only the folder is asked.
    let now = limosa(&["--json", "--timeout", "60", "state", device, "--moves", &there]).json();
    let then = now["loaded_by"]["outcome"].as_str().unwrap();
    assert!(["starting", "committed"].contains(&then), "{now}");
    sender.end().ok();
    receiver.end().ok();
    pair.has_moved();
    assert_eq!(outcome(look(device, &there)), "committed");
    // The next move is refused before anything is touched, and the device is still that of the first.
    let (wrong, listen) =
        (pair.folder.device("wrong", &["state=2M"]), format!("unix:{}", pair.folder.text("second")));
    let receiver = start(&["receive", device, "--listen", &listen, "--moves", &there]);
    receiver.line("listening on");
    limosa(&["send", &wrong.socket, "--to", &listen, "--moves", &here]).fails(3, &[]);
    receiver.end().fails(3, &[]);
    assert_eq!(outcome(look(device, &there)), "committed");
    assert!(pair.destination.runs(GUEST));
}

#[test]
fn a_device_that_was_loaded_from_a_snapshot_or_moved_on_this_machine_says_so() {
    let pair = Pair::new(&[], &[]);
    let file = pair.folder.text("snapshot");
    limosa(&["save", &pair.source.socket, &file]).ok();
    limosa(&["load", &file, &pair.destination.socket]).ok();
    let of = |device: &str| limosa(&["--json", "state", device]).json()["loaded_by"].clone();
    let loaded = of(&pair.destination.socket);
    assert_eq!((&loaded["outcome"], &loaded["from"]), (&"loaded".into(), &file.into()));
    pair.migrate(&[]).ok();
    let moved = of(&pair.destination.socket);
    assert_eq!(
        (&moved["outcome"], &moved["from"]),
        (&"committed".into(), &pair.source.socket.as_str().into())
    );
    assert_ne!(moved["id"], loaded["id"]);
}

#[test]
fn a_destination_did_not_say_what_a_migrate_that_was_killed_at_its_commit_had_loaded() {
    for decided in ["moved", "undone"] {
        let pair = Pair::new(&[], &["fault=stall:STOP>RUNNING_P2P:800"]);
        let (vcpus, moves) = (vcpus(), pair.folder.text("moves"));
        let (source, destination) = (&pair.source.socket, &pair.destination.socket);
        let migrate = start(&pair.migration(&["--moves", &moves, "--stop-with", &vcpus.pid()]));
        pair.destination.line("stalls as scripted");
        migrate.signal(Signal::KILL);
        assert_ne!(migrate.end().code, 0);
        let said = look(destination, &moves);
        let loaded = &said.state["loaded_by"];
        assert_eq!(
            (&loaded["outcome"], &loaded["from"]),
            (&"in_doubt".into(), &source.as_str().into()),
            "{loaded}"
        );
        assert!(said.aside.contains("in doubt, since the `limosa migrate`"), "{}", said.aside);
        limosa(&["resolve", source, "--moves", &moves, "--decide", decided]).ok();
        let outcome = if decided == "moved" { "committed" } else { "not_committed" };
        let then = look(destination, &moves).state["loaded_by"].clone();
        assert_eq!((&then["outcome"], &then["id"]), (&outcome.into(), &loaded["id"]));
    }
}
