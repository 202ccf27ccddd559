//! Who is connected to a device, and in which role (`docs/vfio-user-extensions.md: the control role`).
//!
//! One client is the VMM. Others that want to be wait in the order in which they came, without a reply to their VERSION, until it
//! has gone. Control clients come beside it: they have slots of their own, and wait for nobody.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use limosa_protocol::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;

use super::link::Link;
use super::parked::Access;
use crate::connection::ConnectionError;
use crate::version::Limits;

/// Clients that may wait for the VMM's place.
const WAITING_MAX: usize = 16;
/// Control clients at once.
pub(super) const CONTROL_MAX: usize = 8;
/// Connections in all, those that have not said what they want included.
pub(super) const CONNECTIONS_MAX: usize = 64;

/// What a client may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// All that the specification has.
    Vmm,
    /// To move the device beside its VMM.
    Control,
}

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ConnectionId(pub(super) u64);

/// The connections of a device.
#[derive(Default)]
pub(super) struct Doors {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Connections are not served: [`Inner::pause`], for those that look before each request.
    is_paused: AtomicBool,
}

#[derive(Default)]
struct Inner {
    last: u64,
    connections: Vec<Entry>,
    waiting: VecDeque<ConnectionId>,
    pause: Pause,
    /// Connections that were accepted, and have not entered.
    coming: usize,
}

struct Entry {
    id: ConnectionId,
    link: Arc<Link>,
    role: Option<Role>,
    /// What it has when its thread waits for a request.
    idle: State,
    /// It has stopped between two requests: what it had.
    paused: Option<State>,
}

/// A connection that is paused, beside its link.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    /// `None` before VERSION.
    pub(super) limits: Option<Limits>,
    pub(super) by_control_door: bool,
    /// A VERSION that waits for its reply, as it came.
    pub(super) unanswered: Vec<u8>,
    /// Accesses that wait, in order.
    pub(super) parked: Vec<Access>,
}

/// Whether connections are served.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Pause {
    #[default]
    Serving,
    /// Each stops before its next request, and reads nothing more.
    Paused,
    /// Another process serves them.
    Given,
}

impl Doors {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing under this lock panics half-way through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection without a role yet.
    pub(super) fn enter(&self, link: &Arc<Link>, by_control_door: bool) -> ConnectionId {
        let idle = State { by_control_door, ..State::default() };
        let mut inner = self.lock();
        inner.last += 1;
        let id = ConnectionId(inner.last);
        inner.connections.push(Entry { id, link: Arc::clone(link), role: None, idle, paused: None });
        inner.coming = inner.coming.saturating_sub(1);
        self.changed.notify_all();
        id
    }

    /// Before a connection is accepted: waits while connections are paused. `false` when they are another process' now.
    pub(super) fn expect(&self) -> bool {
        let mut inner = self.lock();
        while inner.pause == Pause::Paused {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.coming += 1;
        inner.pause == Pause::Serving
    }

    /// None came.
    pub(super) fn expect_no_more(&self) {
        let mut inner = self.lock();
        inner.coming = inner.coming.saturating_sub(1);
        self.changed.notify_all();
    }

    /// A connection is over, and its client's things are gone: whoever waits for its place may have it.
    pub(super) fn leave(&self, id: ConnectionId) {
        let mut inner = self.lock();
        inner.connections.retain(|entry| entry.id != id);
        inner.waiting.retain(|waiting| *waiting != id);
        inner.wake_waiting();
        self.changed.notify_all();
    }

    /// All connections, to be ended.
    pub(super) fn links(&self) -> Vec<Arc<Link>> {
        self.lock().connections.iter().map(|entry| Arc::clone(&entry.link)).collect()
    }

    /// Waits until fewer connections than `most` are served, and says whether that came within the limit.
    pub(super) fn wait_for_room(&self, most: usize, limit: Duration) -> bool {
        let is_full = |inner: &mut Inner| inner.connections.len() + inner.coming >= most;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, is_full);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Waits until no connection is left, or so long.
    pub(super) fn wait_for_none(&self, limit: Duration) {
        let is_served = |inner: &mut Inner| !inner.connections.is_empty();
        // What is left then is ended.
        let _ = self.changed.wait_timeout_while(self.lock(), limit, is_served);
    }

    /// The VMM's connection.
    pub(super) fn vmm(&self) -> Option<Arc<Link>> {
        let inner = self.lock();
        inner
            .connections
            .iter()
            .find(|entry| entry.role == Some(Role::Vmm))
            .map(|entry| Arc::clone(&entry.link))
    }

    /// Makes it a control client. EBUSY when there are too many.
    pub(super) fn be_control(&self, id: ConnectionId) -> Result<(), Errno> {
        let mut inner = self.lock();
        let control = inner.connections.iter().filter(|entry| entry.role == Some(Role::Control)).count();
        if control >= CONTROL_MAX {
            tracing::warn!("a control client is refused, as there are {CONTROL_MAX} of them");
            return Err(Errno::EBUSY);
        }
        inner.set_role(id, Role::Control);
        Ok(())
    }

    /// Makes it the VMM as soon as there is no other. EBUSY when too many wait for that; the outer error when the client does
    /// not wait any more.
    pub(super) fn be_vmm(
        &self,
        id: ConnectionId,
        link: &Link,
        state: &dyn Fn() -> State,
    ) -> Result<Result<(), Errno>, ConnectionError> {
        {
            let mut inner = self.lock();
            if inner.waiting.len() >= WAITING_MAX {
                tracing::warn!("a client is refused, as {WAITING_MAX} wait for the device already");
                return Ok(Err(Errno::EBUSY));
            }
            inner.waiting.push_back(id);
        }
        loop {
            // Before the look, so that what changes after it is seen.
            link.was_woken();
            if self.lock().takes_place(id) {
                return Ok(Ok(()));
            }
            link.wait_for_wake(None)?;
            self.pause_here(id, state)?;
        }
    }

    /// Whether connections are served, so that [`Doors::pause_here`] has nothing to wait for.
    pub(super) fn is_open(&self) -> bool {
        !self.is_paused.load(SeqCst)
    }

    /// What a connection has agreed on with its client.
    pub(super) fn agreed(&self, id: ConnectionId, limits: Option<Limits>) {
        if let Some(entry) = self.lock().connections.iter_mut().find(|entry| entry.id == id) {
            entry.idle.limits = limits;
        }
    }

    /// Stops here while connections are paused. An error when they are another process' now.
    pub(super) fn pause_here(
        &self,
        id: ConnectionId,
        state: &dyn Fn() -> State,
    ) -> Result<(), ConnectionError> {
        let mut inner = self.lock();
        loop {
            let pause = inner.pause;
            if let Some(entry) = inner.connections.iter_mut().find(|entry| entry.id == id)
                && entry.paused.is_some() != (pause != Pause::Serving)
            {
                entry.paused = (pause != Pause::Serving).then(state);
                self.changed.notify_all();
            }
            if let Some(entry) = inner.connections.iter().find(|entry| entry.id == id) {
                // Nothing is read before this returns.
                entry.link.set_busy();
            }
            match pause {
                Pause::Serving => return Ok(()),
                Pause::Paused => inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
                Pause::Given => return Err(ConnectionError::Given),
            }
        }
    }

    /// Has every connection stop between two requests. ETIMEDOUT when one has not by `until`; then they go on.
    pub(super) fn pause(&self, until: Instant) -> Result<(), Errno> {
        let mut inner = self.lock();
        inner.set_pause(Pause::Paused, &self.is_paused);
        for entry in &mut inner.connections {
            match entry.link.stop_if_idle() {
                // Its thread sleeps, and finds this when it wakes.
                true => entry.paused = Some(entry.idle.clone()),
                false => entry.link.wake(),
            }
        }
        while inner.coming > 0 || inner.connections.iter().any(|entry| entry.paused.is_none()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(inner);
                self.go_on();
                return Err(Errno::ETIMEDOUT);
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Connections are served again.
    pub(super) fn go_on(&self) {
        let mut inner = self.lock();
        inner.set_pause(Pause::Serving, &self.is_paused);
        // Those that sleep have not seen that they were paused. The others wake.
        for entry in inner.connections.iter_mut().filter(|entry| entry.link.go_on_idle()) {
            entry.paused = None;
        }
        self.changed.notify_all();
    }

    /// Connections are another process'.
    pub(super) fn give(&self) {
        let mut inner = self.lock();
        inner.set_pause(Pause::Given, &self.is_paused);
        inner.connections.iter().for_each(|entry| entry.link.wake());
        self.changed.notify_all();
    }

    /// Whether another process serves now.
    pub(super) fn is_given(&self) -> bool {
        self.lock().pause == Pause::Given
    }

    /// The connections that there are now, but those of control clients.
    pub(super) fn to_be_given(&self) -> Vec<(ConnectionId, Arc<Link>)> {
        let inner = self.lock();
        let entries = inner.connections.iter().filter(|entry| entry.role != Some(Role::Control));
        entries.map(|entry| (entry.id, Arc::clone(&entry.link))).collect()
    }

    /// The connections that are paused, with their roles; those that wait for the VMM's place last, in their order.
    pub(super) fn paused(&self) -> Vec<(ConnectionId, Arc<Link>, Option<Role>, State)> {
        let inner = self.lock();
        let others = inner.connections.iter().filter(|entry| !inner.waiting.contains(&entry.id));
        let waiting = inner.waiting.iter();
        let waiting = waiting.filter_map(|id| inner.connections.iter().find(|entry| entry.id == *id));
        let paused =
            |entry: &Entry| Some((entry.id, Arc::clone(&entry.link), entry.role, entry.paused.clone()?));
        others.chain(waiting).filter_map(paused).collect()
    }

    /// A connection that another process has served takes its role again.
    pub(super) fn adopt(&self, id: ConnectionId, role: Role) {
        self.lock().set_role(id, role);
    }
}

impl Inner {
    fn set_pause(&mut self, pause: Pause, is_paused: &AtomicBool) {
        self.pause = pause;
        is_paused.store(pause != Pause::Serving, SeqCst);
    }

    fn set_role(&mut self, id: ConnectionId, role: Role) {
        if let Some(entry) = self.connections.iter_mut().find(|entry| entry.id == id) {
            entry.role = Some(role);
        }
    }

    /// Makes the first that waits the VMM if there is none, and says whether that is this one.
    fn takes_place(&mut self, id: ConnectionId) -> bool {
        let is_free = self.connections.iter().all(|entry| entry.role != Some(Role::Vmm));
        if !is_free || self.waiting.front() != Some(&id) {
            return false;
        }
        self.waiting.pop_front();
        self.set_role(id, Role::Vmm);
        true
    }

    fn wake_waiting(&self) {
        let first = self.waiting.front();
        let entry = self.connections.iter().find(|entry| Some(&entry.id) == first);
        if let Some(entry) = entry {
            entry.link.wake();
        }
    }
}

/// Whether a client on the VMM's socket may be a control client: root, or the server's own user.
pub(super) fn may_control(link: &Link) -> bool {
    socket_peercred(link.socket()).is_ok_and(|peer| peer.uid.is_root() || peer.uid == geteuid())
}
