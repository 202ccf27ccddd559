//! The next VMM (`docs/vfio-user-extensions.md: NEXT`): naming its process, admitting its client, and handing over
//! the device.

use std::sync::Arc;

use limosa_device::NextClient;
use limosa_host::Process;
use limosa_protocol::Errno;
use rustix::net::sockopt::socket_peercred;

use super::{ConnectionId, Doors, Inner, Role};
use crate::server::link::Link;

impl Doors {
    /// [`Doors::leave`] for a VMM whose resources are released, unless a next client is connected, which has to get
    /// the device first.
    pub(in crate::server) fn leave_unless_next(&self, id: ConnectionId) -> bool {
        let mut inner = self.lock();
        if inner.next.is_some() {
            return false;
        }
        inner.remove(id);
        self.changed.notify_all();
        true
    }

    /// A VMM's connection is over: `hand_over` gives the device to the next client, which then is the VMM. `false`
    /// if there is none, or it has gone.
    pub(in crate::server) fn hand_over(
        &self,
        id: ConnectionId,
        hand_over: impl FnOnce(&NextClient) -> bool,
    ) -> bool {
        // The lock is not held during the hand-over. If the next client goes meanwhile, `NextClient` decides which
        // came first.
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
            // Its queued accesses are performed.
            inner.wake(next);
            self.changed.notify_all();
        }
        is_done
    }

    /// Names the process whose client may be the next VMM. `None` withdraws the name and disconnects the next
    /// client. ENOTCONN without a VMM, EBUSY while the client of the named process is connected.
    pub(in crate::server) fn name(&self, process: Option<Process>) -> Result<(), Errno> {
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

    /// The PID of the named process, or 0, and whether its client is connected.
    pub(in crate::server) fn named(&self) -> (i32, bool) {
        let inner = self.lock();
        (inner.named.as_ref().map_or(0, Process::pid), inner.next.is_some())
    }

    /// Whether a client is the next VMM, or a process that lives may send one.
    pub(in crate::server) fn expects_next(&self) -> bool {
        let inner = self.lock();
        inner.next.is_some() || inner.named.as_ref().is_some_and(Process::is_alive)
    }
}

impl Inner {
    /// Makes a client the next one, if it belongs to the named process and to the VMM's user. One at a time.
    pub(super) fn be_next(
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
        tracing::info!(pid = peer.pid(), "the VMM's next client is connected");
        Some(next)
    }
}
