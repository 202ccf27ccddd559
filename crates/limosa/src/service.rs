//! systemd, when it runs the command: sockets that it hands over (sd_listen_fds(3)), and what it is told of the service's
//! state (sd_notify(3)). Without systemd's environment variables all of this does nothing.

use std::os::unix::net::UnixListener;
use std::path::{Path, absolute};

use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;
use sd_notify::NotifyState;

use crate::exit::{self, Code};

/// The service does what it is for.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The service is told to end.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Another process is about to take over, or not: [`ready`] ends this.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "systemd is not told of a switch-over"),
    }
}

/// Another process is the service's main one.
pub fn main_process(pid: u32) {
    tell(&[NotifyState::MainPid(pid)]);
}

/// This process is the service's main one, and does what it is for.
pub fn took_over() {
    tell(&[NotifyState::MainPid(std::process::id()), NotifyState::Ready]);
}

fn tell(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "NOTIFY_SOCKET: systemd is not told of the service's state");
    }
}

/// The socket that systemd listens on for this process, if it handed one over. It has to be the one that the command line
/// names.
pub fn listener(socket: &Path) -> anyhow::Result<Option<UnixListener>> {
    let mut handed = ListenFd::from_env();
    let path = socket.display();
    let refused = |what: String| exit::error(Code::Usage, format!("LISTEN_FDS: {what}"));
    if handed.len() > 1 {
        let what = format!("{} sockets; expected one, which listens at {path}", handed.len());
        return Err(refused(what));
    }
    let listener = match handed.take_unix_listener(0) {
        Ok(None) => return Ok(None),
        Ok(Some(listener)) if socket_acceptconn(&listener).unwrap_or(false) => listener,
        Ok(Some(_)) => return Err(refused(format!("a socket that does not listen; expected one at {path}"))),
        Err(error) => return Err(refused(format!("{error}; expected a UNIX stream socket at {path}"))),
    };
    let at = listener.local_addr().ok().and_then(|at| at.as_pathname().map(Path::to_owned));
    if at.as_deref().and_then(|at| absolute(at).ok()) != absolute(socket).ok() {
        let at = at.map_or("no path".to_owned(), |at| at.display().to_string());
        return Err(refused(format!("a socket at {at}; expected the one of --socket, {path}")));
    }
    Ok(Some(listener))
}
