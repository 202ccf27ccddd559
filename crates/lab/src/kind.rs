//! The kinds of mediated device that the kernel under test can make.

use std::fs;
use std::path::Path;

use crate::Mdev;

/// Where the kernel lists the parents of mediated devices (Documentation/driver-api/vfio-mediated-device.rst).
pub(crate) const PARENTS: &str = "/sys/class/mdev_bus";

/// A kind of device: a type of one parent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// The parent's name under `/sys/class/mdev_bus`: `mtty`, or `limosa` for the lab's own module.
    pub parent: String,
    /// The type's name under the parent's `mdev_supported_types`: `mtty-2`.
    pub name: String,
}

impl Kind {
    /// Creates a device of this kind; see [`Mdev::create`].
    pub fn create(&self) -> Mdev {
        Mdev::create(&self.parent, &self.name)
    }
}

/// Every kind that can be moved, in the order of their names: the kernel's own serial ports `mtty-1` and
/// `mtty-2`, and those of the lab's module but `limosa-none`.
///
/// # Panics
///
/// When there is none: the test does not run in the lab's kernel.
pub fn kinds() -> Vec<Kind> {
    let mut kinds = Vec::new();
    for parent in names(Path::new(PARENTS)) {
        for name in names(&Path::new(PARENTS).join(&parent).join("mdev_supported_types")) {
            if name != "limosa-none" {
                kinds.push(Kind { parent: parent.clone(), name });
            }
        }
    }
    assert!(!kinds.is_empty(), "no mediated devices in {PARENTS}: run this with lab/run");
    kinds.sort();
    kinds
}

/// The entries of a folder; none if there is no such folder.
fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
