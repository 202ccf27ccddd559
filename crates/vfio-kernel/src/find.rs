//! Finding a device: from its [`Name`] to its nodes below `/dev/vfio`, through sysfs
//! (`Documentation/driver-api/vfio.rst`, `Documentation/ABI/testing/sysfs-devices-vfio-dev`).

use std::fs;
use std::path::{Path, PathBuf};

use limosa_client::{Error, Result};
use limosa_protocol::Errno;

use crate::name::{Group, Name};

/// Where sysfs and the device nodes are.
#[derive(Clone, Debug)]
pub(crate) struct Roots {
    /// `/sys`.
    pub sys: PathBuf,
    /// `/dev`.
    pub dev: PathBuf,
}

impl Default for Roots {
    fn default() -> Roots {
        Roots { sys: "/sys".into(), dev: "/dev".into() }
    }
}

/// What sysfs says of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// What its bus calls it, and `VFIO_GROUP_GET_DEVICE_FD` too: a PCI address, a UUID.
    pub id: String,
    /// Its bus: `pci`, `mdev`.
    pub bus: String,
    /// Its folder in sysfs.
    pub folder: PathBuf,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// Whether that is a VFIO driver.
    pub vfio: bool,
    /// Its IOMMU group.
    pub group: Option<Group>,
    /// Its own node, where the kernel has such (CONFIG_VFIO_DEVICE_CDEV).
    pub cdev: Option<PathBuf>,
}

impl Roots {
    /// The node of a group.
    pub fn group_node(&self, group: Group) -> PathBuf {
        self.dev.join("vfio").join(group.to_string())
    }

    /// The folder with the devices of a bus, as links.
    pub fn bus(&self, bus: &str) -> PathBuf {
        self.sys.join("bus").join(bus).join("devices")
    }

    /// The devices of a group, VFIO's and others, in the order of their names.
    pub fn group_members(&self, number: u32) -> Vec<Found> {
        let folder = self.sys.join("kernel/iommu_groups").join(number.to_string()).join("devices");
        entries(&folder).iter().filter_map(|device| self.look(&folder.join(device))).collect()
    }

    /// Reads the facts of the device to which this path in sysfs leads.
    pub fn look(&self, path: &Path) -> Option<Found> {
        let folder = fs::canonicalize(path).ok()?;
        let id = folder.file_name()?.to_str()?.to_owned();
        let driver = link_name(&folder.join("driver"));
        let group = link_name(&folder.join("iommu_group")).and_then(|number| number.parse().ok());
        let group = group.map(|number| {
            let noiommu = Group { number, noiommu: true };
            let is_noiommu = self.sys.join("class/vfio").join(noiommu.to_string()).exists();
            Group { number, noiommu: is_noiommu }
        });
        let registered = entries(&folder.join("vfio-dev"));
        let bus = link_name(&folder.join("subsystem")).unwrap_or_default();
        // The class came with Linux 6.1; before, only a driver's name tells, and a mediated device has no other.
        let by_name = |driver: &str| {
            driver.starts_with("vfio") || driver.replace('_', "-").ends_with("-vfio-pci") || {
                bus == "mdev" && !self.sys.join("class/vfio-dev").exists()
            }
        };
        let vfio = !registered.is_empty() || driver.as_deref().is_some_and(by_name);
        let cdev = registered.first().filter(|name| folder.join("vfio-dev").join(name).join("dev").exists());
        let cdev = cdev.map(|name| self.dev.join("vfio/devices").join(name));
        Some(Found { id, bus, folder, driver, vfio, group, cdev })
    }

    /// Finds the device of this name; `given` is what the user wrote.
    pub fn find(&self, name: &Name, given: &str) -> Result<Found> {
        let missing = |what: String, hint: String| Error::Os {
            device: given.into(),
            what,
            errno: Errno::ENOENT,
            hint: hint.into(),
        };
        match name {
            Name::Pci(address) => self.look(&self.bus("pci").join(address)).ok_or_else(|| {
                missing(
                    format!("looking for PCI device {address}"),
                    "there is no such device on this machine's PCI buses; `limosa probe` lists the devices".into(),
                )
            }),
            Name::Mdev(uuid) => self.look(&self.bus("mdev").join(uuid)).ok_or_else(|| {
                missing(
                    format!("looking for mediated device {uuid}"),
                    "there is no such mediated device; `limosa probe` lists the devices, and writing a UUID to \
                     /sys/class/mdev_bus/PARENT/mdev_supported_types/TYPE/create creates one"
                        .into(),
                )
            }),
            Name::Cdev(number) => {
                let link = self.sys.join(format!("class/vfio-dev/vfio{number}/device"));
                self.look(&link).ok_or_else(|| {
                    missing(
                        format!("looking for VFIO device vfio{number}"),
                        "no VFIO driver has created a device with that number; `limosa probe` lists the devices"
                            .into(),
                    )
                })
            }
            Name::Group(group) => self.only_member(*group, given, missing),
        }
    }

    fn only_member(
        &self,
        group: Group,
        given: &str,
        missing: impl Fn(String, String) -> Error,
    ) -> Result<Found> {
        let (mut devices, others): (Vec<Found>, Vec<Found>) =
            self.group_members(group.number).into_iter().partition(|found| found.vfio);
        devices.retain(|found| found.group == Some(group));
        match devices.len() {
            1 => Ok(devices.swap_remove(0)),
            0 => {
                let hint = match &others[..] {
                    [] => "there is no such group; `limosa probe` lists the devices".into(),
                    others => format!(
                        "no device of the group is bound to a VFIO driver; it has {}",
                        names(others.iter())
                    ),
                };
                Err(missing(format!("looking for a VFIO device in group {group}"), hint))
            }
            count => Err(Error::Usage {
                device: given.into(),
                what: format!(
                    "the group has {count} devices: {}; name the one to open",
                    names(devices.iter())
                ),
            }),
        }
    }
}

/// Devices and their drivers in a row.
pub(crate) fn names<'a>(devices: impl Iterator<Item = &'a Found>) -> String {
    let name = |found: &Found| match &found.driver {
        Some(driver) => format!("{} (driver {driver})", found.id),
        None => format!("{} (no driver)", found.id),
    };
    devices.map(name).collect::<Vec<_>>().join(", ")
}

/// The names in a folder, in order; none where there is no such folder.
pub(crate) fn entries(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The last part of what a link points to.
pub(crate) fn link_name(link: &Path) -> Option<String> {
    fs::read_link(link).ok()?.file_name()?.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;

    fn find(tree: &Tree, name: &str) -> Result<Found> {
        tree.roots.find(&name.parse().unwrap(), name)
    }

    #[test]
    fn every_name_of_a_device_leads_to_it() {
        let tree = Tree::new();
        let folder = tree.device("pci", "0000:65:00.1", Some("mlx5_vfio_pci"), Some(12));
        tree.vfio(&folder, 3, true);
        tree.group("12");
        let found = find(&tree, "65:00.1").unwrap();
        for name in ["0000:65:00.1", "/dev/vfio/devices/vfio3", "/dev/vfio/12", "12"] {
            assert_eq!(find(&tree, name).unwrap(), found, "{name}");
        }
        assert_eq!((found.id.as_str(), found.bus.as_str(), found.vfio), ("0000:65:00.1", "pci", true));
        assert_eq!(found.cdev, Some(tree.roots.dev.join("vfio/devices/vfio3")));
        assert_eq!(found.group, Some(Group { number: 12, noiommu: false }));
        assert_eq!(tree.roots.group_node(found.group.unwrap()), tree.roots.dev.join("vfio/12"));
        // It is not called so.
        for name in ["noiommu-12", "/dev/vfio/noiommu-12", "13", "/dev/vfio/devices/vfio12", "65:00.0"] {
            assert_eq!(find(&tree, name).unwrap_err().errno(), Some(Errno::ENOENT), "{name}");
        }
    }

    #[test]
    fn a_device_without_iommu_is_in_a_group_of_its_own_name() {
        let tree = Tree::new();
        tree.vfio(&tree.device("pci", "0000:65:00.1", Some("vfio-pci"), Some(3)), 0, false);
        tree.group("noiommu-3");
        let found = find(&tree, "/dev/vfio/noiommu-3").unwrap();
        assert_eq!(found.group, Some(Group { number: 3, noiommu: true }));
        assert_eq!(found.cdev, None, "made, but without a node of its own");
        assert_eq!(tree.roots.group_node(found.group.unwrap()), tree.roots.dev.join("vfio/noiommu-3"));
        assert!(find(&tree, "3").is_err());
    }

    #[test]
    fn a_driver_of_vfios_is_known_on_kernels_without_the_class() {
        for (driver, is) in [
            ("vfio-pci", true),
            ("mlx5_vfio_pci", true),
            ("vfio-platform", true),
            ("igb", false),
            ("pci-stub", false),
        ] {
            let tree = Tree::new();
            tree.device("pci", "0000:65:00.1", Some(driver), Some(1));
            assert_eq!(find(&tree, "65:00.1").unwrap().vfio, is, "{driver}");
        }
        let tree = Tree::new();
        let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
        tree.device("mdev", uuid, Some("mtty"), Some(1));
        assert!(find(&tree, uuid).unwrap().vfio);
    }

    #[test]
    fn a_group_of_several_devices_names_them() {
        let tree = Tree::new();
        tree.vfio(&tree.device("pci", "0000:06:00.0", Some("vfio-pci"), Some(6)), 0, true);
        let error = find(&tree, "6").map(|found| found.id);
        assert_eq!(error.unwrap(), "0000:06:00.0");
        tree.vfio(&tree.device("pci", "0000:06:00.1", Some("vfio-pci"), Some(6)), 1, true);
        let error = find(&tree, "/dev/vfio/6").unwrap_err();
        assert!(matches!(error, Error::Usage { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("0000:06:00.0") && text.contains("0000:06:00.1"), "{text}");
        tree.device("pci", "0000:07:00.0", Some("igb"), Some(7));
        let text = find(&tree, "7").unwrap_err().to_string();
        assert!(text.contains("0000:07:00.0 (driver igb)"), "{text}");
    }
}
