//! How a client is admitted: VERSION, and the role that it gets (`vfio-user.rst: VFIO_USER_VERSION`,
//! `docs/vfio-user-extensions.md: The control role, NEXT`).

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::Relaxed;

use limosa_foreign_fd::Foreign;
use limosa_protocol::Errno;
use zerocopy::IntoBytes;

use super::dma::Twin;
use super::doors::{self, Place, Role};
use super::job::{Handled, Job, Outcome};
use super::peer::Peer;
use crate::codec::{Header, VersionMessage};
use crate::connection::ConnectionError;
use crate::version::{
    self, Capabilities, Limits, MSG_FDS_MAX, MigrationCapability, REPLY_BYTES_MAX, TwinSocket, VERSION,
};

/// Enough for all version data of this server.
const JSON_ROOM: usize = 1024;

/// `vfio-user.rst: VFIO_USER_VERSION`. A refused version may be followed by another.
pub(super) fn version(peer: &mut Peer<'_>, job: &Job, version: VersionMessage, data: &[u8]) -> Handled {
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
    if let Err(errno) = admit(peer, &theirs, job, version, data)? {
        return Ok(Outcome::Refused(errno));
    }
    let mut answer = capabilities(peer).answer(&theirs);
    let twin = match answer.twin_socket {
        _ if peer.role() == Some(Role::Control) => None,
        // The socket goes with the reply.
        Some(_) if job.wants_reply() && theirs.max_msg_fds != Some(0) => make_twin(peer),
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
    peer.limits = Some(limits);
    peer.doors.agreed(peer.id, peer.limits);
    peer.link.foreign_dma.store(theirs.are_qemus(), Relaxed);
    let fds: Vec<BorrowedFd<'_>> = twin.iter().map(AsFd::as_fd).collect();
    job.reply_pieces(&peer.link, &[fixed.as_bytes(), &json], &fds)
}

/// Gives the client its role, for which it may have to wait.
fn admit(
    peer: &mut Peer<'_>,
    theirs: &Capabilities,
    job: &Job,
    version: VersionMessage,
    data: &[u8],
) -> Result<Result<(), Errno>, ConnectionError> {
    use version::Role as Asked;
    let asked = if peer.by_control_door { Some(Asked::Control) } else { theirs.role };
    let may_control = || peer.by_control_door || doors::may_control(&peer.link);
    let control = match asked {
        Some(Asked::Control) if !may_control() => {
            tracing::warn!("a control client is refused: expected root or this server's own user");
            return Ok(Err(Errno::EACCES));
        }
        Some(Asked::Control) => true,
        // A VMM that has gone but is not removed yet does not count.
        Some(Asked::Either) => peer.doors.vmm().is_some_and(|vmm| !vmm.has_hung_up()) && may_control(),
        Some(Asked::Vmm) | None => false,
    };
    if control {
        let admitted = peer.doors.be_control(peer.id);
        if admitted.is_ok() {
            peer.be_control();
            peer.log_admission();
        }
        return Ok(admitted);
    }
    let message = || [job.header.as_bytes(), version.as_bytes(), data].concat();
    let state = || doors::State {
        limits: peer.limits,
        by_control_door: peer.by_control_door,
        unanswered: message(),
        parked: Vec::new(),
    };
    let prepare = || peer.machine.next_client();
    match peer.doors.be_vmm(peer.id, &peer.link, &state, &prepare)? {
        Ok(Place::Vmm) => peer.be_vmm(),
        Ok(Place::Next(next)) => peer.be_next(next),
        Err(errno) => return Ok(Err(errno)),
    }
    peer.log_admission();
    Ok(Ok(()))
}

fn capabilities(peer: &Peer<'_>) -> Capabilities {
    Capabilities {
        role: Some(if peer.role() == Some(Role::Control) {
            version::Role::Control
        } else {
            version::Role::Vmm
        }),
        max_msg_fds: Some(MSG_FDS_MAX as u64),
        max_data_xfer_size: Some(peer.data_bytes_max.into()),
        max_dma_maps: Some(65535),
        pgsizes: Some(4096),
        write_multiple: Some(true),
        twin_socket: peer.options.twin_socket.then_some(TwinSocket { supported: true, fd_index: Some(0) }),
        migration: Some(MigrationCapability {
            pgsize: Some(4096),
            max_bitmap_size: Some(super::feature::BITMAP_BYTES_MAX),
        }),
    }
}

/// Creates the socket for the device's DMA messages and returns the client's end.
fn make_twin(peer: &Peer<'_>) -> Option<UnixStream> {
    let made =
        UnixStream::pair().map_err(|error| error.to_string()).and_then(|(ours, theirs)| {
            match Twin::new(Foreign::new(ours), peer.options.message_limit) {
                Ok(twin) => Ok((twin, theirs)),
                Err(error) => Err(error.to_string()),
            }
        });
    match made {
        Ok((twin, theirs)) => peer.link.twin.set(twin).ok().map(|()| theirs),
        Err(error) => {
            tracing::warn!(%error, "no twin socket");
            None
        }
    }
}
