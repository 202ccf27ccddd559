//! The old server's side.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use limosa_device::Frozen;
use limosa_switch_over::{Giver, Item, Refusal};

use super::connection::GivenSockets;
use super::copy::Copy;
use super::offer::offer_of;
use super::record::{self, Files, Offer, copy, encode, kind};
use super::regions::GivenFiles;
use super::signals;
use super::wiring::GivenWires;
use super::{DEVICES_MAX, STOP_LIMIT};
use crate::server::doors::Role;
use crate::server::{Door, Server};

/// The servers of a process, to be handed over to another process together. Each has been made with
/// [`Options::interruptible`](crate::server::Options::interruptible).
#[derive(Debug)]
pub struct SwitchOver<'a> {
    servers: &'a [Server],
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    devices: Vec<Outgoing>,
    frozen: Vec<Frozen>,
}

/// What is on its way of a device.
#[derive(Debug, Default)]
struct Outgoing {
    files: Files,
    sockets: GivenSockets,
    regions: GivenFiles,
    wires: GivenWires,
    copy: Copy,
}

impl<'a> SwitchOver<'a> {
    /// For these servers.
    pub fn new(servers: &'a [Server]) -> SwitchOver<'a> {
        SwitchOver { servers, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A refusal that names its device by its socket.
    fn named(&self, refusal: Refusal) -> Refusal {
        let server = refusal.device.and_then(|device| self.servers.get(device as usize));
        match server.and_then(Server::socket) {
            Some(socket) => super::named(&socket, refusal),
            None => refusal,
        }
    }

    fn numbered(&self) -> impl Iterator<Item = (u16, &Server)> {
        (0..).zip(self.servers)
    }
}

impl Giver for SwitchOver<'_> {
    fn offer(&self) -> Result<Vec<Item>, Refusal> {
        self.offered().map_err(|refusal| self.named(refusal))
    }

    fn prepare(&self) -> Result<Vec<Item>, Refusal> {
        self.prepared().map_err(|refusal| self.named(refusal))
    }

    fn prepare_more(&self) -> Result<Option<Vec<Item>>, Refusal> {
        self.prepared_more().map_err(|refusal| self.named(refusal))
    }

    fn freeze(&self, until: Instant) -> Result<(), Refusal> {
        self.frozen(until).map_err(|refusal| self.named(refusal))
    }

    fn rest(&self) -> Result<Vec<Item>, Refusal> {
        self.left().map_err(|refusal| self.named(refusal))
    }

    fn thaw(&self) {
        let State { devices, frozen } = std::mem::take(&mut *self.lock());
        self.servers.iter().zip(frozen).for_each(|(server, frozen)| server.machine.thaw(frozen));
        for (server, mut outgoing) in self.servers.iter().zip(devices) {
            outgoing.copy.end(&server.machine);
        }
        self.servers.iter().for_each(|server| server.doors.go_on());
    }

    fn given(&self) {
        for server in self.servers {
            let control = server.control.as_ref();
            for door in std::iter::once(&server.door).chain(control) {
                if let Some(path) = door.path.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    path.leave();
                }
            }
            server.doors.give();
            // Its thread that accepts looks at who serves.
            server.shutdown.shut_down();
        }
    }
}

impl SwitchOver<'_> {
    fn offered(&self) -> Result<Vec<Item>, Refusal> {
        if self.servers.len() > DEVICES_MAX {
            let count = self.servers.len();
            return Err(Refusal::new(format!("it has {count} devices; expected {DEVICES_MAX} at most")));
        }
        self.numbered()
            .map(|(device, server)| {
                check_next(device, server)?;
                let description = server.machine.description();
                let flags = server.machine.migration_flags().ok_or_else(|| {
                    let what = "it has no migration, by which its state would go to the new server";
                    Refusal::of_device(device, what)
                })?;
                let has_client = !server.doors.to_be_given().is_empty();
                let offer = Offer { socket: server.socket(), has_client, ..offer_of(description, flags) };
                encode(kind::OFFER, device, &offer)
            })
            .collect()
    }

    fn prepared(&self) -> Result<Vec<Item>, Refusal> {
        let mut state = self.lock();
        let share = self.servers.len();
        let outgoing = |_| Outgoing { copy: Copy::new(share), ..Outgoing::default() };
        state.devices = self.servers.iter().map(outgoing).collect();
        let mut items = Vec::new();
        for ((device, server), outgoing) in self.numbered().zip(&mut state.devices) {
            items.extend(outgoing.files.mappings(device, &server.machine.mappings().export())?);
            items.push(listener(device, false, &server.door)?);
            if let Some(door) = &server.control {
                items.push(listener(device, true, door)?);
            }
            items.extend(outgoing.sockets.more(device, &server.doors)?);
            items.extend(outgoing.regions.more(device, &server.machine)?);
            items.extend(outgoing.wires.more(device, server.machine.wiring())?);
            items.extend(signals::given(device, &server.machine)?);
            items.extend(outgoing.copy.begin(device, &server.machine)?);
        }
        Ok(items)
    }

    fn prepared_more(&self) -> Result<Option<Vec<Item>>, Refusal> {
        let mut state = self.lock();
        let mut items = Vec::new();
        for ((device, server), outgoing) in self.numbered().zip(&mut state.devices) {
            items.extend(outgoing.sockets.more(device, &server.doors)?);
            items.extend(outgoing.regions.more(device, &server.machine)?);
            items.extend(outgoing.wires.more(device, server.machine.wiring())?);
            items.extend(outgoing.copy.more(device, &server.machine)?);
        }
        if items.is_empty() {
            for ((device, server), outgoing) in self.numbered().zip(&mut state.devices) {
                outgoing.copy.make_room(device, &server.machine)?;
            }
            return Ok(None);
        }
        Ok(Some(items))
    }

    fn frozen(&self, until: Instant) -> Result<(), Refusal> {
        let late =
            |device, what: &str| Refusal::of_device(device, format!("{what}; try again when it is done"));
        for (device, server) in self.numbered() {
            server
                .doors
                .pause(until)
                .map_err(|_| late(device, "a request is under way that takes too long"))?;
        }
        // None can come or be named any more.
        self.numbered().try_for_each(|(device, server)| check_next(device, server))?;
        let until = until.min(Instant::now() + STOP_LIMIT);
        let mut state = self.lock();
        let State { devices, frozen } = &mut *state;
        for ((device, server), outgoing) in self.numbered().zip(devices) {
            frozen.push(outgoing.copy.freeze(device, &server.machine, until)?);
        }
        Ok(())
    }

    fn left(&self) -> Result<Vec<Item>, Refusal> {
        let mut state = self.lock();
        let State { devices, frozen } = &mut *state;
        let mut items = Vec::new();
        for (((device, server), outgoing), frozen) in self.numbered().zip(devices).zip(frozen) {
            let machine = &server.machine;
            items.extend(outgoing.files.mappings(device, &machine.mappings().export())?);
            items.extend(outgoing.regions.more(device, machine)?);
            items.push(outgoing.copy.rest(device, machine, frozen.session)?);
            items.extend(outgoing.wires.rest(device, machine.wiring())?);
            if let Some(log) = machine.mappings().export_log() {
                items.extend(record::log(device, &log)?);
            }
            let kept = frozen.kept;
            let kept = record::Machine {
                stopped: kept.stopped,
                resets: kept.resets,
                precopy_reinit: kept.precopy_reinit,
                stays: kept.stays,
            };
            items.push(encode(kind::MACHINE, device, &kept)?);
            for (id, link, role, paused) in server.doors.paused() {
                // A control client connects again: nothing of it is under way.
                if role != Some(Role::Control) {
                    items.extend(super::connection::export(device, id, &link, &paused, &outgoing.sockets)?);
                }
            }
        }
        Ok(items)
    }
}

/// Refuses while the device is about to go to the next VMM: what that has prepared is not handed over.
fn check_next(device: u16, server: &Server) -> Result<(), Refusal> {
    if !server.doors.expects_next() {
        return Ok(());
    }
    let (pid, _) = server.doors.named();
    let what = format!(
        "process {pid} is named as its next VMM; try again once that has the device, or take the name back (`limosa state \
         SOCKET next --nobody`)"
    );
    Err(Refusal::of_device(device, what))
}

fn listener(device: u16, control: bool, door: &Door) -> Result<Item, Refusal> {
    let path = door.path.lock().unwrap_or_else(PoisonError::into_inner);
    let path = path.as_ref().map(|path| (path.path().to_owned(), path.identity()));
    let item = encode(kind::LISTENER, device, &record::Listener { control, path })?;
    Ok(item.with_fds([copy(&*door.listener)?]))
}
