//! A snapshot in a file, which appears under its name only when it is whole.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::{SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter};
use crate::Cancel;
use crate::link::{LinkError, Wait};
use limosa_stream::MigrationId;

/// A file as the place of a snapshot. Not waited on: a regular file never blocks for long.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    path: PathBuf,
    replace: bool,
}

impl SnapshotFile {
    /// The file at this path. One that is there already is not overwritten.
    pub fn new(path: impl Into<PathBuf>) -> SnapshotFile {
        SnapshotFile { path: path.into(), replace: false }
    }

    /// Whether a file that is there already gives way, at the moment when the new one is whole.
    pub fn replacing(self, replace: bool) -> SnapshotFile {
        SnapshotFile { replace, ..self }
    }
}

fn check(wait: Wait<'_>) -> Result<(), LinkError> {
    if wait.cancel.is_some_and(Cancel::is_cancelled) { Err(LinkError::Cancelled) } else { Ok(()) }
}

fn exists() -> io::Error {
    io::Error::new(
        io::ErrorKind::AlreadyExists,
        "there is a file already; choose another name, or ask to replace it",
    )
}

impl SnapshotTarget for SnapshotFile {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn create(&self, _: Wait<'_>) -> Result<Box<dyn SnapshotWriter>, LinkError> {
        let Some(name) = self.path.file_name() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it names no file").into());
        };
        if self.path.is_dir() {
            return Err(io::Error::from(io::ErrorKind::IsADirectory).into());
        }
        // The rename would refuse as well, but only when all is written.
        if !self.replace && self.path.symlink_metadata().is_ok() {
            return Err(exists().into());
        }
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.partial", MigrationId::random()?));
        let temporary = self.path.with_file_name(hidden);
        let file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        Ok(Box::new(Unfinished { file, temporary, to: self.clone(), renamed: false }))
    }
}

/// A file that is being written, beside its final name.
struct Unfinished {
    file: File,
    temporary: PathBuf,
    to: SnapshotFile,
    renamed: bool,
}

impl SnapshotWriter for Unfinished {
    fn write(&mut self, bytes: &[u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        check(wait)?;
        loop {
            match self.file.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) => return Err(LinkError::Io(io::ErrorKind::WriteZero.into())),
                done => return Ok(done?),
            }
        }
    }

    fn publish(mut self: Box<Self>, _: Wait<'_>) -> Result<(), LinkError> {
        self.file.sync_all()?;
        rename(&self.temporary, &self.to)?;
        self.renamed = true;
        let directory = match self.to.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        if synced.is_err() {
            // A file that may be gone after a crash must not be relied on now.
            let _ = std::fs::remove_file(&self.to.path);
        }
        Ok(synced?)
    }
}

fn rename(temporary: &Path, to: &SnapshotFile) -> io::Result<()> {
    if to.replace {
        return std::fs::rename(temporary, &to.path);
    }
    match renameat_with(CWD, temporary, CWD, &to.path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(exists()),
        // A file system that cannot do that in one step: a second name never replaces a file either.
        Err(Errno::INVAL | Errno::NOSYS) => match std::fs::hard_link(temporary, &to.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(exists()),
            linked => linked.and_then(|()| std::fs::remove_file(temporary)),
        },
        Err(errno) => Err(errno.into()),
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.renamed {
            // Nobody takes it for a snapshot: its name says that it is partial, and its end is missing.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

impl SnapshotSource for SnapshotFile {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn open(&self, _: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError> {
        Ok(Box::new(OpenFile(File::open(&self.path)?)))
    }
}

/// An open file stays what it is when another is renamed over it.
struct OpenFile(File);

impl SnapshotReader for OpenFile {
    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        check(wait)?;
        loop {
            match self.0.read(into) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return Ok(done?),
            }
        }
    }

    fn rewind(&mut self, _: Wait<'_>) -> Result<(), LinkError> {
        Ok(self.0.rewind()?)
    }
}
