//! A machine made of files, for tests: a sysfs and a `/dev` in a folder of their own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::find::Roots;

/// The machine; gone when dropped.
pub(crate) struct Tree {
    folder: TempDir,
    pub roots: Roots,
}

impl Tree {
    /// One without any device.
    pub fn new() -> Tree {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let roots = Roots { sys: root.join("sys"), dev: root.join("dev") };
        for folder in ["sys/bus/pci/devices", "sys/bus/mdev/devices", "sys/class", "sys/devices", "dev"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        Tree { folder, roots }
    }

    fn link(&self, at: &Path, to: &Path) {
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        symlink(to, at).unwrap();
    }

    /// A device on a bus, bound to a driver, in a group; returns its folder.
    pub fn device(&self, bus: &str, id: &str, driver: Option<&str>, group: Option<u32>) -> PathBuf {
        let sys = &self.roots.sys;
        let folder = sys.join("devices").join(format!("{bus}0")).join(id);
        fs::create_dir_all(&folder).unwrap();
        self.link(&sys.join("bus").join(bus).join("devices").join(id), &folder);
        self.link(&folder.join("subsystem"), &sys.join("bus").join(bus));
        if let Some(driver) = driver {
            self.link(&folder.join("driver"), &sys.join("bus").join(bus).join("drivers").join(driver));
        }
        if let Some(group) = group {
            let group = sys.join("kernel/iommu_groups").join(group.to_string());
            self.link(&folder.join("iommu_group"), &group);
            self.link(&group.join("devices").join(id), &folder);
        }
        folder
    }

    /// An attribute of a device.
    pub fn attribute(&self, folder: &Path, name: &str, value: &str) {
        fs::write(folder.join(name), value).unwrap();
    }

    /// What a VFIO driver makes of a device: `vfioN`, with a node of its own or without.
    pub fn vfio(&self, folder: &Path, number: u32, has_cdev: bool) {
        let name = format!("vfio{number}");
        let made = folder.join("vfio-dev").join(&name);
        fs::create_dir_all(&made).unwrap();
        self.link(&made.join("device"), folder);
        self.link(&self.roots.sys.join("class/vfio-dev").join(&name), &made);
        if has_cdev {
            fs::write(made.join("dev"), "253:0\n").unwrap();
        }
    }

    /// A group as VFIO calls it: `12`, `noiommu-3`.
    pub fn group(&self, name: &str) {
        fs::create_dir_all(self.roots.sys.join("class/vfio").join(name)).unwrap();
    }

    /// A node below `/dev`; an ordinary file, which answers ENOTTY to every ioctl.
    pub fn node(&self, name: &str) {
        let node = self.roots.dev.join(name);
        fs::create_dir_all(node.parent().unwrap()).unwrap();
        fs::write(node, "").unwrap();
    }

    /// Where it all is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}
