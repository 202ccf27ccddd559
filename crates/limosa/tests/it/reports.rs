//! `--report`: a file for each form, of moves that succeed and of those that fail.

use crate::support::{Folder, limosa, start};

#[test]
fn a_report_is_written_in_the_form_that_its_name_asks_for_on_both_sides() {
    let folder = Folder::new();
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    let files = ["a.html", "b.json", "c.txt"].map(|name| folder.text(name));
    let [html, json, text] = &files;
    std::fs::write(json, "x".repeat(100_000)).unwrap();
    let (link, there) = (format!("unix:{}", folder.text("link")), folder.text("there.json"));
    let receiver = start(&["receive", &destination.socket, "--listen", &link, "--report", &there]);
    receiver.line("listening on");
    let sent = limosa(&[
        "send",
        &source.socket,
        "--to",
        &link,
        "--report",
        html,
        "--report",
        json,
        "--report",
        text,
    ])
    .ok();
    receiver.end().ok();
    let [html, json, text] = files.map(|file| std::fs::read_to_string(file).unwrap());
    assert_eq!(text, sent, "what was printed");
    assert!(html.starts_with("<!") && html.contains("<svg") && html.contains("</html>"), "{html}");
    assert!(html.contains(&*source.socket));
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let there: serde_json::Value = serde_json::from_slice(&std::fs::read(there).unwrap()).unwrap();
    assert_eq!((&json["outcome"], &there["outcome"]), (&"moved".into(), &"runs".into()));
    assert_eq!(json["id"], there["id"]);
}

#[test]
fn a_move_that_fails_is_reported_too() {
    let folder = Folder::new();
    let source = folder.device("source", &[]);
    let destination = folder.device("destination", &["fault=fail:RESUMING>STOP"]);
    let report = folder.text("report.json");
    let (text, html) = (folder.text("report.txt"), folder.text("report.html"));
    let more = ["--report", &text, "--report", &html];
    limosa(&[&["migrate", &source.socket, &destination.socket, "--report", &report], &more[..]].concat())
        .fails(3, &["as it was before"]);
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(json["outcome"], "undone");
    let why = json["why"].as_str().unwrap();
    assert!(why.contains(&destination.socket), "{why}");
    let [text, html] = [text, html].map(|file| std::fs::read_to_string(file).unwrap());
    assert!(text.contains(&format!("outcome undone: {why}")), "{text}");
    assert!(
        html.contains("<p class=\"badge bad\">not moved: ") && html.contains("limosa migrate "),
        "{html}"
    );
    assert!(json["phases"].as_array().unwrap().iter().any(|phase| phase["phase"] == "undo"), "{json}");
}

#[test]
fn a_report_that_cannot_be_written_is_said_before_anything_is_moved() {
    let folder = Folder::new();
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    source.mark(5);
    let nowhere = folder.text("no/where.html");
    let migrate =
        |report: &str| limosa(&["migrate", &source.socket, &destination.socket, "--report", report]);
    migrate(&nowhere).fails(4, &["--report", &nowhere, "No such file"]);
    for unknown in ["report", "report.pdf", ".html"] {
        migrate(unknown).fails(2, &["--report", unknown, ".html, .json or .txt"]);
    }
    assert!(source.runs(5) && destination.runs(0));
}

#[test]
fn a_report_through_a_link_overwrote_the_file_behind_it() {
    let folder = Folder::new();
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    source.mark(5);
    let report = folder.text("report.html");
    std::fs::write(folder.path("precious"), "precious").unwrap();
    std::os::unix::fs::symlink("precious", &report).unwrap();
    let migrate = ["migrate", &source.socket, &destination.socket, "--report", &report];
    limosa(&migrate).fails(3, &["--report", &report, "symbolic link"]);
    assert_eq!(std::fs::read(folder.path("precious")).unwrap(), b"precious");
    std::fs::remove_file(&report).unwrap();
    std::os::unix::net::UnixListener::bind(&report).unwrap();
    limosa(&migrate).fails(3, &["--report", &report, "a socket"]);
    assert!(source.runs(5) && destination.runs(0), "before anything is moved");
    // One that comes later is replaced itself, or refused; what is behind it stays.
    std::fs::remove_file(&report).unwrap();
    let link = format!("unix:{}", folder.text("link"));
    let receiver = start(&["receive", &destination.socket, "--listen", &link, "--report", &report]);
    receiver.line("listening on");
    std::os::unix::fs::symlink("precious", &report).unwrap();
    limosa(&["send", &source.socket, "--to", &link]).ok();
    receiver.end().fails(8, &["--report", &report, "symbolic link"]);
    assert_eq!(std::fs::read(folder.path("precious")).unwrap(), b"precious");
}

#[test]
fn a_report_was_empty_until_the_end_of_the_move() {
    let folder = Folder::new();
    let destination = folder.device("destination", &[]);
    let (link, report) = (format!("unix:{}", folder.text("link")), folder.text("report.json"));
    let receive = ["receive", &destination.socket, "--listen", &link, "--report", &report];
    for old in [None, Some("an older report")] {
        old.map_or(Ok(()), |old| std::fs::write(&report, old)).unwrap();
        let receiver = start(&receive);
        receiver.line("listening on");
        assert_eq!(std::fs::read_to_string(&report).ok().as_deref(), old);
        receiver.kill();
        assert_eq!(std::fs::read_to_string(&report).ok().as_deref(), old);
        std::fs::remove_file(folder.path("link")).unwrap();
    }
}
