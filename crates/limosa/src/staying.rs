//! Devices that a VMM uses while they are moved from here: before COMMIT they are told to stay stopped, so that only the move's
//! decision lets them run again (`docs/vfio-user-extensions.md: STAY`). The end of this process alone would let them run.

use limosa_client::{DeviceExt, Result};
use limosa_protocol::FeatureOp;
use limosa_stream::MigrationId;
use limosa_vfio_user::client::Role;
use limosa_vfio_user::extension;

use crate::open::Opened;

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

    /// Lets it run again, if it stays for this move: the move is decided for this side.
    pub fn release(&self, id: MigrationId) -> Result<()> {
        let Some(device) = self.vfio_user() else { return Ok(()) };
        // Once its VMM has gone, the next client is the VMM.
        let may_stay = self.is_beside_vmm() || device.probe(extension::STAY, FeatureOp::SET)?;
        if may_stay && device.stays()? == Some(id.0) { device.release(id.0) } else { Ok(()) }
    }
}
