//! What a device is offered as, and how two devices differ.

use limosa_device::Description;
use limosa_protocol::MigrationFlags;

use super::record::Offer;

/// The device, for the new server to compare with its own.
pub(super) fn offer_of(description: &Description, migration: MigrationFlags) -> Offer {
    let regions = description.regions.iter().map(|region| {
        let mapping = region.mapping.as_ref().map(|mapping| (mapping.offset, mapping.areas.clone()));
        (region.flags.bits(), region.size, mapping)
    });
    let irqs = description.irqs.iter().map(|irq| (irq.flags.bits(), irq.count));
    Offer {
        flags: description.device_info().flags,
        regions: regions.collect(),
        irqs: irqs.collect(),
        migration: migration.bits(),
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
    if theirs.flags != ours.flags {
        return Some(format!("its flags are {:#x}, and the new device's {:#x}", theirs.flags, ours.flags));
    }
    let lost = theirs.migration & !ours.migration;
    (lost != 0).then(|| format!("its migration has the flags {lost:#x}, which the new device has not"))
}
