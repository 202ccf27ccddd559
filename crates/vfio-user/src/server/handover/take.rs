//! The new server's side.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf, absolute};
use std::sync::{Arc, PoisonError};

use limosa_device::{ClientId, ExportedLog, Kept, Machine, RemoteMemory, WiringState};
use limosa_host::SocketPath;
use limosa_protocol::State;
use limosa_switch_over::{Commit, Committed, Item, Refusal, Taker, Withdrawn};
use rustix::net::sockopt::socket_acceptconn;

use super::connection::{Adopted, CameSockets, Threads};
use super::copy::Loading;
use super::later::LaterMemory;
use super::offer::{difference, offer_of};
use super::record::{self, MappingRow, Offer, broken, decode, kind};
use super::regions::{self, CameFiles};
use crate::server::doors::Doors;
use crate::server::{Door, Options, Server};

/// Devices that are to take the place of another process' devices, in the same order.
pub struct Replacing {
    devices: Vec<New>,
}

/// The servers, ready to [serve](Server::serve) the clients that the other process has served.
pub type Replaced = Vec<Server>;

struct New {
    machine: Arc<Machine>,
    options: Options,
    files: Vec<Arc<OwnedFd>>,
    rows: Vec<MappingRow>,
    door: Option<(record::Listener, UnixListener)>,
    control: Option<(record::Listener, UnixListener)>,
    client: Option<ClientId>,
    /// The number of the copy that was loaded, in part or whole.
    copy: Option<u32>,
    wiring_bits: Vec<Vec<u8>>,
    eventfds: Vec<limosa_foreign_fd::ForeignFd>,
    wiring: WiringState,
    log: Option<ExportedLog>,
    kept: Option<Kept>,
    sockets: CameSockets,
    threads: Threads,
    regions: CameFiles,
    doors: Arc<Doors>,
    connections: Vec<Adopted>,
    memory: Arc<LaterMemory>,
    /// Whether it is the door for control clients, where it is, and which socket that is.
    paths: Vec<(bool, PathBuf, (u64, u64))>,
    server: Option<Server>,
}

impl Replacing {
    /// These machines, which are new, and how to serve each.
    pub fn new(devices: impl IntoIterator<Item = (Arc<Machine>, Options)>) -> Replacing {
        let new = |(machine, options)| New {
            machine,
            options,
            files: Vec::new(),
            rows: Vec::new(),
            door: None,
            control: None,
            client: None,
            copy: None,
            wiring_bits: Vec::new(),
            eventfds: Vec::new(),
            wiring: WiringState::default(),
            log: None,
            kept: None,
            sockets: CameSockets::default(),
            threads: Threads::default(),
            regions: CameFiles::default(),
            doors: Arc::default(),
            connections: Vec::new(),
            memory: Arc::default(),
            paths: Vec::new(),
            server: None,
        };
        Replacing { devices: devices.into_iter().map(new).collect() }
    }

    /// Refuses sockets that were handed over, unless each is the one that its device's path leads to. After
    /// [`Taker::prepare`]; the paths are in the order of the devices.
    pub fn check_sockets<P: AsRef<Path>>(&self, paths: &[P]) -> Result<(), Refusal> {
        for ((device, new), path) in (0..).zip(&self.devices).zip(paths) {
            let path = path.as_ref();
            let Some((listener, socket)) = &new.door else { continue };
            let bound = socket.local_addr().ok().and_then(|at| at.as_pathname().map(Path::to_owned));
            let theirs = listener.path.as_ref().map(|(path, _)| path.clone()).or(bound);
            let is_it = match &listener.path {
                Some((_, identity)) => {
                    std::fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == *identity)
                }
                // A socket that its process did not make has nothing but an address.
                None => theirs.as_deref().is_some_and(|theirs| absolute(theirs).ok() == absolute(path).ok()),
            };
            if !is_it {
                let theirs = theirs.map_or("no path".to_owned(), |path| path.display().to_string());
                let what = format!(
                    "it listens at {theirs}, and the new server at {}; start the new server with the same socket",
                    path.display()
                );
                return Err(Refusal::of_device(device, what));
            }
        }
        Ok(())
    }

    fn device(&mut self, item: &Item) -> Result<&mut New, Refusal> {
        let missing = || broken(item.kind, item.device, &"it is for a device that is not there");
        self.devices.get_mut(item.device as usize).ok_or_else(missing)
    }
}

impl Taker for Replacing {
    type Server = Replaced;

    fn check(&mut self, offer: Vec<Item>) -> Result<(), Refusal> {
        if offer.len() != self.devices.len() {
            let (theirs, ours) = (offer.len(), self.devices.len());
            let what =
                format!("it has {theirs} devices, and the new server {ours}: start it with the same devices");
            return Err(Refusal::new(what));
        }
        for item in offer {
            let theirs: Offer = decode(&item)?;
            let new = self.device(&item)?;
            let flags = new.machine.migration_flags();
            let flags =
                flags.ok_or_else(|| Refusal::of_device(item.device, "the new device has no migration"))?;
            let ours = offer_of(new.machine.description(), flags);
            if let Some(what) = difference(&theirs, &ours) {
                let what = format!(
                    "{what}; start the new server with the same options, or a version that keeps them"
                );
                return Err(Refusal::of_device(item.device, what));
            }
            regions::check(item.device, &new.machine)?;
        }
        Ok(())
    }

    fn prepare(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        for item in items {
            let new = self.device(&item)?;
            match item.kind {
                kind::FILES => new.add_files(item),
                kind::MAPPINGS => new.map(&item)?,
                kind::LISTENER => new.listen(item)?,
                kind::STATE => new.load(item)?,
                kind::REGION_FILE => new.regions.add(item, &new.machine)?,
                kind::SOCKETS => {
                    let id = new.sockets.add(item)?;
                    new.threads.make(id, &new.machine, &new.options, &new.doors);
                }
                other => return Err(broken(other, item.device, &"it comes too early")),
            }
        }
        if let Some(device) = self.devices.iter().position(|new| new.door.is_none()) {
            return Err(broken(kind::LISTENER, device as u16, &"it has no socket"));
        }
        // While the old devices run, as a model may make room for its state here.
        (0..).zip(&mut self.devices).try_for_each(|(device, new)| new.begin(device))
    }

    fn load(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        for item in items {
            let device = item.device;
            let new = self.device(&item)?;
            match item.kind {
                kind::FILES => new.add_files(item),
                kind::MAPPINGS => new.map(&item)?,
                kind::STATE => new.load(item)?,
                kind::REGION_FILE => new.regions.add(item, &new.machine)?,
                kind::WIRING => new.wiring_bits = decode(&item)?,
                kind::EVENTFDS => new.eventfds.extend(item.fds),
                kind::LOG => new.log = Some(record::log_head(&item)?),
                kind::DIRTY => {
                    let log =
                        new.log.as_mut().ok_or_else(|| broken(kind::DIRTY, device, &"there is no log"))?;
                    log.dirty.push(record::dirty(&item)?);
                }
                kind::MACHINE => {
                    let record::Machine { stopped, resets, precopy_reinit, stays } = decode(&item)?;
                    new.kept = Some(Kept { stopped, resets, precopy_reinit, stays });
                }
                kind::CONNECTION => {
                    let connection = Adopted::new(item, &mut new.sockets)?;
                    new.connections.push(connection);
                }
                kind::RECEIVED | kind::QUEUED | kind::PARKED => {
                    let none = || broken(item.kind, device, &"it belongs to no connection");
                    new.connections.last_mut().ok_or_else(none)?.add(item)?;
                }
                other => return Err(broken(other, device, &"this version does not know it")),
            }
        }
        (0..).zip(&mut self.devices).try_for_each(|(device, new)| new.complete(device))
    }

    fn run(self, commit: Commit<'_>) -> Result<(Committed, Replaced), Withdrawn> {
        // Room is made before: nothing fails from here on.
        let mut servers = Vec::with_capacity(self.devices.len());
        let committed = commit.commit()?;
        for new in self.devices {
            servers.extend(new.serve());
        }
        Ok((committed, servers))
    }
}

fn not_taken(device: u16, what: &dyn std::fmt::Display) -> Refusal {
    let what = format!("the new device does not take its state: {what}; the log of the new server says why");
    Refusal::of_device(device, what)
}

impl New {
    fn add_files(&mut self, item: Item) {
        self.files.extend(item.fds.into_iter().map(|fd| Arc::new(fd.into_inner())));
    }

    /// Maps what differs from what is mapped.
    fn map(&mut self, item: &Item) -> Result<(), Refusal> {
        let rows = record::rows(item)?;
        let failed = |row: &MappingRow, what: &dyn std::fmt::Display| {
            let MappingRow { iova, size, .. } = row;
            Refusal::of_device(
                item.device,
                format!("{size:#x} bytes of memory at {iova:#x} cannot be mapped: {what}"),
            )
        };
        let mappings = self.machine.mappings();
        for row in self.rows.iter().filter(|row| !rows.contains(row)) {
            mappings.unmap(row.iova, row.size).map_err(|errno| failed(row, &errno))?;
        }
        let remote: Arc<dyn RemoteMemory> = Arc::clone(&self.memory) as _;
        for row in rows.iter().filter(|row| !self.rows.contains(row)) {
            let mapping = record::mapping(item.device, row, &self.files)?;
            let mapping =
                mapping.to_mapping(self.options.any_file, &remote).map_err(|error| failed(row, &error))?;
            mappings.map(mapping).map_err(|errno| failed(row, &errno))?;
        }
        self.rows = rows;
        Ok(())
    }

    fn listen(&mut self, mut item: Item) -> Result<(), Refusal> {
        let listener: record::Listener = decode(&item)?;
        let wrong = |what: &str| broken(kind::LISTENER, item.device, &what);
        let fd = item.fds.pop().ok_or_else(|| wrong("no socket"))?;
        let socket = fd.into_unix_stream().map_err(|_| wrong("a file that is no UNIX socket"))?;
        if !socket_acceptconn(&*socket).unwrap_or(false) {
            return Err(wrong("a socket that does not listen"));
        }
        let socket = UnixListener::from(OwnedFd::from(socket.into_inner()));
        let to = if listener.control { &mut self.control } else { &mut self.door };
        *to = Some((listener, socket));
        Ok(())
    }

    /// Makes it ready for a state, unless it is.
    fn begin(&mut self, device: u16) -> Result<(), Refusal> {
        if self.client.is_some() {
            return Ok(());
        }
        let client = self.machine.begin_replacing().map_err(|errno| not_taken(device, &errno))?;
        self.client = Some(client);
        Ok(())
    }

    /// Bytes of the device's state. Those of another copy than before replace what was loaded.
    fn load(&mut self, item: Item) -> Result<(), Refusal> {
        let device = item.device;
        let state = Loading::of(item)?;
        if self.copy != Some(state.copy) {
            if self.copy.is_some() {
                tracing::info!(device, "the old device was reset: its state is loaded anew");
                self.machine.reset().map_err(|errno| not_taken(device, &errno))?;
                self.client = None;
            }
            self.copy = Some(state.copy);
        }
        self.begin(device)?;
        state.load(&self.machine).map_err(|what| not_taken(device, &what))
    }

    /// The state is complete.
    fn finish(&mut self, device: u16) -> Result<(), Refusal> {
        let missing = || Refusal::of_device(device, "the old server did not hand over its state");
        let client = self.client.filter(|_| self.copy.is_some()).ok_or_else(missing)?;
        self.machine.loaded(client).map_err(|errno| not_taken(device, &errno))
    }

    /// All that can fail beside the state.
    fn complete(&mut self, device: u16) -> Result<(), Refusal> {
        let missing =
            |what: &str| Refusal::of_device(device, format!("the old server did not hand over {what}"));
        self.finish(device)?;
        std::mem::take(&mut self.regions).adopt(device, &self.machine)?;
        self.kept.ok_or_else(|| missing("what it keeps"))?;
        if self.connections.iter().filter(|connection| connection.is_vmms()).count() > 1 {
            return Err(broken(kind::CONNECTION, device, &"two VMMs"));
        }
        let bits = std::mem::take(&mut self.wiring_bits);
        let irqs = &self.machine.description().irqs;
        let fits = bits.len() == irqs.len()
            && bits.iter().zip(irqs).all(|(bits, irq)| bits.len() == irq.count as usize);
        if !fits {
            return Err(broken(kind::WIRING, device, &"other interrupts than the device has"));
        }
        self.wiring = record::unwiring(device, bits, std::mem::take(&mut self.eventfds))?;
        if let Some(log) = self.log.take() {
            let failed =
                |errno| Refusal::of_device(device, format!("its dirty log cannot be taken over: {errno}"));
            self.machine.mappings().import_log(&log).map_err(failed)?;
            self.machine.log_is_vmms();
        }
        // A model that panicked where nothing could be answered.
        let state = self.machine.state();
        if state != State::Stop {
            return Err(not_taken(device, &format!("the new device is in {state}, and not in STOP")));
        }
        let failed = |error| Refusal::of_device(device, format!("it cannot be served: {error}"));
        self.server = Some(self.make_server().map_err(failed)?);
        Ok(())
    }

    /// A server that serves once it may.
    fn make_server(&mut self) -> std::io::Result<Server> {
        let mut door = |listener: Option<(record::Listener, UnixListener)>| -> std::io::Result<Option<Door>> {
            let Some((listener, socket)) = listener else { return Ok(None) };
            let mut door = Door::new(None, socket)?;
            if let Some((path, identity)) = listener.path {
                door.name = Some(path.clone());
                self.paths.push((listener.control, path, identity));
            }
            Ok(Some(door))
        };
        let (vmm, control) = (self.door.take(), self.control.take());
        let (vmm, control) = (door(vmm)?, door(control)?);
        let vmm = vmm.ok_or(std::io::ErrorKind::NotFound)?;
        let server = Server::with_doors(
            vmm,
            Arc::clone(&self.machine),
            self.options.clone(),
            Arc::clone(&self.doors),
        )?;
        let memory = Arc::clone(&self.memory);
        let mut adopted = std::mem::take(&mut self.connections);
        if let Some(vmms) = adopted.iter_mut().find(|connection| connection.is_vmms()) {
            vmms.reaches(memory);
        }
        self.connections = adopted;
        Ok(Server { control, ..server })
    }

    /// Serves, from now on.
    fn serve(self) -> Option<Server> {
        let New { machine, client, wiring, kept, paths, server, threads, connections, doors, .. } = self;
        let server = server?;
        if let Err(errno) = machine.wiring().adopt(wiring) {
            tracing::error!(%errno, "interrupts could not be taken over");
        }
        if let Err(errno) = machine.replace(client?, kept?) {
            tracing::error!(%errno, "the device does not run in its new server");
        }
        let (threads, adopted) = threads.serve(connections, &doors);
        *server.started.threads.lock().unwrap_or_else(PoisonError::into_inner) = threads;
        *server.adopted.lock().unwrap_or_else(PoisonError::into_inner) = adopted;
        for (control, path, identity) in paths {
            let door = if control { server.control.as_ref()? } else { &server.door };
            match SocketPath::adopt(&path, identity, &door.listener) {
                Ok(path) => *door.path.lock().unwrap_or_else(PoisonError::into_inner) = Some(path),
                Err(error) => tracing::warn!(%error, "the socket is served, and not removed at the end"),
            }
        }
        Some(server)
    }
}
