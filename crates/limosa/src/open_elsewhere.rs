//! Devices that a process holds open. Their fds are in `/proc/PID/fd`: a device is found there by its place in
//! sysfs (`vfio-device-syspath` in fdinfo) or its nodes, and borrowed from there with `pidfd_getfd`, which gives
//! a further fd of the same open device. The holder keeps its own.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use limosa_host::Descriptor;
use limosa_stream::escaped;
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, fstat, major, minor, statx};

use crate::exit::{self, Code};

/// A further fd of a device that a process holds under this descriptor.
pub fn borrow(descriptor: Descriptor, name: &str) -> anyhow::Result<OwnedFd> {
    let failed = |what: String| exit::error(Code::Unreachable, format!("{name}: {what}"));
    let borrowed = descriptor.borrow().map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::NotFound => "; `limosa probe` lists the devices that processes hold",
            _ => "",
        };
        failed(format!("{error}{hint}"))
    })?;
    let target = fs::read_link(format!("/proc/self/fd/{}", borrowed.as_fd().as_raw_fd())).unwrap_or_default();
    let stat = fstat(&borrowed).map_err(|errno| failed(errno.to_string()))?;
    let node = (FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice)
        .then(|| Node::find(major(stat.st_rdev), minor(stat.st_rdev)))
        .flatten();
    match target.as_os_str() == OF_GROUP || matches!(node, Some(Node::Device(_))) {
        true => Ok(borrowed.into()),
        false => Err(failed(format!("it is no VFIO device but {}", target.display()))),
    }
}

/// The name by which other processes reach it while the process lives.
pub fn lasting_name(descriptor: Descriptor) -> String {
    let process = match descriptor.process().as_str() {
        "self" => std::process::id().to_string(),
        process => process.to_owned(),
    };
    format!("/proc/{process}/fd/{}", descriptor.number())
}

/// The path in sysfs of a device that a process has open, if the kernel reports it.
pub fn sysfs_path(descriptor: Descriptor) -> Option<PathBuf> {
    match look_at(&Path::new("/proc").join(descriptor.process()), &descriptor.number().to_string())? {
        What::Device(place) => place,
        What::Group(_) => None,
    }
}

/// The link of a device's fd in `/proc` if it was opened through its group. Links of files begin with a slash.
const OF_GROUP: &str = "anon_inode:[vfio-device]";

/// A node of VFIO. It is recognized by its device number: a process can give the name to any file, in a mount namespace of its
/// own.
#[derive(Debug, PartialEq, Eq)]
enum Node {
    /// A device's cdev, with its place in sysfs.
    Device(PathBuf),
    /// The node of a group, by its name below `/dev/vfio`.
    Group(String),
}

impl Node {
    /// The node with this device number, if it is a VFIO node.
    fn find(major: u32, minor: u32) -> Option<Node> {
        Node::of(&fs::canonicalize(format!("/sys/dev/char/{major}:{minor}")).ok()?)
    }

    /// The kind of a character device, by its path in sysfs.
    fn of(place: &Path) -> Option<Node> {
        let class = place.parent()?;
        match class.file_name()?.to_str()? {
            "vfio-dev" => Some(Node::Device(class.parent()?.to_owned())),
            "vfio" => Some(Node::Group(place.file_name()?.to_str()?.to_owned())),
            _ => None,
        }
    }
}

/// The kind of a process's fd, if it belongs to VFIO. Newer kernels report the path in sysfs in fdinfo; for older
/// ones it follows from the node of a cdev, or from the group of a process that has only one.
fn look_at(process: &Path, fd: &str) -> Option<What> {
    let what = what(process, fd)?;
    if matches!(what, What::Group(_)) {
        return Some(what);
    }
    let info = fs::read_to_string(process.join("fdinfo").join(fd)).unwrap_or_default();
    if let Some(place) = info.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:")) {
        return Some(What::Device(Some(PathBuf::from(place.trim()))));
    }
    match what {
        What::Device(None) => {
            let all = numbers(&process.join("fd")).into_iter();
            let all = all.filter_map(|fd| self::what(process, &fd.to_string()));
            Some(What::Device(only_device(all, |group| {
                let in_group = limosa_vfio_kernel::list()
                    .into_iter()
                    .filter(|device| device.group.is_some_and(|of| of.to_string() == group));
                in_group.map(|device| device.folder).collect()
            })))
        }
        known => Some(known),
    }
}

/// The kind of a process's fd, by its link and its device number alone. The kernel knows both: a file system in
/// user space is not asked, as it might never answer.
fn what(process: &Path, fd: &str) -> Option<What> {
    let link = process.join("fd").join(fd);
    if fs::read_link(&link).ok()?.as_os_str() == OF_GROUP {
        return Some(What::Device(None));
    }
    let stat = statx(CWD, &link, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    if FileType::from_raw_mode(stat.stx_mode.into()) != FileType::CharacterDevice {
        return None;
    }
    Some(match Node::find(stat.stx_rdev_major, stat.stx_rdev_minor)? {
        Node::Device(place) => What::Device(Some(place)),
        Node::Group(name) => What::Group(Path::new("/dev/vfio").join(name)),
    })
}

/// The device of a process that has one device open, and one group, which has no other device.
fn only_device(open: impl Iterator<Item = What>, in_group: impl Fn(&str) -> Vec<PathBuf>) -> Option<PathBuf> {
    let (mut devices, mut groups) = (0, Vec::new());
    for what in open {
        match what {
            What::Device(_) => devices += 1,
            What::Group(node) => groups.push(node.file_name()?.to_str()?.to_owned()),
        }
    }
    match (devices, groups.as_slice()) {
        (1, [group]) => match in_group(group).as_slice() {
            [only] => Some(only.clone()),
            _ => None,
        },
        _ => None,
    }
}

/// A process that has a device or its group open.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Holder {
    pub pid: u32,
    /// The name of the process.
    pub process: String,
    /// The name of the device there; absent where only its group is open, or this user may not look.
    pub name: Option<String>,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (process {})", self.process, self.pid)?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, " as {name}"))
    }
}

/// The VFIO devices and groups that processes have open. Processes that this user may not inspect are left out.
#[derive(Debug)]
pub struct OpenElsewhere(Vec<(What, Holder)>);

#[derive(Debug, PartialEq, Eq)]
enum What {
    /// A device, with its place in sysfs where that is known.
    Device(Option<PathBuf>),
    /// A node below `/dev/vfio`.
    Group(PathBuf),
}

impl OpenElsewhere {
    /// Examines all processes.
    pub fn look() -> OpenElsewhere {
        let mut found = Vec::new();
        for process in numbers(Path::new("/proc")) {
            let folder = Path::new("/proc").join(process.to_string());
            for fd in numbers(&folder.join("fd")) {
                let (what, name) = match look_at(&folder, &fd.to_string()) {
                    Some(what @ What::Device(Some(_))) => (what, Some(format!("/proc/{process}/fd/{fd}"))),
                    Some(what @ What::Group(_)) => (what, None),
                    Some(What::Device(None)) | None => continue,
                };
                found.push((what, Holder { pid: process, process: called(&folder), name }));
            }
        }
        OpenElsewhere(found)
    }

    /// The process that has the device with this path in sysfs open, or else the node of its group.
    pub fn holders(&self, device: &Path, group: Option<&Path>) -> Vec<Holder> {
        let of = |wanted: &What| {
            let mut holders: Vec<Holder> =
                self.0.iter().filter(|(what, _)| what == wanted).map(|(_, holder)| holder.clone()).collect();
            holders.dedup_by_key(|holder| holder.pid);
            holders
        };
        match (of(&What::Device(Some(device.into()))), group) {
            (holders, Some(group)) if holders.is_empty() => of(&What::Group(group.into())),
            (holders, _) => holders,
        }
    }
}

/// The name that a process gives itself. It can be anything, so it is made safe for a terminal.
pub fn called(process: &Path) -> String {
    let comm = fs::read(process.join("comm")).unwrap_or_default();
    escaped(&String::from_utf8_lossy(comm.trim_ascii_end())).into_owned()
}

/// The entries of a folder that are numbers, in order.
fn numbers(folder: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut numbers: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_known_by_their_place_in_sysfs() {
        let device = "/sys/devices/pci0000:00/0000:00:02.0/0000:65:00.1";
        let cdev = PathBuf::from(device).join("vfio-dev/vfio3");
        assert_eq!(Node::of(&cdev), Some(Node::Device(device.into())));
        let group = Node::of(Path::new("/sys/devices/virtual/vfio/noiommu-7"));
        assert_eq!(group, Some(Node::Group("noiommu-7".into())));
        for other in ["/sys/devices/virtual/misc/vfio", "/sys/devices/virtual/mem/null", "/", "/vfio"] {
            assert_eq!(Node::of(Path::new(other)), None, "{other}");
        }
        assert_eq!(Node::find(1, 3), None, "/dev/null");
    }

    #[test]
    fn what_a_process_calls_itself_does_nothing_on_a_terminal() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("comm"), b"\x1b[2Jqemu\xff\n\n").unwrap();
        assert_eq!(called(folder.path()), "\\u{1b}[2Jqemu\u{fffd}");
        assert_eq!(called(Path::new("/nowhere")), "");
    }

    #[test]
    fn the_only_device_of_the_only_group_is_known_where_the_kernel_does_not_tell() {
        let device = PathBuf::from("/sys/devices/a");
        let (one, group) = (|| What::Device(None), || What::Group("/dev/vfio/7".into()));
        let found = |open: Vec<What>, members: usize| {
            only_device(open.into_iter(), |group| {
                assert_eq!(group, "7");
                vec![device.clone(); members]
            })
        };
        assert_eq!(found(vec![group()], 1), None, "only the group is open");
        assert_eq!(found(vec![group(), one()], 1), Some(device.clone()));
        assert_eq!(found(vec![group(), one()], 2), None, "it may be either");
        assert_eq!(found(vec![group(), one(), one()], 1), None, "there is another one");
    }

    /// A process can give any file the name of a device.
    #[test]
    fn what_is_no_device_is_not_borrowed() {
        for file in ["/proc/self/status", "/dev/null"] {
            let file = fs::File::open(file).unwrap();
            let name = format!("/proc/self/fd/{}", file.as_raw_fd());
            let descriptor = Descriptor::parse(&name).unwrap();
            let said = borrow(descriptor, &name).unwrap_err().to_string();
            assert!(said.contains("no VFIO device but /") && said.contains(&name), "{said}");
            assert_eq!(sysfs_path(descriptor), None);
        }
        let none = borrow(Descriptor::parse("/dev/fd/999999").unwrap(), "it").unwrap_err().to_string();
        assert!(none.contains("has no fd 999999") && none.contains("limosa probe"), "{none}");
    }
}
