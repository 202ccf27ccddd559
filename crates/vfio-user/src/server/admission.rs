//! How a client is admitted: VERSION, and the role that it gets (`vfio-user.rst: VFIO_USER_VERSION`,
//! `docs/vfio-user-extensions.md: The control role, NEXT`).

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use limosa_device::{ClientId, Released};
use limosa_foreign_fd::Foreign;
use limosa_protocol::Errno;
use zerocopy::IntoBytes;

use super::connection::Connection;
use super::dma::Twin;
use super::doors::{self, Place, Role};
use super::job::{Handled, Job, Outcome};
use crate::codec::{Header, VersionMessage};
use crate::connection::ConnectionError;
use crate::version::{
    self, Capabilities, Limits, MSG_FDS_MAX, MigrationCapability, REPLY_BYTES_MAX, TwinSocket, VERSION,
};

/// Version data has room for all that this server ever says.
const JSON_ROOM: usize = 1024;

impl Connection<'_> {
    /// `vfio-user.rst: VFIO_USER_VERSION`. A refused version may be followed by another.
    pub(super) fn version(&mut self, job: &Job, version: VersionMessage, data: &[u8]) -> Handled {
        let theirs = match Capabilities::decode(data) {
            Ok(_) if version.major != VERSION.0 => {
                tracing::warn!(major = version.major, "an unknown major version");
                return Ok(Outcome::Refused(Errno::EINVAL));
            }
            Ok(theirs) => theirs,
            Err(error) => {
                tracing::warn!(%error, "VERSION refused");
                return Ok(Outcome::Refused(Errno::EINVAL));
            }
        };
        if let Err(errno) = self.admit(&theirs, job, version, data)? {
            return Ok(Outcome::Refused(errno));
        }
        let mut answer = self.capabilities().answer(&theirs);
        let twin = match answer.twin_socket {
            _ if self.role == Some(Role::Control) => None,
            // The socket goes with the reply.
            Some(_) if job.wants_reply() && theirs.max_msg_fds != Some(0) => self.make_twin(),
            _ => None,
        };
        if twin.is_none() {
            answer.twin_socket = None;
        }
        let minor = version.minor.min(VERSION.1);
        let limits = Limits::agree(minor, &theirs, &answer, &theirs);
        let fixed = VersionMessage { major: VERSION.0, minor };
        // QEMU receives the reply into the buffer of its request.
        let room = REPLY_BYTES_MAX.max(job.header.size as usize) - Header::BYTES - VersionMessage::BYTES;
        let json = answer.encode(room.min(JSON_ROOM));
        tracing::debug!(?theirs, ?limits, "version agreed");
        self.limits = Some(limits);
        self.doors.agreed(self.id, self.limits);
        self.link.foreign_dma.store(theirs.are_qemus(), Relaxed);
        let fds: Vec<BorrowedFd<'_>> = twin.iter().map(AsFd::as_fd).collect();
        self.reply_pieces(job, &[fixed.as_bytes(), &json], &fds)
    }

    /// Gives the client its role, for which it may have to wait.
    fn admit(
        &mut self,
        theirs: &Capabilities,
        job: &Job,
        version: VersionMessage,
        data: &[u8],
    ) -> Result<Result<(), Errno>, ConnectionError> {
        use version::Role as Asked;
        let asked = if self.by_control_door { Some(Asked::Control) } else { theirs.role };
        let may_control = || self.by_control_door || doors::may_control(&self.link);
        let control = match asked {
            Some(Asked::Control) if !may_control() => {
                tracing::warn!("a control client is refused: expected root or this server's own user");
                return Ok(Err(Errno::EACCES));
            }
            Some(Asked::Control) => true,
            // One that has gone, and is only not forgotten yet, is no VMM to be beside of.
            Some(Asked::Either) => self.doors.vmm().is_some_and(|vmm| !vmm.has_hung_up()) && may_control(),
            Some(Asked::Vmm) | None => false,
        };
        if control {
            let admitted = self.doors.be_control(self.id);
            if admitted.is_ok() {
                self.role = Some(Role::Control);
                self.client = self.machine.new_client();
                tracing::debug!("admitted as a control client");
            }
            return Ok(admitted);
        }
        let message = || [job.header.as_bytes(), version.as_bytes(), data].concat();
        let prepare = || self.machine.next_client();
        match self.doors.be_vmm(self.id, &self.link, &|| self.state(message()), &prepare)? {
            Ok(Place::Vmm) => self.be_vmm(),
            Ok(Place::Next(next)) => self.be_next(next),
            Err(errno) => return Ok(Err(errno)),
        }
        tracing::debug!(role = ?self.role, "admitted");
        Ok(Ok(()))
    }

    /// It is the VMM from now on.
    pub(super) fn be_vmm(&mut self) {
        self.role = Some(Role::Vmm);
        self.client = ClientId::VMM;
        self.next = None;
        self.hear_of_releases();
        // What was there before this client cannot be moved by its socket.
        self.moved = self.machine.session();
    }

    /// Wakes this connection when accesses are held back no more.
    pub(super) fn hear_of_releases(&mut self) {
        if self.released.is_none() {
            let link = self.link();
            let released: Arc<Released> = Arc::new(move || link.wake());
            self.machine.on_release(&released);
            self.released = Some(released);
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            role: Some(if self.role == Some(Role::Control) {
                version::Role::Control
            } else {
                version::Role::Vmm
            }),
            max_msg_fds: Some(MSG_FDS_MAX as u64),
            max_data_xfer_size: Some(self.data_bytes_max.into()),
            max_dma_maps: Some(65535),
            pgsizes: Some(4096),
            write_multiple: Some(true),
            twin_socket: self
                .options
                .twin_socket
                .then_some(TwinSocket { supported: true, fd_index: Some(0) }),
            migration: Some(MigrationCapability {
                pgsize: Some(4096),
                max_bitmap_size: Some(super::feature::BITMAP_BYTES_MAX),
            }),
        }
    }

    /// Makes the socket for the device's DMA messages and returns the client's end.
    fn make_twin(&self) -> Option<UnixStream> {
        let made =
            UnixStream::pair().map_err(|error| error.to_string()).and_then(|(ours, theirs)| match Twin::new(
                Foreign::new(ours),
                self.options.message_limit,
            ) {
                Ok(twin) => Ok((twin, theirs)),
                Err(error) => Err(error.to_string()),
            });
        match made {
            Ok((twin, theirs)) => self.link.twin.set(twin).ok().map(|()| theirs),
            Err(error) => {
                tracing::warn!(%error, "no twin socket");
                None
            }
        }
    }
}
