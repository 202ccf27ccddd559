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
//!
//! A signal that does not end. A write to an eventfd waits while its counter is full, unless it is non-blocking. Both the
//! counter and that flag belong to the peer as well, at any time, so no look before the write can rule the wait out, and
//! the kernel has no write that never waits on an eventfd whatever its flag says. Writing on a thread of its own would
//! cost every interrupt the wake-up of that thread. So the write is made where it is due, and a peer that means harm can
//! hold up its own device for as long as it is there. Once it is gone, or the device is to end, [`Irqs::unblock`] makes
//! room in the counter from another thread, which needs no lock for that, and the write comes to its end.

use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_foreign_fd::ForeignFd;
use limosa_protocol::Errno;
use limosa_protocol::info::IrqFlags;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;

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
    /// The eventfds of the vectors once more, for [`Irqs::unblock`], which cannot wait for the vectors. Changed with
    /// these locked.
    wires: Mutex<Vec<Option<Arc<EventFd>>>>,
}

#[derive(Debug, Default)]
struct Vector {
    wire: Option<Arc<EventFd>>,
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
    /// Whether it is being written to.
    is_signalling: AtomicBool,
}

impl Irqs {
    /// Nothing wired yet.
    pub fn new(irqs: &[Irq]) -> Irqs {
        let index = |irq: &Irq| Index {
            flags: irq.flags,
            vectors: Mutex::new((0..irq.count).map(|_| Vector::default()).collect()),
            any_wired: AtomicBool::new(false),
            wires: Mutex::new((0..irq.count).map(|_| None).collect()),
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
    pub fn wire(&self, index: u32, start: u32, fds: Vec<Option<ForeignFd>>) -> Result<(), Errno> {
        let count = u32::try_from(fds.len()).map_err(|_| Errno::EINVAL)?;
        // The range is checked before the fds are looked at: that costs system calls for each.
        drop(self.range(index, start, count)?);
        let fds =
            fds.into_iter().map(|fd| fd.map(EventFd::new).transpose()).collect::<Result<Vec<_>, _>>()?;
        let mut vectors = self.range(index, start, count)?;
        let range = start as usize..start as usize + fds.len();
        for (vector, wire) in vectors[range.clone()].iter_mut().zip(&fds) {
            match wire {
                None => vector.unwire(),
                Some(wire) => vector.wire = Some(Arc::clone(wire)),
            }
        }
        let index = &self.indexes[index as usize];
        index.any_wired.store(vectors.iter().any(|vector| vector.wire.is_some()), Relaxed);
        lock(&index.wires)[range.clone()].clone_from_slice(&fds);
        for vector in &mut vectors[range] {
            if vector.wire.is_some() && (vector.level || vector.pending) && !vector.masked {
                vector.pending = false;
                vector.signal();
            }
        }
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

    /// Ends signals that wait for room in an eventfd, by taking what is in it: for a client that is gone, or a device that is
    /// to end, while another thread does not come back from a call that may signal. To be called again until it does, since
    /// whoever else has the eventfd may fill it again.
    pub fn unblock(&self) {
        for index in &self.indexes {
            for wire in lock(&index.wires).iter().flatten() {
                wire.unblock();
            }
        }
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
        lock(&self.wires).fill(None);
        self.any_wired.store(false, Relaxed);
    }
}

/// No code under these locks panics half-way through a change, so a poisoned one is as good as any.
fn lock<T>(guarded: &Mutex<T>) -> MutexGuard<'_, T> {
    guarded.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn new(fd: ForeignFd) -> Result<Arc<EventFd>, Errno> {
        // Writing elsewhere could block, raise SIGPIPE or put bytes into somebody's file.
        let fd = fd.into_eventfd().map_err(|_| Errno::EINVAL)?;
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(|_| Errno::EINVAL)?;
        let blocking = !flags.contains(OFlags::NONBLOCK);
        Ok(Arc::new(EventFd { fd, blocking, is_signalling: AtomicBool::new(false) }))
    }

    /// Adds 1. A counter without room is signalled already: nothing is lost by leaving it alone, and a blocking one
    /// that a peer filled up does not stop the device. One that becomes so after the look does, until
    /// [`EventFd::unblock`].
    fn signal(&self) {
        if self.blocking {
            let mut poll_fd = [PollFd::new(&self.fd, PollFlags::OUT)];
            if !matches!(poll(&mut poll_fd, Some(&Default::default())), Ok(1)) {
                return;
            }
        }
        self.is_signalling.store(true, Relaxed);
        let written = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        self.is_signalling.store(false, Relaxed);
        if let Err(error) = written
            && error != rustix::io::Errno::AGAIN
        {
            tracing::debug!(%error, "interrupt eventfd not signalled");
        }
    }

    /// Takes the counter if somebody is about to add to it. Never waits, whatever the flag is.
    fn unblock(&self) {
        if self.is_signalling.load(Relaxed) {
            let mut count = [0; 8];
            // It has no position: all ones stand for that. EAGAIN when there was nothing to take.
            let _ = rustix::io::preadv2(
                &self.fd,
                &mut [IoSliceMut::new(&mut count)],
                u64::MAX,
                ReadWriteFlags::NOWAIT,
            );
        }
    }
}

#[cfg(test)]
mod tests;
