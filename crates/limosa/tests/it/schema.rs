//! What `--json` prints keeps `docs/output.schema.json`, every command's document and every failure's.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use crate::support::pair::Pair;
use crate::support::{Ended, Folder, JsonOutput, limosa, schema, start};
use rustix::process::Signal;
use serde_json::{Value, json};

/// The documents of an output in lines.
#[track_caller]
fn lines(ended: &Ended) -> Vec<Value> {
    let documents: Vec<Value> = ended.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    documents.iter().for_each(schema::keeps);
    assert!(!documents.is_empty(), "{ended:?}");
    documents
}

#[test]
fn every_command_keeps_the_schema() {
    let mut seen = BTreeSet::new();
    let mut sees = |document: &Value| {
        assert_eq!(document["schema"], 1);
        seen.insert(document["command"].as_str().unwrap().to_owned());
    };
    let pair = Pair::new(&[], &[]);
    let folder = &pair.folder;
    let [file, man, bench, html] = ["file", "man", "bench.json", "report.json"].map(|name| folder.text(name));
    let device = &pair.source.socket;
    for args in [
        &["probe"][..],
        &["probe", device],
        &["state", device],
        &["region", "read", device, "config"],
        &["state", device, "set", "STOP"],
        &["state", device, "reset"],
        &["save", device, &file, "--report", &html],
        &["inspect", &file],
        &["verify", &file],
        &["load", &file, device],
        &["check", device, "--family", "states"],
        &["check", "--list"],
        &["check", "--clauses"],
        &["check", device, "--destructive", "--fuzz", "2"],
        &["doctor", "--findings"],
        &["fsm"],
        &["bench", device, "--seconds", "0.001", "--report", &bench],
        &["bench", "compare", &bench, &bench],
        &["completions", "bash"],
        &["man", &man],
        &["resolve"],
        &["demo", "--state-size", "1M", "--memory", "4M"],
    ] {
        sees(&limosa(&[&["--json"], args].concat()).json());
    }
    for written in [&html, &bench] {
        let document: Value = serde_json::from_slice(&std::fs::read(written).unwrap()).unwrap();
        schema::keeps(&document);
    }
    // It has warnings on some machines, and says so after its document.
    let doctor = limosa(&["--json", "doctor", device, "--measure"]);
    let document: Value = serde_json::from_str(&doctor.out).unwrap();
    schema::keeps(&document);
    sees(&document);
    let traced = limosa(&["--json", "trace", "--", "true"]);
    assert_eq!((traced.code, &*traced.out), (0, ""));

    let front = folder.text("front");
    let proxy = start(&["--json", "trace", "--proxy", &front, device]);
    proxy.line("listening on");
    limosa(&["probe", &front]).ok();
    proxy.signal(Signal::TERM);
    lines(&proxy.end()).iter().for_each(&mut sees);

    let listen = format!("unix:{}", folder.text("schema-link"));
    let receiver = start(&["--json", "receive", &pair.destination.socket, "--listen", &listen]);
    receiver.line("listening on");
    sees(&limosa(&["--json", "send", device, "--to", &listen]).json());
    sees(&receiver.end().json());
    sees(
        &limosa(&["--json", "migrate", &pair.destination.socket, &folder.device("third", &[]).socket]).json(),
    );

    let (old, takeover) = (folder.text("old"), folder.text("takeover"));
    let serve =
        ["--json", "serve", "synthetic", "-o", "state=64K", "--socket", &old, "--takeover", &takeover];
    let server = start(&serve);
    server.line("listening on");
    // The new server keeps the standard error of the command, so nothing waits for the end of that.
    let limosa = env!("CARGO_BIN_EXE_limosa");
    let mut switch = Command::new(limosa);
    switch.args(["--json", "switch-over", &takeover, "--", limosa]).args(&serve[1..]).stderr(Stdio::null());
    let document: Value = serde_json::from_slice(&switch.output().unwrap().stdout).unwrap();
    schema::keeps(&document);
    sees(&document);
    let served: Value = serde_json::from_str(&server.end().out).unwrap();
    schema::keeps(&served);
    sees(&served);
    let new = document["took_over"]["pid"].as_i64().unwrap() as i32;
    rustix::process::kill_process(rustix::process::Pid::from_raw(new).unwrap(), Signal::TERM).unwrap();

    let text: Value = serde_json::from_str(&std::fs::read_to_string(schema::FILE).unwrap()).unwrap();
    let known = text["properties"]["command"]["enum"].as_array().unwrap();
    let known: BTreeSet<String> = known.iter().map(|name| name.as_str().unwrap().to_owned()).collect();
    // It prints when it is asked, which `tests/resolving.rs` does.
    let unseen: Vec<_> = known.difference(&seen).filter(|name| *name != "answer").collect();
    assert!(unseen.is_empty() && known.is_superset(&seen), "{unseen:?}: {seen:?}");
}

#[test]
fn every_failure_keeps_the_schema() {
    let folder = Folder::new();
    let (source, other) = (folder.device("source", &[]), folder.device("other", &["state=2M"]));
    limosa(&["--json", "frob"]).json_failure(2);
    limosa(&["--json", "probe", &folder.text("none")]).json_failure(4);
    let undone = limosa(&["--json", "migrate", &source.socket, &other.socket]).json_failure(3);
    assert_eq!(undone["report"]["outcome"], "undone");
    std::fs::write(folder.path("bad"), "no stream").unwrap();
    limosa(&["--json", "inspect", &folder.text("bad")]).json_failure(6);
}

/// A schema that lets everything through would be none.
#[test]
fn what_breaks_the_schema_is_found() {
    let state = json!({ "schema": 1, "command": "state", "device": "x", "state": "STOP" });
    assert_eq!(schema::breach(&state), None);
    let with = |key: &str, value: Value| {
        let mut broken = state.clone();
        broken[key] = value;
        broken
    };
    for broken in [
        with("schema", 2.into()),
        with("command", "frob".into()),
        with("state", "HALT".into()),
        with("more", 1.into()),
        with("code", 0.into()),
        json!({ "command": "state", "device": "x", "state": "STOP" }),
        json!({ "schema": 1, "command": "state", "state": "STOP" }),
        json!({ "schema": 1, "command": "inspect", "code": 11, "message": "x" }),
        json!({ "schema": 1, "command": "doctor", "findings": "x" }),
        json!({ "schema": 1, "command": "doctor", "findings": [{ "flags": "STOP_COPY" }] }),
    ] {
        assert!(schema::breach(&broken).is_some(), "{broken}");
    }
}

#[test]
fn log_lines_can_be_documents() {
    let said = Pair::new(&[], &[]).migrate(&["--log-json", "-v"]);
    assert!(said.code == 0 && !said.err.is_empty(), "{said:?}");
    for line in said.err.lines() {
        let document: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let keys: Vec<&String> = document.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["fields", "level", "target", "timestamp"], "{line}");
        assert!(document["fields"]["message"].is_string(), "{line}");
    }
}
