//! The old server's side.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use limosa_device::{Description, Frozen, Machine, Save};
use limosa_foreign_fd::ForeignFd;
use limosa_protocol::{Errno, MigrationFlags};
use limosa_switch_over::{Giver, Item, Refusal};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use super::record::{self, Files, Offer, copy, encode, kind};
use super::{PIECE_BYTES, STOP_LIMIT};
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
    files: Vec<Files>,
    /// For the state of each device, with room made while it runs.
    rooms: Vec<File>,
    frozen: Vec<Frozen>,
}

/// Room for a device's state is made in advance up to this, as an attempt that fails early keeps it until the next one.
const ROOM_BYTES_MAX: u64 = 64 << 20;

impl<'a> SwitchOver<'a> {
    /// For these servers.
    pub fn new(servers: &'a [Server]) -> SwitchOver<'a> {
        SwitchOver { servers, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn numbered(&self) -> impl Iterator<Item = (u16, &Server)> {
        (0..).zip(self.servers)
    }
}

pub(super) fn offer_of(description: &Description, migration: MigrationFlags) -> Offer {
    let regions = description.regions.iter().map(|region| {
        let areas = region.mapping.as_ref().map_or(&[][..], |mapping| &mapping.areas);
        (region.flags.bits(), region.size, areas.to_vec())
    });
    let irqs = description.irqs.iter().map(|irq| (irq.flags.bits(), irq.count));
    Offer {
        flags: description.device_info().flags,
        regions: regions.collect(),
        irqs: irqs.collect(),
        migration: migration.bits(),
    }
}

impl Giver for SwitchOver<'_> {
    fn offer(&self) -> Result<Vec<Item>, Refusal> {
        self.numbered()
            .map(|(device, server)| {
                check_next(device, server)?;
                let description = server.machine.description();
                let flags = server.machine.migration_flags().ok_or_else(|| {
                    let what = "it has no migration, by which its state would go to the new server";
                    Refusal::of_device(device, what)
                })?;
                let shares = |region: &limosa_device::Region| {
                    region.mapping.is_some() || !region.ioeventfds.is_empty()
                };
                if let Some(index) = description.regions.iter().position(shares) {
                    let what = format!(
                        "its client may have mapped region {index}, which this device does not hand over"
                    );
                    return Err(Refusal::of_device(device, what));
                }
                encode(kind::OFFER, device, &offer_of(description, flags))
            })
            .collect()
    }

    fn prepare(&self) -> Result<Vec<Item>, Refusal> {
        let mut state = self.lock();
        state.files = self.servers.iter().map(|_| Files::default()).collect();
        state.rooms = self
            .numbered()
            .map(|(device, server)| room(device, &server.machine))
            .collect::<Result<_, _>>()?;
        let mut items = Vec::new();
        for ((device, server), files) in self.numbered().zip(&mut state.files) {
            items.extend(files.mappings(device, &server.machine.mappings().export())?);
            items.push(listener(device, false, &server.door)?);
            if let Some(door) = &server.control {
                items.push(listener(device, true, door)?);
            }
        }
        Ok(items)
    }

    fn freeze(&self, until: Instant) -> Result<(), Refusal> {
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
        for (device, server) in self.numbered() {
            let frozen = server.machine.freeze(until).map_err(|errno| match errno {
                Errno::EBUSY => late(device, "a client moves the device, or has its dirty log"),
                errno => Refusal::of_device(device, format!("the device does not stop: {errno}")),
            })?;
            self.lock().frozen.push(frozen);
        }
        Ok(())
    }

    fn rest(&self) -> Result<Vec<Item>, Refusal> {
        let mut state = self.lock();
        let State { files, rooms, frozen } = &mut *state;
        let mut items = Vec::new();
        let each = self.numbered().zip(files).zip(std::mem::take(rooms)).zip(frozen);
        for ((((device, server), files), room), frozen) in each {
            let machine = &server.machine;
            items.extend(files.mappings(device, &machine.mappings().export())?);
            items.push(read_state(device, machine, room)?);
            let wiring = machine.wiring().export();
            let failed =
                |error| Refusal::of_device(device, format!("its eventfds cannot be duplicated: {error}"));
            items.extend(record::wiring(device, wiring.map_err(failed)?)?);
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
            for (link, role, paused) in server.doors.paused() {
                // A control client connects again: nothing of it is under way.
                if role != Some(Role::Control) {
                    items.extend(super::connection::export(device, &link, &paused)?);
                }
            }
        }
        Ok(items)
    }

    fn thaw(&self) {
        let frozen = std::mem::take(&mut self.lock().frozen);
        self.servers.iter().zip(frozen).for_each(|(server, frozen)| server.machine.thaw(frozen));
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

/// A file for the device's state.
fn room(device: u16, machine: &Machine) -> Result<File, Refusal> {
    let failed = |error| Refusal::of_device(device, format!("there is no file for its state: {error}"));
    let file = memfd_create("limosa-state", MemfdFlags::CLOEXEC).map_err(failed)?;
    let bytes = machine.expected_state_bytes().min(ROOM_BYTES_MAX);
    if bytes > 0 {
        // Pages that are not there by now are made as they are written, in the freeze.
        let _ = fallocate(&file, FallocateFlags::empty(), 0, bytes);
    }
    Ok(File::from(file))
}

/// The device's state, in a file.
fn read_state(device: u16, machine: &Arc<Machine>, file: File) -> Result<Item, Refusal> {
    let failed = |what: &dyn std::fmt::Display| {
        Refusal::of_device(device, format!("its state cannot be read: {what}"))
    };
    let session = machine.session().ok_or_else(|| failed(&"it has no session"))?;
    let mut bytes = 0;
    loop {
        let written = machine.data_read(session, PIECE_BYTES, |save| match save {
            Save::Data(data) => file.write_all_at(data, bytes).map(|()| data.len()),
            Save::NothingForNow | Save::End => Ok(0),
        });
        match written.map_err(|errno| failed(&errno))?.map_err(|error| failed(&error))? {
            0 => break,
            count => bytes += count as u64,
        }
    }
    let item = Item::new(kind::STATE, device, bytes.to_ne_bytes().to_vec());
    Ok(item.with_fds([ForeignFd::harmless(OwnedFd::from(file))]))
}
