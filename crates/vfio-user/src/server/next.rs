//! The client that gets the device when its VMM has gone (`docs/vfio-user-extensions.md: NEXT`): its permissions
//! until then, and how it is named.
//!
//! It may read all information about the device, and its mappings and wiring are kept separately ([`NextClient`]).
//! Accesses to the device wait ([`parked`](super::parked)), and requests that drive it are refused. The thread of the
//! VMM's connection hands over the device when it ends. This connection's thread may be sleeping in recvmsg(2) then, so
//! it checks before each request whether it has become the VMM.

use limosa_device::FeatureDone;
use limosa_host::Process;
use limosa_protocol::feature::FeatureRules;
use limosa_protocol::{Errno, FeatureCall, FeatureIndex, FeatureOp};
use zerocopy::{FromBytes, IntoBytes};

use super::peer::Peer;
use crate::codec::Request;
use crate::extension::{self, Next, NextFlags};

/// EBUSY for requests that drive the device, or that use it by other means than accesses, which wait.
pub(super) fn check(request: &Request<'_>) -> Result<(), Errno> {
    let may = match request {
        // A header that is no request is refused as ever.
        Request::Feature(header, _) => header.call().map_or(true, may_ask),
        Request::Reset | Request::GetRegionIoFds { .. } => false,
        Request::MigDataRead(..) | Request::MigDataWrite(..) => false,
        _ => true,
    };
    if may { Ok(()) } else { Err(Errno::EBUSY) }
}

/// NEXT: the named process, and whether its client is connected.
pub(super) fn feature(peer: &Peer<'_>, call: FeatureCall, payload: &mut [u8]) -> Result<FeatureDone, Errno> {
    let payload_bytes = size_of::<Next>();
    if !call.check(&FeatureRules { name: "NEXT", get: true, set: true, payload_bytes })? {
        return Ok(FeatureDone::default());
    }
    let payload = payload.get_mut(..payload_bytes).ok_or(Errno::EINVAL)?;
    if call.op == FeatureOp::GET {
        let (pid, is_there) = peer.doors.named();
        let mut flags = if is_there { NextFlags::THERE } else { 0 };
        if peer.is_next() {
            flags |= NextFlags::THIS;
        }
        Next { pid, flags }.write_to(payload).map_err(|_| Errno::EINVAL)?;
        return Ok(FeatureDone { payload_bytes, opened: None });
    }
    match Next::read_from_bytes(payload).map_err(|_| Errno::EINVAL)? {
        Next { pid: 0, flags: 0 } => peer.doors.name(None)?,
        Next { pid, flags: 0 } => {
            let process = Process::with_pid(pid).map_err(|error| {
                tracing::warn!(%error, "no next client is named");
                if error.kind() == std::io::ErrorKind::NotFound { Errno::ESRCH } else { Errno::EIO }
            })?;
            peer.doors.name(Some(process))?;
        }
        _ => return Err(Errno::EINVAL),
    }
    Ok(FeatureDone { payload_bytes, opened: None })
}

/// Whether the next client may make a FEATURE request: only requests for information about the device, not about a
/// session or a log.
fn may_ask(call: FeatureCall) -> bool {
    let is_look = matches!(
        call.index,
        FeatureIndex::MIGRATION
            | FeatureIndex::MIG_DEVICE_STATE
            | FeatureIndex::MIG_DATA_SIZE
            | extension::RESET_COUNT
            | extension::STAY
            | extension::NEXT
    );
    call.op.contains(FeatureOp::PROBE) || (call.op == FeatureOp::GET && is_look)
}
