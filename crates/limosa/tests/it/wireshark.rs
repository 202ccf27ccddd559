//! The dissector in `contrib/wireshark` on what was recorded. It needs tshark, which `lab/wireshark/run` installs.

use std::path::Path;
use std::process::Command;

use crate::support::{Folder, Running, limosa, start};
use rustix::process::Signal;

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
    assert!(!ended.out.contains("Lua Error"), "{}", ended.out);
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
    // An error of the dissector is part of the tree.
    tshark(&folder, &capture, &["-V"]);
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
fn a_capture_is_dissected_as_it_comes() {
    let folder = Folder::new();
    let server = folder.device("a.sock", &[]);
    let front = folder.text("front");
    let args = ["trace", "--proxy", &front, &server.socket, "--pcap", "-"];
    let (reader, writer) = std::io::pipe().unwrap();
    let mut proxy = crate::support::start_into(writer, &args);
    let mut said = std::io::BufRead::lines(std::io::BufReader::new(proxy.stderr.take().unwrap()));
    assert!(said.next().unwrap().unwrap().starts_with("listening on "));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contrib/wireshark/vfio-user.lua");
    let mut tshark = Command::new("tshark");
    let script = format!("lua_script:{}", script.display());
    tshark.args(["-l", "-X", &script, "-i", "-"]).env("HOME", folder.path(""));
    let tshark = Running::start_with_input(&mut tshark, reader);
    limosa(&["probe", &front]).ok();
    tshark.line("reply FEATURE GET MIGRATION");
    rustix::process::kill_process(rustix::process::Pid::from_child(&proxy), Signal::INT).unwrap();
    assert_eq!(proxy.wait().unwrap().code(), Some(0));
    // The end of the pipe is that of the capture.
    tshark.end().ok();
}

/// A request of the state STOP_COPY and a reset, to what is no device.
#[test]
#[ignore = "a program of another test"]
fn asks_what_is_no_device() {
    use rustix::ioctl::{NoArg, Setter, ioctl};
    let null = std::fs::File::open("/dev/null").unwrap();
    // struct vfio_device_feature: argsz, SET MIG_DEVICE_STATE, STOP_COPY, no fd.
    let set = [16u32, 1 << 17 | 2, 3, u32::MAX];
    // SAFETY: makes the argument of an ioctl, and none.
    let feature = unsafe { Setter::<0x3b75, _>::new(set) };
    // SAFETY: /dev/null knows no ioctl, and the argument has the length that it says.
    let refused = unsafe { ioctl(&null, feature) };
    // SAFETY: makes the call of an ioctl without an argument, and none.
    let nothing = unsafe { NoArg::<0x3b6f>::new() };
    // SAFETY: it has no argument.
    let reset = unsafe { ioctl(&null, nothing) };
    assert_eq!((refused, reset), (Err(rustix::io::Errno::NOTTY), Err(rustix::io::Errno::NOTTY)));
}

#[test]
#[ignore = "needs tshark (lab/wireshark/run)"]
fn recorded_calls_are_dissected() {
    let folder = Folder::new();
    let capture = folder.text("trace.pcapng");
    let program = limosa_testing::this_test("wireshark::asks_what_is_no_device");
    let words = std::iter::once(program.get_program()).chain(program.get_args());
    let words: Vec<_> = words.map(|word| word.to_str().unwrap()).collect();
    limosa(&[&["trace", "--pcap", &capture, "--"], &words[..]].concat()).ok();
    let shown = tshark(&folder, &capture, &["-Y", "limosa.kind == 4 && limosa.result == -25"]);
    assert!(shown.contains("FEATURE SET MIG_DEVICE_STATE STOP_COPY = -25"), "{shown}");
    assert!(shown.contains("ioctl 0x3b6f = -25") && shown.contains("/dev/null"), "{shown}");
    tshark(&folder, &capture, &["-V"]);
}
