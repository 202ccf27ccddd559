//! A client that gets the device when the VMM has gone, with what it has prepared (`docs/vfio-user-extensions.md: NEXT`).

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use limosa_client::ForeignFd;
use limosa_device::{
    Backing, Bus, ClientId, Description, Irq, Machine, Mapping, Mappings, NextClient, Region, SetIrqs,
    SimpleModel,
};
use limosa_protocol::Errno;
use limosa_protocol::info::{DmaMapFlags, IrqFlags, RegionFlags};
use limosa_testing::memfd;
use rustix::event::{EventfdFlags, eventfd};

const BOTH: DmaMapFlags = DmaMapFlags::READ.union(DmaMapFlags::WRITE);

/// Notes what it is told.
struct Noting {
    told: Arc<Mutex<Vec<String>>>,
    bus: Option<Bus>,
}

impl SimpleModel for Noting {
    fn description(&self) -> Description {
        let region = Region { flags: RegionFlags::READ, size: 4, ..Region::default() };
        let irq = Irq { flags: IrqFlags::EVENTFD | IrqFlags::MASKABLE, count: 2 };
        Description { regions: vec![region], irqs: vec![irq], ..Description::default() }
    }
    fn attach(&mut self, bus: Bus) {
        self.bus = Some(bus);
    }
    fn region_read(&mut self, _: u32, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Ok(())
    }
    fn region_write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }
    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }
    fn rewired(&mut self, index: u32) {
        self.told.lock().unwrap().push(format!("rewired {index}"));
    }
    fn client_gone(&mut self) {
        let memory = &self.bus.as_ref().unwrap().memory;
        let is_there = memory.read(0, &mut [0]).is_ok();
        self.told.lock().unwrap().push(format!("client gone, memory {is_there}"));
    }
}

fn machine() -> (Arc<Machine>, Arc<Mutex<Vec<String>>>) {
    let told = Arc::default();
    (Machine::simple(Noting { told: Arc::clone(&told), bus: None }), told)
}

fn map(mappings: &Mappings, iova: u64, file: &File) -> Result<(), Errno> {
    let (fd, size) = (ForeignFd::new(file.try_clone().unwrap().into()), file.metadata().unwrap().len());
    mappings.map(Mapping { iova, size, flags: BOTH, backing: Backing::File { fd, offset: 0 } })
}

fn first_byte(file: &File) -> u8 {
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut byte, 0).unwrap();
    byte[0]
}

fn wire(machine: &Machine, next: Option<&NextClient>) -> std::os::fd::OwnedFd {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let set = SetIrqs::Wire(vec![Some(ForeignFd::new(fd.try_clone().unwrap()))]);
    match next {
        Some(next) => next.set_irqs(machine, 0, 0, set).unwrap(),
        None => machine.set_irqs(0, 0, set).unwrap(),
    }
    fd
}

fn count(fd: &std::os::fd::OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

#[test]
fn a_model_finds_the_next_clients_memory_when_it_is_told_that_its_client_has_gone() {
    let (machine, told) = machine();
    let (theirs, its) = (memfd(4096), memfd(8192));
    map(machine.mappings(), 0, &theirs).unwrap();
    let next = machine.next_client();
    next.with_mappings(&machine, |mappings| map(mappings, 0, &its)).unwrap();
    let (old_wire, new_wire) = (wire(&machine, None), wire(&machine, Some(&next)));
    assert_eq!(told.lock().unwrap().as_slice(), ["rewired 0"], "of the VMM's wiring alone");
    assert!(!next.owns());
    assert!(machine.hand_over(&next));
    assert!(next.owns());
    assert_eq!(told.lock().unwrap()[1..], ["rewired 0", "client gone, memory true"]);
    assert_eq!((count(&old_wire), count(&new_wire)), (0, 1));
    machine.bus().memory.write(0, &[7]).unwrap();
    assert_eq!((first_byte(&theirs), first_byte(&its)), (0, 7));
    // It is the VMM in all.
    next.with_mappings(&machine, |mappings| mappings.unmap(0, 8192)).unwrap();
    assert_eq!(machine.bus().memory.write(0, &[7]), Err(Errno::EFAULT));
    assert!(!next.withdraw() && !machine.hand_over(&next));
    machine.client_gone(ClientId::VMM);
    machine.bus().interrupts.raise(0, 0);
    assert_eq!(count(&new_wire), 0);
}

#[test]
fn a_client_that_has_gone_gets_nothing() {
    let (machine, _) = machine();
    let (theirs, its) = (memfd(4096), memfd(4096));
    map(machine.mappings(), 0, &theirs).unwrap();
    let next = machine.next_client();
    next.with_mappings(&machine, |mappings| map(mappings, 0, &its)).unwrap();
    assert!(next.withdraw());
    assert!(!machine.hand_over(&next) && !next.owns());
    machine.bus().memory.write(0, &[7]).unwrap();
    assert_eq!((first_byte(&theirs), first_byte(&its)), (7, 0));
}

#[test]
fn what_is_pinned_stays_and_is_told_of() {
    let (machine, _) = machine();
    let (theirs, its) = (memfd(4096), memfd(4096));
    map(machine.mappings(), 0, &theirs).unwrap();
    let memory = machine.bus().memory.clone();
    let pin = memory.pin(0, 4096, BOTH).unwrap();
    let told = Arc::new(AtomicU64::new(0));
    let tells = Arc::clone(&told);
    memory.before_unmap(move |_, size| tells.store(size, Ordering::SeqCst));
    let next = machine.next_client();
    next.with_mappings(&machine, |mappings| map(mappings, 0, &its)).unwrap();
    machine.hand_over(&next);
    assert_eq!(told.load(Ordering::SeqCst), u64::MAX);
    // Data that is under way arrives where it was to go, and a pin from now on is of the new memory.
    let source = memfd(4096);
    std::os::unix::fs::FileExt::write_all_at(&source, &[9], 0).unwrap();
    pin.read_from(&source, 0).unwrap();
    assert_eq!((first_byte(&theirs), first_byte(&its)), (9, 0));
    memory.pin(0, 4096, BOTH).unwrap().read_from(&source, 0).unwrap();
    assert_eq!(first_byte(&its), 9);
    drop(pin);
    assert_eq!(machine.mappings().unmap(0, 4096), Ok(4096));
}

#[test]
fn a_log_of_everything_covers_what_the_next_client_brings() {
    let (machine, _) = machine();
    let files: Vec<_> = (0..4).map(|_| memfd(4096)).collect();
    map(machine.mappings(), 0, &files[0]).unwrap();
    // A control client's, which the VMM's end does not stop.
    let control = machine.new_client();
    let header = limosa_protocol::FeatureHeader::new(
        limosa_protocol::FeatureIndex::DMA_LOGGING_START,
        limosa_protocol::FeatureOp::SET,
        16,
    );
    let mut payload = [0; 16];
    payload[..8].copy_from_slice(&4096u64.to_ne_bytes());
    machine
        .feature_for(control, header.call().unwrap(), &mut payload, limosa_client::Refers::In(&[]))
        .unwrap();
    let next = machine.next_client();
    let at = [0u64, 4096, 1 << 30, u64::MAX - 4095];
    for (iova, file) in at.into_iter().zip(&files) {
        next.with_mappings(&machine, |mappings| map(mappings, iova, file)).unwrap();
    }
    machine.bus().memory.write(0, &[1]).unwrap();
    machine.hand_over(&next);
    for iova in at {
        if iova != 0 {
            machine.bus().memory.write(iova, &[1]).unwrap();
        }
        let mut words = [0];
        // A report cannot end at 2^64.
        let length = if iova > 1 << 30 { 4095 } else { 4096 };
        machine.mappings().logging_report(iova, length, 4096, &mut words).unwrap();
        assert_eq!(words[0], 1, "{iova:#x}");
    }
}
