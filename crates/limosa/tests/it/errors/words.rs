//! What operators found broken in codes and words: each with the command by which they found it.

use super::*;

fn said_once(text: &str, part: &str) {
    assert_eq!(text.matches(part).count(), 1, "`{part}` in {text}");
}

#[test]
fn a_save_to_what_is_no_file_has_one_code_for_each_cause_and_touches_nothing() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let [dir, fifo, link, file] = ["dir", "fifo", "link", "file"].map(|name| folder.text(name));
    std::fs::create_dir(&dir).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    std::fs::write(&file, "precious").unwrap();
    for (place, what) in [
        ("/dev/null", "a device"),
        (&fifo, "a FIFO"),
        (&dir, "a directory"),
        (&link, "a symbolic link"),
        (&device.socket, "a socket"),
    ] {
        for replace in [&[][..], &["--replace"]] {
            let ended = limosa(&[&["save", &device.socket, place], replace].concat());
            ended.fails(REFUSED, &[place, what, "is there"]);
        }
        let html = folder.text("report.html");
        let _ = std::fs::remove_file(&html);
        std::fs::create_dir(&html).unwrap();
        limosa(&["save", &device.socket, &folder.text("saved"), "--report", &html])
            .fails(REFUSED, &["--report", "a directory is there"]);
        std::fs::remove_dir(&html).unwrap();
    }
    for place in [".", "..", "", "/", &format!("{dir}/"), &folder.text("new/")] {
        limosa(&["save", &device.socket, place]).fails(USAGE, &["names no file"]);
    }
    limosa(&["save", &device.socket, &file]).fails(REFUSED, &[&file, "a file is there already", "--replace"]);
    limosa(&["save", &device.socket, &folder.text("none/file")]).fails(UNREACHABLE, &["No such file"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    assert_eq!(device.state(), State::Running);
}

#[test]
fn a_save_had_two_handshakes() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    said_once(&limosa(&["save", &device.socket, &folder.text("file")]).ok(), "handshake");
}

#[test]
fn answer_made_the_folder_that_it_was_to_answer_from() {
    let folder = Folder::new();
    let moves = folder.text("no/such");
    limosa(&["answer", "--moves", &moves, "--listen", &format!("unix:{}", folder.text("link"))])
        .fails(UNREACHABLE, &[&moves, "no such folder", "--moves"]);
    assert!(!folder.path("no").exists() && !folder.path("link").exists());
}

#[test]
fn messages_said_things_twice_or_lacked_the_option_that_helps() {
    let folder = Folder::new();
    let [one, other] = ["one", "other"].map(|name| folder.device(name, &[]));
    let migrate = |more: &[&str]| limosa(&[&["migrate", &one.socket, &other.socket], more].concat());
    let ended = migrate(&["--stop-with", "2147483647"]);
    ended.fails(UNREACHABLE, &["--stop-with 2147483647: there is no such process"]);
    assert!(!ended.err.contains("os error"), "{ended:?}");
    migrate(&["--standstill", "0.000001"]).fails(REFUSED, &["--standstill allows a longer one"]);
    let ended = migrate(&["--state-max", "1000"]);
    ended.fails(1, &["raise the limit (--state-max)"]);
    assert!(!ended.err.contains("::"), "an item of the library: {ended:?}");
    for command in ["verify", "inspect"] {
        limosa(&[command, "-"]).fails(USAGE, &["not read from standard input", "./-"]);
    }
    let ended = limosa(&["send", &one.socket, "--to", "foo"]);
    ended.fails(USAGE, &["`foo`", "unix:PATH or tcp:HOST:PORT"]);
    assert!(!ended.err.contains("file:"), "{ended:?}");

    limosa(&["state", &one.socket, "set", "RESUMING"]).ok();
    let ended = limosa(&["state", &one.socket, "set", "STOP"]);
    ended.fails(REFUSED, &["RESUMING -> STOP failed", &format!("limosa state {} reset", one.socket)]);
    said_once(&ended.err, &format!("{}: ", one.socket));
    said_once(&ended.err, "RESUMING");
    limosa(&["state", &one.socket, "reset"]).ok();
}

#[test]
fn configuration_space_was_called_region_7() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let read = |more: &[&str]| limosa(&[&["region", "read", &device.socket, "config"], more].concat());
    read(&["--offset", "0x100"]).fails(REFUSED, &["configuration space has 0x100 bytes"]);
    read(&["--size", "0x101"]).fails(REFUSED, &["configuration space has 0x100 bytes"]);
    limosa(&["region", "read", &device.socket, "BAR2", "--offset", "0xffffffff"])
        .fails(REFUSED, &["BAR2 has"]);
}

#[test]
fn the_message_for_a_device_that_is_not_there_was_a_list_of_283_characters() {
    let ended = limosa(&["probe", "nosuch"]);
    ended.fails(UNREACHABLE, &["nosuch: there is no such socket", "limosa probe --help"]);
    assert!(ended.err.len() < 180, "{ended:?}");
}
