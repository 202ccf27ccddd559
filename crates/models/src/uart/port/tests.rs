//! The registers and FIFOs of a 16550A, as a driver sees them.

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
