//! Streams at rest: a file that appears under its name only when it is whole.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use crate::link::FileLink;
use crate::stream::MigrationId;
use crate::{Error, Result};

/// A saved stream that is being written, beside its final name. Dropped before
/// [`Unfinished::finish`], it leaves nothing behind.
pub(crate) struct Unfinished {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    renamed: bool,
}

impl Unfinished {
    /// Creates the temporary file, and a link that writes to it.
    pub(crate) fn create(path: &Path) -> Result<(Unfinished, FileLink)> {
        let failed = |doing, error| Error::File { path: path.into(), doing, error };
        let Some(name) = path.file_name() else {
            return Err(failed("creating it", std::io::ErrorKind::InvalidInput.into()));
        };
        let unique = MigrationId::random().map_err(|error| failed("creating it", error))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{unique}.partial"));
        let temporary = path.with_file_name(hidden);
        let file = OpenOptions::new().write(true).create_new(true).open(&temporary);
        let file = file.map_err(|error| failed("creating it", error))?;
        let unfinished = Unfinished { file, temporary, path: path.into(), renamed: false };
        let file = unfinished.file.try_clone().map_err(|error| failed("creating it", error))?;
        Ok((unfinished, FileLink::new(file, path.display().to_string())))
    }

    /// Everything is written: puts it on the disk, and gives it its name.
    pub(crate) fn finish(mut self) -> Result<()> {
        let failed = |doing, error| Error::File { path: self.path.clone(), doing, error };
        self.file.sync_all().map_err(|error| failed("writing it to the disk", error))?;
        std::fs::rename(&self.temporary, &self.path).map_err(|error| failed("renaming it", error))?;
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        let synced = synced.map_err(|error| failed("writing its name to the disk", error));
        self.renamed = true;
        if synced.is_err() {
            // A file that may be gone after a crash must not be relied on now.
            let _ = std::fs::remove_file(&self.path);
        }
        synced
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.renamed {
            // Nobody takes it for a stream: its name says that it is partial, and its SUM is missing.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}
