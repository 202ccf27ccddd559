//! QEMU without a processor (`qtest`, QEMU's `docs/devel/testing/qtest.rst`): reads and writes of memory and ports as a
//! processor would make them, and the levels of interrupt lines.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;

use crate::LIMIT;

/// A connection. Every access is a command that is answered when it is done.
pub struct Qtest {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    interrupts: Vec<Interrupt>,
}

/// A line of the interrupt controller changed its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// Which line.
    pub line: u32,
    /// It rose.
    pub is_raised: bool,
}

impl Qtest {
    pub(crate) fn new(stream: UnixStream) -> Qtest {
        stream.set_read_timeout(Some(LIMIT)).expect("a socket of ours");
        let writer = stream.try_clone().expect("an fd");
        Qtest { reader: BufReader::new(stream), writer, interrupts: Vec::new() }
    }

    /// From now on changes of the I/O APIC's inputs are told.
    pub fn intercept_interrupts(&mut self) {
        self.command("irq_intercept_in ioapic");
    }

    /// Waits until a line is at this level, and forgets the changes until then. The machine's clock does not go on by
    /// itself, and interrupts arrive in the main loop, so that each look makes a turn of it.
    ///
    /// # Panics
    ///
    /// When it does not come within [`LIMIT`].
    pub fn wait_for_interrupt(&mut self, wanted: Interrupt) {
        self.turn_until("an interrupt", |qtest| {
            let at = qtest.interrupts.iter().position(|change| *change == wanted)?;
            qtest.interrupts.drain(..=at);
            Some(())
        });
    }

    /// Makes turns of QEMU's main loop until `done` gives something.
    ///
    /// # Panics
    ///
    /// When it does not within [`LIMIT`].
    pub fn turn_until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Qtest) -> Option<T>) -> T {
        let until = std::time::Instant::now() + LIMIT;
        loop {
            if let Some(done) = done(self) {
                return done;
            }
            assert!(std::time::Instant::now() < until, "{what} does not come");
            self.command("clock_step 1000");
        }
    }

    /// Reads a port of 1, 2 or 4 bytes.
    pub fn port_read(&mut self, port: u16, bytes: usize) -> u32 {
        let answer = self.command(&format!("in{} {port:#x}", width(bytes)));
        u32::try_from(number(&answer)).expect("as wide as was asked for")
    }

    /// The same; `None` when QEMU ends meanwhile.
    pub fn try_port_read(&mut self, port: u16, bytes: usize) -> Option<u32> {
        let answer = self.try_command(&format!("in{} {port:#x}", width(bytes)))?;
        Some(u32::try_from(number(&answer)).expect("as wide as was asked for"))
    }

    /// Writes a port.
    pub fn port_write(&mut self, port: u16, bytes: usize, value: u32) {
        self.command(&format!("out{} {port:#x} {value:#x}", width(bytes)));
    }

    /// Reads a register of 1, 2, 4 or 8 bytes in memory space.
    pub fn register_read(&mut self, address: u64, bytes: usize) -> u64 {
        let answer = self.command(&format!("read{} {address:#x}", width(bytes)));
        number(&answer)
    }

    /// Writes a register.
    pub fn register_write(&mut self, address: u64, bytes: usize, value: u64) {
        self.command(&format!("write{} {address:#x} {value:#x}", width(bytes)));
    }

    /// Reads guest memory.
    pub fn read(&mut self, address: u64, bytes: usize) -> Vec<u8> {
        let answer = self.command(&format!("read {address:#x} {bytes:#x}"));
        let digits = answer.strip_prefix("0x").unwrap_or_else(|| panic!("no memory: {answer}")).as_bytes();
        digits
            .chunks(2)
            .map(|pair| {
                let pair = std::str::from_utf8(pair).expect("hexadecimal digits");
                u8::from_str_radix(pair, 16).expect("hexadecimal digits")
            })
            .collect()
    }

    /// Writes guest memory.
    pub fn write(&mut self, address: u64, data: &[u8]) {
        let digits: String = data.iter().map(|byte| format!("{byte:02x}")).collect();
        self.command(&format!("write {address:#x} {:#x} 0x{digits}", data.len()));
    }

    /// What follows OK.
    fn command(&mut self, command: &str) -> String {
        self.try_command(command).unwrap_or_else(|| panic!("QEMU closed qtest at `{command}`"))
    }

    /// The same; `None` when QEMU is gone.
    fn try_command(&mut self, command: &str) -> Option<String> {
        writeln!(self.writer, "{command}").ok()?;
        loop {
            let mut line = String::new();
            match self.reader.read_line(&mut line) {
                Ok(0) => return None,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                read => drop(read.expect("QEMU answers")),
            }
            let mut words = line.split_whitespace();
            match words.next() {
                Some("OK") => return Some(words.next().unwrap_or_default().to_owned()),
                Some("IRQ") => {
                    let is_raised = words.next() == Some("raise");
                    let line = words.next().and_then(|word| word.parse().ok()).expect("the number of a line");
                    self.interrupts.push(Interrupt { line, is_raised });
                }
                _ => panic!("`{command}`: {line}"),
            }
        }
    }
}

fn width(bytes: usize) -> char {
    match bytes {
        1 => 'b',
        2 => 'w',
        4 => 'l',
        8 => 'q',
        _ => panic!("no access of {bytes} bytes"),
    }
}

fn number(answer: &str) -> u64 {
    let digits = answer.strip_prefix("0x").unwrap_or_else(|| panic!("no number: {answer}"));
    u64::from_str_radix(digits, 16).expect("hexadecimal digits")
}
