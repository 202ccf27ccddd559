//! What one side of a move has: the devices that a user named, open, in their order.

use limosa_migrate::MovedDevice;

use crate::exit::{self, Code};
use crate::open::{self, Opened, Opening};

/// One side of a move.
pub struct Side {
    devices: Vec<Opened>,
}

impl Side {
    /// Opens all that was named on this side.
    pub fn open(opening: Opening, names: &[&str]) -> anyhow::Result<Side> {
        all_different(names)?;
        let devices = names.iter().map(|name| opening.open(name)).collect::<anyhow::Result<_>>()?;
        Ok(Side { devices })
    }

    /// The devices, as the engine takes them.
    pub fn moved(&self) -> Vec<MovedDevice<'_>> {
        self.devices.iter().map(|device| MovedDevice::new(&**device)).collect()
    }

    /// The devices.
    pub fn devices(&self) -> &[Opened] {
        &self.devices
    }

    /// What is on this side, for messages.
    pub fn name(&self) -> String {
        let names: Vec<_> = self.devices.iter().map(Opened::given).collect();
        names.join(", ")
    }
}

/// Refuses one device under two names, or named twice.
pub fn all_different(names: &[&str]) -> anyhow::Result<()> {
    for (at, name) in names.iter().enumerate() {
        if let Some(other) = names[..at].iter().find(|other| open::same(other, name)) {
            let what = format!("{other} and {name} are the same device; expected different ones");
            return Err(exit::error(Code::Usage, what));
        }
    }
    Ok(())
}
