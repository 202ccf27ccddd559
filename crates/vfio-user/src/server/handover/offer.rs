//! What a device is offered as, and how two devices differ.

use std::path::{Path, PathBuf};

use limosa_device::{Description, Region};
use limosa_protocol::MigrationFlags;
use limosa_switch_over::{Item, Refusal};

use super::listener::is_same;
use super::record::{Offer, broken, decode, kind};

/// A device that the old server offers.
pub(super) struct Offered {
    pub(super) offer: Offer,
    /// Where it listens.
    pub(super) socket: Option<PathBuf>,
}

impl Offered {
    /// The OFFER of the device with this number.
    pub(super) fn of(number: u16, item: Item) -> Result<Offered, Refusal> {
        if item.kind != kind::OFFER || item.device != number {
            return Err(broken(item.kind, item.device, &"an offer of each device in its order"));
        }
        let mut offer: Offer = decode(&item)?;
        let socket = offer.socket.take();
        Ok(Offered { offer, socket })
    }

    /// Whether this path, seen from this process, is its socket's.
    pub(super) fn is_at(&self, path: Option<&Path>) -> bool {
        path.zip(self.socket.as_deref()).is_some_and(|(ours, theirs)| is_same(ours, theirs))
    }

    /// How it is called in messages.
    pub(super) fn name(&self, number: usize) -> String {
        self.socket.as_ref().map_or_else(|| number.to_string(), |path| path.display().to_string())
    }
}

/// The device, for the new server to compare with its own.
pub(super) fn offer_of(description: &Description, migration: MigrationFlags) -> Offer {
    let regions = description.regions.iter().map(|region| {
        let mapping = region.mapping.as_ref().map(|mapping| (mapping.offset, mapping.areas.clone()));
        (region.flags.bits(), region.size, mapping)
    });
    let signals = |region: &Region| {
        region.ioeventfds.iter().map(|signal| (signal.offset, signal.size, signal.datamatch)).collect()
    };
    let ioeventfds = (0..).zip(&description.regions).filter(|(_, region)| !region.ioeventfds.is_empty());
    let irqs = description.irqs.iter().map(|irq| (irq.flags.bits(), irq.count));
    Offer {
        flags: description.device_info().flags,
        regions: regions.collect(),
        irqs: irqs.collect(),
        migration: migration.bits(),
        ioeventfds: ioeventfds.map(|(index, region)| (index, signals(region))).collect(),
        socket: None,
        has_client: false,
    }
}

/// How two devices differ, if they do.
pub(super) fn difference(theirs: &Offer, ours: &Offer) -> Option<String> {
    if theirs.regions.len() != ours.regions.len() || theirs.irqs.len() != ours.irqs.len() {
        return Some(format!(
            "it has {} regions and {} interrupt indexes, and the new device {} and {}",
            theirs.regions.len(),
            theirs.irqs.len(),
            ours.regions.len(),
            ours.irqs.len()
        ));
    }
    let region = theirs.regions.iter().zip(&ours.regions).position(|(theirs, ours)| theirs != ours);
    let irq = theirs.irqs.iter().zip(&ours.irqs).position(|(theirs, ours)| theirs != ours);
    if let Some(at) = region {
        return Some(format!(
            "region {at} is {:?}, and the new device's {:?}",
            theirs.regions[at], ours.regions[at]
        ));
    }
    if let Some(at) = irq {
        return Some(format!(
            "interrupt {at} is {:?}, and the new device's {:?}",
            theirs.irqs[at], ours.irqs[at]
        ));
    }
    if theirs.ioeventfds != ours.ioeventfds {
        let (theirs, ours) = (&theirs.ioeventfds, &ours.ioeventfds);
        return Some(format!("its client may signal {theirs:?}, and the new device's {ours:?}"));
    }
    if theirs.flags != ours.flags {
        return Some(format!("its flags are {:#x}, and the new device's {:#x}", theirs.flags, ours.flags));
    }
    let lost = theirs.migration & !ours.migration;
    (lost != 0).then(|| format!("its migration has the flags {lost:#x}, which the new device has not"))
}
