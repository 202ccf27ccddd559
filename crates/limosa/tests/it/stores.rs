//! `limosa save`, `inspect`, `verify` and `load` with snapshots in files and in an S3 server on a loopback port.

#[path = "../../../store/tests/it/support/gate.rs"]
mod gate;
#[path = "../../../store/tests/it/support/server.rs"]
mod server;

use std::os::unix::fs::FileExt;

use crate::support::{Ended, Folder, JsonOutput, limosa_with, start_with};
use gate::{Gate, Plan};
use limosa_protocol::State;
use rustix::process::Signal;
use server::{BUCKET, DENIED, MISSING, Server};

const USAGE: i32 = 2;
const REFUSED: i32 = 3;
const UNREACHABLE: i32 = 4;
const IN_DOUBT: i32 = 5;
const DAMAGED: i32 = 6;

/// With the environment that leads to the server.
fn at(server: &Server, args: &[&str]) -> Ended {
    limosa_with(&server.variables(), args)
}

#[test]
fn a_device_is_saved_to_a_store_verified_and_loaded() {
    let (server, folder) = (Server::start(), Folder::new());
    let (one, other) = (folder.device("one", &["state=12M"]), folder.device("other", &["state=12M"]));
    one.mark(23);
    let url = format!("s3://{BUCKET}/cards/one");
    let json = at(&server, &["--json", "save", "--stop", &one.socket, &url]).json();
    assert_eq!(json["outcome"], "saved");
    assert!(server.file("cards/one").metadata().unwrap().len() > 12 << 20);
    let text = at(&server, &["inspect", &url]).ok();
    assert!(text.contains("sealed, blake3 ") && text.ends_with("whole: it can be loaded\n"), "{text}");
    let verified = at(&server, &["--json", "verify", &url]).json();
    assert_eq!((&verified["whole"], &verified["sealed"]), (&true.into(), &true.into()));
    assert_eq!(verified["place"], url.as_str());
    let hash = verified["blake3"].as_str().unwrap();
    at(&server, &["verify", &url, "--blake3", hash]).ok();
    at(&server, &["verify", &url, "--blake3", &"0".repeat(64)])
        .fails(DAMAGED, &[&url, "another snapshot", hash]);
    at(&server, &["load", &url, &other.socket]).ok();
    assert!(other.runs(23));
}

#[test]
fn what_is_there_is_replaced_only_with_replace() {
    let (server, folder) = (Server::start(), Folder::new());
    let device = folder.device("device", &[]);
    for place in [format!("s3://{BUCKET}/one"), folder.text("one")] {
        at(&server, &["save", &device.socket, &place]).ok();
        at(&server, &["save", &device.socket, &place]).fails(REFUSED, &[&place, "already"]);
        at(&server, &["save", "--replace", &device.socket, &place]).ok();
        at(&server, &["verify", &place]).ok();
    }
}

#[test]
fn an_object_that_is_not_whole_is_refused_and_the_device_is_not_touched() {
    let (server, folder) = (Server::start(), Folder::new());
    let (saved, device) = (folder.device("saved", &[]), folder.device("device", &[]));
    device.mark(5);
    let url = format!("s3://{BUCKET}/one");
    at(&server, &["save", &saved.socket, &url]).ok();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(server.file("one")).unwrap();
    let bytes = file.metadata().unwrap().len();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bytes / 2).unwrap();
    file.write_all_at(&[!byte[0]], bytes / 2).unwrap();
    for args in [&["verify", &url][..], &["load", &url, &device.socket], &["inspect", &url]] {
        at(&server, args).fails(DAMAGED, &[&url, "byte", "checksum of a frame's payload"]);
        assert!(device.runs(5));
    }
    file.set_len(bytes / 2).unwrap();
    at(&server, &["load", &url, &device.socket]).fails(DAMAGED, &[&url, "ends in the middle of"]);
    assert!(device.runs(5));
}

#[test]
fn what_a_store_refuses_is_said_and_the_device_runs_on() {
    let (mut server, folder) = (Server::start(), Folder::new());
    let device = folder.device("device", &[]);
    device.mark(9);
    let refused = |variables: &[(String, String)], url: &str, code: i32, parts: &[&str]| {
        for args in [&["save", &device.socket, url][..], &["load", url, &device.socket], &["verify", url]] {
            limosa_with(variables, args).fails(code, &[&[url], parts].concat());
            assert!(device.runs(9), "{args:?}");
        }
    };
    let variables = server.variables();
    refused(&variables, &format!("s3://{DENIED}/x"), UNREACHABLE, &["AccessDenied", "s3:"]);
    refused(&variables, &format!("s3://{MISSING}/x"), UNREACHABLE, &["no bucket `nowhere`", "create it"]);
    refused(&variables, "s3://bucket", USAGE, &["expected s3://BUCKET/KEY"]);
    let url = format!("s3://{BUCKET}/x");
    let nobody = [("AWS_EC2_METADATA_DISABLED".to_owned(), "true".to_owned())];
    refused(&nobody, &url, UNREACHABLE, &["no credentials", "AWS_ACCESS_KEY_ID"]);
    let mut another = variables.clone();
    another[1].1 = "wrong".into();
    refused(&another, &url, UNREACHABLE, &["does not accept the credentials", "AWS_SECRET_ACCESS_KEY"]);
    server.stop();
    refused(&variables, &url, UNREACHABLE, &["is the store up?"]);
}

/// A save that leaves its device stopped, in doubt. It is told to stop asking.
#[track_caller]
fn in_doubt(variables: &[(String, String)], device: &str, moves: &str) -> String {
    let url = format!("s3://{BUCKET}/lost");
    let saving = start_with(variables, &["save", "--stop", device, &url, "--moves", moves]);
    saving.line("looking again");
    saving.signal(Signal::INT);
    saving.end().fails(
        IN_DOUBT,
        &[
            "is stopped and in doubt",
            "it is not known whether the snapshot was published",
            &format!("limosa resolve {device}"),
            &format!("limosa verify {url}"),
        ],
    );
    url
}

#[test]
fn a_device_that_was_to_stay_stopped_ran_again_though_its_snapshot_was_published() {
    let (server, folder) = (Server::start(), Folder::new());
    let (device, other) = (folder.device("device", &[]), folder.device("other", &[]));
    device.mark(31);
    let (_gate, variables) = Gate::new(&server, Plan::NetworkIsLost);
    let moves = folder.text("moves");
    let url = in_doubt(&variables, &device.socket, &moves);
    assert!(!device.state().is_running());
    let listed = at(&server, &["resolve", "--moves", &moves]).ok();
    assert!(listed.contains(&format!("{} -> {url}", device.socket)), "{listed}");
    at(&server, &["resolve", &device.socket, "--moves", &moves, "--to", "unix:/nowhere"])
        .fails(USAGE, &[&url, "expected no --to"]);
    let resolved = at(&server, &["resolve", &device.socket, "--moves", &moves]).ok();
    assert!(resolved.contains("moved; it is stopped"), "{resolved}");
    assert_eq!(device.state(), State::Stop);
    at(&server, &["load", &url, &other.socket]).ok();
    assert!(other.runs(31));
    let listed = at(&server, &["resolve", "--moves", &moves]).ok();
    assert!(listed.contains("no move is in doubt"), "{listed}");
}

#[test]
fn a_snapshot_that_may_still_appear_is_left_to_a_person_to_decide() {
    let (server, folder) = (Server::start(), Folder::new());
    let device = folder.device("device", &[]);
    device.mark(32);
    let (_gate, variables) = Gate::new(&server, Plan::NetworkIsLostBefore);
    let moves = folder.text("moves");
    let url = in_doubt(&variables, &device.socket, &moves);
    at(&server, &["resolve", &device.socket, "--moves", &moves])
        .fails(IN_DOUBT, &["stays stopped", &url, "--decide moved", "--decide undone"]);
    assert!(!device.state().is_running());
    at(&server, &["resolve", &device.socket, "--moves", &moves, "--decide", "undone"]).ok();
    assert!(device.runs(32));
}

#[test]
fn passwords_in_addresses_were_printed() {
    let url = format!("s3://{BUCKET}/one");
    let variables = |name: &str, value: &str| {
        let all = [
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "hunter2"),
            ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
            ("AWS_ALLOW_HTTP", "true"),
            (name, value),
        ];
        all.map(|(name, value)| (name.to_owned(), value.to_owned()))
    };
    for (name, value) in [
        ("AWS_ENDPOINT_URL_S3", "http://user:hunter2@127.0.0.1:1"),
        ("AWS_ENDPOINT_URL_S3", "http://user:hunter2@[::1"),
        ("http_proxy", "http://user:hunter2@127.0.0.1:1"),
        ("all_proxy", "http://user:hunter2@[::1"),
    ] {
        let said = limosa_with(&variables(name, value), &["-vvv", "verify", &url]);
        assert_ne!(said.code, 0);
        assert!(!said.err.contains("hunter2") && !said.out.contains("hunter2"), "{name}={value}: {said:?}");
    }
}
