//! The client that gets the device when its VMM has gone (`docs/vfio-user-extensions.md: NEXT`): what it may until then, and how
//! it is named.
//!
//! It is told all of the device, and its mappings and its wiring are kept apart ([`NextClient`]). What would touch the device
//! waits ([`parked`](super::parked)), and what would drive it is refused. The thread of the VMM's connection hands the device
//! over as it ends. This connection's thread may sleep in recvmsg(2) then, so it looks before each request whether it is the VMM
//! by now.

use limosa_device::FeatureDone;
use limosa_host::Process;
use limosa_protocol::feature::FeatureRules;
use limosa_protocol::{Errno, FeatureCall, FeatureIndex, FeatureOp};
use zerocopy::{FromBytes, IntoBytes};

use super::peer::Peer;
use crate::codec::Request;
use crate::extension::{self, Next, NextFlags};

/// EBUSY for what would drive the device, or reach it by another way than accesses, which wait.
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

/// NEXT: who may come, and whether it has.
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

/// Whether the next client may make a FEATURE request: a look at what the device is, and not at a session or a log.
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
