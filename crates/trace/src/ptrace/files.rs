//! The fds of traced processes: the kind of file of each, and the call that created it.

use std::collections::HashMap;

use crate::event::printable;
use crate::seen::FileKind;

/// Limit on the fds of one process whose origin is kept.
const MADE_MAX: usize = 4096;
/// The longest name that is shown of a file, in letters.
const NAME_MAX: usize = 128;

/// The fds whose creation the trace has seen in one process.
#[derive(Clone, Debug, Default)]
pub struct Files {
    made: HashMap<i32, Made>,
}

/// An fd that a traced call returned.
#[derive(Clone, Debug)]
struct Made {
    kind: FileKind,
    name: String,
    device: Option<String>,
    /// The file that it referred to then. If it refers to another one now, the number was reused.
    link: String,
}

/// A file that an fd leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// What kind of file.
    pub kind: FileKind,
    /// Its name, for people.
    pub name: String,
    /// Of a data fd, the name of its device.
    pub device: Option<String>,
}

/// What `/proc/PID/fd/N` leads to. `None` where there is no such fd, or it may not be seen.
pub fn link(pid: i32, fd: i32) -> Option<String> {
    let target = rustix::fs::readlink(format!("/proc/{pid}/fd/{fd}"), Vec::new()).ok()?;
    Some(target.to_string_lossy().into_owned())
}

/// The inode of a socket, from what its fd leads to: `socket:[INODE]`.
pub fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// A link for people.
pub fn shown(link: &str) -> String {
    printable(&link.chars().take(NAME_MAX).collect::<String>())
}

impl Files {
    /// The file behind an fd that leads there.
    pub fn file(&self, fd: i32, link: &str) -> File {
        if let Some(made) = self.made.get(&fd).filter(|made| made.link == link) {
            let Made { kind, name, device, .. } = made.clone();
            return File { kind, name, device };
        }
        let (kind, name) = if let Some(name) = link.strip_prefix("/dev/vfio/devices/") {
            (FileKind::Device, shown(name))
        } else if link == "/dev/vfio/vfio" {
            (FileKind::Container, "container".to_owned())
        } else if link == "/dev/iommu" {
            (FileKind::Iommufd, "iommufd".to_owned())
        } else if let Some(group) = link.strip_prefix("/dev/vfio/") {
            (FileKind::Group, format!("group {}", shown(group)))
        } else if link == "anon_inode:[vfio-device]" {
            (FileKind::Device, format!("device fd {fd}"))
        } else {
            (FileKind::Other, shown(link))
        };
        File { kind, name, device: None }
    }

    /// Whether every call on this fd is shown.
    pub fn is_made(&self, fd: i32) -> bool {
        self.made.contains_key(&fd)
    }

    /// A group returned the fd of a device.
    pub fn device(&mut self, fd: i32, name: &[u8], link: String) {
        let name = printable(&String::from_utf8_lossy(name).chars().take(NAME_MAX).collect::<String>());
        self.add(fd, Made { kind: FileKind::Device, name, device: None, link });
    }

    /// A device returned the data fd of its session with this number.
    pub fn data(&mut self, fd: i32, device: &str, session: u64, link: String) {
        let name = format!("{device} session {session}");
        self.add(fd, Made { kind: FileKind::Data, name, device: Some(device.to_owned()), link });
    }

    /// An fd was duplicated.
    pub fn duplicate(&mut self, fd: i32, to: i32) {
        match self.made.get(&fd).cloned() {
            Some(made) => self.add(to, made),
            None => drop(self.made.remove(&to)),
        }
    }

    /// An fd was closed.
    pub fn close(&mut self, fd: i32) {
        self.made.remove(&fd);
    }

    fn add(&mut self, fd: i32, made: Made) {
        if self.made.len() >= MADE_MAX {
            self.made.clear();
        }
        self.made.insert(fd, made);
    }
}

/// The path at which a socket was accepted, by its inode (proc(5): /proc/net/unix).
pub fn path_of_socket(pid: i32, inode: u64) -> Option<String> {
    use std::io::Read;
    /// The most bytes of the table that are read.
    const TABLE_MAX: u64 = 16 << 20;
    let mut table = Vec::new();
    let file = std::fs::File::open(format!("/proc/{pid}/net/unix")).ok()?;
    file.take(TABLE_MAX).read_to_end(&mut table).ok()?;
    let table = String::from_utf8_lossy(&table);
    let inode = inode.to_string();
    table.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(6);
        (fields.next()? == inode).then(|| fields.next().map(str::to_owned))?
    })
}

/// The process of a thread (proc(5): Tgid), and the process that traces it, or 0.
pub fn status(tid: i32) -> Option<(i32, i32)> {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().parse().ok()
    };
    Some((field("Tgid:")?, field("TracerPid:").unwrap_or(0)))
}

/// Whether a thread has ended, and is only listed as a zombie (proc_pid_status(5): State).
pub fn has_ended(tid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.is_none_or(|state| state.trim_start().starts_with(['Z', 'X']))
}

/// The threads of a process.
pub fn threads(pid: i32) -> Vec<i32> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task"));
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    entries.into_iter().flatten().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_where_they_lead_and_by_what_made_them() {
        let mut files = Files::default();
        let kinds = [
            ("/dev/vfio/devices/vfio3", FileKind::Device, "vfio3"),
            ("/dev/vfio/vfio", FileKind::Container, "container"),
            ("/dev/vfio/12", FileKind::Group, "group 12"),
            ("/dev/iommu", FileKind::Iommufd, "iommufd"),
            ("anon_inode:[vfio-device]", FileKind::Device, "device fd 9"),
            ("/dev/null", FileKind::Other, "/dev/null"),
            ("/tmp/a\u{1b}b", FileKind::Other, "/tmp/a\\u{1b}b"),
        ];
        for (link, kind, name) in kinds {
            assert_eq!(files.file(9, link), File { kind, name: name.into(), device: None });
        }
        files.data(9, "vfio3", 2, "anon_inode:[mig]".into());
        files.duplicate(9, 10);
        let data =
            File { kind: FileKind::Data, name: "vfio3 session 2".into(), device: Some("vfio3".into()) };
        assert_eq!(
            (files.file(9, "anon_inode:[mig]"), files.file(10, "anon_inode:[mig]")),
            (data.clone(), data)
        );
        assert_eq!(files.file(9, "/dev/null").kind, FileKind::Other, "the number is another file's now");
        files.close(9);
        assert_eq!(files.file(9, "anon_inode:[mig]").kind, FileKind::Other);
        assert_eq!((socket_inode("socket:[77]"), socket_inode("pipe:[77]")), (Some(77), None));
    }

    #[test]
    fn the_threads_and_the_process_of_this_thread_are_found() {
        let pid = std::process::id().cast_signed();
        assert!(threads(pid).contains(&pid));
        assert_eq!(status(pid).map(|(process, _)| process), Some(pid));
        assert_eq!((status(-1), threads(-1).len()), (None, 0));
    }
}
