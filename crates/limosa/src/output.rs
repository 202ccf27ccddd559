//! What the command prints: text or JSON on standard output, progress on standard error.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

/// Indexes of regions or interrupts that are listed at most, whatever a device claims.
pub const INDEXES_MAX: u32 = 256;

/// Where results go.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub json: bool,
}

impl Output {
    /// Prints a result: the JSON document, or what `text` writes.
    pub fn result<T: Serialize>(
        &self,
        result: &T,
        text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        let mut to = io::BufWriter::new(io::stdout().lock());
        let done = match self.json {
            true => serde_json::to_writer_pretty(&mut to, result)
                .map_err(io::Error::from)
                .and_then(|()| writeln!(to)),
            false => text(&mut to),
        };
        match done.and_then(|()| to.flush()) {
            // Whoever reads has enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => Ok(other?),
        }
    }

    /// Whether progress bars make sense.
    pub fn progress(&self) -> bool {
        !self.json && io::stderr().is_terminal()
    }
}

/// A number of bytes as people read it.
pub fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
