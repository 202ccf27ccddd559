//! A file as a link that only goes one way and has nobody at the other end.

use std::fs::File;
use std::io::{IoSlice, Read, Write};

use super::{Link, LinkError, Wait};

/// A file that a stream is written to, or read from. Not waited on: a regular file never blocks
/// for long.
#[derive(Debug)]
pub struct FileLink {
    file: File,
    name: String,
}

impl FileLink {
    /// Takes a file at the position where the stream begins; `name` is for messages.
    pub fn new(file: File, name: impl Into<String>) -> FileLink {
        FileLink { file, name: name.into() }
    }
}

fn check(wait: Wait<'_>) -> Result<(), LinkError> {
    if wait.cancel.is_some_and(crate::Cancel::is_cancelled) { Err(LinkError::Cancelled) } else { Ok(()) }
}

impl Link for FileLink {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        check(wait)?;
        loop {
            match (&self.file).write_vectored(slices) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(0) => return Err(LinkError::Io(std::io::ErrorKind::WriteZero.into())),
                done => return Ok(done?),
            }
        }
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        check(wait)?;
        loop {
            match (&self.file).read(into) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(0) if !into.is_empty() => return Err(LinkError::Closed),
                done => return Ok(done?),
            }
        }
    }

    fn finish(&self) {}

    fn peer(&self) -> &str {
        &self.name
    }

    fn has_peer(&self) -> bool {
        false
    }
}
