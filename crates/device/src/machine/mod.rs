//! [`Machine`]: a device that is ready to be used. It owns a model, serializes the calls on it,
//! and walks the migration states over it (`vfio.h: enum vfio_device_mig_state`,
//! `VFIO_DEVICE_RESET`).
//!
//! One lock covers the model, its state and its session. A model that panics is caught: the
//! device is then in ERROR, every call answers EIO, and a reset may bring it back. So neither a
//! poisoned lock nor a dead thread is ever what a client sees of a model's mistake.

mod arcs;
mod feature;
mod session;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_protocol::info::RegionFlags;
use limosa_protocol::{Errno, MigrationFlags, State};

use crate::{Bus, Description, Irqs, Mappings, Model};

pub use feature::FeatureDone;
pub use session::SessionId;
use session::{Open, SessionIds};

/// A device that is ready to be used: a model, its memory and interrupts, its state and session.
///
/// Every call may come from any thread; calls on the model are serialized. A call that carries
/// session data ([`Machine::data_read`], [`Machine::data_fill`]) keeps the others waiting while
/// its closure runs.
pub struct Machine {
    bus: Bus,
    mappings: Mappings,
    description: Description,
    flags: Option<MigrationFlags>,
    has_precopy_reinit: bool,
    inner: Mutex<Inner>,
}

/// What the lock covers.
struct Inner {
    model: Box<dyn Model>,
    state: State,
    session: Option<Open>,
    ids: SessionIds,
    /// The client opted in to output flags in pre-copy info. Holds until a reset.
    precopy_reinit: bool,
    /// The model panicked and has not been reset since: it is not called.
    panicked: bool,
    /// Resets so far, those that failed included.
    resets: u64,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("flags", &self.flags).finish_non_exhaustive()
    }
}

impl Machine {
    /// Makes the model ready, in RUNNING, with nothing mapped and nothing wired.
    pub fn new(mut model: Box<dyn Model>) -> Arc<Machine> {
        let description = model.description();
        let mappings = Mappings::default();
        let bus = Bus { memory: mappings.dma(), irqs: Arc::new(Irqs::new(&description.irqs)) };
        model.attach(bus.clone());
        let flags = model.migration().map(|migration| migration.flags() | MigrationFlags::STOP_COPY);
        let has_precopy_reinit =
            model.migration().is_some_and(|migration| feature::precopy_reinit(migration));
        let inner = Inner {
            model,
            state: State::Running,
            session: None,
            ids: SessionIds::default(),
            precopy_reinit: false,
            panicked: false,
            resets: 0,
        };
        Arc::new(Machine { bus, mappings, description, flags, has_precopy_reinit, inner: Mutex::new(inner) })
    }

    /// Guest memory and interrupts, as its model reaches them.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Guest memory, as its client drives it.
    pub fn mappings(&self) -> &Mappings {
        &self.mappings
    }

    /// What it looks like. [`Description::device_info`] and its siblings are what a client is told.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// What its migration supports; `None` for a device without migration.
    pub fn migration_flags(&self) -> Option<MigrationFlags> {
        self.flags
    }

    /// Reads `data.len()` bytes of a region.
    ///
    /// EINVAL for a region that is not there, a range beyond its end, or a region that cannot be
    /// read; else what the model answers. In ERROR the model still answers, unless it panicked:
    /// then EIO.
    pub fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.access(region, offset, data.len(), RegionFlags::READ)?;
        if data.is_empty() {
            return Ok(());
        }
        self.with(|inner| inner.model()?.region_read(region, offset, data))
    }

    /// Writes a region, likewise.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.access(region, offset, data.len(), RegionFlags::WRITE)?;
        if data.is_empty() {
            return Ok(());
        }
        self.with(|inner| inner.model()?.region_write(region, offset, data))
    }

    fn access(&self, region: u32, offset: u64, bytes: usize, need: RegionFlags) -> Result<(), Errno> {
        let region = self.description.regions.get(region as usize).ok_or(Errno::EINVAL)?;
        let end = offset.checked_add(bytes as u64).ok_or(Errno::EINVAL)?;
        if end > region.size || region.size == 0 || !region.flags.contains(need) {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// Resets to RUNNING from any state, ERROR too (`vfio.h: VFIO_DEVICE_RESET`). A session ends,
    /// and the opt-in to pre-copy flags is forgotten; mappings, interrupt wiring and DMA logging
    /// stay. When the model cannot be reset: its errno, and ERROR. Every call raises
    /// [`Machine::reset_count`] by one, also one that fails.
    pub fn reset(&self) -> Result<(), Errno> {
        self.with(|inner| {
            // First: a model that fails or panics below may have lost its state already.
            inner.resets += 1;
            inner.precopy_reinit = false;
            inner.end_session();
            inner.panicked = false;
            match inner.model.reset() {
                Ok(()) => {
                    inner.enter(State::Running);
                    Ok(())
                }
                Err(errno) => {
                    tracing::error!(%errno, "the device cannot be reset");
                    inner.enter(State::Error);
                    Err(errno)
                }
            }
        })
    }

    /// How many times [`Machine::reset`] was called since the machine was made
    /// (`docs/vfio-user-extensions.md: RESET_COUNT`). When two reads are equal, no reset came between
    /// them. Arcs do not count, nor does entering ERROR: only a reset leads out of it.
    ///
    /// Read under the lock that covers resets and arcs, so a reset that came before an arc has been
    /// counted when the arc is done.
    pub fn reset_count(&self) -> u64 {
        self.lock().resets
    }

    /// The state. RUNNING or ERROR for a device without migration.
    pub fn state(&self) -> State {
        self.lock().state
    }

    /// The client went away: mappings and wiring go, logging stops. State and session stay, so
    /// that a client that comes back finds the device as it was left.
    pub fn client_gone(&self) {
        let _ = self.mappings.logging_stop();
        self.mappings.clear();
        self.bus.irqs.disable_all();
    }

    /// Takes the lock. It is poisoned only when a closure that the caller passed panicked: the
    /// model's own panics are caught below, so what it guards is whole.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one call, with the model's panics caught.
    fn with<R>(&self, call: impl FnOnce(&mut Inner) -> Result<R, Errno>) -> Result<R, Errno> {
        let mut inner = self.lock();
        caught(|| call(&mut inner)).unwrap_or_else(|| Err(inner.model_panicked()))
    }
}

/// Runs a call on the model; `None` when it panicked.
fn caught<R>(call: impl FnOnce() -> R) -> Option<R> {
    // What the model left half done is not looked at again: only its reset is called.
    catch_unwind(AssertUnwindSafe(call)).ok()
}

impl Inner {
    /// The model, unless it panicked.
    fn model(&mut self) -> Result<&mut dyn Model, Errno> {
        if self.panicked { Err(Errno::EIO) } else { Ok(&mut *self.model) }
    }

    /// Takes note that the model panicked: ERROR, no session, EIO.
    fn model_panicked(&mut self) -> Errno {
        tracing::error!(state = %self.state, "the model panicked; the device is in ERROR until it is reset");
        self.panicked = true;
        self.session = None;
        self.enter(State::Error);
        Errno::EIO
    }

    fn enter(&mut self, state: State) {
        if self.state != state {
            tracing::debug!(from = %self.state, to = %state, "migration state");
            self.state = state;
        }
    }
}
