//! Output of the command: text or JSON on standard output, progress on standard error.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use limosa_protocol::MigrationFlags;
use serde::Serialize;

use crate::exit::{self, Code};
use crate::standard_error;
use crate::terminal;
use crate::text;

/// Limit on the indexes of regions or interrupts that are listed, whatever a device claims.
pub const INDEXES_MAX: u32 = 256;

/// A document: the version of the schema (`docs/output.schema.json`) and the command, followed by the content.
#[derive(Serialize)]
pub struct Document<'a, T> {
    schema: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<&'static str>,
    #[serde(flatten)]
    content: &'a T,
}

/// Where results go.
#[derive(Debug)]
pub struct Output {
    pub json: bool,
    /// The command, unless the command line has none.
    command: Option<&'static str>,
    /// Whether it is one of several documents, each of which has a line.
    is_one_of_many: bool,
    /// Whether a document was printed, or begun.
    printed: AtomicBool,
    /// Whether the failure of the command was reported.
    told: AtomicBool,
}

impl Output {
    pub fn new(json: bool, command: Option<&'static str>) -> Output {
        Output {
            json,
            command,
            is_one_of_many: false,
            printed: AtomicBool::new(false),
            told: AtomicBool::new(false),
        }
    }

    /// For one result, or one failure, of a command that has many.
    pub fn one_of_many(&self) -> Output {
        Output { is_one_of_many: true, ..Output::new(self.json, self.command) }
    }

    /// The document with this content.
    pub fn document<'a, T>(&self, content: &'a T) -> Document<'a, T> {
        Document { schema: limosa_trace::sink::SCHEMA, command: self.command, content }
    }

    /// Prints a result: the JSON document, or what `text` writes.
    pub fn result<T: Serialize>(
        &self,
        result: &T,
        text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        self.printed.store(true, Ordering::Relaxed);
        self.print(|| text::json(&self.document(result), self.is_one_of_many), text)
    }

    /// Reports how the command failed, once: to people on standard error, and in a document unless there is one on standard
    /// output already.
    pub fn failure<T: Serialize>(&self, message: &str, failure: &T) {
        if self.told.swap(true, Ordering::Relaxed) {
            return;
        }
        standard_error::line(format!("{}\n", text::lines(message)).as_bytes());
        if self.json && !self.printed.swap(true, Ordering::Relaxed) {
            let _ = self.line(failure, |_| Ok(()));
        }
    }

    /// Prints one of several results, which come at any time: a JSON document in a line, or what `text` writes.
    pub fn line<T: Serialize>(
        &self,
        result: &T,
        text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        self.print(|| text::json(&self.document(result), true), text)
    }

    /// Prints a part of a result for people, when there is one.
    pub fn text(&self, text: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> anyhow::Result<()> {
        if self.json { Ok(()) } else { self.print(|| Ok(String::new()), text) }
    }

    fn print(
        &self,
        json: impl FnOnce() -> io::Result<String>,
        text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        let printed = match self.json {
            true => json()? + "\n",
            false => {
                let mut written = Vec::new();
                text(&mut written)?;
                text::lines(&String::from_utf8_lossy(&written))
            }
        };
        // On a terminal, earlier lines come first.
        standard_error::settle();
        let mut to = io::stdout().lock();
        match to.write_all(printed.as_bytes()).and_then(|()| to.flush()) {
            // The reader has closed its end.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(|error| exit::error(Code::Failed, format!("standard output: {error}"))),
        }
    }

    /// Prints a line about what the command is doing. In JSON mode it goes to standard error, since standard output has only
    /// documents.
    pub fn say(&self, line: &str) {
        if self.json {
            return self.say_aside(line);
        }
        // A reader that is gone does not end the command.
        let _ = writeln!(io::stdout(), "{}", fitted(line, terminal::output_columns()));
    }

    /// The same on standard error, if standard output is used for something else.
    pub fn say_aside(&self, line: &str) {
        standard_error::line(format!("{}\n", fitted(line, terminal::error_columns())).as_bytes());
    }

    /// Says that the command listens at this address, as [`Output::say`] does. The process that started this one waits for this line.
    pub fn listening(&self, address: &dyn std::fmt::Display) {
        self.say(&format!("listening on {address}"));
    }

    /// Whether progress bars make sense.
    pub fn progress(&self) -> bool {
        !self.json && terminal::moves_cursor()
    }
}

/// A text of another process, with everything escaped that could control a terminal.
pub fn plain(text: &str) -> String {
    let mut plain = String::new();
    for letter in text.chars() {
        match letter {
            '\'' | '"' | '\\' => plain.push(letter),
            letter => plain.extend(letter.escape_debug()),
        }
    }
    plain
}

/// The names of migration flags, as documents have them.
pub fn flag_names(flags: MigrationFlags) -> Vec<&'static str> {
    flags.iter_names().map(|(name, _)| name).collect()
}

/// Writes what `print` prints in lines that fit the terminal. Without a terminal, another program may search the lines, so they
/// are not folded.
pub fn folded(to: &mut dyn Write, print: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut text = Vec::new();
    print(&mut text)?;
    match terminal::output_columns() {
        Some(columns) => to.write_all(text::folded(&String::from_utf8_lossy(&text), columns).as_bytes()),
        None => to.write_all(&text),
    }
}

/// A status line, in lines of at most this many columns if it goes to a terminal. Programs get one line.
fn fitted(line: &str, columns: Option<usize>) -> String {
    let line = text::line(line);
    match columns {
        Some(columns) => text::folded(&line, columns).trim_end().to_owned(),
        None => line,
    }
}

/// A number of bytes as people read it.
pub fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_progress_was_wider_than_its_terminal() {
        let line = "measuring /run/limosa/net.sock: it is stopped and reset again and again, and gets its state back in the \
                    end; /run/limosa/peer.sock loses its state";
        for columns in [40, 80, 132] {
            let fitted = fitted(line, Some(columns));
            assert!(fitted.lines().all(|line| line.chars().count() <= columns), "{columns}: {fitted}");
            assert_eq!(
                fitted.split_whitespace().collect::<Vec<_>>(),
                line.split_whitespace().collect::<Vec<_>>()
            );
        }
        // A program waits for the whole of it in one line.
        assert_eq!(fitted(line, None), line);
        // A name has no place at which it could be folded, and is not torn: it can be copied.
        let name = format!("listening on /{}", "x".repeat(100));
        assert_eq!(fitted(&name, Some(80)).split_whitespace().last(), name.split_whitespace().last());
    }
}
