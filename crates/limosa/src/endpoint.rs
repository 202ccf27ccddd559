//! [`Endpoint`]: the devices and the guest memory of one side of a move, opened, in the order in which the user named them.

use limosa_client::DeviceExt;
use limosa_migrate::MovedDevice;
use limosa_stream::{DEVICES_MAX, MEMORY_REGIONS_MAX};

use crate::args::{Memory, Stopping};
use crate::exit::{self, Code};
use crate::memory::{self, DestinationPages, OpenMemory, SourcePages};
use crate::open::{self, Opened, Opening};

/// The devices and the guest memory of one side of a move.
pub struct Endpoint {
    devices: Vec<Opened>,
    memory: Vec<OpenMemory>,
}

impl Endpoint {
    /// Opens everything that is moved from here.
    pub fn source(
        opening: Opening<'_>,
        names: &[&str],
        memory: &[Memory],
        stopping: &Stopping,
    ) -> anyhow::Result<Endpoint> {
        check_count(names, memory)?;
        if !memory.is_empty() && !stopping.stops_the_guest() && !stopping.guest_stopped {
            let what = "--memory: what the guest writes while the rest of it is moved would be lost; expected --stop-with \
                        PID or --on-stop COMMAND, which stop the guest, or --guest-stopped if it stands still already";
            return Err(exit::error(Code::Usage, what));
        }
        Ok(Endpoint { devices: open_all(opening, names)?, memory: memory::open(memory, OpenMemory::source)? })
    }

    /// Opens everything that is moved to.
    pub fn destination(opening: Opening<'_>, names: &[&str], memory: &[Memory]) -> anyhow::Result<Endpoint> {
        check_count(names, memory)?;
        Ok(Endpoint {
            devices: open_all(opening, names)?,
            memory: memory::open(memory, OpenMemory::destination)?,
        })
    }

    /// The parts of memory, in the order of their addresses.
    pub fn memory(&self) -> &[OpenMemory] {
        &self.memory
    }

    /// The memory, to be read.
    pub fn source_pages(&self, stopping: &Stopping) -> anyhow::Result<SourcePages> {
        SourcePages::new(&self.memory, !stopping.guest_stopped)
    }

    /// The memory, to be written.
    pub fn destination_pages(&self) -> anyhow::Result<DestinationPages> {
        DestinationPages::new(&self.memory)
    }

    /// The devices in the engine's form.
    pub fn moved(&self) -> Vec<MovedDevice<'_>> {
        self.devices.iter().map(|device| MovedDevice::new(&**device)).collect()
    }

    /// The devices.
    pub fn devices(&self) -> &[Opened] {
        &self.devices
    }

    /// The amount to move from here: the guest's memory, and the sizes that devices report. `None` if a device reports none.
    pub fn total_bytes(&self) -> Option<u64> {
        let devices = self.devices.iter().map(|device| device.mig_data_size().ok().flatten());
        let memory = self.memory.iter().map(|part| Some(part.size()));
        devices.chain(memory).sum()
    }

    /// The names of the devices and the memory, for messages.
    pub fn name(&self) -> String {
        match self.devices.as_slice() {
            [] => "the guest's memory".into(),
            devices => devices.iter().map(Opened::given).collect::<Vec<_>>().join(", "),
        }
    }
}

/// Refuses more than a stream can describe, before anything is opened (`docs/stream.md: Limits`).
fn check_count(names: &[&str], memory: &[Memory]) -> anyhow::Result<()> {
    let too_many = |count: usize, what: &str, most: usize| {
        Err(exit::error(Code::Usage, format!("{count} {what} in one move; expected {most} at most")))
    };
    match (names.len(), memory.len()) {
        (devices, _) if devices > DEVICES_MAX => too_many(devices, "devices", DEVICES_MAX),
        (_, parts) if parts > MEMORY_REGIONS_MAX => too_many(parts, "parts of memory", MEMORY_REGIONS_MAX),
        _ => Ok(()),
    }
}

fn open_all(opening: Opening<'_>, names: &[&str]) -> anyhow::Result<Vec<Opened>> {
    all_different(names)?;
    names.iter().map(|name| opening.open(name)).collect()
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
