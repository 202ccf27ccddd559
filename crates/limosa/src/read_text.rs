//! Text files that a user names: read whole, within a bound, and never waited for.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use anyhow::Context;
use limosa_host::{Named, open_to_read, resolve};
use rustix::fs::OFlags;

use crate::exit::{self, Code};

/// The text of a file, or of standard input for `-`. Errors name the file.
pub fn read_text(path: &Path, bytes_max: u64) -> anyhow::Result<String> {
    if path == Path::new("-") {
        return bounded("standard input", std::io::stdin().lock(), bytes_max);
    }
    let name = path.display().to_string();
    let opened = open(path, "expected one, or - for standard input");
    let file = opened.map_err(|error| unread(&name, error))?;
    bounded(&name, file, bytes_max)
}

/// The same of a file that need not be there.
pub fn read_text_if_there(path: &Path, bytes_max: u64) -> anyhow::Result<Option<String>> {
    let name = path.display().to_string();
    match open(path, "expected one") {
        Ok(file) => bounded(&name, file, bytes_max).map(Some),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unread(&name, error)),
    }
}

/// A FIFO without a writer would be waited for, in the opening already. One that is open here (`/dev/stdin`, `/dev/fd/N`) has, or
/// had, a writer.
pub fn open(path: &Path, expected: &str) -> std::io::Result<File> {
    let is_open_here = matches!(resolve(path)?, Named::Descriptor(_));
    let file = open_to_read(path, OFlags::NONBLOCK)?;
    if is_open_here || file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(std::io::Error::new(ErrorKind::InvalidInput, format!("it is no regular file; {expected}")))
}

/// Something that is not a file gets the exit code of a missing file.
fn unread(name: &str, error: std::io::Error) -> anyhow::Error {
    let what = format!("{name} cannot be read");
    match error.kind() {
        ErrorKind::InvalidInput => exit::error(Code::Unreachable, format!("{what}: {error}")),
        _ => anyhow::Error::from(error).context(what),
    }
}

fn bounded(name: &str, from: impl Read, bytes_max: u64) -> anyhow::Result<String> {
    let mut text = Vec::new();
    from.take(bytes_max + 1).read_to_end(&mut text).with_context(|| format!("{name} cannot be read"))?;
    let damaged = |why: &str| exit::error(Code::Damaged, format!("{name}: {why}"));
    if text.len() as u64 > bytes_max {
        return Err(damaged(&format!("it is longer than {bytes_max} bytes")));
    }
    String::from_utf8(text).map_err(|_| damaged("it is no text"))
}
