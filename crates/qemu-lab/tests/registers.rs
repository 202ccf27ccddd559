//! Served devices in QEMU without a guest: what QEMU's vfio-user client does with registers, memory and interrupts.

use std::sync::Arc;

use limosa_device::Machine;
use limosa_models::synthetic::{IDENTITY, Pattern, Window, registers as synthetic};
use limosa_qemu_lab::pci::{Bar, Function, PIN_LINE};
use limosa_qemu_lab::{Interrupt, Qemu, Qtest, Served, ServedHere, TestDevice, registers as at};

/// RAM that nothing else uses, as there is no firmware.
const TARGET: u64 = 16 << 20;
const MESSAGES: u64 = 32 << 20;

fn placed(qtest: &mut Qtest, slot: u8, bars: &[u8]) -> (Function, Vec<Bar>) {
    let function = Function::new(qtest, slot);
    let bars = bars.iter().map(|bar| function.place(qtest, *bar)).collect();
    function.enable(qtest);
    (function, bars)
}

/// The test device with its registers, its memory and its MSI-X table.
fn test_device(machine: &Arc<Machine>) -> (ServedHere, Qemu, Qtest, Function, [Bar; 3]) {
    let served = ServedHere::start(Arc::clone(machine));
    let (qemu, mut qtest) = Qemu::builder().device(served.socket()).qtest();
    let (function, bars) = placed(&mut qtest, Qemu::slot(0), &[0, 2, 4]);
    let bars = bars.try_into().expect("three BARs");
    (served, qemu, qtest, function, bars)
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn registers_in_memory_and_in_ports_are_read_and_written() {
    let [uart, pages] = [Served::start("uart", &[]), Served::start("synthetic", &["state=1M"])];
    let (_qemu, mut qtest) = Qemu::builder().device(uart.socket()).device(pages.socket()).qtest();

    let (_, bars) = placed(&mut qtest, Qemu::slot(0), &[0]);
    assert!(matches!(bars[0], Bar::Ports { bytes: 8, .. }), "{bars:?}");
    let scratch = bars[0].ports() + 7;
    for value in [0x5a, 0xa5] {
        qtest.port_write(scratch, 1, value);
        assert_eq!(qtest.port_read(scratch, 1), value);
    }

    let (function, bars) = placed(&mut qtest, Qemu::slot(1), &[0, 2]);
    let identity = u32::from(IDENTITY.device) << 16 | u32::from(IDENTITY.vendor);
    assert_eq!(function.read(&mut qtest, 0, 4), identity);
    assert!(matches!(bars[1], Bar::Memory { bytes: 0x10_0000, .. }), "{bars:?}");
    let registers = bars[0].memory();
    assert_eq!(qtest.register_read(registers + synthetic::IDENT, 8), synthetic::IDENT_VALUE);
    for bytes in [1, 2, 4, 8] {
        let value = 0x1122_3344_5566_7788 >> (64 - 8 * bytes);
        qtest.register_write(registers + synthetic::SCRATCH, bytes, value);
        assert_eq!(qtest.register_read(registers + synthetic::SCRATCH, bytes), value, "{bytes} bytes");
    }
    assert_eq!(qtest.register_read(registers + synthetic::BAD_BLOCKS, 8), 0);
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn what_a_device_writes_is_in_guest_memory_when_its_message_is_there() {
    let served = Served::start("synthetic", &["state=64K", "seed=7"]);
    let (_qemu, mut qtest) = Qemu::builder().device(served.socket()).qtest();
    let (function, bars) = placed(&mut qtest, Qemu::slot(0), &[0]);
    function.enable_msi(&mut qtest, MESSAGES, 0xbeef);
    let registers = bars[0].memory();
    let window = Window { seed: 7, pages: 24, pattern: Pattern::Random };
    let writes = 100;
    let values = [
        (synthetic::DMA_BASE, TARGET),
        (synthetic::DMA_PAGES, window.pages),
        (synthetic::DMA_PATTERN, window.pattern.raw()),
        (synthetic::DMA_LIMIT, writes),
        (synthetic::DMA_CONTROL, 1),
    ];
    for (register, value) in values {
        qtest.register_write(registers + register, 8, value);
    }
    qtest.turn_until("the message", |qtest| (qtest.register_read(MESSAGES, 4) == 0xbeef).then_some(()));
    assert_eq!(qtest.register_read(registers + synthetic::DMA_SEQUENCE, 8), writes);
    for (index, expected) in (0..).zip(window.expected(writes)) {
        let page = qtest.read(TARGET + index * 4096, 4096);
        window.check(index, expected, &page).unwrap();
    }
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn a_pin_rises_and_falls_with_what_the_device_says() {
    let served = Served::start("uart", &[]);
    let (_qemu, mut qtest) = Qemu::builder().device(served.socket()).qtest();
    qtest.intercept_interrupts();
    let (_, bars) = placed(&mut qtest, Qemu::slot(0), &[0]);
    let ports = bars[0].ports();
    let [up, down] = [true, false].map(|is_raised| Interrupt { line: PIN_LINE, is_raised });
    for _ in 0..3 {
        // The transmitter is empty: an interrupt as soon as it is enabled (16550: IER bit 1), until IIR is read.
        qtest.port_write(ports + 1, 1, 2);
        qtest.wait_for_interrupt(up);
        assert_eq!(qtest.port_read(ports + 2, 1) & 0xf, 2, "the transmitter's interrupt");
        qtest.port_write(ports + 1, 1, 0);
        qtest.wait_for_interrupt(down);
    }
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn each_message_of_each_vector_arrives() {
    let (_served, _qemu, mut qtest, function, bars) = test_device(&TestDevice::machine());
    let msix = function.msix(&mut qtest, |bar| bars[usize::from(bar) / 2]);
    assert_eq!(msix.vectors, TestDevice::VECTORS);
    msix.enable(&mut qtest, true);
    // One after the other, each used before the next is there: QEMU wires the whole index anew for each.
    for last in 0..msix.vectors {
        msix.set(&mut qtest, last, MESSAGES + 64 * u64::from(last), 0x100 + u32::from(last), false);
        for vector in 0..=last {
            send(&mut qtest, bars[0], vector);
            arrives(&mut qtest, vector);
        }
    }
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn a_message_of_a_masked_vector_waits_until_it_is_unmasked() {
    let (_served, _qemu, mut qtest, function, bars) = test_device(&TestDevice::machine());
    let msix = function.msix(&mut qtest, |bar| bars[usize::from(bar) / 2]);
    msix.enable(&mut qtest, true);
    for vector in 0..msix.vectors {
        msix.set(&mut qtest, vector, MESSAGES + 64 * u64::from(vector), 0x100 + u32::from(vector), false);
    }
    for vector in 0..msix.vectors {
        msix.mask(&mut qtest, vector, true);
        send(&mut qtest, bars[0], vector);
        // The device has sent it once it answers the next read.
        assert_eq!(qtest.register_read(bars[0].memory() + at::STATUS, 8), 0);
        assert_eq!(qtest.register_read(MESSAGES + 64 * u64::from(vector), 4), 0, "vector {vector} is masked");
        msix.mask(&mut qtest, vector, false);
        arrives(&mut qtest, vector);
    }
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn a_device_of_which_parts_can_be_mapped_starts_and_its_memory_is_one() {
    let (_served, _qemu, mut qtest, _function, bars) = test_device(&TestDevice::machine());
    assert_eq!(qtest.register_read(bars[0].memory() + at::IDENT, 8), at::IDENT_VALUE);
    let memory = bars[1].memory();
    // In parts that are mapped, in one that is not, and over an edge.
    for (offset, value) in
        [(0, 1), (0x1ff8, 2), (0x2000, 3), (0x8000, 4), (0xc000, 5), (0xd000, 6), (0xfff8, 7)]
    {
        qtest.register_write(memory + offset, 8, value);
        assert_eq!(qtest.register_read(memory + offset, 8), value, "at {offset:#x}");
    }
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn a_device_copies_memory_that_qemu_shares() {
    let (_served, _qemu, mut qtest, _function, bars) = test_device(&TestDevice::machine());
    let content: Vec<u8> = (0..3000_u32).map(|at| (at * 7) as u8).collect();
    qtest.write(TARGET + 5, &content);
    assert_eq!(copy(&mut qtest, bars[0], TARGET + 5, TARGET + 0x1_0003, content.len()), 0);
    assert_eq!(qtest.read(TARGET + 0x1_0003, content.len()), content);
    assert_ne!(copy(&mut qtest, bars[0], 1 << 40, TARGET, 8), 0, "nothing is there");
}

#[test]
#[ignore = "runs in the lab's QEMU (lab/qemu/run)"]
fn a_device_whose_memory_qemu_does_not_share_fails_its_copy_and_works_on() {
    let served = ServedHere::start(TestDevice::machine());
    let (qemu, mut qtest) = Qemu::builder().device(served.socket()).private_memory().qtest();
    let (_, bars) = placed(&mut qtest, Qemu::slot(0), &[0]);
    let content = [0x77; 64];
    qtest.write(TARGET, &content);
    qtest.write(TARGET + 4096, &[0x11; 72]);
    for _ in 0..3 {
        assert_ne!(copy(&mut qtest, bars[0], TARGET, TARGET + 4096, content.len()), 0);
        assert_eq!(qtest.read(TARGET + 4096, 72), [0x11; 72], "nothing is written, and nothing beside it");
        assert_eq!(qtest.register_read(bars[0].memory() + at::IDENT, 8), at::IDENT_VALUE);
    }
    assert_eq!(qemu.transcript().err(), "");
}

fn send(qtest: &mut Qtest, registers: Bar, vector: u16) {
    qtest.register_write(MESSAGES + 64 * u64::from(vector), 4, 0);
    qtest.register_write(registers.memory() + at::COMMAND, 8, at::MESSAGE + u64::from(vector));
}

fn arrives(qtest: &mut Qtest, vector: u16) {
    let (word, data) = (MESSAGES + 64 * u64::from(vector), 0x100 + u64::from(vector));
    qtest.turn_until(&format!("the message of vector {vector}"), |qtest| {
        (qtest.register_read(word, 4) == data).then_some(())
    });
}

/// Makes the test device copy guest memory, and says how that ended.
fn copy(qtest: &mut Qtest, registers: Bar, from: u64, to: u64, bytes: usize) -> u64 {
    let registers = registers.memory();
    let values = [
        (at::DMA_SOURCE, from),
        (at::DMA_TARGET, to),
        (at::DMA_BYTES, bytes as u64),
        (at::COMMAND, at::COPY),
    ];
    for (register, value) in values {
        qtest.register_write(registers + register, 8, value);
    }
    qtest.register_read(registers + at::STATUS, 8)
}
