//! What holds for interrupts.

use super::*;
use rustix::event::{EventfdFlags, eventfd};

const INTX: u32 = 0;
const MSI: u32 = 1;

fn irqs() -> Irqs {
    let level = IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED;
    Irqs::new(&[
        Irq { flags: level, count: 1 },
        Irq { flags: IrqFlags::EVENTFD | IrqFlags::MASKABLE, count: 4 },
        Irq { flags: IrqFlags::EVENTFD, count: 1 },
        Irq::default(),
    ])
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
    irqs.trigger(MSI, 1);
    irqs.trigger(MSI, 1);
    irqs.trigger(MSI, 0);
    irqs.trigger(MSI, 9);
    irqs.trigger(9, 1);
    assert_eq!((count(&one), count(&two)), (2, 0));
    irqs.wire(MSI, 1, vec![None, None]).unwrap();
    irqs.trigger(MSI, 1);
    assert_eq!(count(&one), 0);
    assert!(!irqs.any_wired(MSI));
}

#[test]
fn a_masked_edge_is_pending_and_fires_once_at_the_unmask() {
    let irqs = irqs();
    let fd = wired(&irqs, MSI, 3);
    irqs.mask(MSI, 0, 4).unwrap();
    irqs.trigger(MSI, 3);
    irqs.trigger(MSI, 3);
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
    irqs.trigger(INTX, 0);
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
fn disabling_forgets_masks_and_fds() {
    let irqs = irqs();
    let fd = wired(&irqs, MSI, 0);
    irqs.mask(MSI, 0, 1).unwrap();
    irqs.trigger(MSI, 0);
    irqs.disable(MSI).unwrap();
    let again = wired(&irqs, MSI, 0);
    irqs.trigger(MSI, 0);
    assert_eq!((count(&fd), count(&again)), (0, 1));
    irqs.disable_all();
    irqs.trigger(MSI, 0);
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
    irqs.trigger(MSI, 0);
    assert_eq!(count(&fd), 1);
    assert!(!irqs.is_wired(MSI, 1));
}

#[test]
fn a_full_blocking_eventfd_does_not_stop_the_device() {
    let irqs = irqs();
    let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    irqs.wire(MSI, 0, vec![Some(fd.try_clone().unwrap().into())]).unwrap();
    rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    irqs.trigger(MSI, 0);
    assert_eq!(count(&fd), u64::MAX - 1);
    irqs.trigger(MSI, 0);
    assert_eq!(count(&fd), 1);
}

#[test]
fn a_signal_that_waits_for_room_ends_when_it_is_unblocked() {
    let irqs = std::sync::Arc::new(irqs());
    let fd = wired(&irqs, MSI, 2);
    // The peer has the flag and the counter as well, and uses both after they were looked at.
    rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::empty()).unwrap();
    rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let signalling = std::thread::spawn({
        let irqs = std::sync::Arc::clone(&irqs);
        move || {
            irqs.trigger(MSI, 2);
            // The lock is free again.
            irqs.disable_all();
        }
    });
    let began = std::time::Instant::now();
    while !signalling.is_finished() {
        assert!(began.elapsed() < std::time::Duration::from_secs(60), "it still waits");
        irqs.unblock();
        std::thread::yield_now();
    }
    signalling.join().unwrap();
    rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::NONBLOCK).unwrap();
    assert!(count(&fd) <= 1, "what the peer put there is gone, and what was signalled may be");
}
