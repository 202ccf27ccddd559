//! Devices that a process holds open. Their fds are in `/proc/PID/fd`: a device is found there by its place in
//! sysfs (`vfio-device-syspath` in fdinfo) or its nodes, and borrowed from there with `pidfd_getfd`, which gives
//! a further fd of the same open device. The holder keeps his own.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::exit::{self, Code};

/// An fd of a process, as it is named: `/proc/PID/fd/N`, `/proc/self/fd/N` or `/dev/fd/N`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The process; `None` for this one, whose fds are inherited.
    pid: Option<Pid>,
    fd: i32,
}

impl Held {
    /// What the name says, if it has one of these forms.
    pub fn parse(name: &str) -> Option<Held> {
        let (pid, fd) = match name.strip_prefix("/dev/fd/") {
            Some(fd) => ("self", fd),
            None => name.strip_prefix("/proc/")?.split_once("/fd/")?,
        };
        let number = |text: &str| -> Option<i32> {
            let number: i32 = text.parse().ok()?;
            (number.to_string() == text && number >= 0).then_some(number)
        };
        let pid = match pid {
            "self" | "thread-self" => None,
            pid => Some(Pid::from_raw(number(pid)?)?),
        };
        Some(Held { pid, fd: number(fd)? })
    }

    fn process(self) -> String {
        self.pid.map_or("self".into(), |pid| pid.as_raw_nonzero().to_string())
    }

    /// What other processes can call it while the process lives.
    pub fn lasting_name(self) -> String {
        let pid = self.pid.unwrap_or_else(getpid);
        format!("/proc/{}/fd/{}", pid.as_raw_nonzero(), self.fd)
    }

    /// A further fd of what the process holds there.
    pub fn borrow(self, name: &str) -> anyhow::Result<OwnedFd> {
        let process = self.process();
        let failed = |what: String| exit::error(Code::Unreachable, format!("{name}: {what}"));
        let pid = self.pid.unwrap_or_else(getpid);
        let process_fd = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| match error {
            rustix::io::Errno::SRCH => failed(format!("there is no process {process}")),
            error => failed(format!("process {process} cannot be reached: {error}")),
        })?;
        let fd =
            pidfd_getfd(&process_fd, self.fd, PidfdGetfdFlags::empty()).map_err(|error| match error {
                rustix::io::Errno::BADF => failed(format!(
                    "process {process} has no fd {}; `limosa probe` lists the devices that processes hold",
                    self.fd
                )),
                rustix::io::Errno::PERM => failed(format!(
                    "no permission to borrow an fd of process {process}: run as root, or as its user where \
                 kernel.yama.ptrace_scope is 0"
                )),
                error => failed(format!("fd {} of process {process} cannot be borrowed: {error}", self.fd)),
            })?;
        let target = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default();
        match is_device(&target) {
            true => Ok(fd),
            false => Err(failed(format!("it is no VFIO device but {}", target.display()))),
        }
    }

    /// Where the device is in sysfs, as far as the kernel tells.
    pub fn place(self) -> Option<PathBuf> {
        let process = Path::new("/proc").join(self.process());
        place_of(&process, &self.fd.to_string())
    }
}

/// What the fd of a device links to that was opened through its group.
const OF_GROUP: &str = "anon_inode:[vfio-device]";

/// Whether this is what the fd of a device links to.
fn is_device(target: &Path) -> bool {
    target.starts_with("/dev/vfio/devices") || target.as_os_str() == OF_GROUP
}

/// Where a device is in sysfs that a process has open: newer kernels say so in fdinfo; before, the name of a cdev
/// tells, or the group of a process that has no other.
fn place_of(process: &Path, fd: &str) -> Option<PathBuf> {
    let target = fs::read_link(process.join("fd").join(fd)).ok()?;
    if !is_device(&target) {
        return None;
    }
    let info = fs::read_to_string(process.join("fdinfo").join(fd)).unwrap_or_default();
    if let Some(place) = info.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:")) {
        return Some(PathBuf::from(place.trim()));
    }
    if let Ok(cdev) = target.strip_prefix("/dev/vfio/devices") {
        return fs::canonicalize(Path::new("/sys/class/vfio-dev").join(cdev).join("device")).ok();
    }
    only_device(process, |group| {
        let in_group = limosa_vfio_kernel::list()
            .into_iter()
            .filter(|device| device.group.is_some_and(|of| of.to_string() == group));
        in_group.map(|device| device.folder).collect()
    })
}

/// The device of a process that has one device open, and one group, which has no other device.
fn only_device(process: &Path, in_group: impl Fn(&str) -> Vec<PathBuf>) -> Option<PathBuf> {
    let folder = process.join("fd");
    let targets =
        numbers(&folder).into_iter().filter_map(|fd| fs::read_link(folder.join(fd.to_string())).ok());
    let (mut devices, mut groups) = (0, Vec::new());
    for target in targets {
        if target.as_os_str() == OF_GROUP {
            devices += 1;
        } else if let Ok(group) = target.strip_prefix("/dev/vfio")
            && group.as_os_str() != "vfio"
            && !target.starts_with("/dev/vfio/devices")
        {
            groups.push(group.to_str()?.to_owned());
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

/// Somebody who has a device or its group open.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Holder {
    pub pid: u32,
    /// What the process is called.
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

/// What processes have open of VFIO's. Processes that this user may not look into are passed over.
#[derive(Debug)]
pub struct OpenElsewhere(Vec<(What, Holder)>);

#[derive(Debug, PartialEq, Eq)]
enum What {
    /// The device of this place in sysfs.
    Device(PathBuf),
    /// A node below `/dev/vfio`.
    Group(PathBuf),
}

impl OpenElsewhere {
    /// Looks at all processes.
    pub fn look() -> OpenElsewhere {
        let mut found = Vec::new();
        for process in numbers(Path::new("/proc")) {
            let folder = Path::new("/proc").join(process.to_string());
            for fd in numbers(&folder.join("fd")) {
                let fd = fd.to_string();
                let target = fs::read_link(folder.join("fd").join(&fd)).unwrap_or_default();
                let (what, name) = if let Some(place) = place_of(&folder, &fd) {
                    (What::Device(place), Some(format!("/proc/{process}/fd/{fd}")))
                } else if target.parent() == Some(Path::new("/dev/vfio")) {
                    (What::Group(target), None)
                } else {
                    continue;
                };
                found.push((what, Holder { pid: process, process: called(&folder), name }));
            }
        }
        OpenElsewhere(found)
    }

    /// Who has the device of this place in sysfs open, or else the node of its group.
    pub fn holders(&self, device: &Path, group: Option<&Path>) -> Vec<Holder> {
        let of = |wanted: &What| {
            let mut holders: Vec<Holder> =
                self.0.iter().filter(|(what, _)| what == wanted).map(|(_, holder)| holder.clone()).collect();
            holders.dedup_by_key(|holder| holder.pid);
            holders
        };
        match (of(&What::Device(device.into())), group) {
            (holders, Some(group)) if holders.is_empty() => of(&What::Group(group.into())),
            (holders, _) => holders,
        }
    }
}

/// What a process calls itself, which can be anything: nothing of it does anything on a terminal.
fn called(process: &Path) -> String {
    let comm = fs::read(process.join("comm")).unwrap_or_default();
    String::from_utf8_lossy(comm.trim_ascii_end()).escape_debug().to_string()
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
    fn fds_of_processes_are_names() {
        let pid = |raw| Some(Pid::from_raw(raw).unwrap());
        assert_eq!(Held::parse("/proc/17/fd/3"), Some(Held { pid: pid(17), fd: 3 }));
        assert_eq!(Held::parse("/proc/self/fd/0"), Some(Held { pid: None, fd: 0 }));
        assert_eq!(Held::parse("/dev/fd/10"), Some(Held { pid: None, fd: 10 }));
        for name in [
            "",
            "/proc/",
            "/proc/17",
            "/proc/17/fd/",
            "/proc/17/fd/-1",
            "/proc/17/fd/03",
            "/proc/0/fd/1",
            "/proc/-1/fd/1",
            "/proc/x/fd/1",
            "/dev/fd/",
            "/dev/fd/x",
            "proc/17/fd/3",
            "/proc/17/fd/99999999999",
            "/proc/17/fdinfo/3",
        ] {
            assert_eq!(Held::parse(name), None, "{name}");
        }
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
        let process = tempfile::tempdir().unwrap();
        let folder = process.path().join("fd");
        fs::create_dir(&folder).unwrap();
        let fd =
            |number: u32, target: &str| std::os::unix::fs::symlink(target, folder.join(number.to_string()));
        let device = PathBuf::from("/sys/devices/a");
        let found = |members: usize| {
            only_device(process.path(), |group| {
                assert_eq!(group, "7");
                vec![device.clone(); members]
            })
        };
        fd(0, "/dev/null").unwrap();
        fd(1, "/dev/vfio/vfio").unwrap();
        fd(2, "/dev/vfio/7").unwrap();
        assert_eq!(found(1), None, "only the group is open");
        fd(3, OF_GROUP).unwrap();
        assert_eq!(found(1), Some(device.clone()));
        assert_eq!(found(2), None, "it may be either");
        fd(4, OF_GROUP).unwrap();
        assert_eq!(found(1), None, "there is another one");
    }

    #[test]
    fn what_is_no_device_is_not_borrowed() {
        let file = fs::File::open("/proc/self/status").unwrap();
        let name = format!("/proc/self/fd/{}", file.as_raw_fd());
        let held = Held::parse(&name).unwrap();
        let said = held.borrow(&name).unwrap_err().to_string();
        assert!(said.contains("no VFIO device but /proc/") && said.contains(&name), "{said}");
        assert_eq!(held.place(), None);
        let none = Held::parse("/dev/fd/999999").unwrap().borrow("it").unwrap_err().to_string();
        assert!(none.contains("has no fd 999999"), "{none}");
    }
}
