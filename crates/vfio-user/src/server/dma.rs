//! The client's memory, reached by messages (`vfio-user.rst: VFIO_USER_DMA_READ,
//! VFIO_USER_DMA_WRITE`), on the connection's own socket or on the twin socket.
//!
//! Any thread of a model may call, also the one that serves a request, within it. Every exchange
//! has a time limit, shorter than the patience of clients that answer only after the reply which
//! they wait for (QEMU waits 5 s, holding what it would need to answer): then the exchange fails,
//! the request is replied to, and the connection lives on. The late answer is dropped.

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use limosa_device::RemoteMemory;
use limosa_protocol::Errno;
use rustix::net::{Shutdown, shutdown};
use zerocopy::{FromBytes, IntoBytes};

use super::link::{LIMIT_MIN, Link, Mine, Pumped, Shared, send_all};
use super::receive::{End, Receiver, Wait};
use crate::codec::{Command, DmaAccess, DmaWriteReply, Header, Kind};

/// One DMA message under way on the connection's own socket.
pub(super) struct Exchange {
    id: u16,
    command: Command,
    access: DmaAccess,
    done: Option<Result<(), Errno>>,
    /// What was read, when another thread received it.
    data: Vec<u8>,
}

/// The memory behind mappings without an fd.
pub(super) struct ClientMemory {
    pub(super) link: Arc<Link>,
    /// The most bytes that one message may carry.
    pub(super) bytes_max: usize,
}

impl RemoteMemory for ClientMemory {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let mut address = iova;
        for piece in data.chunks_mut(self.bytes_max) {
            let count = piece.len() as u64;
            self.exchange(Command::DMA_READ, DmaAccess { address, count }, &[], Some(piece))?;
            address = address.wrapping_add(count);
        }
        Ok(())
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let mut address = iova;
        for piece in data.chunks(self.bytes_max) {
            let count = piece.len() as u64;
            self.exchange(Command::DMA_WRITE, DmaAccess { address, count }, piece, None)?;
            address = address.wrapping_add(count);
        }
        Ok(())
    }
}

impl ClientMemory {
    fn exchange(
        &self,
        command: Command,
        access: DmaAccess,
        data: &[u8],
        into: Option<&mut [u8]>,
    ) -> Result<(), Errno> {
        match self.link.twin.get() {
            Some(twin) => twin.exchange(command, access, data, into, self.link.dma_limit),
            None => self.link.exchange(command, access, data, into),
        }
        .inspect_err(
            |errno| tracing::warn!(%command, iova = access.address, bytes = access.count, %errno, "DMA failed"),
        )
    }
}

impl Link {
    fn exchange(
        &self,
        command: Command,
        access: DmaAccess,
        data: &[u8],
        into: Option<&mut [u8]>,
    ) -> Result<(), Errno> {
        let within_request = std::thread::current().id() == self.serving;
        let until = Instant::now() + self.dma_limit;
        let id = {
            let mut shared = self.lock();
            if shared.over {
                return Err(Errno::ECONNRESET);
            }
            if within_request && shared.gave_up {
                return Err(Errno::ETIMEDOUT);
            }
            shared.open_exchange(command, access)
        };
        let sent = send_message(id, command, access, data, |pieces| self.sender().send_pieces(pieces, &[]));
        let outcome = match sent {
            Ok(()) => self.outcome(Mine { id, data: into }, until),
            Err(_) => Err(Errno::ECONNRESET),
        };
        let mut shared = self.lock();
        shared.exchanges.retain(|exchange| exchange.id != id);
        shared.gave_up |= within_request && outcome == Err(Errno::ETIMEDOUT);
        outcome
    }

    /// Waits for the reply, leading when nobody else does.
    fn outcome(&self, mut mine: Mine<'_>, until: Instant) -> Result<(), Errno> {
        let mut shared = self.lock();
        loop {
            if let Some(exchange) = shared.exchanges.iter_mut().find(|exchange| exchange.id == mine.id)
                && let Some(outcome) = exchange.done.take()
            {
                if let (Ok(()), Some(into)) = (outcome, mine.data) {
                    into.copy_from_slice(&exchange.data);
                }
                return outcome;
            }
            if shared.over {
                return Err(Errno::ECONNRESET);
            }
            let Some(mut receiver) = shared.receiver.take() else {
                let (again, in_time) = self.wait(shared, Some(until));
                if !in_time {
                    return Err(Errno::ETIMEDOUT);
                }
                shared = again;
                continue;
            };
            drop(shared);
            let pumped = self.pump(&mut receiver, until, &mut mine);
            self.give_back(receiver);
            match pumped {
                Ok(Pumped::Mine(outcome)) => return outcome,
                Ok(Pumped::Other) => {}
                Ok(Pumped::Nothing) => return Err(Errno::ETIMEDOUT),
                Ok(Pumped::Full) => return Err(Errno::ENOMEM),
                Err(end) => {
                    tracing::debug!(%end, "connection over while waiting for DMA");
                    self.end();
                    return Err(Errno::ECONNRESET);
                }
            }
            shared = self.lock();
        }
    }

    /// Receives the rest of a reply for the exchange that it belongs to, and returns the outcome
    /// when that is the caller's own.
    pub(super) fn hand_over(
        &self,
        receiver: &mut Receiver,
        header: Header,
        body_bytes: usize,
        mine: Option<&mut Mine<'_>>,
    ) -> Result<Option<Result<(), Errno>>, End> {
        let access = self
            .lock()
            .exchanges
            .iter()
            .find(|e| e.id == header.id && e.command == header.command)
            .map(|e| e.access);
        let Some(access) = access else {
            tracing::warn!(id = header.id, command = %header.command, "a reply that nobody waits for");
            receiver.drop_body(self.socket(), body_bytes)?;
            return Ok(None);
        };
        let socket = self.socket();
        if let Some(mine) = mine
            && mine.id == header.id
        {
            return receive_reply(receiver, socket, header, body_bytes, access, mine.data.as_deref_mut())
                .map(Some);
        }
        // Bounded by what one message may carry.
        let mut data = vec![0; if header.command == Command::DMA_READ { access.count as usize } else { 0 }];
        let outcome = receive_reply(receiver, socket, header, body_bytes, access, Some(&mut data))?;
        let mut shared = self.lock();
        // It may have given up by now.
        if let Some(exchange) = shared.exchanges.iter_mut().find(|e| e.id == header.id) {
            exchange.data = data;
            exchange.done = Some(outcome);
            self.turn.notify_all();
        }
        Ok(None)
    }
}

impl Shared {
    /// Notes an exchange under an id that no other has.
    fn open_exchange(&mut self, command: Command, access: DmaAccess) -> u16 {
        loop {
            self.next_id = self.next_id.wrapping_add(1);
            let id = self.next_id;
            if !self.exchanges.iter().any(|exchange| exchange.id == id) {
                self.exchanges.push(Exchange { id, command, access, done: None, data: Vec::new() });
                return id;
            }
        }
    }
}

/// The twin socket: its exchanges go one after the other.
pub(super) struct Twin {
    socket: UnixStream,
    inner: Mutex<TwinInner>,
}

struct TwinInner {
    receiver: Receiver,
    next_id: u16,
}

impl Twin {
    pub(super) fn new(socket: UnixStream, message_limit: Duration) -> std::io::Result<Twin> {
        let message_limit = message_limit.max(LIMIT_MIN);
        socket.set_write_timeout(Some(message_limit))?;
        let inner = TwinInner { receiver: Receiver::new(message_limit), next_id: 0 };
        Ok(Twin { socket, inner: Mutex::new(inner) })
    }

    /// Every wait on it ends.
    pub(super) fn end(&self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    fn exchange(
        &self,
        command: Command,
        access: DmaAccess,
        data: &[u8],
        into: Option<&mut [u8]>,
        limit: Duration,
    ) -> Result<(), Errno> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.exchange(&self.socket, command, access, data, into, Instant::now() + limit).unwrap_or_else(
            |end| {
                tracing::debug!(%end, "the twin socket is over");
                self.end();
                Err(Errno::ECONNRESET)
            },
        )
    }
}

impl TwinInner {
    fn exchange(
        &mut self,
        socket: &UnixStream,
        command: Command,
        access: DmaAccess,
        data: &[u8],
        into: Option<&mut [u8]>,
        until: Instant,
    ) -> Result<Result<(), Errno>, End> {
        let socket = socket.as_fd();
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        send_message(id, command, access, data, |pieces| send_all(socket, pieces, &[]))?;
        loop {
            let Some(header) = self.receiver.header(socket, Wait::Until(until))? else {
                return Ok(Err(Errno::ETIMEDOUT));
            };
            let body_bytes = header.body_bytes().unwrap_or(0);
            let mine = header.id == id && header.command == command;
            if mine && matches!(header.kind(), Ok(Kind::Reply | Kind::Refusal(_))) {
                let outcome = receive_reply(&mut self.receiver, socket, header, body_bytes, access, into)?;
                self.receiver.finish();
                return Ok(outcome);
            }
            // The late answer to an exchange that was given up, or nonsense.
            tracing::warn!(id = header.id, command = %header.command, "not the reply that is waited for");
            self.receiver.drop_body(socket, body_bytes)?;
            self.receiver.finish();
        }
    }
}

fn send_message(
    id: u16,
    command: Command,
    access: DmaAccess,
    data: &[u8],
    send: impl FnOnce(&mut [IoSlice<'_>]) -> Result<(), End>,
) -> Result<(), End> {
    let header = Header::command(id, command, size_of::<DmaAccess>() + data.len())
        .ok_or(End::Failed(Errno::EMSGSIZE))?;
    send(&mut [IoSlice::new(header.as_bytes()), IoSlice::new(access.as_bytes()), IoSlice::new(data)])
}

/// Receives the body of a reply and says how the exchange went. What is wrong with a reply fails
/// its exchange only: the stream stays in step.
fn receive_reply(
    receiver: &mut Receiver,
    socket: std::os::fd::BorrowedFd<'_>,
    header: Header,
    body_bytes: usize,
    access: DmaAccess,
    into: Option<&mut [u8]>,
) -> Result<Result<(), Errno>, End> {
    let mut left = body_bytes;
    let outcome = match (header.kind(), header.command) {
        (Ok(Kind::Refusal(errno)), _) => Err(errno),
        (Ok(Kind::Reply), Command::DMA_READ) => {
            let mut fixed = [0; size_of::<DmaAccess>()];
            let into = into.unwrap_or_default();
            if body_bytes == fixed.len() + into.len() {
                receiver.body(socket, &mut fixed)?;
                receiver.body(socket, into)?;
                left = 0;
                match DmaAccess::read_from_bytes(&fixed) {
                    Ok(answer) if answer == access => Ok(()),
                    _ => Err(Errno::EPROTO),
                }
            } else {
                Err(Errno::EPROTO)
            }
        }
        (Ok(Kind::Reply), _) => {
            // 12 bytes by the specification, 16 from libvfio-user's clients.
            let mut answer = [0; size_of::<DmaAccess>()];
            let bytes = body_bytes.min(answer.len());
            receiver.body(socket, &mut answer[..bytes])?;
            left -= bytes;
            match DmaWriteReply::decode(&answer[..bytes]) {
                Ok(answer) if left == 0 && answer == access => Ok(()),
                _ => Err(Errno::EPROTO),
            }
        }
        _ => Err(Errno::EPROTO),
    };
    receiver.drop_body(socket, left)?;
    Ok(outcome)
}
