//! Receiving while no thread waits for a reply: a sender that finds the socket full receives, so that two sides
//! that both send do not block each other, and a thread receives for a server that accesses memory on its own.

use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::step::Step;
use super::{Exchange, Failure, READER};
use crate::connection::{ConnectionError, wait_ready};

impl Exchange {
    /// The socket is full: receives meanwhile, if no other thread does, so that a server that also sends can
    /// continue.
    pub(super) fn make_room(&self, deadline: Instant) -> Result<(), ConnectionError> {
        // Also with a server that never stops sending.
        if Instant::now() >= deadline {
            return Err(ConnectionError::TimedOut);
        }
        let mut dispatcher = self.dispatcher();
        if dispatcher.lost.is_some() {
            return Err(ConnectionError::Closed);
        }
        let receiver = if dispatcher.handed.is_none() { dispatcher.receiver.take() } else { None };
        let Some(mut receiver) = receiver else {
            dispatcher.blocked += 1;
            drop(dispatcher);
            let mut fds = [
                PollFd::from_borrowed_fd(self.sender.socket().as_fd(), PollFlags::OUT),
                PollFd::new(&self.leaderless, PollFlags::IN),
            ];
            let ready = wait_ready(&mut fds, deadline);
            let mut dispatcher = self.dispatcher();
            dispatcher.blocked -= 1;
            if dispatcher.blocked == 0 {
                let _ = rustix::io::read(&self.leaderless, &mut [0; 8]);
            }
            return ready;
        };
        drop(dispatcher);
        let readable = receiver.has_more() || {
            let mut fds =
                [PollFd::from_borrowed_fd(receiver.socket().as_fd(), PollFlags::IN | PollFlags::OUT)];
            match wait_ready(&mut fds, deadline) {
                Ok(()) => !fds[0].revents().contains(PollFlags::OUT),
                Err(error) => {
                    let mut dispatcher = self.dispatcher();
                    dispatcher.receiver = Some(receiver);
                    self.pass_on(&dispatcher);
                    return Err(error);
                }
            }
        };
        let step = if readable { self.step(&mut receiver, None, deadline) } else { Ok(Step::Done) };
        let mut dispatcher = self.dispatcher();
        match step {
            Ok(Step::OtherReply(owner, header)) => self.dispatch(&mut dispatcher, receiver, owner, header),
            Ok(_) => {
                dispatcher.receiver = Some(receiver);
                self.pass_on(&dispatcher);
            }
            Err(failure) => {
                dispatcher.receiver = Some(receiver);
                if matches!(failure, Failure::Connection(ConnectionError::TimedOut)) {
                    self.pass_on(&dispatcher);
                    return Err(ConnectionError::TimedOut);
                }
                self.lose(dispatcher, failure);
                return Err(ConnectionError::Closed);
            }
        }
        Ok(())
    }

    /// Starts a thread that receives while no thread waits for a reply, for a server that accesses memory on its
    /// own over this socket. It ends with the connection.
    pub fn start_reader(self: &Arc<Exchange>) -> std::io::Result<()> {
        {
            let mut dispatcher = self.dispatcher();
            if dispatcher.has_reader || dispatcher.lost.is_some() {
                return Ok(());
            }
            dispatcher.has_reader = true;
        }
        let exchange = Arc::clone(self);
        let started = std::thread::Builder::new().name("vfio-user-dma".into()).spawn(move || {
            exchange.read_on();
        });
        if started.is_err() {
            self.dispatcher().has_reader = false;
        }
        started.map(drop)
    }

    fn read_on(&self) {
        let mut dispatcher = self.dispatcher();
        loop {
            if dispatcher.lost.is_some() {
                return;
            }
            let receiver = if dispatcher.handed.is_none() { dispatcher.receiver.take() } else { None };
            let Some(mut receiver) = receiver else {
                dispatcher = self.wakes[READER].wait(dispatcher).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(dispatcher);
            let step = loop {
                match self.step(&mut receiver, None, Instant::now() + READER_LIMIT) {
                    Ok(Step::Done) | Err(Failure::Connection(ConnectionError::TimedOut)) => {}
                    other => break other,
                }
            };
            dispatcher = self.dispatcher();
            match step {
                Ok(Step::OtherReply(owner, header)) => {
                    self.dispatch(&mut dispatcher, receiver, owner, header)
                }
                Ok(_) => dispatcher.receiver = Some(receiver),
                Err(failure) => {
                    dispatcher.receiver = Some(receiver);
                    self.lose(dispatcher, failure);
                    return;
                }
            }
        }
    }
}

/// How long the reader thread waits for a message at a time.
const READER_LIMIT: Duration = Duration::from_secs(60);
