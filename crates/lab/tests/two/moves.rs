//! Moves that arrive, and moves that are refused before anything is disturbed.

use std::collections::BTreeSet;

use limosa_lab::{Machine, kinds};

use crate::scene::{Guest, moved, receiver, run, start};

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_of_every_kind_arrives_with_all_that_it_held() {
    let (here, there) = (Machine::here(), Machine::there());
    for kind in kinds() {
        let (source, destination) = (Guest::new(&here, &kind), Guest::new(&there, &kind));
        let mark = source.mark(7);
        let (sent, received) = moved(&source, &destination, &[]);
        sent.ok();
        received.ok();
        assert_eq!(destination.state(), "RUNNING", "{kind:?}");
        assert_eq!(destination.taken(), mark, "{kind:?}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_goes_there_and_back_without_pre_copy_too() {
    let (here, there) = (Machine::here(), Machine::there());
    for kind in kinds() {
        let (one, other) = (Guest::new(&here, &kind), Guest::new(&there, &kind));
        let mark = one.mark(9);
        let (receiving, address) = receiver(&other, &[]);
        run(&here, &["send", "--no-precopy", one.device.uuid(), "--to", &address, "--insecure"]).ok();
        receiving.end().ok();
        let back = Guest::new(&here, &kind);
        let (sent, received) = moved(&other, &back, &[]);
        sent.ok();
        received.ok();
        assert_eq!(back.taken(), mark, "{kind:?}");
    }
}

/// The names in a JSON document, with the names around them.
fn names(value: &serde_json::Value, at: &str, into: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(members) => {
            for (name, value) in members {
                let at = format!("{at}.{name}");
                names(value, &at, into);
                into.insert(at);
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| names(value, at, into)),
        _ => {}
    }
}

fn shape(report: &str) -> BTreeSet<String> {
    let mut into = BTreeSet::new();
    names(&serde_json::from_str(report).unwrap(), "", &mut into);
    into
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn the_report_of_a_move_is_that_of_devices_behind_sockets() {
    let (here, there) = (Machine::here(), Machine::there());
    let socket = "/run/device";
    let servers = [&here, &there].map(|machine| {
        let server = start(machine, &["-v", "serve", "synthetic", "--socket", socket, "-o", "state=1M"]);
        server.line("listening on");
        server
    });
    let listen = format!("tcp:{}:0", there.address);
    let receiving = start(&there, &["-v", "--json", "receive", socket, "--listen", &listen, "--insecure"]);
    let line = receiving.line("listening on ");
    let address = line.split("listening on ").nth(1).unwrap().trim();
    let sent = shape(&run(&here, &["--json", "send", socket, "--to", address, "--insecure"]).ok());
    let received = shape(&receiving.end().ok());
    drop(servers);
    assert!(sent.len() > 10 && received.len() > 10, "{sent:?} {received:?}");
    for kind in kinds() {
        let (source, destination) = (Guest::new(&here, &kind), Guest::new(&there, &kind));
        let (source, destination) = moved(&source, &destination, &["--json"]);
        for (report, model) in [(source, &sent), (destination, &received)] {
            assert_eq!(&shape(&report.ok()), model, "{kind:?}");
        }
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn a_device_of_another_kind_is_refused_and_neither_is_disturbed() {
    let (here, there) = (Machine::here(), Machine::there());
    let kinds = kinds();
    let kind = |name: &str| kinds.iter().find(|kind| kind.name == name).unwrap();
    for (from, to) in [("mtty-1", "limosa-full"), ("limosa-full", "mtty-1"), ("mtty-1", "mtty-2")] {
        let (source, destination) = (Guest::new(&here, kind(from)), Guest::new(&there, kind(to)));
        let (mark_here, mark_there) = (source.mark(3), destination.mark(5));
        let (sent, received) = moved(&source, &destination, &[]);
        sent.fails(3, &["as it was before"]);
        received.fails(3, &[destination.device.uuid()]);
        assert_eq!((source.state(), destination.state()), ("RUNNING".into(), "RUNNING".into()));
        assert_eq!(source.taken(), mark_here, "{from} to {to}");
        assert_eq!(destination.taken(), mark_there, "{from} to {to}");
    }
}

#[test]
#[ignore = "runs in the lab's kernel (lab/run)"]
fn nobody_who_listens_leaves_the_source_alone() {
    let (here, there) = (Machine::here(), Machine::there());
    for kind in kinds() {
        let source = Guest::new(&here, &kind);
        let mark = source.mark(1);
        let address = format!("tcp:{}:9", there.address);
        run(&here, &["send", source.device.uuid(), "--to", &address, "--insecure"]).fails(4, &[&address]);
        assert_eq!(source.state(), "RUNNING");
        assert_eq!(source.taken(), mark, "{kind:?}");
    }
}
