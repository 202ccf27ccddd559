//! The accepting thread: it decides which connections are served, each on its own thread.
//!
//! It never waits for a client. A client that connects and disconnects repeatedly costs a call or two each time, and a
//! client that connects and stays silent displaces others of its own process.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use limosa_foreign_fd::Foreign;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::connection::Connection;
use super::doors::ConnectionId;
use super::handover::Adopted;
use super::{Door, Server, doors};
use crate::connection::ConnectionError;

/// How long a server that cannot accept a client waits before it checks whether it has to end.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a new connection waits for the threads of a displaced connection, and of starting ones.
const ROOM_WAIT: Duration = Duration::from_secs(1);

/// A connection to be served.
pub(super) enum Come {
    /// An accepted connection, and whether it came through the control socket.
    New(Foreign<UnixStream>, bool),
    Adopted(Box<Adopted>),
}

impl Come {
    /// The id of a connection that another process has served.
    fn adopted(&self) -> Option<ConnectionId> {
        match self {
            Come::New(..) => None,
            Come::Adopted(adopted) => adopted.place,
        }
    }
}

impl Server {
    pub(super) fn accept<'scope>(
        &'scope self,
        scope: &'scope std::thread::Scope<'scope, '_>,
    ) -> io::Result<()> {
        loop {
            let ready = self.wait_for_client()?;
            if self.shutdown.is_shut_down() || self.doors.is_given() {
                return Ok(());
            }
            if !limosa_foreign_fd::keeps_up(PAUSE) {
                tracing::error!(
                    "no client is served: fds of others cannot be closed, as closing them blocks"
                );
                continue;
            }
            for (by_control_door, door) in ready {
                if !self.doors.expect() {
                    return Ok(());
                }
                let error = match door.listener.accept() {
                    Ok((stream, _)) => {
                        let stream = Foreign::new(stream);
                        if self.is_admitted(&stream, by_control_door) {
                            self.start(scope, Come::New(stream, by_control_door));
                        } else {
                            self.doors.expect_no_more();
                        }
                        continue;
                    }
                    Err(error) => error,
                };
                self.doors.expect_no_more();
                if is_passing(&error) {
                    tracing::debug!(%error, "a connection was gone before it was accepted");
                } else if is_lack(&error) {
                    // The client stays in the queue until a connection is free.
                    tracing::warn!(%error, "no free connection");
                    self.pause();
                } else {
                    return Err(error);
                }
            }
        }
    }

    /// Whether a connection that was accepted gets a thread. One whose client is gone already does not: clients that connect and
    /// go without an end would keep others waiting in the queue for as long as threads take to start.
    fn is_admitted(&self, stream: &UnixStream, by_control_door: bool) -> bool {
        let mut hang_up = [PollFd::new(stream, PollFlags::empty())];
        if poll(&mut hang_up, Some(&Timespec::default())).is_ok_and(|ready| ready > 0) {
            return false;
        }
        // Clients of one socket do not block those of the other.
        let most = doors::CONNECTIONS_MAX + if by_control_door { doors::CONTROL_MAX } else { 0 };
        let is_room = self.doors.make_room(most, ROOM_WAIT);
        if !is_room {
            tracing::warn!("a client is disconnected at once, as there are {most}");
        }
        is_room
    }

    /// Serves a connection on its own thread.
    pub(super) fn start<'scope>(&'scope self, scope: &'scope std::thread::Scope<'scope, '_>, come: Come) {
        let adopted = come.adopted();
        let device = tracing::Span::current();
        let serve = move || {
            let _device = device.entered();
            match self.connection(come) {
                Ok(mut connection) => _ = connection.serve(),
                Err(error) => tracing::warn!(%error, "a connection could not be set up"),
            }
        };
        if let Err(error) = std::thread::Builder::new().name("vfio-user".into()).spawn_scoped(scope, serve) {
            match adopted {
                Some(id) => self.doors.expect_adopted_no_more(id),
                None => self.doors.expect_no_more(),
            }
            tracing::warn!(%error, "no thread for a connection, which is closed");
            self.pause();
        }
    }

    fn connection(&self, come: Come) -> Result<Connection<'_>, ConnectionError> {
        let Server { machine, options, doors, .. } = self;
        match come {
            Come::New(stream, by_control_door) => {
                Connection::new(stream, machine, options, doors, by_control_door, None)
                    .inspect_err(|_| doors.expect_no_more())
            }
            Come::Adopted(adopted) => adopted.connection(machine, options, doors),
        }
    }

    /// Waits for clients, or the shutdown. Returns the sockets with waiting clients, and whether each is the
    /// control socket.
    fn wait_for_client(&self) -> io::Result<Vec<(bool, &Door)>> {
        let doors: Vec<_> = std::iter::once((false, &self.door))
            .chain(self.control.iter().map(|door| (true, door)))
            .collect();
        let mut fds: Vec<_> =
            doors.iter().map(|(_, door)| PollFd::new(&*door.listener, PollFlags::IN)).collect();
        fds.push(PollFd::new(&self.shutdown, PollFlags::IN));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        }
        let is_ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        Ok(doors.into_iter().zip(is_ready).filter(|(_, ready)| *ready).map(|(door, _)| door).collect())
    }

    /// A moment, or until shut down.
    fn pause(&self) {
        let pause = Timespec::try_from(PAUSE).ok();
        let _ = poll(&mut [PollFd::new(&self.shutdown, PollFlags::IN)], pause.as_ref());
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// Out of fds or memory.
fn is_lack(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let lacks = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    rustix::io::Errno::from_io_error(error).is_some_and(|errno| lacks.contains(&errno))
}
