//! Files of the wrong kind, and wrong numbers and names, given to every command: each message has the name of the thing, once, what
//! it is and what was expected, and one cause has one code.

use std::os::unix::net::UnixListener;

use crate::support::{Ended, Folder, limosa};
use rustix::fs::{CWD, FileType, mknodat};

/// A folder with one thing of each kind, by the name of what it is.
fn kinds() -> Folder {
    let folder = Folder::new();
    std::fs::create_dir(folder.path("folder")).unwrap();
    mknodat(CWD, folder.path("FIFO"), FileType::Fifo, 0o600.into(), 0).unwrap();
    std::fs::write(folder.path("file"), "x").unwrap();
    std::fs::write(folder.path("empty file"), "").unwrap();
    // Its server has gone.
    drop(UnixListener::bind(folder.path("socket")).unwrap());
    folder
}

/// The message, in which the name stands once.
#[track_caller]
fn says(ended: &Ended, code: i32, name: &str, parts: &[&str]) {
    ended.fails(code, &[&[name], parts].concat());
    let times =
        ended.err.matches(&format!("{name}:")).count() + ended.err.matches(&format!("{name} ")).count();
    assert!(times <= 1, "the name stands there {times} times: {ended:?}");
}

#[test]
fn what_is_no_device_is_called_what_it_is() {
    let folder = kinds();
    for (name, what) in [
        ("folder", "it is a folder, and no socket"),
        ("FIFO", "it is a FIFO, and no socket"),
        ("file", "it is a file, and no socket"),
        ("empty file", "it is an empty file, and no socket"),
        ("socket", "nobody listens there: is its server running?"),
        ("missing", "there is no such socket"),
    ] {
        let path = folder.text(name);
        for command in [&["probe"][..], &["state"], &["check"], &["bench"], &["region", "read"]] {
            let region: &[&str] = if command == ["region", "read"] { &["0"] } else { &[] };
            says(&limosa(&[command, &[&path], region].concat()), 4, &path, &[what]);
        }
    }
    // A receiver's address.
    let device = folder.device("device", &[]);
    for (name, what) in [
        ("folder", "it is a folder, and no socket"),
        ("file", "it is a file, and no socket"),
        ("socket", "Connection refused"),
        ("missing", "No such file"),
    ] {
        let address = format!("unix:{}", folder.text(name));
        says(&limosa(&["send", &device.socket, "--to", &address]), 4, &address, &[what, "`limosa receive`"]);
    }
}

#[test]
fn one_kind_of_file_had_one_code_in_one_command_and_another_in_the_next() {
    let folder = kinds();
    let device = folder.device("device", &[]);
    for name in ["folder", "FIFO", "socket", "missing"] {
        let path = folder.text(name);
        let kind =
            if name == "missing" { "No such file".into() } else { format!("it is a {name}; expected") };
        says(&limosa(&["bench", "compare", &path, &path]), 4, &path, &["cannot be read", &kind]);
        says(
            &limosa(&["serve", "--config", &path]),
            4,
            &path,
            &["--config", "expected a file in TOML", &kind],
        );
        let check = |options: &[&str]| limosa(&[&["check", &device.socket], options].concat());
        says(&check(&["--profile", &path]), 4, &path, &["cannot be read", &kind]);
        says(&check(&["--destructive", "--replay", &path]), 4, &path, &["cannot be read", &kind]);
        if name != "missing" {
            let known = ["--destructive", "--fuzz", "1", "--known", &path];
            says(&check(&known), 4, &path, &["cannot be read", &kind]);
        }
        for args in [&["inspect", &path][..], &["verify", &path], &["load", &path, &device.socket]] {
            says(&limosa(args), 4, &path, &[&kind]);
        }
        let tls = ["--tls-ca", &path, "--tls-cert", &path, "--tls-key", &path];
        let send = limosa(&[&["send", &device.socket, "--to", "tcp:localhost:1"], &tls[..]].concat());
        says(&send, if name == "missing" { 4 } else { 2 }, &path, &[&kind]);
    }
    for name in ["folder", "FIFO", "file", "empty file"] {
        let (path, address) = (folder.text(name), format!("unix:{}", folder.text(name)));
        let remove = "choose another path, or remove it";
        says(&limosa(&["serve", "uart", "--socket", &path]), 3, &path, &["not a socket", remove]);
        says(
            &limosa(&["receive", &device.socket, "--listen", &address]),
            3,
            &address,
            &["not a socket", remove],
        );
    }
    // More than a file's name may have.
    let long = folder.text(&"x".repeat(300));
    for args in [&["probe", &long][..], &["inspect", &long], &["load", &long, &device.socket]] {
        limosa(args).fails(4, &["File name too long"]);
    }
}

/// `inspect`, `verify` and `load` waited 30 s, and `trace` and `switch-over` for ever.
#[test]
fn a_fifo_without_its_other_end_was_waited_for() {
    let folder = kinds();
    let device = folder.device("device", &[]);
    let fifo = folder.text("FIFO");
    for args in [&["inspect", &fifo][..], &["verify", &fifo], &["load", &fifo, &device.socket]] {
        let expected = "it is a FIFO; expected a file that `limosa save` wrote";
        says(&limosa(args), 4, &fifo, &[expected]);
    }
    assert!(device.runs(0), "the load did not touch the device");
    let nobody_reads = "it is a FIFO that no process reads";
    for option in ["--output", "--pcap"] {
        says(&limosa(&["trace", option, &fifo, "--", "true"]), 4, &fifo, &[nobody_reads]);
        let socket = folder.text("socket");
        says(&limosa(&["trace", option, &socket, "--", "true"]), 4, &socket, &["it is a socket"]);
    }
    // One that has a reader is written to.
    let opened = std::fs::File::options().read(true).write(true).open(&fifo).unwrap();
    limosa(&["trace", "--pcap", &fifo, "--", "true"]).ok();
    let mut begin = [0; 4];
    std::io::Read::read_exact(&mut &opened, &mut begin).unwrap();
    assert_eq!(&begin, b"\n\r\r\n", "the section header of a pcapng file");
}

#[test]
fn a_wrong_number_is_told_what_was_expected() {
    let folder = kinds();
    let device = folder.device("device", &[]);
    for (args, option, expected) in [
        (&["state", &device.socket, "next", "abc"][..], "[PID]", "the number of a process"),
        (
            &["send", &device.socket, "--to", "unix:x", "--stop-with", "0"],
            "--stop-with",
            "the number of a process",
        ),
        (&["trace", "--pid", "-3"], "--pid", "the number of a process"),
        (&["trace", "--pid", "x"], "--pid", "the number of a process"),
        (&["check", &device.socket, "--destructive", "--fuzz", "many"], "--fuzz", "a number from 1 on"),
    ] {
        let ended = limosa(args);
        assert_eq!(ended.code, 2, "{ended:?}");
        assert!(ended.err.contains(option), "{ended:?}");
        assert!(ended.err.contains(expected) || args.contains(&"-3"), "{ended:?}");
    }
    let config = folder.text("devices.toml");
    for key in ["socket", "control"] {
        let other = if key == "socket" { "control" } else { "socket" };
        let text = format!("[[device]]\nmodel = \"uart\"\n{other} = \"other\"\n{key} = \"a\\u0000b\"\n");
        std::fs::write(&config, text).unwrap();
        limosa(&["serve", "--config", &config]).fails(2, &[&format!("{config}:4"), "has a NUL in it"]);
    }
}
