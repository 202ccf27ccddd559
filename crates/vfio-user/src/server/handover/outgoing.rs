//! A device of the old server on its way to the new one.

use std::sync::Arc;
use std::time::Instant;

use limosa_device::{Frozen, Machine};
use limosa_switch_over::{Item, Refusal};

use super::connection::{self, GivenSockets};
use super::copy::Copy;
use super::deadline;
use super::record::{self, Files, encode, kind};
use super::regions::GivenFiles;
use super::wiring::GivenWires;
use crate::server::Server;
use crate::server::doors::{Doors, Role};

/// A device that is being handed over.
pub(super) struct Outgoing {
    pub(super) device: u16,
    pub(super) machine: Arc<Machine>,
    pub(super) doors: Arc<Doors>,
    pub(super) files: Files,
    pub(super) sockets: GivenSockets,
    pub(super) regions: GivenFiles,
    pub(super) wires: GivenWires,
    pub(super) copy: Copy,
    pub(super) frozen: Option<Frozen>,
    /// Of the last work on it, which may have been done by another thread.
    pub(super) outcome: Result<(), Refusal>,
    /// The resulting items.
    pub(super) items: Vec<Item>,
}

impl Outgoing {
    /// One of this many devices that are handed over together.
    pub(super) fn new(device: u16, server: &Server, share: usize) -> Outgoing {
        Outgoing {
            device,
            machine: Arc::clone(&server.machine),
            doors: Arc::clone(&server.doors),
            files: Files::default(),
            sockets: GivenSockets::default(),
            regions: GivenFiles::default(),
            wires: GivenWires::default(),
            copy: Copy::new(share),
            frozen: None,
            outcome: Ok(()),
            items: Vec::new(),
        }
    }

    /// Everything that has not gone over, of a device that is stopped. The new device is to be loaded by then.
    pub(super) fn left(&mut self, until: Instant) -> Result<Vec<Item>, Refusal> {
        let (device, machine) = (self.device, &self.machine);
        let missing = || Refusal::of_device(device, "it was not stopped");
        let frozen = self.frozen.as_ref().ok_or_else(missing)?;
        let mut items = self.files.mappings(device, &machine.mappings().export())?;
        items.extend(self.regions.more(device, machine)?);
        items.push(self.copy.rest(device, machine, frozen.session)?);
        items.extend(self.wires.rest(device, machine.wiring())?);
        if let Some(log) = machine.mappings().export_log() {
            items.extend(record::log(device, &log)?);
        }
        let kept = frozen.kept;
        let kept = record::Machine {
            stopped: kept.stopped,
            resets: kept.resets,
            precopy_reinit: kept.precopy_reinit,
            stays: kept.stays,
            until_ns: Some(deadline::to_shared(until)),
        };
        items.push(encode(kind::MACHINE, device, &kept)?);
        for (id, link, role, paused) in self.doors.paused() {
            // A control client connects again: it has no pending requests.
            if role != Some(Role::Control) {
                items.extend(connection::export(device, id, &link, &paused, &self.sockets)?);
            }
        }
        Ok(items)
    }

    /// The device continues here, and so do its clients. If this is late, the clients have already continued, and
    /// may be about to stop for another attempt.
    pub(super) fn thaw(mut self) {
        if let Some(frozen) = self.frozen.take() {
            self.machine.thaw(frozen);
        }
        self.copy.end(&self.machine);
    }
}
