//! Interrupts as the device sees them: vectors wired to eventfds (`vfio.h: VFIO_DEVICE_SET_IRQS`).
//!
//! Edges and levels. [`Irqs::trigger`] is an edge: one signal, or one pending mark while the vector is masked.
//! [`Irqs::set_level`] is a line that the device holds, as INTx does. It signals when the line rises, when it is
//! unmasked while held, and when it is wired while held (so a device that was loaded with its line up is heard).
//!
//! Automasking. `vfio.h` lets an AUTOMASKED vector mask itself as it fires until the client unmasks it. Clients that
//! know this unmask at the guest's end-of-interrupt (QEMU: at the next BAR access after the interrupt), and get the
//! held line again from that unmask. Clients that only wait on the eventfd never unmask, and a vector that waited for
//! them would be silent after its first interrupt. Both are served by one rule: a held line is signalled once and
//! then not again until it is unmasked, and a line that fell and rose again is a new signal. A client that has not
//! unmasked yet merely finds its eventfd's counter at two.
//!
//! Signals are sent under the lock of their index: once [`Irqs::disable`] returns, the eventfds are not touched.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_protocol::Errno;
use limosa_protocol::info::IrqFlags;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, OFlags};

use crate::Irq;

/// The interrupts of a device, by index and vector, wired to eventfds by the client.
#[derive(Debug, Default)]
pub struct Irqs {
    indexes: Vec<Index>,
}

#[derive(Debug)]
struct Index {
    flags: IrqFlags,
    vectors: Mutex<Vec<Vector>>,
    /// Whether any of them is wired. Changed with the vectors locked.
    any_wired: AtomicBool,
}

#[derive(Debug, Default)]
struct Vector {
    wire: Option<EventFd>,
    masked: bool,
    /// An edge came while masked.
    pending: bool,
    /// The device holds its line.
    level: bool,
}

/// An eventfd that a peer gave.
#[derive(Debug)]
struct EventFd {
    fd: OwnedFd,
    /// A write would wait for room in the counter; the flag belongs to the peer too, so it is not changed.
    blocking: bool,
}

impl Irqs {
    /// Nothing wired yet.
    pub fn new(irqs: &[Irq]) -> Irqs {
        let index = |irq: &Irq| Index {
            flags: irq.flags,
            vectors: Mutex::new((0..irq.count).map(|_| Vector::default()).collect()),
            any_wired: AtomicBool::new(false),
        };
        Irqs { indexes: irqs.iter().map(index).collect() }
    }

    /// The device raises a vector: signals its eventfd unless masked (then it is pending and fires at the unmask).
    /// Nothing happens for a vector that is not there or not wired.
    pub fn trigger(&self, index: u32, vector: u32) {
        if let Some(mut vectors) = self.vectors(index)
            && let Some(vector) = vectors.get_mut(vector as usize)
        {
            vector.edge();
        }
    }

    /// The device raises or lowers the line of a level-triggered vector (INTx). Setting what is set already does
    /// nothing. Nothing happens for a vector that is not there.
    pub fn set_level(&self, index: u32, vector: u32, level: bool) {
        if let Some(mut vectors) = self.vectors(index)
            && let Some(vector) = vectors.get_mut(vector as usize)
        {
            let rises = level && !vector.level;
            vector.level = level;
            if rises && !vector.masked {
                vector.signal();
            }
        }
    }

    /// Whether a vector has an eventfd.
    pub fn is_wired(&self, index: u32, vector: u32) -> bool {
        self.vectors(index)
            .is_some_and(|vectors| vectors.get(vector as usize).is_some_and(|v| v.wire.is_some()))
    }

    /// Whether any vector of an index has an eventfd.
    pub fn any_wired(&self, index: u32) -> bool {
        self.indexes.get(index as usize).is_some_and(|index| index.any_wired.load(Relaxed))
    }

    /// Client side (SET_IRQS with DATA_EVENTFD and ACTION_TRIGGER): wires vectors; `None` unwires. EINVAL outside the
    /// index, or when one is no eventfd: then nothing is changed.
    pub fn wire(&self, index: u32, start: u32, fds: Vec<Option<OwnedFd>>) -> Result<(), Errno> {
        let count = u32::try_from(fds.len()).map_err(|_| Errno::EINVAL)?;
        // The range is checked before the fds are looked at: that costs system calls for each.
        drop(self.range(index, start, count)?);
        let fds =
            fds.into_iter().map(|fd| fd.map(EventFd::new).transpose()).collect::<Result<Vec<_>, _>>()?;
        let mut vectors = self.range(index, start, count)?;
        for (vector, wire) in vectors[start as usize..].iter_mut().zip(fds) {
            if wire.is_none() {
                vector.unwire();
                continue;
            }
            vector.wire = wire;
            if (vector.level || vector.pending) && !vector.masked {
                vector.pending = false;
                vector.signal();
            }
        }
        let any = vectors.iter().any(|vector| vector.wire.is_some());
        self.indexes[index as usize].any_wired.store(any, Relaxed);
        Ok(())
    }

    /// Client side: unwires all of an index, and forgets its masks. EINVAL for an index that is not there.
    pub fn disable(&self, index: u32) -> Result<(), Errno> {
        self.indexes.get(index as usize).ok_or(Errno::EINVAL)?.unwire();
        Ok(())
    }

    /// Client side (ACTION_TRIGGER): triggers `count` vectors as the device would. EINVAL outside the index.
    pub fn trigger_range(&self, index: u32, start: u32, count: u32) -> Result<(), Errno> {
        self.range(index, start, count)?[start as usize..][..count as usize]
            .iter_mut()
            .for_each(Vector::edge);
        Ok(())
    }

    /// Masks. EINVAL outside the index, ENOTTY for an index that has neither MASKABLE nor AUTOMASKED.
    pub fn mask(&self, index: u32, start: u32, count: u32) -> Result<(), Errno> {
        let mut vectors = self.range(index, start, count)?;
        self.maskable(index)?;
        vectors[start as usize..][..count as usize].iter_mut().for_each(|vector| vector.masked = true);
        Ok(())
    }

    /// Unmasks, and fires what is pending or held. Errors as for [`Irqs::mask`].
    pub fn unmask(&self, index: u32, start: u32, count: u32) -> Result<(), Errno> {
        let mut vectors = self.range(index, start, count)?;
        self.maskable(index)?;
        for vector in &mut vectors[start as usize..][..count as usize] {
            vector.masked = false;
            if vector.pending || vector.level {
                vector.pending = false;
                vector.signal();
            }
        }
        Ok(())
    }

    /// Unwires everything.
    pub fn disable_all(&self) {
        self.indexes.iter().for_each(Index::unwire);
    }

    fn vectors(&self, index: u32) -> Option<MutexGuard<'_, Vec<Vector>>> {
        self.indexes.get(index as usize).map(|index| lock(&index.vectors))
    }

    /// The vectors of an index that has all of the range.
    fn range(&self, index: u32, start: u32, count: u32) -> Result<MutexGuard<'_, Vec<Vector>>, Errno> {
        let vectors = self.vectors(index).ok_or(Errno::EINVAL)?;
        let end = start.checked_add(count).ok_or(Errno::EINVAL)?;
        if end as usize <= vectors.len() { Ok(vectors) } else { Err(Errno::EINVAL) }
    }

    fn maskable(&self, index: u32) -> Result<(), Errno> {
        let flags = self.indexes.get(index as usize).ok_or(Errno::EINVAL)?.flags;
        if flags.intersects(IrqFlags::MASKABLE | IrqFlags::AUTOMASKED) { Ok(()) } else { Err(Errno::ENOTTY) }
    }
}

impl Index {
    fn unwire(&self) {
        let mut vectors = lock(&self.vectors);
        vectors.iter_mut().for_each(Vector::unwire);
        self.any_wired.store(false, Relaxed);
    }
}

/// No code under these locks panics half-way through a change, so a poisoned one is as good as any.
fn lock(vectors: &Mutex<Vec<Vector>>) -> MutexGuard<'_, Vec<Vector>> {
    vectors.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vector {
    fn edge(&mut self) {
        if self.masked {
            self.pending = true;
        } else {
            self.signal();
        }
    }

    fn signal(&self) {
        if let Some(wire) = &self.wire {
            wire.signal();
        }
    }

    /// What the client set goes; the line is the device's and stays.
    fn unwire(&mut self) {
        *self = Vector { level: self.level, ..Vector::default() };
    }
}

impl EventFd {
    /// EINVAL for an fd that is no eventfd.
    fn new(fd: OwnedFd) -> Result<EventFd, Errno> {
        if !is_eventfd(&fd) {
            return Err(Errno::EINVAL);
        }
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(|_| Errno::EINVAL)?;
        Ok(EventFd { fd, blocking: !flags.contains(OFlags::NONBLOCK) })
    }

    /// Adds 1. A counter without room is signalled already: nothing is lost by leaving it alone, and a blocking one
    /// that a peer filled up does not stop the device. (The kernel has no write that leaves a blocking eventfd alone
    /// when it is full, so a peer that fills it between the look and the write can still hold up its own device.)
    fn signal(&self) {
        if self.blocking {
            let mut poll_fd = [PollFd::new(&self.fd, PollFlags::OUT)];
            if !matches!(poll(&mut poll_fd, Some(&Default::default())), Ok(1)) {
                return;
            }
        }
        if let Err(error) = rustix::io::write(&self.fd, &1u64.to_ne_bytes())
            && error != rustix::io::Errno::AGAIN
        {
            tracing::debug!(%error, "interrupt eventfd not signalled");
        }
    }
}

/// Whether the kernel says that this is an eventfd. Writing elsewhere could block, raise SIGPIPE or put bytes into
/// somebody's file.
fn is_eventfd(fd: &OwnedFd) -> bool {
    let mut text = Vec::with_capacity(256);
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    match File::open(path).and_then(|file| file.take(4096).read_to_end(&mut text)) {
        Ok(_) => text.split(|&byte| byte == b'\n').any(|line| line.starts_with(b"eventfd-count:")),
        // In a sandbox without /proc: an anonymous inode has no file type.
        Err(error) if error.kind() == ErrorKind::NotFound => rustix::fs::fstat(fd.as_fd())
            .is_ok_and(|stat| matches!(FileType::from_raw_mode(stat.st_mode), FileType::Unknown)),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
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
        irqs.wire(index, vector, vec![Some(fd.try_clone().unwrap())]).unwrap();
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
        for (index, start, count) in [(1, 0, 5), (1, 4, 1), (1, u32::MAX, 2), (1, 5, 0), (3, 0, 1), (4, 0, 0)]
        {
            assert_eq!(
                irqs.trigger_range(index, start, count),
                Err(Errno::EINVAL),
                "{index} {start} {count}"
            );
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
            let fds = vec![Some(event()), Some(bad)];
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
        irqs.wire(MSI, 0, vec![Some(fd.try_clone().unwrap())]).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        irqs.trigger(MSI, 0);
        assert_eq!(count(&fd), u64::MAX - 1);
        irqs.trigger(MSI, 0);
        assert_eq!(count(&fd), 1);
    }
}
