//! [`Dma`]: guest memory as a device reaches it.

use std::fmt;
use std::sync::Arc;

use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Pin;
use super::table::{Memory, Space};

/// Guest memory as a device reaches it: it reads, writes and marks pages, and cannot change what is mapped. A clone is
/// cheap and reaches the same memory.
#[derive(Clone)]
pub struct Dma {
    space: Arc<Space>,
}

impl Dma {
    pub(super) fn new(space: Arc<Space>) -> Dma {
        Dma { space }
    }

    /// The device reads memory: EFAULT where nothing is mapped, or not for reading, or where the file behind it was
    /// cut short; ranges may span mappings. What was read before the error is in `data`.
    #[inline]
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let table = self.space.read_lock();
        if let Some((file, offset)) = table.at_hand(iova, data.len(), DmaMapFlags::READ) {
            return file.read(offset, data);
        }
        drop(table);
        self.read_pieces(iova, data)
    }

    fn read_pieces(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let mut table = self.space.read_lock();
        let (mut iova, mut rest) = (iova, data);
        while !rest.is_empty() {
            let mapped = table.find(iova, DmaMapFlags::READ)?;
            let (piece, after) = rest.split_at_mut(mapped.reach(iova, rest.len()));
            match &mapped.memory {
                Memory::File(file) => file.read(iova - mapped.iova, piece)?,
                Memory::FileIo(file) => file.read(iova - mapped.iova, piece)?,
                Memory::Remote(remote) => {
                    let remote = remote.clone();
                    drop(table);
                    remote.read(iova, piece)?;
                    table = self.space.read_lock();
                }
            }
            iova = next(iova, piece.len(), after.is_empty())?;
            rest = after;
        }
        Ok(())
    }

    /// The device writes memory; the pages go to the log when it is on. Errors as for [`Dma::read`]; what was
    /// written before the error stays written.
    #[inline]
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let table = self.space.read_lock();
        if let Some((file, offset)) = table.at_hand(iova, data.len(), DmaMapFlags::WRITE) {
            let done = file.write(offset, data);
            // After the write, and also when it failed: see `write_pieces`.
            if !data.is_empty() {
                table.mark(iova, data.len());
            }
            return done;
        }
        drop(table);
        self.write_pieces(iova, data)
    }

    fn write_pieces(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let mut table = self.space.read_lock();
        let (mut iova, mut rest) = (iova, data);
        while !rest.is_empty() {
            let mapped = table.find(iova, DmaMapFlags::WRITE)?;
            let (piece, after) = rest.split_at(mapped.reach(iova, rest.len()));
            let done = match &mapped.memory {
                Memory::File(file) => file.write(iova - mapped.iova, piece),
                Memory::FileIo(file) => file.write(iova - mapped.iova, piece),
                Memory::Remote(remote) => {
                    let remote = remote.clone();
                    // An unmap that takes the log with it may come before the answer.
                    table.mark(iova, piece.len());
                    drop(table);
                    let done = remote.write(iova, piece);
                    table = self.space.read_lock();
                    done
                }
            };
            // After the write, for a report between the two would take a mark whose data is not there yet; and when
            // it failed, for a part may have been written.
            table.mark(iova, piece.len());
            done?;
            iova = next(iova, piece.len(), after.is_empty())?;
            rest = after;
        }
        Ok(())
    }

    /// Puts a range into the log, if it is on: for a device that writes memory by other means than
    /// [`Dma::write`], such as hardware or a helper process with a mapping of its own. To be called after the
    /// write. What lies beyond the end of the address space is ignored.
    pub fn mark_dirty(&self, iova: u64, bytes: u64) {
        let bytes = bytes.min((u64::MAX - iova).saturating_add(1));
        if bytes > 0 {
            self.space.read_lock().mark(iova, usize::try_from(bytes).unwrap_or(usize::MAX));
        }
    }

    /// Pins a range for data that a system call or io_uring moves, without a copy. `access` is what the device does there: with
    /// WRITE, the pages are in the dirty log once the pin is dropped.
    ///
    /// EINVAL for an empty range or access; EFAULT as for [`Dma::read`]; ENOTSUP where the memory is not mapped into this process,
    /// as when it is reached by messages: read and write it; EBUSY while it is being unmapped.
    pub fn pin(&self, iova: u64, bytes: u64, access: DmaMapFlags) -> Result<Pin, Errno> {
        Pin::new(&self.space, iova, bytes, access)
    }

    /// Calls `hook` with address and size before what is mapped there is unmapped, so that the device drops its pins. A size of
    /// `u64::MAX` from 0 on is everything. It is called on the client's thread, with no lock of the memory held; accesses
    /// still succeed. If pins are left [`UNMAP_WAIT`](super::UNMAP_WAIT) later, the unmap fails with EBUSY.
    ///
    /// Where another client takes over at once ([`Machine::hand_over`](crate::Machine::hand_over)), it is called right after its
    /// mappings have taken the place of the former ones: pins that are made then are of the new ones.
    ///
    /// The memory holds the hook for as long as it lives itself: one that holds a `Dma` keeps it for good.
    pub fn before_unmap(&self, hook: impl Fn(u64, u64) + Send + Sync + 'static) {
        self.space.leaving.add_hook(Arc::new(hook));
    }

    /// Reads a structure, such as a descriptor. Errors as for [`Dma::read`].
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, iova: u64) -> Result<T, Errno> {
        let mut object = T::new_zeroed();
        self.read(iova, object.as_mut_bytes())?;
        Ok(object)
    }

    /// Writes a structure. Errors as for [`Dma::write`].
    pub fn write_obj<T: IntoBytes + Immutable>(&self, iova: u64, object: &T) -> Result<(), Errno> {
        self.write(iova, object.as_bytes())
    }
}

impl fmt::Debug for Dma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dma").finish_non_exhaustive()
    }
}

/// The address after a piece. EFAULT when more is to come and the address space ends there.
#[inline]
fn next(iova: u64, bytes: usize, done: bool) -> Result<u64, Errno> {
    if done { Ok(iova) } else { iova.checked_add(bytes as u64).ok_or(Errno::EFAULT) }
}
