//! A pseudo-terminal (pty(7)), and what a person would see on it.

use std::fmt;
use std::fs::File;
use std::io::Read;

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// A pseudo-terminal of this width.
pub struct Terminal {
    master: File,
    columns: u16,
}

impl Terminal {
    /// Makes one.
    pub fn new(columns: u16) -> Terminal {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).expect("a pseudo-terminal");
        grantpt(&master).expect("a pseudo-terminal of ours");
        unlockpt(&master).expect("a pseudo-terminal of ours");
        let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&master, size).expect("a pseudo-terminal has a size");
        Terminal { master: master.into(), columns }
    }

    /// The end that a program has as its standard output or error.
    pub fn end(&self) -> File {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        ioctl_tiocgptpeer(&self.master, flags).expect("the other end").into()
    }

    /// Reads until no program has it open, and shows what was written. One has to have it open when this is called.
    pub fn show(mut self) -> Screen {
        let mut screen = Screen::new(self.columns.into());
        let (mut bytes, mut written) = ([0; 4096], Vec::new());
        // EIO once all other ends are closed.
        while let Ok(read @ 1..) = self.master.read(&mut bytes) {
            written.extend_from_slice(&bytes[..read]);
        }
        screen.write(&String::from_utf8(written).expect("text"));
        screen
    }
}

/// A screen, as high as what is written to it.
pub struct Screen {
    columns: usize,
    rows: Vec<Vec<char>>,
    row: usize,
    column: usize,
    /// Every content that a row has had when the cursor left it, or the row was erased.
    shown: Vec<String>,
    /// The contents of rows that were continued in the next one.
    wrapped: Vec<String>,
    /// Whether a colour or another rendition was set.
    is_coloured: bool,
}

impl Screen {
    /// An empty one.
    pub fn new(columns: usize) -> Screen {
        let (shown, wrapped) = (Vec::new(), Vec::new());
        Screen { columns, rows: vec![Vec::new()], row: 0, column: 0, shown, wrapped, is_coloured: false }
    }

    /// The rows as they are in the end, without spaces at their ends.
    pub fn rows(&self) -> Vec<String> {
        self.rows.iter().map(|row| text(row)).collect()
    }

    /// Every content that a row has had when the cursor left it, or it was erased.
    pub fn shown(&self) -> &[String] {
        &self.shown
    }

    /// The rows that something wider than the terminal has filled.
    pub fn wrapped(&self) -> &[String] {
        &self.wrapped
    }

    /// Whether a colour or another rendition was set.
    pub fn is_coloured(&self) -> bool {
        self.is_coloured
    }

    /// Shows a text with the control sequences (ECMA-48) of progress bars and log lines. Panics on others.
    pub fn write(&mut self, text: &str) {
        let mut letters = text.chars();
        while let Some(letter) = letters.next() {
            match letter {
                '\r' => self.go(self.row, 0),
                '\n' => self.go(self.row + 1, self.column),
                '\x1b' => {
                    assert_eq!(letters.next(), Some('['), "a control sequence: {text:?}");
                    let mut number = String::new();
                    let end = letters.find(|letter| {
                        number.push(*letter);
                        letter.is_ascii_alphabetic()
                    });
                    number.pop();
                    self.control(end.expect("the end of a control sequence"), &number);
                }
                letter if letter.is_control() => panic!("{letter:?} in {text:?}"),
                letter => self.put(letter),
            }
        }
    }

    fn control(&mut self, end: char, number: &str) {
        let count = || number.parse().unwrap_or(1);
        match end {
            'A' => self.go(self.row.saturating_sub(count()), self.column),
            'B' => self.go(self.row + count(), self.column),
            'C' => self.go(self.row, self.column + count()),
            'D' => self.go(self.row, self.column.saturating_sub(count())),
            'K' => {
                self.leave();
                let keep = if number == "2" { 0 } else { self.column };
                self.rows[self.row].truncate(keep);
            }
            'm' => self.is_coloured = true,
            // The cursor is hidden or shown.
            'h' | 'l' => {}
            end => panic!("a control sequence that ends in {end} and has {number:?}"),
        }
    }

    /// Notes what is in the row.
    fn leave(&mut self) {
        let text = text(&self.rows[self.row]);
        if !text.is_empty() && self.shown.last() != Some(&text) {
            self.shown.push(text);
        }
    }

    fn go(&mut self, row: usize, column: usize) {
        self.leave();
        (self.row, self.column) = (row, column.min(self.columns));
        while self.rows.len() <= self.row {
            self.rows.push(Vec::new());
        }
    }

    fn put(&mut self, letter: char) {
        if self.column == self.columns {
            self.wrapped.push(text(&self.rows[self.row]));
            self.go(self.row + 1, 0);
        }
        let row = &mut self.rows[self.row];
        while row.len() <= self.column {
            row.push(' ');
        }
        row[self.column] = letter;
        self.column += 1;
    }
}

impl fmt::Debug for Screen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Screen")
            .field("columns", &self.columns)
            .field("rows", &self.rows())
            .field("shown", &self.shown)
            .field("wrapped", &self.wrapped)
            .field("is_coloured", &self.is_coloured)
            .finish_non_exhaustive()
    }
}

fn text(row: &[char]) -> String {
    row.iter().collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_shows_what_a_terminal_does() {
        let mut screen = Screen::new(8);
        screen.write("12345678\r\nabcdefghij\r\n* bar\r\x1b[2Klog\r\n* bar\r\x1b[2K\x1b[1Aend");
        assert_eq!(screen.rows(), ["12345678", "abcdefgh", "ij", "end", ""]);
        assert_eq!(screen.wrapped(), ["abcdefgh"]);
        assert_eq!(screen.shown(), ["12345678", "abcdefgh", "ij", "* bar", "log", "* bar"]);
        assert!(!screen.is_coloured());
        screen.write("\x1b[32mgreen\x1b[0m");
        assert!(screen.is_coloured());
    }

    #[test]
    fn a_program_finds_the_width_of_its_terminal() {
        let terminal = Terminal::new(60);
        let end = terminal.end();
        let mut command = std::process::Command::new("stty");
        let mut child = command.arg("size").stdin(end.try_clone().unwrap()).stdout(end).spawn().unwrap();
        drop(command);
        let screen = terminal.show();
        child.wait().unwrap();
        assert_eq!(screen.rows()[0], "24 60");
    }
}
