//! Accesses to regions, and whose mappings a client changes (`vfio-user.rst: VFIO_USER_REGION_READ, VFIO_USER_REGION_WRITE,
//! VFIO_USER_REGION_WRITE_MULTI, VFIO_USER_DMA_MAP, VFIO_USER_DMA_UNMAP`).

use std::io::IoSlice;
use std::sync::Arc;

use limosa_device::{Held, Mappings};
use limosa_protocol::Errno;
use zerocopy::IntoBytes;

use super::connection::Connection;
use super::dma::ClientMemory;
use super::job::{Handled, Job, Outcome, reply_header};
use super::mapping;
use crate::codec::{
    DirtyBitmap, DmaMapMessage, DmaUnmapMessage, Header, RegionAccess, RegionWriteMulti, SingleWrite,
};

impl Connection<'_> {
    pub(super) fn region_read(&mut self, job: &Job, access: RegionAccess) -> Handled {
        // The limit is this server's: libvfio-user's client reads more than it announces.
        let within = self.machine.description().regions.get(access.region as usize).is_some_and(|region| {
            access.offset.checked_add(access.count.into()).is_some_and(|end| end <= region.size)
        });
        if !within || access.count > self.data_bytes_max {
            return Ok(Outcome::Refused(Errno::EINVAL));
        }
        let is_config = self.is_config(access.region);
        if self.waits(!is_config) {
            return Ok(Outcome::Held);
        }
        let (machine, count) = (self.machine, access.count as usize);
        let header = reply_header(&job.header, RegionAccess::BYTES + count)?;
        // Header, fixed part and data in one piece: one plain send.
        let message = self.reply.bytes(Header::BYTES + RegionAccess::BYTES + count);
        let (head, data) = message.split_at_mut(Header::BYTES + RegionAccess::BYTES);
        head[..Header::BYTES].copy_from_slice(header.as_bytes());
        head[Header::BYTES..].copy_from_slice(access.as_bytes());
        // What a model leaves out must not be what another message left here.
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
            self.link.send(&mut [IoSlice::new(message)], &[])?;
        }
        Ok(Outcome::Replied)
    }

    pub(super) fn region_write(&mut self, job: &Job, access: RegionAccess, data: &[u8]) -> Handled {
        match self.write(access.region, access.offset, data) {
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
        self.link.send(&mut [IoSlice::new(&message)], &[])?;
        Ok(Outcome::Replied)
    }

    /// Whether an access has to wait: behind others, or because the device is not this client's yet. A next client may look at
    /// the configuration space, as long as none of its writes to it may wait.
    fn waits(&self, touches_device: bool) -> bool {
        match self.is_next() {
            true => touches_device || !self.parked.is_empty(),
            false => touches_device && self.parked.comes_first(),
        }
    }

    /// One write, behind those that wait.
    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<Result<(), Errno>, Held> {
        if self.is_next() {
            return Err(Held);
        }
        if self.is_config(region) {
            return Ok(self.machine.region_write_unheld(region, offset, data));
        }
        if self.parked.comes_first() {
            return Err(Held);
        }
        self.machine.region_write_or_held(region, offset, data)
    }

    /// Writes in order, up to the first that fails; the reply tells how many were done. Refused
    /// when none was.
    pub(super) fn region_write_multi(&mut self, job: &Job, writes: &[SingleWrite]) -> Handled {
        let mut count = self.parked.writes_done;
        for write in &writes[count..] {
            let Some(data) = write.data.get(..write.count as usize) else { break };
            match self.write(write.region, write.offset, data) {
                Ok(Ok(())) => count += 1,
                Err(Held) => {
                    self.parked.writes_done = count;
                    return Ok(Outcome::Held);
                }
                Ok(Err(errno)) if count == 0 => return Ok(Outcome::Refused(errno)),
                Ok(Err(errno)) => {
                    tracing::warn!(%errno, done = count, of = writes.len(), "REGION_WRITE_MULTI stopped");
                    break;
                }
            }
        }
        self.parked.writes_done = 0;
        if count == 0 && !writes.is_empty() {
            return Ok(Outcome::Refused(Errno::EINVAL));
        }
        let count = count as u64;
        self.reply(job, RegionWriteMulti { count }.as_bytes())
    }

    /// The client's memory, by messages.
    pub(super) fn memory(&self) -> ClientMemory {
        let bytes_max = self.limits.map_or(1, |limits| limits.data_xfer_bytes_max as usize).max(1);
        ClientMemory { link: Arc::clone(&self.link), bytes_max }
    }

    pub(super) fn dma_map(&mut self, job: &mut Job, map: DmaMapMessage) -> Handled {
        let fd = job.fds.pop();
        let (any_file, remote) = (self.options.any_file, || self.memory());
        match self.with_mappings(|mappings| mapping::map(mappings, map, fd, any_file, remote)) {
            Ok(()) => self.reply(job, &[]),
            Err(errno) => Ok(Outcome::Refused(errno)),
        }
    }

    pub(super) fn dma_unmap(
        &mut self,
        job: &Job,
        unmap: DmaUnmapMessage,
        bitmap: Option<DirtyBitmap>,
    ) -> Handled {
        match (self.with_mappings(|mappings| mapping::unmap(mappings, unmap, bitmap)), bitmap) {
            (Err(errno), _) => Ok(Outcome::Refused(errno)),
            (Ok((unmapped, _)), None) => self.reply(job, unmapped.as_bytes()),
            (Ok((unmapped, words)), Some(bitmap)) => {
                let bits = &words.as_bytes()[..bitmap.size as usize];
                self.reply_pieces(job, &[unmapped.as_bytes(), bitmap.as_bytes(), bits], &[])
            }
        }
    }

    /// Does something with this client's mappings.
    fn with_mappings<R>(&self, act: impl FnOnce(&Mappings) -> R) -> R {
        match &self.next {
            Some(next) => next.with_mappings(self.machine, act),
            None => act(self.machine.mappings()),
        }
    }
}
