//! Several devices as one: they move together or not at all, in the order in which they were named.

use crate::support::{Folder, JsonOutput, Server, limosa, start};
use limosa_models::synthetic::registers;
use limosa_protocol::State;
use rustix::process::Signal;

/// Devices that differ in size, each with a guest of its own.
fn devices(folder: &Folder, side: &str, marked: bool) -> Vec<Server> {
    let sizes = ["state=1M", "state=2M", "state=3M"];
    let make = |(at, size): (usize, &&str)| {
        let device = folder.device(&format!("{side}{at}"), &[size]);
        if marked {
            device.mark(100 + at as u64);
        }
        device
    };
    sizes.iter().enumerate().map(make).collect()
}

#[track_caller]
fn have_moved(from: &[Server], to: &[Server]) {
    for (at, (from, to)) in from.iter().zip(to).enumerate() {
        assert_eq!(from.state(), State::Stop);
        assert!(to.runs(100 + at as u64), "{at}: {}", to.guest());
        assert_eq!(to.register(registers::BAD_BLOCKS), 0);
    }
}

/// `--device` for each.
fn options(devices: &[Server]) -> Vec<String> {
    devices.iter().flat_map(|device| ["--device".into(), device.socket.clone()]).collect()
}

fn words(words: &[&str], more: &[String]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).chain(more.iter().cloned()).collect()
}

#[test]
fn several_devices_are_sent_and_received_in_the_order_in_which_they_are_named() {
    let folder = Folder::new();
    let (from, to) = (devices(&folder, "from", true), devices(&folder, "to", false));
    let link = format!("unix:{}", folder.text("link"));
    let receiver =
        start(&words(&["--json", "receive", &to[0].socket, "--listen", &link], &options(&to[1..])));
    receiver.line("listening on");
    let sent = limosa(&words(&["--json", "send", "--to", &link], &options(&from))).json();
    let received = receiver.end().json();
    for (at, device) in from.iter().enumerate() {
        assert_eq!(sent["devices"][at]["name"], device.socket.as_str());
        assert_eq!(received["devices"][at]["bytes"], sent["devices"][at]["bytes"]);
    }
    have_moved(&from, &to);
}

#[test]
fn several_devices_are_sent_over_as_many_links_as_both_want() {
    let folder = Folder::new();
    for (links, most, expected) in [("3", "16", 3), ("4", "2", 2), ("1", "16", 1)] {
        let (from, to) = (devices(&folder, "from", true), devices(&folder, "to", false));
        let receiver = start(&words(
            &["--json", "receive", "--links", most, "--listen", "tcp:127.0.0.1:0"],
            &options(&to),
        ));
        let address = receiver.after("listening on ");
        let sent =
            limosa(&words(&["--json", "send", "--links", links, "--to", &address], &options(&from))).json();
        receiver.end().json();
        assert_eq!(sent["links"].as_array().map_or(1, Vec::len), expected, "{sent}");
        have_moved(&from, &to);
    }
}

#[test]
fn several_devices_migrate_in_pairs() {
    let folder = Folder::new();
    let (from, to) = (devices(&folder, "from", true), devices(&folder, "to", false));
    let args = [
        "migrate",
        &from[0].socket,
        &to[0].socket,
        "--device",
        &from[1].socket,
        &to[1].socket,
        "--device",
        &from[2].socket,
        &to[2].socket,
    ];
    let text = limosa(&args).ok();
    assert!(from.iter().all(|device| text.contains(&device.socket)), "{text}");
    have_moved(&from, &to);
}

#[test]
fn several_devices_are_saved_to_one_file_and_loaded_from_it() {
    let folder = Folder::new();
    let (from, to) = (devices(&folder, "from", true), devices(&folder, "to", false));
    let file = folder.text("file");
    limosa(&words(&["save", &from[0].socket, &file], &options(&from[1..]))).ok();
    assert!(from.iter().all(|device| device.state() == State::Running));
    limosa(&words(&["save", &file, "--stop", "--replace"], &options(&from))).ok();
    let inspected = limosa(&["--json", "inspect", &file]).json();
    assert_eq!(inspected["devices"].as_array().unwrap().len(), 3);
    limosa(&words(&["load", &file], &options(&to))).ok();
    have_moved(&from, &to);
}

#[test]
fn a_device_more_or_fewer_on_one_side_is_refused_before_the_source_is_touched() {
    let folder = Folder::new();
    let (from, to) = (devices(&folder, "from", true), devices(&folder, "to", false));
    let link = format!("unix:{}", folder.text("link"));
    for (sent, taken, part) in [
        (3, 2, "the source has 3 devices, the destination 2"),
        (1, 2, "the source has 1 devices, the destination 2"),
    ] {
        let receiver = start(&words(&["receive", "--listen", &link], &options(&to[..taken])));
        receiver.line("listening on");
        limosa(&words(&["send", "--to", &link], &options(&from[..sent])))
            .fails(3, &["cannot be moved", part]);
        receiver.end().fails(3, &[part, &to[0].socket, &to[1].socket]);
        let file = folder.text(&format!("file{sent}"));
        limosa(&words(&["save", &file], &options(&from[..sent]))).ok();
        limosa(&words(&["load", &file], &options(&to[..taken]))).fails(3, &[part, &file]);
    }
    // In another order they do not fit either.
    let swapped = [&from[1], &from[0]].map(|device| device.socket.clone());
    let args = ["migrate", &swapped[0], &to[0].socket, "--device", &swapped[1], &to[1].socket];
    limosa(&args).fails(3, &["list of region sizes", &swapped[0], &swapped[1]]);
    assert!(from.iter().enumerate().all(|(at, device)| device.runs(100 + at as u64)));
    assert!(to.iter().all(|device| device.runs(0)));
}

#[test]
fn a_device_that_fails_brings_all_of_them_back() {
    let folder = Folder::new();
    let from = [folder.device("from0", &[]), folder.device("from1", &[])];
    let to = [folder.device("to0", &[]), folder.device("to1", &["fault=fail:RESUMING>STOP"])];
    from[0].mark(1);
    from[1].mark(2);
    let args = ["migrate", &from[0].socket, &to[0].socket, "--device", &from[1].socket, &to[1].socket]
        .map(str::to_owned);
    limosa(&args).fails(3, &[&to[1].socket, "the source is as it was before"]);
    assert!(from[0].runs(1) && from[1].runs(2) && to[0].runs(0) && to[1].runs(0));
    limosa(&args).ok();
    assert!(to[0].runs(1) && to[1].runs(2));
}

#[test]
fn no_device_too_few_of_a_pair_or_one_twice_is_wrong_usage() {
    let folder = Folder::new();
    let (one, other) = (folder.device("one", &[]), folder.device("other", &[]));
    let (one, other, link) = (one.socket.as_str(), other.socket.as_str(), "unix:/nowhere/at-all");
    let same = "the same device";
    for (args, part) in [
        (&["send", "--to", link][..], "DEVICE"),
        (&["receive", "--listen", link], "DEVICE"),
        (&["save", "file"], "DEVICE"),
        (&["load", "file"], "DEVICE"),
        (&["migrate", one], "DST"),
        (&["migrate", one, other, "--device", one], "2 values"),
        (&["migrate", one, other, "--device", other, one], same),
        (&["send", one, "--device", one, "--to", link], same),
        (&["receive", "--device", one, "--device", one, "--listen", link], same),
        (&["load", "file", one, "--device", one], same),
    ] {
        limosa(args).fails(2, &[part]);
    }
}

#[test]
fn a_move_of_several_devices_in_doubt_is_resolved_for_all_of_them() {
    let folder = Folder::new();
    let from = [folder.device("from0", &[]), folder.device("from1", &[])];
    let to = [folder.device("to0", &[]), folder.device("to1", &["fault=stall:STOP>RUNNING_P2P:800"])];
    from[0].mark(1);
    from[1].mark(2);
    let link = format!("unix:{}", folder.text("link"));
    let receiver = start(&words(&["receive", "--listen", &link], &options(&to)));
    receiver.line("listening on");
    let sender = start(&words(&["send", "--to", &link], &options(&from)));
    to[1].line("stalls as scripted");
    receiver.kill();
    sender.end().fails(5, &[&from[0].socket, &from[1].socket, "in doubt"]);
    let listed = limosa(&["resolve"]).ok();
    assert!(listed.contains(&from[0].socket) && listed.contains(&from[1].socket), "{listed}");
    assert!(from.iter().all(|device| device.state() == State::StopCopy));
    limosa(&["state", &to[0].socket, "reset"]).ok();
    limosa(&["state", &to[1].socket, "reset"]).ok();
    let resolved = limosa(&["resolve", &from[1].socket, "--decide", "undone"]).ok();
    assert_eq!(resolved.matches("as before the move").count(), 2, "{resolved}");
    assert!(from[0].runs(1) && from[1].runs(2));
}

#[test]
fn an_interrupt_brings_all_of_them_back() {
    let folder = Folder::new();
    let from = [folder.device("from0", &[]), folder.device("from1", &["fault=stall:RUNNING>PRE_COPY:800"])];
    let to = [folder.device("to0", &[]), folder.device("to1", &[])];
    from[0].mark(1);
    let args = ["migrate", &from[0].socket, &to[0].socket, "--device", &from[1].socket, &to[1].socket];
    let moving = start(&args);
    from[1].line("stalls as scripted");
    moving.signal(Signal::INT);
    moving.end().fails(7, &["the source is as it was before"]);
    assert!(from[0].runs(1) && from[1].state() == State::Running && to[0].runs(0));
}

#[test]
fn too_many_devices_were_all_opened_before_that_was_said() {
    let names: Vec<String> = (0..65).map(|number| format!("/nowhere/{number}")).collect();
    let more: Vec<&str> = names[1..].iter().flat_map(|name| ["--device", name]).collect();
    for command in [
        &["send", &names[0], "--to", "unix:/nowhere/link"][..],
        &["receive", &names[0], "--listen", "unix:/nowhere/link"],
        &["save", &names[0], "/nowhere/file"],
        &["load", "/nowhere/file", &names[0]],
    ] {
        limosa(&[command, &more].concat()).fails(2, &["65 devices in one move; expected 64 at most"]);
    }
    let parts: Vec<String> = (0..257).map(|part| format!("/nowhere/file@{part}M,size=4096")).collect();
    let parts: Vec<&str> = parts.iter().flat_map(|part| ["--memory", part]).collect();
    let receive = [&["receive", "--listen", "unix:/nowhere/link"], &parts[..]].concat();
    limosa(&receive).fails(2, &["257 parts of memory in one move; expected 256 at most"]);
}
