//! One 16550A: registers, FIFOs, and when it wants an interrupt (`PC16550D data sheet`, 8.0 to
//! 8.9). Pure: bytes go in and come out, and time does not pass.
//!
//! What is simplified: a byte takes no time on the line. So what is below the trigger level is
//! reported as a timeout at once, and the transmitter is empty when its FIFO is. Parity and framing
//! errors and breaks do not happen.

use std::collections::VecDeque;

/// Bytes of each FIFO.
pub(super) const FIFO_BYTES: usize = 16;

/// Registers of a port.
pub(super) const REGISTERS: u64 = 8;

const IER_RECEIVED: u8 = 1 << 0;
const IER_EMPTY: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;
const IER_BITS: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const FCR_CLEAR_TRANSMITTER: u8 = 1 << 2;
/// Enable, DMA mode and trigger level are kept.
const FCR_BITS: u8 = 0xc9;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const MCR_BITS: u8 = 0x1f;

const LSR_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_HOLDING_EMPTY: u8 = 1 << 5;
const LSR_EMPTY: u8 = 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// The line's other end is there and ready.
const MSR_LINE: u8 = MSR_CTS | MSR_DSR | MSR_DCD;

/// A 16550A.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) interrupt_enable: u8,
    pub(super) fifo_control: u8,
    pub(super) line_control: u8,
    pub(super) modem_control: u8,
    pub(super) scratch: u8,
    pub(super) divisor: u16,
    pub(super) overrun: bool,
    /// Lines in the upper half, which of them changed since the last read in the lower.
    pub(super) modem_status: u8,
    /// The transmitter became empty, and nobody was told yet.
    pub(super) empty_pending: bool,
    pub(super) received: VecDeque<u8>,
    pub(super) to_send: VecDeque<u8>,
}

impl Default for Port {
    /// As after a master reset.
    fn default() -> Port {
        Port {
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            scratch: 0,
            divisor: 12,
            overrun: false,
            modem_status: MSR_LINE,
            empty_pending: false,
            received: VecDeque::with_capacity(FIFO_BYTES),
            to_send: VecDeque::with_capacity(FIFO_BYTES),
        }
    }
}

impl Port {
    /// How many bytes each FIFO takes: 1 while they are off.
    pub(super) fn fifo_bytes(&self) -> usize {
        if self.fifo_control & FCR_ENABLE != 0 { FIFO_BYTES } else { 1 }
    }

    /// How many bytes may be received without an overrun. None in loopback mode, in which the
    /// receiver is cut off from the line.
    pub(super) fn room(&self) -> usize {
        if self.loops() { 0 } else { self.fifo_bytes().saturating_sub(self.received.len()) }
    }

    fn loops(&self) -> bool {
        self.modem_control & MCR_LOOP != 0
    }

    /// A byte came.
    pub(super) fn receive(&mut self, byte: u8) {
        if self.received.len() >= self.fifo_bytes() {
            self.overrun = true;
            if self.fifo_control & FCR_ENABLE == 0 {
                // Without FIFOs the new byte takes the place of the old one.
                self.received[0] = byte;
            }
            return;
        }
        let word = 0xff >> (3 - (self.line_control & 3));
        self.received.push_back(byte & word);
    }

    /// The next byte for the line.
    pub(super) fn send(&mut self) -> Option<u8> {
        let byte = self.to_send.pop_front()?;
        self.empty_pending |= self.to_send.is_empty();
        Some(byte)
    }

    /// Whether the interrupt line is active.
    pub(super) fn interrupts(&self) -> bool {
        self.cause() != IIR_NONE
    }

    fn cause(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        let trigger = match (self.fifo_bytes(), self.fifo_control >> 6) {
            (FIFO_BYTES, 1) => 4,
            (FIFO_BYTES, 2) => 8,
            (FIFO_BYTES, 3) => 14,
            _ => 1,
        };
        if enabled(IER_LINE) && self.overrun {
            IIR_LINE
        } else if enabled(IER_RECEIVED) && self.received.len() >= trigger {
            IIR_RECEIVED
        } else if enabled(IER_RECEIVED) && !self.received.is_empty() {
            IIR_TIMEOUT
        } else if enabled(IER_EMPTY) && self.empty_pending {
            IIR_EMPTY
        } else if enabled(IER_MODEM) && self.modem_status & 0x0f != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// The guest reads a register, 0 to 7.
    pub(super) fn read(&mut self, register: u64) -> u8 {
        let latch = self.line_control & LCR_DLAB != 0;
        match register {
            0 if latch => self.divisor as u8,
            1 if latch => (self.divisor >> 8) as u8,
            0 => self.received.pop_front().unwrap_or(0),
            1 => self.interrupt_enable,
            2 => {
                let cause = self.cause();
                self.empty_pending &= cause != IIR_EMPTY;
                let fifos = if self.fifo_control & FCR_ENABLE != 0 { IIR_FIFOS } else { 0 };
                cause | fifos
            }
            3 => self.line_control,
            4 => self.modem_control,
            5 => {
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                let ready = if self.received.is_empty() { 0 } else { LSR_READY };
                let empty = if self.to_send.is_empty() { LSR_HOLDING_EMPTY | LSR_EMPTY } else { 0 };
                overrun | ready | empty
            }
            6 => {
                let status = self.modem_status;
                self.modem_status &= 0xf0;
                status
            }
            7 => self.scratch,
            _ => 0,
        }
    }

    /// The guest writes a register.
    pub(super) fn write(&mut self, register: u64, value: u8) {
        let latch = self.line_control & LCR_DLAB != 0;
        match register {
            0 if latch => self.divisor = self.divisor & 0xff00 | u16::from(value),
            1 if latch => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            0 => self.transmit(value),
            1 => {
                let turned_on = value & !self.interrupt_enable;
                self.interrupt_enable = value & IER_BITS;
                // A driver that enables the interrupt for an empty transmitter gets one at once where it is empty already.
                self.empty_pending |= turned_on & IER_EMPTY != 0 && self.to_send.is_empty();
            }
            2 => self.control_fifos(value),
            3 => self.line_control = value,
            4 => {
                self.modem_control = value & MCR_BITS;
                self.set_modem_lines(self.modem_lines());
            }
            7 => self.scratch = value,
            _ => {}
        }
    }

    fn transmit(&mut self, byte: u8) {
        self.empty_pending = false;
        if self.loops() {
            self.receive(byte);
            self.empty_pending = true;
            return;
        }
        if self.to_send.len() >= self.fifo_bytes() {
            // The guest did not look: the chip overwrites what is last.
            self.to_send.pop_back();
        }
        self.to_send.push_back(byte);
    }

    fn control_fifos(&mut self, value: u8) {
        let toggled = (value ^ self.fifo_control) & FCR_ENABLE != 0;
        if toggled || value & FCR_CLEAR_RECEIVER != 0 {
            self.received.clear();
        }
        if toggled || value & FCR_CLEAR_TRANSMITTER != 0 {
            self.empty_pending |= !self.to_send.is_empty();
            self.to_send.clear();
        }
        self.fifo_control = if value & FCR_ENABLE != 0 { value & FCR_BITS } else { 0 };
    }

    /// What the modem lines are: the line's other end, or in loopback mode the modem control's own.
    fn modem_lines(&self) -> u8 {
        if !self.loops() {
            return MSR_LINE;
        }
        [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .into_iter()
            .filter(|(control, _)| self.modem_control & control != 0)
            .fold(0, |lines, (_, line)| lines | line)
    }

    fn set_modem_lines(&mut self, lines: u8) {
        let changed = (self.modem_status ^ lines) >> 4;
        // The ring indicator tells of its end only.
        let rings = self.modem_status & !lines & MSR_RI != 0;
        let changed = if rings { changed } else { changed & !(MSR_RI >> 4) };
        self.modem_status = lines | self.modem_status & 0x0f | changed;
    }
}

#[cfg(test)]
mod tests;
