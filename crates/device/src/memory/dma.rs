//! [`Dma`]: guest memory as a device accesses it.

use std::fmt;
use std::sync::Arc;

use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Pin;
use super::table::{Memory, Space};

/// Guest memory as a device accesses it: it reads, writes and marks pages, and cannot change the mappings. A clone
/// is cheap and accesses the same memory.
#[derive(Clone)]
pub struct Dma {
    space: Arc<Space>,
}

impl Dma {
    pub(super) fn new(space: Arc<Space>) -> Dma {
        Dma { space }
    }

    /// The device reads memory. EFAULT if an address is not mapped, or not for reading, or if its file was
    /// truncated; ranges may span mappings. Bytes read before the error are in `data`.
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

    /// The device writes memory; the pages go to the log if it is on. Errors as for [`Dma::read`]; bytes written
    /// before the error stay written.
    #[inline]
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let table = self.space.read_lock();
        if let Some((file, offset)) = table.at_hand(iova, data.len(), DmaMapFlags::WRITE) {
            let done = file.write(offset, data);
            // After the write, even if it failed: see `write_pieces`.
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
                    // An unmap that reads the log may come before the answer.
                    table.mark(iova, piece.len());
                    drop(table);
                    let done = remote.write(iova, piece);
                    table = self.space.read_lock();
                    done
                }
            };
            // After the write, since a report between the two would clear a mark before its data is written; and
            // even if it failed, since a part may have been written.
            table.mark(iova, piece.len());
            done?;
            iova = next(iova, piece.len(), after.is_empty())?;
            rest = after;
        }
        Ok(())
    }

    /// Marks a range in the log, if it is on: for a device that writes memory by other means than [`Dma::write`],
    /// such as hardware or a helper process with its own mapping. Call it after the write. The part beyond the end of
    /// the address space is ignored.
    pub fn mark_dirty(&self, iova: u64, bytes: u64) {
        let bytes = bytes.min((u64::MAX - iova).saturating_add(1));
        if bytes > 0 {
            self.space.read_lock().mark(iova, usize::try_from(bytes).unwrap_or(usize::MAX));
        }
    }

    /// Pins a range, so that a system call or io_uring can move data without a copy. `access` is the device's
    /// access: with WRITE, the pages are in the dirty log once the pin is dropped.
    ///
    /// EINVAL for an empty range or access; EFAULT as for [`Dma::read`]; ENOTSUP if the memory is not mapped into this
    /// process, for example if it is accessed by messages (use reads and writes then); EBUSY while it is being
    /// unmapped.
    pub fn pin(&self, iova: u64, bytes: u64, access: DmaMapFlags) -> Result<Pin, Errno> {
        Pin::new(&self.space, iova, bytes, access)
    }

    /// Registers `hook`, which is called with address and size before an unmap, so that the device drops its pins.
    /// A size of `u64::MAX` from 0 on means everything. It is called on the client's thread, without a lock of the
    /// memory; accesses still succeed. If pins are left [`UNMAP_WAIT`](super::UNMAP_WAIT) later, the unmap fails with
    /// EBUSY.
    ///
    /// When another client takes over in one step ([`Machine::hand_over`](crate::Machine::hand_over)), the hook is
    /// called right after that client's mappings have replaced the former ones: new pins are pins of the new mappings.
    ///
    /// The memory keeps the hook until it is dropped itself, so a hook with a `Dma` in it is a cycle that is never
    /// freed.
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

/// The address after a piece. EFAULT if there are more pieces and the address space ends there.
#[inline]
fn next(iova: u64, bytes: usize, done: bool) -> Result<u64, Errno> {
    if done { Ok(iova) } else { iova.checked_add(bytes as u64).ok_or(Errno::EFAULT) }
}
