//! A snapshot in a file, which appears under its name when it is complete.
//!
//! It is written under a hidden name in the same folder and synchronized, then takes its name in one step: by a rename
//! that replaces nothing (`RENAME_NOREPLACE`, or a hard link where the file system lacks that), or, to replace a file, by
//! an exchange of both names (`RENAME_EXCHANGE`, or a plain rename). After that step nothing is removed under the
//! snapshot's name, whatever fails.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::event::PollFlags;
use rustix::fs::{OFlags, RenameFlags, fstat};
use rustix::io::Errno;

use super::folder::{Folder, OpenFolder, is_same};
use super::{Durability, Publication, SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter};
use crate::Cancel;
use crate::link::{LinkError, Wait, poll_for};
use crate::private_folder::other_than_file;
use limosa_stream::{MigrationId, PREFACE_BYTES, Preface};

/// The end of a snapshot's name as long as it is not published.
const PARTIAL: &str = ".partial";

/// A snapshot in a file. Its reads and writes do not observe a deadline, since a regular file does not block for long; reads of
/// a pipe or a device do.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    path: PathBuf,
    replace: bool,
}

impl SnapshotFile {
    /// The file at this path. A save does not overwrite an existing file.
    pub fn new(path: impl Into<PathBuf>) -> SnapshotFile {
        SnapshotFile { path: path.into(), replace: false }
    }

    /// Whether a save replaces an existing regular file, at the moment when the new snapshot is complete. Anything else
    /// under the name (a directory, a symbolic link, a device, a FIFO or a socket) is refused all the same.
    pub fn replacing(self, replace: bool) -> SnapshotFile {
        SnapshotFile { replace, ..self }
    }

    fn file_name(&self) -> io::Result<&OsStr> {
        let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "the path does not name a file");
        self.path.file_name().ok_or_else(no_name)
    }

    fn create_in(&self, folder: Box<dyn Folder>) -> Result<Unpublished, LinkError> {
        let name = self.file_name()?.to_owned();
        check_name(&*folder, &name, self.replace)?;
        let mut temporary = OsString::from(".");
        temporary.push(&name);
        temporary.push(format!(".{}{PARTIAL}", MigrationId::random()?));
        let file = folder.create(&temporary).map_err(io::Error::from)?;
        let (path, replace) = (self.path.clone(), self.replace);
        Ok(Unpublished { folder, file, name, temporary, path, replace, is_mine: true })
    }
}

fn check(wait: Wait<'_>) -> Result<(), LinkError> {
    if wait.cancel.is_some_and(Cancel::is_cancelled) { Err(LinkError::Cancelled) } else { Ok(()) }
}

/// Refuses a name that cannot be taken.
fn check_name(folder: &dyn Folder, name: &OsStr, replace: bool) -> io::Result<()> {
    let stat = match folder.stat(name) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    match other_than_file(&stat) {
        None if replace => Ok(()),
        None => Err(exists()),
        Some(what) => {
            let kind = match what {
                "a directory" => io::ErrorKind::IsADirectory,
                _ => io::ErrorKind::InvalidInput,
            };
            let advice = match what {
                "a symbolic link" => "name the file that it points to, or remove the link",
                _ => "choose another name",
            };
            Err(io::Error::new(kind, format!("it is {what}, and only a regular file is replaced; {advice}")))
        }
    }
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
        self.file_name()?;
        Ok(Box::new(self.create_in(Box::new(OpenFolder::of(&self.path)?))?))
    }
}

/// A file that has not its final name yet.
struct Unpublished {
    folder: Box<dyn Folder>,
    file: File,
    name: OsString,
    temporary: OsString,
    path: PathBuf,
    replace: bool,
    /// Whether this file is what the temporary name is known to lead to, so that it is removed with it.
    is_mine: bool,
}

impl SnapshotWriter for Unpublished {
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

    fn publish(mut self: Box<Self>, wait: Wait<'_>) -> Publication {
        if let Err(why) = self.prepare(wait) {
            return Publication::NotPublished(why);
        }
        if let Err(error) = self.take_name() {
            // A network file system may carry out a request and report an error, so look.
            match self.has_name() {
                Ok(true) => {}
                Ok(false) => return Publication::NotPublished(error.into()),
                Err(errno) => {
                    // The temporary name may lead to the file that was replaced by now.
                    self.is_mine = false;
                    let (kind, partial) = (error.kind(), self.temporary_path());
                    let what = format!("{error}, and then {errno}; {} is left as it is", partial.display());
                    return Publication::Unknown(io::Error::new(kind, what).into());
                }
            }
        }
        self.is_mine = false;
        let durability = match self.folder.sync(&self.file) {
            // A file system that has nothing to synchronize says so with the first two. EROFS is not among them: a file
            // system that has just become read-only after an error may have lost the new name.
            Ok(()) | Err(Errno::INVAL | Errno::NOTSUP) => Durability::Durable,
            Err(errno) => Durability::Unknown(errno.into()),
        };
        Publication::Published { durability: self.clean_up(durability) }
    }
}

impl Unpublished {
    /// All that can fail before anything changes under the name.
    fn prepare(&self, wait: Wait<'_>) -> Result<(), LinkError> {
        check(wait)?;
        self.file.sync_all()?;
        check_name(&*self.folder, &self.name, self.replace)?;
        check(wait)
    }

    fn take_name(&self) -> io::Result<()> {
        let Unpublished { folder, name, temporary, .. } = self;
        if self.replace {
            return match folder.rename(temporary, name, RenameFlags::EXCHANGE) {
                // There is nothing to exchange it with, or the file system cannot.
                Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                    Ok(folder.rename(temporary, name, RenameFlags::empty())?)
                }
                renamed => Ok(renamed?),
            };
        }
        match folder.rename(temporary, name, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => Err(exists()),
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => match folder.link(temporary, name) {
                Err(Errno::EXIST) => Err(exists()),
                Err(errno @ (Errno::PERM | Errno::NOTSUP | Errno::NOSYS)) => {
                    let error = io::Error::from(errno);
                    let what =
                        "the file system can neither rename without replacing nor link; ask to replace";
                    Err(io::Error::new(error.kind(), format!("{error}: {what}")))
                }
                linked => Ok(linked?),
            },
            renamed => Ok(renamed?),
        }
    }

    /// Whether the snapshot's name leads to this file.
    fn has_name(&self) -> Result<bool, Errno> {
        match self.folder.stat(&self.name) {
            Ok(stat) => Ok(is_same(&stat, &fstat(&self.file)?)),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Removes the temporary name, if the publication left it: after a link it is a second name of the snapshot, after an exchange
    /// the name of the replaced file. A failure of this is not a failure of the publication.
    fn clean_up(&self, durability: Durability) -> Durability {
        let partial = self.temporary_path();
        let left = match self.folder.stat(&self.temporary) {
            Err(Errno::NOENT) => return durability,
            Ok(stat) => stat,
            Err(errno) => {
                tracing::warn!("{}: {errno}; if it is still there, remove it", partial.display());
                return durability;
            }
        };
        if let Some(what) = other_than_file(&left) {
            // It came under the name in the last moment.
            tracing::warn!(
                "{}: {what} that was at {} until now was moved here",
                partial.display(),
                self.path.display()
            );
            return durability;
        }
        let is_second_name = fstat(&self.file).is_ok_and(|stat| is_same(&left, &stat));
        match durability {
            // After a power failure the new one may be gone, so the old one stays.
            Durability::Unknown(error) if !is_second_name => {
                let what = format!("{error}; the file that was replaced is kept as {}", partial.display());
                Durability::Unknown(io::Error::new(error.kind(), what))
            }
            durability => {
                if let Err(errno) = self.folder.remove(&self.temporary) {
                    tracing::warn!("{}: {errno}; remove it", partial.display());
                }
                durability
            }
        }
    }

    fn temporary_path(&self) -> PathBuf {
        self.path.with_file_name(&self.temporary)
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        if self.is_mine {
            // A file that stays is not mistaken for a snapshot: its name says that it is partial.
            let _ = self.folder.remove(&self.temporary);
        }
    }
}

impl SnapshotSource for SnapshotFile {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// A descriptor of a process, as `/proc/PID/fd/N` names it, is borrowed from there; any other link of a process is refused.
    fn open(&self, _: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError> {
        // Reads wait for the writer of a FIFO, with a limit; the open does not.
        let file = limosa_host::open_to_read(&self.path, OFlags::NONBLOCK)?;
        let is_regular = file.metadata()?.is_file();
        Ok(Box::new(OpenFile { file, is_regular }))
    }

    /// Cuts the move's file under its temporary name down to the preface, which names the move. That the file is still
    /// there proves that it never got the snapshot's name, also to a later process. That there is nothing under the
    /// snapshot's name would prove nothing: another file system may be mounted there by now.
    fn withdraw(&self, id: MigrationId, wait: Wait<'_>) -> Result<bool, LinkError> {
        let folder = OpenFolder::of(&self.path)?;
        let prefix = [b".", self.file_name()?.as_bytes(), b"."].concat();
        for temporary in folder.names(&prefix, PARTIAL.as_bytes())? {
            check(wait)?;
            // A file that cannot be read proves nothing.
            let Ok(file) = folder.open(&temporary) else { continue };
            if read_id(&file).is_ok_and(|found| found == Some(id)) {
                file.set_len(PREFACE_BYTES as u64)?;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The id of the move whose stream is in a file.
fn read_id(mut file: &File) -> io::Result<Option<MigrationId>> {
    let mut preface = [0; PREFACE_BYTES];
    file.read_exact(&mut preface)?;
    Ok(Preface::decode(&preface).ok().map(|preface| preface.id))
}

/// An open file stays the same one when another takes its name.
struct OpenFile {
    file: File,
    is_regular: bool,
}

impl SnapshotReader for OpenFile {
    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        loop {
            check(wait)?;
            // A pipe or a terminal may have nothing for ever. A file always has something.
            if !self.is_regular && !poll_for(&self.file, PollFlags::IN, wait)? {
                continue;
            }
            match self.file.read(into) {
                Err(error)
                    if [io::ErrorKind::Interrupted, io::ErrorKind::WouldBlock].contains(&error.kind()) => {}
                done => return Ok(done?),
            }
        }
    }

    fn rewind(&mut self, _: Wait<'_>) -> Result<(), LinkError> {
        Ok(self.file.rewind()?)
    }
}

#[cfg(test)]
mod tests;
