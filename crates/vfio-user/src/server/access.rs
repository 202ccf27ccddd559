//! Accesses to regions (`vfio-user.rst: VFIO_USER_REGION_READ, VFIO_USER_REGION_WRITE,
//! VFIO_USER_REGION_WRITE_MULTI`).

use std::io::IoSlice;

use limosa_device::Held;
use limosa_protocol::Errno;
use zerocopy::IntoBytes;

use super::buffer::Buffer;
use super::job::{Handled, Job, Outcome, reply_header};
use super::parked::Parked;
use super::peer::Peer;
use crate::codec::{Header, RegionAccess, RegionWriteMulti, SingleWrite};

/// REGION_READ, with a reply that is made in `room`.
pub(super) fn read(
    peer: &Peer<'_>,
    parked: &Parked,
    room: &mut Buffer,
    job: &Job,
    access: RegionAccess,
) -> Handled {
    // The limit is this server's: libvfio-user's client reads more than it announces.
    let within = peer.machine.description().regions.get(access.region as usize).is_some_and(|region| {
        access.offset.checked_add(access.count.into()).is_some_and(|end| end <= region.size)
    });
    if !within || access.count > peer.data_bytes_max {
        return Ok(Outcome::Refused(Errno::EINVAL));
    }
    let is_config = peer.is_config(access.region);
    if waits(peer, parked, !is_config) {
        return Ok(Outcome::Held);
    }
    let (machine, count) = (peer.machine, access.count as usize);
    let header = reply_header(&job.header, RegionAccess::BYTES + count)?;
    // Header, fixed part and data in one piece: one plain send.
    let message = room.bytes(Header::BYTES + RegionAccess::BYTES + count);
    let (head, data) = message.split_at_mut(Header::BYTES + RegionAccess::BYTES);
    head[..Header::BYTES].copy_from_slice(header.as_bytes());
    head[Header::BYTES..].copy_from_slice(access.as_bytes());
    // If the model does not fill in all bytes, the client must not see those of another message.
    data.fill(0);
    let read = if is_config {
        Ok(machine.region_read_unheld(access.region, access.offset, data))
    } else {
        machine.region_read_or_held(access.region, access.offset, data)
    };
    match read {
        Err(Held) => return Ok(Outcome::Held),
        Ok(Err(errno)) => return Ok(Outcome::Refused(errno)),
        Ok(Ok(())) => {}
    }
    if job.wants_reply() {
        peer.link.send(&mut [IoSlice::new(message)], &[])?;
    }
    Ok(Outcome::Replied)
}

/// REGION_WRITE.
pub(super) fn write(
    peer: &Peer<'_>,
    parked: &Parked,
    job: &Job,
    access: RegionAccess,
    data: &[u8],
) -> Handled {
    match write_one(peer, parked, access.region, access.offset, data) {
        Err(Held) => return Ok(Outcome::Held),
        Ok(Err(errno)) => return Ok(Outcome::Refused(errno)),
        Ok(Ok(())) => {}
    }
    if !job.wants_reply() {
        return Ok(Outcome::Replied);
    }
    let header = reply_header(&job.header, RegionAccess::BYTES)?;
    let mut message = [0; Header::BYTES + RegionAccess::BYTES];
    message[..Header::BYTES].copy_from_slice(header.as_bytes());
    message[Header::BYTES..].copy_from_slice(access.as_bytes());
    peer.link.send(&mut [IoSlice::new(&message)], &[])?;
    Ok(Outcome::Replied)
}

/// Whether an access has to wait: behind others, or because the device is not this client's yet. A next client may read
/// the configuration space, unless one of its writes to it may be waiting.
fn waits(peer: &Peer<'_>, parked: &Parked, touches_device: bool) -> bool {
    match peer.is_next() {
        true => touches_device || !parked.is_empty(),
        false => touches_device && parked.comes_first(),
    }
}

/// One write, behind those that wait.
fn write_one(
    peer: &Peer<'_>,
    parked: &Parked,
    region: u32,
    offset: u64,
    data: &[u8],
) -> Result<Result<(), Errno>, Held> {
    if peer.is_next() {
        return Err(Held);
    }
    if peer.is_config(region) {
        return Ok(peer.machine.region_write_unheld(region, offset, data));
    }
    if parked.comes_first() {
        return Err(Held);
    }
    peer.machine.region_write_or_held(region, offset, data)
}

/// Writes in order, up to the first failure; the reply has the number of completed writes. Refused if there is
/// none.
pub(super) fn write_multi(
    peer: &Peer<'_>,
    parked: &mut Parked,
    job: &Job,
    writes: &[SingleWrite],
) -> Handled {
    let mut count = parked.writes_done;
    for write in &writes[count..] {
        let Some(data) = write.data.get(..write.count as usize) else { break };
        match write_one(peer, parked, write.region, write.offset, data) {
            Ok(Ok(())) => count += 1,
            Err(Held) => {
                parked.writes_done = count;
                return Ok(Outcome::Held);
            }
            Ok(Err(errno)) if count == 0 => return Ok(Outcome::Refused(errno)),
            Ok(Err(errno)) => {
                tracing::warn!(%errno, done = count, of = writes.len(), "REGION_WRITE_MULTI stopped");
                break;
            }
        }
    }
    parked.writes_done = 0;
    if count == 0 && !writes.is_empty() {
        return Ok(Outcome::Refused(Errno::EINVAL));
    }
    let count = count as u64;
    job.reply(&peer.link, RegionWriteMulti { count }.as_bytes())
}
