//! The clients of a device: its VMM, and control clients that move it
//! (`docs/vfio-user-extensions.md: the control role`).
//!
//! One client drives the device at a time: the client that has taken it out of RUNNING, until it is back in RUNNING.
//! SET of MIG_DEVICE_STATE by other clients is refused with EBUSY. Only the VMM may reset a device that another client
//! drives, as with the kernel. The same holds for the dirty log and the client that has started it.
//!
//! While a client other than the VMM drives the device and it does not run, the VMM's accesses to regions have to wait
//! ([`Held`]): the guest is not aware of the move, and a refused write would be lost.
//!
//! A device that was told to stay ([`Machine::stay`]) has been moved away: whatever its clients do, it does not run
//! here again until the move is decided ([`Machine::release`]).

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use limosa_guest_memory::ReadGuard;
use limosa_protocol::{Errno, State, fsm};

use super::gate::Alone;
use super::{Inner, Machine, SessionId};

/// Names a client of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientId(u64);

impl ClientId {
    /// The VMM, and every client in the same process.
    pub const VMM: ClientId = ClientId(0);
}

/// An access of the VMM has to wait: the device does not run, since another client moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held;

/// Names the move for which a device stays stopped.
pub type MoveId = [u8; 16];

/// Called when accesses no longer have to wait, or have a time limit again.
pub type Released = dyn Fn() + Send + Sync;

/// How long an arc of the VMM waits for other calls, and the model's stop for requests in flight.
const ARC_LIMIT: Duration = Duration::from_secs(10);
/// The same for an arc of another client: the VMM's accesses wait meanwhile, and QEMU gives up after 5 s.
const CONTROL_ARC_LIMIT: Duration = Duration::from_secs(3);

/// How long a call that leaves the model waits for others to leave, before they have to handle a device whose
/// client has gone.
const LEFT_LIMIT: Duration = Duration::from_millis(10);

pub(super) fn arc_deadline(client: ClientId) -> Instant {
    Instant::now() + if client == ClientId::VMM { ARC_LIMIT } else { CONTROL_ARC_LIMIT }
}

impl Machine {
    /// A new client in addition to the VMM.
    pub fn new_client(&self) -> ClientId {
        let mut inner = self.lock();
        inner.clients += 1;
        ClientId(inner.clients)
    }

    /// Whether this client drives the device, because it took the device out of RUNNING.
    pub fn is_driven_by(&self, client: ClientId) -> bool {
        self.lock().driver == Some(client)
    }

    /// The open session, for a client that may transfer its data: the client that drives the device, or any client
    /// once the one that opened the session has gone.
    pub fn session_for(&self, client: ClientId) -> Option<SessionId> {
        let inner = self.lock();
        let may = inner.driver.is_none_or(|driver| driver == client);
        inner.session.as_ref().filter(|_| may).map(|open| open.id)
    }

    /// Whether accesses of the VMM have to wait now.
    pub fn holds_accesses(&self) -> bool {
        self.held.load(Acquire)
    }

    /// Registers a function that is called, from any thread, each time that accesses no longer have to wait, and by
    /// [`Machine::release`]. A dropped function is removed.
    pub fn on_release(&self, released: &Arc<Released>) {
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(Arc::downgrade(released));
    }

    /// The device stays stopped: until [`Machine::release`] with this id no client, no client's end and no reset makes
    /// it run. EBUSY unless `client` drives the device, EINVAL in a state other than STOP and STOP_COPY, EEXIST if it
    /// stays for another move.
    pub fn stay(&self, client: ClientId, id: MoveId) -> Result<(), Errno> {
        let _alone = self.alone(arc_deadline(client))?;
        let mut inner = self.lock();
        match inner.stays {
            Some(stays) if stays == id => return Ok(()),
            Some(_) => return Err(Errno::EEXIST),
            None => {}
        }
        if inner.driver != Some(client) {
            return Err(Errno::EBUSY);
        }
        if !matches!(inner.state, State::Stop | State::StopCopy) {
            return Err(Errno::EINVAL);
        }
        inner.stays = Some(id);
        tracing::info!("the device stays stopped until its move is decided");
        Ok(())
    }

    /// The move is decided: the device may run here again. Its state does not change, and `client` drives it.
    /// ENOENT unless it stays for this move.
    pub fn release(&self, client: ClientId, id: MoveId) -> Result<(), Errno> {
        let mut inner = self.lock();
        if inner.stays != Some(id) {
            return Err(Errno::ENOENT);
        }
        inner.stays = None;
        inner.driver = (inner.state != State::Running).then_some(client);
        drop(inner);
        self.settle_held();
        // Waiting accesses have a time limit again.
        self.tell_watchers();
        Ok(())
    }

    /// The move for which the device stays stopped.
    pub fn stays(&self) -> Option<MoveId> {
        self.lock().stays
    }

    /// The VMM's accesses have waited too long: takes the device from the client that drives it, and sets it
    /// running. Does nothing if the VMM drives the device, or if it stays.
    pub fn take_back(&self) -> Result<(), Errno> {
        let _alone = self.alone(arc_deadline(ClientId::VMM))?;
        if self.lock().driver.is_none_or(|driver| driver == ClientId::VMM) {
            return Ok(());
        }
        tracing::warn!(
            "the device runs again, since its VMM's accesses have waited too long: the move is over"
        );
        self.run_again()
    }

    /// A client has gone.
    ///
    /// The VMM's mappings and wiring end. State and session stay as the VMM left them, for when it comes back; but a
    /// state that it was loading is incomplete: that session is damaged, and needs a reset. If a control client drove
    /// the device, it runs again, unless it was told to stay.
    pub fn client_gone(&self, client: ClientId) {
        self.let_client_go(client);
        if client == ClientId::VMM {
            self.mappings.clear();
            self.wiring.disable_all();
            self.tell_client_gone();
        }
    }

    /// Ends a client's log, its session and its control of the device.
    pub(super) fn let_client_go(&self, client: ClientId) {
        let logs = std::mem::take(&mut self.lock().logs);
        match logs {
            Some(logs) if logs != client => self.lock().logs = Some(logs),
            _ => _ = self.mappings.logging_stop(),
        }
        // An arc that does not end would block the next client as well.
        let alone = self.alone(arc_deadline(client));
        let mut inner = self.lock();
        if inner.driver != Some(client) {
            return;
        }
        inner.precopy_reinit = false;
        if inner.state == State::Resuming {
            inner.damage("lost the client that loaded it");
        }
        if client == ClientId::VMM || inner.stays.is_some() {
            // The client that settles the move may drive a staying device to STOP.
            inner.driver = None;
            return;
        }
        if alone.is_ok() {
            drop(inner);
            return self.run_again_or_say();
        }
        inner.left = Some(client);
        drop(inner);
        tracing::warn!(
            "the client that moved the device has gone; the device runs again when a slow call returns"
        );
        // That call may have returned before it could see this.
        self.is_left.store(true, SeqCst);
        self.leave_no_device_left();
    }

    /// Sets a device running whose client has gone, if no other call is in the model; otherwise the last call to
    /// leave does so.
    fn leave_no_device_left(&self) {
        if !self.is_left.load(Relaxed) {
            return;
        }
        let Ok(_alone) = self.gate.alone(Instant::now() + LEFT_LIMIT) else { return };
        self.is_left.store(false, Relaxed);
        let mut inner = self.lock();
        let left = inner.left.take();
        // It may have been reset since.
        if left.is_none() || inner.driver != left || inner.stays.is_some() {
            return;
        }
        drop(inner);
        self.run_again_or_say();
    }

    fn run_again_or_say(&self) {
        if let Err(errno) = self.run_again() {
            tracing::error!(%errno, "the device does not run again after the client that moved it has gone");
        }
    }

    /// For a call that may run concurrently with others of its kind.
    pub(super) fn pass(&self) -> Inside<'_, ReadGuard<'_, ()>> {
        Inside { machine: self, guard: Some(self.gate.pass()) }
    }

    /// For a call that needs exclusive access: ETIMEDOUT if the others have not returned by `until`.
    pub(super) fn alone(&self, until: Instant) -> Result<Inside<'_, Alone<'_>>, Errno> {
        Ok(Inside { machine: self, guard: Some(self.gate.alone(until)?) })
    }

    /// Tells the model that the VMM has gone, once its mappings and wiring are removed or replaced.
    pub(super) fn tell_client_gone(&self) {
        (0..self.description.irqs.len() as u32).for_each(|index| self.rewired(index));
        let _passing = self.pass();
        self.lock().owes_client_gone = true;
        // A model that panicked is told after its reset.
        let _ = self.tell_owed();
    }

    /// Tells the model about departed clients that it has not been told about. With the gate passed or taken.
    pub(super) fn tell_owed(&self) -> Result<(), Errno> {
        if !self.lock().owes_client_gone {
            return Ok(());
        }
        self.call(|model| {
            model.client_gone();
            Ok(())
        })?;
        self.lock().owes_client_gone = false;
        Ok(())
    }

    /// Whether this client may drive the device to a state.
    pub(super) fn may_drive(&self, client: ClientId, to: State) -> Result<(), Errno> {
        let inner = self.lock();
        if inner.stays.is_some() && (to.is_running() || to == State::Resuming) {
            return Err(Errno::EBUSY);
        }
        match inner.driver {
            Some(driver) if driver != client => Err(Errno::EBUSY),
            _ => Ok(()),
        }
    }

    /// Returns a device that no client drives any more to RUNNING: by arcs, or by a reset if it was being loaded.
    fn run_again(&self) -> Result<(), Errno> {
        if self.lock().stays.is_some() {
            return Ok(());
        }
        let state = self.lock().state;
        let back = match (state, self.flags) {
            (State::Resuming | State::Error, _) | (_, None) => self.reset_alone(),
            (_, Some(flags)) => {
                let path = fsm::path(flags, state, State::Running).map_err(|_| Errno::EINVAL)?;
                path.arcs().try_for_each(|arc| self.step(arc, arc_deadline(ClientId::VMM)))
            }
        };
        self.lock().driver = None;
        self.settle_held();
        back
    }

    /// Called after the driver or the state may have changed, with the gate taken exclusively.
    pub(super) fn settle(&self, client: ClientId) {
        let mut inner = self.lock();
        inner.driver = match (inner.state, inner.driver) {
            (State::Running, _) => None,
            (_, Some(driver)) => Some(driver),
            (_, None) => Some(client),
        };
        drop(inner);
        self.settle_held();
    }

    pub(super) fn settle_held(&self) {
        let holds = self.lock().holds_accesses();
        if self.held.swap(holds, Release) && !holds {
            self.tell_watchers();
        }
    }

    fn tell_watchers(&self) {
        let watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        watchers.iter().filter_map(Weak::upgrade).for_each(|released| released());
    }
}

/// A call that has passed the gate, or is alone behind it.
pub(super) struct Inside<'a, G> {
    machine: &'a Machine,
    guard: Option<G>,
}

impl<G> Drop for Inside<'_, G> {
    #[inline]
    fn drop(&mut self) {
        drop(self.guard.take());
        if self.machine.is_left.load(Relaxed) {
            self.machine.leave_no_device_left();
        }
    }
}

impl Inner {
    fn holds_accesses(&self) -> bool {
        let another = self.driver.is_some_and(|driver| driver != ClientId::VMM);
        (another || self.stays.is_some()) && !self.state.is_running()
    }
}
