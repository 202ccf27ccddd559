//! Files named by a user. The links in `/proc/PID` are not made by users: they lead to the files of a process,
//! whatever its rights to them. A path through such a link is detected, and if it names a descriptor, the descriptor is
//! duplicated.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, Stat, fstatfs, openat, openat2, readlink, readlinkat, statat,
    unlinkat,
};
use rustix::io::Errno;

use crate::Descriptor;

/// As many links as the kernel follows (path_resolution(7)).
const LINKS_MAX: usize = 40;
/// What procfs says in statfs(2).
const PROC_MAGIC: u64 = 0x9fa0;

/// The target of a path.
#[derive(Debug)]
pub enum Named {
    /// A descriptor of a process.
    Descriptor(Descriptor),
    /// A name in a folder, of a file that may be there or not.
    Entry(Entry),
}

/// A name in an open folder, so that every call uses the same folder.
#[derive(Debug)]
pub struct Entry {
    folder: OwnedFd,
    name: OsString,
    link: Option<PathBuf>,
}

/// Follows a path up to its last name, and also that name if it is a user's link.
///
/// `InvalidInput` if the path does not end with the name of a file, or leads through another link of a process;
/// otherwise the system's errors.
pub fn resolve(path: &Path) -> io::Result<Named> {
    let (mut path, mut link) = (path.to_owned(), None);
    let mut from = None;
    for _ in 0..LINKS_MAX {
        let no_name = || io::Error::new(ErrorKind::InvalidInput, "the path does not name a file");
        let name = path.file_name().ok_or_else(no_name)?.to_owned();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let folder = open_in(from.as_ref(), parent.unwrap_or(Path::new(".")))?;
        let in_proc = fstatfs(&folder)?.f_type as u64 == PROC_MAGIC;
        if in_proc && let Some(descriptor) = descriptor(&folder, &name)? {
            return Ok(Named::Descriptor(descriptor));
        }
        let target = match readlinkat(&folder, &name, Vec::new()) {
            Ok(_) if in_proc => return Err(of_process()),
            Ok(target) => PathBuf::from(OsString::from_vec(target.into_bytes())),
            Err(Errno::INVAL | Errno::NOENT) => return Ok(Named::Entry(Entry { folder, name, link })),
            Err(errno) => return Err(errno.into()),
        };
        link.get_or_insert_with(|| target.clone());
        (path, from) = (target, Some(folder));
    }
    Err(Errno::LOOP.into())
}

/// Whether a path is `.`, `..` or `/`, or ends with one of the first two: a folder, which has no name in another.
pub(crate) fn names_folder(path: &Path) -> bool {
    path.file_name().is_none() && !path.as_os_str().is_empty()
}

/// Opens a file to read it. Links that users made are followed, a descriptor of a process is borrowed, and no other link of
/// a process is followed. `more` are further flags.
pub fn open_to_read(path: &Path, more: OFlags) -> io::Result<File> {
    if names_folder(path) {
        return Err(Errno::ISDIR.into());
    }
    match resolve(path)? {
        Named::Entry(entry) => entry.open(OFlags::RDONLY | more),
        Named::Descriptor(descriptor) => {
            let borrowed = descriptor.borrow()?;
            match borrowed.readable {
                true => Ok(File::from(OwnedFd::from(borrowed))),
                false => {
                    let what =
                        "the process holds it for writing alone; expected a descriptor that can be read";
                    Err(io::Error::new(ErrorKind::InvalidInput, what))
                }
            }
        }
    }
}

/// Opens a folder, without following links of processes; `readable`, or only to look up files in it.
///
/// Kernels before Linux 5.6 have no openat2(2). There any link is followed.
pub fn open_folder(path: &Path, readable: bool) -> io::Result<OwnedFd> {
    let access = if readable { OFlags::RDONLY } else { OFlags::PATH };
    folder_in(None, path, access)
}

fn open_in(from: Option<&OwnedFd>, path: &Path) -> io::Result<OwnedFd> {
    folder_in(from, path, OFlags::PATH)
}

fn folder_in(from: Option<&OwnedFd>, path: &Path, access: OFlags) -> io::Result<OwnedFd> {
    let from: BorrowedFd<'_> = from.map_or(CWD, std::os::fd::AsFd::as_fd);
    let flags = access | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat2(from, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS) {
        Err(Errno::NOSYS) => Ok(openat(from, path, flags, Mode::empty())?),
        Err(Errno::LOOP) => {
            let what = "it leads through a link of a process (as /proc/PID/cwd is), or through too many links; name \
                        the folder itself";
            Err(io::Error::new(ErrorKind::InvalidInput, what))
        }
        opened => Ok(opened?),
    }
}

fn of_process() -> io::Error {
    let what = "it is a link of a process; name the file itself, or a descriptor as /proc/PID/fd/N";
    io::Error::new(ErrorKind::InvalidInput, what)
}

/// What a name is in a folder of procfs, if that folder is one of descriptors.
fn descriptor(folder: &OwnedFd, name: &OsStr) -> io::Result<Option<Descriptor>> {
    let place = readlink(format!("/proc/self/fd/{}", folder.as_raw_fd()), Vec::new())?;
    let place = PathBuf::from(OsString::from_vec(place.into_bytes()));
    if place.file_name() != Some(OsStr::new("fd")) {
        return Ok(None);
    }
    let refuse = || {
        let what = format!(
            "{}/{} is no descriptor that can be borrowed; expected /proc/PID/fd/N",
            place.display(),
            name.display()
        );
        io::Error::new(ErrorKind::InvalidInput, what)
    };
    let process = place.parent().and_then(|parent| parent.strip_prefix("/proc").ok()).ok_or_else(refuse)?;
    let process = match process.to_str().ok_or_else(refuse)?.split_once("/task/") {
        // Another thread may have descriptors of its own.
        Some((process, thread)) if process != thread => return Err(refuse()),
        Some((process, _)) => process.to_owned(),
        None => process.display().to_string(),
    };
    let number = name.to_str().ok_or_else(refuse)?;
    Descriptor::of(&process, number).map(Some).ok_or_else(refuse)
}

impl Entry {
    /// The contents of the link at the end of the path, if there was one.
    pub fn link(&self) -> Option<&Path> {
        self.link.as_deref()
    }

    /// Opens it. No link is followed.
    pub fn open(&self, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(&self.folder, &self.name, flags, Mode::empty()) {
            // It has become a link since it was looked at.
            Err(Errno::LOOP) => Err(of_process()),
            opened => Ok(File::from(opened?)),
        }
    }

    /// Makes it, open for reading and writing, its owner's alone. `AlreadyExists` if anything has the name.
    pub fn create(&self) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(openat(&self.folder, &self.name, flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// Its metadata. No link is followed.
    pub fn stat(&self) -> io::Result<Stat> {
        Ok(statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Removes it.
    pub fn remove(&self) -> io::Result<()> {
        Ok(unlinkat(&self.folder, &self.name, AtFlags::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;

    #[track_caller]
    fn is_descriptor(path: impl AsRef<Path>, number: i32) {
        let path = path.as_ref();
        match resolve(path) {
            Ok(Named::Descriptor(found)) => assert_eq!(found.number(), number, "{}", path.display()),
            other => panic!("{}: {other:?}", path.display()),
        }
    }

    #[track_caller]
    fn refused(path: impl AsRef<Path>, part: &str) {
        let path = path.as_ref();
        let error = open_to_read(path, OFlags::empty()).unwrap_err();
        assert!(error.to_string().contains(part), "{}: {error}", path.display());
    }

    #[test]
    fn every_way_to_a_descriptor_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let file = File::create(at("file")).unwrap();
        let (pid, fd) = (std::process::id(), file.as_raw_fd());
        symlink(format!("/proc/{pid}/fd/{fd}"), at("one")).unwrap();
        symlink("one", at("two")).unwrap();
        symlink(format!("/proc/{pid}/fd"), at("fds")).unwrap();
        symlink("/dev", at("dev")).unwrap();
        for path in [
            format!("/proc/{pid}/fd/{fd}"),
            format!("/proc/self/fd/{fd}"),
            format!("/proc/{pid}/task/{pid}/fd/{fd}"),
            format!("/proc/{pid}/../{pid}/./fd//{fd}"),
            format!("//proc/self/task/{pid}/../../fd/{fd}"),
            format!("/dev/fd/{fd}"),
            format!("/dev/../dev/fd/{fd}"),
        ] {
            is_descriptor(path, fd);
        }
        for path in ["one", "two", &format!("fds/{fd}"), &format!("dev/fd/{fd}")] {
            is_descriptor(at(path), fd);
        }
        is_descriptor("/dev/stdin", 0);
        is_descriptor(at("dev/stdout"), 1);
    }

    #[test]
    fn other_links_of_a_process_are_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "text").unwrap();
        let held = File::open(folder.path()).unwrap();
        let pid = std::process::id();
        refused("/proc/self/exe", "link of a process");
        refused(format!("/proc/{pid}/exe"), "link of a process");
        refused(format!("/proc/{pid}/cwd/Cargo.toml"), "leads through a link of a process");
        refused(format!("/proc/{pid}/root/etc/passwd"), "leads through a link of a process");
        refused(format!("/proc/{pid}/fd/{}/file", held.as_raw_fd()), "leads through a link of a process");
        refused(format!("/proc/{pid}/fd/x"), "expected /proc/PID/fd/N");
        symlink(format!("/proc/{pid}/exe"), folder.path().join("link")).unwrap();
        refused(folder.path().join("link"), "link of a process");
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let of_file = maps.lines().find(|line| line.contains('/')).unwrap();
        let range = of_file.split(' ').next().unwrap();
        let range: Vec<_> = range.split('-').map(|at| at.trim_start_matches('0')).collect();
        refused(format!("/proc/self/map_files/{}", range.join("-")), "link of a process");
    }

    #[test]
    fn the_descriptors_of_another_thread_may_be_others() {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let path = PathBuf::from("/proc/thread-self/fd/0");
            sender.send(resolve(&path).map(drop).map_err(|error| error.to_string())).unwrap();
        });
        let error = receiver.recv().unwrap().unwrap_err();
        assert!(error.contains("expected /proc/PID/fd/N"), "{error}");
    }

    #[test]
    fn links_that_users_made_are_followed_and_told() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("folder")).unwrap();
        std::fs::write(at("folder/file"), "text").unwrap();
        symlink("folder/../folder/file", at("link")).unwrap();
        symlink(at("loop"), at("loop")).unwrap();
        symlink("nowhere", at("nothing")).unwrap();
        let mut text = String::new();
        open_to_read(&at("link"), OFlags::empty()).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        let entry = |name: &str| match resolve(&at(name)) {
            Ok(Named::Entry(entry)) => entry,
            other => panic!("{other:?}"),
        };
        assert_eq!(entry("link").link(), Some(Path::new("folder/../folder/file")));
        assert_eq!(entry("folder/file").link(), None);
        assert_eq!(entry("nothing").stat().unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(resolve(&at("loop")).unwrap_err().raw_os_error(), Some(Errno::LOOP.raw_os_error()));
        for none in ["/", "..", "", "a/.."] {
            assert_eq!(resolve(Path::new(none)).unwrap_err().kind(), ErrorKind::InvalidInput, "{none}");
        }
        assert_eq!(entry("folder/file").create().unwrap_err().kind(), ErrorKind::AlreadyExists);
        entry("new").create().unwrap();
        entry("new").remove().unwrap();
    }
}
