//! How the serving thread of a connection waits: for a command, for a wake-up, or until it is stopped without being
//! woken.

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
    /// Sleeps until a command has arrived (for one longer than the receive buffer, its first part), [`Link::wake`]
    /// was called, or the time has passed. Does not consume data of the client, so that another process can continue
    /// with it. If `may_stop`, the thread can be stopped while it sleeps without being woken ([`Link::stop_if_idle`]).
    /// `is_first` is whether the client has not sent anything yet.
    pub(in crate::server) fn wait_for_something(
        &self,
        until: Option<Instant>,
        is_first: bool,
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
            // Usually nothing has arrived yet, and checking the socket first would waste a call.
            let gathered = if is_ready || receiver.has_more() {
                self.gather(&mut receiver, is_first)
            } else {
                Ok(false)
            };
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

    /// Stops the serving thread while it sleeps between two requests, and returns whether that succeeded. The
    /// thread then reads nothing before [`Link::set_busy`], and need not be woken for that.
    pub(in crate::server) fn stop_if_idle(&self) -> bool {
        !self.sender.keeps() && self.reads.compare_exchange(IDLE, STOPPED, SeqCst, SeqCst).is_ok()
    }

    /// Lets it continue, if it still sleeps without having noticed that it was stopped.
    pub(in crate::server) fn go_on_idle(&self) -> bool {
        self.reads.compare_exchange(STOPPED, IDLE, SeqCst, SeqCst).is_ok()
    }

    /// Called by the serving thread: it may read from now on, or waits until it may.
    pub(in crate::server) fn set_busy(&self) {
        self.reads.store(BUSY, SeqCst);
    }

    /// Sets whether the connection has to pause; then no thread waits for the client to read its replies. Call it
    /// before waking the thread for the pause.
    pub(in crate::server) fn set_pauses(&self, pauses: bool) {
        self.pauses.store(pauses, SeqCst);
    }

    /// Sleeps until the client's socket has space for more of a reply. `false` if the connection has to pause.
    pub(super) fn wait_for_room(&self, until: Instant) -> Result<bool, ConnectionError> {
        if self.pauses.load(SeqCst) {
            return Ok(false);
        }
        // Also with a client that reads a little each time.
        if Instant::now() >= until {
            return Err(ConnectionError::TimedOut);
        }
        let mut fds =
            [PollFd::new(self.sender.socket(), PollFlags::OUT), PollFd::new(&self.waker, PollFlags::IN)];
        wait_ready(&mut fds, until)?;
        if !fds[1].revents().is_empty() {
            // It was also woken for another reason, which it notices later.
            let _ = rustix::io::read(&self.waker, &mut [0; 8]);
            self.is_woken.store(true, SeqCst);
        }
        Ok(!self.pauses.load(SeqCst))
    }

    /// Whether the thread that serves was not stopped.
    pub(in crate::server) fn is_busy(&self) -> bool {
        self.reads.load(SeqCst) == BUSY
    }

    /// Whether a command has come. Replies before it go to the threads that wait for them. There are none before the first one.
    fn gather(&self, receiver: &mut Receiver, is_first: bool) -> Result<bool, ConnectionError> {
        loop {
            let is_there = receiver.gather()?;
            if is_first && let Some(header) = receiver.held_header() {
                self.check_first(&header)?;
            }
            if !is_there {
                return Ok(false);
            }
            if !receiver.held_header().is_some_and(|header| is_reply(&header)) {
                return Ok(true);
            }
            let header = receiver.next(None)?;
            self.hand_over(receiver, header, None, None)?;
            receiver.skip(None)?;
        }
    }

    /// Sleeps until [`Link::wake`] was called, the client has gone, or the time has passed. Data of the client
    /// stays in the socket.
    pub(in crate::server) fn wait_for_wake(&self, until: Option<Instant>) -> Result<(), ConnectionError> {
        if self.poll(PollFlags::RDHUP, until)? { Err(ConnectionError::Closed) } else { Ok(()) }
    }

    /// Sleeps until one of these events on the socket, [`Link::wake`], or the time; returns whether there was an
    /// event.
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
        // The waker may not have written yet: then this is woken again later.
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

/// The reason why [`Link::wait_for_something`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) enum Something {
    /// A command can be received.
    Command,
    /// [`Link::wake`].
    Woken,
    /// Nothing in time.
    Late,
}
