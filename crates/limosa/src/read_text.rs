//! Text files that a user names: read whole, within a bound, and never waited for.

use std::io::{ErrorKind, Read};
use std::path::Path;

use anyhow::Context;
use limosa_host::open_regular;

use crate::exit::{self, Code};

/// The text of a file, or of standard input for `-`. Errors name the file.
pub fn read_text(path: &Path, bytes_max: u64) -> anyhow::Result<String> {
    if path == Path::new("-") {
        return bounded("standard input", std::io::stdin().lock(), bytes_max);
    }
    let name = path.display().to_string();
    let opened = open_regular(path, "expected a regular file, or - for standard input");
    let file = opened.map_err(|error| unread(&name, error))?;
    bounded(&name, file, bytes_max)
}

/// The same of a file that need not be there.
pub fn read_text_if_there(path: &Path, bytes_max: u64) -> anyhow::Result<Option<String>> {
    let name = path.display().to_string();
    match open_regular(path, "expected a regular file") {
        Ok(file) => bounded(&name, file, bytes_max).map(Some),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unread(&name, error)),
    }
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
