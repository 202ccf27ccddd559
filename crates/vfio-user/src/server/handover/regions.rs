//! The files behind mappable regions: the new device uses the same file, so that a client's mapping stays valid.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use limosa_device::Machine;
use limosa_switch_over::{Item, Refusal};
use rustix::fs::{fcntl_get_seals, fstat};

use super::record::{broken, copy, kind};

/// The files that were handed over.
#[derive(Debug, Default)]
pub(super) struct GivenFiles(BTreeMap<u32, Arc<OwnedFd>>);

impl GivenFiles {
    /// Those that were not, or are others since.
    pub(super) fn more(&mut self, device: u16, machine: &Machine) -> Result<Vec<Item>, Refusal> {
        let mut items = Vec::new();
        for index in 0..machine.description().regions.len() as u32 {
            let Some(file) = machine.region_file(index) else { continue };
            if self.0.get(&index).is_some_and(|given| Arc::ptr_eq(given, &file)) {
                continue;
            }
            let item = Item::new(kind::REGION_FILE, device, index.to_ne_bytes().to_vec());
            items.push(item.with_fds([copy(&*file)?]));
            self.0.insert(index, file);
        }
        Ok(items)
    }
}

/// The received files, by region. Each was checked.
#[derive(Debug, Default)]
pub(super) struct CameFiles(BTreeMap<u32, Arc<OwnedFd>>);

impl CameFiles {
    /// REGION_FILE; a later one replaces an earlier one.
    pub(super) fn add(&mut self, mut item: Item, machine: &Machine) -> Result<(), Refusal> {
        let wrong = |what: &str| broken(item.kind, item.device, &what);
        let index = <[u8; 4]>::try_from(item.bytes.as_slice()).map(u32::from_ne_bytes);
        let index = index.map_err(|_| wrong("it names no region"))?;
        let own = machine.region_file(index).ok_or_else(|| wrong("its region cannot be mapped"))?;
        let (Some(file), 0) = (item.fds.pop(), item.fds.len()) else {
            return Err(wrong("not one file"));
        };
        let file = file.into_memory().map_err(|_| wrong("a file that is not memory"))?;
        let failed = |errno: rustix::io::Errno| {
            Refusal::of_device(item.device, format!("the file of region {index} cannot be examined: {errno}"))
        };
        // The file has to have the properties of the new device's own file.
        let (expected, found) =
            (fstat(&*own).map_err(failed)?.st_size, fstat(&file).map_err(failed)?.st_size);
        let own_seals = fcntl_get_seals(&*own).map_err(failed)?;
        let missing = own_seals - fcntl_get_seals(&file).map_err(failed)?;
        if found < expected || !missing.is_empty() {
            let what = format!(
                "the file of region {index} has {found} bytes and lacks the seals {:#x}; expected {expected} bytes \
                 and the seals of the new device's own file",
                missing.bits()
            );
            return Err(Refusal::of_device(item.device, what));
        }
        self.0.insert(index, Arc::new(file));
        Ok(())
    }

    /// Gives them to the device: each mappable region must have one.
    pub(super) fn adopt(self, device: u16, machine: &Machine) -> Result<(), Refusal> {
        let mut files = self.0;
        let regions = (0..).zip(&machine.description().regions);
        // A model that panics has no file to say, and is refused all the same.
        for (index, _) in regions.filter(|(_, region)| region.mapping.is_some()) {
            let missing = || format!("the old server did not hand over the file of region {index}");
            let file = files.remove(&index).ok_or_else(|| Refusal::of_device(device, missing()))?;
            machine.adopt_region_file(index, file).map_err(|errno| {
                Refusal::of_device(
                    device,
                    format!("the new device does not take the file of region {index}: {errno}"),
                )
            })?;
        }
        Ok(())
    }
}

/// Refuses a device with mappable regions, if it cannot adopt their files.
pub(super) fn check(device: u16, machine: &Machine) -> Result<(), Refusal> {
    let mapped = machine.description().regions.iter().position(|region| region.mapping.is_some());
    match mapped {
        Some(index) if !machine.adopts_region_files() => Err(Refusal::of_device(
            device,
            format!("its client may have mapped region {index}, whose file the new device does not take"),
        )),
        _ => Ok(()),
    }
}
