//! The eventfds of regions (`vfio-user.rst: VFIO_USER_DEVICE_GET_REGION_IO_FDS`): the new device uses the eventfds that
//! a client has. Signals that arrive while the device does not run stay in them.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use limosa_device::Machine;
use limosa_switch_over::{ITEM_FDS_MAX, Item, Refusal};

use super::record::{broken, copy, decode, encode, kind};

/// A region, and for each of its eventfds the number of its fd in the item.
type Numbers = (u32, Vec<usize>);

/// Those of a device.
pub(super) fn given(device: u16, machine: &Machine) -> Result<Vec<Item>, Refusal> {
    let mut items = Vec::new();
    for region in 0..machine.description().regions.len() as u32 {
        let (mut distinct, mut numbers) = (Vec::<Arc<OwnedFd>>::new(), Vec::new());
        for signal in machine.ioeventfds(region) {
            let known = distinct.iter().position(|fd| Arc::ptr_eq(fd, &signal.fd));
            numbers.push(known.unwrap_or_else(|| {
                distinct.push(signal.fd);
                distinct.len() - 1
            }));
        }
        if distinct.len() > ITEM_FDS_MAX {
            let count = distinct.len();
            let what = format!("region {region} has {count} eventfds; expected {ITEM_FDS_MAX} at most");
            return Err(Refusal::of_device(device, what));
        }
        if !numbers.is_empty() {
            let fds = distinct.iter().map(copy).collect::<Result<Vec<_>, _>>()?;
            items.push(encode(kind::IOEVENTFDS, device, &(region, numbers))?.with_fds(fds));
        }
    }
    Ok(items)
}

/// The received eventfds, by region.
#[derive(Debug, Default)]
pub(super) struct CameSignals(BTreeMap<u32, Vec<Arc<OwnedFd>>>);

impl CameSignals {
    /// IOEVENTFDS.
    pub(super) fn add(&mut self, mut item: Item) -> Result<(), Refusal> {
        let wrong = |what: &str| broken(item.kind, item.device, &what);
        let (region, numbers): Numbers = decode(&item)?;
        let distinct = item.fds.drain(..).map(|fd| fd.into_eventfd().map(Arc::new));
        let distinct = distinct
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| broken(kind::IOEVENTFDS, item.device, &"a file that is no eventfd"))?;
        let fds = numbers.iter().map(|number| distinct.get(*number).cloned()).collect::<Option<Vec<_>>>();
        let fds = fds.ok_or_else(|| wrong("an eventfd that did not come"))?;
        self.0.insert(region, fds);
        Ok(())
    }

    /// Gives them to the device: each region with eventfds must have received them.
    pub(super) fn adopt(self, device: u16, machine: &Machine) -> Result<(), Refusal> {
        let mut came = self.0;
        for region in with_signals(machine) {
            let missing = || format!("the old server did not hand over the eventfds of region {region}");
            let fds = came.remove(&region).ok_or_else(|| Refusal::of_device(device, missing()))?;
            machine.adopt_ioeventfds(region, fds).map_err(|errno| {
                let what = format!("the new device does not take the eventfds of region {region}: {errno}");
                Refusal::of_device(device, what)
            })?;
        }
        Ok(())
    }
}

/// Refuses a device whose client may signal eventfds, if it cannot adopt them.
pub(super) fn check(device: u16, machine: &Machine) -> Result<(), Refusal> {
    match with_signals(machine).next() {
        Some(region) if !machine.adopts_ioeventfds() => {
            let what = format!(
                "its client may signal eventfds of region {region}, which the new device cannot adopt"
            );
            Err(Refusal::of_device(device, what))
        }
        _ => Ok(()),
    }
}

/// The regions that have eventfds.
fn with_signals(machine: &Machine) -> impl Iterator<Item = u32> {
    let regions = (0..).zip(&machine.description().regions);
    regions.filter(|(_, region)| !region.ioeventfds.is_empty()).map(|(index, _)| index)
}
