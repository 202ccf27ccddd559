//! [`list`]: the VFIO devices of this machine, as sysfs has them. Nothing is opened.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use crate::find::{Found, Roots, entries};
use crate::{Group, Unusable};

/// A device that a VFIO driver has, or a mediated device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What its bus calls it, which is also a [`Name`](crate::Name): a PCI address, a UUID.
    pub id: String,
    /// Its bus: `pci`, `mdev`.
    pub bus: String,
    /// Its folder in sysfs, without links: what tells one device from another, whatever it is called.
    pub folder: PathBuf,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<Group>,
    /// Its own node, `/dev/vfio/devices/vfioN`, where the kernel has such.
    pub cdev: Option<PathBuf>,
    /// Why it cannot be opened, as far as that can be seen from outside: nobody but the kernel knows whether it is
    /// open elsewhere.
    pub unusable: Option<Unusable>,
}

/// Every device that a VFIO driver has, and every mediated device, bus by bus and in the order of their names.
pub fn list() -> Vec<Listed> {
    list_below(&Roots::default())
}

pub(crate) fn list_below(roots: &Roots) -> Vec<Listed> {
    let registered = roots.sys.join("class/vfio-dev");
    let registered = entries(&registered).into_iter().map(|name| registered.join(name).join("device"));
    // Kernels before 6.1 have no such class.
    let buses = ["pci", "mdev"].map(|bus| roots.bus(bus));
    let on_bus = buses.iter().flat_map(|bus| entries(bus).into_iter().map(move |id| bus.join(id)));
    let mut found: Vec<Found> = registered.chain(on_bus).filter_map(|path| roots.look(&path)).collect();
    found.retain(|found| found.vfio || found.bus == "mdev");
    found.sort_by(|a, b| (&a.bus, &a.id, &a.folder).cmp(&(&b.bus, &b.id, &b.folder)));
    found.dedup_by(|a, b| a.folder == b.folder);
    found.into_iter().map(|found| listed(roots, found)).collect()
}

fn listed(roots: &Roots, found: Found) -> Listed {
    let unusable = Unusable::by_sysfs(roots, &found).or_else(|| by_nodes(roots, &found));
    let Found { id, bus, folder, driver, group, cdev, .. } = found;
    Listed { id, bus, folder, driver, group, cdev, unusable }
}

/// What the nodes tell: one of the two is enough.
fn by_nodes(roots: &Roots, found: &Found) -> Option<Unusable> {
    let nodes: Vec<PathBuf> =
        found.cdev.iter().cloned().chain(found.group.map(|group| roots.group_node(group))).collect();
    let may = |node: &PathBuf| access(node, Access::READ_OK | Access::WRITE_OK).is_ok();
    if nodes.iter().any(may) {
        return None;
    }
    let text = |node: &Path| node.display().to_string();
    let there = nodes.iter().find(|node| node.exists()).map(|node| text(node));
    Some(match there {
        Some(node) => Unusable::NoPermission { node },
        None => Unusable::NoNode { node: nodes.first().map_or_else(String::new, |node| text(node)) },
    })
}
