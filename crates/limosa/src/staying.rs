//! Devices that a VMM uses while they are moved from here: before COMMIT they are told to stay stopped, so that only the move's
//! decision lets them run again (`docs/vfio-user-extensions.md: STAY`). The end of this process alone would let them run.

use limosa_client::{DeviceExt, Result};
use limosa_protocol::FeatureOp;
use limosa_stream::MigrationId;
use limosa_vfio_user::client::Role;
use limosa_vfio_user::extension;

use crate::found;
use crate::moved::Moved;
use crate::moves::Moves;
use crate::open::Opened;
use crate::output::plain;

/// The command that lets a device run again which stays for a move that nothing is noted of.
pub fn way_back(name: &str, id: MigrationId) -> String {
    format!("limosa resolve {name} --id {id} --decide undone")
}

impl Opened {
    /// Whether a VMM uses the device, and this process is beside it.
    pub fn is_beside_vmm(&self) -> bool {
        self.vfio_user().is_some_and(|device| device.role() == Role::Control)
    }

    /// Has the device stay for this move, if a VMM uses it.
    pub fn stay(&self, id: MigrationId) -> Result<()> {
        match self.vfio_user().filter(|_| self.is_beside_vmm()) {
            Some(device) => device.stay(id.0),
            None => Ok(()),
        }
    }

    /// The move for which the device stays stopped; `None` also for a device that does not know this.
    pub fn stays_for(&self) -> Option<MigrationId> {
        let device = self.vfio_user()?;
        let id = device.probe(extension::STAY, FeatureOp::GET).ok()?.then(|| device.stays().ok());
        id.flatten().flatten().map(MigrationId)
    }

    /// Why a device stays stopped for a move, with the only command that lets it run; `None` for any other device.
    pub fn why_it_stays(&self, moves: &Moves) -> Option<String> {
        let (name, id) = (self.given(), self.stays_for()?);
        if let Some(what) = found::noted(name, moves) {
            return Some(format!("{name} stays stopped for move {id}: {what}"));
        }
        let done = match moves.last(name).filter(|moved| moved.id == id.to_string()) {
            Some(Moved { to, saved: true, .. }) => format!(", which is done: it was saved to {}", plain(&to)),
            Some(Moved { to, .. }) => format!(", which is done: it went to {}", plain(&to)),
            None => ", of which nothing is noted here".into(),
        };
        Some(format!(
            "{name} was given away with move {id}{done}. It stays stopped; only if its guest runs nowhere else, and never \
             will, let it run here with `{}`",
            way_back(name, id)
        ))
    }

    /// Lets it run again, if it stays for this move: the move is decided for this side.
    pub fn release(&self, id: MigrationId) -> Result<()> {
        let Some(device) = self.vfio_user() else { return Ok(()) };
        // Once its VMM has gone, the next client is the VMM.
        let may_stay = self.is_beside_vmm() || device.probe(extension::STAY, FeatureOp::SET)?;
        if may_stay && device.stays()? == Some(id.0) { device.release(id.0) } else { Ok(()) }
    }
}
