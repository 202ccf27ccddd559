//! A path at which a command is about to write a file: what is wrong with it has one code, whichever option names it, and is said
//! before anything is touched.

use std::fs::{FileType, symlink_metadata};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::exit::{self, Code};

/// Refuses a path that names no file (usage), and one at which something else than a file is (refused), or a file that may not be
/// replaced. The file is still created with the system's own checks.
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

/// What it is that is no regular file.
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
