//! Wrong input: what is refused, with which exit code, in which words; and what it was about is usable
//! afterwards, in the state where it was found.

mod support;

use std::os::unix::net::UnixListener;

use limosa_models::synthetic::registers;
use limosa_protocol::State;
use support::{Folder, Server, limosa, start};

const FAILED: i32 = 1;
const USAGE: i32 = 2;
const REFUSED: i32 = 3;
const UNREACHABLE: i32 = 4;
const DAMAGED: i32 = 6;

#[test]
fn wrong_usage_is_refused_with_what_is_expected() {
    for (args, parts) in [
        (&["frob"][..], &["frob"][..]),
        (&["save"], &["DEVICE"]),
        (&["probe", "x", "--door", "back"], &["back", "cdev", "group"]),
        (&["state", "x", "set", "HALT"], &["HALT", "RUNNING_P2P", "STOP_COPY"]),
        (&["state", "x", "set"], &["STATE"]),
        (&["state", "x", "frob"], &["frob"]),
        (&["fsm", "--dot", "--paths"], &["--dot", "--paths"]),
        (&["completions", "tcsh"], &["tcsh", "bash", "fish", "zsh"]),
        (&["serve", "floppy", "--socket", "x"], &["floppy", "uart", "synthetic"]),
        (&["serve", "synthetic"], &["--socket"]),
        (&["bench", "x", "--seconds", "soon"], &["--seconds", "soon", "a number of seconds"]),
        (&["receive", "x", "--listen", "unix:y", "--wait", "0"], &["--wait", "more than 0"]),
        (&["demo", "--memory", "lots"], &["lots", "a size"]),
        (&["send", "x", "--to", "unix:y", "--links", "0"], &["--links", "1 to 16"]),
        (&["send", "x", "--to", "unix:y", "--links", "many"], &["--links", "or auto"]),
    ] {
        limosa(args).fails(USAGE, parts);
    }
    assert_eq!(limosa::<&str>(&[]).code, USAGE);
}

#[test]
fn time_limits_that_are_none_are_refused() {
    for limit in ["0", "-1", "x", "", "1e9", "nan", "NaN", "inf", "-inf", "1s"] {
        limosa(&["probe", "x", &format!("--timeout={limit}")]).fails(USAGE, &["--timeout", "expected"]);
    }
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    limosa(&["--timeout", "30.5", "probe", &device.socket]).ok();
}

#[test]
fn what_is_no_device_is_said_to_be_none() {
    let folder = Folder::new();
    std::fs::write(folder.path("file"), "precious").unwrap();
    drop(UnixListener::bind(folder.path("stale")).unwrap());
    let long = folder.text(&"x".repeat(150));
    let [none, file, stale, dir] = ["none", "file", "stale", ""].map(|name| folder.text(name));
    for (device, why) in [
        (&none, "no such socket"),
        (&String::new(), "no such socket"),
        (&file, "no socket"),
        (&dir, "no socket"),
        (&stale, "is its server running?"),
        (&long, "no such socket"),
    ] {
        for command in [
            &["probe", device][..],
            &["state", device],
            &["save", device, "/nowhere"],
            &["load", "/nowhere", device],
            &["migrate", device, device],
            &["bench", device],
            &["send", device, "--to", "unix:/nowhere"],
            &["receive", device, "--listen", "unix:/nowhere/there"],
        ] {
            if command[0] == "migrate" && std::path::Path::new(device).exists() {
                limosa(command).fails(USAGE, &[device, "the same device"]);
            } else {
                limosa(command).fails(UNREACHABLE, &[device, why]);
            }
        }
    }
    assert_eq!(std::fs::read(folder.path("file")).unwrap(), b"precious");
}

#[test]
fn a_device_that_another_client_uses_is_said_to_be_in_use_within_the_limit() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let client = device.client();
    // What has to be the VMM waits for its turn.
    limosa(&["--timeout", "0.05", "check", &device.socket])
        .fails(UNREACHABLE, &[&device.socket, "VERSION", "50ms", "is another one connected?"]);
    drop(client);
    limosa(&["probe", &device.socket]).ok();
}

#[test]
fn something_that_answers_nonsense_is_said_to_be_no_server() {
    use std::io::{Read, Write};
    let folder = Folder::new();
    let socket = folder.text("nonsense");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 16];
        stream.read_exact(&mut request).unwrap();
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    limosa(&["probe", &socket]).fails(UNREACHABLE, &[&socket]);
    server.join().unwrap();
}

#[test]
fn transitions_that_the_standard_refuses_leave_the_device_as_it_was() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let plain = folder.device("plain", &["p2p=off", "pre-copy=off"]);
    let set = |device: &Server, to: &str| limosa(&["state", &device.socket, "set", to]);
    set(&device, "ERROR").fails(REFUSED, &[&device.socket, "RUNNING -> ERROR"]);
    set(&device, "STOP_COPY").ok();
    for to in ["PRE_COPY", "PRE_COPY_P2P"] {
        set(&device, to).fails(REFUSED, &[&device.socket, &format!("STOP_COPY -> {to}")]);
        assert_eq!(device.state(), State::StopCopy);
    }
    set(&device, "RUNNING").ok();
    for to in ["RUNNING_P2P", "PRE_COPY", "PRE_COPY_P2P"] {
        set(&plain, to).fails(REFUSED, &[&plain.socket, &format!("no state {to}")]);
        assert_eq!(plain.state(), State::Running);
    }
}

#[test]
fn options_of_models_that_are_wrong_are_named() {
    let folder = Folder::new();
    let socket = folder.text("socket");
    for (model, option, expected) in [
        ("synthetic", "foo", "key=value"),
        ("synthetic", "foo=1", "dirty-rate"),
        ("synthetic", "state=x", "a number"),
        ("synthetic", "state=5000", "a multiple of block"),
        ("synthetic", "state=0", "a multiple of block"),
        ("synthetic", "block=3072", "a power of two"),
        ("synthetic", "precopy=101", "0 to 100"),
        ("synthetic", "p2p=maybe", "on or off"),
        ("synthetic", "dma-pattern=spiral", "sequential, random or one-page"),
        ("synthetic", "fault=explode", "truncate:BYTES"),
        ("synthetic", "fault=fail:STOP", "FROM>TO"),
        ("synthetic", "fault=fail:STOP>RUNNING", "never takes the step"),
        ("synthetic", "fault=stall:STOP>RESUMING:soon", "no number"),
        ("uart", "foo", "line=echo or line=PATH"),
        ("uart", "line=", "line=echo or line=PATH"),
        ("uart", "baud=9600", "line=echo or line=PATH"),
        ("uart", "as=16550", "or as=mtty"),
    ] {
        let value = option.strip_prefix("fault=").unwrap_or(option);
        limosa(&["serve", model, "--socket", &socket, "-o", option])
            .fails(USAGE, &["--option", value, expected]);
        assert!(!folder.path("socket").exists());
    }
    limosa(&["serve", "uart", "--socket", &socket, "-o", "as=mtty", "-o", "line=/dev/null"])
        .fails(USAGE, &["as=mtty", "nothing but line=echo"]);
    limosa(&["serve", "uart", "--socket", &socket, "-o", "line=/nowhere"])
        .fails(UNREACHABLE, &["line=/nowhere", "expected a terminal, or a UNIX socket"]);
}

#[test]
fn sockets_are_not_taken_from_the_living_and_files_not_removed() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    std::fs::write(folder.path("file"), "precious").unwrap();
    let [file, nowhere, long] = ["file", "no/where", &"x".repeat(150)].map(|name| folder.text(name));
    let serve = |path: &str| limosa(&["serve", "synthetic", "--socket", path]);
    serve(&device.socket)
        .fails(UNREACHABLE, &[&device.socket, "another server listens", "choose another path"]);
    serve(&file).fails(UNREACHABLE, &[&file, "no socket", "choose another path"]);
    serve(&nowhere).fails(UNREACHABLE, &[&nowhere, "make its folder first"]);
    serve(&long).fails(UNREACHABLE, &[&long, "choose another path"]);

    let receive = |path: &str| limosa(&["receive", &device.socket, "--listen", &format!("unix:{path}")]);
    receive(&device.socket)
        .fails(UNREACHABLE, &[&device.socket, "another server listens", "choose another address"]);
    receive(&file).fails(UNREACHABLE, &[&file, "not a socket", "choose another address"]);
    receive(&nowhere).fails(UNREACHABLE, &[&nowhere, "make its folder first"]);
    receive(&long).fails(UNREACHABLE, &[&long, "choose another address"]);
    assert_eq!(std::fs::read(folder.path("file")).unwrap(), b"precious");
    limosa(&["probe", &device.socket]).ok();
}

#[test]
fn the_socket_of_a_server_that_died_is_replaced() {
    let folder = Folder::new();
    let mut device = folder.device("device", &[]);
    device.kill();
    assert!(folder.path("device").exists());
    limosa(&["probe", &device.socket]).fails(UNREACHABLE, &["is its server running?"]);
    let again = folder.device("device", &[]);
    limosa(&["probe", &again.socket]).ok();

    let link = format!("unix:{}", folder.text("link"));
    let receiver = start(&["receive", &again.socket, "--listen", &link]);
    receiver.line("listening on");
    receiver.kill();
    assert!(folder.path("link").exists());
    limosa(&["receive", &again.socket, "--listen", &link, "--wait", "0.01"])
        .fails(UNREACHABLE, &["nobody connected"]);
    assert!(!folder.path("link").exists());
}

#[test]
fn addresses_that_are_none_are_refused_before_anything_is_done() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    for address in ["", "x", "unix:", "tcp:h", "tcp:h:99999", "tcp:::1:5", "udp:h:1", "file:x"] {
        let parts = &[&format!("`{address}`")[..], "expected unix:PATH"];
        limosa(&["send", &device.socket, "--to", address]).fails(USAGE, parts);
        limosa(&["receive", &device.socket, "--listen", address]).fails(USAGE, parts);
    }
    assert_eq!(device.state(), State::Running);
}

#[test]
fn nobody_at_the_other_end_is_said_so() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    // A port that is free, and one that is not.
    let port = |listener: &std::net::TcpListener| format!("tcp:{}", listener.local_addr().unwrap());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port(&taken);
    limosa(&["receive", &device.socket, "--listen", &address])
        .fails(UNREACHABLE, &[&address, "in use", "choose another address"]);
    drop(taken);
    for address in [address, format!("unix:{}", folder.text("none"))] {
        limosa(&["send", &device.socket, "--to", &address])
            .fails(UNREACHABLE, &[&address, "is `limosa receive` listening there?"]);
    }
    let link = format!("unix:{}", folder.text("link"));
    limosa(&["receive", &device.socket, "--listen", &link, "--wait", "0.02"])
        .fails(UNREACHABLE, &[&link, "nobody connected within 20ms"]);
    limosa(&["--json", "receive", &device.socket, "--listen", &link, "--wait", "0.02"])
        .fails(UNREACHABLE, &[]);
    assert_eq!(device.state(), State::Running);
    device.is_usable(&folder);
}

#[test]
fn a_client_that_is_not_a_source_is_named_and_does_not_end_the_wait() {
    use std::io::{Read, Write};
    let folder = Folder::new();
    let (source, device) = (folder.device("source", &[]), folder.device("device", &[]));
    source.mark(5);
    device.mark(77);
    let receiver = start(&["receive", &device.socket, "--listen", "tcp:127.0.0.1:0"]);
    let address = receiver.after("listening on tcp:");
    for (words, part) in [
        (&b""[..], "the link to"),
        (&b"LIMO"[..], "the link to"),
        (&b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"[..], "not a Limosa stream"),
        (&[0; 100_000][..], "not a Limosa stream"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "it speaks TLS"),
    ] {
        let mut client = std::net::TcpStream::connect(&address).unwrap();
        let name = client.local_addr().unwrap().to_string();
        // It may be refused before it has said all.
        let _ = client.write_all(words);
        client.shutdown(std::net::Shutdown::Write).unwrap_or_default();
        let _ = client.read_to_end(&mut Vec::new());
        let said = receiver.line(&name);
        assert!(said.contains(part) && said.contains("passed over"), "{part}: {said}");
    }
    limosa(&["send", &source.socket, "--to", &format!("tcp:{address}")]).ok();
    receiver.end().ok();
    assert!(device.runs(5));
}

#[test]
fn clients_that_stay_silent_do_not_block_a_source() {
    let folder = Folder::new();
    let (source, device) = (folder.device("source", &[]), folder.device("device", &[]));
    source.mark(6);
    let args = ["receive", &device.socket, "--listen", "tcp:127.0.0.1:0", "--silence", "3600", "-v"];
    let receiver = start(&args);
    let address = receiver.after("listening on tcp:");
    // More than are heard at a time.
    let silent: Vec<_> = (0..20).map(|_| std::net::TcpStream::connect(&address).unwrap()).collect();
    receiver.line("more clients connected");
    limosa(&["send", &source.socket, "--to", &format!("tcp:{address}"), "--links", "2"]).ok();
    receiver.end().ok();
    drop(silent);
    assert!(device.runs(6));
}

#[test]
fn clients_that_are_not_migrating_do_not_prolong_the_wait_for_a_source() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let link = folder.text("link");
    let listen = format!("unix:{link}");
    let receiver = start(&["receive", &device.socket, "--listen", &listen, "--wait", "1"]);
    receiver.line("listening on");
    drop(std::os::unix::net::UnixStream::connect(&link).unwrap());
    receiver.end().fails(UNREACHABLE, &[&listen, "nobody sent a move within 1s", "one connected"]);
    device.is_usable(&folder);
}

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

    is_refused(&device, &folder.text("none"), FAILED, &["No such file"]);
    is_refused(&device, &folder.text(""), FAILED, &["directory"]);
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
    for path in [&nowhere, &under, &dir] {
        limosa(&["save", &device.socket, path]).fails(FAILED, &[path, "the source is as it was before"]);
        assert!(device.runs(5));
    }
    assert_eq!(std::fs::read_dir(folder.path("")).unwrap().count(), 2, "nothing is left behind");
    for path in [&file, &under] {
        limosa(&["man", path]).fails(FAILED, &[path]);
    }
    limosa(&["inspect", &nowhere]).fails(FAILED, &[&nowhere, "No such file"]);
    assert_eq!(std::fs::read(folder.path("file")).unwrap(), b"precious");
}
