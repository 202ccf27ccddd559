//! VFIO and the IOMMU: modules, nodes, groups and devices, as sysfs and `/dev` have them. Nothing is opened.

use super::super::finding::{
    IOMMU_OFF, IOMMU_UNSAFE, NODE_FORBIDDEN, VFIO_DEVICE_UNUSABLE, VFIO_NO_DEVICE, VFIO_NO_MIGRATION_DRIVER,
    VFIO_NOT_LOADED,
};
use super::{Look, Wanted};

/// Modules that are shown when they are loaded.
const MODULES: [&str; 6] = ["vfio", "vfio_pci", "vfio_pci_core", "vfio_iommu_type1", "iommufd", "mdev"];

/// Drivers with migration (`docs/kernel.md`).
const MIGRATING: [&str; 7] = [
    "mlx5_vfio_pci",
    "hisi_acc_vfio_pci",
    "pds_vfio_pci",
    "qat_vfio_pci",
    "xe_vfio_pci",
    "virtio_vfio_pci",
    "mtty",
];

pub fn look(look: &mut Look<'_>) {
    let host = look.host;
    let loaded = |names: &[&str]| -> Vec<String> {
        names.iter().filter(|name| host.has(&format!("sys/module/{name}"))).map(ToString::to_string).collect()
    };
    let or_none = |names: Vec<String>| if names.is_empty() { "none".into() } else { names.join(", ") };
    let migrating = loaded(&MIGRATING);
    look.facts.add("VFIO modules", or_none(loaded(&MODULES)));
    look.facts.add("migration drivers", or_none(migrating.clone()));
    let groups = host.entries("sys/kernel/iommu_groups").len();
    look.facts.add("IOMMU groups", groups.to_string());
    let devices = limosa_vfio_kernel::list_in(&host.path("sys"), &host.path("dev"));
    let is_there = host.has("dev/vfio");
    if !is_there {
        look.find(&VFIO_NOT_LOADED, "there is no /dev/vfio");
    }
    // A mediated device needs no IOMMU.
    if groups == 0 && devices.iter().all(|device| device.bus != "mdev") {
        look.find(&IOMMU_OFF, "/sys/kernel/iommu_groups is empty");
    }
    if host.text("sys/module/vfio/parameters/enable_unsafe_noiommu_mode").as_deref() == Some("Y") {
        look.find(&IOMMU_UNSAFE, "enable_unsafe_noiommu_mode is on");
    }
    nodes(look);
    if is_there && devices.is_empty() {
        look.find(&VFIO_NO_DEVICE, "no device has a VFIO driver");
    }
    if is_there && migrating.is_empty() {
        look.find(&VFIO_NO_MIGRATION_DRIVER, format!("none of {} is loaded", MIGRATING.join(", ")));
    }
    let names: Vec<String> = devices.iter().map(|device| device.id.clone()).collect();
    look.facts.add("VFIO devices", or_none(names));
    if look.wanted == Wanted::Machine {
        for device in &devices {
            let Some(why) = &device.unusable else { continue };
            let finding = look.finding(&VFIO_DEVICE_UNUSABLE, format!("{}: {}", device.id, why.what()));
            look.findings.extend(finding.map(|finding| finding.with_remedy(why.advice())));
        }
    }
}

/// Nodes below `/dev`, and whether this user may open them.
fn nodes(look: &mut Look<'_>) {
    let host = look.host;
    let below = |folder: &str| -> Vec<String> {
        host.entries(folder).into_iter().map(|name| format!("{folder}/{name}")).collect()
    };
    let mut nodes = vec!["dev/iommu".to_owned()];
    nodes.extend(below("dev/vfio").into_iter().filter(|node| node != "dev/vfio/devices"));
    nodes.extend(below("dev/vfio/devices"));
    nodes.retain(|node| host.has(node));
    let (usable, forbidden): (Vec<&String>, Vec<&String>) =
        nodes.iter().partition(|node| host.system.may_use(&host.path(node)));
    let names =
        |nodes: &[&String]| nodes.iter().map(|node| format!("/{node}")).collect::<Vec<_>>().join(", ");
    look.facts.add("nodes", if usable.is_empty() { "none".into() } else { names(&usable) });
    if !forbidden.is_empty() {
        look.find(&NODE_FORBIDDEN, format!("not for this user: {}", names(&forbidden)));
    }
}
