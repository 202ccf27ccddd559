//! Requests and replies of many threads on one socket (`vfio-user.rst: Command Concurrency`).
//!
//! A thread that waits for a reply while no other thread receives becomes the leader: it receives, and dispatches the
//! replies of the others. So a single caller sends once and receives once, without another thread and without an
//! allocation. A short reply to another thread is copied to its slot; for a long one the leader passes the receiver
//! itself to that thread, so that the data is received directly into its memory.
//!
//! A late reply must not be mistaken for another one: an id is not reused before its reply has arrived.

mod dispatcher;
mod meanwhile;
mod step;

use std::io::IoSlice;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use limosa_protocol::Errno;
use rustix::event::EventfdFlags;
use zerocopy::IntoBytes;

use dispatcher::{Dispatcher, SLOTS, SlotState};
use step::Step;

use super::dma::DmaTargets;
use crate::codec::{Command, Header, Kind};
use crate::connection::{ConnectionError, Fds, Receiver, Sender};

/// The most requests that may stay without a reply before the server is given up.
const ABANDONED_MAX: usize = 16;

/// The id of commands to which there is no reply; some servers send one to refuse.
const POSTED_ID: u16 = u16::MAX;

/// The time that a request, or several together, may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    pub duration: Duration,
    pub deadline: Instant,
}

impl Limit {
    /// So long from now on.
    pub fn from_now(duration: Duration) -> Limit {
        Limit { duration, deadline: Instant::now() + duration }
    }
}

/// Why a request failed.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    Refused(Errno),
    TimedOut(Duration),
    Connection(ConnectionError),
    Misbehaved(String),
    /// The fds of the reply exceed the limit of open files of this process.
    NoRoom,
}

impl From<ConnectionError> for Failure {
    fn from(error: ConnectionError) -> Failure {
        Failure::Connection(error)
    }
}

/// The contents of a reply.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// Bytes of the reply's body, including excess bytes.
    pub body_bytes: usize,
    /// Its fds.
    pub fds: Fds,
}

/// One request.
pub(super) struct Ask<'a> {
    pub command: Command,
    pub body: &'a [&'a [u8]],
    pub fds: &'a [BorrowedFd<'a>],
}

pub(super) struct Exchange {
    this: Weak<Exchange>,
    sender: Sender,
    dispatcher: Mutex<Dispatcher>,
    /// One for each slot, and one for the reader thread.
    wakes: [Condvar; SLOTS + 1],
    slot_freed: Condvar,
    /// Wakes threads that wait for space in the socket when the leader leaves.
    leaderless: OwnedFd,
    pub dma: DmaTargets,
}

const READER: usize = SLOTS;

impl Exchange {
    pub fn new(
        receiver: Receiver,
        sender: Sender,
        dma: DmaTargets,
    ) -> Result<Arc<Exchange>, ConnectionError> {
        let dispatcher = Dispatcher::new(receiver);
        let leaderless = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new_cyclic(|this| Exchange {
            this: Weak::clone(this),
            sender,
            dispatcher: Mutex::new(dispatcher),
            wakes: [const { Condvar::new() }; SLOTS + 1],
            slot_freed: Condvar::new(),
            leaderless,
            dma,
        }))
    }

    /// Ends the connection; every caller fails.
    pub fn shutdown(&self) {
        self.sender.shutdown();
    }

    /// Sends a request and receives the body of its reply into the buffers of `into` in order; excess bytes are
    /// dropped.
    pub fn call(&self, ask: &Ask<'_>, into: &mut [&mut [u8]], limit: Limit) -> Result<Answer, Failure> {
        let Limit { duration, deadline } = limit;
        let failed = |failure| match failure {
            Failure::Connection(ConnectionError::TimedOut) => Failure::TimedOut(duration),
            other => other,
        };
        let (slot, id) = self.take_slot(ask.command, deadline).map_err(failed)?;
        if let Err(error) = self.send(id, ask, false, deadline) {
            let mut dispatcher = self.dispatcher();
            self.free(&mut dispatcher, slot);
            self.pass_on(&dispatcher);
            return Err(failed(error.into()));
        }
        self.wait(slot, into, deadline).map_err(failed)
    }

    /// Sends a request to which there is no reply.
    pub fn post(&self, ask: &Ask<'_>, limit: Limit) -> Result<(), Failure> {
        if let Some(lost) = &self.dispatcher().lost {
            return Err(lost.clone());
        }
        self.send(POSTED_ID, ask, true, limit.deadline).map_err(|error| match error {
            ConnectionError::TimedOut => Failure::TimedOut(limit.duration),
            other => other.into(),
        })
    }

    fn send(&self, id: u16, ask: &Ask<'_>, posted: bool, deadline: Instant) -> Result<(), ConnectionError> {
        let bytes = ask.body.iter().map(|part| part.len()).sum();
        let mut header =
            Header::command(id, ask.command, bytes).ok_or(ConnectionError::Os(Errno::EMSGSIZE))?;
        if posted {
            header = header.posted();
        }
        let mut parts = [IoSlice::new(&[]); 4];
        parts[0] = IoSlice::new(header.as_bytes());
        for (part, bytes) in parts[1..].iter_mut().zip(ask.body) {
            *part = IoSlice::new(bytes);
        }
        let count = 1 + ask.body.len();
        self.sender.send_with(&mut parts[..count], ask.fds, || self.make_room(deadline))
    }

    fn dispatcher(&self) -> MutexGuard<'_, Dispatcher> {
        self.dispatcher.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_slot(&self, command: Command, deadline: Instant) -> Result<(usize, u16), Failure> {
        let mut dispatcher = self.dispatcher();
        loop {
            if let Some(lost) = &dispatcher.lost {
                return Err(lost.clone());
            }
            if dispatcher.abandoned >= ABANDONED_MAX {
                let many = format!("it left {ABANDONED_MAX} requests without a reply");
                return Err(self.lose(dispatcher, Failure::Misbehaved(many)));
            }
            if let Some(index) = dispatcher.slots.iter().position(|slot| slot.state == SlotState::Free) {
                dispatcher.taken += 1;
                let slot = &mut dispatcher.slots[index];
                slot.state = SlotState::Waiting;
                slot.command = command;
                // The lower bits are the slot; the others tell its requests apart.
                slot.id = slot.id.wrapping_add(SLOTS as u16);
                if usize::from(slot.id) / SLOTS == usize::from(POSTED_ID) / SLOTS {
                    slot.id = index as u16;
                }
                return Ok((index, slot.id));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ConnectionError::TimedOut.into());
            }
            dispatcher =
                self.slot_freed.wait_timeout(dispatcher, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn free(&self, dispatcher: &mut Dispatcher, slot: usize) {
        if dispatcher.taken == SLOTS {
            self.slot_freed.notify_one();
        }
        dispatcher.taken -= 1;
        dispatcher.slots[slot].state = SlotState::Free;
        dispatcher.handed.take_if(|handed| handed.0 == slot);
    }

    /// The caller no longer waits for this reply, but it may still arrive.
    fn abandon(&self, dispatcher: &mut Dispatcher, slot: usize) {
        dispatcher.slots[slot].state = SlotState::Abandoned;
        dispatcher.abandoned += 1;
        dispatcher.handed.take_if(|handed| handed.0 == slot);
    }

    /// The connection is no longer usable. All waiting threads get the reason.
    fn lose(&self, mut dispatcher: MutexGuard<'_, Dispatcher>, failure: Failure) -> Failure {
        let failure = dispatcher.lost.get_or_insert(failure).clone();
        drop(dispatcher);
        self.shutdown();
        for wake in &self.wakes {
            wake.notify_all();
        }
        self.slot_freed.notify_all();
        failure
    }

    /// If there is no leader, wakes a thread that becomes the leader.
    fn pass_on(&self, dispatcher: &Dispatcher) {
        if dispatcher.receiver.is_none() || dispatcher.handed.is_some() {
            return;
        }
        if dispatcher.has_reader {
            self.wakes[READER].notify_one();
        }
        if dispatcher.taken > dispatcher.abandoned {
            // A thread that is still sending checks by itself afterwards.
            if let Some(next) = dispatcher.slots.iter().position(|slot| slot.state == SlotState::Waiting) {
                self.wakes[next].notify_one();
            }
        }
        if dispatcher.blocked > 0 {
            // A counter that is full is readable already.
            let _ = rustix::io::write(&self.leaderless, &1u64.to_ne_bytes());
        }
    }

    /// Waits for the reply of a slot, as follower or as leader.
    fn wait(&self, slot: usize, into: &mut [&mut [u8]], deadline: Instant) -> Result<Answer, Failure> {
        let mut dispatcher = self.dispatcher();
        loop {
            if dispatcher.slots[slot].state == SlotState::Answered {
                let (reply, copy) = (dispatcher.slots[slot].reply, dispatcher.slots[slot].copy);
                self.free(&mut dispatcher, slot);
                self.pass_on(&dispatcher);
                drop(dispatcher);
                return answer_from(&reply, &copy, into);
            }
            match dispatcher.handed {
                Some((owner, header)) if owner == slot && dispatcher.receiver.is_some() => {
                    dispatcher.handed = None;
                    let receiver = dispatcher.receiver.take().expect("just looked");
                    drop(dispatcher);
                    return self.take_reply(receiver, slot, &header, into, deadline);
                }
                _ => {}
            }
            if let Some(lost) = dispatcher.lost.clone() {
                self.free(&mut dispatcher, slot);
                return Err(lost);
            }
            if dispatcher.handed.is_none()
                && let Some(mut receiver) = dispatcher.receiver.take()
            {
                drop(dispatcher);
                let step = loop {
                    match self.step(&mut receiver, Some(slot), deadline) {
                        Ok(Step::Done) if Instant::now() >= deadline => {
                            break Err(Failure::Connection(ConnectionError::TimedOut));
                        }
                        Ok(Step::Done) => {}
                        Ok(step) => break Ok(step),
                        Err(failure) => break Err(failure),
                    }
                };
                match step {
                    Ok(Step::OwnReply(header)) => {
                        return self.take_reply(receiver, slot, &header, into, deadline);
                    }
                    Ok(Step::OtherReply(owner, header)) => {
                        dispatcher = self.dispatcher();
                        self.dispatch(&mut dispatcher, receiver, owner, header);
                    }
                    Ok(Step::Done) => unreachable!("the loop goes on"),
                    Err(failure) => {
                        let mut dispatcher = self.dispatcher();
                        dispatcher.receiver = Some(receiver);
                        if matches!(failure, Failure::Connection(ConnectionError::TimedOut)) {
                            self.abandon(&mut dispatcher, slot);
                            self.pass_on(&dispatcher);
                            return Err(failure);
                        }
                        self.free(&mut dispatcher, slot);
                        return Err(self.lose(dispatcher, failure));
                    }
                }
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.abandon(&mut dispatcher, slot);
                self.pass_on(&dispatcher);
                return Err(ConnectionError::TimedOut.into());
            }
            dispatcher =
                self.wakes[slot].wait_timeout(dispatcher, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Passes the receiver to the owner of the reply that it has received.
    fn dispatch(&self, dispatcher: &mut Dispatcher, receiver: Box<Receiver>, owner: usize, header: Header) {
        dispatcher.receiver = Some(receiver);
        let slot = &dispatcher.slots[owner];
        match slot.state {
            SlotState::Waiting if slot.id == header.id => {
                dispatcher.handed = Some((owner, header));
                self.wakes[owner].notify_all();
            }
            SlotState::Abandoned if slot.id == header.id => {
                dispatcher.abandoned -= 1;
                self.free(dispatcher, owner);
            }
            _ => {}
        }
    }

    /// Receives the body of the caller's own reply, whose header has been received.
    fn take_reply(
        &self,
        mut receiver: Box<Receiver>,
        slot: usize,
        header: &Header,
        into: &mut [&mut [u8]],
        deadline: Instant,
    ) -> Result<Answer, Failure> {
        let taken = take_body(&mut receiver, header, into, deadline);
        let mut dispatcher = self.dispatcher();
        dispatcher.receiver = Some(receiver);
        self.free(&mut dispatcher, slot);
        match taken {
            Err(Failure::Connection(error)) if error != ConnectionError::TimedOut => {
                Err(self.lose(dispatcher, error.into()))
            }
            taken => {
                self.pass_on(&dispatcher);
                taken
            }
        }
    }
}

/// Receives a reply's body and fds.
fn take_body(
    receiver: &mut Receiver,
    header: &Header,
    into: &mut [&mut [u8]],
    deadline: Instant,
) -> Result<Answer, Failure> {
    if let Ok(Kind::Refusal(errno)) = header.kind() {
        return Err(Failure::Refused(errno));
    }
    let body_bytes = receiver.body_left();
    for part in into.iter_mut() {
        if receiver.body_left() == 0 {
            break;
        }
        if part.len() <= Receiver::BUFFER_BYTES {
            receiver.head(part.len(), Some(deadline))?;
        }
        receiver.read(part, Some(deadline))?;
    }
    let fds = match receiver.has_fds() {
        true => receiver.fds(),
        false => Fds::default(),
    };
    if fds.lost {
        return Err(Failure::NoRoom);
    }
    Ok(Answer { body_bytes, fds })
}

/// The same from a copy.
fn answer_from(header: &Header, mut body: &[u8], into: &mut [&mut [u8]]) -> Result<Answer, Failure> {
    if let Ok(Kind::Refusal(errno)) = header.kind() {
        return Err(Failure::Refused(errno));
    }
    let body_bytes = header.body_bytes().unwrap_or(0);
    body = &body[..body_bytes.min(body.len())];
    for part in into.iter_mut() {
        let bytes = part.len().min(body.len());
        part[..bytes].copy_from_slice(&body[..bytes]);
        body = &body[bytes..];
    }
    Ok(Answer { body_bytes, fds: Fds::default() })
}
