//! The dissector in `contrib/wireshark` on what was recorded. It needs tshark, which `lab/wireshark/run` installs.

mod support;

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use support::{Folder, Running, limosa, start};

/// What tshark prints of a capture with the dissector.
fn tshark(folder: &Folder, capture: &str, options: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contrib/wireshark/vfio-user.lua");
    let mut command = Command::new("tshark");
    command
        .arg("-X")
        .arg(format!("lua_script:{}", script.display()))
        .args(["-r", capture])
        .args(options)
        .env("HOME", folder.path(""));
    let ended = Running::start(&mut command).end();
    assert!(!ended.err.contains("Lua") && !ended.err.contains(".lua:"), "{}", ended.err);
    ended.ok()
}

#[test]
#[ignore = "needs tshark (lab/wireshark/run)"]
fn a_recorded_move_is_dissected() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let (front, capture) = (folder.text("front"), folder.text("trace.pcapng"));
    let proxy = start(&["trace", "--proxy", &front, &server.socket, "--pcap", &capture]);
    proxy.line("listening on");
    limosa(&["save", &front, &folder.text("saved")]).ok();
    // Garbage is shown as what it is.
    let mut garbage = std::os::unix::net::UnixStream::connect(&front).unwrap();
    std::io::Write::write_all(&mut garbage, &[1; 64]).unwrap();
    drop(garbage);
    proxy.line("#2 MALFORMED");
    proxy.signal(Signal::INT);
    let lines = proxy.end().ok();

    let summary = tshark(&folder, &capture, &[]);
    for part in [
        "VERSION",
        "FEATURE SET MIG_DEVICE_STATE PRE_COPY",
        "reply FEATURE SET MIG_DEVICE_STATE STOP_COPY",
        "reply MIG_DATA_READ",
        "a.sock",
        "malformed",
    ] {
        assert!(summary.contains(part), "{part}: {summary}");
    }
    // As many commands as lines say.
    let count = |filter: &str| tshark(&folder, &capture, &["-Y", filter]).lines().count();
    let reads = lines.lines().filter(|line| line.contains(" MIG_DATA_READ ")).count();
    assert_eq!(count("vfio_user.command == 17 && vfio_user.type == 0"), reads);
    assert_eq!(count("vfio_user.command == 17 && vfio_user.type == 1"), reads);
    let to_stop_copy = "vfio_user.state == 3 && vfio_user.feature.set == 1 && vfio_user.type == 0";
    assert_eq!(count(to_stop_copy), 1);
    assert!(count("_ws.expert") > 0, "the garbage");
    let fields = ["-T", "fields", "-e", "vfio_user.argsz", "-e", "vfio_user.feature", "-e", "limosa.name"];
    let shown = tshark(&folder, &capture, &[&["-Y", to_stop_copy][..], &fields].concat());
    assert_eq!(shown.trim(), "16\t2\ta.sock");
}

#[test]
#[ignore = "needs tshark (lab/wireshark/run)"]
fn recorded_calls_are_dissected() {
    let folder = Folder::new();
    let capture = folder.text("trace.pcapng");
    // An ioctl with VFIO's numbers on what is no device: a VFIO device's is refused where there is none.
    let options = ["trace", "--pcap", &capture, "--", env!("CARGO_BIN_EXE_limosa"), "state"];
    let null = std::fs::File::open("/dev/null").unwrap();
    let name = limosa_testing::proc_path(&null);
    let refused = limosa(&[&options[..], &[&name]].concat());
    assert!(refused.code != 0 && refused.err.contains("ENOTTY"), "{refused:?}");
    let shown = tshark(&folder, &capture, &["-Y", "limosa.kind == 4 && limosa.result == -25"]);
    assert!(shown.contains("= -25"), "{shown}");
}
