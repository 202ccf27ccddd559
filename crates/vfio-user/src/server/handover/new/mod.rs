//! A device of the new server, which replaces one of the old server's or is served for the first time.

mod fits;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use limosa_device::{ClientId, ExportedLog, Kept, Machine, RemoteMemory, WiringState};
use limosa_host::{SocketAccess, SocketPath};
use limosa_protocol::State;
use limosa_switch_over::{Item, Refusal};

use super::NewDevice;
use super::connection::{Adopted, CameSockets, Threads};
use super::copy::Loading;
use super::later::LaterMemory;
use super::listener::CameListener;
use super::record::{self, MappingRow, broken, decode, kind};
use super::regions::CameFiles;
use super::signals::CameSignals;
use super::wiring::CameWires;
use crate::server::doors::Doors;
use crate::server::{Door, Options, Server, device_span};

/// A device of the new server.
pub(super) struct New {
    machine: Arc<Machine>,
    options: Options,
    /// Where it is to listen.
    pub(super) socket: Option<PathBuf>,
    control_socket: Option<PathBuf>,
    files: Vec<Arc<OwnedFd>>,
    rows: Vec<MappingRow>,
    door: Option<CameListener>,
    control: Option<CameListener>,
    client: Option<ClientId>,
    /// The number of the copy that was loaded, completely or in part.
    copy: Option<u32>,
    wires: CameWires,
    wiring: WiringState,
    log: Option<ExportedLog>,
    kept: Option<Kept>,
    sockets: CameSockets,
    threads: Threads,
    regions: CameFiles,
    signals: CameSignals,
    doors: Arc<Doors>,
    connections: Vec<Adopted>,
    memory: Arc<LaterMemory>,
    /// Whether it is the control socket, its path, and the identity of the socket.
    paths: Vec<(bool, PathBuf, (u64, u64))>,
    server: Option<Server>,
    /// The new mode and group of the socket, if they change.
    access: Option<SocketAccess>,
}

fn not_taken(device: u16, what: &dyn std::fmt::Display) -> Refusal {
    let what =
        format!("the new device does not accept its state: {what}; the log of the new server says why");
    Refusal::of_device(device, what)
}

impl New {
    pub(super) fn of(device: NewDevice) -> New {
        let NewDevice { machine, options, socket, control } = device;
        New {
            machine,
            options,
            socket,
            control_socket: control,
            files: Vec::new(),
            rows: Vec::new(),
            door: None,
            control: None,
            client: None,
            copy: None,
            wires: CameWires::default(),
            wiring: WiringState::default(),
            log: None,
            kept: None,
            sockets: CameSockets::default(),
            threads: Threads::default(),
            regions: CameFiles::default(),
            signals: CameSignals::default(),
            doors: Arc::default(),
            connections: Vec::new(),
            memory: Arc::default(),
            paths: Vec::new(),
            server: None,
            access: None,
        }
    }

    /// How it is called in messages.
    pub(super) fn name(&self) -> String {
        self.socket.as_ref().map_or_else(|| "no path".into(), |path| path.display().to_string())
    }

    /// A refusal that names this device by its socket, if it has one.
    pub(super) fn named(&self, refusal: Refusal) -> Refusal {
        match &self.socket {
            Some(path) => super::named(path, refusal),
            None => refusal,
        }
    }

    /// For a device without a predecessor: it listens from now on, and runs once the server serves.
    pub(super) fn begin_fresh(&mut self) -> Result<(), Refusal> {
        let Some(socket) = &self.socket else {
            return Err(Refusal::new("a device without a socket path has no predecessor"));
        };
        let failed = |path: &Path, error: std::io::Error| {
            let what = format!(
                "the old server does not have it, and it cannot listen on {}: {error}",
                path.display()
            );
            Refusal::of_device(0, what)
        };
        let bound = Server::bind(socket, Arc::clone(&self.machine), self.options.clone());
        let mut server = bound.map_err(|error| failed(socket, error))?;
        if let Some(control) = &self.control_socket {
            let own = SocketAccess::default();
            server = server.with_control(control, &own).map_err(|error| failed(control, error))?;
        }
        self.server = Some(server);
        if self.machine.migration_flags().is_some() {
            let begun = self.machine.begin_new();
            self.client =
                Some(begun.map_err(|errno| Refusal::of_device(0, format!("it does not stop: {errno}")))?);
            self.kept = Some(Kept::default());
        }
        Ok(())
    }

    /// Takes an item that is transferred while devices run.
    pub(super) fn take_prepared(&mut self, item: Item) -> Result<(), Refusal> {
        match item.kind {
            kind::FILES => self.add_files(item),
            kind::MAPPINGS => self.map(&item)?,
            kind::LISTENER => self.listen(item)?,
            kind::STATE => self.load(item)?,
            kind::REGION_FILE => self.regions.add(item, &self.machine)?,
            kind::IOEVENTFDS => self.signals.add(item)?,
            kind::EVENTFDS => self.wires.add(item)?,
            kind::SOCKETS => {
                let id = self.sockets.add(item)?;
                let device = device_span(self.socket.as_deref());
                self.threads.make(id, &self.machine, &self.options, &self.doors, device);
            }
            other => return Err(broken(other, item.device, &"it comes too early")),
        }
        Ok(())
    }

    /// An item of the rest.
    pub(super) fn take_rest(&mut self, item: Item) -> Result<(), Refusal> {
        let device = item.device;
        match item.kind {
            kind::FILES => self.add_files(item),
            kind::MAPPINGS => self.map(&item)?,
            kind::STATE => self.load(item)?,
            kind::REGION_FILE => self.regions.add(item, &self.machine)?,
            kind::WIRING => self.wires.set(&item)?,
            kind::EVENTFDS => self.wires.add(item)?,
            kind::LOG => self.log = Some(record::log_head(&item)?),
            kind::DIRTY => {
                let log = self.log.as_mut().ok_or_else(|| broken(kind::DIRTY, device, &"there is no log"))?;
                log.dirty.push(record::dirty(&item)?);
            }
            kind::MACHINE => {
                let record::Machine { stopped, resets, precopy_reinit, stays, .. } = decode(&item)?;
                self.kept = Some(Kept { stopped, resets, precopy_reinit, stays });
            }
            kind::CONNECTION => {
                let connection = Adopted::new(item, &mut self.sockets)?;
                self.connections.push(connection);
            }
            kind::RECEIVED | kind::QUEUED | kind::PARKED | kind::UNSENT => {
                let none = || broken(item.kind, device, &"it belongs to no connection");
                self.connections.last_mut().ok_or_else(none)?.add(item)?;
            }
            other => return Err(broken(other, device, &"this version does not know it")),
        }
        Ok(())
    }

    /// Called after a part that is transferred while devices run.
    pub(super) fn prepare(&mut self, device: u16) -> Result<(), Refusal> {
        if self.door.is_none() {
            return Err(broken(kind::LISTENER, device, &"it has no socket"));
        }
        self.check_sockets(device)?;
        self.check_access(device)?;
        self.begin(device)
    }

    fn add_files(&mut self, item: Item) {
        self.files.extend(item.fds.into_iter().map(|fd| Arc::new(fd.into_inner())));
    }

    /// Updates the mappings to a new list.
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

    fn listen(&mut self, item: Item) -> Result<(), Refusal> {
        let came = CameListener::of(item)?;
        let to = if came.record.control { &mut self.control } else { &mut self.door };
        *to = Some(came);
        Ok(())
    }

    /// Prepares the device for a state, unless it is prepared.
    fn begin(&mut self, device: u16) -> Result<(), Refusal> {
        if self.client.is_some() {
            return Ok(());
        }
        let client = self.machine.begin_replacing().map_err(|errno| not_taken(device, &errno))?;
        self.client = Some(client);
        Ok(())
    }

    /// Loads bytes of the device's state. The first bytes of a new copy discard the data loaded before.
    fn load(&mut self, item: Item) -> Result<(), Refusal> {
        let device = item.device;
        let state = Loading::of(item)?;
        if self.copy != Some(state.copy) {
            if self.copy.is_some() {
                tracing::info!(device, "the old device was reset: its state is loaded again");
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

    /// Takes over everything that can fail other than the state.
    pub(super) fn complete(&mut self, device: u16) -> Result<(), Refusal> {
        let missing =
            |what: &str| Refusal::of_device(device, format!("the old server did not hand over {what}"));
        self.finish(device)?;
        std::mem::take(&mut self.regions).adopt(device, &self.machine)?;
        std::mem::take(&mut self.signals).adopt(device, &self.machine)?;
        self.kept.ok_or_else(|| missing("its data about clients"))?;
        if self.connections.iter().filter(|connection| connection.is_vmms()).count() > 1 {
            return Err(broken(kind::CONNECTION, device, &"two VMMs"));
        }
        let vectors: Vec<_> = self.machine.description().irqs.iter().map(|irq| irq.count).collect();
        self.wiring = std::mem::take(&mut self.wires).state(device, &vectors)?;
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
        self.access = self.new_access();
        let mut door = |came: Option<CameListener>| -> std::io::Result<Option<Door>> {
            let Some(CameListener { record: listener, socket }) = came else { return Ok(None) };
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
    pub(super) fn serve(self) -> Option<Server> {
        let New { machine, client, wiring, kept, paths, server, threads, connections, doors, access, .. } =
            self;
        let server = server?;
        // Only a device without migration, which has no predecessor, runs already.
        if let (Some(client), Some(kept)) = (client, kept) {
            // A device without a predecessor has none.
            let is_wired = !wiring.indexes.is_empty();
            if is_wired && let Err(errno) = machine.wiring().adopt(wiring) {
                tracing::error!(%errno, "interrupts could not be taken over");
            }
            if let Err(errno) = machine.replace(client, kept) {
                tracing::error!(%errno, "the device does not run in its new server");
            }
        }
        let (threads, adopted) = threads.serve(connections, &doors);
        *server.started.threads.lock().unwrap_or_else(PoisonError::into_inner) = threads;
        *server.adopted.lock().unwrap_or_else(PoisonError::into_inner) = adopted;
        for (control, path, identity) in paths {
            let door = if control { server.control.as_ref()? } else { &server.door };
            match SocketPath::adopt(&path, identity, &door.listener) {
                Ok(path) => {
                    if let Some(access) = access.filter(|_| !control)
                        && let Err(error) = path.give(&access)
                    {
                        tracing::error!(%error, "the socket keeps its old mode and group");
                    }
                    *door.path.lock().unwrap_or_else(PoisonError::into_inner) = Some(path);
                }
                Err(error) => tracing::warn!(%error, "the socket is served, and not removed at the end"),
            }
        }
        Some(server)
    }
}
