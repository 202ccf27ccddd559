//! Devices and states that do not belong together, and saved files that are not whole.

use super::*;

#[test]
fn devices_of_another_kind_or_shape_are_refused_before_anything_moves() {
    let folder = Folder::new();
    let small = folder.device("small", &[]);
    let large = folder.device("large", &["state=2M"]);
    let uart = folder.serve("uart", "uart", &[]);
    small.mark(9);
    large.mark(10);
    let file = folder.text("file");
    limosa(&["save", &small.socket, &file]).ok();
    for (to, what) in [(&large, "list of region sizes"), (&uart, "PCI identification")] {
        let parts = [&small.socket[..], &to.socket, "cannot be moved", what];
        limosa(&["migrate", &small.socket, &to.socket]).fails(REFUSED, &parts);
        limosa(&["load", &file, &to.socket]).fails(REFUSED, &[&parts[..], &[&file]].concat());
        let link = format!("unix:{}", folder.text("link"));
        let receiver = start(&["receive", &to.socket, "--listen", &link]);
        receiver.line("listening on");
        limosa(&["send", &small.socket, "--to", &link]).fails(REFUSED, &parts);
        receiver.end().fails(REFUSED, &parts);
        assert_eq!((small.state(), to.state()), (State::Running, State::Running));
    }
    assert_eq!((small.guest(), large.guest()), (9, 10), "nothing was reset");
    limosa(&["migrate", &small.socket, &small.socket]).fails(USAGE, &["the same device"]);
}

#[test]
fn a_device_that_is_being_moved_is_not_moved_again() {
    let folder = Folder::new();
    let (one, other) = (folder.device("one", &[]), folder.device("other", &[]));
    limosa(&["state", &one.socket, "set", "PRE_COPY"]).ok();
    limosa(&["migrate", &one.socket, &other.socket])
        .fails(REFUSED, &[&one.socket, "PRE_COPY", "being moved already?", "set RUNNING"]);
    limosa(&["migrate", &other.socket, &one.socket]).fails(REFUSED, &[&one.socket, "PRE_COPY", "in use?"]);
    assert_eq!((one.state(), other.state()), (State::PreCopy, State::Running));
    limosa(&["state", &one.socket, "set", "RUNNING"]).ok();
    limosa(&["migrate", &one.socket, &other.socket]).ok();
}

/// Loads what must be refused: the device stays in the state and with the guest that it had.
#[track_caller]
fn is_refused(device: &Server, file: &str, code: i32, parts: &[&str]) {
    let ended = limosa(&["load", file, &device.socket]);
    ended.fails(code, &[&[file], parts].concat());
    assert!(device.runs(77), "{} {:#x}: {ended:?}", device.state(), device.guest());
}

#[test]
fn saved_files_that_are_not_whole_are_refused_and_the_device_is_not_touched() {
    let folder = Folder::new();
    let device = folder.device("device", &["state=256K"]);
    let good = folder.text("good");
    limosa(&["save", &device.socket, &good]).ok();
    let good = std::fs::read(&good).unwrap();
    device.mark(77);
    let bad = folder.text("bad");
    let write = |bytes: &[u8]| std::fs::write(&bad, bytes).unwrap();
    let anew = "save it anew";

    for bytes in
        [&b""[..], &good[..1], &good[..39], &good[..40], &good[..good.len() / 2], &good[..good.len() - 1]]
    {
        write(bytes);
        is_refused(&device, &bad, DAMAGED, &["ends in the middle", anew]);
        limosa(&["inspect", &bad]).fails(DAMAGED, &[&bad, "not a whole saved stream"]);
    }
    for at in [
        40,
        60,
        75,
        200,
        365,
        380,
        400,
        1000,
        good.len() / 2,
        good.len() - 80,
        good.len() - 30,
        good.len() - 1,
    ] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        write(&bytes);
        is_refused(&device, &bad, DAMAGED, &[anew]);
        assert_eq!(limosa(&["--json", "inspect", &bad]).code, DAMAGED, "byte {at}");
    }
    for foreign in [&b"#!/bin/sh\nexit 0\n"[..], &[0; 4096], &good[40..]] {
        write(foreign);
        let parts: &[&str] = if foreign.len() < 40 { &[] } else { &["a file that `limosa save` wrote"] };
        is_refused(&device, &bad, DAMAGED, parts);
    }
    // Something after the end, and a part twice.
    write(&[&good[..], &good[..]].concat());
    is_refused(&device, &bad, DAMAGED, &[anew]);
    let swapped: Vec<u8> =
        good[..40].iter().chain(&good[good.len() / 2..]).chain(&good[40..good.len() / 2]).copied().collect();
    write(&swapped);
    is_refused(&device, &bad, DAMAGED, &[anew]);

    is_refused(&device, &folder.text("none"), UNREACHABLE, &["No such file"]);
    is_refused(&device, &folder.text(""), UNREACHABLE, &["it is a folder"]);
    write(&good);
    limosa(&["load", &bad, &device.socket]).ok();
    assert!(device.runs(0));
}

#[test]
fn a_file_of_a_newer_version_says_that_a_newer_limosa_is_needed() {
    let folder = Folder::new();
    let device = folder.device("device", &["state=64K"]);
    let good = folder.text("good");
    limosa(&["save", &device.socket, &good]).ok();
    device.mark(77);
    let mut bytes = std::fs::read(&good).unwrap();
    // docs/stream.md: version and oldest reader's version at 8 and 10, the preface's checksum at its end.
    bytes[8..12].copy_from_slice(&[9, 0, 9, 0]);
    let checksum = crc32c::crc32c(&bytes[..36]);
    bytes[36..40].copy_from_slice(&checksum.to_le_bytes());
    std::fs::write(&good, bytes).unwrap();
    is_refused(&device, &good, DAMAGED, &["version 9", "a newer limosa"]);
    limosa(&["inspect", &good]).fails(DAMAGED, &["version 9"]);
}

#[test]
fn a_state_of_another_size_in_a_right_stream_is_refused_and_a_reset_device_runs() {
    let folder = Folder::new();
    let block = ["state=1M", "block=64K"];
    let (one, other) = (folder.device("one", &block), folder.device("other", &["state=1M", "block=4K"]));
    let file = folder.text("file");
    limosa(&["save", &one.socket, &file]).ok();
    let ended = limosa(&["load", &file, &other.socket]);
    ended.fails(REFUSED, &[&file, &other.socket]);
    limosa(&["migrate", &one.socket, &other.socket]).fails(REFUSED, &[&other.socket, "as it was before"]);
    assert_eq!((one.state(), other.state()), (State::Running, State::Running));
    assert_eq!(other.register(registers::BAD_BLOCKS), 0);
}

#[test]
fn folders_that_cannot_be_written_are_named() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    device.mark(5);
    std::fs::write(folder.path("file"), "precious").unwrap();
    let [nowhere, under, dir, file] = ["no/where", "file/x", "", "file"].map(|name| folder.text(name));
    for path in [&nowhere, &under] {
        limosa(&["save", &device.socket, path]).fails(UNREACHABLE, &[path, "the source is as it was before"]);
        assert!(device.runs(5));
    }
    limosa(&["save", &device.socket, &dir]).fails(USAGE, &[&dir, "names no file"]);
    assert_eq!(std::fs::read_dir(folder.path("")).unwrap().count(), 2, "nothing is left behind");
    for (path, code) in [(&file, REFUSED), (&under, UNREACHABLE)] {
        limosa(&["man", path]).fails(code, &[path]);
    }
    limosa(&["inspect", &nowhere]).fails(UNREACHABLE, &[&nowhere, "No such file"]);
    assert_eq!(std::fs::read(folder.path("file")).unwrap(), b"precious");
}
