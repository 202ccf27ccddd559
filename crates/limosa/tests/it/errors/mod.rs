//! Wrong input: what is refused, with which exit code, in which words; and what it was about is usable
//! afterwards, in the state where it was found.

mod peers;
mod states;
mod words;

use std::os::unix::net::UnixListener;

use crate::support::{Folder, Server, limosa, start};
use limosa_models::synthetic::registers;
use limosa_protocol::State;

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
    set(&device, "ERROR").fails(USAGE, &["ERROR", "possible values"]);
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
    serve(&file).fails(REFUSED, &[&file, "not a socket; choose another path"]);
    serve(&nowhere).fails(UNREACHABLE, &[&nowhere, "make its folder first"]);
    serve(&long).fails(USAGE, &[&long, "107 bytes"]);
    let taken = serve(&device.socket).err;
    assert_eq!(taken.matches("listens").count(), 1, "said twice: {taken}");

    let receive = |path: &str| limosa(&["receive", &device.socket, "--listen", &format!("unix:{path}")]);
    receive(&device.socket)
        .fails(UNREACHABLE, &[&device.socket, "another server listens", "choose another address"]);
    receive(&file).fails(REFUSED, &[&file, "not a socket", "choose another path, or remove it"]);
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
