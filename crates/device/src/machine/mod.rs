//! [`Machine`]: a complete device. It owns a model, and walks the migration states over it
//! (`vfio.h: enum vfio_device_mig_state`, `VFIO_DEVICE_RESET`).
//!
//! A gate lets accesses and session data run concurrently, and arcs and resets exclusively ([`gate`]). The machine's
//! own data has a separate lock, which is never held during a call of the model, so that the state can be read at any
//! time.
//!
//! The machine catches a panic of the model: the device is then in ERROR, every call answers EIO, and a reset may
//! recover it. So clients never see a poisoned lock or a dead thread because of a model's mistake.

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

/// A complete device: a model, its memory and interrupts, its state and session.
///
/// Any thread may make any call.
pub struct Machine {
    bus: Bus,
    mappings: Mappings,
    wiring: Wiring,
    description: Description,
    flags: Option<MigrationFlags>,
    has_precopy_reinit: bool,
    model: Box<dyn Model>,
    gate: Gate,
    /// Locked by a call that transfers a session's data, since there is one such call at a time.
    data: Mutex<()>,
    inner: Mutex<Inner>,
    /// The model has panicked and has not been reset since, so it is not called.
    panicked: AtomicBool,
    /// [`Inner::holds_accesses`]. Changes only with the gate taken exclusively, or to let accesses run again.
    held: AtomicBool,
    /// [`Inner::left`] is set, and a call that leaves has to check it.
    is_left: AtomicBool,
    watchers: Mutex<Vec<Weak<Released>>>,
    /// Eventfds of regions that came from another process, by region.
    ioeventfds: Mutex<BTreeMap<u32, Vec<Arc<OwnedFd>>>>,
    counters: Counters,
}

/// The data under the lock, which is held only briefly.
struct Inner {
    state: State,
    session: Option<Open>,
    ids: SessionIds,
    /// The client opted in to output flags in pre-copy info. Valid until a reset or the client's end.
    precopy_reinit: bool,
    /// Resets so far, including failed ones.
    resets: u64,
    /// The number of the last client.
    clients: u64,
    /// The client that took the device out of RUNNING.
    driver: Option<ClientId>,
    /// The driver has gone, and the device has to run again.
    left: Option<ClientId>,
    /// The client that started the dirty log.
    logs: Option<ClientId>,
    /// The move for which the device stays stopped.
    stays: Option<MoveId>,
    /// Drives the device to copy its state while it runs ([`Machine::begin_copy`]). Clients do not see this.
    copier: Option<ClientId>,
    /// The model was not told that a client has gone, or failed then: the client may still have access to its
    /// region files.
    owes_client_gone: bool,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("flags", &self.flags).finish_non_exhaustive()
    }
}

impl Machine {
    /// Creates a machine for the model, in RUNNING, with nothing mapped and nothing wired.
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

    /// The same for a model that gets one call at a time.
    pub fn simple(model: impl SimpleModel) -> Arc<Machine> {
        Machine::new(Exclusive::new(model))
    }

    /// Guest memory and interrupts, as its model accesses them.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Guest memory, as its client maps it.
    pub fn mappings(&self) -> &Mappings {
        &self.mappings
    }

    /// Its interrupts as its client wires them, to be handed over. [`Machine::set_irqs`] changes them.
    pub fn wiring(&self) -> &Wiring {
        &self.wiring
    }

    /// Performs a client's interrupt request ([`Wiring::set`]), and tells the model if that wired or unwired
    /// vectors.
    pub fn set_irqs(&self, index: u32, start: u32, set: SetIrqs) -> Result<(), Errno> {
        let rewires = matches!(set, SetIrqs::Wire(_) | SetIrqs::Disable);
        self.wiring.set(index, start, set)?;
        if rewires {
            self.rewired(index);
        }
        Ok(())
    }

    fn rewired(&self, index: u32) {
        // The next call reports a model that panicked.
        let _ = self.access(|model| {
            model.rewired(index);
            Ok(())
        });
    }

    /// The device's description. [`Description::device_info`] and its siblings are the forms for clients.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The current file behind a mappable region. `None` for other regions, and while the model has panicked and
    /// the file is unknown.
    pub fn region_file(&self, region: u32) -> Option<Arc<OwnedFd>> {
        let mapping = self.description.regions.get(region as usize)?.mapping.as_ref()?;
        let file = self.access(|model| Ok(model.region_file(region))).ok()?;
        Some(file.unwrap_or_else(|| Arc::clone(&mapping.fd)))
    }

    /// The current eventfds that a client may signal instead of writing to a region.
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

    /// The flags of its migration; `None` for a device without migration.
    pub fn migration_flags(&self) -> Option<MigrationFlags> {
        self.flags
    }

    /// Reads `data.len()` bytes of a region.
    ///
    /// EINVAL for a missing region, a range beyond its end, or a region that cannot be read; otherwise the model's
    /// errno. In ERROR the model still answers, unless it has panicked (EIO). EBUSY while accesses have to wait
    /// ([`Machine::region_read_or_held`]).
    pub fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.region_read_or_held(region, offset, data).unwrap_or(Err(Errno::EBUSY))
    }

    /// Writes a region, likewise.
    pub fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.region_write_or_held(region, offset, data).unwrap_or(Err(Errno::EBUSY))
    }

    /// [`Machine::region_read`] for a VMM whose guest is not aware of a move: returns [`Held`] if the device does
    /// not run because another client moves it. Repeat the access after [`Machine::on_release`].
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

    /// Reads a region in every state: for configuration space, which a device always answers.
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

    /// Resets to RUNNING from any state, including ERROR (`vfio.h: VFIO_DEVICE_RESET`). Ends the session and the
    /// opt-in to pre-copy flags; mappings, interrupt wiring and DMA logging stay. If the model fails to reset, returns
    /// its errno, and the device is in ERROR. Every call, including a failed one, increments [`Machine::reset_count`],
    /// except calls that are refused before the device is touched: ETIMEDOUT if other calls do not return, EBUSY for a
    /// device that was told to stay.
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

    /// With the gate taken exclusively.
    fn reset_alone(&self) -> Result<(), Errno> {
        {
            // First: a model that fails or panics below may have lost its state already.
            let mut inner = self.lock();
            inner.resets += 1;
            inner.precopy_reinit = false;
        }
        // A model that panics here is not reset.
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

    /// Number of calls of [`Machine::reset`] since the machine was created
    /// (`docs/vfio-user-extensions.md: RESET_COUNT`). If two reads are equal, there was no reset between them. Arcs do
    /// not count, nor does entering ERROR, which only a reset leaves.
    ///
    /// It is incremented before the model is reset, while no arc is in progress, so a reset before an arc has been
    /// counted when the arc is done.
    pub fn reset_count(&self) -> u64 {
        self.lock().resets
    }

    /// The state. RUNNING or ERROR for a device without migration. During an arc, the arc's first state. RUNNING
    /// for a device that is being copied for its replacement.
    pub fn state(&self) -> State {
        let inner = self.lock();
        let is_copied = inner.copier.is_some() && inner.state.is_pre_copy();
        if is_copied { State::Running } else { inner.state }
    }

    /// Nothing under this lock panics half-way through a change.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One call on the model, concurrent with others.
    fn access<R>(&self, call: impl FnOnce(&dyn Model) -> Result<R, Errno>) -> Result<R, Errno> {
        let _passing = self.pass();
        self.call(call)
    }

    /// One call, with the model's panics caught. The gate was passed, or is taken.
    fn call<R>(&self, call: impl FnOnce(&dyn Model) -> Result<R, Errno>) -> Result<R, Errno> {
        if self.panicked.load(Acquire) {
            return Err(Errno::EIO);
        }
        // The model's inconsistent data is not used again: only its reset is called.
        catch_unwind(AssertUnwindSafe(|| call(&*self.model))).unwrap_or_else(|_| Err(self.model_panicked()))
    }

    /// One call on the model's migration, likewise.
    fn migrate<R>(&self, call: impl FnOnce(&dyn Migration) -> Result<R, Errno>) -> Result<R, Errno> {
        self.call(|model| call(model.migration().ok_or(Errno::EIO)?))
    }

    /// Records that the model panicked: ERROR, no session, EIO.
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
