//! The command as a service of systemd: sockets that are handed over, and what systemd is told, without systemd.

use std::io::ErrorKind;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::support::{Folder, LIMIT, Running, limosa, start_with};
use limosa_protocol::State;
use rustix::process::Signal;

/// Where systemd would be told.
struct Systemd {
    socket: UnixDatagram,
    variables: Vec<(String, String)>,
}

impl Systemd {
    fn new(folder: &Folder) -> Systemd {
        let path = folder.text("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Systemd { socket, variables: vec![("NOTIFY_SOCKET".into(), path)] }
    }

    #[track_caller]
    fn is_told(&self, expected: &[&str]) {
        let mut said = [0; 1024];
        let bytes = self.socket.recv(&mut said).unwrap();
        let said = String::from_utf8_lossy(&said[..bytes]);
        let lines: Vec<_> = said.lines().collect();
        assert!(lines.len() == expected.len(), "{lines:?}");
        assert!(lines.iter().zip(expected).all(|(line, start)| line.starts_with(start)), "{lines:?}");
    }

    fn is_told_nothing_more(&self) {
        self.socket.set_nonblocking(true).unwrap();
        assert_eq!(self.socket.recv(&mut [0; 1024]).unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    fn serve(&self, folder: &Folder, state: &str, more: &[&str]) -> Running {
        let [device, takeover] = ["device", "takeover"].map(|name| folder.text(name));
        let args = ["serve", "synthetic", "-o", state, "--socket", &device, "--takeover", &takeover];
        start_with(&self.variables, &[&args[..], more].concat())
    }
}

#[test]
fn systemd_is_told_of_the_service_and_of_its_next_process() {
    let folder = Folder::new();
    let systemd = Systemd::new(&folder);
    let takeover = folder.text("takeover");
    let old = systemd.serve(&folder, "state=1M", &[]);
    systemd.is_told(&["READY=1"]);
    systemd.serve(&folder, "state=2M", &["--take-from", &takeover]).end().fails(3, &["region 2"]);
    systemd.is_told(&["RELOADING=1", "MONOTONIC_USEC="]);
    systemd.is_told(&["READY=1"]);
    let new = systemd.serve(&folder, "state=1M", &["--take-from", &takeover]);
    let process = format!("MAINPID={}", new.pid());
    systemd.is_told(&["RELOADING=1", "MONOTONIC_USEC="]);
    systemd.is_told(&[&process]);
    old.end().ok();
    systemd.is_told(&[&process, "READY=1"]);
    new.signal(Signal::TERM);
    systemd.is_told(&["STOPPING=1"]);
    new.end().ok();
    systemd.is_told_nothing_more();
}

#[test]
fn systemd_is_told_of_a_process_that_the_server_starts_itself() {
    let folder = Folder::new();
    let systemd = Systemd::new(&folder);
    let server = systemd.serve(&folder, "state=1M", &[]);
    systemd.is_told(&["READY=1"]);
    server.signal(Signal::USR2);
    // As soon as it is asked for, and as it begins.
    systemd.is_told(&["RELOADING=1", "MONOTONIC_USEC="]);
    systemd.is_told(&["RELOADING=1", "MONOTONIC_USEC="]);
    let serves = server.line(" serves in place of process ");
    let pid: i32 = serves.split(' ').nth(1).unwrap().parse().unwrap();
    let process = format!("MAINPID={pid}");
    systemd.is_told(&[&process]);
    systemd.is_told(&[&process, "READY=1"]);
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    systemd.is_told(&["STOPPING=1"]);
    server.end().ok();
    systemd.is_told_nothing_more();
}

/// Serves with this as fd 3, and this many sockets handed over to this process, or to another one.
fn activated(socket: &Path, handed: impl Into<std::os::fd::OwnedFd>, count: &str, pid: &str) -> Command {
    let mut shell = Command::new("/bin/sh");
    let script = format!("export LISTEN_FDS={count} LISTEN_PID={pid}; exec \"$@\" 3<&0 4<&0 </dev/null");
    shell.args([
        "-c",
        &script,
        "sh",
        env!("CARGO_BIN_EXE_limosa"),
        "--json",
        "serve",
        "synthetic",
        "-o",
        "state=1M",
    ]);
    shell.arg("--socket").arg(socket).stdin(Stdio::from(handed.into()));
    shell
}

#[test]
fn a_socket_that_systemd_hands_over_is_served_and_stays() {
    let folder = Folder::new();
    let path = folder.path("device");
    let listener = UnixListener::bind(&path).unwrap();
    let mut server = activated(&path, listener, "1", "$$").stdout(Stdio::null()).spawn().unwrap();
    // The socket listens whether the server has begun or not.
    let text = limosa(&["state", path.to_str().unwrap()]).ok();
    assert_eq!(text.trim(), State::Running.to_string());
    let pid = rustix::process::Pid::from_child(&server);
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert!(server.wait().unwrap().success());
    assert!(path.exists(), "it is systemd's");
}

#[test]
fn other_descriptors_are_refused_by_what_they_are() {
    let folder = Folder::new();
    let [path, elsewhere] = ["device", "elsewhere"].map(|name| folder.path(name));
    let refused = |mut command: Command, part: &str| {
        let Output { status, stderr, .. } = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&stderr);
        assert_eq!(status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("LISTEN_FDS") && stderr.contains(part), "`{part}`: {stderr}");
        assert!(!path.exists());
    };
    let listener = UnixListener::bind(&elsewhere).unwrap();
    refused(activated(&path, listener.try_clone().unwrap(), "1", "$$"), "a socket at");
    refused(activated(&path, listener, "2", "$$"), "2 sockets; expected 1 at most");
    refused(activated(&path, UnixStream::pair().unwrap().0, "1", "$$"), "does not listen");
    refused(activated(&path, UnixDatagram::unbound().unwrap(), "1", "$$"), "UNIX stream socket");
    refused(activated(&path, std::fs::File::open("/dev/null").unwrap(), "1", "$$"), "UNIX stream socket");
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    refused(activated(&path, tcp, "1", "$$"), "UNIX stream socket");
}

#[test]
fn sockets_for_another_process_are_left_alone() {
    let folder = Folder::new();
    let path = folder.path("device");
    let handed = UnixListener::bind(folder.path("elsewhere")).unwrap();
    let mut server = activated(&path, handed, "1", "1").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(server.stdout.as_mut().unwrap()), &mut line)
        .unwrap();
    assert!(path.exists());
    server.kill().unwrap();
    server.wait().unwrap();
}

/// SIGHUP ended the server at once. And a client that had just connected, and was not served yet, held the end up for 20 s.
#[test]
fn a_server_whose_terminal_was_closed_left_its_socket_behind() {
    let folder = Folder::new();
    let socket = folder.text("device");
    for signal in [Signal::HUP, Signal::TERM, Signal::INT] {
        let server = start_with(&[], &["serve", "synthetic", "--socket", &socket]);
        server.line("listening on");
        let client = UnixStream::connect(&socket).unwrap();
        server.signal(signal);
        server.end().ok();
        assert!(!folder.path("device").exists(), "{signal:?}");
        drop(client);
    }
}
