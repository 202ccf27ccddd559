//! What holds for interrupts.

use std::os::fd::OwnedFd;

use super::*;
use limosa_protocol::Errno;
use rustix::event::{EventfdFlags, eventfd};

const INTX: u32 = 0;
const MSI: u32 = 1;

/// Both sides of some interrupts.
struct Irqs {
    device: Interrupts,
    client: Wiring,
}

impl Irqs {
    fn raise(&self, index: u32, vector: u32) {
        self.device.raise(index, vector);
    }

    fn set_level(&self, index: u32, vector: u32, level: bool) {
        self.device.set_level(index, vector, level);
    }

    fn wire(
        &self,
        index: u32,
        start: u32,
        fds: Vec<Option<limosa_foreign_fd::ForeignFd>>,
    ) -> Result<(), Errno> {
        self.client.set(index, start, SetIrqs::Wire(fds))
    }

    fn mask(&self, index: u32, start: u32, count: u32) -> Result<(), Errno> {
        self.client.set(index, start, SetIrqs::Mask(count))
    }

    fn unmask(&self, index: u32, start: u32, count: u32) -> Result<(), Errno> {
        self.client.set(index, start, SetIrqs::Unmask(count))
    }

    fn trigger_range(&self, index: u32, start: u32, count: u32) -> Result<(), Errno> {
        self.client.set(index, start, SetIrqs::Trigger(count))
    }

    fn disable(&self, index: u32) -> Result<(), Errno> {
        self.client.set(index, 0, SetIrqs::Disable)
    }
}

fn irqs() -> Irqs {
    let level = IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED;
    let client = Wiring::new(&[
        Irq { flags: level, count: 1 },
        Irq { flags: IrqFlags::EVENTFD | IrqFlags::MASKABLE, count: 4 },
        Irq { flags: IrqFlags::EVENTFD, count: 1 },
        Irq::default(),
    ]);
    Irqs { device: client.interrupts(), client }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// Takes the count; 0 when it was not signalled.
fn count(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(fd, &mut bytes) {
        Ok(8) => u64::from_ne_bytes(bytes),
        Err(rustix::io::Errno::AGAIN) => 0,
        other => panic!("{other:?}"),
    }
}

fn wired(irqs: &Irqs, index: u32, vector: u32) -> OwnedFd {
    let fd = event();
    irqs.wire(index, vector, vec![Some(fd.try_clone().unwrap().into())]).unwrap();
    fd
}

#[test]
fn a_wired_vector_signals_and_no_other() {
    let irqs = irqs();
    let (one, two) = (wired(&irqs, MSI, 1), wired(&irqs, MSI, 2));
    irqs.raise(MSI, 1);
    irqs.raise(MSI, 1);
    irqs.raise(MSI, 0);
    irqs.raise(MSI, 9);
    irqs.raise(9, 1);
    assert_eq!((count(&one), count(&two)), (2, 0));
    irqs.wire(MSI, 1, vec![None, None]).unwrap();
    irqs.raise(MSI, 1);
    assert_eq!(count(&one), 0);
    assert!(!irqs.device.any_wired(MSI));
}

#[test]
fn a_masked_edge_is_pending_and_fires_once_at_the_unmask() {
    let irqs = irqs();
    let fd = wired(&irqs, MSI, 3);
    irqs.mask(MSI, 0, 4).unwrap();
    irqs.raise(MSI, 3);
    irqs.raise(MSI, 3);
    assert_eq!(count(&fd), 0);
    irqs.unmask(MSI, 0, 4).unwrap();
    assert_eq!(count(&fd), 1);
    irqs.unmask(MSI, 0, 4).unwrap();
    assert_eq!(count(&fd), 0);
}

#[test]
fn a_held_line_fires_once_and_again_at_each_unmask() {
    let irqs = irqs();
    let fd = wired(&irqs, INTX, 0);
    irqs.set_level(INTX, 0, true);
    irqs.set_level(INTX, 0, true);
    assert_eq!(count(&fd), 1);
    irqs.unmask(INTX, 0, 1).unwrap();
    assert_eq!(count(&fd), 1, "still held");
    irqs.set_level(INTX, 0, false);
    irqs.unmask(INTX, 0, 1).unwrap();
    assert_eq!(count(&fd), 0, "let go");
}

#[test]
fn a_client_that_never_unmasks_hears_every_rise() {
    let irqs = irqs();
    let fd = wired(&irqs, INTX, 0);
    for _ in 0..3 {
        irqs.set_level(INTX, 0, true);
        assert_eq!(count(&fd), 1);
        irqs.set_level(INTX, 0, false);
    }
    irqs.raise(INTX, 0);
    assert_eq!(count(&fd), 1);
}

#[test]
fn a_masked_line_that_fell_again_is_not_heard() {
    let irqs = irqs();
    let fd = wired(&irqs, INTX, 0);
    irqs.mask(INTX, 0, 1).unwrap();
    irqs.set_level(INTX, 0, true);
    irqs.set_level(INTX, 0, false);
    irqs.unmask(INTX, 0, 1).unwrap();
    assert_eq!(count(&fd), 0);
}

#[test]
fn a_line_held_before_it_is_wired_is_heard() {
    let irqs = irqs();
    irqs.set_level(INTX, 0, true);
    let first = wired(&irqs, INTX, 0);
    assert_eq!(count(&first), 1);
    irqs.disable(INTX).unwrap();
    assert_eq!(count(&wired(&irqs, INTX, 0)), 1, "the client came back");
}

#[test]
fn disabling_forgets_masks_and_fds_and_keeps_edges() {
    let irqs = irqs();
    let fd = wired(&irqs, MSI, 0);
    irqs.mask(MSI, 0, 1).unwrap();
    irqs.raise(MSI, 0);
    irqs.disable(MSI).unwrap();
    let again = wired(&irqs, MSI, 0);
    irqs.raise(MSI, 0);
    assert_eq!((count(&fd), count(&again)), (0, 2), "the edge that was pending, and the new one");
    irqs.client.disable_all();
    irqs.raise(MSI, 0);
    assert_eq!(count(&again), 0);
}

#[test]
fn ranges_outside_the_index_are_refused() {
    let irqs = irqs();
    for (index, start, count) in [(1, 0, 5), (1, 4, 1), (1, u32::MAX, 2), (1, 5, 0), (3, 0, 1), (4, 0, 0)] {
        assert_eq!(irqs.trigger_range(index, start, count), Err(Errno::EINVAL), "{index} {start} {count}");
        assert_eq!(irqs.mask(index, start, count), Err(Errno::EINVAL));
        assert_eq!(irqs.unmask(index, start, count), Err(Errno::EINVAL));
    }
    assert_eq!(irqs.wire(MSI, 3, vec![None, None]), Err(Errno::EINVAL));
    assert_eq!(irqs.disable(4), Err(Errno::EINVAL));
    assert_eq!(irqs.mask(2, 0, 1), Err(Errno::ENOTTY), "not maskable");
    assert_eq!(irqs.trigger_range(MSI, 4, 0), Ok(()));
}

#[test]
fn only_eventfds_are_wired_and_a_refusal_changes_nothing() {
    let irqs = irqs();
    let fd = wired(&irqs, MSI, 0);
    let (_reader, pipe) = rustix::pipe::pipe().unwrap();
    let memory = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    for bad in [pipe, memory] {
        let fds = vec![Some(event().into()), Some(bad.into())];
        assert_eq!(irqs.wire(MSI, 0, fds), Err(Errno::EINVAL));
    }
    irqs.raise(MSI, 0);
    assert_eq!(count(&fd), 1);
    assert!(!irqs.device.is_wired(MSI, 1));
}

#[test]
fn a_full_blocking_eventfd_does_not_stop_the_device() {
    let irqs = irqs();
    let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    irqs.wire(MSI, 0, vec![Some(fd.try_clone().unwrap().into())]).unwrap();
    rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    irqs.raise(MSI, 0);
    // The kernel's own signal fills the counter up by one more than a write does.
    assert!(count(&fd) >= u64::MAX - 1);
    irqs.raise(MSI, 0);
    assert_eq!(count(&fd), 1);
}

#[test]
fn a_client_that_makes_its_full_eventfd_blocking_holds_up_neither_the_device_nor_the_next_client() {
    let irqs = std::sync::Arc::new(irqs());
    let fd = wired(&irqs, MSI, 2);
    // The peer has the flag and the counter as well, and uses both after they were looked at.
    rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::empty()).unwrap();
    rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let (done, waits) = std::sync::mpsc::channel();
    std::thread::spawn({
        let irqs = std::sync::Arc::clone(&irqs);
        move || {
            irqs.raise(MSI, 2);
            irqs.trigger_range(MSI, 2, 1).unwrap();
            irqs.client.disable_all();
            done.send(wired(&irqs, MSI, 2)).unwrap();
        }
    });
    let next = waits.recv_timeout(std::time::Duration::from_secs(60)).expect("the signal hangs");
    irqs.raise(MSI, 2);
    assert_eq!(count(&next), 1);
}

#[test]
fn an_edge_on_an_unwired_vector_is_signalled_when_it_is_wired() {
    let irqs = irqs();
    irqs.raise(MSI, 1);
    irqs.raise(MSI, 1);
    assert_eq!(irqs.device.pending(MSI).collect::<Vec<_>>(), [1]);
    let fd = wired(&irqs, MSI, 1);
    assert_eq!(count(&fd), 1);
    assert_eq!(irqs.device.pending(MSI).count(), 0);
    irqs.disable(MSI).unwrap();
    irqs.raise(MSI, 1);
    assert_eq!(count(&wired(&irqs, MSI, 1)), 1, "an edge between two wirings");
}

#[test]
fn a_client_that_triggers_what_it_has_not_wired_leaves_nothing_behind() {
    let irqs = irqs();
    irqs.trigger_range(MSI, 0, 4).unwrap();
    assert_eq!(irqs.device.pending(MSI).count(), 0);
}

#[test]
fn a_reset_forgets_edges_and_keeps_lines() {
    let irqs = irqs();
    irqs.raise(MSI, 1);
    irqs.set_level(INTX, 0, true);
    irqs.device.forget_all_pending();
    assert_eq!(count(&wired(&irqs, MSI, 1)), 0);
    assert_eq!(count(&wired(&irqs, INTX, 0)), 1);
}

#[test]
fn one_vector_after_the_other_is_wired_without_a_look_at_the_rest() {
    let client = Wiring::new(&[Irq { flags: IrqFlags::EVENTFD, count: 2048 }]);
    let device = client.interrupts();
    let fd = event();
    for vector in 0..2048 {
        let fds = vec![Some(fd.try_clone().unwrap().into())];
        client.set(0, vector, SetIrqs::Wire(fds)).unwrap();
        assert!(device.any_wired(0));
    }
    for vector in 0..2048 {
        assert!(device.any_wired(0));
        client.set(0, vector, SetIrqs::Wire(vec![None])).unwrap();
    }
    assert!(!device.any_wired(0));
}

#[test]
fn what_is_exported_goes_on_in_another_process() {
    let from = irqs();
    let (intx, msi) = (wired(&from, INTX, 0), wired(&from, MSI, 3));
    from.set_level(INTX, 0, true);
    from.mask(MSI, 3, 1).unwrap();
    from.raise(MSI, 3);
    from.raise(MSI, 0);
    count(&intx);
    let to = irqs();
    to.client.adopt(from.client.export()).unwrap();
    assert_eq!((count(&intx), count(&msi)), (1, 0), "the line is still held, the other vector masked");
    assert_eq!(to.device.pending(MSI).collect::<Vec<_>>(), [0, 3]);
    to.unmask(MSI, 3, 1).unwrap();
    to.set_level(INTX, 0, false);
    to.raise(MSI, 3);
    assert_eq!((count(&intx), count(&msi)), (0, 2));
    assert_eq!(count(&wired(&to, MSI, 0)), 1);
    assert!(to.device.is_wired(INTX, 0));
}

#[test]
fn what_does_not_fit_is_not_adopted() {
    let to = irqs();
    let mut fewer = irqs().client.export();
    fewer.indexes[MSI as usize][0].pending = true;
    fewer.indexes[MSI as usize].pop();
    assert_eq!(to.client.adopt(fewer), Err(Errno::EINVAL));
    assert_eq!(to.device.pending(MSI).count(), 0);
}
