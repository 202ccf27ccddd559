//! Everything that a command waits for has a limit that an option or the documentation names.

use std::os::unix::net::{UnixListener, UnixStream};

use crate::support::{Folder, limosa, start, start_by};
use limosa_protocol::State;
use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

const UNREACHABLE: i32 = 4;
const DAMAGED: i32 = 6;

/// A listening socket whose queue of connections is full, with those that are in it.
fn full_queue(path: &std::path::Path) -> (std::os::fd::OwnedFd, Vec<UnixStream>) {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let address = SocketAddrUnix::new(path).unwrap();
    rustix::net::bind(&socket, &address).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let mut queued = Vec::new();
    loop {
        let flags = rustix::net::SocketFlags::NONBLOCK;
        let next = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        match rustix::net::connect(&next, &address) {
            Ok(()) => queued.push(next.into()),
            Err(rustix::io::Errno::AGAIN) => return (socket, queued),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_server_whose_queue_is_full_was_waited_for_for_ever() {
    let folder = Folder::new();
    let _full = full_queue(&folder.path("full"));
    let name = folder.text("full");
    let other = folder.device("other", &[]);
    for command in [
        &["probe", &name][..],
        &["state", &name, "reset"],
        &["migrate", &name, &other.socket],
        &["bench", &name],
    ] {
        let limited = [&["--timeout", "0.05"], command].concat();
        limosa(&limited).fails(UNREACHABLE, &[&name, "50ms", "is another one connected?"]);
    }
    let line = format!("line={name}");
    limosa(&["--timeout", "0.05", "serve", "uart", "--socket", &folder.text("uart"), "-o", &line])
        .fails(UNREACHABLE, &[&line, "no connection within 50ms"]);
}

#[test]
fn too_few_open_files_here_were_blamed_on_the_server() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let mut lost = 0;
    for most in 7..=14 {
        // Fds that this process has inherited count as well.
        let few = format!("exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; ulimit -n {most}; exec \"$@\"");
        let ended = start_by("/bin/sh", &["-c", &few, "sh"], &["probe", &device.socket]).end();
        assert!(!ended.err.contains("broke the protocol"), "{most}: {ended:?}");
        if ended.code != 0 {
            ended.fails(1, &[&device.socket, "EMFILE"]);
            lost += usize::from(ended.err.contains("receiving the fds of VERSION"));
        }
    }
    assert!(lost > 0, "the server's fd has no room in one case at least");
}

#[test]
fn a_lock_on_the_folder_held_up_a_server_for_ever() {
    let folder = Folder::new();
    let lock = std::fs::File::open(folder.path("")).unwrap();
    for how in [FlockOperation::LockShared, FlockOperation::LockExclusive] {
        rustix::fs::flock(&lock, how).unwrap();
        // Also in the place of one that is gone.
        drop(UnixListener::bind(folder.path("device")).unwrap());
        let mut server = folder.device("device", &[]);
        assert_eq!(server.state(), State::Running);
        server.end().ok();
    }
}

#[test]
fn a_server_that_hangs_holds_a_change_of_state_up_for_as_long_as_is_said() {
    let folder = Folder::new();
    let device = folder.device("device", &["fault=stall:RUNNING>RUNNING_P2P:600000"]);
    let limits = ["--timeout", "1", "--state-timeout", "0.05"];
    let set = [&limits[..], &["state", &device.socket, "set", "RUNNING_P2P"]].concat();
    limosa(&set).fails(UNREACHABLE, &[&device.socket, "50ms"]);
    let help = limosa(&["save", "--help"]).ok();
    assert!(help.contains("--state-timeout <SECONDS>") && help.contains("have --state-timeout"), "{help}");
    device.kill_now();
}

#[test]
fn what_is_no_snapshot_was_read_for_ever() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    for node in ["/dev/zero", "/dev/urandom"] {
        for args in [&["inspect", node][..], &["verify", node], &["load", node, &device.socket]] {
            limosa(args).fails(UNREACHABLE, &[node, "it is a device node", "limosa save"]);
        }
    }
    let huge = folder.text("huge");
    std::fs::File::create(&huge).unwrap().set_len(1 << 43).unwrap();
    let said = limosa(&["inspect", &huge]);
    said.fails(DAMAGED, &[&huge, "not a whole saved stream"]);
    assert!(said.out.contains("no stream"), "{said:?}");
    limosa(&["verify", &huge]).fails(DAMAGED, &[&huge]);
    limosa(&["load", &huge, &device.socket]).fails(DAMAGED, &[&huge, "limosa save"]);
}

#[test]
fn the_server_of_a_device_that_is_moved_was_stopped_with_the_guest() {
    let folder = Folder::new();
    let (source, destination) = (folder.device("source", &[]), folder.device("destination", &[]));
    let file = folder.text("file");
    for (server, command) in [
        (&source, &["migrate", &source.socket, &destination.socket][..]),
        (&destination, &["migrate", &source.socket, &destination.socket]),
        (&source, &["save", &source.socket, &file]),
        (&source, &["send", &source.socket, "--to", "unix:/nowhere"]),
    ] {
        let pid = server.pid();
        let refused = limosa(&[command, &["--stop-with", &pid]].concat());
        refused.fails(2, &["--stop-with", &pid, &server.socket, "--on-stop"]);
        assert_eq!((source.state(), destination.state()), (State::Running, State::Running));
    }
    let other = start(&["serve", "uart", "--socket", &folder.text("uart")]);
    other.line("listening on");
    let pid = other.pid();
    limosa(&["save", &source.socket, &file, "--stop-with", &pid]).ok();
}

#[test]
fn a_client_that_stays_silent_keeps_nobody_else_out() {
    let folder = Folder::new();
    let device = folder.device("device", &[]);
    let _silent = UnixStream::connect(&device.socket).unwrap();
    limosa(&["probe", &device.socket]).ok();
}
