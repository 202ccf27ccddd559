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
                // Who asks to be told of an empty transmitter is told of one that is empty already.
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
mod tests {
    use super::*;

    fn port() -> Port {
        let mut port = Port::default();
        port.write(2, FCR_ENABLE);
        port.write(3, 3);
        port
    }

    #[test]
    fn a_driver_that_probes_finds_a_16550a() {
        let mut port = Port::default();
        // The interrupt enable register keeps four bits.
        port.write(1, 0xff);
        assert_eq!(port.read(1), 0x0f);
        port.write(1, 0);
        // In loopback mode the modem status follows the modem control.
        port.write(4, MCR_LOOP | MCR_RTS | MCR_OUT2);
        assert_eq!(port.read(6) & 0xf0, MSR_CTS | MSR_DCD);
        port.write(4, 0);
        // FIFOs that are there show in two bits, also with the divisor latch open.
        port.write(3, 0xbf);
        port.write(2, FCR_ENABLE);
        assert_eq!(port.read(2) & 0xe0, IIR_FIFOS);
        port.write(3, 0);
        assert_eq!(port.read(2), IIR_FIFOS | IIR_NONE);
        // A 64-byte FIFO and a sleep mode are not there.
        port.write(2, FCR_ENABLE | 0x20);
        assert_eq!(port.read(2) & 0x20, 0);
        port.write(7, 0x5a);
        assert_eq!(port.read(7), 0x5a);
    }

    #[test]
    fn the_divisor_latch_hides_data_and_interrupt_enable() {
        let mut port = port();
        port.write(1, IER_RECEIVED);
        port.write(3, LCR_DLAB | 3);
        port.write(0, 0x34);
        port.write(1, 0x12);
        assert_eq!((port.read(0), port.read(1), port.divisor), (0x34, 0x12, 0x1234));
        port.write(3, 3);
        assert_eq!(port.read(1), IER_RECEIVED);
        assert!(port.to_send.is_empty());
    }

    #[test]
    fn received_bytes_interrupt_by_level_and_below_it_by_timeout() {
        for (bits, level) in [(0, 1), (1, 4), (2, 8), (3, 14)] {
            let mut port = port();
            port.write(2, FCR_ENABLE | bits << 6);
            port.write(1, IER_RECEIVED);
            assert!(!port.interrupts());
            for count in 1..=FIFO_BYTES {
                port.receive(count as u8);
                let want = if count >= level { IIR_RECEIVED } else { IIR_TIMEOUT };
                assert_eq!(port.read(2), IIR_FIFOS | want, "{count} of {level}");
            }
            for count in 1..=FIFO_BYTES {
                assert_eq!(port.read(5) & LSR_READY, LSR_READY);
                assert_eq!(port.read(0), count as u8);
            }
            assert_eq!((port.read(5) & LSR_READY, port.interrupts()), (0, false));
        }
    }

    #[test]
    fn an_overrun_is_told_once_and_keeps_what_was_there() {
        let mut port = port();
        port.write(1, IER_LINE | IER_RECEIVED);
        (0..=FIFO_BYTES as u8).for_each(|byte| port.receive(byte));
        assert_eq!(port.read(2), IIR_FIFOS | IIR_LINE, "first of all causes");
        assert_eq!(port.read(5) & LSR_OVERRUN, LSR_OVERRUN);
        assert_eq!(port.read(5) & LSR_OVERRUN, 0);
        assert_eq!(port.received, (0..FIFO_BYTES as u8).collect::<Vec<_>>());
        // Without FIFOs the last one stays.
        let mut port = Port::default();
        port.write(3, 3);
        port.receive(1);
        port.receive(2);
        assert_eq!((port.read(5) & LSR_OVERRUN, port.read(0)), (LSR_OVERRUN, 2));
    }

    #[test]
    fn an_empty_transmitter_interrupts_once() {
        let mut port = port();
        port.write(1, IER_EMPTY);
        assert_eq!(port.read(2), IIR_FIFOS | IIR_EMPTY, "it is empty when it is asked for");
        assert_eq!(port.read(2), IIR_FIFOS | IIR_NONE, "told once");
        port.write(0, b'a');
        port.write(0, b'b');
        assert_eq!((port.read(5) & LSR_HOLDING_EMPTY, port.interrupts()), (0, false));
        assert_eq!((port.send(), port.interrupts()), (Some(b'a'), false));
        assert_eq!((port.send(), port.interrupts()), (Some(b'b'), true));
        port.write(0, b'c');
        assert!(!port.interrupts(), "a write is an answer too");
    }

    #[test]
    fn a_full_transmitter_loses_the_guests_bytes_and_no_more() {
        let mut port = port();
        (0..20).for_each(|byte| port.write(0, byte));
        assert_eq!(port.to_send.len(), FIFO_BYTES);
        assert_eq!(port.to_send.back(), Some(&19));
        port.write(2, FCR_ENABLE | FCR_CLEAR_TRANSMITTER | FCR_CLEAR_RECEIVER);
        assert!(port.to_send.is_empty());
        assert_eq!(port.read(5), LSR_HOLDING_EMPTY | LSR_EMPTY);
    }

    #[test]
    fn in_loopback_mode_what_is_sent_is_received() {
        let mut port = port();
        port.write(4, MCR_LOOP);
        assert_eq!(port.room(), 0, "cut off from the line");
        port.write(0, b'x');
        assert_eq!((port.send(), port.read(0)), (None, b'x'));
    }

    #[test]
    fn modem_lines_that_change_interrupt_until_they_are_read() {
        let mut port = port();
        port.write(1, IER_MODEM);
        port.write(4, MCR_LOOP | MCR_RTS | MCR_DTR | MCR_OUT2);
        assert!(!port.interrupts(), "as the line was");
        port.write(4, MCR_LOOP | MCR_OUT1);
        assert_eq!(port.read(2), IIR_FIFOS | IIR_MODEM);
        assert_eq!(port.read(6), MSR_RI | 0x0b, "CTS, DSR and DCD fell; RI has only risen");
        assert!(!port.interrupts());
        port.write(4, MCR_LOOP);
        assert_eq!(port.read(6), 0x04, "RI fell");
    }

    #[test]
    fn bytes_are_as_long_as_the_line_control_says() {
        let mut port = port();
        for (bits, mask) in [(0, 0x1f), (1, 0x3f), (2, 0x7f), (3, 0xff)] {
            port.write(3, bits);
            port.receive(0xff);
            assert_eq!(port.read(0), mask);
        }
    }
}
