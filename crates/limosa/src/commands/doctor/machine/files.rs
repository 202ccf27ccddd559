//! [`Host`]: where the facts about a machine come from: files below a root, and a few queries to the system that no file
//! answers. Tests imitate other machines with folders and a [`System`] of their own.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use limosa_host::Clock;
use rustix::fs::{Access, access};

/// The most that is read of one file.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// Facts of the system that are in no file.
pub trait System {
    /// The wall clock.
    fn clock(&self) -> io::Result<Clock>;
    /// Whether this user may read and write a node.
    fn may_use(&self, node: &Path) -> bool;
}

/// The system that this process runs on.
pub struct Running;

impl System for Running {
    fn clock(&self) -> io::Result<Clock> {
        limosa_host::clock()
    }

    fn may_use(&self, node: &Path) -> bool {
        access(node, Access::READ_OK | Access::WRITE_OK).is_ok()
    }
}

/// A machine to look at.
pub struct Host<'a> {
    root: &'a Path,
    pub system: &'a dyn System,
    /// Files that are there and cannot be read.
    unreadable: RefCell<Vec<String>>,
}

impl<'a> Host<'a> {
    pub fn new(root: &'a Path, system: &'a dyn System) -> Host<'a> {
        Host { root, system, unreadable: RefCell::default() }
    }

    /// Where a path of the machine is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Whether it is there, as far as this user may see.
    pub fn has(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// The bytes of a file, up to a limit; `None` if it does not exist, or cannot be read, which is noted.
    pub fn bytes(&self, path: &str) -> Option<Vec<u8>> {
        let found = self.path(path);
        let read = || -> io::Result<Vec<u8>> {
            // Opening something else, such as a FIFO, may wait for ever.
            if !fs::metadata(&found)?.is_file() {
                return Err(ErrorKind::InvalidInput.into());
            }
            let mut bytes = Vec::new();
            File::open(&found)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        match read() {
            Ok(bytes) => Some(bytes),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => None,
            Err(_) => {
                self.unreadable.borrow_mut().push(found.display().to_string());
                None
            }
        }
    }

    /// The text of a file, without space around it.
    pub fn text(&self, path: &str) -> Option<String> {
        Some(String::from_utf8_lossy(&self.bytes(path)?).trim().to_owned())
    }

    /// The number in a file.
    pub fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The names in a folder, in order; none if the folder does not exist.
    pub fn entries(&self, path: &str) -> Vec<String> {
        let found = self.path(path);
        let entries = match fs::read_dir(&found) {
            Ok(entries) => entries,
            Err(error) => {
                if error.kind() == ErrorKind::PermissionDenied {
                    self.unreadable.borrow_mut().push(found.display().to_string());
                }
                return Vec::new();
            }
        };
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Files and folders that could not be read, in the order in which they were asked for.
    pub fn unreadable(&self) -> Vec<String> {
        self.unreadable.borrow().clone()
    }
}
