//! The mtty card beside Linux' own. Files `golden/mtty-*` were taken from Linux 7.3's `mtty` under
//! User-Mode Linux: configuration space, data streams, and traces of accesses with its answers.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use common::{device, drain, drive, load, refused, save};
use limosa_client::{Chunk, Device, DeviceExt, Error, IrqAction};
use limosa_device::Loopback;
use limosa_models::uart::Mtty;
use limosa_protocol::{Errno, MigrationFlags, State, pci_index};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};

fn mtty(ports: usize) -> Loopback {
    device("mtty", Mtty::new(ports).unwrap())
}

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn get(device: &dyn Device, port: u32, register: u64) -> u8 {
    let mut value = [0];
    device.region_read(port, register, &mut value).unwrap();
    value[0]
}

fn set(device: &dyn Device, port: u32, register: u64, value: u8) {
    device.region_write(port, register, &[value]).unwrap();
}

/// The state of a card, which runs on.
fn peek(device: &dyn Device) -> Vec<u8> {
    let state = save(device);
    device.set_state(State::Running).unwrap();
    state
}

const STREAMS: [(usize, &str); 6] = [
    (1, "mtty-1-fresh.stream"),
    (1, "mtty-1-bytes.stream"),
    (1, "mtty-1-full.stream"),
    (2, "mtty-2-fresh.stream"),
    (2, "mtty-2-bytes.stream"),
    (2, "mtty-2-full.stream"),
];

#[test]
fn the_kernels_streams_are_read_and_written_again_byte_for_byte() {
    for (ports, name) in STREAMS {
        let state = golden(name);
        for piece in [1, 7, 24, 96] {
            let card = mtty(ports);
            load(&card, &state, piece).unwrap();
            assert_eq!(save(&card), state, "{name} in pieces of {piece}");
        }
    }
}

#[test]
fn what_is_done_to_a_card_gives_the_kernels_stream() {
    for ports in [1, 2] {
        let card = mtty(ports);
        let is = |name: &str| assert_eq!(peek(&card), golden(&format!("mtty-{ports}-{name}.stream")));
        is("fresh");
        for port in 0..ports as u32 {
            let n = port as u8;
            for (register, value) in [(3, 0x83), (0, 0x0c + n), (1, 1), (3, 3)] {
                set(&card, port, register, value);
            }
            for (register, value) in [(2, 0xc7), (1, 5), (4, 0x0b), (7, 0x5a + n)] {
                set(&card, port, register, value);
            }
            b"0123456789ab".iter().for_each(|byte| set(&card, port, 0, *byte));
            (0..10).for_each(|_| _ = get(&card, port, 0));
            [b"godwit".as_slice(), b"limosa!"][port as usize]
                .iter()
                .for_each(|byte| set(&card, port, 0, *byte));
        }
        is("bytes");
        for port in 0..ports as u32 {
            set(&card, port, 2, 7);
            (0x40..0x52).for_each(|byte| set(&card, port, 0, byte));
        }
        is("full");
    }
}

#[test]
fn bytes_in_the_kernels_fifo_are_read_here() {
    let card = mtty(2);
    load(&card, &golden("mtty-2-bytes.stream"), 96).unwrap();
    card.set_state(State::Running).unwrap();
    for (port, text) in [(0, b"abgodwit".as_slice()), (1, b"ablimosa!")] {
        let mut bytes = Vec::new();
        while get(&card, port, 5) & 1 != 0 {
            bytes.push(get(&card, port, 0));
        }
        assert_eq!(bytes, text);
        assert_eq!((get(&card, port, 7), get(&card, port, 3)), (0x5a + port as u8, 3));
    }
}

/// Lines are: write or read, port, register, value in hex, and `!` when MSI was signalled; or the
/// state at that point.
#[test]
fn accesses_are_answered_as_the_kernel_answers_them() {
    for ports in [1, 2] {
        let card = mtty(ports);
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        card.set_irqs(pci_index::IRQ_MSI, 0, IrqAction::Wire(&[Some(event.as_fd())])).unwrap();
        let name = format!("mtty-{ports}.trace");
        for (number, line) in String::from_utf8(golden(&name)).unwrap().lines().enumerate() {
            let words: Vec<_> = line.split(' ').collect();
            let number_at = |at: usize| u8::from_str_radix(words[at], 16).unwrap();
            if words[0] == "s" {
                let state: String = peek(&card).iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(state, words[1], "{name}:{}", number + 1);
                continue;
            }
            let (port, register) = (number_at(1).into(), number_at(2).into());
            match words[0] {
                "r" => {
                    assert_eq!(get(&card, port, register), number_at(3), "{name}:{}: {line}", number + 1)
                }
                _ => set(&card, port, register, number_at(3)),
            }
            assert_eq!(signalled(&event), words.len() == 5, "{name}:{}: {line}", number + 1);
        }
    }
}

fn signalled(event: &OwnedFd) -> bool {
    rustix::io::read(event, &mut [0; 8]).is_ok()
}

#[test]
fn it_looks_as_the_kernels_card_does() {
    for ports in [1, 2] {
        let card = mtty(ports);
        let mut config = vec![0; 255];
        card.region_read(pci_index::CONFIG, 0, &mut config).unwrap();
        assert_eq!(config, golden(&format!("mtty-{ports}.config")));
        let second = if ports == 2 { 8 } else { 0 };
        let sizes: Vec<_> = (0..9).map(|index| card.region(index).unwrap().info.size).collect();
        assert_eq!(sizes, [8, second, 0, 0, 0, 0, 0, 255, 0]);
        let irqs: Vec<_> = (0..5).map(|index| card.irq(index).unwrap()).collect();
        assert_eq!(irqs.iter().map(|irq| (irq.flags, irq.count)).collect::<Vec<_>>()[..2], [(7, 1), (9, 1)]);
        assert!(irqs[2..].iter().all(|irq| irq.count == 0));
        let all = MigrationFlags::STOP_COPY | MigrationFlags::P2P | MigrationFlags::PRE_COPY;
        assert_eq!(card.migration_flags().unwrap(), all);
        assert_eq!(card.mig_data_size().unwrap(), Some(24 + 36 * ports as u64));
    }
    assert!(Mtty::new(0).is_err() && Mtty::new(3).is_err());
}

#[test]
fn a_bar_tells_its_size_and_takes_an_address() {
    let card = mtty(1);
    let config = |at, bytes: Option<u32>| {
        if let Some(bytes) = bytes {
            card.region_write(pci_index::CONFIG, at, &bytes.to_le_bytes()).unwrap();
        }
        let mut value = [0; 4];
        card.region_read(pci_index::CONFIG, at, &mut value).unwrap();
        u32::from_le_bytes(value)
    };
    assert_eq!(config(0x10, Some(!0)), 0xffff_fff9);
    assert_eq!(config(0x10, Some(0xc108)), 0xc109);
    assert_eq!(config(0x14, Some(!0)), 0, "the second port is not there");
    assert_eq!(config(0x00, Some(0)), 0x3253_4348);
    assert_eq!(config(0x3c, Some(0xff0b)), 0x010b);
    assert!(card.region_read(pci_index::CONFIG, 252, &mut [0; 4]).is_err(), "255 bytes");
}

#[test]
fn the_header_is_read_in_pre_copy_and_the_ports_once_it_stopped() {
    for end in [State::StopCopy, State::Running] {
        let card = mtty(2);
        let mut stream = drive(&card, State::PreCopy);
        assert_eq!(stream.precopy_info().unwrap().initial_bytes, 24);
        let (mut state, last) = drain(stream.as_mut(), 10);
        assert_eq!((state.len(), last), (24, Chunk::NothingForNow));
        let info = stream.precopy_info().unwrap();
        assert_eq!((info.initial_bytes, info.dirty_bytes), (0, 0));
        set(&card, 1, 0, b'x');
        card.set_state(end).unwrap();
        if end == State::StopCopy {
            let (rest, last) = drain(stream.as_mut(), 10);
            state.extend(rest);
            assert_eq!((state.len(), last), (96, Chunk::End));
            let to = mtty(2);
            load(&to, &state, 5).unwrap();
            to.set_state(State::Running).unwrap();
            assert_eq!(get(&to, 1, 0), b'x');
        } else {
            assert_eq!(refused(stream.read(&mut [0])), Errno::ENODEV);
        }
    }
}

#[test]
fn a_stopped_card_does_not_change_and_a_reset_one_is_new() {
    let card = mtty(1);
    set(&card, 0, 0, b'a');
    let before = peek(&card);
    card.set_state(State::Stop).unwrap();
    assert_eq!((get(&card, 0, 0), get(&card, 0, 0)), (b'a', b'a'));
    assert_eq!(refused(card.region_write(0, 7, &[1])), Errno::EBUSY);
    assert_eq!(peek(&card), before);
    card.reset().unwrap();
    assert_eq!(peek(&card), golden("mtty-1-fresh.stream"));
}

#[test]
fn an_interrupt_that_is_due_is_signalled_where_a_card_arrives() {
    let from = mtty(1);
    [(2, 1), (1, 1), (0, b'a')].iter().for_each(|(register, value)| set(&from, 0, *register, *value));
    for index in [pci_index::IRQ_INTX, pci_index::IRQ_MSI] {
        let to = mtty(1);
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        to.set_irqs(index, 0, IrqAction::Wire(&[Some(event.as_fd())])).unwrap();
        load(&to, &peek(&from), 60).unwrap();
        assert!(!signalled(&event), "it is stopped");
        to.set_state(State::Running).unwrap();
        assert!(signalled(&event), "index {index}");
    }
}

fn refuse(card: &Loopback, state: &[u8]) {
    card.set_state(State::Stop).unwrap();
    let before = save(card);
    let result = load(card, state, 96);
    assert!(matches!(result, Err(Error::Refused { errno: Errno::EBADMSG | Errno::EINVAL, .. })));
    assert_eq!(card.state().unwrap(), State::Resuming);
    // What it has is seen through its registers only: a reset would make it new.
    let mut registers = [0; 8];
    card.region_read(0, 0, &mut registers[..1]).unwrap();
    assert_eq!(registers[0], before[24 + 8 + usize::from(before[24 + 25])], "the oldest byte in the FIFO");
    card.reset().unwrap();
    load(card, &before, 96).unwrap();
}

#[test]
fn streams_cut_anywhere_or_too_long_are_refused_and_leave_the_card_untouched() {
    for ports in [1, 2] {
        let state = golden(&format!("mtty-{ports}-bytes.stream"));
        let card = mtty(ports);
        load(&card, &state, 96).unwrap();
        (0..state.len()).for_each(|bytes| refuse(&card, &state[..bytes]));
        refuse(&card, &[&state[..], &[0]].concat());
        let other = golden(&format!("mtty-{}-bytes.stream", 3 - ports));
        refuse(&card, &other);
        assert_eq!(save(&card), state);
    }
}

#[test]
fn a_bit_flipped_anywhere_is_refused_or_moves_as_it_is() {
    let state = golden("mtty-1-bytes.stream");
    let card = mtty(1);
    let mut taken = 0;
    for bit in 0..state.len() * 8 {
        let mut altered = state.clone();
        altered[bit / 8] ^= 1 << (bit % 8);
        match load(&card, &altered, 60) {
            Ok(()) => {
                assert!(bit / 8 >= 24, "bit {bit} of the header");
                assert_eq!(save(&card), altered, "bit {bit}");
                taken += 1;
            }
            Err(_) => card.reset().unwrap(),
        }
    }
    // Registers, divisor and the FIFO's bytes have no redundancy to tell by: 4 * 8 - 1, 16, 16 * 8, and
    // of FCR and the overrun some.
    assert!((175..=200).contains(&taken), "{taken}");
}

/// Writes (true) and reads of a register of a port.
fn accesses() -> impl Strategy<Value = Vec<(bool, u32, u64, u8)>> {
    let register = prop_oneof![4 => Just(0u64), 3 => 1..8u64];
    prop::collection::vec((any::<bool>(), 0..2u32, register, any::<u8>()), 0..200)
}

fn perform(card: &dyn Device, accesses: &[(bool, u32, u64, u8)]) -> Vec<u8> {
    let mut answers = Vec::new();
    for (write, port, register, value) in accesses {
        if *write {
            set(card, *port, *register, *value);
        } else {
            answers.push(get(card, *port, *register));
        }
    }
    answers
}

proptest! {
    #[test]
    fn a_card_that_moved_goes_on_as_if_it_had_not(before in accesses(), after in accesses(), piece in 1..100usize) {
        let (stays, to) = (mtty(2), mtty(2));
        perform(&stays, &before);
        let state = peek(&stays);
        load(&to, &state, piece).unwrap();
        to.set_state(State::Running).unwrap();
        prop_assert_eq!(perform(&stays, &after), perform(&to, &after));
        prop_assert_eq!(save(&stays), save(&to));
    }
}
