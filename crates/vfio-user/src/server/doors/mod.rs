//! The connections of a device and their roles (`docs/vfio-user-extensions.md: the control role`).
//!
//! One client is the VMM. Others that want to be the VMM wait in order of arrival, without a reply to their VERSION,
//! until it has gone. The exception is the *next* client, whose process was named by the VMM or a control client, and
//! which gets the device when the VMM goes. Control clients have separate slots, and never wait for others.

mod next;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use limosa_device::NextClient;
use limosa_host::Process;
use limosa_protocol::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;

use super::counts::{Clients, Counters};
use super::link::Link;
use super::parked::Access;
use crate::connection::ConnectionError;
use crate::version::Limits;

/// Clients that may wait for the VMM's place.
const WAITING_MAX: usize = 16;
/// Control clients at once.
pub(in crate::server) const CONTROL_MAX: usize = 8;
/// Limit on all connections, including those without a role.
pub(in crate::server) const CONNECTIONS_MAX: usize = 64;

/// What a client may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) enum Role {
    /// Everything in the specification.
    Vmm,
    /// Moves the device while its VMM is connected.
    Control,
    /// Prepares to become the VMM when the current one has gone.
    Next,
}

/// The result for a client that wants to be the VMM.
#[derive(Debug)]
pub(in crate::server) enum Place {
    /// It is the VMM.
    Vmm,
    /// It is the next one.
    Next(Arc<NextClient>),
}

impl Role {
    /// Its name in logs.
    pub(in crate::server) fn name(self) -> &'static str {
        match self {
            Role::Vmm => "vmm",
            Role::Control => "control",
            Role::Next => "next",
        }
    }
}

/// The process that connected (`unix(7): SO_PEERCRED`), as logs name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) struct Client {
    pub(in crate::server) pid: i32,
    pub(in crate::server) user: u32,
}

impl Client {
    /// At the other end of this connection. No process is 0, and no user 2^32 - 1.
    pub(in crate::server) fn of(link: &Link) -> Client {
        let peer = socket_peercred(link.socket());
        peer.map_or(Client { pid: 0, user: u32::MAX }, |peer| Client {
            pid: peer.pid.as_raw_pid(),
            user: peer.uid.as_raw(),
        })
    }
}

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::server) struct ConnectionId(pub(in crate::server) u64);

/// The connections of a device.
#[derive(Default)]
pub(in crate::server) struct Doors {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Connections are paused: [`Inner::pause`], checked before each request.
    is_paused: AtomicBool,
    pub(in crate::server) counters: Counters,
}

#[derive(Default)]
struct Inner {
    last: u64,
    connections: Vec<Entry>,
    waiting: VecDeque<ConnectionId>,
    /// The process whose client may be the next VMM.
    named: Option<Process>,
    /// That client, once it is connected.
    next: Option<(ConnectionId, Arc<NextClient>)>,
    pause: Pause,
    /// Connections that were accepted, and have not entered.
    coming: usize,
    /// All are to end.
    is_over: bool,
    /// The last that another process has served.
    last_adopted: Option<ConnectionId>,
    /// The VMM's connection from another process, until it has its role here. No other connection enters before it.
    adopts_vmm: Option<ConnectionId>,
}

struct Entry {
    id: ConnectionId,
    link: Arc<Link>,
    /// The user and PID of the connecting process, for sharing the connections fairly.
    from: (u32, i32),
    /// It was told to end, to make room for another connection.
    is_ended: bool,
    role: Option<Role>,
    /// Its state while its thread waits for a request.
    idle: State,
    /// Its state, if it has stopped between two requests.
    paused: Option<State>,
}

/// The state of a paused connection, without its link.
#[derive(Clone, Debug, Default)]
pub(in crate::server) struct State {
    /// `None` before VERSION.
    pub(in crate::server) limits: Option<Limits>,
    pub(in crate::server) by_control_door: bool,
    /// The bytes of a VERSION that waits for its reply.
    pub(in crate::server) unanswered: Vec<u8>,
    /// Accesses that wait, in order.
    pub(in crate::server) parked: Vec<Access>,
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

    /// Adds a connection without a role; one that another process has served has an id ([`Doors::expect_adopted`]).
    pub(in crate::server) fn enter(
        &self,
        link: &Arc<Link>,
        by_control_door: bool,
        adopted: Option<ConnectionId>,
    ) -> ConnectionId {
        let idle = State { by_control_door, ..State::default() };
        let mut inner = self.lock();
        // Otherwise it would find no VMM, and become the VMM.
        while inner.adopts_vmm.is_some() && inner.adopts_vmm != adopted {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        let id = adopted.unwrap_or_else(|| inner.new_id());
        self.counters.connections.fetch_add(1, Relaxed);
        let Client { pid, user } = Client::of(link);
        let from = (user, pid);
        link.set_pauses(inner.pause != Pause::Serving);
        let is_over = inner.is_over;
        inner.connections.push(Entry {
            id,
            link: Arc::clone(link),
            from,
            is_ended: false,
            role: None,
            idle,
            paused: None,
        });
        inner.coming = inner.coming.saturating_sub(1);
        self.changed.notify_all();
        drop(inner);
        if is_over {
            link.end();
        }
        id
    }

    /// Before a connection is accepted: waits while connections are paused. `false` if another process has them
    /// now.
    pub(in crate::server) fn expect(&self) -> bool {
        let mut inner = self.lock();
        while inner.pause == Pause::Paused {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.coming += 1;
        inner.pause == Pause::Serving
    }

    /// Before a connection that another process has served is served, by whatever thread: its name here. All have theirs, in their
    /// order, before the first is served.
    pub(in crate::server) fn expect_adopted(&self, is_vmms: bool) -> ConnectionId {
        let mut inner = self.lock();
        let id = inner.new_id();
        inner.coming += 1;
        inner.last_adopted = Some(id);
        if is_vmms {
            inner.adopts_vmm = Some(id);
        }
        id
    }

    /// It did not come.
    pub(in crate::server) fn expect_adopted_no_more(&self, id: ConnectionId) {
        self.leave(id);
        self.expect_no_more();
    }

    /// The VMM's connection from another process does not arrive: waiting connections enter.
    pub(in crate::server) fn expect_no_vmm(&self) {
        self.lock().adopts_vmm = None;
        self.changed.notify_all();
    }

    /// No connection arrived.
    pub(in crate::server) fn expect_no_more(&self) {
        let mut inner = self.lock();
        inner.coming = inner.coming.saturating_sub(1);
        self.changed.notify_all();
    }

    /// A connection is over, and its client's resources are released: a waiting client may take its role.
    pub(in crate::server) fn leave(&self, id: ConnectionId) {
        let mut inner = self.lock();
        inner.remove(id);
        self.changed.notify_all();
    }

    /// All connections, to be ended. An accepted connection that enters later is ended at once.
    pub(in crate::server) fn links_to_end(&self) -> Vec<Arc<Link>> {
        let mut inner = self.lock();
        inner.is_over = true;
        inner.connections.iter().map(|entry| Arc::clone(&entry.link)).collect()
    }

    /// Makes room for an expected connection, so that at most `most` are served, and returns whether there is room
    /// within the limit. While connections are paused there always is. If there is none, a connection without a role is
    /// ended: the oldest of the process with the most of these, among the processes of the user with the most. So a
    /// client that connects again and again displaces its own connections.
    pub(in crate::server) fn make_room(&self, most: usize, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut inner = self.lock();
        loop {
            let leaving = inner.connections.iter().filter(|entry| entry.is_ended).count();
            let served = inner.connections.len() + inner.coming;
            // No connection leaves while they are paused, and the pausing thread waits for this one.
            if served <= most || inner.pause != Pause::Serving {
                return true;
            }
            // Only once all accepted connections have entered: until then it is unknown which user has the most.
            if inner.coming <= 1
                && served - leaving > most
                && let Some(at) = inner.dispensable()
            {
                let entry = &mut inner.connections[at];
                entry.is_ended = true;
                tracing::warn!(pid = entry.from.1, "a silent client is disconnected, since there are {most}");
                entry.link.end();
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until no connection is left, or so long.
    pub(in crate::server) fn wait_for_none(&self, limit: Duration) {
        let is_served = |inner: &mut Inner| !inner.connections.is_empty();
        // The remaining ones are ended.
        let _ = self.changed.wait_timeout_while(self.lock(), limit, is_served);
    }

    /// The clients that are connected now, by role.
    pub(in crate::server) fn clients(&self) -> Clients {
        let inner = self.lock();
        let mut clients = Clients::default();
        for entry in &inner.connections {
            *match entry.role {
                Some(Role::Vmm) => &mut clients.vmm,
                Some(Role::Next) => &mut clients.next,
                Some(Role::Control) => &mut clients.control,
                None if inner.waiting.contains(&entry.id) => &mut clients.waiting,
                None => &mut clients.undecided,
            } += 1;
        }
        clients
    }

    /// The VMM's connection.
    pub(in crate::server) fn vmm(&self) -> Option<Arc<Link>> {
        self.lock().vmm().map(|entry| Arc::clone(&entry.link))
    }

    /// Makes it a control client. EBUSY if there are too many.
    pub(in crate::server) fn be_control(&self, id: ConnectionId) -> Result<(), Errno> {
        let mut inner = self.lock();
        let control = inner.connections.iter().filter(|entry| entry.role == Some(Role::Control)).count();
        if control >= CONTROL_MAX {
            tracing::warn!("a control client is refused, as there are {CONTROL_MAX} of them");
            return Err(Errno::EBUSY);
        }
        inner.set_role(id, Role::Control);
        Ok(())
    }

    /// Makes it the VMM as soon as there is no other, or the next client as soon as that is allowed. EBUSY if too
    /// many clients wait; the outer error if the client stops waiting.
    pub(in crate::server) fn be_vmm(
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
            inner.wait_for_place(id);
        }
        let mut has_said = false;
        loop {
            // Before the check, so that a later change is noticed.
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
            if !std::mem::replace(&mut has_said, true) {
                let Client { pid, user } = Client::of(link);
                tracing::info!(pid, user, "a client waits until the device's VMM has gone");
            }
            link.wait_for_wake(None)?;
            self.pause_here(id, state)?;
        }
    }

    /// Whether connections are served, so that [`Doors::pause_here`] has nothing to wait for.
    pub(in crate::server) fn is_open(&self) -> bool {
        !self.is_paused.load(SeqCst)
    }

    /// Records the limits that a connection has agreed on with its client.
    pub(in crate::server) fn agreed(&self, id: ConnectionId, limits: Option<Limits>) {
        if let Some(entry) = self.lock().connections.iter_mut().find(|entry| entry.id == id) {
            entry.idle.limits = limits;
        }
    }

    /// Waits here while connections are paused. An error if another process has them now.
    pub(in crate::server) fn pause_here(
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

    /// Has every connection stop between two requests.
    pub(in crate::server) fn begin_pause(&self) {
        let mut inner = self.lock();
        inner.set_pause(Pause::Paused, &self.is_paused);
        self.changed.notify_all();
        for entry in &mut inner.connections {
            entry.link.set_pauses(true);
            match entry.link.stop_if_idle() {
                // Its thread sleeps, and finds this when it wakes.
                true => entry.paused = Some(entry.idle.clone()),
                false => entry.link.wake(),
            }
        }
    }

    /// Waits until every connection has stopped, after [`Doors::begin_pause`]. ETIMEDOUT if one has not by `until`;
    /// then they continue.
    pub(in crate::server) fn await_pause(&self, until: Instant) -> Result<(), Errno> {
        let mut inner = self.lock();
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
    pub(in crate::server) fn go_on(&self) {
        let mut inner = self.lock();
        inner.set_pause(Pause::Serving, &self.is_paused);
        inner.connections.iter().for_each(|entry| entry.link.set_pauses(false));
        // Those that sleep have not seen that they were paused. The others wake.
        for entry in inner.connections.iter_mut().filter(|entry| entry.link.go_on_idle()) {
            entry.paused = None;
        }
        self.changed.notify_all();
    }

    /// Connections are another process'.
    pub(in crate::server) fn give(&self) {
        let mut inner = self.lock();
        inner.set_pause(Pause::Given, &self.is_paused);
        inner.connections.iter().for_each(|entry| entry.link.wake());
        self.changed.notify_all();
    }

    /// Whether another process serves now.
    pub(in crate::server) fn is_given(&self) -> bool {
        self.lock().pause == Pause::Given
    }

    /// The connections that there are now, but those of control clients.
    pub(in crate::server) fn to_be_given(&self) -> Vec<(ConnectionId, Arc<Link>)> {
        let inner = self.lock();
        let entries = inner.connections.iter().filter(|entry| entry.role != Some(Role::Control));
        entries.map(|entry| (entry.id, Arc::clone(&entry.link))).collect()
    }

    /// The connections that are paused, with their roles; those that wait for the VMM's place last, in their order.
    pub(in crate::server) fn paused(&self) -> Vec<(ConnectionId, Arc<Link>, Option<Role>, State)> {
        let inner = self.lock();
        let others = inner.connections.iter().filter(|entry| !inner.waiting.contains(&entry.id));
        let waiting = inner.waiting.iter();
        let waiting = waiting.filter_map(|id| inner.connections.iter().find(|entry| entry.id == *id));
        let paused =
            |entry: &Entry| Some((entry.id, Arc::clone(&entry.link), entry.role, entry.paused.clone()?));
        others.chain(waiting).filter_map(paused).collect()
    }

    /// A connection that another process has served takes its role again.
    pub(in crate::server) fn adopt(&self, id: ConnectionId, role: Role) {
        let mut inner = self.lock();
        inner.set_role(id, role);
        if inner.adopts_vmm == Some(id) {
            inner.adopts_vmm = None;
        }
        self.changed.notify_all();
    }
}

impl Inner {
    fn new_id(&mut self) -> ConnectionId {
        self.last += 1;
        ConnectionId(self.last)
    }

    /// Behind those that wait. Those that have waited in another process come back from several threads, and in their order
    /// before all others.
    fn wait_for_place(&mut self, id: ConnectionId) {
        let is_adopted = self.last_adopted.is_some_and(|last| id.0 <= last.0);
        let before = self.waiting.iter().filter(|waiting| !is_adopted || waiting.0 < id.0).count();
        self.waiting.insert(before, id);
    }

    fn entry(&self, id: ConnectionId) -> Option<&Entry> {
        self.connections.iter().find(|entry| entry.id == id)
    }

    fn vmm(&self) -> Option<&Entry> {
        self.connections.iter().find(|entry| entry.role == Some(Role::Vmm))
    }

    /// The connection to end to make room for another.
    fn dispensable(&self) -> Option<usize> {
        let has_said_nothing =
            |entry: &&Entry| entry.role.is_none() && !entry.is_ended && !self.waiting.contains(&entry.id);
        let silent: Vec<_> = self.connections.iter().filter(has_said_nothing).collect();
        let of_user = |entry: &Entry| silent.iter().filter(|other| other.from.0 == entry.from.0).count();
        let of_process = |entry: &Entry| silent.iter().filter(|other| other.from == entry.from).count();
        // Ids rise: the least of equals is the oldest.
        let most = silent
            .iter()
            .max_by_key(|entry| (of_user(entry), of_process(entry), std::cmp::Reverse(entry.id.0)))?;
        self.connections.iter().position(|entry| entry.id == most.id)
    }

    fn set_pause(&mut self, pause: Pause, is_paused: &AtomicBool) {
        self.pause = pause;
        is_paused.store(pause != Pause::Serving, SeqCst);
    }

    fn set_role(&mut self, id: ConnectionId, role: Role) {
        if let Some(entry) = self.connections.iter_mut().find(|entry| entry.id == id) {
            entry.role = Some(role);
        }
    }

    /// Makes the first waiting client the VMM if there is none, and returns whether it is this one.
    fn takes_place(&mut self, id: ConnectionId) -> bool {
        if self.vmm().is_some() || self.waiting.front() != Some(&id) {
            return false;
        }
        self.waiting.pop_front();
        self.set_role(id, Role::Vmm);
        // The successor named for the old VMM is not the successor of this one.
        self.named = None;
        true
    }

    fn remove(&mut self, id: ConnectionId) {
        self.connections.retain(|entry| entry.id != id);
        self.waiting.retain(|waiting| *waiting != id);
        if self.adopts_vmm == Some(id) {
            self.adopts_vmm = None;
        }
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
pub(in crate::server) fn may_control(link: &Link) -> bool {
    socket_peercred(link.socket()).is_ok_and(|peer| peer.uid.is_root() || peer.uid == geteuid())
}
