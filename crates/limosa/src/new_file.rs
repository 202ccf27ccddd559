//! A path at which a command is about to write a file: what is wrong with it has one code, whichever option names it, and is said
//! before anything is touched.

use std::fs::{File, FileType, OpenOptions, symlink_metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::exit::{self, Code};

/// Refuses a path that does not name a file (usage), or at which there is something other than a file, or a file that may not be
/// replaced (refused). The file is still created with the system's own checks.
pub fn check(path: &Path, option: &str, replace: bool) -> anyhow::Result<()> {
    let name = path.display();
    let refused = |code, what: &str| Err(exit::error(code, format!("{option}{name}: {what}")));
    let is_folder = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    if path.file_name().is_none() || is_folder {
        let what = format!("{option}`{name}` names no file; expected the name of one that is to be written");
        return Err(exit::error(Code::Usage, what));
    }
    let Ok(found) = symlink_metadata(path) else { return Ok(()) };
    match other_than_file(found.file_type()) {
        Some("a symbolic link") => refused(
            Code::Refused,
            "a symbolic link is there, and only a regular file is replaced; name the file that it points to, or remove the link",
        ),
        Some(what) => refused(
            Code::Refused,
            &format!("{what} is there, and only a regular file is replaced; choose another name"),
        ),
        None if replace => Ok(()),
        None => refused(
            Code::Refused,
            "a file is there already; choose another name, or let --replace replace it",
        ),
    }
}

/// Opens a file to write to, which may also be a terminal or a FIFO. A FIFO that no process reads is refused instead of waited for:
/// `InvalidInput`, as for a socket. `flags` are further flags.
pub fn open(path: &Path, options: &mut OpenOptions, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match options.custom_flags(flags.bits().cast_signed()).open(path) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NXIO) => {
            let kind = path.metadata().ok().and_then(|found| other_than_file(found.file_type()));
            let what = match kind {
                Some("a FIFO") => "it is a FIFO that no process reads; start its reader first",
                Some("a socket") => "it is a socket; expected a file, a terminal or a FIFO",
                _ => return Err(error),
            };
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        opened => opened?,
    };
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

/// The kind of a file that is not a regular one.
fn other_than_file(found: FileType) -> Option<&'static str> {
    Some(match () {
        () if found.is_file() => return None,
        () if found.is_dir() => "a directory",
        () if found.is_symlink() => "a symbolic link",
        () if found.is_fifo() => "a FIFO",
        () if found.is_socket() => "a socket",
        () => "a device",
    })
}
