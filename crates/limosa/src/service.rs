//! systemd, when it runs the command: sockets that it hands over (sd_listen_fds(3)), and notifications of the service's
//! state (sd_notify(3)). Without systemd's environment variables all of this does nothing.

use std::os::unix::net::UnixListener;
use std::path::{Path, absolute};

use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;
use sd_notify::NotifyState;

use crate::exit::{self, Code};

/// Notifies systemd that the service is ready.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// Notifies systemd that the service is ending.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Notifies systemd that another process may take over; [`ready`] ends this.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "systemd is not told of a switch-over"),
    }
}

/// Notifies systemd that another process is the main process of the service.
pub fn main_process(pid: u32) {
    tell(&[NotifyState::MainPid(pid)]);
}

/// Notifies systemd that this process is the main process of the service, and is ready.
pub fn took_over() {
    tell(&[NotifyState::MainPid(std::process::id()), NotifyState::Ready]);
}

fn tell(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "NOTIFY_SOCKET: systemd is not told of the service's state");
    }
}

/// The sockets that systemd listens on for this process, in the order of the paths at which it is to listen; `None` for one
/// that was not handed over. Each has to be one of them.
pub fn listeners(sockets: &[&Path]) -> anyhow::Result<Vec<Option<UnixListener>>> {
    let mut listeners: Vec<_> = sockets.iter().map(|_| None).collect();
    let mut handed = ListenFd::from_env();
    let expected: Vec<_> = sockets.iter().map(|socket| socket.display().to_string()).collect();
    let expected = expected.join(", ");
    let refused = |what: String| exit::error(Code::Usage, format!("LISTEN_FDS: {what}"));
    if handed.len() > sockets.len() {
        let (count, expected_count) = (handed.len(), sockets.len());
        let what = format!("{count} sockets; expected {expected_count} at most, which listen at {expected}");
        return Err(refused(what));
    }
    for number in 0..handed.len() {
        let listener = match handed.take_unix_listener(number) {
            Ok(None) => continue,
            Ok(Some(listener)) if socket_acceptconn(&listener).unwrap_or(false) => listener,
            Ok(Some(_)) => {
                return Err(refused(format!("a socket that does not listen; expected one at {expected}")));
            }
            Err(error) => {
                return Err(refused(format!("{error}; expected a UNIX stream socket at {expected}")));
            }
        };
        let at = listener.local_addr().ok().and_then(|at| at.as_pathname().map(Path::to_owned));
        let is_it = |socket: &&Path| at.as_deref().and_then(|at| absolute(at).ok()) == absolute(socket).ok();
        let place = sockets.iter().position(is_it).and_then(|place| listeners.get_mut(place));
        match place {
            Some(place @ None) => *place = Some(listener),
            place => {
                let at = at.map_or("no path".to_owned(), |at| at.display().to_string());
                let how = if place.is_some() { "another socket" } else { "a socket" };
                return Err(refused(format!("{how} at {at}; expected one for each of {expected}")));
            }
        }
    }
    Ok(listeners)
}
