//! The files that are not trusted, and the errors that say why.

use std::io;
use std::path::Path;

use rustix::fs::{FileType, Stat};
use rustix::process::geteuid;

use super::PrivateFolder;

/// Refuses a file that is not a regular one, that another user could have opened, or that is too long.
pub(super) fn check(stat: &Stat) -> io::Result<()> {
    if let Some(what) = other_than_file(stat) {
        let what = format!("it is {what}, and is not read: expected a regular file; remove it");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    if stat.st_uid != geteuid().as_raw() {
        return Err(denied(format!("{}, and is not trusted: remove it", owners(stat))));
    }
    let mode = stat.st_mode & 0o7777;
    if mode & 0o077 != 0 {
        return Err(denied(format!(
            "other users may open it (mode {mode:04o}), and it is not trusted: expected mode 0600; chmod 600 it if you \
             know that its contents are right, or remove it"
        )));
    }
    match u64::try_from(stat.st_size) {
        Ok(bytes) if bytes <= PrivateFolder::FILE_BYTES_MAX as u64 => Ok(()),
        bytes => Err(too_long(bytes.unwrap_or(u64::MAX))),
    }
}

pub(super) fn owners(stat: &Stat) -> String {
    format!("it belongs to user {}, and this process acts as user {}", stat.st_uid, geteuid().as_raw())
}

pub(super) fn too_long(bytes: u64) -> io::Error {
    let most = PrivateFolder::FILE_BYTES_MAX;
    io::Error::new(io::ErrorKind::InvalidInput, format!("it has {bytes} bytes; expected at most {most}"))
}

pub(super) fn denied(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, what)
}

/// The error, with the file that it is about.
pub(super) fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// The kind of a file, for messages; `None` for a regular one.
pub(crate) fn other_than_file(stat: &Stat) -> Option<&'static str> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => None,
        FileType::Directory => Some("a directory"),
        FileType::Symlink => Some("a symbolic link"),
        FileType::Fifo => Some("a FIFO"),
        FileType::Socket => Some("a socket"),
        FileType::CharacterDevice => Some("a character device"),
        FileType::BlockDevice => Some("a block device"),
        _ => Some("of an unknown type"),
    }
}
