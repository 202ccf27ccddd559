//! The offer of a device, and the differences of two devices.

use std::path::{Path, PathBuf};

use limosa_device::{Description, Region};
use limosa_protocol::MigrationFlags;
use limosa_protocol::info::{DeviceFlags, IrqFlags, RegionFlags};
use limosa_switch_over::{Item, Refusal};

use super::listener::is_same;
use super::record::{Offer, OfferedRegion, broken, decode, kind};

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
        model: None,
    }
}

/// How two devices differ, if they do.
pub(super) fn difference(theirs: &Offer, ours: &Offer) -> Option<String> {
    if let (Some(theirs), Some(ours)) = (&theirs.model, &ours.model)
        && theirs != ours
    {
        return Some(format!("it is of the kind {theirs}, and the new device of the kind {ours}"));
    }
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
    let ioeventfds = |offer: &Offer, index| offer.ioeventfds.get(&index).cloned().unwrap_or_default();
    let signals = (0..).take(theirs.regions.len()).find_map(|index| {
        let (theirs, ours) = (ioeventfds(theirs, index), ioeventfds(ours, index));
        (theirs != ours).then(|| (index, registers(&theirs), registers(&ours)))
    });
    let lost = theirs.migration & !ours.migration;
    if let Some(at) = region {
        let (theirs, ours) = (&theirs.regions[at], &ours.regions[at]);
        Some(format!(
            "region {at} has {}, and that of the new device {}",
            region_in_words(theirs, ours),
            region_in_words(ours, theirs)
        ))
    } else if let Some(at) = irq {
        let (theirs, ours) = (irq_in_words(theirs.irqs[at]), irq_in_words(ours.irqs[at]));
        Some(format!("interrupt index {at} has {theirs}, and that of the new device {ours}"))
    } else if let Some((index, theirs, ours)) = signals {
        let what = "may be written by eventfds";
        Some(format!("in region {index} {theirs} {what}, and in that of the new device {ours}"))
    } else if theirs.flags != ours.flags {
        let (theirs, ours) =
            (DeviceFlags::from_bits_retain(theirs.flags), DeviceFlags::from_bits_retain(ours.flags));
        Some(format!(
            "it has the flags {}, and the new device {}",
            named(theirs.iter_names()),
            named(ours.iter_names())
        ))
    } else if lost != 0 {
        let lost = MigrationFlags::from_bits_retain(lost);
        Some(format!("its migration has {}, which that of the new device lacks", named(lost.iter_names())))
    } else {
        None
    }
}

/// The property in which two regions differ, in words.
fn region_in_words(
    (flags, bytes, mapping): &OfferedRegion,
    (other_flags, other_bytes, _): &OfferedRegion,
) -> String {
    if bytes != other_bytes {
        return format!("{bytes} bytes");
    }
    if flags != other_flags {
        return format!("the flags {}", named(RegionFlags::from_bits_retain(*flags).iter_names()));
    }
    match mapping {
        None => "no part that can be mapped".into(),
        Some((offset, areas)) if areas.is_empty() => {
            format!("its file from byte {offset} on, all of which can be mapped")
        }
        Some((offset, areas)) => {
            let areas: Vec<_> = areas.iter().map(|(at, bytes)| format!("{bytes} bytes at {at}")).collect();
            format!("its file from byte {offset} on, of which can be mapped {}", areas.join(", "))
        }
    }
}

fn irq_in_words((flags, vectors): (u32, u32)) -> String {
    let flags = IrqFlags::from_bits_retain(flags);
    format!("{vectors} vectors and the flags {}", named(flags.iter_names()))
}

/// The registers that a client may signal instead of writing.
fn registers(signals: &[(u64, u64, Option<u64>)]) -> String {
    let register = |(offset, bytes, value): &(u64, u64, Option<u64>)| {
        let value = value.map(|value| format!(" of the value {value:#x}")).unwrap_or_default();
        format!("{bytes} bytes at {offset}{value}")
    };
    match signals {
        [] => "nothing".into(),
        signals => signals.iter().map(register).collect::<Vec<_>>().join(", "),
    }
}

/// The names of flags.
fn named<T>(flags: impl Iterator<Item = (&'static str, T)>) -> String {
    let names: Vec<_> = flags.map(|(name, _)| name).collect();
    if names.is_empty() { "none".into() } else { names.join(" ") }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn offer() -> Offer {
        Offer {
            flags: DeviceFlags::RESET.bits(),
            regions: vec![(3, 8, None), (7, 4096, Some((0, Vec::new())))],
            irqs: vec![(1, 1)],
            migration: MigrationFlags::STOP_COPY.bits(),
            ioeventfds: BTreeMap::from([(0, vec![(0, 4, None)])]),
            socket: None,
            has_client: false,
            model: Some("uart".into()),
        }
    }

    #[track_caller]
    fn differs(change: impl FnOnce(&mut Offer), message: &str) {
        let mut ours = offer();
        change(&mut ours);
        assert_eq!(difference(&offer(), &ours).as_deref(), Some(message));
    }

    #[test]
    fn each_difference_is_said_in_words() {
        assert_eq!(difference(&offer(), &offer()), None);
        assert_eq!(difference(&Offer { model: None, ..offer() }, &offer()), None, "an older server");
        differs(
            |ours| ours.model = Some("disk".into()),
            "it is of the kind uart, and the new device of the kind disk",
        );
        differs(
            |ours| ours.regions.truncate(1),
            "it has 2 regions and 1 interrupt indexes, and the new device 1 and 1",
        );
        differs(|ours| ours.regions[0].1 = 16, "region 0 has 8 bytes, and that of the new device 16 bytes");
        differs(
            |ours| ours.regions[0].0 = 1,
            "region 0 has the flags READ WRITE, and that of the new device the flags READ",
        );
        differs(
            |ours| ours.regions[1].2 = Some((0, vec![(0, 4096)])),
            "region 1 has its file from byte 0 on, all of which can be mapped, and that of the new device its file from byte 0 on, \
             of which can be mapped 4096 bytes at 0",
        );
        differs(
            |ours| ours.irqs[0] = (3, 2),
            "interrupt index 0 has 1 vectors and the flags EVENTFD, and that of the new device 2 vectors and the flags EVENTFD \
             MASKABLE",
        );
        differs(
            |ours| ours.ioeventfds = BTreeMap::from([(0, vec![(0, 4, Some(1))])]),
            "in region 0 4 bytes at 0 may be written by eventfds, and in that of the new device 4 bytes at 0 of the value 0x1",
        );
        differs(
            |ours| ours.ioeventfds.clear(),
            "in region 0 4 bytes at 0 may be written by eventfds, and in that of the new device nothing",
        );
        differs(|ours| ours.flags = 0, "it has the flags RESET, and the new device none");
        differs(|ours| ours.migration = 0, "its migration has STOP_COPY, which that of the new device lacks");
    }
}
