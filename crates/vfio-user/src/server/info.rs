//! The device's information
//! (`vfio-user.rst: VFIO_USER_DEVICE_GET_INFO, VFIO_USER_DEVICE_GET_REGION_INFO, VFIO_USER_DEVICE_GET_REGION_IO_FDS, VFIO_USER_DEVICE_GET_IRQ_INFO`).
//!
//! A client whose buffer is too small for a reply gets the fixed part, with the required size in `argsz`
//! (`vfio-user.rst: Message sizes`). The fds of a region come with either reply: a client uses those of the reply that
//! it keeps.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use limosa_protocol::Errno;
use limosa_protocol::capability::{Chain, SparseMmapArea};
use limosa_protocol::info::{DeviceInfo, IrqInfo, RegionFlags, RegionInfo};
use zerocopy::IntoBytes;

use crate::codec::{IoFd, IoFdsMessage};
use limosa_device::{Description, IoEventFd};

/// Limit on the eventfds of one region in a reply; more would need more than one message's fds.
const IO_FDS_MAX: usize = 256;

/// A reply's body, and its fds.
pub(super) struct Answer<'a> {
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<BorrowedFd<'a>>,
}

impl Answer<'_> {
    fn new(pieces: &[&[u8]]) -> Self {
        Answer { body: pieces.concat(), fds: Vec::new() }
    }
}

/// DEVICE_GET_INFO.
pub(super) fn device(description: &Description, argsz: u32) -> Result<Answer<'_>, Errno> {
    if (argsz as usize) < size_of::<DeviceInfo>() {
        return Err(Errno::EINVAL);
    }
    Ok(Answer::new(&[description.device_info().as_bytes()]))
}

/// DEVICE_GET_IRQ_INFO.
pub(super) fn irq(description: &Description, argsz: u32, index: u32) -> Result<Answer<'_>, Errno> {
    if (argsz as usize) < size_of::<IrqInfo>() {
        return Err(Errno::EINVAL);
    }
    Ok(Answer::new(&[description.irq_info(index)?.as_bytes()]))
}

/// DEVICE_GET_REGION_INFO, for a client that accepts `fds_max` fds. `file` is the file of a mappable region.
pub(super) fn region<'a>(
    description: &Description,
    file: Option<BorrowedFd<'a>>,
    fds_max: usize,
    argsz: u32,
    index: u32,
) -> Result<Answer<'a>, Errno> {
    if (argsz as usize) < size_of::<RegionInfo>() {
        return Err(Errno::EINVAL);
    }
    let view = description.region_view(index)?;
    let mut info = view.info;
    // A client that accepts no fds cannot map.
    let fd = file.filter(|_| fds_max > 0);
    if fd.is_none() {
        info.flags &= !RegionFlags::MMAP.bits();
    }
    let mut capabilities = Chain::after(size_of::<RegionInfo>());
    if fd.is_some() && !view.areas.is_empty() {
        let area = |&(offset, size): &(u64, u64)| SparseMmapArea { offset, size };
        capabilities.sparse_mmap(&view.areas.iter().map(area).collect::<Vec<_>>());
    }
    info.argsz = capabilities.argsz();
    let mut bytes = capabilities.bytes();
    if capabilities.offset() == 0 {
        // The region has none.
    } else if argsz >= info.argsz {
        // A client that sees the flag looks for capabilities, even if they did not fit.
        info.flags |= RegionFlags::CAPS.bits();
        info.cap_offset = capabilities.offset();
    } else {
        bytes = &[];
    }
    Ok(Answer { fds: fd.into_iter().collect(), ..Answer::new(&[info.as_bytes(), bytes]) })
}

/// DEVICE_GET_REGION_IO_FDS, likewise.
pub(super) fn region_io_fds(
    signals: &[IoEventFd],
    fds_max: usize,
    argsz: u32,
    index: u32,
) -> Result<Answer<'_>, Errno> {
    if (argsz as usize) < IoFdsMessage::BYTES {
        return Err(Errno::EINVAL);
    }
    // One fd may stand for several registers; it is sent once.
    let mut fds: Vec<&Arc<_>> = Vec::new();
    let mut entries = Vec::new();
    for io in signals.iter().take(IO_FDS_MAX) {
        let known = fds.iter().position(|fd| Arc::ptr_eq(fd, &io.fd));
        if known.is_none() && fds.len() == fds_max {
            // Writes to registers that are left out arrive as messages.
            tracing::debug!(index, "the client accepts fewer fds than the region has");
            continue;
        }
        let fd_index = known.unwrap_or_else(|| {
            fds.push(&io.fd);
            fds.len() - 1
        });
        entries.push(IoFd {
            offset: io.offset,
            size: io.size,
            fd_index: fd_index as u32,
            kind: IoFd::IOEVENTFD,
            flags: if io.datamatch.is_some() { IoFd::DATAMATCH } else { 0 },
            padding: 0,
            datamatch: io.datamatch.unwrap_or(0),
        });
    }
    let needed = IoFdsMessage::BYTES + entries.len() * IoFd::BYTES;
    let fixed = IoFdsMessage { argsz: needed as u32, flags: 0, index, count: entries.len() as u32 };
    if (argsz as usize) < needed {
        return Ok(Answer::new(&[fixed.as_bytes()]));
    }
    let fds = fds.into_iter().map(|fd| (**fd).as_fd()).collect();
    Ok(Answer { fds, ..Answer::new(&[fixed.as_bytes(), entries.as_bytes()]) })
}
