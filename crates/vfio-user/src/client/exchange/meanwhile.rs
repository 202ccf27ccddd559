//! Receiving while no thread waits for a reply: a sender that finds the socket full receives, so that two sides
//! that both send do not block each other, and a thread receives for a server that accesses memory on its own.

use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::step::Step;
use super::{ATTENDANT, Exchange, Failure};
use crate::connection::{ConnectionError, wait_ready};

impl Exchange {
    /// The socket is full: receives meanwhile, if no other thread does, so that a server that also sends can
    /// continue.
    pub(super) fn make_room(&self, deadline: Instant) -> Result<(), ConnectionError> {
        // Also with a server that never stops sending.
        if Instant::now() >= deadline {
            return Err(ConnectionError::TimedOut);
        }
        let mut desk = self.desk();
        if desk.lost.is_some() {
            return Err(ConnectionError::Closed);
        }
        let receiver = if desk.handed.is_none() { desk.receiver.take() } else { None };
        let Some(mut receiver) = receiver else {
            desk.blocked += 1;
            drop(desk);
            let mut fds = [
                PollFd::from_borrowed_fd(self.sender.socket().as_fd(), PollFlags::OUT),
                PollFd::new(&self.leaderless, PollFlags::IN),
            ];
            let ready = wait_ready(&mut fds, deadline);
            let mut desk = self.desk();
            desk.blocked -= 1;
            if desk.blocked == 0 {
                let _ = rustix::io::read(&self.leaderless, &mut [0; 8]);
            }
            return ready;
        };
        drop(desk);
        let readable = receiver.has_more() || {
            let mut fds =
                [PollFd::from_borrowed_fd(receiver.socket().as_fd(), PollFlags::IN | PollFlags::OUT)];
            match wait_ready(&mut fds, deadline) {
                Ok(()) => !fds[0].revents().contains(PollFlags::OUT),
                Err(error) => {
                    let mut desk = self.desk();
                    desk.receiver = Some(receiver);
                    self.pass_on(&desk);
                    return Err(error);
                }
            }
        };
        let step = if readable { self.step(&mut receiver, None, deadline) } else { Ok(Step::Done) };
        let mut desk = self.desk();
        match step {
            Ok(Step::Hand(owner, header)) => self.hand(&mut desk, receiver, owner, header),
            Ok(_) => {
                desk.receiver = Some(receiver);
                self.pass_on(&desk);
            }
            Err(failure) => {
                desk.receiver = Some(receiver);
                if matches!(failure, Failure::Connection(ConnectionError::TimedOut)) {
                    self.pass_on(&desk);
                    return Err(ConnectionError::TimedOut);
                }
                self.lose(desk, failure);
                return Err(ConnectionError::Closed);
            }
        }
        Ok(())
    }

    /// Starts a thread that receives while no thread waits for a reply, for a server that accesses memory on its
    /// own over this socket. It ends with the connection.
    pub fn attend(self: &Arc<Exchange>) -> std::io::Result<()> {
        {
            let mut desk = self.desk();
            if desk.attended || desk.lost.is_some() {
                return Ok(());
            }
            desk.attended = true;
        }
        let exchange = Arc::clone(self);
        let started = std::thread::Builder::new().name("vfio-user-dma".into()).spawn(move || {
            exchange.attendant();
        });
        if started.is_err() {
            self.desk().attended = false;
        }
        started.map(drop)
    }

    fn attendant(&self) {
        let mut desk = self.desk();
        loop {
            if desk.lost.is_some() {
                return;
            }
            let receiver = if desk.handed.is_none() { desk.receiver.take() } else { None };
            let Some(mut receiver) = receiver else {
                desk = self.wakes[ATTENDANT].wait(desk).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(desk);
            let step = loop {
                match self.step(&mut receiver, None, Instant::now() + ATTENDANT_LIMIT) {
                    Ok(Step::Done) | Err(Failure::Connection(ConnectionError::TimedOut)) => {}
                    other => break other,
                }
            };
            desk = self.desk();
            match step {
                Ok(Step::Hand(owner, header)) => self.hand(&mut desk, receiver, owner, header),
                Ok(_) => desk.receiver = Some(receiver),
                Err(failure) => {
                    desk.receiver = Some(receiver);
                    self.lose(desk, failure);
                    return;
                }
            }
        }
    }
}

/// How long the attendant waits for a message at a time.
const ATTENDANT_LIMIT: Duration = Duration::from_secs(60);
