//! `check`.

use super::*;

/// For checks that pass: a machine that does other things beside takes longer than a device may by default.
const LIMIT: [&str; 2] = ["--limit", "120"];

#[test]
fn check_runs_over_a_socket_and_says_what_failed() {
    let folder = Folder::new();
    let device = folder.device("device", &["state=256K"]);
    let peer = folder.device("peer", &["state=256K"]);
    let suite = ["--json", "check", &device.socket, "--peer", &peer.socket, "--destructive"];
    let json = limosa(&[&suite[..], &LIMIT].concat()).json();
    assert_eq!((&json["left_in"], &json["ended_early"]), (&"RUNNING".into(), &serde_json::Value::Null));
    let checks = json["checks"].as_array().unwrap();
    let passed = checks.iter().filter(|check| check["outcome"] == "pass").count();
    assert!(passed > 200 && json["duration_ns"].as_u64() > Some(0), "{passed}: {}", json["duration_ns"]);
    let text = limosa(&["check", &device.socket, "--family", "states"]).ok();
    assert!(text.contains("states") && text.contains("left in RUNNING"), "{text}");
    let tap = limosa(&["check", &device.socket, "--only", "feature.no-operation", "--format", "tap"]).ok();
    assert!(tap.starts_with("KTAP version 1\n1..1\nok 1 feature.no-operation\n"), "{tap}");

    let broken = folder.device("broken", &["state=256K", "fault=fail:RUNNING_P2P>STOP:1000"]);
    let ended = limosa(&["check", &broken.socket, "--only", "states.walk-p2p", "--format", "junit"]);
    ended.fails(1, &["does not conform: states.walk-p2p"]);
    assert!(ended.out.contains("<failure message=") && ended.out.contains("set-state STOP = E"), "{ended:?}");
    let profile = folder.text("profile.json");
    let excused =
        r#"{"flags": "STOP_COPY+P2P", "excused": [{"id": "states.walk-p2p", "why": "its stop fails"}]}"#;
    std::fs::write(&profile, excused).unwrap();
    limosa(&["check", &broken.socket, "--only", "states.walk-p2p", "--profile", &profile]).ok();
    limosa(&["check", &device.socket, "--only", "states.nothing"])
        .fails(2, &["there is no check states.nothing"]);
}

/// Their reports in docs/conformance are these. UPDATE_DOCS=1 writes them anew.
#[test]
fn check_passes_on_the_serial_port_and_on_the_synthetic_device() {
    let folder = Folder::new();
    for model in ["uart", "synthetic"] {
        let device = folder.serve(model, model, &[]);
        let json = limosa(
            &[&["--json", "check", &device.socket, "--destructive", "--family", "vfio-user"], &LIMIT[..]]
                .concat(),
        )
        .json();
        assert_eq!((&json["left_in"], &json["ended_early"]), (&"RUNNING".into(), &serde_json::Value::Null));
        let passed = json["checks"].as_array().unwrap().iter().filter(|check| check["outcome"] == "pass");
        assert!(passed.count() >= 150, "{json}");

        let report = limosa(
            &[&["check", &device.socket, "--destructive", "--format", "markdown"], &LIMIT[..]].concat(),
        )
        .ok();
        let report = report.replace(&device.socket, &format!("limosa serve {model}"));
        let path = format!("{}/../../docs/conformance/{model}.md", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &report).unwrap();
        }
        assert!(std::fs::read_to_string(&path).unwrap() == report, "UPDATE_DOCS=1 writes it anew:\n{report}");
    }
}

#[test]
fn check_plays_random_sequences_and_one_of_them_again() {
    let folder = Folder::new();
    let device = folder.device("device", &["state=256K"]);
    let fuzz = ["--destructive", "--fuzz", "20", "--seed", "1", "--threads", "2"];
    let json = limosa(&[&["--json", "check", &device.socket][..], &fuzz].concat()).json();
    assert_eq!((&json["sequences"], &json["differences"]), (&20.into(), &serde_json::json!([])));
    limosa(&["check", &device.socket, "--fuzz", "1"]).fails(2, &["--destructive"]);

    let broken = folder.device("broken", &["state=256K", "fault=fail:RUNNING_P2P>STOP:1000000"]);
    let known = folder.text("known");
    let fuzz = ["check", &broken.socket, "--destructive", "--fuzz", "5", "--known", &known];
    let ended = limosa(&fuzz);
    ended.fails(1, &["differs from the standard: set-state "]);
    // What is told is a script, and is known from then on.
    let script = folder.text("script");
    std::fs::write(&script, &ended.out).unwrap();
    limosa(&["check", &broken.socket, "--destructive", "--replay", &script])
        .fails(1, &["differs from the standard: set-state "]);
    limosa(&fuzz).ok();
    limosa(&["check", &device.socket, "--destructive", "--fuzz", "0"]).fails(2, &["--fuzz", "0"]);
    std::fs::write(&script, "# nothing\n").unwrap();
    limosa(&["check", &device.socket, "--destructive", "--replay", &script])
        .fails(2, &[&script, "no request"]);
    std::fs::write(&script, "# what was found\n\x7fELF\n").unwrap();
    limosa(&["check", &device.socket, "--destructive", "--fuzz", "1", "--known", &script])
        .fails(2, &["line 2", "is no difference"]);
    std::fs::write(&script, "halt\n").unwrap();
    limosa(&["check", &device.socket, "--destructive", "--replay", &script])
        .fails(2, &["line 1: `halt` is no request"]);
}
