//! Interrupts as the device sees them: vectors, which its client wires to eventfds (`vfio.h: VFIO_DEVICE_SET_IRQS`; the
//! client's side is [`Wiring`]).
//!
//! Edges and levels. [`Vector::raise`] is an edge: one signal. While the vector is masked, or has no eventfd, the edge is
//! pending, and signalled when that ends. [`Vector::set_level`] is a line that the device holds, as INTx does. It signals
//! when the line rises, when it is unmasked while held, and when it is wired while held (so a device that was loaded with
//! its line up is heard).
//!
//! Automasking. `vfio.h` lets an AUTOMASKED vector mask itself as it fires until the client unmasks it. Clients that
//! know this unmask at the guest's end-of-interrupt (QEMU: at the next BAR access after the interrupt), and get the
//! held line again from that unmask. Clients that only wait on the eventfd never unmask, and a vector that waited for
//! them would be silent after its first interrupt. Both are served by one rule: a held line is signalled once and
//! then not again until it is unmasked, and a line that fell and rose again is a new signal. A client that has not
//! unmasked yet merely finds its eventfd's counter at two.
//!
//! Any thread may signal, and none waits: not for the device, whose lock is not needed, nor for other vectors, nor for the
//! client, which may fill its eventfd and make it blocking at any time ([`ForeignEventFd`]). A signal is sent with its
//! vector locked for reading: once an eventfd is taken away, it is not touched any more.

mod wiring;

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicU8, AtomicUsize};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use limosa_foreign_fd::ForeignEventFd;
use limosa_protocol::info::IrqFlags;

use crate::Irq;
pub use wiring::{SetIrqs, VectorState, Wiring, WiringState};

/// The interrupts of a device, by index and vector.
#[derive(Clone, Debug, Default)]
pub struct Interrupts {
    indexes: Arc<[Index]>,
}

#[derive(Debug)]
struct Index {
    flags: IrqFlags,
    vectors: Box<[Vector]>,
    /// How many of them are wired.
    wired: Arc<AtomicUsize>,
}

/// One vector, to be raised from any thread. Clones are the same vector.
#[derive(Clone, Debug)]
pub struct Vector(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// [`MASKED`], [`PENDING`] and [`LEVEL`].
    state: AtomicU8,
    /// The client's eventfd. Locked for reading by a signal, and for writing by what the client does.
    wire: RwLock<Option<ForeignEventFd>>,
    /// Of its index.
    wired: Arc<AtomicUsize>,
}

/// The client masked it.
const MASKED: u8 = 1 << 0;
/// An edge came while it was masked or had no eventfd.
const PENDING: u8 = 1 << 1;
/// The device holds its line.
const LEVEL: u8 = 1 << 2;

impl Interrupts {
    fn new(irqs: &[Irq]) -> Interrupts {
        let index = |irq: &Irq| {
            let wired = Arc::new(AtomicUsize::new(0));
            let vector = |_| Vector(Arc::new(Shared { wired: Arc::clone(&wired), ..Shared::default() }));
            Index { flags: irq.flags, vectors: (0..irq.count).map(vector).collect(), wired }
        };
        Interrupts { indexes: irqs.iter().map(index).collect() }
    }

    /// A vector, to be kept by whatever raises it; `None` for one that is not there.
    pub fn vector(&self, index: u32, vector: u32) -> Option<&Vector> {
        self.indexes.get(index as usize)?.vectors.get(vector as usize)
    }

    /// [`Vector::raise`]. Nothing happens for a vector that is not there.
    pub fn raise(&self, index: u32, vector: u32) {
        if let Some(vector) = self.vector(index, vector) {
            vector.raise();
        }
    }

    /// [`Vector::set_level`]. Nothing happens for a vector that is not there.
    pub fn set_level(&self, index: u32, vector: u32, level: bool) {
        if let Some(vector) = self.vector(index, vector) {
            vector.set_level(level);
        }
    }

    /// Whether a vector has an eventfd.
    pub fn is_wired(&self, index: u32, vector: u32) -> bool {
        self.vector(index, vector).is_some_and(|vector| vector.0.read().is_some())
    }

    /// Whether any vector of an index has an eventfd.
    pub fn any_wired(&self, index: u32) -> bool {
        self.indexes.get(index as usize).is_some_and(|index| index.wired.load(Relaxed) > 0)
    }

    /// The vectors of an index with an edge that its client was not signalled yet.
    pub fn pending(&self, index: u32) -> impl Iterator<Item = u32> {
        let vectors = self.indexes.get(index as usize).map_or(&[][..], |index| &index.vectors);
        (0..).zip(vectors).filter(|(_, vector)| vector.is_pending()).map(|(at, _)| at)
    }

    /// Forgets the edges of an index that are pending, as a reset does.
    pub fn forget_pending(&self, index: u32) {
        let vectors = self.indexes.get(index as usize).map_or(&[][..], |index| &index.vectors);
        vectors.iter().for_each(|vector| _ = vector.0.state.fetch_and(!PENDING, AcqRel));
    }

    /// The same for all indexes.
    pub fn forget_all_pending(&self) {
        (0..self.indexes.len() as u32).for_each(|index| self.forget_pending(index));
    }
}

impl Vector {
    /// An edge: signals the client, or is pending while the vector is masked or has no eventfd.
    pub fn raise(&self) {
        let wire = self.0.read();
        match &*wire {
            Some(wire) if !self.0.has(MASKED) => wire.signal(),
            _ => _ = self.0.state.fetch_or(PENDING, AcqRel),
        }
    }

    /// Raises or lowers the line of a level-triggered vector (INTx). Setting what is set already does nothing.
    pub fn set_level(&self, level: bool) {
        let wire = self.0.read();
        let before = match level {
            true => self.0.state.fetch_or(LEVEL, AcqRel),
            false => self.0.state.fetch_and(!LEVEL, AcqRel),
        };
        if level
            && before & (LEVEL | MASKED) == 0
            && let Some(wire) = &*wire
        {
            wire.signal();
        }
    }

    /// Whether an edge waits to be signalled.
    pub fn is_pending(&self) -> bool {
        self.0.has(PENDING)
    }
}

impl Shared {
    // Nothing under this lock panics half-way through a change, so a poisoned one is as good as any.
    fn read(&self) -> RwLockReadGuard<'_, Option<ForeignEventFd>> {
        self.wire.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Option<ForeignEventFd>> {
        self.wire.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, bit: u8) -> bool {
        self.state.load(Acquire) & bit != 0
    }
}

#[cfg(test)]
mod tests;
