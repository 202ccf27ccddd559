//! Replacing a device by one in another process: it is stopped, and its state handed over or taken back
//! (`docs/switch-over.md`).

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use limosa_protocol::{Errno, MigrationFlags, State, fsm};

use super::clients::arc_deadline;
use super::{ClientId, Inner, Machine, MoveId, SessionId};

#[cfg(test)]
mod tests;

/// A machine's data about its clients, other than model, memory and interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Whether the device is in STOP, and does not run.
    pub stopped: bool,
    /// [`Machine::reset_count`].
    pub resets: u64,
    /// The client opted in to flags in pre-copy info.
    pub precopy_reinit: bool,
    /// [`Machine::stays`].
    pub stays: Option<MoveId>,
}

/// A device whose state is being copied while it runs, for its replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copying {
    client: ClientId,
    session: SessionId,
}

impl Copying {
    /// The session that [`Machine::data_read`] reads.
    pub fn session(&self) -> SessionId {
        self.session
    }
}

/// A device that is stopped for its replacement.
#[derive(Debug)]
pub struct Frozen {
    client: ClientId,
    /// The session of its state.
    pub session: SessionId,
    /// Its data about its clients.
    pub kept: Kept,
}

impl Machine {
    /// Takes a running device to PRE_COPY, so that its state can be read while clients use it. To clients it
    /// appears in RUNNING; a client that changes its state or resets it ends the copy first. `None` for a device that
    /// does not run, lacks PRE_COPY or refuses it: its state is read once it has stopped.
    ///
    /// Fails as [`Machine::freeze`] does.
    pub fn begin_copy(&self) -> Result<Option<Copying>, Errno> {
        let flags = self.flags.ok_or(Errno::ENOTTY)?;
        let client = self.new_client();
        let until = arc_deadline(client);
        self.lock().replaceable()?;
        // Held until the copy has begun, so that a client that ends it comes before or after.
        let Ok(_alone) = self.alone(until) else {
            tracing::info!("a call on the device is slow: its state is read once it has stopped");
            return Ok(None);
        };
        {
            let mut inner = self.lock();
            let kept = inner.replaceable()?;
            let runs = !kept.stopped && kept.stays.is_none();
            if !runs || !flags.contains(MigrationFlags::PRE_COPY) {
                return Ok(None);
            }
            inner.copier = Some(client);
        }
        match self.set_state_alone(client, State::PreCopy, until) {
            Ok(session) => Ok(session.map(|session| Copying { client, session })),
            Err(errno) => {
                self.let_go(client);
                match self.state() {
                    State::Running => {
                        tracing::info!(%errno, "the device refuses PRE_COPY: its state is read once it has stopped");
                        Ok(None)
                    }
                    _ => Err(errno),
                }
            }
        }
    }

    /// The number of bytes that the model expects to return in this copy before it has to stop. ENODEV if the copy
    /// has ended.
    pub fn copy_left(&self, copying: &Copying) -> Result<u64, Errno> {
        let info = self.precopy_info(copying.session)?;
        Ok(info.initial_bytes.saturating_add(info.dirty_bytes))
    }

    /// Returns the device to its state before [`Machine::begin_copy`]. Does nothing if the copy has ended.
    pub fn end_copy(&self, copying: Copying) {
        let until = arc_deadline(copying.client);
        let ended = self.alone(until).and_then(|_alone| {
            let is_it = self.lock().copier == Some(copying.client);
            if is_it { self.stop_copying(until) } else { Ok(()) }
        });
        if let Err(errno) = ended {
            tracing::error!(%errno, "the device stays in PRE_COPY after a failed replacement");
        }
    }

    /// Returns a device that is being copied to RUNNING. With the gate taken exclusively.
    pub(super) fn stop_copying(&self, until: Instant) -> Result<(), Errno> {
        let (state, flags) = (self.lock().state, self.flags.ok_or(Errno::ENOTTY)?);
        if state.is_pre_copy() {
            let path = fsm::path(flags, state, State::Running).map_err(|_| Errno::EINVAL)?;
            path.arcs().try_for_each(|arc| self.step(arc, until))?;
        }
        let mut inner = self.lock();
        inner.copier = None;
        if inner.state == State::Running {
            inner.driver = None;
        }
        drop(inner);
        self.settle_held();
        Ok(())
    }

    /// Takes the device to STOP_COPY, by arcs, so that its state can be read with [`Machine::data_read`]. If it is
    /// still being copied, the copy's session continues; otherwise a new one begins.
    ///
    /// ENOTTY for a device without migration; EBUSY if a client is moving it or has a session, or a client other than
    /// the VMM has its dirty log; ETIMEDOUT if other calls do not return; otherwise the model's errno. After an error
    /// the device is as it was before; if it is still being copied, [`Machine::end_copy`] ends that.
    pub fn freeze(&self, copying: Option<Copying>, until: Instant) -> Result<Frozen, Errno> {
        self.flags.ok_or(Errno::ENOTTY)?;
        let new = self.new_client();
        // First, so that a concurrent request of a client comes before all of this or after it.
        let _alone = self.alone(until)?;
        let (client, kept) = {
            let inner = self.lock();
            match copying.filter(|copying| inner.is_copied_by(copying)) {
                Some(copying) => {
                    inner.may_give_log()?;
                    (copying.client, inner.kept(false))
                }
                None => (new, inner.replaceable()?),
            }
        };
        // Its number is known once it is open.
        let mut frozen = Frozen { client, session: SessionId(0), kept };
        match self.set_state_alone(client, State::StopCopy, until) {
            Ok(session) => {
                frozen.session = session.or_else(|| self.session()).ok_or(Errno::EIO)?;
                Ok(frozen)
            }
            Err(errno) => {
                self.thaw_alone(&frozen, arc_deadline(client));
                Err(errno)
            }
        }
    }

    /// Returns the device to its state before [`Machine::freeze`] and [`Machine::begin_copy`].
    pub fn thaw(&self, frozen: Frozen) {
        let until = arc_deadline(frozen.client);
        match self.alone(until) {
            Ok(_alone) => self.thaw_alone(&frozen, until),
            Err(errno) => {
                tracing::error!(%errno, "the device stays stopped after a failed replacement");
                self.let_go(frozen.client);
            }
        }
    }

    /// The same with the gate taken exclusively.
    fn thaw_alone(&self, frozen: &Frozen, until: Instant) {
        let to = if frozen.kept.stopped { State::Stop } else { State::Running };
        if let Err(errno) = self.set_state_alone(frozen.client, to, until) {
            tracing::error!(%errno, "the device does not run again after a failed replacement");
        }
        self.let_go(frozen.client);
    }

    /// Takes a new device to RESUMING, to load the state of the one that it replaces.
    pub fn begin_replacing(&self) -> Result<ClientId, Errno> {
        let client = self.new_client();
        self.set_state(client, State::Resuming)?;
        Ok(client)
    }

    /// Takes a new device without a predecessor to STOP, where it waits for [`Machine::replace`] together with the
    /// others.
    pub fn begin_new(&self) -> Result<ClientId, Errno> {
        let client = self.new_client();
        self.set_state(client, State::Stop)?;
        Ok(client)
    }

    /// The number of bytes of state that the model expects to return when it is stopped; 0 if unknown.
    pub fn expected_state_bytes(&self) -> u64 {
        self.migrate(|migration| Ok(migration.data_size())).unwrap_or(0)
    }

    /// Makes the loaded state the device's. The device stays in STOP.
    pub fn loaded(&self, client: ClientId) -> Result<(), Errno> {
        self.set_state(client, State::Stop).map(drop)
    }

    /// Whether the model can continue with the files of another process
    /// ([`Model::adopts_region_files`](crate::Model::adopts_region_files)).
    pub fn adopts_region_files(&self) -> bool {
        self.access(|model| Ok(model.adopts_region_files())).unwrap_or(false)
    }

    /// Gives a region this file, which a client may have mapped. EINVAL for a region that cannot be mapped;
    /// otherwise the model's errno.
    pub fn adopt_region_file(&self, region: u32, file: Arc<OwnedFd>) -> Result<(), Errno> {
        self.region_file(region).ok_or(Errno::EINVAL)?;
        let _alone = self.alone(arc_deadline(ClientId::VMM))?;
        self.call(|model| model.adopt_region_file(region, file))
    }

    /// Whether the model can continue with the eventfds of another process
    /// ([`Model::adopts_ioeventfds`](crate::Model::adopts_ioeventfds)).
    pub fn adopts_ioeventfds(&self) -> bool {
        self.access(|model| Ok(model.adopts_ioeventfds())).unwrap_or(false)
    }

    /// Gives a region these eventfds, which a client may have. EINVAL unless there is one for each of
    /// [`Machine::ioeventfds`]; otherwise the model's errno.
    pub fn adopt_ioeventfds(&self, region: u32, fds: Vec<Arc<OwnedFd>>) -> Result<(), Errno> {
        if fds.is_empty() || fds.len() != self.ioeventfds(region).len() {
            return Err(Errno::EINVAL);
        }
        let _alone = self.alone(arc_deadline(ClientId::VMM))?;
        self.call(|model| model.adopt_ioeventfds(region, fds.clone()))?;
        self.ioeventfds.lock().unwrap_or_else(PoisonError::into_inner).insert(region, fds);
        Ok(())
    }

    /// Lets the device take the place of its predecessor.
    pub fn replace(&self, client: ClientId, kept: Kept) -> Result<(), Errno> {
        let run = if kept.stopped { Ok(None) } else { self.set_state(client, State::Running) };
        self.let_go(client);
        let mut inner = self.lock();
        inner.resets = kept.resets;
        inner.precopy_reinit = kept.precopy_reinit;
        inner.stays = kept.stays;
        drop(inner);
        self.settle_held();
        run.map(drop)
    }

    /// Assigns a log that was taken over to the VMM.
    pub fn log_is_vmms(&self) {
        self.lock().logs = Some(ClientId::VMM);
    }

    fn let_go(&self, client: ClientId) {
        let mut inner = self.lock();
        if inner.driver == Some(client) {
            inner.driver = None;
        }
        if inner.copier == Some(client) {
            inner.copier = None;
        }
        drop(inner);
        self.settle_held();
    }
}

impl Inner {
    /// The data about the clients of a device that can be replaced now; EBUSY otherwise.
    fn replaceable(&self) -> Result<Kept, Errno> {
        let is_moved = self.driver.is_some() && self.stays.is_none();
        if is_moved || self.session.is_some() {
            return Err(Errno::EBUSY);
        }
        self.may_give_log()?;
        match self.state {
            State::Running => Ok(self.kept(false)),
            State::Stop => Ok(self.kept(true)),
            _ => Err(Errno::EBUSY),
        }
    }

    /// EBUSY when a client other than the VMM has the dirty log.
    fn may_give_log(&self) -> Result<(), Errno> {
        match self.logs {
            Some(logs) if logs != ClientId::VMM => Err(Errno::EBUSY),
            _ => Ok(()),
        }
    }

    fn kept(&self, stopped: bool) -> Kept {
        let (resets, precopy_reinit, stays) = (self.resets, self.precopy_reinit, self.stays);
        Kept { stopped, resets, precopy_reinit, stays }
    }

    /// Whether the copy is still in progress.
    fn is_copied_by(&self, copying: &Copying) -> bool {
        let session = self.session.as_ref().is_some_and(|open| open.id == copying.session && !open.damaged);
        session && self.copier == Some(copying.client) && self.state.is_pre_copy()
    }
}
