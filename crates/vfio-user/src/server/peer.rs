//! The other end of a connection: its role and its permissions
//! (`docs/vfio-user-extensions.md: The control role, NEXT`).

use std::sync::Arc;

use limosa_device::{ClientId, Machine, Mappings, NextClient, Released, SessionId};
use limosa_protocol::info::DeviceFlags;
use limosa_protocol::{Errno, State};

use super::Options;
use super::dma::ClientMemory;
use super::doors::{Client, ConnectionId, Doors, Role};
use super::link::Link;
use super::next;
use crate::codec::Request;
use crate::connection::ConnectionError;
use crate::version::Limits;

/// The PCI configuration space (`vfio.h: VFIO_PCI_CONFIG_REGION_INDEX`).
const CONFIG_REGION: u32 = 7;

/// A connection's client.
pub(super) struct Peer<'a> {
    pub(super) machine: &'a Arc<Machine>,
    pub(super) options: &'a Options,
    pub(super) doors: &'a Doors,
    pub(super) link: Arc<Link>,
    pub(super) id: ConnectionId,
    /// It connected to the control socket.
    pub(super) by_control_door: bool,
    /// The most bytes of data that a command may ask for or carry.
    pub(super) data_bytes_max: u32,
    /// The agreed limits; `None` before VERSION.
    pub(super) limits: Option<Limits>,
    /// `None` before VERSION.
    role: Option<Role>,
    /// Its id in the machine, once it has a role.
    pub(super) client: ClientId,
    /// The session that it found when it became the VMM.
    found: Option<SessionId>,
    /// Its preparations, while it is the next client.
    next: Option<Arc<NextClient>>,
    /// Wakes this connection when accesses no longer have to wait.
    released: Option<Arc<Released>>,
}

impl<'a> Peer<'a> {
    /// A client that has not sent VERSION.
    pub(super) fn new(
        machine: &'a Arc<Machine>,
        options: &'a Options,
        doors: &'a Doors,
        link: Arc<Link>,
        by_control_door: bool,
        adopted: Option<ConnectionId>,
        data_bytes_max: u32,
    ) -> Peer<'a> {
        let id = doors.enter(&link, by_control_door, adopted);
        Peer {
            machine,
            options,
            doors,
            link,
            id,
            by_control_door,
            data_bytes_max,
            limits: None,
            role: None,
            client: ClientId::VMM,
            found: None,
            next: None,
            released: None,
        }
    }

    /// It is the VMM from now on.
    pub(super) fn be_vmm(&mut self) {
        self.role = Some(Role::Vmm);
        self.client = ClientId::VMM;
        self.next = None;
        self.hear_of_releases();
        self.found = self.machine.session();
    }

    /// It is a control client from now on.
    pub(super) fn be_control(&mut self) {
        self.role = Some(Role::Control);
        self.client = self.machine.new_client();
    }

    /// It is the next client from now on.
    pub(super) fn be_next(&mut self, next: Arc<NextClient>) {
        self.role = Some(Role::Next);
        self.client = self.machine.new_client();
        self.next = Some(next);
    }

    /// Makes it the VMM if the device was handed over to it.
    pub(super) fn look_whether_owner(&mut self) {
        if self.next.as_ref().is_some_and(|next| next.owns()) {
            self.be_vmm();
            let Client { pid, user } = Client::of(&self.link);
            tracing::info!(pid, user, "the next client is the device's VMM now");
        }
    }

    /// Wakes this connection when accesses are held back no more.
    fn hear_of_releases(&mut self) {
        if self.released.is_none() {
            let link = Arc::clone(&self.link);
            let released: Arc<Released> = Arc::new(move || link.wake());
            self.machine.on_release(&released);
            self.released = Some(released);
        }
    }

    /// Its role, once it was admitted.
    pub(super) fn role(&self) -> Option<Role> {
        self.role
    }

    /// Logs the client and its role.
    pub(super) fn log_admission(&self) {
        let (role, Client { pid, user }) = (self.role.map(Role::name), Client::of(&self.link));
        tracing::info!(role, pid, user, "a client is connected");
    }

    /// Logs that the client is gone, and why. A client that never had a role is not logged by default.
    pub(super) fn log_end(&self, end: &ConnectionError) {
        let Client { pid, user } = Client::of(&self.link);
        match self.role.map(Role::name) {
            Some(role) => tracing::info!(role, pid, user, %end, "a client is disconnected"),
            None => tracing::debug!(pid, user, %end, "a client is disconnected without a role"),
        }
    }

    /// Whether it waits for the VMM's place as the next client.
    pub(super) fn is_next(&self) -> bool {
        self.next.is_some()
    }

    /// Its preparations as the next client.
    pub(super) fn next(&self) -> Option<&NextClient> {
        self.next.as_deref()
    }

    /// Whether a session existed before this client was the VMM. Its data cannot be moved through this client's
    /// data socket.
    pub(super) fn found(&self, session: SessionId) -> bool {
        self.found == Some(session)
    }

    /// Whether its accesses have to wait.
    pub(super) fn holds_accesses(&self) -> bool {
        self.is_next() || self.machine.holds_accesses()
    }

    /// Releases everything of the client. A VMM's device goes to its next client, if there is one.
    pub(super) fn leave(&mut self) {
        let is_vmm = match self.role {
            None => false,
            Some(Role::Control) => {
                self.machine.client_gone(self.client);
                false
            }
            Some(Role::Vmm) => true,
            // Drop its preparations; or it has already become the VMM without noticing.
            Some(Role::Next) => self.next.as_ref().is_none_or(|next| !next.withdraw()),
        };
        if is_vmm && !self.doors.hand_over(self.id, |next| self.machine.hand_over(next)) {
            self.machine.client_gone(ClientId::VMM);
            // A next client that was admitted meanwhile.
            while !self.doors.leave_unless_next(self.id) {
                self.doors.hand_over(self.id, |next| self.machine.hand_over(next));
            }
        }
    }

    /// EPERM for requests that a control client may not make: memory, interrupts and BARs belong to the VMM, and it
    /// may reset only to end its own load. EBUSY for requests that the next client may not make yet.
    pub(super) fn check(&self, request: &Request<'_>) -> Result<(), Errno> {
        if self.is_next() {
            return next::check(request);
        }
        let may = match request {
            _ if self.role != Some(Role::Control) => true,
            Request::Version(..) | Request::GetInfo { .. } | Request::GetRegionInfo { .. } => true,
            Request::GetIrqInfo { .. } | Request::Feature(..) => true,
            Request::MigDataRead(..) | Request::MigDataWrite(..) => true,
            Request::RegionRead(access) => self.is_config(access.region),
            Request::Reset => {
                self.machine.is_driven_by(self.client)
                    && matches!(self.machine.state(), State::Resuming | State::Error)
            }
            _ => false,
        };
        if may { Ok(()) } else { Err(Errno::EPERM) }
    }

    /// Whether a region is the configuration space of a PCI function, which is answered in every state.
    pub(super) fn is_config(&self, region: u32) -> bool {
        let flags = self.machine.description().flags.unwrap_or(DeviceFlags::empty());
        region == CONFIG_REGION && flags.contains(DeviceFlags::PCI)
    }

    /// Limit on the fds that the client accepts in one message; 0 for a control client and for one that does not
    /// have the device yet, since these map nothing.
    pub(super) fn fds_max(&self) -> usize {
        if self.role == Some(Role::Control) || self.is_next() {
            return 0;
        }
        self.limits.map_or(0, |limits| limits.msg_fds_max)
    }

    /// The client's memory, by messages.
    pub(super) fn memory(&self) -> ClientMemory {
        let bytes_max = self.limits.map_or(1, |limits| limits.data_xfer_bytes_max as usize).max(1);
        ClientMemory { link: Arc::clone(&self.link), bytes_max }
    }

    /// Does something with this client's mappings.
    pub(super) fn with_mappings<R>(&self, act: impl FnOnce(&Mappings) -> R) -> R {
        match &self.next {
            Some(next) => next.with_mappings(self.machine, act),
            None => act(self.machine.mappings()),
        }
    }
}

impl Drop for Peer<'_> {
    /// Last: a waiting client must find the device without this client's resources.
    fn drop(&mut self) {
        self.doors.leave(self.id);
    }
}
