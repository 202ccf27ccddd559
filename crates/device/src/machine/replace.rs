//! A device that another process goes on with: stopped where it is, its state given away or taken back (`docs/switch-over.md`).

use std::time::Instant;

use limosa_protocol::{Errno, State};

use super::{ClientId, Machine, MoveId};

/// What a machine keeps of its clients beside model, memory and interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Whether the device stands in STOP, and does not run.
    pub stopped: bool,
    /// [`Machine::reset_count`].
    pub resets: u64,
    /// The client opted in to flags in pre-copy info.
    pub precopy_reinit: bool,
    /// [`Machine::stays`].
    pub stays: Option<MoveId>,
}

/// A device that is stopped to be replaced.
#[derive(Debug)]
pub struct Frozen {
    client: ClientId,
    /// What to keep of it.
    pub kept: Kept,
}

impl Machine {
    /// Takes the device to STOP_COPY, by arcs, so that its state can be read as [`Machine::data_read`] does.
    ///
    /// ENOTTY for a device without migration; EBUSY when a client moves it or has a session, or a client other than the VMM has
    /// its dirty log; else what the model answers. After an error the device is as it was.
    pub fn freeze(&self, until: Instant) -> Result<Frozen, Errno> {
        self.flags.ok_or(Errno::ENOTTY)?;
        let client = self.new_client();
        let kept = {
            let inner = self.lock();
            let is_moved = inner.driver.is_some() && inner.stays.is_none();
            let logs = inner.logs.is_some_and(|logs| logs != ClientId::VMM);
            if is_moved || inner.session.is_some() || logs {
                return Err(Errno::EBUSY);
            }
            let stopped = match inner.state {
                State::Running => false,
                State::Stop => true,
                _ => return Err(Errno::EBUSY),
            };
            let (resets, precopy_reinit, stays) = (inner.resets, inner.precopy_reinit, inner.stays);
            Kept { stopped, resets, precopy_reinit, stays }
        };
        let frozen = Frozen { client, kept };
        if let Err(errno) = self.set_state_by(client, State::StopCopy, until) {
            self.thaw(frozen);
            return Err(errno);
        }
        Ok(frozen)
    }

    /// The device goes on here, as it was before [`Machine::freeze`].
    pub fn thaw(&self, frozen: Frozen) {
        let Frozen { client, kept } = frozen;
        let to = if kept.stopped { State::Stop } else { State::Running };
        if let Err(errno) = self.set_state(client, to) {
            tracing::error!(%errno, "the device does not run again where it was stopped to be replaced");
        }
        self.let_go(client);
    }

    /// Takes a new device to RESUMING, to load the state of the one that it replaces.
    pub fn begin_replacing(&self) -> Result<ClientId, Errno> {
        let client = self.new_client();
        self.set_state(client, State::Resuming)?;
        Ok(client)
    }

    /// How many bytes of state the model expects to give when it is stopped; 0 if it does not know.
    pub fn expected_state_bytes(&self) -> u64 {
        self.migrate(|migration| Ok(migration.data_size())).unwrap_or(0)
    }

    /// The state that was loaded becomes the device's, which stays in STOP.
    pub fn loaded(&self, client: ClientId) -> Result<(), Errno> {
        self.set_state(client, State::Stop).map(drop)
    }

    /// The device takes the place of the one that it replaces.
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

    /// A log that was taken over is the VMM's.
    pub fn log_is_vmms(&self) {
        self.lock().logs = Some(ClientId::VMM);
    }

    fn let_go(&self, client: ClientId) {
        let mut inner = self.lock();
        if inner.driver == Some(client) {
            inner.driver = None;
        }
        drop(inner);
        self.settle_held();
    }
}
