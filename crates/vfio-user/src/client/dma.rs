//! The server's DMA by messages (`vfio-user.rst: VFIO_USER_DMA_READ, VFIO_USER_DMA_WRITE`): memory
//! that the device cannot map, or does not.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use limosa_client::DmaTarget;
use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;
use zerocopy::IntoBytes;

use super::MESSAGE_LIMIT;
use super::dma_log::DmaLog;
use super::exchange::Failure;
use crate::codec::{Command, DmaAccess, Header, Kind};
use crate::connection::{ConnectionError, Receiver, Sender};

/// The mappings, and the objects that serve them.
pub(super) struct DmaTargets {
    data_bytes_max: u32,
    /// The log of writes to them.
    pub log: DmaLog,
    maps: RwLock<BTreeMap<u64, Target>>,
}

struct Target {
    size: u64,
    flags: DmaMapFlags,
    memory: Arc<dyn DmaTarget>,
}

/// Memory in a file that the server got, for servers that still access it by messages.
pub(super) struct FileTarget {
    pub fd: OwnedFd,
    pub offset: u64,
}

impl DmaTarget for FileTarget {
    fn read(&self, offset: u64, mut data: &mut [u8]) -> io::Result<()> {
        let mut at = self.offset.checked_add(offset).ok_or(io::ErrorKind::InvalidInput)?;
        while !data.is_empty() {
            match rustix::io::pread(&self.fd, &mut *data, at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => {
                    data = &mut data[bytes..];
                    at += bytes as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, mut data: &[u8]) -> io::Result<()> {
        let mut at = self.offset.checked_add(offset).ok_or(io::ErrorKind::InvalidInput)?;
        while !data.is_empty() {
            match rustix::io::pwrite(&self.fd, data, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => {
                    data = &data[bytes..];
                    at += bytes as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl DmaTargets {
    pub fn new(data_bytes_max: u32) -> DmaTargets {
        DmaTargets { data_bytes_max, log: DmaLog::default(), maps: RwLock::default() }
    }

    /// Adds a mapping, not empty and within 2^64; EEXIST when it overlaps one.
    pub fn insert(
        &self,
        iova: u64,
        size: u64,
        flags: DmaMapFlags,
        memory: Arc<dyn DmaTarget>,
    ) -> Result<(), Errno> {
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        // The last that starts in the range or before it; the caller checked that the range ends within 2^64.
        let before = maps.range(..=iova + (size - 1)).next_back();
        if before.is_some_and(|(&start, before)| start + (before.size - 1) >= iova) {
            return Err(Errno::EEXIST);
        }
        maps.insert(iova, Target { size, flags, memory });
        Ok(())
    }

    /// Forgets the mapping that starts there: the server refused it. Returns once it is not in use.
    pub fn take_back(&self, iova: u64) {
        self.maps.write().unwrap_or_else(PoisonError::into_inner).remove(&iova);
    }

    /// Removes the mappings that lie in a range, and returns whether there was one. Returns once none of them is in
    /// use.
    pub fn remove(&self, iova: u64, size: u64) -> bool {
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        let end = u128::from(iova) + u128::from(size);
        let there = maps.len();
        maps.retain(|&start, target| start < iova || u128::from(start) + u128::from(target.size) > end);
        maps.len() < there
    }

    pub fn len(&self) -> usize {
        self.maps.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Serves the server's command that the receiver has received. Only failures that make the connection unusable
    /// are errors.
    pub fn serve(
        &self,
        receiver: &mut Receiver,
        sender: &Sender,
        header: &Header,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let posted = header.kind() == Ok(Kind::Posted);
        let mut data = Vec::new();
        match self.perform(receiver, header, &mut data, deadline)? {
            _ if posted => {}
            Ok(access) => {
                let bytes = DmaAccess::BYTES + data.len();
                let reply = header.reply(bytes).expect("bounded by data_bytes_max");
                let fixed = access.as_bytes();
                sender.reply(&mut [
                    IoSlice::new(reply.as_bytes()),
                    IoSlice::new(fixed),
                    IoSlice::new(&data),
                ])?;
            }
            Err(errno) => sender.reply(&mut [IoSlice::new(header.refusal(errno).as_bytes())])?,
        }
        Ok(())
    }

    /// Moves the data; `data` then has the data of the reply.
    fn perform(
        &self,
        receiver: &mut Receiver,
        header: &Header,
        data: &mut Vec<u8>,
        deadline: Instant,
    ) -> Result<Result<DmaAccess, Errno>, Failure> {
        if !matches!(header.command, Command::DMA_READ | Command::DMA_WRITE) {
            return Ok(Err(Errno::ENOTSUP));
        }
        let body_bytes = receiver.body_left();
        let head = receiver.head(DmaAccess::BYTES, Some(deadline))?;
        let Ok((access, _)) = crate::codec::fixed::<DmaAccess>(head) else { return Ok(Err(Errno::EINVAL)) };
        if access.count > self.data_bytes_max.into() {
            return Ok(Err(Errno::EINVAL));
        }
        let count = access.count as usize;
        receiver.consume(DmaAccess::BYTES);
        let maps = &self.maps;
        if header.command == Command::DMA_READ {
            data.resize(count, 0);
            let done = each_piece(maps, access, DmaMapFlags::READ, |target, offset, from, to| {
                target.read(offset, &mut data[from..to])
            });
            return Ok(done.map(|()| access));
        }
        if body_bytes != DmaAccess::BYTES + count {
            return Ok(Err(Errno::EINVAL));
        }
        data.resize(count, 0);
        receiver.read(data, Some(deadline))?;
        let done = each_piece(maps, access, DmaMapFlags::WRITE, |target, offset, from, to| {
            let written = target.write(offset, &data[from..to]);
            // A failed write may have been written in part.
            self.log.wrote(access.address + from as u64, (to - from) as u64);
            written
        });
        data.clear();
        Ok(done.map(|()| access))
    }
}

/// Calls `act` for each mapping in a range with the offset within it and the piece of the data.
/// Nothing is done unless all of the range is mapped for it.
fn each_piece(
    maps: &RwLock<BTreeMap<u64, Target>>,
    access: DmaAccess,
    flag: DmaMapFlags,
    mut act: impl FnMut(&dyn DmaTarget, u64, usize, usize) -> io::Result<()>,
) -> Result<(), Errno> {
    let end = access.address.checked_add(access.count).ok_or(Errno::EINVAL)?;
    let maps = maps.read().unwrap_or_else(PoisonError::into_inner);
    for perform in [false, true] {
        let mut at = access.address;
        while at < end {
            let (&start, target) = maps.range(..=at).next_back().ok_or(Errno::EFAULT)?;
            let offset = at - start;
            if offset >= target.size {
                return Err(Errno::EFAULT);
            }
            if !target.flags.contains(flag) {
                return Err(Errno::EACCES);
            }
            let bytes = (target.size - offset).min(end - at);
            if perform {
                let from = (at - access.address) as usize;
                act(&*target.memory, offset, from, from + bytes as usize)
                    .map_err(|error| os_errno(&error))?;
            }
            at += bytes;
        }
    }
    Ok(())
}

/// The errno of an I/O error; EIO if it has none.
pub(super) fn os_errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, |errno| Errno::from_raw(errno.unsigned_abs()))
}

/// Serves the server's commands on their separate socket until that ends.
pub(super) fn serve_twin(targets: &DmaTargets, mut receiver: Receiver, sender: &Sender) {
    loop {
        let header = match receiver.next(None) {
            Ok(header) => header,
            Err(ConnectionError::Closed) => return,
            Err(error) => {
                tracing::warn!(%error, "the server's socket for DMA messages is of no more use");
                return sender.shutdown();
            }
        };
        let deadline = Instant::now() + MESSAGE_LIMIT;
        let served = match header.body_bytes().and_then(|_| header.kind()) {
            Ok(Kind::Command | Kind::Posted) => targets.serve(&mut receiver, sender, &header, deadline),
            Ok(_) => Err(Failure::Misbehaved("a reply where only commands are".into())),
            Err(error) => Err(Failure::Misbehaved(error.to_string())),
        };
        // Nothing else is sent here, so no other thread waits for this.
        let served = served.and_then(|()| {
            while !sender.flush()? {
                sender.wait_writable(deadline)?;
            }
            Ok(())
        });
        if let Err(failure) = served {
            tracing::warn!(?failure, "the server's socket for DMA messages is of no more use");
            return sender.shutdown();
        }
    }
}
