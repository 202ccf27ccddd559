//! Standard error that blocks who writes to it: a terminal that is held by Ctrl-S, a pipe that nobody reads. Signals that come twice.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::support::pair::Pair;
use crate::support::{Folder, LIMIT, limosa, limosa_command};
use limosa_testing::Terminal;
use limosa_vfio_user::client::{Client, Options};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// Fills what is written to here, so that the next write blocks.
fn filled(end: File) -> File {
    let flags = fcntl_getfl(&end).unwrap();
    fcntl_setfl(&end, flags | OFlags::NONBLOCK).unwrap();
    // A terminal takes less than a whole buffer in the end.
    for bytes in [4096, 1] {
        let full = loop {
            if let Err(errno) = rustix::io::write(&end, &vec![b'.'; bytes]) {
                break errno;
            }
        };
        assert_eq!(full, Errno::AGAIN);
    }
    fcntl_setfl(&end, flags).unwrap();
    end
}

/// A pipe that is full, and its end to be read.
fn full_pipe() -> (std::io::PipeReader, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    (reader, filled(File::from(OwnedFd::from(writer))))
}

/// Starts the command with its standard error here.
fn with_error(error: File, args: &[&str]) -> Child {
    let mut command: Command = limosa_command(args);
    command.env("TERM", "xterm").stdin(Stdio::null()).stdout(Stdio::null()).stderr(error);
    command.spawn().unwrap()
}

/// The code with which it ends, within the limit of a test.
#[track_caller]
fn ended(mut child: Child) -> Option<i32> {
    let fd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
    let limit = Timespec { tv_sec: LIMIT.as_secs().try_into().unwrap(), tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(&fd.as_fd(), PollFlags::IN)], Some(&limit)).unwrap();
    if ready == 0 {
        child.kill().unwrap();
        child.wait().unwrap();
        panic!("it did not end");
    }
    child.wait().unwrap().code()
}

#[test]
fn a_terminal_that_was_held_kept_the_guest_stopped() {
    for log in [&[][..], &["-vv"]] {
        let pair = Pair::new(&["state=1M"], &["state=1M"]);
        let terminal = Terminal::new(80);
        let end = filled(terminal.end());
        let args = [log, &pair.migration(&[])].concat();
        assert_eq!(ended(with_error(end, &args)), Some(0), "{log:?}");
        pair.has_moved();
    }
}

#[test]
fn a_receiver_whose_log_nobody_read_kept_the_guest_stopped() {
    let pair = Pair::new(&["state=1M"], &["state=1M"]);
    let (_unread, error) = full_pipe();
    let link = format!("unix:{}", pair.folder.text("link"));
    let receiver = with_error(error, &["-vv", "receive", &pair.destination.socket, "--listen", &link]);
    let begun = Instant::now();
    while !pair.folder.path("link").exists() {
        assert!(begun.elapsed() < LIMIT, "it does not listen");
        std::thread::yield_now();
    }
    limosa(&["send", &pair.source.socket, "--to", &link]).ok();
    assert_eq!(ended(receiver), Some(0));
    pair.has_moved();
}

/// A server with its standard error here, and its socket.
fn served(folder: &Folder, error: File) -> (Child, String) {
    let socket = folder.text("served");
    let server = with_error(error, &["-vv", "serve", "synthetic", "--socket", &socket]);
    let begun = Instant::now();
    while Client::connect(&socket, Options::default()).is_err() {
        assert!(begun.elapsed() < LIMIT, "it does not listen");
        std::thread::yield_now();
    }
    (server, socket)
}

#[test]
fn a_server_whose_log_nobody_read_did_not_end_and_left_its_socket() {
    let folder = Folder::new();
    let (_unread, error) = full_pipe();
    let (server, socket) = served(&folder, error);
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    assert_eq!(ended(server), Some(0));
    assert!(!std::path::Path::new(&socket).exists());
}

#[test]
fn a_second_signal_right_after_the_first_left_the_socket_behind() {
    for round in 0..10 {
        let folder = Folder::new();
        let (server, socket) = served(&folder, File::create(folder.path("log")).unwrap());
        let pid = Pid::from_child(&server);
        for signal in [Signal::TERM, Signal::TERM, Signal::INT] {
            // It may have ended already, but is waited for only below.
            kill_process(pid, signal).unwrap();
        }
        assert_eq!(ended(server), Some(0), "round {round}");
        assert!(!std::path::Path::new(&socket).exists(), "round {round}");
    }
}
