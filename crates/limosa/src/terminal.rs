//! Standard error as a terminal: its width, whether it is given colours, and lines that do not tear a progress bar.

use std::ffi::OsStr;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use tracing_subscriber::fmt::MakeWriter;

use crate::standard_error;

/// The bar that is shown now.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn shown() -> MutexGuard<'static, Option<ProgressBar>> {
    SHOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether text for people is coloured: on a terminal with colours, unless NO_COLOR forbids it (no-color.org).
pub fn is_coloured() -> bool {
    let variable = |name| std::env::var_os(name);
    wants_colours(io::stderr().is_terminal(), variable("NO_COLOR").as_deref(), variable("TERM").as_deref())
}

/// Whether standard error is a terminal whose cursor can be moved.
pub fn moves_cursor() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").as_deref() != Some(OsStr::new("dumb"))
}

fn wants_colours(is_terminal: bool, no_color: Option<&OsStr>, term: Option<&OsStr>) -> bool {
    is_terminal && no_color.is_none_or(OsStr::is_empty) && term != Some(OsStr::new("dumb"))
}

/// The columns of the terminal; 80 if it does not report them.
pub fn columns() -> usize {
    error_columns().unwrap_or(80)
}

/// The columns of standard error; `None` if it is not a terminal.
pub fn error_columns() -> Option<usize> {
    terminal_size::terminal_size_of(io::stderr()).map(|(width, _)| usize::from(width.0))
}

/// The columns of standard output; `None` if it is not a terminal.
pub fn output_columns() -> Option<usize> {
    terminal_size::terminal_size_of(io::stdout()).map(|(width, _)| usize::from(width.0))
}

/// A bar on standard error, which is removed when this is dropped.
pub struct Bar(ProgressBar);

impl Bar {
    /// Shows a bar with this template, which turns by itself.
    pub fn show(bar: ProgressBar, template: &str) -> Bar {
        bar.set_draw_target(ProgressDrawTarget::term_like_with_hz(Box::<Drawing>::default(), 20));
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.enable_steady_tick(Duration::from_millis(100));
        *shown() = Some(bar.clone());
        Bar(bar)
    }

    /// The bar.
    pub fn bar(&self) -> &ProgressBar {
        &self.0
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        *shown() = None;
        self.0.finish_and_clear();
        standard_error::settle();
    }
}

/// The text of one drawing of a bar.
#[derive(Debug, Default)]
struct Drawing(Mutex<String>);

impl Drawing {
    fn push(&self, text: &str) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_str(text);
        Ok(())
    }

    /// Moves the cursor, by the sequence that ends with this letter (`console_codes.4`).
    fn go(&self, by: usize, letter: char) -> io::Result<()> {
        if by > 0 { self.push(&format!("\x1b[{by}{letter}")) } else { Ok(()) }
    }
}

impl TermLike for Drawing {
    fn width(&self) -> u16 {
        u16::try_from(columns()).unwrap_or(u16::MAX)
    }

    fn move_cursor_up(&self, by: usize) -> io::Result<()> {
        self.go(by, 'A')
    }

    fn move_cursor_down(&self, by: usize) -> io::Result<()> {
        self.go(by, 'B')
    }

    fn move_cursor_right(&self, by: usize) -> io::Result<()> {
        self.go(by, 'C')
    }

    fn move_cursor_left(&self, by: usize) -> io::Result<()> {
        self.go(by, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.push(text)?;
        self.push("\n")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.push(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.push("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        let drawn = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if !drawn.is_empty() {
            standard_error::bar(drawn.as_bytes());
        }
        Ok(())
    }
}

/// Calls this while the bar is removed from the terminal.
pub fn without_bar<T>(call: impl FnOnce() -> T) -> T {
    suspended(|| {
        // The call writes to another file.
        standard_error::settle();
        call()
    })
}

fn suspended<T>(call: impl FnOnce() -> T) -> T {
    // Not under the lock: the call may write a log line itself.
    let bar = shown().clone();
    match bar {
        Some(bar) => bar.suspend(call),
        None => call(),
    }
}

/// Where log lines go: each is written above the bar.
#[derive(Clone, Copy, Debug)]
pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        suspended(|| standard_error::line(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        Log
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_whose_user_has_not_refused_them() {
        let of = |is_terminal, no_color: Option<&str>, term: Option<&str>| {
            wants_colours(is_terminal, no_color.map(OsStr::new), term.map(OsStr::new))
        };
        assert!(of(true, None, Some("xterm")) && of(true, Some(""), None));
        assert!(
            !of(true, Some("1"), Some("xterm")) && !of(true, None, Some("dumb")) && !of(false, None, None)
        );
    }
}
