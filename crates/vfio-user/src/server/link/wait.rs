//! How the thread that serves a connection waits: for a command, to be woken, or to be stopped without being woken.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Link, is_reply};
use crate::connection::{ConnectionError, Receiver, wait_ready};

/// The thread that serves may read from the socket, or handles a request.
pub(super) const BUSY: u8 = 0;
/// It sleeps between two requests, and reads nothing before it is busy again.
const IDLE: u8 = 1;
/// It was idle, and must not become busy: the connection is paused.
const STOPPED: u8 = 2;

impl Link {
    /// Sleeps until a command has come, [`Link::wake`] was called, or it is so late. Of a command that is longer than the
    /// receive buffer, only the first part has come. Nothing that the client sent is taken from the connection, so that another
    /// process can go on with it. While it sleeps it can be stopped without being woken ([`Link::stop_if_idle`]), if
    /// `may_stop`.
    pub(in crate::server) fn wait_for_something(
        &self,
        until: Option<Instant>,
        may_stop: bool,
    ) -> Result<Something, ConnectionError> {
        let mut is_ready = false;
        loop {
            if self.was_woken() {
                return Ok(Something::Woken);
            }
            let mut shared = self.lock();
            if !shared.queue.is_empty() {
                return Ok(Something::Command);
            }
            if shared.over {
                return Err(ConnectionError::Closed);
            }
            let Some(mut receiver) = shared.receiver.take() else {
                let in_time = self.wait(shared, until).1;
                if !in_time {
                    return Ok(Something::Late);
                }
                continue;
            };
            drop(shared);
            // Mostly nothing has come yet, and a look at the socket is one call for nothing.
            let gathered =
                if is_ready || receiver.has_more() { self.gather(&mut receiver) } else { Ok(false) };
            self.give_back(receiver);
            if gathered? {
                return Ok(Something::Command);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(Something::Late);
            }
            if !may_stop {
                is_ready = self.poll(PollFlags::IN, until)?;
                continue;
            }
            self.reads.store(IDLE, SeqCst);
            let polled = self.poll(PollFlags::IN, until);
            if self.reads.compare_exchange(IDLE, BUSY, SeqCst, SeqCst).is_err() {
                return Ok(Something::Woken);
            }
            is_ready = polled?;
        }
    }

    /// Stops the thread that serves where it sleeps between two requests, and says whether it did. Then it reads nothing before
    /// [`Link::set_busy`], and need not be woken for that.
    pub(in crate::server) fn stop_if_idle(&self) -> bool {
        !self.sender.keeps() && self.reads.compare_exchange(IDLE, STOPPED, SeqCst, SeqCst).is_ok()
    }

    /// Lets it go on, if it sleeps there still without knowing that it was stopped.
    pub(in crate::server) fn go_on_idle(&self) -> bool {
        self.reads.compare_exchange(STOPPED, IDLE, SeqCst, SeqCst).is_ok()
    }

    /// Called by the thread that serves, which may read from now on, or will not before it was told that it may.
    pub(in crate::server) fn set_busy(&self) {
        self.reads.store(BUSY, SeqCst);
    }

    /// Whether it is to be paused: then nobody waits for the client to take its replies. Before it is woken for that.
    pub(in crate::server) fn set_pauses(&self, pauses: bool) {
        self.pauses.store(pauses, SeqCst);
    }

    /// Sleeps until the client has room for more of a reply. `false` when the connection is to be paused.
    pub(super) fn wait_for_room(&self, until: Instant) -> Result<bool, ConnectionError> {
        if self.pauses.load(SeqCst) {
            return Ok(false);
        }
        // Also with a client that takes a little each time.
        if Instant::now() >= until {
            return Err(ConnectionError::TimedOut);
        }
        let mut fds =
            [PollFd::new(self.sender.socket(), PollFlags::OUT), PollFd::new(&self.waker, PollFlags::IN)];
        wait_ready(&mut fds, until)?;
        if !fds[1].revents().is_empty() {
            // It is woken for something else as well, and finds that later.
            let _ = rustix::io::read(&self.waker, &mut [0; 8]);
            self.is_woken.store(true, SeqCst);
        }
        Ok(!self.pauses.load(SeqCst))
    }

    /// Whether the thread that serves was not stopped.
    pub(in crate::server) fn is_busy(&self) -> bool {
        self.reads.load(SeqCst) == BUSY
    }

    /// Whether a command has come. Replies before it go to the threads that wait for them.
    fn gather(&self, receiver: &mut Receiver) -> Result<bool, ConnectionError> {
        while receiver.gather()? {
            if !receiver.held_header().is_some_and(|header| is_reply(&header)) {
                return Ok(true);
            }
            let header = receiver.next(None)?;
            self.hand_over(receiver, header, None, None)?;
            receiver.skip(None)?;
        }
        Ok(false)
    }

    /// Sleeps until [`Link::wake`] was called, the client has gone, or it is so late. What the client sends stays where it is.
    pub(in crate::server) fn wait_for_wake(&self, until: Option<Instant>) -> Result<(), ConnectionError> {
        if self.poll(PollFlags::RDHUP, until)? { Err(ConnectionError::Closed) } else { Ok(()) }
    }

    /// Sleeps until that happens on the socket, and says whether it has, or until [`Link::wake`], or until it is so late.
    fn poll(&self, events: PollFlags, until: Option<Instant>) -> Result<bool, ConnectionError> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [PollFd::new(self.sender.socket(), events), PollFd::new(&self.waker, PollFlags::IN)];
        match poll(&mut fds, left.as_ref()) {
            Ok(_) => {
                let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
                if ready(&fds[1]) {
                    self.is_woken.store(true, SeqCst);
                }
                Ok(ready(&fds[0]))
            }
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether [`Link::wake`] was called since the last time.
    pub(in crate::server) fn was_woken(&self) -> bool {
        if !self.is_woken.swap(false, SeqCst) {
            return false;
        }
        // Nothing is there when the waker has not come to its write yet: then this is woken once more.
        let _ = rustix::io::read(&self.waker, &mut [0; 8]);
        true
    }

    /// Wakes the thread that serves, where it waits with [`Link::wait_for_something`] or [`Link::wait_for_wake`].
    pub(in crate::server) fn wake(&self) {
        self.is_woken.store(true, SeqCst);
        // Fails only when the counter is full, that is, woken.
        let _ = rustix::io::write(&self.waker, &1u64.to_ne_bytes());
        let shared = self.lock();
        if shared.waiting > 0 {
            self.turn.notify_all();
        }
    }

    /// Whether the client has closed its end, or will send nothing more: its connection is about to be over.
    pub(in crate::server) fn has_hung_up(&self) -> bool {
        let ready =
            poll(&mut [PollFd::new(self.sender.socket(), PollFlags::RDHUP)], Some(&Timespec::default()));
        ready.is_ok_and(|ready| ready > 0)
    }
}

/// What [`Link::wait_for_something`] waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) enum Something {
    /// A command can be taken.
    Command,
    /// [`Link::wake`].
    Woken,
    /// Nothing in time.
    Late,
}
