//! The two doors to a device: its cdev, bound to an iommufd (`vfio.h: VFIO_DEVICE_BIND_IOMMUFD`), and its
//! group, in a container (`vfio.h: VFIO_GROUP_GET_STATUS`, `VFIO_GROUP_GET_DEVICE_FD`).

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use limosa_client::{Error, Result};
use limosa_protocol::Errno;
use rustix::fs::{Mode, OFlags};

use crate::device::{Opened, Options};
use crate::find::{Found, Roots, names};
use crate::name::{Group, Name};
use crate::refusal::{Request, node_hint};
use crate::unusable::Unusable;
use crate::{AddressSpace, Door, ioctl};

/// `VFIO_GROUP_GET_STATUS`.
const GROUP_GET_STATUS: u8 = 3;

/// `VFIO_GROUP_FLAGS_VIABLE`.
const GROUP_FLAGS_VIABLE: u32 = 1 << 0;

/// `VFIO_GROUP_GET_DEVICE_FD`.
const GROUP_GET_DEVICE_FD: u8 = 6;

/// Opens the device that the user calls `given`.
pub(crate) fn open(roots: &Roots, given: &str, options: &Options) -> Result<Opened> {
    let name: Name =
        given.parse().map_err(|error| Error::Usage { device: given.into(), what: format!("{error}") })?;
    let of_space = options.space.as_ref().map(AddressSpace::door);
    if let (Some(door), Some(of_space)) = (options.door, of_space)
        && door != of_space
    {
        return Err(Error::Usage {
            device: given.into(),
            what: format!(
                "a device that is opened through its {door} cannot use an address space made for a {of_space}"
            ),
        });
    }
    let found = roots.find(&name, given)?;
    match Unusable::by_sysfs(roots, &found) {
        // Drivers that do no DMA may share a group; the kernel knows them all.
        None | Some(Unusable::NotViable { .. }) => {}
        Some(why) => return Err(why.error(given)),
    }
    let given = Given { roots, name: given, found: &found, space: options.space.as_ref() };
    match (options.door.or(of_space), &name) {
        (Some(Door::Cdev), _) => given.through_cdev(),
        (Some(Door::Group), _) | (None, Name::Group(_)) => given.through_group(),
        (None, _) => given.through_either(),
    }
}

/// A device that was found, and where it is to go.
struct Given<'a> {
    roots: &'a Roots,
    name: &'a str,
    found: &'a Found,
    space: Option<&'a AddressSpace>,
}

impl Given<'_> {
    /// Opens through the cdev; if there is none, or this user may not open it, through the group.
    fn through_either(&self) -> Result<Opened> {
        if self.found.cdev.is_none() {
            return self.through_group();
        }
        let missing = [
            Errno::ENOENT,
            Errno::ENODEV,
            Errno::ENXIO,
            Errno::ENOTTY,
            Errno::ENOTSUP,
            Errno::EACCES,
            Errno::EPERM,
        ];
        let group_node = self.found.group.map(|group| self.roots.group_node(group));
        match self.through_cdev() {
            Err(error)
                if error.errno().is_some_and(|errno| missing.contains(&errno))
                    && group_node.is_some_and(|node| node.exists()) =>
            {
                tracing::info!("{error}; trying its group");
                self.through_group().map_err(|_| error)
            }
            other => other,
        }
    }

    fn through_cdev(&self) -> Result<Opened> {
        let Some(node) = &self.found.cdev else {
            let hint =
                "the kernel was built without CONFIG_VFIO_DEVICE_CDEV; open the device through its group";
            return Err(self.failed("opening its cdev".into(), Errno::ENOENT, hint.into()));
        };
        let fd = self.open_node(node)?;
        let space = self.space_of(Door::Cdev)?;
        space.attach_cdev(self.name, fd.as_fd()).map_err(|error| self.explained(error))?;
        Ok(Opened { fd, group: None, space: Some(space), door: Some(Door::Cdev) })
    }

    fn through_group(&self) -> Result<Opened> {
        let Some(group) = self.found.group else {
            return Err(Unusable::NoGroup { id: self.found.id.clone() }.error(self.name));
        };
        let node = self.open_node(&self.roots.group_node(group))?;
        self.check_viable(group, node.as_fd())?;
        let space = self.space_of(Door::Group)?;
        space.attach_group(self.name, node.as_fd()).map_err(|error| self.explained(error))?;
        let fd = self.device_of_group(node.as_fd())?;
        Ok(Opened { fd, group: Some(node), space: Some(space), door: Some(Door::Group) })
    }

    /// Names the devices of the host's that stand in the way, if that is why.
    fn explained(&self, error: Error) -> Error {
        match (error.errno(), Unusable::by_sysfs(self.roots, self.found)) {
            (Some(Errno::EBUSY | Errno::EPERM), Some(why @ Unusable::NotViable { .. })) => {
                why.error(self.name)
            }
            _ => error,
        }
    }

    fn space_of(&self, door: Door) -> Result<AddressSpace> {
        self.space.cloned().map_or_else(|| AddressSpace::new(door), Ok)
    }

    fn open_node(&self, node: &Path) -> Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        rustix::io::retry_on_intr(|| rustix::fs::open(node, flags, Mode::empty())).map_err(|error| {
            let errno = ioctl::errno(error);
            let has_vfio = self.roots.dev.join("vfio").exists();
            self.failed(format!("opening {}", node.display()), errno, node_hint(errno, node, has_vfio).into())
        })
    }

    /// Refuses a group of which the host uses a device (`VFIO_GROUP_FLAGS_VIABLE`).
    fn check_viable(&self, group: Group, node: BorrowedFd<'_>) -> Result<()> {
        // `struct vfio_group_status`.
        let mut status = [8u32, 0];
        // SAFETY: a `struct vfio_group_status` of argsz bytes, without pointers.
        let answer = unsafe { ioctl::call(node, ioctl::vfio(GROUP_GET_STATUS), status.as_mut_ptr().cast()) };
        answer.map_err(|errno| Request::GroupStatus.refused(self.name, errno))?;
        if status[1] & GROUP_FLAGS_VIABLE != 0 {
            return Ok(());
        }
        let others = self.roots.group_members(group.number);
        let others = others.iter().filter(|other| other.holds_group());
        Err(Unusable::NotViable { group, others: names(others) }.error(self.name))
    }

    fn device_of_group(&self, node: BorrowedFd<'_>) -> Result<OwnedFd> {
        let request = Request::GetDeviceFd;
        let id =
            CString::new(self.found.id.as_str()).map_err(|_| request.refused(self.name, Errno::EINVAL))?;
        let at = id.as_ptr().cast_mut().cast();
        // SAFETY: the argument is a string with its end, which the kernel only reads.
        let answer = unsafe { ioctl::call(node, ioctl::vfio(GROUP_GET_DEVICE_FD), at) };
        let fd = answer.map_err(|errno| request.refused(self.name, errno))?;
        // SAFETY: the value of this ioctl is a new fd of this process, which nobody else knows.
        Ok(unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) })
    }

    fn failed(&self, what: String, errno: Errno, hint: Box<str>) -> Error {
        Error::Os { device: self.name.into(), what, errno, hint }
    }
}

/// The errno of an error of the standard library's.
pub(crate) fn os_errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, |errno| Errno::from_raw(errno.unsigned_abs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;

    fn refused(tree: &Tree, name: &str, door: Option<Door>) -> Error {
        match open(&tree.roots, name, &Options { door, space: None }) {
            Ok(_) => panic!("{name} is an ordinary file"),
            Err(error) => error,
        }
    }

    fn assert_says(error: &Error, errno: Errno, words: &[&str]) {
        assert_eq!(error.errno(), Some(errno), "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "`{word}` in: {error}");
        }
    }

    #[test]
    fn the_status_of_a_group_lies_as_in_linux() {
        use vfio_bindings::bindings::vfio as linux;
        assert_eq!(size_of::<linux::vfio_group_status>(), size_of::<[u32; 2]>());
        assert_eq!(std::mem::offset_of!(linux::vfio_group_status, flags), 4);
        assert_eq!(GROUP_FLAGS_VIABLE, linux::VFIO_GROUP_FLAGS_VIABLE);
    }

    #[test]
    fn a_device_that_vfio_does_not_have_says_how_to_bind_it() {
        let tree = Tree::new();
        tree.device("pci", "0000:65:00.0", Some("igb"), Some(1));
        tree.device("pci", "0000:65:00.1", None, Some(1));
        tree.device("pci", "0000:66:00.0", None, None);
        tree.device("mdev", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", None, None);
        let words =
            ["igb", "driver_override", "echo 0000:65:00.0 > /sys/bus/pci/devices/0000:65:00.0/driver/unbind"];
        assert_says(&refused(&tree, "65:00.0", None), Errno::ENODEV, &words);
        assert_says(
            &refused(&tree, "65:00.1", None),
            Errno::ENODEV,
            &["bound to no driver", "drivers_probe"],
        );
        assert_says(&refused(&tree, "66:00.0", None), Errno::ENODEV, &["no IOMMU group", "intel_iommu=on"]);
        let mdev = refused(&tree, "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", None);
        assert_says(&mdev, Errno::ENODEV, &["VFIO driver of its bus"]);
    }

    #[test]
    fn a_node_that_is_missing_is_named_with_its_door() {
        let tree = Tree::new();
        tree.vfio(&tree.device("pci", "0000:65:00.1", Some("vfio-pci"), Some(12)), 3, true);
        tree.group("12");
        let cdev = refused(&tree, "65:00.1", Some(Door::Cdev));
        assert_says(&cdev, Errno::ENOENT, &["vfio/devices/vfio3", "there is no /dev/vfio"]);
        tree.node("vfio/vfio");
        let group = refused(&tree, "65:00.1", Some(Door::Group));
        assert_says(&group, Errno::ENOENT, &["vfio/12", "container"]);
        // Where neither is there, it is the first door that is missed.
        assert_says(&refused(&tree, "65:00.1", None), Errno::ENOENT, &["vfio/devices/vfio3"]);
    }

    #[test]
    fn a_kernel_without_cdevs_has_the_group() {
        let tree = Tree::new();
        tree.vfio(&tree.device("pci", "0000:65:00.1", Some("vfio-pci"), Some(12)), 3, false);
        tree.group("12");
        tree.node("vfio/12");
        // The node is an ordinary file, so it was the group that was tried.
        let error = refused(&tree, "65:00.1", None);
        assert_says(&error, Errno::ENOTTY, &["GROUP_GET_STATUS"]);
        let error = refused(&tree, "65:00.1", Some(Door::Cdev));
        assert_says(&error, Errno::ENOENT, &["CONFIG_VFIO_DEVICE_CDEV"]);
    }

    #[test]
    fn a_device_without_a_group_has_no_door_to_it() {
        let tree = Tree::new();
        tree.vfio(&tree.device("pci", "0000:65:00.1", Some("vfio-pci"), None), 3, true);
        let error = refused(&tree, "65:00.1", Some(Door::Group));
        assert_says(&error, Errno::ENODEV, &["no IOMMU group"]);
    }

    #[test]
    fn a_name_that_is_none_says_what_one_looks_like() {
        let error = refused(&Tree::new(), "/tmp/uart.sock", None);
        assert!(matches!(error, Error::Usage { .. }), "{error}");
        assert!(error.to_string().contains("0000:65:00.1"), "{error}");
    }
}
