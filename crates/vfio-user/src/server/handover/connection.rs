//! A connection on its way to another process.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

use limosa_device::Machine;
use limosa_foreign_fd::{Foreign, ForeignFd};
use limosa_switch_over::{ITEM_BYTES_MAX, Item, Refusal};
use zerocopy::{FromBytes, IntoBytes};

use super::LaterMemory;
use super::record::{self, broken, copy, encode, encode_with, kind};
use crate::codec::Header;
use crate::connection::{ConnectionError, Fds};
use crate::server::connection::Connection;
use crate::server::doors::{ConnectionId, Doors, State};
use crate::server::link::{Fits, Link, Queued};
use crate::server::parked::Access;
use crate::server::{Options, link};
use crate::version::Limits;

/// Bytes and fds that were received, as [`crate::connection::Receiver::export`] has them.
pub(in crate::server) type Received = (Vec<u8>, Vec<(u64, Option<ForeignFd>)>);

/// A connection that another process has served.
pub(in crate::server) struct Adopted {
    id: u64,
    /// Its id here, once it is served.
    pub(in crate::server) place: Option<ConnectionId>,
    socket: Foreign<UnixStream>,
    twin: Option<(Foreign<UnixStream>, u16)>,
    state: State,
    foreign_dma: bool,
    next_id: u16,
    received: Received,
    twin_received: Received,
    /// Reply bytes for which the client's socket had no space.
    unsent: Vec<u8>,
    queue: Vec<Queued>,
    memory: Option<Arc<LaterMemory>>,
}

/// The sockets of connections that were handed over while the device runs. Nothing is read from them until the
/// device runs in its new process.
#[derive(Debug, Default)]
pub(super) struct GivenSockets {
    /// For each connection how many: the socket, and the twin if there was one.
    given: HashMap<ConnectionId, usize>,
}

impl GivenSockets {
    /// The sockets of connections that were not handed over yet.
    pub(super) fn more(&mut self, device: u16, doors: &Doors) -> Result<Vec<Item>, Refusal> {
        let mut items = Vec::new();
        for (id, link) in doors.to_be_given() {
            if let Entry::Vacant(vacant) = self.given.entry(id) {
                let sockets = sockets(&link)?;
                vacant.insert(sockets.len());
                items.push(Item::new(kind::SOCKETS, device, id.0.to_ne_bytes().to_vec()).with_fds(sockets));
            }
        }
        Ok(items)
    }

    /// The sockets of this connection that still have to be handed over.
    fn left(&self, id: ConnectionId, link: &Link) -> Result<Vec<ForeignFd>, Refusal> {
        let given = self.given.get(&id).copied().unwrap_or(0);
        match given == 1 + usize::from(link.twin.get().is_some()) {
            true => Ok(Vec::new()),
            false => Ok(sockets(link)?.split_off(given)),
        }
    }
}

/// The socket, and the twin if there is one.
fn sockets(link: &Link) -> Result<Vec<ForeignFd>, Refusal> {
    let mut fds = vec![copy(link.socket())?];
    if let Some(twin) = link.twin.get() {
        fds.push(copy(twin.socket())?);
    }
    Ok(fds)
}

/// Threads that will serve connections once this process serves: clients do not wait for threads to start.
#[derive(Debug, Default)]
pub(super) struct Threads(HashMap<u64, (Sender<Adopted>, JoinHandle<()>)>);

impl Threads {
    /// Starts a thread. If that fails, the server starts one later.
    pub(super) fn make(
        &mut self,
        id: u64,
        machine: &Arc<Machine>,
        options: &Options,
        doors: &Arc<Doors>,
        device: tracing::Span,
    ) {
        let (tell, told) = mpsc::channel::<Adopted>();
        let (machine, options, doors) = (Arc::clone(machine), options.clone(), Arc::clone(doors));
        let serve = move || {
            // It ends without a message if the other process continues.
            let Ok(adopted) = told.recv() else { return };
            let _device = device.entered();
            match adopted.connection(&machine, &options, &doors) {
                Ok(mut connection) => _ = connection.serve(),
                Err(error) => tracing::warn!(%error, "a connection could not be set up"),
            }
        };
        match std::thread::Builder::new().name("vfio-user".into()).spawn(serve) {
            Ok(thread) => _ = self.0.insert(id, (tell, thread)),
            Err(error) => tracing::debug!(%error, "no thread for a connection in advance"),
        }
    }

    /// Starts serving the connections. Returns the serving threads, and the connections without a thread.
    pub(super) fn serve(
        mut self,
        mut adopted: Vec<Adopted>,
        doors: &Doors,
    ) -> (Vec<JoinHandle<()>>, Vec<Adopted>) {
        for adopted in &mut adopted {
            adopted.place = Some(doors.expect_adopted(adopted.is_vmms()));
        }
        let (mut serving, mut left) = (Vec::with_capacity(adopted.len()), Vec::new());
        for adopted in adopted {
            match self.0.remove(&adopted.id) {
                Some((tell, thread)) => {
                    // It waits for this.
                    let _ = tell.send(adopted);
                    serving.push(thread);
                }
                None => left.push(adopted),
            }
        }
        (serving, left)
    }
}

/// The sockets that arrived while the old device ran, by connection.
#[derive(Debug, Default)]
pub(super) struct CameSockets(HashMap<u64, Vec<ForeignFd>>);

impl CameSockets {
    /// SOCKETS; the connection's number.
    pub(super) fn add(&mut self, item: Item) -> Result<u64, Refusal> {
        let wrong = |what: &str| broken(item.kind, item.device, &what);
        let id = <[u8; 8]>::try_from(item.bytes.as_slice()).map(u64::from_ne_bytes);
        let id = id.map_err(|_| wrong("it names no connection"))?;
        match self.0.insert(id, item.fds) {
            None => Ok(id),
            Some(_) => Err(wrong("it names a connection for the second time")),
        }
    }
}

pub(super) fn export(
    device: u16,
    id: ConnectionId,
    link: &Link,
    state: &State,
    given: &GivenSockets,
) -> Result<Vec<Item>, Refusal> {
    let mut items = Vec::new();
    let shared = link.lock();
    let head = record::Connection {
        id: id.0,
        limits: state.limits,
        by_control_door: state.by_control_door,
        foreign_dma: link.foreign_dma.load(std::sync::atomic::Ordering::Relaxed),
        next_id: shared.next_id,
        twin_next_id: link.twin.get().map(|twin| twin.next_id()),
    };
    items.push(encode(kind::CONNECTION, device, &head)?.with_fds(given.left(id, link)?));
    let receiver = shared.receiver.as_ref().ok_or_else(|| {
        Refusal::of_device(device, "its memory is being read by messages; try again when that is done")
    })?;
    let (bytes, fds) = receiver.export();
    items.push(received(device, false, bytes, fds)?);
    if let Some(twin) = link.twin.get() {
        let twin = twin.lock();
        let (bytes, fds) = twin.receiver.export();
        items.push(received(device, true, bytes, fds)?);
    }
    let unsent = link.unsent().filter(|bytes| bytes.len() <= ITEM_BYTES_MAX).ok_or_else(|| {
        let what = "a client takes no replies while its memory is reached by messages, or takes none of more than 16 MiB; try \
                    again once it does";
        Refusal::of_device(device, what)
    })?;
    if !unsent.is_empty() {
        items.push(Item::new(kind::UNSENT, device, unsent));
    }
    if !state.unanswered.is_empty() {
        let (header, body) = state.unanswered.split_at(Header::BYTES);
        items.push(message(kind::QUEUED, device, header, body, (false, 0), 0)?);
    }
    for queued in &shared.queue {
        let how = (queued.fds.truncated, fits_number(queued.fits));
        let item = message(kind::QUEUED, device, queued.header.as_bytes(), &queued.body, how, 0)?;
        let fds = queued.fds.fds.iter().map(|fd| copy(fd.as_fd())).collect::<Result<Vec<_>, _>>()?;
        items.push(item.with_fds(fds));
    }
    for access in &state.parked {
        let Access { header, body, writes_done } = access;
        items.push(message(kind::PARKED, device, header.as_bytes(), body, (false, 0), *writes_done)?);
    }
    Ok(items)
}

fn message(
    kind: u16,
    device: u16,
    header: &[u8],
    body: &[u8],
    (fds_truncated, fits): (bool, u8),
    writes_done: usize,
) -> Result<Item, Refusal> {
    encode_with(kind, device, &record::Message { fds_truncated, fits, writes_done }, &[header, body])
}

fn received<'a>(
    device: u16,
    twin: bool,
    bytes: &[u8],
    fds: impl Iterator<Item = (u64, Option<&'a ForeignFd>)>,
) -> Result<Item, Refusal> {
    let (mut positions, mut copies) = (Vec::new(), Vec::new());
    for (position, fd) in fds {
        positions.push((position, fd.is_some()));
        copies.extend(fd.map(|fd| copy(fd.as_fd())).transpose()?);
    }
    let item = encode_with(kind::RECEIVED, device, &record::Received { twin, fds: positions }, &[bytes])?;
    Ok(item.with_fds(copies))
}

fn fits_number(fits: Fits) -> u8 {
    match fits {
        Fits::Yes => 0,
        Fits::Drained => 1,
        Fits::Late => 2,
        Fits::Ends => 3,
    }
}

impl Adopted {
    /// CONNECTION; what follows belongs to it.
    pub(super) fn new(mut item: Item, came: &mut CameSockets) -> Result<Adopted, Refusal> {
        let head: record::Connection = record::decode(&item)?;
        let wrong = |what: &str| broken(item.kind, item.device, &what);
        let mut fds = came.0.remove(&head.id).unwrap_or_default();
        fds.append(&mut item.fds);
        if fds.len() != 1 + usize::from(head.twin_next_id.is_some()) {
            return Err(wrong("the number of sockets differs from its count"));
        }
        let mut sockets =
            fds.drain(..).map(|fd| fd.into_unix_stream().map_err(|_| wrong("a file that is no socket")));
        let socket = sockets.next().ok_or_else(|| wrong("no socket"))??;
        let twin = match (sockets.next(), head.twin_next_id) {
            (Some(twin), Some(id)) => Some((twin?, id)),
            _ => None,
        };
        let limits = head.limits.map(|limits| Limits {
            msg_fds_max: limits.msg_fds_max.min(crate::version::MSG_FDS_MAX),
            data_xfer_bytes_max: limits.data_xfer_bytes_max.clamp(1, crate::version::DATA_XFER_BYTES_MAX),
            ..limits
        });
        let state = State { limits, by_control_door: head.by_control_door, ..State::default() };
        let (received, twin_received) = Default::default();
        let (foreign_dma, next_id) = (head.foreign_dma, head.next_id);
        Ok(Adopted {
            id: head.id,
            place: None,
            socket,
            twin,
            state,
            foreign_dma,
            next_id,
            received,
            twin_received,
            unsent: Vec::new(),
            queue: Vec::new(),
            memory: None,
        })
    }

    /// Whether it has a version, and so is the VMM's.
    pub(super) fn is_vmms(&self) -> bool {
        self.state.limits.is_some()
    }

    /// The device's memory by messages is reached by this connection.
    pub(super) fn reaches(&mut self, memory: Arc<LaterMemory>) {
        self.memory = Some(memory);
    }

    /// RECEIVED, UNSENT, QUEUED or PARKED.
    pub(super) fn add(&mut self, mut item: Item) -> Result<(), Refusal> {
        let wrong = |item: &Item, what: &str| broken(item.kind, item.device, &what);
        if item.kind == kind::RECEIVED {
            let (received, bytes) = record::decode_with::<record::Received>(&item)?;
            let bytes = bytes.to_vec();
            if received.fds.iter().filter(|(_, kept)| *kept).count() != item.fds.len() {
                return Err(wrong(&item, "the number of fds differs from its count"));
            }
            let mut came = item.fds.drain(..);
            let fds =
                received.fds.iter().map(|(at, kept)| (*at, if *kept { came.next() } else { None })).collect();
            let to = if received.twin { &mut self.twin_received } else { &mut self.received };
            *to = (bytes, fds);
            return Ok(());
        }
        if item.kind == kind::UNSENT {
            self.unsent = std::mem::take(&mut item.bytes);
            return Ok(());
        }
        let (message, bytes) = record::decode_with::<record::Message>(&item)?;
        let (header, body) =
            Header::read_from_prefix(bytes).map_err(|_| wrong(&item, "an incomplete header"))?;
        let body = body.to_vec();
        let fits = match message.fits {
            0 => Fits::Yes,
            1 => Fits::Drained,
            2 => Fits::Late,
            _ => Fits::Ends,
        };
        if body.len() > link::MESSAGE_BYTES_MAX {
            return Err(wrong(&item, "a message that is too long"));
        }
        if item.kind == kind::PARKED {
            self.state.parked.push(Access { header, body, writes_done: message.writes_done });
        } else {
            let fds =
                Fds { fds: std::mem::take(&mut item.fds), truncated: message.fds_truncated, lost: false };
            self.queue.push(Queued { header, fds, body, fits });
        }
        Ok(())
    }

    /// On the thread that serves it.
    pub(in crate::server) fn connection<'a>(
        self,
        machine: &'a Arc<Machine>,
        options: &'a Options,
        doors: &'a Doors,
    ) -> Result<Connection<'a>, ConnectionError> {
        let by_control_door = self.state.by_control_door;
        let connection =
            Connection::new(self.socket, machine, options, doors, by_control_door, self.place)
                .inspect_err(|_| self.place.into_iter().for_each(|id| doors.expect_adopted_no_more(id)))?;
        let link = connection.link();
        link.import(self.received, self.unsent, self.queue, self.next_id, self.foreign_dma)?;
        if let Some((twin, next_id)) = self.twin {
            link.import_twin(twin, options.message_limit, next_id, self.twin_received)?;
        }
        let connection = connection.adopt(self.state);
        if let Some(memory) = self.memory {
            memory.set(connection.memory());
        }
        Ok(connection)
    }
}
