//! Exit codes: one cause has one code, whichever command meets it.

use std::collections::BTreeSet;

use crate::support::users::{can_be_another, start_as_other};
use crate::support::{Folder, limosa, on_a_disk};

const USAGE: i32 = 2;
const REFUSED: i32 = 3;
const UNREACHABLE: i32 = 4;
const NOT_READY: i32 = 10;

/// What stands for a name in a command line, so that one list serves for every cause.
const DEVICE: &str = "@DEVICE";
/// A file or a folder that is read.
const READ: &str = "@READ";
/// A file or a socket that is made.
const MADE: &str = "@MADE";

/// Every command line that opens a device, with nothing else that can be wrong with it.
const OPENS: [&[&str]; 15] = [
    &["region", "read", DEVICE, "config"],
    &["probe", DEVICE],
    &["state", DEVICE],
    &["state", DEVICE, "set", "STOP"],
    &["save", DEVICE, "/nowhere/file"],
    &["load", "/nowhere/file", DEVICE],
    &["migrate", DEVICE, "/nowhere/device"],
    &["send", DEVICE, "--to", "unix:/nowhere/link"],
    &["receive", DEVICE, "--listen", "unix:/nowhere/link"],
    &["check", DEVICE],
    &["bench", DEVICE],
    &["trace", "--proxy", "/nowhere/front", DEVICE],
    &["switch-over", DEVICE, "--", "limosa"],
    &["serve", "uart", "--socket", "/nowhere/socket", "-o", "line=@DEVICE"],
    &["serve", "synthetic", "--socket", "/nowhere/socket", "--take-from", DEVICE],
];

/// Every command line that reads a file.
const READS: [&[&str]; 10] = [
    &["inspect", READ],
    &["verify", READ],
    &["bench", "compare", READ, READ],
    &["check", "/nowhere/device", "--profile", READ],
    &[
        "answer",
        "--listen",
        "unix:/nowhere/link",
        "--tls-ca",
        READ,
        "--tls-cert",
        READ,
        "--tls-key",
        READ,
        "--tls-any-name",
    ],
    &["send", "--to", "unix:/nowhere/link", "--memory", "@READ@0", "--guest-stopped"],
    &["receive", "--listen", "unix:/nowhere/link", "--memory", "@READ@0"],
    &["migrate", "--memory", "@READ@0", "@READ@0", "--guest-stopped"],
    &["doctor", "--root", READ],
    &["trace", "--", READ],
];

/// Every command line that makes a file or a socket.
const MAKES: [&[&str]; 6] = [
    &["serve", "synthetic", "-o", "state=64K", "--socket", MADE],
    &["answer", "--listen", "unix:@MADE"],
    &["save", "--memory", "@EMPTY@0,size=4096", "--guest-stopped", MADE],
    &["trace", "-o", MADE, "--", "true"],
    &["save", "--report", "@MADE.txt", "--memory", "@EMPTY@0,size=4096", "--guest-stopped", "file"],
    &["man", MADE],
];

fn line(args: &[&str], name: &str, empty: &str) -> Vec<String> {
    let put = |arg: &&str| {
        arg.replace(DEVICE, name).replace(READ, name).replace(MADE, name).replace("@EMPTY", empty)
    };
    args.iter().map(put).collect()
}

fn all() -> impl Iterator<Item = &'static [&'static str]> {
    OPENS.into_iter().chain(READS).chain(MAKES)
}

#[test]
fn what_is_not_there_had_another_code_with_each_command() {
    let folder = Folder::new();
    let empty = folder.text("empty");
    std::fs::write(&empty, [0; 4096]).unwrap();
    for args in all() {
        // `man` makes folders above the one that it is given.
        let name = if args[0] == "man" { "/proc/none/name".into() } else { folder.text("none/name") };
        limosa(&line(args, &name, &empty)).fails(UNREACHABLE, &["limosa: "]);
    }
    // A doctor tells of it as a finding.
    limosa(&["doctor", &folder.text("none")]).fails(NOT_READY, &["not ready"]);
}

#[test]
fn a_folder_that_was_read_had_another_code_by_another_name() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    for name in [&folder.text(""), ".", "..", "/", "/dev/.."] {
        for args in [&["inspect", name][..], &["verify", name], &["load", name, &device.socket]] {
            limosa(args).fails(UNREACHABLE, &["it is a folder; expected"]);
        }
    }
}

#[test]
fn a_file_system_that_is_read_only_had_another_code_with_each_command() {
    let folder = Folder::new();
    let (empty, disk) = (folder.text("empty"), folder.path("disk"));
    std::fs::write(&empty, [0; 4096]).unwrap();
    std::fs::create_dir(&disk).unwrap();
    let device = folder.device("device", &[]);
    let (made_at, moves) = (folder.text("disk/name"), folder.text("disk/moves"));
    let stops = ["save", "--stop", &device.socket, &empty, "--replace", "--moves", &moves];
    let made = MAKES.into_iter().filter(|args| args[0] != "answer");
    let made = made.chain([&["receive", "--listen", "unix:@MADE", "--memory", "@EMPTY@0"][..]]);
    let made = made.map(|args| line(args, &made_at, &empty));
    for args in made.chain([line(&stops, "", "")]) {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let commands = "mount -o remount,ro \"$0\" || exit 99; exec \"$@\"";
        let Some(ended) = on_a_disk("size=64k,mode=700", &disk, commands, &args) else { return };
        ended.fails(1, &["Read-only file system"]);
    }
}

#[test]
fn a_machine_without_proc_was_said_to_lack_something_else() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let (socket, file, memory) = (folder.text("socket"), folder.text("file"), folder.text("memory"));
    std::fs::write(&memory, [0; 4096]).unwrap();
    let memory = format!("{memory}@0");
    for args in [
        &["save", "--memory", &memory, "--stop-with", "1", &file][..],
        &["save", "--stop", &device.socket, &file],
        &["serve", "uart", "--socket", &socket],
        &["doctor"],
    ] {
        // An empty file system in its place.
        let Some(ended) = on_a_disk("size=64k", std::path::Path::new("/proc"), "exec \"$@\"", args) else {
            return;
        };
        ended.fails(UNREACHABLE, &["/proc"]);
        let other = ["make its folder", "--root", "has it ended"].iter().any(|part| ended.err.contains(part));
        assert!(!other && ended.err.contains("mount"), "{ended:?}");
    }
    assert!(!folder.path("socket").exists() && !folder.path("file").exists());
}

#[test]
fn a_folder_that_may_not_be_entered_was_said_to_lack_the_socket() {
    if !can_be_another("a_folder_that_may_not_be_entered") {
        return;
    }
    let folder = Folder::new().open_to_all();
    let (closed, empty) = (folder.text("closed/name"), folder.text("empty"));
    std::fs::create_dir(folder.path("closed")).unwrap();
    std::fs::set_permissions(folder.path("closed"), std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .unwrap();
    let _server = folder.device("closed/name", &[]);
    std::fs::write(&empty, [0; 4096]).unwrap();
    crate::support::users::give_away(&folder.path("empty"));
    // Before `answer` listens it looks for its folder, which the other user has none of.
    for args in all().filter(|args| args[0] != "answer") {
        let args = line(args, &closed, &empty);
        let ended = start_as_other(&args).end();
        ended.fails(UNREACHABLE, &["limosa: "]);
        assert!(ended.err.to_lowercase().contains("permission denied"), "{args:?}: {ended:?}");
    }
}

#[test]
fn what_cannot_be_meant_had_another_code_with_each_command() {
    for args in [
        &["verify", "x", "--blake3", "00"][..],
        &["state", "x", "set", "ERROR"],
        &["state", "x", "set", "HALT"],
        &["send", "x", "--to", "nowhere"],
        &["receive", "x", "--listen", "nowhere"],
        &["answer", "--listen", "nowhere"],
        &["resolve", "--id", "x"],
        &["serve", "synthetic", "--socket", "x", "-o", "state=1"],
        &["serve", "uart", "--socket", "x", "-o", "line"],
        &["save", "x", "y", "--compress", "zip"],
        &["migrate", "x", "x", "--memory", "x@0", "y@1"],
        &["load", "x", "y", "--report", "z.pdf"],
        &["inspect"],
        &["probe", "x", "--door", "back"],
        &["doctor", "x", "--bandwidth", "0"],
        &["check", "x", "--only", "none"],
        &["trace", "--pid", "x"],
        &["bench", "x", "--seconds", "soon"],
        &["switch-over", "x"],
        &["fsm", "--dot", "--paths"],
        &["completions", "tcsh"],
        &["man"],
        &["demo", "--memory", "lots"],
    ] {
        let ended = limosa(args);
        assert_eq!(ended.code, USAGE, "{args:?}: {ended:?}");
    }
    let states = limosa(&["state", "x", "set", "HALT"]).err;
    assert!(states.contains("PRE_COPY_P2P") && !states.contains("ERROR"), "{states}");
}

#[test]
fn a_state_that_does_not_fit_into_memory_ended_the_server_by_an_abort() {
    let folder = Folder::new();
    let socket = folder.text("socket");
    // So little that the system gives no such state to the process, whatever it overcommits.
    let ended = crate::support::start_by(
        "/bin/sh",
        &["-c", "ulimit -v 4000000; exec \"$@\"", "sh"],
        &["serve", "synthetic", "--socket", &socket, "-o", "state=40G"],
    )
    .end();
    ended.fails(REFUSED, &["--option", "state=42949672960", "memory"]);
}

/// A command that is added has to be added to the lists above.
#[test]
fn every_command_is_asked_for_its_codes() {
    let help = limosa(&["--help"]).ok();
    let commands =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands: BTreeSet<&str> = commands
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let asked: BTreeSet<&str> = all().map(|args| args[0]).collect();
    let of_nothing = ["help", "demo", "fsm", "completions", "resolve"];
    let missing: Vec<_> =
        commands.iter().filter(|name| !asked.contains(*name) && !of_nothing.contains(name)).collect();
    assert!(missing.is_empty() && commands.len() > 20, "{missing:?} of {commands:?}");
}
