//! The client's side of a device in the same process: DMA maps of every kind, dirty pages, and
//! interrupts.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use crate::common::{Rig, refused};
use limosa_client::{Device, DeviceExt, DirtyBits, DmaMap, DmaMemory, DmaTarget, Error, IrqAction};
use limosa_device::{ClientId, Irq, Loopback, Machine};
use limosa_protocol::info::{DmaMapFlags, IrqFlags};
use limosa_protocol::{Errno, MigrationFlags};
use limosa_test_device::Memory;
use limosa_testing::memfd;
use rustix::event::{EventfdFlags, eventfd};

const PAGE: u64 = 4096;
const BOTH: DmaMapFlags = DmaMapFlags::READ.union(DmaMapFlags::WRITE);

fn rig() -> Rig {
    Rig::new(MigrationFlags::SETS[0])
}

#[test]
fn memory_in_a_file_is_reached_at_its_offset() {
    let rig = rig();
    let file = memfd(4 * PAGE);
    let memory = DmaMemory::File { fd: file.as_fd(), offset: PAGE };
    rig.device.dma_map(&DmaMap { iova: 0x10000, size: 2 * PAGE, flags: BOTH, memory }).unwrap();
    let bus = rig.machine.bus();
    bus.memory.write(0x10010, b"written").unwrap();
    let mut seen = [0; 7];
    rustix::io::pread(&file, &mut seen, PAGE + 0x10).unwrap();
    assert_eq!(&seen, b"written");
    // The caller's fd is its own: the mapping outlives it.
    drop(file);
    bus.memory.read(0x10010, &mut seen).unwrap();
    assert_eq!(&seen, b"written");
    // SAFETY: no device of this transport ever sees an address.
    let nowhere = unsafe { limosa_client::HostAddress::new(0) };
    let again = DmaMap { iova: 0x11000, size: PAGE, flags: BOTH, memory: DmaMemory::Address(nowhere) };
    assert!(matches!(rig.device.dma_map(&again), Err(Error::Usage { .. })), "an address means nothing here");
    rig.device.dma_unmap(0x10000, 2 * PAGE, None).unwrap();
    assert_eq!(bus.memory.read(0x10010, &mut seen), Err(Errno::EFAULT));
    assert_eq!(refused(rig.device.dma_unmap(0x10000, 2 * PAGE, None)), Errno::ENOENT);
}

/// Memory that only this object reaches.
struct Private(Mutex<Vec<u8>>);

impl DmaTarget for Private {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let memory = self.0.lock().unwrap();
        let from = memory.get(offset as usize..).and_then(|from| from.get(..data.len()));
        data.copy_from_slice(from.ok_or(io::ErrorKind::InvalidInput)?);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut memory = self.0.lock().unwrap();
        let to = memory.get_mut(offset as usize..).and_then(|to| to.get_mut(..data.len()));
        to.ok_or_else(|| io::Error::from_raw_os_error(28))?.copy_from_slice(data);
        Ok(())
    }
}

#[test]
fn memory_of_an_object_is_reached_by_offsets_within_its_mapping() {
    let rig = rig();
    let private = Arc::new(Private(Mutex::new(vec![0; PAGE as usize])));
    let target: Arc<dyn DmaTarget> = private.clone();
    // Twice as long as what the object has.
    let memory = DmaMemory::Messages(&target);
    rig.device.dma_map(&DmaMap { iova: 0x20000, size: 2 * PAGE, flags: BOTH, memory }).unwrap();
    let memory = &rig.machine.bus().memory;
    memory.write(0x20100, b"abc").unwrap();
    assert_eq!(private.0.lock().unwrap()[0x100..0x103], *b"abc");
    let mut seen = [0; 3];
    memory.read(0x20100, &mut seen).unwrap();
    assert_eq!(&seen, b"abc");
    assert_eq!(memory.write(0x20000 + PAGE, b"x"), Err(Errno::ENOSPC), "the object's own errno");
    assert_eq!(memory.read(0x20000 + PAGE, &mut seen), Err(Errno::EIO), "or EIO for one without");
}

#[test]
fn pages_that_the_device_wrote_are_reported_and_handed_over_at_the_unmap() {
    let rig = rig();
    let file = memfd(64 * PAGE);
    let memory = DmaMemory::File { fd: file.as_fd(), offset: 0 };
    rig.device.dma_map(&DmaMap { iova: 0, size: 64 * PAGE, flags: BOTH, memory }).unwrap();
    assert_eq!(rig.device.dma_logging_start(PAGE, &[]).unwrap(), PAGE);
    let bus = rig.machine.bus();
    bus.memory.write(3 * PAGE - 1, &[1, 2]).unwrap();
    let mut words = [0; 1];
    rig.device.dma_logging_report(0, 64 * PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [0b1100]);
    bus.memory.write(63 * PAGE, &[1]).unwrap();
    rig.device.reset().unwrap();
    let mut words = [0; 1];
    let dirty = DirtyBits { page_size: PAGE, words: &mut words };
    rig.device.dma_unmap(0, 64 * PAGE, Some(dirty)).unwrap();
    assert_eq!(words, [1 << 63], "a reset loses none");
    rig.device.dma_logging_stop().unwrap();
}

fn count(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(rustix::io::Errno::AGAIN) => 0,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn interrupts_are_wired_masked_triggered_and_disabled() {
    let irqs = vec![Irq { flags: IrqFlags::EVENTFD | IrqFlags::MASKABLE, count: 2 }];
    let machine = Machine::simple(<Memory>::new(0).with_irqs(irqs));
    let device = Loopback::new("alarm", Arc::clone(&machine));
    assert_eq!(device.irq(0).unwrap().count, 2);
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    device.set_irqs(0, 1, IrqAction::Wire(&[Some(fd.as_fd())])).unwrap();
    machine.bus().interrupts.raise(0, 1);
    assert_eq!(count(&fd), 1);
    device.set_irqs(0, 1, IrqAction::Trigger(1)).unwrap();
    assert_eq!(count(&fd), 1);
    device.set_irqs(0, 1, IrqAction::Mask(1)).unwrap();
    machine.bus().interrupts.raise(0, 1);
    assert_eq!(count(&fd), 0);
    device.set_irqs(0, 1, IrqAction::Unmask(1)).unwrap();
    assert_eq!(count(&fd), 1, "pending until the unmask");
    assert_eq!(refused(device.set_irqs(0, 1, IrqAction::Trigger(2))), Errno::EINVAL);
    assert_eq!(refused(device.set_irqs(1, 0, IrqAction::Disable)), Errno::EINVAL);
    device.set_irqs(0, 0, IrqAction::Disable).unwrap();
    machine.bus().interrupts.raise(0, 1);
    assert_eq!(count(&fd), 0);
}

#[test]
fn a_client_that_goes_away_leaves_no_mapping_and_no_wiring_but_state_and_session() {
    let rig = rig();
    let file = memfd(PAGE);
    let memory = DmaMemory::File { fd: file.as_fd(), offset: 0 };
    rig.device.dma_map(&DmaMap { iova: 0, size: PAGE, flags: BOTH, memory }).unwrap();
    rig.device.dma_logging_start(PAGE, &[]).unwrap();
    rig.device.set_state(limosa_protocol::State::StopCopy).unwrap();
    let session = rig.machine.session();
    rig.machine.client_gone(ClientId::VMM);
    assert_eq!(rig.machine.bus().memory.write(0, b"x"), Err(Errno::EFAULT));
    assert_eq!(rig.machine.session(), session);
    assert_eq!(rig.state(), limosa_protocol::State::StopCopy);
    // The next one starts from nothing.
    rig.device.dma_map(&DmaMap { iova: 0, size: PAGE, flags: BOTH, memory }).unwrap();
    rig.device.dma_logging_start(PAGE, &[]).unwrap();
}
