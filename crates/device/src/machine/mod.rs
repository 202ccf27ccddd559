//! [`Machine`]: a device that is ready to be used. It owns a model, and walks the migration states over it
//! (`vfio.h: enum vfio_device_mig_state`, `VFIO_DEVICE_RESET`).
//!
//! A gate lets accesses and session data pass side by side, and arcs and resets alone ([`gate`]). What the machine itself keeps
//! is under a lock of its own, which no call of the model is made with, so that the state can be read at any time.
//!
//! A model that panics is caught: the device is then in ERROR, every call answers EIO, and a reset may bring it back. So neither
//! a poisoned lock nor a dead thread is ever what a client sees of a model's mistake.

mod arcs;
mod clients;
mod counts;
mod feature;
mod gate;
mod next;
mod replace;
mod session;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use limosa_protocol::info::RegionFlags;
use limosa_protocol::{Errno, MigrationFlags, State};

use crate::{
    Bus, Description, Exclusive, IoEventFd, Mappings, Migration, Model, SetIrqs, SimpleModel, Wiring,
};

use clients::arc_deadline;
pub use clients::{ClientId, Held, MoveId, Released};
use counts::Counters;
pub use counts::{ArcCount, Counts};
pub use feature::FeatureDone;
use gate::Gate;
pub use next::NextClient;
pub use replace::{Copying, Frozen, Kept};
pub use session::SessionId;
use session::{Open, SessionIds};

/// A device that is ready to be used: a model, its memory and interrupts, its state and session.
///
/// Every call may come from any thread.
pub struct Machine {
    bus: Bus,
    mappings: Mappings,
    wiring: Wiring,
    description: Description,
    flags: Option<MigrationFlags>,
    has_precopy_reinit: bool,
    model: Box<dyn Model>,
    gate: Gate,
    /// Held by a call that carries a session's data, as these come one at a time.
    data: Mutex<()>,
    inner: Mutex<Inner>,
    /// The model panicked and has not been reset since: it is not called.
    panicked: AtomicBool,
    /// [`Inner::holds_accesses`]. Changes only with the gate taken, or to let accesses pass again.
    held: AtomicBool,
    /// [`Inner::left`] is there, and a call that leaves has to look at it.
    is_left: AtomicBool,
    watchers: Mutex<Vec<Weak<Released>>>,
    /// Eventfds of regions that came from another process, by region.
    ioeventfds: Mutex<BTreeMap<u32, Vec<Arc<OwnedFd>>>>,
    counters: Counters,
}

/// What the lock covers. It is taken for moments.
struct Inner {
    state: State,
    session: Option<Open>,
    ids: SessionIds,
    /// The client opted in to output flags in pre-copy info. Holds until a reset, and as long as the client.
    precopy_reinit: bool,
    /// Resets so far, those that failed included.
    resets: u64,
    /// The last client's number.
    clients: u64,
    /// The client that took the device out of RUNNING.
    driver: Option<ClientId>,
    /// The driver has gone, and the device is to run again.
    left: Option<ClientId>,
    /// The client that started the dirty log.
    logs: Option<ClientId>,
    /// The move that the device was given away with.
    stays: Option<MoveId>,
    /// Drives the device to copy its state while it runs ([`Machine::begin_copy`]). Clients are not told.
    copier: Option<ClientId>,
    /// The model was not told that a client has gone, or failed on it: it may have what the client can reach still.
    owes_client_gone: bool,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("flags", &self.flags).finish_non_exhaustive()
    }
}

impl Machine {
    /// Makes the model ready, in RUNNING, with nothing mapped and nothing wired.
    pub fn new(model: impl Model) -> Arc<Machine> {
        let description = model.description();
        let (mappings, wiring) = (Mappings::default(), Wiring::new(&description.irqs));
        let bus = Bus { memory: mappings.dma(), interrupts: wiring.interrupts() };
        model.attach(bus.clone());
        let flags = model.migration().map(|migration| migration.flags() | MigrationFlags::STOP_COPY);
        let has_precopy_reinit = model.migration().is_some_and(feature::precopy_reinit);
        let inner = Inner {
            state: State::Running,
            session: None,
            ids: SessionIds::default(),
            precopy_reinit: false,
            resets: 0,
            clients: 0,
            driver: None,
            left: None,
            logs: None,
            stays: None,
            copier: None,
            owes_client_gone: false,
        };
        Arc::new(Machine {
            bus,
            mappings,
            wiring,
            description,
            flags,
            has_precopy_reinit,
            model: Box::new(model),
            gate: Gate::default(),
            data: Mutex::default(),
            inner: Mutex::new(inner),
            panicked: AtomicBool::new(false),
            held: AtomicBool::new(false),
            is_left: AtomicBool::new(false),
            watchers: Mutex::default(),
            ioeventfds: Mutex::default(),
            counters: Counters::default(),
        })
    }

    /// The same for a model whose calls come one at a time.
    pub fn simple(model: impl SimpleModel) -> Arc<Machine> {
        Machine::new(Exclusive::new(model))
    }

    /// Guest memory and interrupts, as its model reaches them.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Guest memory, as its client drives it.
    pub fn mappings(&self) -> &Mappings {
        &self.mappings
    }

    /// Its interrupts as its client drives them, to be handed over. [`Machine::set_irqs`] changes them.
    pub fn wiring(&self) -> &Wiring {
        &self.wiring
    }

    /// Does what the client asks of its interrupts ([`Wiring::set`]), and tells the model when that wired or unwired
    /// any of them.
    pub fn set_irqs(&self, index: u32, start: u32, set: SetIrqs) -> Result<(), Errno> {
        let rewires = matches!(set, SetIrqs::Wire(_) | SetIrqs::Disable);
        self.wiring.set(index, start, set)?;
        if rewires {
            self.rewired(index);
        }
        Ok(())
    }

    fn rewired(&self, index: u32) {
        // What becomes of a model that panicked is told by its next call.
        let _ = self.access(|model| {
            model.rewired(index);
            Ok(())
        });
    }

    /// What it looks like. [`Description::device_info`] and its siblings are what a client is told.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The file behind a region that a client may map, as it is now. `None` for another region, and while a model that panicked
    /// cannot say which file it is.
    pub fn region_file(&self, region: u32) -> Option<Arc<OwnedFd>> {
        let mapping = self.description.regions.get(region as usize)?.mapping.as_ref()?;
        let file = self.access(|model| Ok(model.region_file(region))).ok()?;
        Some(file.unwrap_or_else(|| Arc::clone(&mapping.fd)))
    }

    /// The eventfds that a client may signal in place of writes to a region, as they are now.
    pub fn ioeventfds(&self, region: u32) -> Vec<IoEventFd> {
        let mut signals = self
            .description
            .regions
            .get(region as usize)
            .map_or(Vec::new(), |region| region.ioeventfds.clone());
        let adopted = self.ioeventfds.lock().unwrap_or_else(PoisonError::into_inner);
        for (signal, fd) in signals.iter_mut().zip(adopted.get(&region).into_iter().flatten()) {
            signal.fd = Arc::clone(fd);
        }
        signals
    }

    /// What its migration supports; `None` for a device without migration.
    pub fn migration_flags(&self) -> Option<MigrationFlags> {
        self.flags
    }

    /// Reads `data.len()` bytes of a region.
    ///
    /// EINVAL for a region that is not there, a range beyond its end, or a region that cannot be
    /// read; else what the model answers. In ERROR the model still answers, unless it panicked:
    /// then EIO. EBUSY while accesses are held back ([`Machine::region_read_or_held`]).
    pub fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.region_read_or_held(region, offset, data).unwrap_or(Err(Errno::EBUSY))
    }

    /// Writes a region, likewise.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.region_write_or_held(region, offset, data).unwrap_or(Err(Errno::EBUSY))
    }

    /// [`Machine::region_read`] for a VMM whose guest knows nothing of a move: [`Held`] when the device does not run because
    /// another client moves it. The access is to be made again after [`Machine::on_release`].
    pub fn region_read_or_held(
        &self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<Result<(), Errno>, Held> {
        self.region_access(region, offset, data.len(), RegionFlags::READ, |model| {
            model.region_read(region, offset, data)
        })
    }

    /// Writes a region, likewise.
    pub fn region_write_or_held(
        &self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<Result<(), Errno>, Held> {
        self.region_access(region, offset, data.len(), RegionFlags::WRITE, |model| {
            model.region_write(region, offset, data)
        })
    }

    /// Reads a region whatever the device does: its configuration space, which a device answers in every state.
    pub fn region_read_unheld(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.check_access(region, offset, data.len(), RegionFlags::READ)?;
        if data.is_empty() {
            return Ok(());
        }
        self.access(|model| model.region_read(region, offset, data))
    }

    /// Writes a region, likewise.
    pub fn region_write_unheld(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.check_access(region, offset, data.len(), RegionFlags::WRITE)?;
        if data.is_empty() {
            return Ok(());
        }
        self.access(|model| model.region_write(region, offset, data))
    }

    fn region_access(
        &self,
        region: u32,
        offset: u64,
        bytes: usize,
        need: RegionFlags,
        call: impl FnOnce(&dyn Model) -> Result<(), Errno>,
    ) -> Result<Result<(), Errno>, Held> {
        if let Err(errno) = self.check_access(region, offset, bytes, need) {
            return Ok(Err(errno));
        }
        if bytes == 0 {
            return Ok(Ok(()));
        }
        let _passing = self.pass();
        if self.held.load(Acquire) {
            return Err(Held);
        }
        Ok(self.call(call))
    }

    fn check_access(&self, region: u32, offset: u64, bytes: usize, need: RegionFlags) -> Result<(), Errno> {
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
    /// [`Machine::reset_count`] by one, also one that fails, except those that are refused before the device is touched:
    /// ETIMEDOUT when the calls under way do not return, EBUSY for a device that was told to stay.
    pub fn reset(&self) -> Result<(), Errno> {
        let _alone = self.alone(arc_deadline(ClientId::VMM))?;
        if self.lock().stays.is_some() {
            return Err(Errno::EBUSY);
        }
        let reset = self.reset_alone();
        {
            let mut inner = self.lock();
            (inner.driver, inner.copier) = (None, None);
        }
        self.settle(ClientId::VMM);
        reset
    }

    /// With the gate taken.
    fn reset_alone(&self) -> Result<(), Errno> {
        {
            // First: a model that fails or panics below may have lost its state already.
            let mut inner = self.lock();
            inner.resets += 1;
            inner.precopy_reinit = false;
        }
        // A model that panics here is not even reset.
        self.end_session()?;
        self.panicked.store(false, Release);
        self.bus.interrupts.forget_all_pending();
        match self.call(|model| model.reset()).and_then(|()| self.tell_owed()) {
            Ok(()) => {
                self.lock().enter(State::Running);
                Ok(())
            }
            Err(errno) => {
                tracing::error!(%errno, "the device cannot be reset");
                self.lock().enter(State::Error);
                Err(errno)
            }
        }
    }

    /// How many times [`Machine::reset`] was called since the machine was made
    /// (`docs/vfio-user-extensions.md: RESET_COUNT`). When two reads are equal, no reset came between
    /// them. Arcs do not count, nor does entering ERROR: only a reset leads out of it.
    ///
    /// It is raised before the model is reset, with no arc under way, so a reset that came before an arc has been counted when
    /// the arc is done.
    pub fn reset_count(&self) -> u64 {
        self.lock().resets
    }

    /// The state. RUNNING or ERROR for a device without migration. During an arc, the state it began in. RUNNING for a device
    /// that is copied to be replaced.
    pub fn state(&self) -> State {
        let inner = self.lock();
        let is_copied = inner.copier.is_some() && inner.state.is_pre_copy();
        if is_copied { State::Running } else { inner.state }
    }

    /// Nothing under this lock panics half-way through a change.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One call on the model beside others.
    fn access<R>(&self, call: impl FnOnce(&dyn Model) -> Result<R, Errno>) -> Result<R, Errno> {
        let _passing = self.pass();
        self.call(call)
    }

    /// One call, with the model's panics caught. The gate was passed, or is taken.
    fn call<R>(&self, call: impl FnOnce(&dyn Model) -> Result<R, Errno>) -> Result<R, Errno> {
        if self.panicked.load(Acquire) {
            return Err(Errno::EIO);
        }
        // What the model left half done is not looked at again: only its reset is called.
        catch_unwind(AssertUnwindSafe(|| call(&*self.model))).unwrap_or_else(|_| Err(self.model_panicked()))
    }

    /// One call on the model's migration, likewise.
    fn migrate<R>(&self, call: impl FnOnce(&dyn Migration) -> Result<R, Errno>) -> Result<R, Errno> {
        self.call(|model| call(model.migration().ok_or(Errno::EIO)?))
    }

    /// Takes note that the model panicked: ERROR, no session, EIO.
    fn model_panicked(&self) -> Errno {
        let mut inner = self.lock();
        tracing::error!(state = %inner.state, "the model panicked; the device is in ERROR until it is reset");
        self.panicked.store(true, Release);
        inner.session = None;
        inner.enter(State::Error);
        Errno::EIO
    }
}

impl Inner {
    fn enter(&mut self, state: State) {
        if self.state != state {
            tracing::debug!(from = %self.state, to = %state, "migration state");
            self.state = state;
        }
    }
}
