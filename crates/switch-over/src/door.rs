//! [`TakeOver`]: the old server's socket for new ones. A connecting process gets only the number of an fd of this
//! process: one end of a socket pair. Only a process that the kernel permits to attach to this one can duplicate it
//! (`pidfd_getfd`), so the first frame on the other end proves that right. A socket cannot be opened through `/proc`,
//! for which a weaker right would suffice.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Instant;

use limosa_foreign_fd::Foreign;
use limosa_host::{SocketAccess, SocketPath, User};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::body::{Hello, Refusal, Token};
use crate::channel::{At, Channel, FdTransport, timeout};
use crate::error::{Cause, Error, Step};
use crate::frame::{Header, Kind};
use crate::old::{GiveOptions, Given, Giver, Other, give, hear_hello, new_token, say_hello};
use crate::parts::until;
use crate::peer::Peer;

/// Connections that have not said hello yet. Beyond these the oldest is closed.
pub const PENDING_MAX: usize = 16;

/// Connections that can wait for the end of a switch-over, and are told of it.
const WAITING_MAX: usize = 256;

/// The socket of an old server, for new ones. Made for its owner alone, and removed when this is dropped.
#[derive(Debug)]
pub struct TakeOver {
    listener: UnixListener,
    path: SocketPath,
}

/// A connection that has not said hello.
struct Pending {
    connection: Foreign<OwnedFd>,
    peer: Peer,
    channel: Channel,
    /// The other end of the channel, until the new server has it.
    offered: OwnedFd,
    token: Token,
    until: Instant,
}

impl TakeOver {
    /// Listens at a path. The errors are those of [`limosa_host::listen`].
    pub fn listen(path: &Path) -> io::Result<TakeOver> {
        let (path, listener) = limosa_host::listen(path, &SocketAccess::default())?;
        listener.set_nonblocking(true)?;
        Ok(TakeOver { listener, path })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.path.path()
    }

    /// Waits for a new server and hands over to it. `stop` ends the wait when it becomes readable; a switch-over that
    /// has begun is finished first.
    ///
    /// # Errors
    ///
    /// This server serves as before, and the caller may call this again. [`Cause::Stopped`] when `stop` became readable;
    /// other errors at [`Step::Hello`] are of the listener itself.
    pub fn serve_one(
        &self,
        giver: &dyn Giver,
        options: &GiveOptions,
        stop: Option<BorrowedFd<'_>>,
    ) -> Result<Given, Error> {
        let mut pending: Vec<Pending> = Vec::new();
        let (channel, other) = loop {
            let ready = wait(&self.listener, stop, &pending).map_err(Cause::Io).at(Step::Hello)?;
            if ready.stop {
                refuse(pending, "the old server ends, or is replaced by a process that it starts itself");
                return Err(Error { step: Step::Hello, cause: Cause::Stopped });
            }
            if let Some(found) = greet(&mut pending, &ready.spoke) {
                break found;
            }
            let now = Instant::now();
            pending.retain(|pending| pending.until > now);
            if ready.listener {
                match self.accept(options) {
                    Ok(Some(accepted)) => pending.push(accepted),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(%error, "a new server could not be let in");
                        // Out of fds or memory. Those that stay silent make room; without any, the caller learns of it.
                        if pending.is_empty() {
                            return Err(Error { step: Step::Hello, cause: Cause::Io(error) });
                        }
                        pending.remove(0);
                    }
                }
                if pending.len() > PENDING_MAX {
                    pending.remove(0);
                }
            }
        };
        refuse(pending, "another new server is taking over; try again if that one fails");
        let given = give(channel, other, giver, options)?;
        self.refuse_the_rest();
        Ok(given)
    }

    /// Tells those that waited for the end of a switch-over that this server was replaced by it.
    fn refuse_the_rest(&self) {
        let reason = Refusal::new("another new server has taken its place meanwhile").encode();
        let mut frame = Header { kind: Kind::Refused, length: reason.len(), fds: 0 }.encode().to_vec();
        frame.extend(reason);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // More than the socket's queue holds cannot wait.
        for _ in 0..WAITING_MAX {
            let Ok(connection) = rustix::net::accept_with(&self.listener, flags) else { return };
            // The queue is empty. One that is gone need not be told.
            let _ = rustix::net::send(Foreign::new(connection), &frame, rustix::net::SendFlags::NOSIGNAL);
        }
    }

    /// Accepts a connection and names the channel to it.
    fn accept(&self, options: &GiveOptions) -> io::Result<Option<Pending>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let connection = match rustix::net::accept_with(&self.listener, flags) {
            Ok(connection) => Foreign::new(connection),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // A process that has ended cannot be looked up, and is of no interest.
        let Ok(peer) = Peer::of(&connection) else { return Ok(None) };
        if ![User::current(), User::ROOT].contains(&peer.user()) {
            tracing::warn!(user = %peer.user(), pid = peer.pid(), "refused: it may not take over");
            return Ok(None);
        }
        let flags = SocketFlags::CLOEXEC;
        let (ours, offered) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let mut channel = Channel::new(ours, FdTransport::Pulled, None)?;
        let (token, until) = (new_token()?, until(options.limits.hello));
        // Both go into empty queues.
        if say_hello(&mut channel, token, options.name, until).is_err()
            || name(&connection, &offered, token).is_err()
        {
            return Ok(None);
        }
        Ok(Some(Pending { connection, peer, channel, offered, token, until }))
    }
}

fn refuse(pending: Vec<Pending>, reason: &str) {
    let reason = Refusal::new(reason).encode();
    for mut pending in pending {
        pending.channel.notify(Kind::Refused, &reason);
    }
}

/// DOOR: the number of the channel's other end, and the token.
fn name(connection: impl AsFd, offered: &OwnedFd, token: Token) -> Result<usize, Errno> {
    let mut door = Header { kind: Kind::Door, length: 4 + token.len(), fds: 1 }.encode().to_vec();
    door.extend(std::os::fd::AsRawFd::as_raw_fd(offered).to_le_bytes());
    door.extend(token);
    rustix::net::send(connection, &door, rustix::net::SendFlags::NOSIGNAL)
}

/// What is ready.
struct Ready {
    stop: bool,
    listener: bool,
    /// For each pending connection: whether there is something on the channel, and whether it has ended.
    spoke: Vec<(bool, bool)>,
}

fn wait(listener: &UnixListener, stop: Option<BorrowedFd<'_>>, pending: &[Pending]) -> io::Result<Ready> {
    let mut fds = vec![PollFd::new(listener, PollFlags::IN)];
    for pending in pending {
        fds.push(PollFd::from_borrowed_fd(pending.channel.socket(), PollFlags::IN));
        // A new server says nothing there. Who does speaks another protocol.
        fds.push(PollFd::new(&pending.connection, PollFlags::IN | PollFlags::RDHUP));
    }
    if let Some(stop) = stop {
        fds.push(PollFd::from_borrowed_fd(stop, PollFlags::IN));
    }
    let until = pending.iter().map(|pending| pending.until).min();
    match rustix::event::poll(&mut fds, timeout(until).as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let is_ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    let (of_pending, of_stop) = is_ready[1..].split_at(2 * pending.len());
    let spoke = of_pending.as_chunks::<2>().0.iter().map(|[spoke, ended]| (*spoke, *ended)).collect();
    Ok(Ready { stop: of_stop.contains(&true), listener: is_ready[0], spoke })
}

/// Hears those that spoke; removes those that ended or said something else than hello.
fn greet(pending: &mut Vec<Pending>, spoke: &[(bool, bool)]) -> Option<(Channel, Other)> {
    let all = std::mem::take(pending);
    let mut found = None;
    for (mut one, (has_spoken, has_ended)) in all.into_iter().zip(spoke) {
        if *has_spoken && found.is_none() {
            match hear(&mut one) {
                Ok(Some(hello)) => {
                    let other = Other::new(hello, &one.peer);
                    // With this the new server has the only other end.
                    drop(one.offered);
                    found = Some((one.channel, other));
                    continue;
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, pid = one.peer.pid(), "a new server did not say hello");
                    continue;
                }
            }
        }
        if !*has_ended {
            pending.push(one);
        }
    }
    found
}

/// HELLO, if all of it is there.
fn hear(pending: &mut Pending) -> Result<Option<Hello>, Cause> {
    match hear_hello(&mut pending.channel, pending.token, Instant::now()) {
        Ok(hello) => Ok(Some(hello)),
        Err(Cause::Late) => Ok(None),
        Err(error) => Err(error),
    }
}
