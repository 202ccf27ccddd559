//! A client's DMA mappings (`vfio-user.rst: VFIO_USER_DMA_MAP, VFIO_USER_DMA_UNMAP`).

use std::sync::Arc;

use limosa_device::{Backing, Mapping, Mappings};
use limosa_foreign_fd::ForeignFd;
use limosa_protocol::Errno;
use limosa_protocol::info::{DmaMapFlags, DmaUnmapFlags};
use zerocopy::IntoBytes;

use super::dma::ClientMemory;
use super::job::{Handled, Job, Outcome};
use super::peer::Peer;
use crate::codec::{DirtyBitmap, DmaMapMessage, DmaUnmapMessage};

/// Flags of DMA_MAP that say how the file may be used, libvfio-user's access modes: by a mapping, which is the default, or by
/// pread and pwrite.
const DMA_MAP_MMAP: u32 = 1 << 2;
const DMA_MAP_FILE_IO: u32 = 1 << 3;

/// The longest bitmap that a DMA_UNMAP returns: 1 TiB of 4 KiB pages.
const UNMAP_BITMAP_BYTES_MAX: u64 = 32 << 20;

/// DMA_MAP, with its reply.
pub(super) fn map(peer: &Peer<'_>, job: &mut Job, map: DmaMapMessage) -> Handled {
    let fd = job.fds.pop();
    let (any_file, remote) = (peer.options.any_file, || peer.memory());
    match peer.with_mappings(|mappings| map_for_device(mappings, map, fd, any_file, remote)) {
        Ok(()) => job.reply(&peer.link, &[]),
        Err(errno) => Ok(Outcome::Refused(errno)),
    }
}

/// DMA_UNMAP, with its reply.
pub(super) fn unmap(
    peer: &Peer<'_>,
    job: &Job,
    unmap: DmaUnmapMessage,
    bitmap: Option<DirtyBitmap>,
) -> Handled {
    match (peer.with_mappings(|mappings| unmap_from_device(mappings, unmap, bitmap)), bitmap) {
        (Err(errno), _) => Ok(Outcome::Refused(errno)),
        (Ok((unmapped, _)), None) => job.reply(&peer.link, unmapped.as_bytes()),
        (Ok((unmapped, words)), Some(bitmap)) => {
            let bits = &words.as_bytes()[..bitmap.size as usize];
            job.reply_pieces(&peer.link, &[unmapped.as_bytes(), bitmap.as_bytes(), bits], &[])
        }
    }
}

/// DMA_MAP, of a file or of memory that the client reaches for the device.
fn map_for_device(
    mappings: &Mappings,
    map: DmaMapMessage,
    fd: Option<ForeignFd>,
    any_file: bool,
    remote: impl FnOnce() -> ClientMemory,
) -> Result<(), Errno> {
    let flags = DmaMapFlags::from_bits_retain(map.flags & !(DMA_MAP_MMAP | DMA_MAP_FILE_IO));
    let known = DmaMapFlags::READ | DmaMapFlags::WRITE;
    if (map.argsz as usize) < DmaMapMessage::BYTES || !known.contains(flags) {
        return Err(Errno::EINVAL);
    }
    let by_file_io = map.flags & (DMA_MAP_MMAP | DMA_MAP_FILE_IO) == DMA_MAP_FILE_IO;
    let offset = map.offset;
    let backing = match fd {
        Some(fd) if by_file_io => Backing::FileIo { fd, offset, any_file },
        Some(fd) if any_file => Backing::AnyFile { fd, offset },
        Some(fd) => Backing::File { fd, offset },
        None => Backing::Remote(Arc::new(remote())),
    };
    mappings.map(Mapping { iova: map.address, size: map.size, flags, backing }).inspect_err(|errno| {
        if *errno == Errno::ENOTSUP && !any_file {
            tracing::warn!(
                "DMA_MAP refused: expected a memfd, or a file on tmpfs or hugetlbfs; `limosa serve \
                 --any-file` (Options::any_file) maps other files"
            );
        }
    })
}

/// DMA_UNMAP. As with the kernel, the reply is the entry of the request, with the number of bytes actually unmapped
/// in its size, followed by the bitmap if it was requested.
fn unmap_from_device(
    mappings: &Mappings,
    unmap: DmaUnmapMessage,
    bitmap: Option<DirtyBitmap>,
) -> Result<(DmaUnmapMessage, Vec<u64>), Errno> {
    let flags = DmaUnmapFlags::from_bits_retain(unmap.flags);
    let known = DmaUnmapFlags::GET_DIRTY_BITMAP | DmaUnmapFlags::ALL;
    if (unmap.argsz as usize) < DmaUnmapMessage::BYTES || !known.contains(flags) {
        return Err(Errno::EINVAL);
    }
    let mut words = Vec::new();
    let size = match (flags.contains(DmaUnmapFlags::ALL), &bitmap) {
        (true, None) if unmap.address == 0 && unmap.size == 0 => mappings.unmap_all()?,
        (true, _) => return Err(Errno::EINVAL),
        (false, None) => mappings.unmap(unmap.address, unmap.size)?,
        (false, Some(bitmap)) => unmap_report(mappings, &unmap, bitmap, &mut words)?,
    };
    Ok((DmaUnmapMessage { size, ..unmap }, words))
}

/// Unmaps, and leaves the bitmap in `words`, with at least the requested bytes.
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
