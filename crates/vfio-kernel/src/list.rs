//! [`list`]: the VFIO devices of this machine, as sysfs has them, and [`list_unbound`], what could be one. Nothing
//! is opened.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use crate::find::{Found, Roots, entries, link_name};
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
    /// A PCI device's ids.
    pub pci: Option<PciIds>,
    /// The type of a mediated device, under its parent's `mdev_supported_types`: `mtty-1`.
    pub mdev_type: Option<String>,
    /// Why it cannot be opened, as far as sysfs and the nodes show it: only the kernel knows whether it is open
    /// elsewhere.
    pub unusable: Option<Unusable>,
}

/// The numbers in a PCI device's configuration space by which drivers know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciIds {
    /// The vendor's id.
    pub vendor: u16,
    /// Which of the vendor's devices it is.
    pub device: u16,
    /// The board vendor's id.
    pub subsystem_vendor: u16,
    /// Which of that vendor's boards it is.
    pub subsystem_device: u16,
    /// Class, subclass and programming interface: 0x020000 for Ethernet.
    pub class: u32,
}

/// Every device that a VFIO driver has, and every mediated device, bus by bus and in the order of their names.
pub fn list() -> Vec<Listed> {
    list_below(&Roots::default())
}

/// The same for a machine whose sysfs and device nodes are in these folders: that of a container's host, for one.
pub fn list_in(sys: &Path, dev: &Path) -> Vec<Listed> {
    list_below(&Roots { sys: sys.into(), dev: dev.into() })
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

/// Every PCI device that no VFIO driver has, bridges apart, in the order of their addresses. What keeps each from
/// being opened is in [`Listed::unusable`].
pub fn list_unbound() -> Vec<Listed> {
    list_unbound_below(&Roots::default())
}

pub(crate) fn list_unbound_below(roots: &Roots) -> Vec<Listed> {
    let bus = roots.bus("pci");
    let found = entries(&bus).into_iter().filter_map(|id| roots.look(&bus.join(id)));
    let devices = found.filter(|found| !found.vfio).map(|found| listed(roots, found));
    // Base class 6: VFIO takes no bridges.
    devices.filter(|device| device.pci.is_none_or(|ids| ids.class >> 16 != 6)).collect()
}

/// A number of an attribute, as sysfs prints it: `0x8086`.
fn attribute(folder: &Path, name: &str) -> Option<u32> {
    let text = fs::read_to_string(folder.join(name)).ok()?;
    u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

fn pci_ids(folder: &Path) -> Option<PciIds> {
    let half = |name| attribute(folder, name).and_then(|number| u16::try_from(number).ok());
    Some(PciIds {
        vendor: half("vendor")?,
        device: half("device")?,
        subsystem_vendor: half("subsystem_vendor")?,
        subsystem_device: half("subsystem_device")?,
        class: attribute(folder, "class")?,
    })
}

fn listed(roots: &Roots, found: Found) -> Listed {
    let unusable = Unusable::by_sysfs(roots, &found).or_else(|| by_nodes(roots, &found));
    let Found { id, bus, folder, driver, group, cdev, .. } = found;
    let pci = if bus == "pci" { pci_ids(&folder) } else { None };
    let mdev_type = link_name(&folder.join("mdev_type"));
    Listed { id, bus, folder, driver, group, cdev, pci, mdev_type, unusable }
}

/// What the nodes show: one usable node of the two is enough.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;

    fn ids(tree: &Tree, folder: &Path, class: &str) {
        for (name, value) in [
            ("vendor", "0x15b3"),
            ("device", "0x101e"),
            ("subsystem_vendor", "0x15b3"),
            ("subsystem_device", "0x0001"),
        ] {
            tree.attribute(folder, name, &format!("{value}\n"));
        }
        tree.attribute(folder, "class", &format!("{class}\n"));
    }

    #[test]
    fn a_machine_without_devices_has_none_to_list() {
        let tree = Tree::new();
        assert_eq!(list_below(&tree.roots), []);
        assert_eq!(list_unbound_below(&tree.roots), []);
        let nothing = Roots { sys: tree.path().join("no/sys"), dev: tree.path().join("no/dev") };
        assert_eq!(list_below(&nothing), []);
    }

    #[test]
    fn devices_are_listed_once_with_what_sysfs_says_of_them() {
        let tree = Tree::new();
        let virtual_function = tree.device("pci", "0000:65:00.1", Some("mlx5_vfio_pci"), Some(12));
        tree.vfio(&virtual_function, 3, true);
        tree.group("12");
        tree.node("vfio/12");
        ids(&tree, &virtual_function, "0x020000");
        let mdev = tree.device("mdev", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", Some("mtty"), Some(4));
        tree.vfio(&mdev, 0, true);
        std::os::unix::fs::symlink("../mdev_supported_types/mtty-1", mdev.join("mdev_type")).unwrap();
        let old = tree.device("pci", "0000:03:00.0", Some("vfio-pci"), Some(2));
        tree.attribute(&old, "vendor", "nonsense");
        tree.node("vfio/2");

        let list = list_below(&tree.roots);
        let names: Vec<_> = list.iter().map(|device| (device.bus.as_str(), device.id.as_str())).collect();
        let expected = [
            ("mdev", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"),
            ("pci", "0000:03:00.0"),
            ("pci", "0000:65:00.1"),
        ];
        assert_eq!(names, expected);
        let [mdev, old, virtual_function] = &list[..] else { panic!("{list:?}") };
        assert_eq!(mdev.mdev_type.as_deref(), Some("mtty-1"));
        let node = tree.roots.dev.join("vfio/devices/vfio0").display().to_string();
        assert_eq!(mdev.unusable, Some(Unusable::NoNode { node }), "neither node is there");
        assert_eq!((old.pci, old.cdev.as_ref(), old.unusable.as_ref()), (None, None, None));
        assert_eq!(virtual_function.driver.as_deref(), Some("mlx5_vfio_pci"));
        assert_eq!(virtual_function.group, Some(Group { number: 12, noiommu: false }));
        assert_eq!(virtual_function.cdev, Some(tree.roots.dev.join("vfio/devices/vfio3")));
        let ids = virtual_function.pci.unwrap();
        assert_eq!((ids.vendor, ids.device, ids.subsystem_device, ids.class), (0x15b3, 0x101e, 1, 0x02_0000));
        assert_eq!(virtual_function.unusable, None, "one of the nodes is enough");
    }

    #[test]
    fn what_no_vfio_driver_has_is_listed_with_why_not() {
        let tree = Tree::new();
        let disk = tree.device("pci", "0000:01:00.0", Some("nvme"), Some(1));
        ids(&tree, &disk, "0x010802");
        let spare = tree.device("pci", "0000:02:00.0", None, Some(2));
        ids(&tree, &spare, "0x020000");
        let bridge = tree.device("pci", "0000:00:1c.0", Some("pcieport"), Some(3));
        ids(&tree, &bridge, "0x060400");
        let bare = tree.device("pci", "0000:04:00.0", None, None);
        ids(&tree, &bare, "0x020000");
        tree.vfio(&tree.device("pci", "0000:05:00.0", Some("vfio-pci"), Some(5)), 0, false);
        let list = list_unbound_below(&tree.roots);
        let why: Vec<_> = list.iter().map(|device| device.unusable.as_ref().unwrap().to_string()).collect();
        assert_eq!(list.len(), 3, "{list:?}");
        assert!(
            why[0].contains("the driver nvme") && why[0].contains("0000:01:00.0/driver/unbind"),
            "{}",
            why[0]
        );
        assert!(why[1].contains("no driver") && !why[1].contains("unbind"), "{}", why[1]);
        assert!(why[1].contains("driver_override"), "{}", why[1]);
        assert!(why[2].contains("no IOMMU group"), "{}", why[2]);
    }

    #[test]
    fn a_group_that_the_host_uses_too_is_not_viable_and_names_the_devices() {
        let tree = Tree::new();
        tree.vfio(&tree.device("pci", "0000:06:00.0", Some("vfio-pci"), Some(6)), 0, true);
        tree.device("pci", "0000:06:00.1", Some("snd_hda_intel"), Some(6));
        tree.device("pci", "0000:00:01.0", Some("pcieport"), Some(6));
        tree.device("pci", "0000:06:00.2", None, Some(6));
        let list = list_below(&tree.roots);
        let why = list[0].unusable.as_ref().unwrap();
        assert!(
            matches!(why, Unusable::NotViable { others, .. } if others == "0000:06:00.1 (driver snd_hda_intel)")
        );
    }
}
