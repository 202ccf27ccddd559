//! One port of an mtty card: the registers of a 16550 over one FIFO that is both transmitter and
//! receiver, so that what is written comes back (Linux' `samples/vfio-mdev/mtty.c`). Pure: no bus, no
//! clock.
//!
//! The model keeps to what mtty does, also where a 16550 does something else:
//!
//! - Whether the FIFO is empty is seen by its two indexes, which are equal when it is full too: 16
//!   bytes in it cannot be read, only cleared. They do move.
//! - A divisor byte is or-ed into the divisor, which setting DLAB clears.
//! - Several causes of an interrupt show at once, or-ed; reading one clears none.
//! - An overrun is told until the next byte finds room.
//! - The trigger level is 1, whatever FCR asks for, and 0 until FCR is first written.

/// Bytes of the FIFO.
pub(super) const FIFO_BYTES: u8 = 16;

/// Registers of a port, one byte each.
pub(super) const REGISTERS: u64 = 8;

const IER_RECEIVED: u8 = 1 << 0;
const IER_EMPTY: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;
/// What a read shows; all bits are kept.
const IER_SHOWN: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_FIFOS: u8 = 0xc0;

pub(super) const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR: u8 = 1 << 1 | 1 << 2;

pub(super) const LCR_DLAB: u8 = 1 << 7;

const MCR_READY: u8 = 1 << 0 | 1 << 1;
const MCR_OUT2: u8 = 1 << 3;
const MCR_AUTOFLOW: u8 = 1 << 5;

const LSR_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_EMPTY: u8 = 1 << 5 | 1 << 6;

/// DSR, that it changed, and DCD.
const MSR_ALWAYS: u8 = 1 << 5 | 1 << 1 | 1 << 7;
/// CTS, and that it changed.
const MSR_CLEAR_TO_SEND: u8 = 1 << 4 | 1 << 0;

/// A port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) interrupt_enable: u8,
    pub(super) line_control: u8,
    pub(super) modem_control: u8,
    pub(super) scratch: u8,
    pub(super) fifo_control: u8,
    pub(super) divisor: u16,
    pub(super) overrun: bool,
    /// How many bytes the FIFO takes: 16, or 1 once FCR turned it off.
    pub(super) fifo_bytes: u8,
    pub(super) trigger: u8,
    /// The FIFO's memory. What is not in use keeps what was there last.
    pub(super) fifo: [u8; FIFO_BYTES as usize],
    /// Where the next byte goes, where the oldest is, and how many there are.
    pub(super) head: u8,
    pub(super) tail: u8,
    pub(super) count: u8,
}

impl Default for Port {
    /// As a new card has it.
    fn default() -> Port {
        Port {
            interrupt_enable: 0,
            line_control: 0,
            modem_control: 0,
            scratch: 0,
            fifo_control: 0,
            divisor: 0,
            overrun: false,
            fifo_bytes: FIFO_BYTES,
            trigger: 0,
            fifo: [0; FIFO_BYTES as usize],
            head: 0,
            tail: 0,
            count: 0,
        }
    }
}

impl Port {
    fn latched(&self) -> bool {
        self.line_control & LCR_DLAB != 0
    }

    fn enabled(&self, bit: u8) -> bool {
        self.interrupt_enable & bit != 0
    }

    fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// The causes of an interrupt that are there and enabled, as IIR has them.
    fn causes(&self) -> u8 {
        let mut causes = 0;
        if self.enabled(IER_LINE) && self.overrun {
            causes |= IIR_LINE;
        }
        if self.enabled(IER_RECEIVED) && self.count >= self.trigger {
            causes |= IIR_RECEIVED;
        }
        if self.enabled(IER_EMPTY) && self.is_empty() {
            causes |= IIR_EMPTY;
        }
        causes
    }

    /// Whether a driver that looked now would find something to do.
    pub(super) fn interrupts(&self) -> bool {
        self.causes() != 0
    }

    /// The guest reads a register, 0 to 7: its value, and whether the card signals an interrupt.
    pub(super) fn read(&mut self, register: u64) -> (u8, bool) {
        match register {
            0 if self.latched() => (self.divisor as u8, false),
            1 if self.latched() => ((self.divisor >> 8) as u8, false),
            0 => {
                let byte = self.take();
                (byte, self.is_empty() && self.enabled(IER_EMPTY))
            }
            _ => (self.register(register), false),
        }
    }

    /// The registers that reading does not change.
    fn register(&self, register: u64) -> u8 {
        match register {
            1 => self.interrupt_enable & IER_SHOWN,
            2 => match self.causes() {
                0 => IIR_FIFOS | IIR_NONE,
                causes => IIR_FIFOS | causes,
            },
            3 => self.line_control,
            4 => self.modem_control,
            5 => {
                let overrun = if self.overrun { LSR_OVERRUN } else { 0 };
                overrun | if self.is_empty() { LSR_EMPTY } else { LSR_READY }
            }
            6 => {
                let stopped = self.modem_control & MCR_AUTOFLOW != 0 && self.count >= self.fifo_bytes;
                MSR_ALWAYS | if stopped { 0 } else { MSR_CLEAR_TO_SEND }
            }
            7 => self.scratch,
            _ => 0,
        }
    }

    fn take(&mut self) -> u8 {
        if self.is_empty() {
            return 0;
        }
        let byte = self.fifo[usize::from(self.tail)];
        self.tail = next(self.tail);
        self.count -= 1;
        byte
    }

    /// The guest writes a register: whether the card signals an interrupt.
    pub(super) fn write(&mut self, register: u64, value: u8) -> bool {
        match register {
            0 if self.latched() => self.divisor |= u16::from(value),
            1 if self.latched() => self.divisor |= u16::from(value) << 8,
            0 => return self.put(value),
            1 => {
                self.interrupt_enable = value;
                return self.enabled(IER_EMPTY) && self.is_empty();
            }
            2 => self.control_fifo(value),
            3 => {
                self.line_control = value;
                if self.latched() {
                    self.divisor = 0;
                }
            }
            4 => {
                self.modem_control = value;
                return self.enabled(IER_MODEM) && value & (MCR_OUT2 | MCR_READY) != 0;
            }
            7 => self.scratch = value,
            _ => {}
        }
        false
    }

    fn put(&mut self, byte: u8) -> bool {
        if self.count >= self.fifo_bytes {
            self.overrun = true;
            return self.enabled(IER_LINE);
        }
        self.fifo[usize::from(self.head)] = byte;
        self.head = next(self.head);
        self.count += 1;
        self.overrun = false;
        self.enabled(IER_RECEIVED) && self.count == self.trigger
    }

    fn control_fifo(&mut self, value: u8) {
        self.fifo_control = value;
        if value & FCR_CLEAR != 0 {
            (self.head, self.tail, self.count) = (0, 0, 0);
        }
        self.trigger = 1;
        self.fifo_bytes = if value & FCR_ENABLE != 0 { FIFO_BYTES } else { 1 };
    }
}

fn next(index: u8) -> u8 {
    (index + 1) % FIFO_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(port: &mut Port) -> Vec<u8> {
        let mut text = Vec::new();
        while port.read(5).0 & LSR_READY != 0 {
            text.push(port.read(0).0);
        }
        text
    }

    #[test]
    fn what_is_written_comes_back_also_round_the_fifos_end() {
        let mut port = Port::default();
        for _ in 0..5 {
            b"limosa".iter().for_each(|byte| _ = port.write(0, *byte));
            assert_eq!(text(&mut port), b"limosa");
        }
    }

    #[test]
    fn a_full_fifo_looks_empty_and_its_bytes_stay_until_cleared() {
        let mut port = Port::default();
        (0..FIFO_BYTES).for_each(|byte| _ = port.write(0, byte));
        assert_eq!((port.read(5).0, port.count), (LSR_EMPTY, FIFO_BYTES));
        assert_eq!(port.read(0), (0, false));
        port.write(0, 1);
        assert_eq!(port.read(5).0, LSR_EMPTY | LSR_OVERRUN);
        port.write(2, FCR_ENABLE | FCR_CLEAR);
        port.write(0, 7);
        assert_eq!((port.read(5).0, port.read(0).0), (LSR_READY, 7), "told until a byte finds room");
    }

    #[test]
    fn a_fifo_that_is_turned_off_keeps_what_it_has_and_takes_no_more() {
        let mut port = Port::default();
        b"abc".iter().for_each(|byte| _ = port.write(0, *byte));
        port.write(2, 0);
        port.write(0, b'd');
        assert_eq!(port.read(5).0, LSR_READY | LSR_OVERRUN);
        assert_eq!(text(&mut port), b"abc");
        port.write(0, b'e');
        assert_eq!(text(&mut port), b"e");
    }

    #[test]
    fn the_divisor_gathers_bits_until_its_latch_is_opened_anew() {
        let mut port = Port::default();
        port.write(3, LCR_DLAB | 3);
        [(0, 0x0c), (1, 1), (0, 1)].iter().for_each(|(register, byte)| _ = port.write(*register, *byte));
        assert_eq!((port.read(0).0, port.read(1).0, port.divisor), (0x0d, 1, 0x010d));
        port.write(3, 3);
        assert_eq!(port.divisor, 0x010d);
        port.write(3, LCR_DLAB | 3);
        assert_eq!(port.divisor, 0);
    }
}
