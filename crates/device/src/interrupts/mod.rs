//! Interrupts as the device sees them: vectors, which its client wires to eventfds (`vfio.h: VFIO_DEVICE_SET_IRQS`; the
//! client's side is [`Wiring`]).
//!
//! Edges and levels. [`Vector::raise`] is an edge: one signal. While the vector is masked, or has no eventfd, the edge
//! is pending; it is signalled when the vector is unmasked or wired. [`Vector::set_level`] is a level-triggered line,
//! as for INTx. It signals when the line rises, and when the vector is unmasked or wired while the line is high (as
//! after loading a device with its line high).
//!
//! Automasking. `vfio.h` lets an AUTOMASKED vector mask itself as it fires until the client unmasks it. Clients that
//! implement this unmask at the guest's end-of-interrupt (QEMU: at the next BAR access after the interrupt), and that
//! unmask signals a line that is still high. Clients that only wait on the eventfd never unmask, and a vector that
//! waited for that would be silent after its first interrupt. One rule serves both: a high line is signalled once and
//! then not again until it is unmasked, and a line that fell and rose again is a new signal. A client that has not
//! unmasked in between finds its eventfd's counter at two.
//!
//! Any thread may signal, and no thread waits: neither for the device, whose lock is not needed, nor for other vectors,
//! nor for the client, which could fill its eventfd and make it blocking at any time ([`ForeignEventFd`]). A signal is
//! sent with its vector locked for reading, so an eventfd is not used after it was unwired.

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
    /// Number of wired vectors.
    wired: Arc<AtomicUsize>,
}

/// One vector, which any thread may raise. Clones refer to the same vector.
#[derive(Clone, Debug)]
pub struct Vector(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// [`MASKED`], [`PENDING`] and [`LEVEL`].
    state: AtomicU8,
    /// The client's eventfd. Locked for reading by a signal, and for writing by the client's requests.
    wire: RwLock<Option<ForeignEventFd>>,
    /// Number of wired vectors of its index.
    wired: Arc<AtomicUsize>,
}

/// The client masked it.
const MASKED: u8 = 1 << 0;
/// An edge came while it was masked or had no eventfd.
const PENDING: u8 = 1 << 1;
/// The device's line is high.
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

    /// A vector, for code that raises it repeatedly; `None` if it does not exist.
    pub fn vector(&self, index: u32, vector: u32) -> Option<&Vector> {
        self.indexes.get(index as usize)?.vectors.get(vector as usize)
    }

    /// [`Vector::raise`]. Does nothing if the vector does not exist.
    pub fn raise(&self, index: u32, vector: u32) {
        if let Some(vector) = self.vector(index, vector) {
            vector.raise();
        }
    }

    /// [`Vector::set_level`]. Does nothing if the vector does not exist.
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

    /// The vectors of an index with an edge that has not been signalled to the client.
    pub fn pending(&self, index: u32) -> impl Iterator<Item = u32> {
        let vectors = self.indexes.get(index as usize).map_or(&[][..], |index| &index.vectors);
        (0..).zip(vectors).filter(|(_, vector)| vector.is_pending()).map(|(at, _)| at)
    }

    /// Clears the pending edges of an index, as a reset does.
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

    /// Raises or lowers the line of a level-triggered vector (INTx). Setting the current level does nothing.
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

    /// Whether an edge is pending.
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
