//! Regular files that a user names, to be read. Any other kind is refused before it is opened, since opening a FIFO waits for its
//! other end, and opening a device node can have an effect.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;

use rustix::fs::{FileType, OFlags, Stat, fstat};

use crate::named::names_folder;
use crate::{Named, open_to_read, resolve};

/// Opens a regular file to read it, as [`open_to_read`] does. A descriptor of a process is borrowed whatever its kind is: the
/// user who names one means what is open there, a pipe for example.
///
/// `InvalidInput` for a file of another kind; the error names the kind, followed by `expected`.
pub fn open_regular(path: &Path, expected: &str) -> io::Result<File> {
    let entry = match named(path, expected)? {
        Named::Descriptor(_) => return open_to_read(path, OFlags::empty()),
        Named::Entry(entry) => entry,
    };
    check(&entry.stat()?, expected)?;
    // Another file may have taken the name since.
    let file = entry.open(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
    check(&fstat(&file)?, expected)?;
    Ok(file)
}

/// Refuses a path at which [`open_regular`] would find a file of another kind. Nothing is opened.
pub fn check_regular(path: &Path, expected: &str) -> io::Result<()> {
    match named(path, expected)? {
        Named::Descriptor(_) => Ok(()),
        Named::Entry(entry) => check(&entry.stat()?, expected),
    }
}

fn named(path: &Path, expected: &str) -> io::Result<Named> {
    match names_folder(path) {
        true => Err(refused("a folder", expected)),
        false => resolve(path),
    }
}

fn refused(kind: &str, expected: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, format!("it is {kind}; {expected}"))
}

fn check(stat: &Stat, expected: &str) -> io::Result<()> {
    match other_than_file(stat.st_mode) {
        None => Ok(()),
        Some(kind) => Err(refused(kind, expected)),
    }
}

/// The kind of a file with this mode (`st_mode`), for messages; `None` for a regular one.
pub fn other_than_file(mode: u32) -> Option<&'static str> {
    Some(match FileType::from_raw_mode(mode) {
        FileType::RegularFile => return None,
        FileType::Directory => "a folder",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device node",
        _ => "of an unknown kind",
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use rustix::fs::{CWD, mknodat};

    use super::*;

    #[test]
    fn a_fifo_without_a_writer_was_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        mknodat(CWD, at("fifo"), FileType::Fifo, 0o600.into(), 0).unwrap();
        symlink("fifo", at("link")).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        for (path, kind) in [
            (at("fifo"), "a FIFO"),
            (at("link"), "a FIFO"),
            (at("socket"), "a socket"),
            (at("."), "a folder"),
            ("..".into(), "a folder"),
            ("/".into(), "a folder"),
            ("/dev/null".into(), "a device node"),
        ] {
            let opened = open_regular(&path, "expected text").map(drop);
            for refused in [opened, check_regular(&path, "expected text")] {
                let error = refused.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
                assert_eq!(error.to_string(), format!("it is {kind}; expected text"));
            }
        }
        assert_eq!(open_regular(&at("none"), "").unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_pipe_that_is_open_already_is_read() {
        let (reader, writer) = std::io::pipe().unwrap();
        std::io::Write::write_all(&mut &writer, b"text").unwrap();
        drop(writer);
        let path = format!("/proc/self/fd/{}", reader.as_raw_fd());
        check_regular(path.as_ref(), "").unwrap();
        let mut text = String::new();
        open_regular(path.as_ref(), "").unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
    }
}
