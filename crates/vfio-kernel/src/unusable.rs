//! [`Unusable`]: why a device cannot be opened, as far as sysfs tells, and what to do about it.

use std::fmt;

use limosa_client::Error;
use limosa_protocol::Errno;

use crate::find::{Found, Roots, names};
use crate::name::Group;

/// Why a device cannot be opened. Its text says what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unusable {
    /// It is bound to a driver that is not VFIO's, or to none.
    NoVfioDriver {
        /// The device, as its bus calls it.
        id: String,
        /// Its bus: `pci`, `mdev`.
        bus: String,
        /// The driver.
        driver: Option<String>,
    },
    /// It is in no IOMMU group, so nothing keeps its DMA apart.
    NoGroup {
        /// The device, as its bus calls it.
        id: String,
    },
    /// Other devices of its group belong to drivers of the host's.
    NotViable {
        /// The group.
        group: Group,
        /// Those devices and their drivers.
        others: String,
    },
    /// There is no node for it below `/dev/vfio`.
    NoNode {
        /// The node that was expected.
        node: String,
    },
    /// This process may not open its node.
    NoPermission {
        /// The node.
        node: String,
    },
}

impl Unusable {
    /// What sysfs tells before anything is opened.
    pub(crate) fn by_sysfs(roots: &Roots, found: &Found) -> Option<Unusable> {
        let Found { id, bus, driver, .. } = found;
        if !found.vfio && found.group.is_none() && bus == "pci" && driver.is_none() {
            // To bind it would not do.
            return Some(Unusable::NoGroup { id: id.clone() });
        }
        if !found.vfio {
            return Some(Unusable::NoVfioDriver { id: id.clone(), bus: bus.clone(), driver: driver.clone() });
        }
        let Some(group) = found.group else {
            return found.cdev.is_none().then(|| Unusable::NoGroup { id: id.clone() });
        };
        let members = roots.group_members(group.number);
        let others: Vec<Found> = members.into_iter().filter(Found::holds_group).collect();
        (!others.is_empty()).then(|| Unusable::NotViable { group, others: names(others.iter()) })
    }

    /// The errno that the kernel has for it.
    pub fn errno(&self) -> Errno {
        match self {
            Unusable::NoVfioDriver { .. } | Unusable::NoGroup { .. } => Errno::ENODEV,
            Unusable::NotViable { .. } => Errno::EPERM,
            Unusable::NoNode { .. } => Errno::ENOENT,
            Unusable::NoPermission { .. } => Errno::EACCES,
        }
    }

    /// What is wrong.
    pub fn what(&self) -> String {
        match self {
            Unusable::NoVfioDriver { driver: Some(driver), .. } => {
                format!("bound to the driver {driver}, which is not a VFIO driver")
            }
            Unusable::NoVfioDriver { driver: None, .. } => "bound to no driver".into(),
            Unusable::NoGroup { .. } => "in no IOMMU group".into(),
            Unusable::NotViable { group, others } => {
                format!("its group {group} is not viable: the host uses {others}")
            }
            Unusable::NoNode { node } => format!("its node {node} is missing"),
            Unusable::NoPermission { node } => format!("no permission to open {node}"),
        }
    }

    /// What to do about it.
    pub fn advice(&self) -> String {
        match self {
            Unusable::NoVfioDriver { id, bus, driver } if bus == "pci" => {
                let device = format!("/sys/bus/pci/devices/{id}");
                let unbind = match driver {
                    Some(_) => format!("echo {id} > {device}/driver/unbind; "),
                    None => String::new(),
                };
                format!(
                    "to bind it: modprobe vfio-pci; echo vfio-pci > {device}/driver_override; {unbind}\
                     echo {id} > /sys/bus/pci/drivers_probe (to migrate it, use its vendor's VFIO driver, such as \
                     mlx5_vfio_pci, in place of vfio-pci)"
                )
            }
            Unusable::NoVfioDriver { .. } => "bind it to a VFIO driver of its bus".into(),
            Unusable::NoGroup { .. } => {
                "enable the IOMMU in the firmware (VT-d, AMD-Vi, SMMU) and, if needed, on the kernel's command line \
                 (intel_iommu=on)"
                    .into()
            }
            Unusable::NotViable { .. } => "bind these to vfio-pci too, or unbind them: a group has one owner".into(),
            Unusable::NoNode { .. } => {
                "load the module vfio, or pass the node into this container".into()
            }
            Unusable::NoPermission { node } => {
                format!("give it to the user who is to use the device: chown USER {node}")
            }
        }
    }

    /// As the error of an attempt to open `name`.
    pub(crate) fn error(&self, name: &str) -> Error {
        Error::Os { device: name.into(), what: self.what(), errno: self.errno(), hint: self.advice().into() }
    }
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what(), self.advice())
    }
}

impl Found {
    /// Whether it keeps its group from being given to a user: bound to a driver that does DMA for the host. Bridges'
    /// drivers and pci-stub do none.
    pub(crate) fn holds_group(&self) -> bool {
        !self.vfio
            && self
                .driver
                .as_deref()
                .is_some_and(|driver| !matches!(driver, "pcieport" | "pci-stub" | "shpchp"))
    }
}
