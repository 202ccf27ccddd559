//! `limosa bench` on devices of every condition, and the comparison of two runs.

use crate::support::{Folder, JsonOutput, limosa, start, start_reading};
use limosa_client::DeviceExt;
use limosa_protocol::State;
use rustix::process::Signal;
use serde_json::Value;

/// The guest that the device holds.
const GUEST: u64 = 0x6265_6e63;

/// A share that leaves each measure with few samples.
const SHORT: [&str; 2] = ["--seconds", "0.001"];

fn measure<'a>(document: &'a Value, id: &str) -> Option<&'a Value> {
    document["measures"].as_array().unwrap().iter().find(|measure| measure["id"] == id)
}

fn skipped<'a>(document: &'a Value, id: &str) -> Option<&'a str> {
    let found = document["skipped"].as_array().unwrap().iter().find(|skipped| skipped["id"] == id);
    found.map(|skipped| skipped["why"].as_str().unwrap())
}

#[track_caller]
fn has(document: &Value, ids: &[&str]) {
    for id in ids {
        let Some(measure) = measure(document, id) else { panic!("no {id}: {document:#}") };
        assert!(measure["samples"].as_u64().unwrap() > 0, "{measure:#}");
        let [best, median, most] = ["best_ns", "p50_ns", "max_ns"].map(|key| measure[key].as_u64().unwrap());
        assert!(best <= median && median <= most, "{measure:#}");
    }
}

#[test]
fn a_device_is_measured_and_gets_its_state_back() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    device.mark(GUEST);
    let document = limosa(&[&["--json", "bench", &device.socket][..], &SHORT].concat()).json();
    has(
        &document,
        &[
            "region read, 8 B",
            "region write, 8 B",
            "arc RUNNING>RUNNING_P2P",
            "arc STOP>STOP_COPY",
            "arc PRE_COPY>PRE_COPY_P2P",
            "arc RESUMING>STOP",
            "stop: RUNNING to STOP",
            "start: STOP to RUNNING",
            "reset",
            "pre-copy read by 4 KiB",
            "stop-copy read by 1 MiB",
            "resuming write by 64 KiB",
            "dirty report of 16 MiB",
            "dirty report of 64 GiB",
        ],
    );
    for (percent, pages) in [(1, 41), (10, 410), (100, 4096)] {
        let measure = measure(&document, &format!("dirty report of 16 MiB, {percent} % dirty")).unwrap();
        let expected = format!("{pages} of 4096 pages dirty");
        assert!(measure["note"].as_str().unwrap().contains(&expected), "{measure:#}");
    }
    let arcs = document["measures"].as_array().unwrap().iter();
    assert_eq!(arcs.filter(|measure| measure["id"].as_str().unwrap().starts_with("arc ")).count(), 15);
    assert!(measure(&document, "stop-copy read by 4 KiB").unwrap()["beside"]["p50_ns"].as_u64().unwrap() > 0);
    assert_eq!((&document["left_in"], &document["ended_early"]), (&"RUNNING".into(), &Value::Null));
    assert!(document["skipped"].as_array().unwrap().is_empty(), "{document:#}");
    assert!(device.runs(GUEST));
}

#[test]
fn whole_moves_go_there_and_back() {
    let folder = Folder::new();
    let (device, peer) = (folder.device("device", &[]), folder.device("peer", &[]));
    device.mark(GUEST);
    let args = [&["--json", "bench", &device.socket, "--peer", &peer.socket][..], &SHORT].concat();
    let document = limosa(&args).json();
    has(&document, &["move", "downtime of a move"]);
    let [all, down] =
        ["move", "downtime of a move"].map(|id| measure(&document, id).unwrap()["p50_ns"].as_u64());
    assert!(down <= all, "{document:#}");
    assert!(device.runs(GUEST));
    assert_eq!(peer.state(), State::Running);
    limosa(&["bench", &device.socket, "--peer", &device.socket]).fails(2, &["the device itself"]);
}

/// The run ended with code 0.
#[test]
fn a_move_that_could_not_be_measured_was_done() {
    let folder = Folder::new();
    let (device, other) = (folder.device("device", &[]), folder.serve("uart", "other", &[]));
    let ended = limosa(&[&["--json", "bench", &device.socket, "--peer", &other.socket][..], &SHORT].concat());
    // As `limosa migrate` ends.
    assert_eq!(ended.code, 3, "{ended:?}");
    assert_eq!(limosa(&["migrate", &device.socket, &other.socket]).code, 3);
    assert!(ended.err.contains("no move") && ended.err.contains("PCI identification"), "{ended:?}");
    let document: Value = serde_json::from_str(&ended.out).unwrap();
    has(&document, &["arc STOP>STOP_COPY", "reset"]);
    assert!(skipped(&document, "move").unwrap().contains("cannot be moved"), "{document:#}");
    // A device that refuses to give its state.
    let (broken, peer) =
        (folder.device("broken", &["fault=error:STOP>STOP_COPY"]), folder.device("peer", &[]));
    let args = ["--json", "bench", &broken.socket, "--peer", &peer.socket];
    let ended = limosa(&[&args[..], &SHORT].concat());
    assert_eq!(ended.code, 3, "{ended:?}");
    assert!(ended.err.contains("cannot be given back"), "{ended:?}");
}

/// 64 MiB of state took a minute.
#[test]
fn much_state_took_longer_than_its_share() {
    let folder = Folder::new();
    let device = folder.serve("synthetic", "device", &["state=32M", "verify=off"]);
    let document = limosa(&[&["--json", "bench", &device.socket][..], &SHORT].concat()).json();
    for id in ["stop-copy read by 4 KiB", "resuming write by 4 KiB"] {
        let samples = measure(&document, id).unwrap()["samples"].as_u64().unwrap();
        // All of the state would be 8192 of them.
        assert!(samples > 0 && samples < 8192, "{id}: {samples}");
    }
    let loaded = measure(&document, "arc RESUMING>STOP").unwrap();
    assert_eq!((&loaded["samples"], &loaded["note"]), (&1.into(), &"one sample".into()), "{loaded:#}");
    assert_eq!(device.state(), State::Running);
}

#[test]
fn lines_come_as_they_are_done_and_reports_are_written() {
    let folder = Folder::new();
    let device = folder.device("device", &["pre-copy=off"]);
    let [html, json, text] = ["run.html", "run.json", "run.txt"].map(|name| folder.text(name));
    let args = ["bench", &device.socket, "--report", &html, "--report", &json, "--report", &text];
    let ended = limosa(&[&args[..], &SHORT].concat());
    let out = ended.ok();
    assert!(out.starts_with("measuring ") && out.contains("stopped and reset"), "{out}");
    assert!(
        out.contains("arc STOP>RUNNING") && out.contains("left in RUNNING") && !out.contains("pre-copy"),
        "{out}"
    );
    assert!(std::fs::read_to_string(&html).unwrap().contains("<h1>Bench of "));
    assert!(std::fs::read_to_string(&text).unwrap().contains("arc STOP>RUNNING"));
    // A run is no different from itself.
    let same = limosa(&["--json", "bench", "compare", &json, &json]).json();
    assert!(same["rows"].as_array().unwrap().len() > 20, "{same:#}");
    assert!(same["rows"].as_array().unwrap().iter().all(|row| row["ratio"] == 1.0), "{same:#}");
}

#[test]
fn a_difference_beyond_the_spread_has_a_code() {
    let folder = Folder::new();
    let device = folder.device("device", &["pre-copy=off"]);
    let document = limosa(&[&["--json", "bench", &device.socket][..], &SHORT].concat()).json();
    let write = |name: &str, document: &Value| {
        std::fs::write(folder.path(name), document.to_string()).unwrap();
        folder.text(name)
    };
    // On a busy machine a measure may have too few samples for a spread of its own.
    let taking = |ns: u64| {
        let mut document = document.clone();
        for measure in document["measures"].as_array_mut().unwrap() {
            for key in ["best_ns", "p50_ns", "p90_ns", "p99_ns", "max_ns"] {
                measure[key] = ns.into();
            }
            measure["spread_ns"] = serde_json::json!([ns, ns]);
        }
        document
    };
    let (first, second) = (write("first", &taking(1_000)), write("second", &taking(1_000_000)));
    let ended = limosa(&["bench", "compare", &first, &second]);
    assert_eq!(ended.code, 9, "{ended:?}");
    assert!(
        ended.out.contains("slower, beyond the spread") && ended.err.contains("beyond the spread"),
        "{ended:?}"
    );
    std::fs::write(folder.path("wrong"), "[]").unwrap();
    limosa(&["bench", "compare", &first, &folder.text("wrong")]).fails(6, &["wrong", "no document"]);
    limosa(&["bench", "compare", &first, "/nowhere"]).fails(4, &["/nowhere", "cannot be read"]);
}

#[test]
fn a_device_that_a_guest_uses_is_refused_unless_that_is_said() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    device.mark(GUEST);
    let vmm = device.client();
    limosa(&["bench", &device.socket]).fails(3, &["a VMM is using it", "--in-use"]);
    let args = [&["--json", "bench", "--in-use", &device.socket][..], &SHORT].concat();
    let document = limosa(&args).json();
    has(&document, &["arc RUNNING>RUNNING_P2P", "stop-copy read by 64 KiB", "stop: RUNNING to STOP"]);
    for absent in [
        "reset",
        "arc STOP>RESUMING",
        "resuming write by 64 KiB",
        "dirty report of 1 GiB",
        "region write, 8 B",
    ] {
        assert!(measure(&document, absent).is_none(), "{absent}");
    }
    assert_eq!((vmm.state().unwrap(), &document["left_in"]), (State::Running, &"RUNNING".into()));
    drop(vmm);
    assert!(device.runs(GUEST));
}

#[test]
fn states_in_the_middle_of_a_move_are_left_and_error_is_left_behind() {
    let folder = Folder::new();
    let faults = ["fault=error:RUNNING_P2P>PRE_COPY_P2P", "fault=fail:PRE_COPY>PRE_COPY_P2P:1000000"];
    let device = folder.device("device", &faults);
    for state in [State::Stop, State::PreCopy, State::Resuming] {
        device.client().set_state(state).unwrap();
        limosa(&["bench", &device.socket]).fails(3, &[state.name(), "RUNNING is expected"]);
        assert_eq!(device.state(), state);
        limosa_client::Device::reset(&device.client()).unwrap();
    }
    device.client().set_state(State::RunningP2p).unwrap();
    assert!(device.client().set_state(State::PreCopyP2p).is_err());
    assert_eq!(device.state(), State::Error);
    let document = limosa(&[&["--json", "bench", &device.socket][..], &SHORT].concat()).json();
    assert!(skipped(&document, "the state that was found").unwrap().contains("ERROR"));
    // An arc fails, and the others are measured.
    assert!(skipped(&document, "arc PRE_COPY>PRE_COPY_P2P").is_some(), "{document:#}");
    has(&document, &["arc STOP>STOP_COPY", "stop-copy read by 4 KiB", "dirty report of 1 GiB"]);
    assert_eq!((&document["left_in"], device.state()), (&"RUNNING".into(), State::Running));
}

#[test]
fn a_state_that_cannot_be_loaded_back_is_told() {
    let folder = Folder::new();
    let device = folder.device("device", &["fault=truncate:1000"]);
    let ended = limosa(&[&["--json", "bench", &device.socket][..], &SHORT].concat());
    assert_eq!(ended.code, 1, "{ended:?}");
    let document: Value = serde_json::from_str(&ended.out).unwrap();
    assert!(document["left_in"].as_str().unwrap().starts_with("RUNNING, without the state"), "{document:#}");
    assert!(skipped(&document, "arc RESUMING>STOP").is_some(), "{document:#}");
    has(&document, &["arc STOP>STOP_COPY", "stop-copy read by 64 KiB", "reset"]);
    assert_eq!(device.state(), State::Running);
}

#[test]
fn an_arc_that_hangs_costs_its_limit_and_the_run_says_where_it_ended() {
    let folder = Folder::new();
    let device = folder.device("device", &["fault=stall:RUNNING>PRE_COPY:600000"]);
    let limits = ["--timeout", "3", "--state-timeout", "3"];
    let args = [&["--json", "bench", &device.socket][..], &SHORT, &limits].concat();
    let ended = limosa(&args);
    assert_eq!(ended.code, 1, "{ended:?}");
    let document: Value = serde_json::from_str(&ended.out).unwrap();
    assert!(document["ended_early"].as_str().unwrap().contains("PRE_COPY"), "{document:#}");
    assert!(document["left_in"].as_str().unwrap().contains("unknown"), "{document:#}");
    has(&document, &["region read, 8 B"]);
    device.kill_now();
}

#[test]
fn a_device_that_dies_ends_the_run_with_what_was_measured() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let running = start(&["bench", &device.socket, "--seconds", "0.2"]);
    running.line("region read, 8 B");
    device.kill_now();
    let ended = running.end();
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.err.contains("cannot be opened any more"), "{ended:?}");
}

#[test]
fn a_run_that_is_interrupted_gives_the_device_back() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    device.mark(GUEST);
    let running = start(&["bench", &device.socket, "--seconds", "60"]);
    running.line("measuring ");
    running.signal(Signal::INT);
    let ended = running.end();
    assert_eq!(ended.code, 7, "{ended:?}");
    assert!(ended.err.contains("left in RUNNING"), "{ended:?}");
    assert!(device.runs(GUEST));
}

/// SIGHUP ended the run with the device in STOP.
#[test]
fn a_run_whose_terminal_was_closed_left_the_device_stopped() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    device.mark(GUEST);
    for signal in [Signal::HUP, Signal::QUIT, Signal::TERM] {
        let running = start(&["bench", &device.socket, "--seconds", "60"]);
        running.line("measuring ");
        running.signal(signal);
        // A second one does not end the command before the device is back.
        running.signal(signal);
        let ended = running.end();
        assert_eq!(ended.code, 7, "{ended:?}");
        assert!(ended.err.contains("left in RUNNING"), "{ended:?}");
        assert!(device.runs(GUEST));
    }
}

#[test]
fn runs_with_nothing_in_common_were_no_different() {
    let folder = Folder::new();
    let device = folder.device("device", &["pre-copy=off"]);
    let mut document = limosa(&[&["--json", "bench", &device.socket][..], &SHORT].concat()).json();
    let write = |name: &str, document: &Value| {
        std::fs::write(folder.path(name), document.to_string()).unwrap();
        folder.text(name)
    };
    let first = write("first", &document);
    document["ended_early"] = "the device went away".into();
    let early = write("early", &document);
    let said = limosa(&["bench", "compare", &first, &early]).ok();
    assert!(said.contains("note: the second run ended early: the device went away"), "{said}");
    document["measures"] = Value::Array(Vec::new());
    let nothing = write("nothing", &document);
    limosa(&["bench", "compare", &first, &nothing]).fails(3, &["first", "nothing", "no measure in common"]);
}

/// It was waited for, for ever.
#[test]
fn a_run_was_awaited_from_a_fifo_that_nobody_wrote_to() {
    let folder = Folder::new();
    let device = folder.device("device", &["pre-copy=off"]);
    let run = folder.text("run.json");
    limosa(&[&["bench", &device.socket, "--report", &run][..], &SHORT].concat()).ok();
    let fifo = folder.text("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for pair in [[&fifo, &run], [&run, &fifo]] {
        limosa(&["bench", "compare", pair[0], pair[1]])
            .fails(4, &["it is a FIFO", "expected a regular file"]);
    }
    // One that is given as standard input ends.
    let same = start_reading(std::fs::File::open(&run).unwrap(), &["bench", "compare", &run, "-"]).end();
    assert_eq!(same.code, 0, "{same:?}");
    limosa(&["bench", "compare", "-", "-"]).fails(2, &["standard input"]);
    for [first, second] in [["run.json", "edited"], ["edited", "run.json"]] {
        let text = std::fs::read_to_string(&run).unwrap().replacen("\"each_ns\": ", "\"each_ns\": -", 1);
        std::fs::write(folder.path("edited"), text).unwrap();
        let files = [folder.text(first), folder.text(second)];
        limosa(&["bench", "compare", &files[0], &files[1]]).fails(6, &["edited: it is damaged at each_ns"]);
    }
}

/// The run ended with code 7, as if the device had been given back.
#[test]
fn a_device_that_went_silent_before_the_run_was_called_off_counted_as_given_back() {
    let folder = Folder::new();
    let device = folder.device("device", &["fault=stall:RUNNING>PRE_COPY:600000"]);
    let limits = ["--timeout", "3", "--state-timeout", "3"];
    let running = start(&[&["bench", &device.socket][..], &SHORT, &limits].concat());
    // The last measure that ends before the arc that hangs.
    running.line("arc RUNNING>RUNNING_P2P");
    running.signal(Signal::INT);
    let ended = running.end();
    let is_back = ended.err.contains("left in RUNNING");
    assert_eq!(ended.code, if is_back { 7 } else { 1 }, "{ended:?}");
    device.kill_now();
}
