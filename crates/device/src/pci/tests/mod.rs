//! What holds for a PCI function.

mod interrupts;
mod states;

use std::os::fd::OwnedFd;

use limosa_protocol::Errno;
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::saved::Refusal;
use crate::{SetIrqs, Wiring};

const INTX: u32 = pci_index::IRQ_INTX;

const MSI: u32 = pci_index::IRQ_MSI;

const MSIX: u32 = pci_index::IRQ_MSIX;

const TABLE: u64 = 0x2000;

const PENDING: u64 = 0x3000;

fn identity() -> Identity {
    Identity {
        vendor: 0x1234,
        device: 0x5678,
        revision: 9,
        class: 0x01_0802,
        subsystem_vendor: 0xabcd,
        subsystem: 0xef01,
    }
}

fn function() -> Function {
    Function::builder(identity())
        .bar(0, Bar::Memory64 { bytes: 0x4000, prefetchable: true })
        .bar(2, Bar::Memory32 { bytes: 4096, prefetchable: false })
        .bar(3, Bar::Io { bytes: 8 })
        .interrupt_pin()
        .power_management()
        .msi(4)
        .msix(70, (0, TABLE), (0, PENDING))
        .vendor(&[1, 2, 3], &[0, 0xff, 0])
        .express()
        .extended(3, 1, &[7; 8], &[0; 8])
        .extended(0xb, 2, &[8; 6], &[0xff; 6])
        .build()
}

/// Both sides of a function's interrupts.
struct Irqs {
    device: Interrupts,
    client: Wiring,
}

impl Irqs {
    fn new(irqs: &[Irq]) -> Irqs {
        let client = Wiring::new(irqs);
        Irqs { device: client.interrupts(), client }
    }

    fn unmask(&self, index: u32, start: u32, count: u32) -> Result<(), Errno> {
        self.client.set(index, start, SetIrqs::Unmask(count))
    }
}

impl std::ops::Deref for Irqs {
    type Target = Interrupts;

    fn deref(&self) -> &Interrupts {
        &self.device
    }
}

fn wire(irqs: &Irqs, index: u32, vector: u32) -> OwnedFd {
    let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let fds = vec![Some(fd.try_clone().unwrap().into())];
    irqs.client.set(index, vector, SetIrqs::Wire(fds)).unwrap();
    fd
}

fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(fd, &mut bytes) {
        Ok(8) => u64::from_ne_bytes(bytes),
        Err(rustix::io::Errno::AGAIN) => 0,
        other => panic!("{other:?}"),
    }
}

fn read<const N: usize>(function: &Function, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    function.config_read(at, &mut bytes).unwrap();
    bytes
}

fn u32_at(function: &Function, at: u64) -> u32 {
    u32::from_le_bytes(read(function, at))
}

fn write(function: &mut Function, at: u64, data: &[u8]) -> Changes {
    function.config_write(at, data, &Interrupts::default()).unwrap()
}

/// The capabilities in the order of their list, with their places.
fn capabilities(function: &Function) -> Vec<(u8, u64)> {
    let mut found = vec![];
    let [mut at] = read(function, 0x34);
    while at != 0 {
        let [id, next] = read(function, u64::from(at));
        found.push((id, u64::from(at)));
        assert!(found.len() < 48, "the list has a loop");
        at = next;
    }
    found
}

fn capability(function: &Function, id: u8) -> u64 {
    capabilities(function).into_iter().find(|(found, _)| *found == id).unwrap().1
}

#[test]
fn the_header_says_who_it_is() {
    let function = function();
    assert_eq!(u32_at(&function, 0), 0x5678_1234);
    assert_eq!(u32_at(&function, 8), 0x0108_0209);
    assert_eq!(u32_at(&function, 0x2c), 0xef01_abcd);
    assert_eq!(read(&function, 0x0e), [0], "a type 0 header, one function");
    assert_eq!(read(&function, 0x3d), [1], "pin A");
    assert_eq!(function.config_bytes(), 4096);
    assert_eq!(Function::builder(identity()).build().config_bytes(), 256);
}

#[test]
fn capabilities_are_linked() {
    let function = function();
    let ids: Vec<u8> = capabilities(&function).into_iter().map(|(id, _)| id).collect();
    assert_eq!(ids, [0x01, 0x05, 0x11, 0x09, 0x10]);
    assert_eq!(read::<2>(&function, 6)[0] & 0x10, 0x10);
    assert_eq!(u32_at(&function, 0x100), 0x10c << 20 | 1 << 16 | 3);
    assert_eq!(u32_at(&function, 0x10c), 2 << 16 | 0xb);
    let none = Function::builder(identity()).build();
    assert_eq!((capabilities(&none), read::<1>(&none, 6)[0] & 0x10), (vec![], 0));
}

#[test]
fn all_of_it_is_read_in_one_message() {
    let function = function();
    let mut whole = vec![0; 4096];
    function.config_read(0, &mut whole).unwrap();
    assert_eq!(whole[..4], [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(function.config_read(1, &mut whole), Err(Errno::EINVAL));
    assert_eq!(function.config_read(u64::MAX, &mut whole[..1]), Err(Errno::EINVAL));
    assert_eq!(function.config_read(4096, &mut []), Ok(()));
}

#[test]
fn bars_are_sized_by_all_ones() {
    let mut function = function();
    for (bar, answer) in
        [(0, 0xffff_c00c), (1, 0xffff_ffff), (2, 0xffff_f000), (3, 0xffff_fff9), (4, 0), (5, 0)]
    {
        let at = 0x10 + 4 * bar;
        let changes = write(&mut function, at, &[0xff; 4]);
        assert_eq!(u32_at(&function, at), answer, "BAR {bar}");
        assert_eq!(changes.contains(Changes::BARS), answer != 0);
    }
    write(&mut function, 0x10, &0x0000_0012_3456_4000u64.to_le_bytes());
    write(&mut function, 0x1c, &0xc008u32.to_le_bytes());
    assert_eq!((function.bar_address(0), function.bar_address(3)), (0x12_3456_4000, 0xc008));
    assert_eq!((function.bar_address(1), function.bar_address(9)), (0, 0));
    assert_eq!(u32_at(&function, 0x30), 0, "no expansion ROM");
}

#[test]
fn regions_and_irqs_are_those_declared() {
    let function = function();
    let sizes: Vec<u64> = function.regions().iter().map(|region| region.size).collect();
    assert_eq!(sizes, [0x4000, 0, 4096, 8, 0, 0, 0, 4096, 0]);
    let counts: Vec<u32> = function.irqs().iter().map(|irq| irq.count).collect();
    assert_eq!(counts, [1, 4, 70, 1, 0]);
}

#[test]
fn command_has_the_bits_that_the_function_can_have() {
    let mut function = function();
    assert!(write(&mut function, 4, &[0xff; 2]).contains(Changes::COMMAND));
    assert_eq!(function.command().bits(), 0x547);
    assert!(write(&mut function, 4, &[0xff; 2]).is_empty(), "nothing changed");
    let mut little = Function::builder(identity()).bar(0, Bar::Io { bytes: 32 }).build();
    write(&mut little, 4, &[0xff; 2]);
    assert_eq!(little.command().bits(), 0x145);
}

#[test]
fn a_function_level_reset_is_told_and_not_kept() {
    let mut function = function();
    let at = capability(&function, 0x10);
    assert_eq!(u32_at(&function, at + 4) >> 28 & 1, 1);
    let changes = write(&mut function, at + 8, &[0xff, 0xff]);
    assert!(changes.contains(Changes::FLR));
    assert_eq!(read(&function, at + 8), [0xff, 0x7f]);
    assert!(!write(&mut function, at + 8, &[0, 0x7f]).contains(Changes::FLR));
}

#[test]
fn power_state_is_kept() {
    let mut function = function();
    let at = capability(&function, 1);
    assert_eq!(write(&mut function, at + 4, &[0xff; 4]), Changes::POWER);
    assert_eq!(read(&function, at + 4), [0x0b, 0, 0, 0]);
}

#[test]
fn vendor_capabilities_have_their_own_masks() {
    let mut function = function();
    let at = capability(&function, 9);
    assert_eq!(write(&mut function, at, &[0; 6]), Changes::OTHER);
    assert_eq!(read::<6>(&function, at)[2..], [6, 1, 0, 3]);
}

#[test]
#[should_panic(expected = "is taken")]
fn a_bar_over_the_upper_half_of_another_is_a_mistake() {
    Function::builder(identity())
        .bar(0, Bar::Memory64 { bytes: 4096, prefetchable: false })
        .bar(1, Bar::Io { bytes: 8 });
}

#[test]
#[should_panic(expected = "outside of BAR 0")]
fn an_msix_table_beyond_its_bar_is_a_mistake() {
    Function::builder(identity()).bar(0, Bar::Memory32 { bytes: 4096, prefetchable: false }).msix(
        2048,
        (0, 0),
        (0, 0),
    );
}

#[derive(Clone, Debug)]
enum Op {
    Config(u64, Vec<u8>),
    Bar(usize, u64, Vec<u8>),
    Raise(u32),
    Lower(u32),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..40);
    let near = prop_oneof![0x1ff0u64..0x2480, 0x2ff0u64..0x3020, any::<u64>()];
    let op = prop_oneof![
        (prop_oneof![0u64..0x120, 0u64..4100, any::<u64>()], bytes())
            .prop_map(|(at, data)| Op::Config(at, data)),
        (0usize..7, near, bytes()).prop_map(|(bar, at, data)| Op::Bar(bar, at, data)),
        (0u32..100).prop_map(Op::Raise),
        any::<u32>().prop_map(Op::Lower),
    ];
    prop::collection::vec(op, 0..40)
}

proptest! {
    #[test]
    fn whatever_is_done_read_only_bits_stay_and_the_state_can_be_loaded(ops in ops()) {
        let mut function = function();
        let initial = function.config.now.clone();
        let irqs = Irqs::new(&function.irqs());
        let _wires = [wire(&irqs, INTX, 0), wire(&irqs, MSI, 1)];
        for op in ops {
            match op {
                Op::Config(at, data) => {
                    let fits = at.checked_add(data.len() as u64).is_some_and(|end| end <= 4096);
                    prop_assert_eq!(function.config_write(at, &data, &irqs).is_ok(), fits);
                }
                Op::Bar(bar, at, mut data) => {
                    let wrote = function.bar_write(bar, at, &data, &irqs);
                    prop_assert_eq!(function.bar_read(bar, at, &mut data, &irqs), wrote);
                }
                Op::Raise(vector) => function.raise(vector, &irqs),
                Op::Lower(vector) => function.lower(vector, &irqs),
            }
        }
        let layout = function.layout.clone();
        for (at, (now, initial)) in function.config.now.iter().zip(&initial).enumerate() {
            let fixed = !(layout.writable[at] | layout.clears[at] | layout.volatile[at]);
            prop_assert_eq!((now ^ initial) & fixed, 0, "at {:#x}", at);
        }
        let state = function.state(&irqs);
        prop_assert_eq!(self::function().loaded("pci", &state).unwrap().state(&Interrupts::default()), state);
    }

    #[test]
    fn arbitrary_states_never_panic(
        config in prop::collection::vec(any::<u8>(), 0..8),
        table in prop::collection::vec(any::<u8>(), 1120),
        written in prop::collection::vec(any::<u32>(), 0..4),
        at in any::<prop::sample::Index>(),
    ) {
        let irqs = Interrupts::default();
        let mut state = function().state(&Interrupts::default());
        let at = at.index(state.config.len() - config.len());
        state.config[at..at + config.len()].copy_from_slice(&config);
        state.msix_table = table;
        state.msix_pending.fill(0xff);
        state.msix_written = written;
        if let Ok(mut loaded) = function().loaded("pci", &state) {
            loaded.settle(&irqs);
        }
    }
}
