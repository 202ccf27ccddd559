//! The client's memory, accessed by messages (`vfio-user.rst: VFIO_USER_DMA_READ, VFIO_USER_DMA_WRITE`), on the
//! connection's own socket or on the twin socket.
//!
//! Any thread of a model may call, including a thread that is serving a request. Every exchange has a time limit,
//! shorter than that of clients that answer only after they have got a reply (QEMU waits 5 s, with the lock that it
//! would need to answer): then the exchange fails, the request is answered, and the connection survives. The late
//! answer is dropped.

use std::io::IoSlice;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use limosa_device::{Dma, RemoteMemory};
use limosa_foreign_fd::Foreign;
use limosa_protocol::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::handover::Received;
use super::link::{Link, Mine, Pumped, Shared, TOO_MUCH};
use crate::codec::{Command, DmaAccess, DmaWriteReply, Header, Kind};
use crate::connection::{self, ConnectionError, Receiver, Sender, Waits};

/// The data of one DMA message.
struct Transfer<'a> {
    command: Command,
    access: DmaAccess,
    /// Of a write.
    data: &'a [u8],
    /// Of a read.
    into: Option<&'a mut [u8]>,
}

/// One pending DMA message on the connection's own socket.
pub(super) struct Exchange {
    id: u16,
    command: Command,
    access: DmaAccess,
    done: Option<Result<(), Errno>>,
    /// The data read, if another thread received it.
    data: Vec<u8>,
}

/// The memory behind mappings without an fd.
pub(super) struct ClientMemory {
    pub(super) link: Arc<Link>,
    /// Limit on the bytes of one message.
    pub(super) bytes_max: usize,
}

impl RemoteMemory for ClientMemory {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let mut address = iova;
        for piece in data.chunks_mut(self.bytes_max) {
            let count = piece.len() as u64;
            let access = DmaAccess { address, count };
            let (command, data, into) = (Command::DMA_READ, &[][..], Some(piece));
            self.exchange(Transfer { command, access, data, into })?;
            address = address.wrapping_add(count);
        }
        Ok(())
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let mut address = iova;
        for piece in data.chunks(self.bytes_max) {
            let count = piece.len() as u64;
            let access = DmaAccess { address, count };
            self.exchange(Transfer { command: Command::DMA_WRITE, access, data: piece, into: None })?;
            address = address.wrapping_add(count);
        }
        Ok(())
    }
}

impl ClientMemory {
    /// Pages of one [`echo`].
    pub(super) const ECHO_MAX: usize = 4096;

    fn exchange(&self, transfer: Transfer<'_>) -> Result<(), Errno> {
        let (command, access) = (transfer.command, transfer.access);
        if self.link.foreign_dma.load(Relaxed) {
            if !self.link.foreign_dma_said.swap(true, Relaxed) {
                tracing::error!(
                    %command, iova = access.address,
                    "the device needs guest memory that QEMU does not share, and QEMU's DMA messages are not those of the \
                     specification: give the VM shared memory (-object memory-backend-memfd,id=m,size=SIZE,share=on \
                     -machine memory-backend=m)"
                );
            }
            return Err(Errno::ENOTSUP);
        }
        match self.link.twin.get() {
            Some(twin) => twin.exchange(transfer, self.link.dma_limit),
            None => self.link.exchange(transfer),
        }
        .inspect_err(
            |errno| tracing::warn!(%command, iova = access.address, bytes = access.count, %errno, "DMA failed"),
        )
    }
}

/// Writes one byte at each of these addresses again, with its current value, through the client, whose dirty log
/// then has them. All but the last are posted, and the reply to the last means that all are done. Memory that only the
/// client can access is left out: the device's writes there are already in the client's log.
pub(super) fn echo(link: &Link, memory: &Dma, addresses: &[u64], until: Instant) -> Result<(), Errno> {
    let mut bytes = Vec::with_capacity(addresses.len());
    for &address in addresses {
        let mut byte = [0];
        match memory.read(address, &mut byte) {
            Ok(()) => bytes.push((address, byte)),
            Err(Errno::ENOTSUP) => {}
            Err(errno) => return Err(errno),
        }
    }
    let Some((last, posted)) = bytes.split_last() else { return Ok(()) };
    let access = |address| DmaAccess { address, count: 1 };
    for (address, byte) in posted {
        let transfer =
            Transfer { command: Command::DMA_WRITE, access: access(*address), data: byte, into: None };
        match link.twin.get() {
            Some(twin) => twin.exchange(transfer, link.dma_limit)?,
            None => transfer.send_as(0, Header::NO_REPLY, link, |pieces| link.send_by(pieces, until))?,
        }
    }
    let (address, byte) = last;
    let transfer = Transfer { command: Command::DMA_WRITE, access: access(*address), data: byte, into: None };
    match link.twin.get() {
        Some(twin) => twin.exchange(transfer, link.dma_limit),
        None => link.exchange(transfer),
    }
}

impl Link {
    fn exchange(&self, transfer: Transfer<'_>) -> Result<(), Errno> {
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
            shared.open_exchange(transfer.command, transfer.access)
        };
        let sent = transfer.send_as(id, 0, self, |pieces| self.send_by(pieces, until));
        let outcome = sent.and_then(|()| self.outcome(Mine { id, data: transfer.into }, until));
        let mut shared = self.lock();
        shared.exchanges.retain(|exchange| exchange.id != id);
        shared.gave_up |= within_request && outcome == Err(Errno::ETIMEDOUT);
        outcome
    }

    /// Waits for the reply, as the leader if there is no other.
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
                Ok(Pumped::Nothing) | Err(ConnectionError::TimedOut) => return Err(Errno::ETIMEDOUT),
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
        mine: Option<&mut Mine<'_>>,
        deadline: Option<Instant>,
    ) -> Result<Option<Result<(), Errno>>, ConnectionError> {
        let access = self
            .lock()
            .exchanges
            .iter()
            .find(|e| e.id == header.id && e.command == header.command)
            .map(|e| e.access);
        let Some(access) = access else {
            tracing::warn!(id = header.id, command = %header.command, "an unexpected reply");
            return Ok(None);
        };
        if let Some(mine) = mine
            && mine.id == header.id
        {
            return receive_reply(receiver, header, access, mine.data.as_deref_mut(), deadline).map(Some);
        }
        // Bounded by the limit for one message.
        let mut data = vec![0; if header.command == Command::DMA_READ { access.count as usize } else { 0 }];
        let outcome = receive_reply(receiver, header, access, Some(&mut data), deadline)?;
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
    sender: Sender,
    inner: Mutex<TwinInner>,
}

pub(super) struct TwinInner {
    pub(super) receiver: Receiver,
    next_id: u16,
}

impl Twin {
    pub(super) fn new(socket: Foreign<UnixStream>, message_limit: Duration) -> Result<Twin, ConnectionError> {
        let waits = Waits::new(message_limit, message_limit);
        let (receiver, sender) = connection::split(socket, waits)?;
        Ok(Twin { sender, inner: Mutex::new(TwinInner { receiver, next_id: 0 }) })
    }

    /// A twin socket from another process: its last id, and the bytes received beyond the last message.
    pub(super) fn import(
        socket: Foreign<UnixStream>,
        message_limit: Duration,
        next_id: u16,
        (bytes, fds): Received,
    ) -> Result<Twin, ConnectionError> {
        let twin = Twin::new(socket, message_limit)?;
        let TwinInner { receiver, .. } = twin.inner.into_inner().unwrap_or_else(PoisonError::into_inner);
        let receiver = receiver.import(&bytes, fds).ok_or(TOO_MUCH)?;
        Ok(Twin { inner: Mutex::new(TwinInner { receiver, next_id }), ..twin })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, TwinInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn next_id(&self) -> u16 {
        self.lock().next_id
    }

    pub(super) fn socket(&self) -> &UnixStream {
        self.sender.socket()
    }

    /// Every wait on it ends.
    pub(super) fn end(&self) {
        self.sender.shutdown();
    }

    fn exchange(&self, transfer: Transfer<'_>, limit: Duration) -> Result<(), Errno> {
        let mut inner = self.lock();
        inner.exchange(&self.sender, transfer, Instant::now() + limit).unwrap_or_else(|end| {
            tracing::debug!(%end, "the twin socket is over");
            self.end();
            Err(Errno::ECONNRESET)
        })
    }
}

impl TwinInner {
    fn exchange(
        &mut self,
        sender: &Sender,
        transfer: Transfer<'_>,
        until: Instant,
    ) -> Result<Result<(), Errno>, ConnectionError> {
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        match transfer.send(id, |pieces| sender.send_by(pieces, &[], until)) {
            Err(ConnectionError::TimedOut) => return Ok(Err(Errno::ETIMEDOUT)),
            sent => sent?,
        }
        loop {
            let Some(header) = self.receiver.next_until(until)? else {
                return Ok(Err(Errno::ETIMEDOUT));
            };
            let mine = header.id == id && header.command == transfer.command;
            if mine && matches!(header.kind(), Ok(Kind::Reply | Kind::Refusal(_))) {
                let (access, into) = (transfer.access, transfer.into);
                return match receive_reply(&mut self.receiver, header, access, into, Some(until)) {
                    Err(ConnectionError::TimedOut) => Ok(Err(Errno::ETIMEDOUT)),
                    received => received,
                };
            }
            // The late answer to an exchange that was given up, or nonsense.
            tracing::warn!(id = header.id, command = %header.command, "not the reply that is waited for");
        }
    }
}

impl Transfer<'_> {
    /// In this client's layout: QEMU's count has 32 bits.
    fn send_as<T>(&self, id: u16, flags: u32, link: &Link, send: impl FnOnce(&mut [IoSlice<'_>]) -> T) -> T {
        let mut fixed = [0; size_of::<DmaAccess>()];
        fixed.copy_from_slice(self.access.as_bytes());
        let mut bytes = fixed.len();
        if link.foreign_dma.load(Relaxed) {
            // At most 4 GiB are in one message.
            let count = self.access.count as u32;
            fixed[8..12].copy_from_slice(&count.to_ne_bytes());
            bytes = 12;
        }
        let header = Header::command(id, self.command, bytes + self.data.len())
            .expect("a message carries at most DATA_XFER_BYTES_MAX");
        let header = Header { flags: header.flags | flags, ..header };
        send(&mut [IoSlice::new(header.as_bytes()), IoSlice::new(&fixed[..bytes]), IoSlice::new(self.data)])
    }

    fn send<T>(&self, id: u16, send: impl FnOnce(&mut [IoSlice<'_>]) -> T) -> T {
        let header = Header::command(id, self.command, size_of::<DmaAccess>() + self.data.len())
            .expect("a message carries at most DATA_XFER_BYTES_MAX");
        send(&mut [
            IoSlice::new(header.as_bytes()),
            IoSlice::new(self.access.as_bytes()),
            IoSlice::new(self.data),
        ])
    }
}

/// Receives a reply and returns the result of the exchange. An invalid reply fails only its exchange: the stream
/// stays in sync, also if the deadline comes first.
fn receive_reply(
    receiver: &mut Receiver,
    header: Header,
    access: DmaAccess,
    into: Option<&mut [u8]>,
    deadline: Option<Instant>,
) -> Result<Result<(), Errno>, ConnectionError> {
    let mut fixed = [0; size_of::<DmaAccess>()];
    let outcome = match (header.kind(), header.command) {
        (Ok(Kind::Refusal(errno)), _) => Err(errno),
        (Ok(Kind::Reply), Command::DMA_READ) => {
            let into = into.unwrap_or_default();
            if receiver.body_left() == fixed.len() + into.len() {
                receiver.read(&mut fixed, deadline)?;
                receiver.read(into, deadline)?;
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
            let bytes = receiver.read(&mut fixed, deadline)?;
            match DmaWriteReply::decode(&fixed[..bytes]) {
                Ok(answer) if receiver.body_left() == 0 && answer == access => Ok(()),
                _ => Err(Errno::EPROTO),
            }
        }
        _ => Err(Errno::EPROTO),
    };
    receiver.skip(deadline)?;
    Ok(outcome)
}
