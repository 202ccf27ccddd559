//! [`Wiring`]: the interrupts of a device as its client drives them (`vfio.h: VFIO_DEVICE_SET_IRQS`).
//!
//! The cost of a call depends on its own number of vectors, not on that of the index. A request for a vector waits for
//! a signal in progress on it, so that no signal follows a mask or uses an eventfd that was unwired.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use limosa_foreign_fd::{ForeignEventFd, ForeignFd};
use limosa_protocol::Errno;
use limosa_protocol::info::IrqFlags;

use super::{Interrupts, LEVEL, MASKED, PENDING, Shared, Vector};
use crate::Irq;

/// The interrupts of a device, as its client drives them.
#[derive(Debug, Default)]
pub struct Wiring {
    interrupts: Interrupts,
}

/// A client's request for the vectors of an index.
#[derive(Debug)]
pub enum SetIrqs {
    /// Wires one vector to each eventfd (DATA_EVENTFD, ACTION_TRIGGER); `None` unwires.
    Wire(Vec<Option<ForeignFd>>),
    /// Unwires the whole index, and clears its masks (DATA_NONE, ACTION_TRIGGER, no vectors).
    Disable,
    /// Raises this number of vectors as the device would (ACTION_TRIGGER).
    Trigger(u32),
    /// Masks this number of vectors (ACTION_MASK).
    Mask(u32),
    /// Unmasks this number of vectors, and signals those that are pending or high (ACTION_UNMASK).
    Unmask(u32),
}

/// The wiring of a client and the interrupts that a device has raised, by index and vector, to be handed over to
/// another process.
#[derive(Debug, Default)]
pub struct WiringState {
    /// The vectors of each index.
    pub indexes: Vec<Vec<VectorState>>,
}

/// One vector of a [`WiringState`].
#[derive(Debug, Default)]
pub struct VectorState {
    /// The client's eventfd.
    pub eventfd: Option<ForeignEventFd>,
    /// The client masked it.
    pub masked: bool,
    /// An edge is pending.
    pub pending: bool,
    /// The device's line is high.
    pub level: bool,
}

impl Wiring {
    /// Interrupts with nothing wired yet.
    pub fn new(irqs: &[Irq]) -> Wiring {
        Wiring { interrupts: Interrupts::new(irqs) }
    }

    /// The same interrupts as the device sees them.
    pub fn interrupts(&self) -> Interrupts {
        self.interrupts.clone()
    }

    /// Performs a client's request for the vectors from `start` on. EINVAL outside the index, or if a file to wire
    /// is not an eventfd; ENOTTY for masking or unmasking an index with neither MASKABLE nor AUTOMASKED. An error
    /// leaves everything unchanged.
    pub fn set(&self, index: u32, start: u32, set: SetIrqs) -> Result<(), Errno> {
        match set {
            SetIrqs::Wire(fds) => self.wire(index, start, fds),
            SetIrqs::Disable => {
                let index = self.interrupts.indexes.get(index as usize).ok_or(Errno::EINVAL)?;
                index.vectors.iter().for_each(|vector| vector.0.rewire(None));
                Ok(())
            }
            SetIrqs::Trigger(count) => {
                self.range(index, start, count)?.iter().for_each(Vector::raise_if_wired);
                Ok(())
            }
            SetIrqs::Mask(count) => {
                self.maskable(index, start, count)?.iter().for_each(|vector| {
                    let _no_signal_is_under_way = vector.0.write();
                    vector.0.state.fetch_or(MASKED, AcqRel);
                });
                Ok(())
            }
            SetIrqs::Unmask(count) => {
                self.maskable(index, start, count)?.iter().for_each(|vector| {
                    let wire = vector.0.write();
                    vector.0.state.fetch_and(!MASKED, AcqRel);
                    vector.0.catch_up(wire.as_ref());
                });
                Ok(())
            }
        }
    }

    fn wire(&self, index: u32, start: u32, fds: Vec<Option<ForeignFd>>) -> Result<(), Errno> {
        let count = u32::try_from(fds.len()).map_err(|_| Errno::EINVAL)?;
        // The range is checked before the fds are looked at: that costs system calls for each.
        let vectors = self.range(index, start, count)?;
        let eventfd = |fd: ForeignFd| ForeignEventFd::new(fd).map_err(|_| Errno::EINVAL);
        let fds = fds.into_iter().map(|fd| fd.map(eventfd).transpose()).collect::<Result<Vec<_>, _>>()?;
        vectors.iter().zip(fds).for_each(|(vector, wire)| vector.0.rewire(wire));
        Ok(())
    }

    /// Signals every wired vector once: after a load, for interrupts that were pending at the source.
    pub fn raise_all(&self) {
        self.interrupts.indexes.iter().flat_map(|index| &index.vectors).for_each(Vector::raise_if_wired);
    }

    /// The client is gone: unwires everything, and clears all masks. Interrupts that were raised but not signalled
    /// stay pending, for the next client.
    pub fn disable_all(&self) {
        let vectors = self.interrupts.indexes.iter().flat_map(|index| &index.vectors);
        vectors.for_each(|vector| vector.0.rewire(None));
    }

    /// Replaces the eventfds and masks by those of another client, vector by vector. A concurrent edge is signalled
    /// to the old eventfd or to the new one, or is pending. Pending edges and high lines are signalled.
    pub(crate) fn replace(&self, by: &Wiring) {
        let vectors = |wiring: &'_ Wiring| -> Vec<Vector> {
            wiring.interrupts.indexes.iter().flat_map(|index| &index.vectors).cloned().collect()
        };
        for (to, from) in vectors(self).iter().zip(&vectors(by)) {
            let wire = from.0.write().take();
            to.0.replace(wire, from.0.state.swap(0, AcqRel) & (MASKED | PENDING));
        }
    }

    /// The current wiring and raised interrupts.
    pub fn export(&self) -> WiringState {
        let vector = |vector: &Vector| {
            let wire = vector.0.write();
            let state = vector.0.state.load(Acquire);
            let is = |bit| state & bit != 0;
            let eventfd = wire.clone();
            VectorState { eventfd, masked: is(MASKED), pending: is(PENDING), level: is(LEVEL) }
        };
        let indexes = self.interrupts.indexes.iter();
        WiringState { indexes: indexes.map(|index| index.vectors.iter().map(vector).collect()).collect() }
    }

    /// Takes over the exported state of another process, and signals unmasked vectors that are pending or high.
    /// EINVAL if the interrupts differ; then nothing has changed.
    pub fn adopt(&self, state: WiringState) -> Result<(), Errno> {
        let indexes = &self.interrupts.indexes;
        let fits = state.indexes.len() == indexes.len()
            && state.indexes.iter().zip(&**indexes).all(|(from, to)| from.len() == to.vectors.len());
        if !fits {
            return Err(Errno::EINVAL);
        }
        let taken = |vector: VectorState| {
            let bit = |is: bool, bit: u8| if is { bit } else { 0 };
            let bits = bit(vector.masked, MASKED) | bit(vector.pending, PENDING) | bit(vector.level, LEVEL);
            (bits, vector.eventfd)
        };
        let taken = state.indexes.into_iter().flatten().map(taken);
        let vectors = indexes.iter().flat_map(|index| &index.vectors);
        for (vector, (bits, eventfd)) in vectors.zip(taken) {
            vector.0.rewire(None);
            // With its eventfd it is signalled what these bits say.
            vector.0.state.store(bits, Release);
            if eventfd.is_some() {
                vector.0.rewire(eventfd);
            }
        }
        Ok(())
    }

    /// The vectors of a range, if it exists.
    fn range(&self, index: u32, start: u32, count: u32) -> Result<&[Vector], Errno> {
        let index = self.interrupts.indexes.get(index as usize).ok_or(Errno::EINVAL)?;
        let end = start.checked_add(count).ok_or(Errno::EINVAL)?;
        index.vectors.get(start as usize..end as usize).ok_or(Errno::EINVAL)
    }

    fn maskable(&self, index: u32, start: u32, count: u32) -> Result<&[Vector], Errno> {
        let vectors = self.range(index, start, count)?;
        let flags = self.interrupts.indexes[index as usize].flags;
        let maskable = flags.intersects(IrqFlags::MASKABLE | IrqFlags::AUTOMASKED);
        if maskable { Ok(vectors) } else { Err(Errno::ENOTTY) }
    }
}

impl Vector {
    /// An interrupt that a client triggers to test its wiring does not become pending.
    fn raise_if_wired(&self) {
        if self.0.read().is_some() {
            self.raise();
        }
    }
}

impl Shared {
    /// Sets or removes the vector's eventfd. Removing it clears the mask.
    fn rewire(&self, to: Option<ForeignEventFd>) {
        let mut wire = self.write();
        self.count(wire.is_some(), to.is_some());
        if to.is_none() {
            self.state.fetch_and(!MASKED, AcqRel);
        }
        *wire = to;
        self.catch_up(wire.as_ref());
    }

    /// Sets or removes the vector's eventfd to another client's, with that client's mask and pending edge.
    fn replace(&self, to: Option<ForeignEventFd>, bits: u8) {
        let mut wire = self.write();
        self.count(wire.is_some(), to.is_some());
        // Under the lock for writing no edge comes between.
        self.state.fetch_and(!MASKED, AcqRel);
        self.state.fetch_or(bits, AcqRel);
        *wire = to;
        self.catch_up(wire.as_ref());
    }

    fn count(&self, was_wired: bool, is_wired: bool) {
        match (was_wired, is_wired) {
            (false, true) => _ = self.wired.fetch_add(1, Relaxed),
            (true, false) => _ = self.wired.fetch_sub(1, Relaxed),
            _ => {}
        }
    }

    /// Signals a pending edge or a high line, if the vector is wired and not masked.
    fn catch_up(&self, wire: Option<&ForeignEventFd>) {
        if let Some(wire) = wire.filter(|_| !self.has(MASKED)) {
            let before = self.state.fetch_and(!PENDING, AcqRel);
            if before & (PENDING | LEVEL) != 0 {
                wire.signal();
            }
        }
    }
}
