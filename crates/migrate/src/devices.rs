//! Devices in a move: their facts, how they are compared, and work that is done on all of them at once.

use limosa_client::{Device, DeviceExt};
use limosa_protocol::info::{DeviceFlags, pci_index};
use limosa_protocol::{MigrationFlags, State};

use crate::error::{Mismatch, MismatchKind};
use crate::{Error, Result};
use limosa_stream::printable;
use limosa_stream::{DeviceFacts, MemoryFacts, NAME_BYTES_MAX, PciIds, REGIONS_MAX};

/// A device that is to be moved, or to which a device is moved.
#[derive(Clone)]
#[non_exhaustive]
pub struct MovedDevice<'a> {
    /// The device.
    pub device: &'a dyn Device,
    /// The kind of device, in its owner's words. If both sides name one, it must be the same.
    pub kind: Option<String>,
    /// How many bytes of data to expect from the device after the stop, if it does not report that itself (it has no
    /// MIG_DATA_SIZE). For example what its last move took ([`DeviceReport`](crate::DeviceReport): `bytes` less
    /// `precopy_bytes`).
    pub stop_bytes: Option<u64>,
}

impl<'a> MovedDevice<'a> {
    /// A device without further description.
    pub fn new(device: &'a dyn Device) -> MovedDevice<'a> {
        MovedDevice { device, kind: None, stop_bytes: None }
    }

    /// The same with another [`kind`](Self::kind).
    #[must_use]
    pub fn with_kind(self, kind: Option<String>) -> MovedDevice<'a> {
        MovedDevice { kind, ..self }
    }

    /// The same with another [`stop_bytes`](Self::stop_bytes).
    #[must_use]
    pub fn with_stop_bytes(self, stop_bytes: Option<u64>) -> MovedDevice<'a> {
        MovedDevice { stop_bytes, ..self }
    }
}

impl std::fmt::Debug for MovedDevice<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MovedDevice").field("name", &self.device.name()).field("kind", &self.kind).finish()
    }
}

/// A device's error, as an error of the engine.
pub(crate) fn failed(device: &dyn Device, doing: &str, error: limosa_client::Error) -> Error {
    Error::Device { device: device.name().into(), doing: doing.into(), error }
}

/// Calls `act` for every device, each in a thread of its own if the system starts one, and waits for all calls. The results
/// are in the order of the devices.
pub(crate) fn each<'a, T: Send>(
    devices: &[MovedDevice<'a>],
    act: impl Fn(usize, &'a dyn Device) -> T + Sync,
) -> Vec<T> {
    limosa_clockwork::scope(|scope| {
        let act = &act;
        let started: Vec<_> = (devices.iter().enumerate().skip(1))
            .map(|(at, moved)| {
                let device = moved.device;
                scope.try_spawn(format!("limosa: {}", device.name()), move || act(at, device))
            })
            .collect();
        let first = devices.first().map(|moved| act(0, moved.device));
        let others =
            started.into_iter().zip(devices.iter().enumerate().skip(1)).map(|(thread, (at, moved))| {
                match thread {
                    Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                    Err(_) => act(at, moved.device),
                }
            });
        first.into_iter().chain(others).collect()
    })
}

/// Reads a device's facts without changing it. A fact that it refuses to tell is not known. A lost connection is an error.
pub(crate) fn facts(id: u32, moved: &MovedDevice<'_>) -> Result<DeviceFacts> {
    let device = moved.device;
    let lost = |error| failed(device, "reading its facts", error);
    let cut = |text: &str| {
        let end = (0..=text.len().min(NAME_BYTES_MAX)).rev().find(|end| text.is_char_boundary(*end));
        text[..end.unwrap_or(0)].to_string()
    };
    let flags = device.migration_flags().map_err(lost)?;
    let mut facts = DeviceFacts {
        id,
        name: cut(device.name()),
        kind: moved.kind.as_deref().map(cut),
        flags: flags.bits(),
        ..Default::default()
    };
    facts.data_bytes = known(device.mig_data_size()).map_err(lost)?.flatten();
    let Some(info) = known(device.info()).map_err(lost)? else { return Ok(facts) };
    if info.num_regions as usize > REGIONS_MAX || info.num_irqs as usize > REGIONS_MAX {
        return Ok(facts);
    }
    let regions = (0..info.num_regions).map(|index| Ok(device.region(index)?.info.size));
    facts.regions = known(regions.collect()).map_err(lost)?;
    let irqs = (0..info.num_irqs).map(|index| Ok(device.irq(index)?.count));
    facts.irqs = known(irqs.collect()).map_err(lost)?;
    let is_pci = DeviceFlags::from_bits_retain(info.flags).contains(DeviceFlags::PCI);
    let has_config = facts.regions.as_ref().and_then(|sizes| sizes.get(pci_index::CONFIG as usize));
    if is_pci && has_config.is_some_and(|bytes| *bytes >= 64) {
        let mut config = [0; 64];
        let read = device.region_read(pci_index::CONFIG, 0, &mut config);
        facts.pci = known(read).map_err(lost)?.map(|()| pci_ids(&config));
    }
    Ok(facts)
}

/// Turns a refusal into "not known".
fn known<T>(answer: limosa_client::Result<T>) -> limosa_client::Result<Option<T>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.is_connection_lost() => Err(error),
        Err(_) => Ok(None),
    }
}

/// The identification in a type 0 header (PCI Local Bus 3.0, 6.2.1).
fn pci_ids(config: &[u8; 64]) -> PciIds {
    let word = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
    PciIds {
        vendor: word(0x00),
        device: word(0x02),
        subsystem_vendor: word(0x2c),
        subsystem_device: word(0x2e),
        class: u32::from_le_bytes([config[0x09], config[0x0a], config[0x0b], 0]),
        revision: config[0x08],
    }
}

/// Advice about a device in a state in which nothing can be moved from or to it.
pub fn way_out_of(state: State) -> &'static str {
    match state {
        State::PreCopy | State::PreCopyP2p | State::StopCopy => {
            "its guest is being moved or saved from here, or the process that moved it has died: then drive it to RUNNING, which \
             brings its guest back"
        }
        State::Resuming => {
            "a state is being loaded into it, or the process that loaded it has died: then reset it"
        }
        State::Error => "no arc leads out of it; a reset does, and its state is lost with that",
        State::RunningP2p | State::Running | State::Stop => "drive it to RUNNING",
    }
}

/// Checks that this device can be moved at all. The error is the reason.
pub(crate) fn check_movable(facts: &DeviceFacts) -> Result<(), Mismatch> {
    let flags = MigrationFlags::from_bits_retain(facts.flags);
    if flags.contains(MigrationFlags::STOP_COPY) {
        return Ok(());
    }
    let message =
        format!("{}: it has no migration (flags {flags}, STOP_COPY is needed)", printable(&facts.name));
    Err(Mismatch::new(MismatchKind::NoMigration, message))
}

/// The reasons why the source's devices cannot move to the destination's, in the words of a destination: all that can
/// be known before any data is transferred. Empty if there are none. Reads facts of both sides, and changes nothing.
pub fn compare(source: &[MovedDevice<'_>], destination: &[MovedDevice<'_>]) -> Result<Vec<Mismatch>> {
    let of = |devices: &[MovedDevice<'_>]| -> Result<Vec<DeviceFacts>> {
        devices.iter().zip(0..).map(|(moved, id)| facts(id, moved)).collect()
    };
    let (theirs, here) = (of(source)?, of(destination)?);
    let not_movable = theirs.iter().filter_map(|facts| check_movable(facts).err());
    Ok(not_movable.chain(compare_devices(&theirs, &here)).collect())
}

/// The reasons why the source's devices cannot be moved to these. Empty if they can.
pub(crate) fn compare_devices(source: &[DeviceFacts], here: &[DeviceFacts]) -> Vec<Mismatch> {
    let mut reasons = Vec::new();
    if source.len() != here.len() {
        let message = format!("the source has {} devices, the destination {}", source.len(), here.len());
        reasons.push(Mismatch::new(MismatchKind::DeviceCount, message));
    }
    for (theirs, mine) in source.iter().zip(here) {
        let (from, named) = (printable(&theirs.name), printable(&mine.name));
        let mut differ = |kind, what: &str, theirs: String, mine: String| {
            let theirs = printable(&theirs);
            let message = format!("{from} -> {named}: the source's {what} is {theirs}, this one's is {mine}");
            reasons.push(Mismatch::new(kind, message));
        };
        if let (Some(theirs), Some(mine)) = (&theirs.kind, &mine.kind)
            && theirs != mine
        {
            differ(MismatchKind::DeviceKind, "kind", theirs.clone(), mine.clone());
        }
        if let (Some(theirs), Some(mine)) = (theirs.pci, mine.pci)
            && (PciIds { revision: 0, ..theirs }) != (PciIds { revision: 0, ..mine })
        {
            differ(MismatchKind::Pci, "PCI identification", print_ids(&theirs), print_ids(&mine));
        }
        if let (Some(theirs), Some(mine)) = (&theirs.regions, &mine.regions)
            && theirs != mine
        {
            differ(MismatchKind::Regions, "list of region sizes", format!("{theirs:?}"), format!("{mine:?}"));
        }
        if let (Some(theirs), Some(mine)) = (&theirs.irqs, &mine.irqs)
            && theirs != mine
        {
            differ(
                MismatchKind::Irqs,
                "list of interrupt vectors",
                format!("{theirs:?}"),
                format!("{mine:?}"),
            );
        }
    }
    reasons.extend(here.iter().filter_map(|mine| check_movable(mine).err()));
    reasons
}

fn print_ids(ids: &PciIds) -> String {
    let PciIds { vendor, device, subsystem_vendor, subsystem_device, class, .. } = ids;
    format!("{vendor:04x}:{device:04x} ({subsystem_vendor:04x}:{subsystem_device:04x}, class {class:06x})")
}

/// The differences between the source's memory and this one. Empty if there are none.
pub(crate) fn compare_memory(source: &[MemoryFacts], here: &[MemoryFacts]) -> Vec<Mismatch> {
    let differs = |message| Mismatch::new(MismatchKind::Memory, message);
    let print = |facts: &MemoryFacts| format!("{:#x} bytes at {:#x}", facts.bytes, facts.address);
    let with = |among: &[MemoryFacts], id| among.iter().find(|facts| facts.id == id).copied();
    let only = |side, facts: &MemoryFacts| {
        differs(format!("only the {side} has memory {} of {}", facts.id, print(facts)))
    };
    let mut reasons = Vec::new();
    for theirs in source {
        let (id, Some(mine)) = (theirs.id, with(here, theirs.id)) else {
            reasons.push(only("source", theirs));
            continue;
        };
        if (theirs.address, theirs.bytes) != (mine.address, mine.bytes) {
            reasons.push(differs(format!(
                "memory {id}: the source has {}, the destination {}",
                print(theirs),
                print(&mine)
            )));
        }
        if theirs.page_bytes != mine.page_bytes {
            reasons.push(differs(format!(
                "memory {id}: the source has pages of {} bytes, the destination of {}",
                theirs.page_bytes, mine.page_bytes
            )));
        }
    }
    let ours = here.iter().filter(|mine| with(source, mine.id).is_none());
    reasons.extend(ours.map(|mine| only("destination", mine)));
    // The source's own regions were checked when its offer was read.
    for (at, mine) in here.iter().enumerate() {
        if let Some(other) = here[..at].iter().find(|other| other.id == mine.id || other.overlaps(mine)) {
            reasons.push(differs(format!(
                "the destination's memory {} of {} and memory {} of {} cannot be one guest's",
                other.id,
                print(other),
                mine.id,
                print(mine)
            )));
        }
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(id: u32, address: u64, bytes: u64) -> MemoryFacts {
        MemoryFacts { id, address, bytes, page_bytes: 4096 }
    }

    #[test]
    fn memory_maps_that_differ_are_told_apart_by_what_differs() {
        let (low, high) = (part(0, 0, 0x8000), part(1, 1 << 32, 0x8000));
        let refused = |source: &[MemoryFacts], here: &[MemoryFacts], expected: &[&str]| {
            let reasons = compare_memory(source, here);
            assert_eq!(reasons.len(), expected.len(), "{reasons:?}");
            for (reason, expected) in reasons.iter().zip(expected) {
                assert!(reason.message.contains(expected), "{expected}: {reason}");
            }
        };
        refused(&[low, high], &[low, high], &[]);
        refused(&[low, high], &[high, low], &[]);
        refused(&[low, high], &[low], &["only the source has memory 1 of 0x8000 bytes at 0x100000000"]);
        refused(&[low], &[low, high], &["only the destination has memory 1"]);
        let longer = part(0, 0, 0x9000);
        refused(&[low], &[longer], &["memory 0: the source has 0x8000 bytes at 0x0, the destination 0x9000"]);
        let elsewhere = part(0, 0x1000, 0x8000);
        refused(&[low], &[elsewhere], &["bytes at 0x0, the destination 0x8000 bytes at 0x1000"]);
        let with_holes = [part(0, 0, 0x4000), part(1, 0x6000, 0x2000)];
        refused(&[low], &with_holes, &["memory 0", "only the destination has memory 1"]);
        let large = MemoryFacts { page_bytes: 65536, ..part(0, 0, 0x10000) };
        let small = part(0, 0, 0x10000);
        refused(&[large], &[small], &["pages of 65536 bytes, the destination of 4096"]);
        let over = part(1, 0x7000, 0x8000);
        refused(&[low, over], &[low, over], &["memory 0 of 0x8000 bytes at 0x0 and memory 1 of"]);
        refused(&[low], &[low, low], &["cannot be one guest's"]);
        let last = part(1, u64::MAX - 0xfff, 0x1000);
        refused(&[low, last], &[low, last], &[]);
    }
}
