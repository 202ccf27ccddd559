//! Who is connected to a device, and in which role (`docs/vfio-user-extensions.md: the control role`).
//!
//! One client is the VMM. Others that want to be wait in the order in which they came, without a reply to their VERSION, until it
//! has gone; but for one, the *next*, whose process was named by the VMM or a control client, and which gets the device when the
//! VMM goes. Control clients come beside it: they have slots of their own, and wait for nobody.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use limosa_device::NextClient;
use limosa_host::Process;
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
    /// To prepare for being the VMM, when the one that is has gone.
    Next,
}

/// What a client got that wants to be the VMM.
#[derive(Debug)]
pub(super) enum Place {
    /// It is the VMM.
    Vmm,
    /// It is the next one.
    Next(Arc<NextClient>),
}

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConnectionId(u64);

/// The connections of a device.
#[derive(Default)]
pub(super) struct Doors {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    last: u64,
    connections: Vec<Entry>,
    waiting: VecDeque<ConnectionId>,
    /// The process whose client may be the next VMM.
    named: Option<Process>,
    /// That client, once it is there.
    next: Option<(ConnectionId, Arc<NextClient>)>,
    pause: Pause,
    /// Connections that were accepted, and have not entered.
    coming: usize,
}

struct Entry {
    id: ConnectionId,
    link: Arc<Link>,
    role: Option<Role>,
    /// Its thread has stopped between two requests: what it had.
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
    pub(super) fn enter(&self, link: &Arc<Link>) -> ConnectionId {
        let mut inner = self.lock();
        inner.last += 1;
        let id = ConnectionId(inner.last);
        inner.connections.push(Entry { id, link: Arc::clone(link), role: None, paused: None });
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
        inner.remove(id);
        self.changed.notify_all();
    }

    /// The same for a VMM whose things are gone, unless a next client is there, which is to get the device first.
    pub(super) fn leave_unless_next(&self, id: ConnectionId) -> bool {
        let mut inner = self.lock();
        if inner.next.is_some() {
            return false;
        }
        inner.remove(id);
        self.changed.notify_all();
        true
    }

    /// A VMM's connection is over: `hand_over` gives the device to the next client, which is the VMM then. `false` when there is
    /// none, or it has gone.
    pub(super) fn hand_over(&self, id: ConnectionId, hand_over: impl FnOnce(&NextClient) -> bool) -> bool {
        // The lock is not held while the device changes hands. What the next client has prepared says who was faster when it
        // goes meanwhile.
        let (next, client) = {
            let mut inner = self.lock();
            let Some(next) = inner.next.take() else { return false };
            inner.named = None;
            next
        };
        let is_done = hand_over(&client);
        if is_done {
            let mut inner = self.lock();
            inner.set_role(next, Role::Vmm);
            inner.remove(id);
            // Its accesses that wait are made.
            inner.wake(next);
            self.changed.notify_all();
        }
        is_done
    }

    /// Names the process whose client may be the next VMM, or nobody; then the client that is there has its connection ended.
    /// ENOTCONN without a VMM, EBUSY while the client of a process that was named is there.
    pub(super) fn name(&self, process: Option<Process>) -> Result<(), Errno> {
        let mut inner = self.lock();
        if process.is_none() {
            inner.named = None;
            if let Some(entry) = inner.next.as_ref().and_then(|(id, _)| inner.entry(*id)) {
                entry.link.end();
            }
            return Ok(());
        }
        if inner.vmm().is_none() {
            return Err(Errno::ENOTCONN);
        }
        if inner.next.is_some() {
            return Err(Errno::EBUSY);
        }
        inner.named = process;
        // It may wait already.
        inner.waiting.iter().for_each(|id| inner.wake(*id));
        Ok(())
    }

    /// The number of the process that is named, or 0, and whether its client is there.
    pub(super) fn named(&self) -> (i32, bool) {
        let inner = self.lock();
        (inner.named.as_ref().map_or(0, Process::pid), inner.next.is_some())
    }

    /// Whether a client is the next VMM, or a process that lives may send one.
    pub(super) fn expects_next(&self) -> bool {
        let inner = self.lock();
        inner.next.is_some() || inner.named.as_ref().is_some_and(Process::is_alive)
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
        self.lock().vmm().map(|entry| Arc::clone(&entry.link))
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

    /// Makes it the VMM as soon as there is no other, or the next one as soon as it may be that. EBUSY when too many wait for
    /// that; the outer error when the client does not wait any more.
    pub(super) fn be_vmm(
        &self,
        id: ConnectionId,
        link: &Link,
        state: &dyn Fn() -> State,
        prepare: &dyn Fn() -> NextClient,
    ) -> Result<Result<Place, Errno>, ConnectionError> {
        {
            let mut inner = self.lock();
            if let Some(next) = inner.be_next(id, link, prepare) {
                return Ok(Ok(Place::Next(next)));
            }
            if inner.waiting.len() >= WAITING_MAX {
                tracing::warn!("a client is refused, as {WAITING_MAX} wait for the device already");
                return Ok(Err(Errno::EBUSY));
            }
            inner.waiting.push_back(id);
        }
        loop {
            // Before the look, so that what changes after it is seen.
            link.was_woken();
            {
                let mut inner = self.lock();
                if inner.takes_place(id) {
                    return Ok(Ok(Place::Vmm));
                }
                if let Some(next) = inner.be_next(id, link, prepare) {
                    return Ok(Ok(Place::Next(next)));
                }
            }
            link.wait_for_wake(None)?;
            self.pause_here(id, state)?;
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
        inner.pause = Pause::Paused;
        inner.connections.iter().for_each(|entry| entry.link.wake());
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
        self.lock().pause = Pause::Serving;
        self.changed.notify_all();
    }

    /// Connections are another process'.
    pub(super) fn give(&self) {
        self.lock().pause = Pause::Given;
        self.changed.notify_all();
    }

    /// Whether another process serves now.
    pub(super) fn is_given(&self) -> bool {
        self.lock().pause == Pause::Given
    }

    /// The connections that are paused, with their roles; those that wait for the VMM's place last, in their order.
    pub(super) fn paused(&self) -> Vec<(Arc<Link>, Option<Role>, State)> {
        let inner = self.lock();
        let others = inner.connections.iter().filter(|entry| !inner.waiting.contains(&entry.id));
        let waiting = inner.waiting.iter();
        let waiting = waiting.filter_map(|id| inner.connections.iter().find(|entry| entry.id == *id));
        let paused = |entry: &Entry| Some((Arc::clone(&entry.link), entry.role, entry.paused.clone()?));
        others.chain(waiting).filter_map(paused).collect()
    }

    /// A connection that another process has served takes its role again.
    pub(super) fn adopt(&self, id: ConnectionId, role: Role) {
        self.lock().set_role(id, role);
    }
}

impl Inner {
    fn entry(&self, id: ConnectionId) -> Option<&Entry> {
        self.connections.iter().find(|entry| entry.id == id)
    }

    fn vmm(&self) -> Option<&Entry> {
        self.connections.iter().find(|entry| entry.role == Some(Role::Vmm))
    }

    fn set_role(&mut self, id: ConnectionId, role: Role) {
        if let Some(entry) = self.connections.iter_mut().find(|entry| entry.id == id) {
            entry.role = Some(role);
        }
    }

    /// Makes the first that waits the VMM if there is none, and says whether that is this one.
    fn takes_place(&mut self, id: ConnectionId) -> bool {
        if self.vmm().is_some() || self.waiting.front() != Some(&id) {
            return false;
        }
        self.waiting.pop_front();
        self.set_role(id, Role::Vmm);
        // Who was to come after the one that has gone is not who comes after this one.
        self.named = None;
        true
    }

    /// Makes a client the next one: of the process that was named, and of the VMM's user. One at a time.
    fn be_next(
        &mut self,
        id: ConnectionId,
        link: &Link,
        prepare: &dyn Fn() -> NextClient,
    ) -> Option<Arc<NextClient>> {
        let named = self.named.as_ref().filter(|_| self.next.is_none())?;
        let user = |link: &Link| socket_peercred(link.socket()).map(|peer| peer.uid);
        let is_of_vmms_user = self.vmm().is_some_and(
            |vmm| matches!((user(&vmm.link), user(link)), (Ok(theirs), Ok(its)) if theirs == its),
        );
        let peer = Process::at_other_end(link.socket()).ok()?;
        if !peer.is(named) {
            return None;
        }
        if !is_of_vmms_user {
            tracing::warn!(
                pid = peer.pid(),
                "the named process is not of the VMM's user: its client waits as any other"
            );
            return None;
        }
        let next = Arc::new(prepare());
        self.waiting.retain(|waiting| *waiting != id);
        self.set_role(id, Role::Next);
        self.next = Some((id, Arc::clone(&next)));
        tracing::info!(pid = peer.pid(), "the VMM's next client is there");
        Some(next)
    }

    fn remove(&mut self, id: ConnectionId) {
        self.connections.retain(|entry| entry.id != id);
        self.waiting.retain(|waiting| *waiting != id);
        if self.next.as_ref().is_some_and(|(next, _)| *next == id) {
            self.next = None;
        }
        if let Some(first) = self.waiting.front() {
            self.wake(*first);
        }
    }

    fn wake(&self, id: ConnectionId) {
        if let Some(entry) = self.entry(id) {
            entry.link.wake();
        }
    }
}

/// Whether a client on the VMM's socket may be a control client: root, or the server's own user.
pub(super) fn may_control(link: &Link) -> bool {
    socket_peercred(link.socket()).is_ok_and(|peer| peer.uid.is_root() || peer.uid == geteuid())
}
