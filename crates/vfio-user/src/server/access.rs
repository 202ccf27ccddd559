//! Regions and memory (`vfio-user.rst: VFIO_USER_REGION_READ, VFIO_USER_REGION_WRITE,
//! VFIO_USER_REGION_WRITE_MULTI, VFIO_USER_DMA_MAP, VFIO_USER_DMA_UNMAP`).

use std::io::IoSlice;
use std::sync::Arc;

use limosa_device::{Backing, Held, Mapping, Mappings};
use limosa_protocol::Errno;
use limosa_protocol::info::{DmaMapFlags, DmaUnmapFlags};
use zerocopy::IntoBytes;

use super::connection::{Connection, Handled, Job, Outcome, reply_header};
use super::dma::ClientMemory;
use crate::codec::{
    DirtyBitmap, DmaMapMessage, DmaUnmapMessage, Header, RegionAccess, RegionWriteMulti, SingleWrite,
};

/// Flags of DMA_MAP that say how the file may be used, libvfio-user's access modes: by a mapping, which is the default, or by
/// pread and pwrite.
const DMA_MAP_MMAP: u32 = 1 << 2;
const DMA_MAP_FILE_IO: u32 = 1 << 3;

/// The longest bitmap that a DMA_UNMAP returns: 1 TiB of 4 KiB pages.
const UNMAP_BITMAP_BYTES_MAX: u64 = 32 << 20;

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
        let flags = DmaMapFlags::from_bits_retain(map.flags & !(DMA_MAP_MMAP | DMA_MAP_FILE_IO));
        let known = DmaMapFlags::READ | DmaMapFlags::WRITE;
        if (map.argsz as usize) < DmaMapMessage::BYTES || !known.contains(flags) {
            return Ok(Outcome::Refused(Errno::EINVAL));
        }
        let by_file_io = map.flags & (DMA_MAP_MMAP | DMA_MAP_FILE_IO) == DMA_MAP_FILE_IO;
        let (offset, any_file) = (map.offset, self.options.any_file);
        let backing = match job.fds.pop() {
            Some(fd) if by_file_io => Backing::FileIo { fd, offset, any_file },
            Some(fd) if any_file => Backing::AnyFile { fd, offset },
            Some(fd) => Backing::File { fd, offset },
            None => Backing::Remote(Arc::new(self.memory())),
        };
        let mapping = Mapping { iova: map.address, size: map.size, flags, backing };
        match self.with_mappings(|mappings| mappings.map(mapping)) {
            Ok(()) => self.reply(job, &[]),
            Err(errno) => {
                if errno == Errno::ENOTSUP && !self.options.any_file {
                    tracing::warn!(
                        "DMA_MAP refused: expected a memfd, or a file on tmpfs or hugetlbfs; `limosa serve \
                         --any-file` (Options::any_file) maps other files"
                    );
                }
                Ok(Outcome::Refused(errno))
            }
        }
    }

    pub(super) fn dma_unmap(
        &mut self,
        job: &Job,
        unmap: DmaUnmapMessage,
        bitmap: Option<DirtyBitmap>,
    ) -> Handled {
        let flags = DmaUnmapFlags::from_bits_retain(unmap.flags);
        let known = DmaUnmapFlags::GET_DIRTY_BITMAP | DmaUnmapFlags::ALL;
        if (unmap.argsz as usize) < DmaUnmapMessage::BYTES || !known.contains(flags) {
            return Ok(Outcome::Refused(Errno::EINVAL));
        }
        let mut words = Vec::new();
        let unmapped = self.with_mappings(|mappings| match (flags.contains(DmaUnmapFlags::ALL), &bitmap) {
            (true, None) if unmap.address == 0 && unmap.size == 0 => mappings.unmap_all(),
            (true, _) => Err(Errno::EINVAL),
            (false, None) => mappings.unmap(unmap.address, unmap.size),
            (false, Some(bitmap)) => unmap_report(mappings, &unmap, bitmap, &mut words),
        });
        let size = match unmapped {
            Ok(size) => size,
            Err(errno) => return Ok(Outcome::Refused(errno)),
        };
        // As the kernel does, the entry that was sent, with what was really unmapped in its size.
        let unmapped = DmaUnmapMessage { size, ..unmap };
        match bitmap {
            None => self.reply(job, unmapped.as_bytes()),
            Some(bitmap) => {
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

/// Unmaps, and leaves in `words` the bitmap, of at least the bytes that were asked for.
fn unmap_report(
    mappings: &Mappings,
    unmap: &DmaUnmapMessage,
    bitmap: &DirtyBitmap,
    found: &mut Vec<u64>,
) -> Result<u64, Errno> {
    mappings.logging_check(unmap.address, unmap.size, bitmap.page_size)?;
    if !bitmap.page_size.is_power_of_two() {
        return Err(Errno::EINVAL);
    }
    let words = unmap.size.div_ceil(bitmap.page_size).div_ceil(64);
    let needed = words.checked_mul(8).ok_or(Errno::E2BIG)?;
    let fixed = (DmaUnmapMessage::BYTES + DirtyBitmap::BYTES) as u64;
    if needed > UNMAP_BITMAP_BYTES_MAX {
        return Err(Errno::E2BIG);
    }
    if bitmap.size != needed || u64::from(unmap.argsz) < fixed + needed {
        return Err(Errno::EINVAL);
    }
    *found = vec![0; words as usize];
    mappings.unmap_report(unmap.address, unmap.size, bitmap.page_size, found)
}
