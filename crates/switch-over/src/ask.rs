//! [`ask`]: whether a server that can be replaced listens at a path, without taking over from it.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::channel::timeout;
use crate::frame::{HEADER_BYTES, Header, Kind};
use crate::parts::until;
use crate::peer::Peer;

/// What listens at a path.
#[derive(Debug)]
pub enum Answer {
    /// This process serves, and can be replaced.
    Serves(Peer),
    /// This process is no such server, or lets no process of this user take over.
    NoDoor(Peer),
    /// This process has not answered within the limit: it is in a switch-over, or hangs.
    Silent(Peer),
}

/// Asks what listens at a path, within a limit. A server in a switch-over answers at its end.
///
/// # Errors
///
/// The system's, of the connection.
pub fn ask(path: &Path, limit: Duration) -> io::Result<Answer> {
    let until = until(limit);
    let socket = limosa_host::connect(path, limit)?;
    let peer = Peer::of(&*socket)?;
    // A server that waits for a request sees the end at once. The door names its channel without one.
    socket.shutdown(Shutdown::Write)?;
    let mut header = [0; HEADER_BYTES];
    let mut filled = 0;
    while filled < HEADER_BYTES {
        if !is_readable(&socket, until) {
            return Ok(Answer::Silent(peer));
        }
        match (&*socket).read(&mut header[filled..]) {
            Ok(0) | Err(_) => return Ok(Answer::NoDoor(peer)),
            Ok(bytes) => filled += bytes,
        }
    }
    let is_door = Header::decode(&header).is_ok_and(|header| header.kind == Kind::Door);
    Ok(if is_door { Answer::Serves(peer) } else { Answer::NoDoor(peer) })
}

fn is_readable(socket: &UnixStream, until: Instant) -> bool {
    loop {
        match rustix::event::poll(&mut [PollFd::new(socket, PollFlags::IN)], timeout(Some(until)).as_ref()) {
            Err(Errno::INTR) => {}
            ready => return ready.is_ok_and(|ready| ready > 0),
        }
    }
}
