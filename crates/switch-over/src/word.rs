//! The commit word: which of two processes serves.
//!
//! It is the first 32-bit word of a sealed memfd that the old server makes for each attempt and that both map.
//!
//! | word      | who writes it, and when                                             | who may serve             |
//! |-----------|---------------------------------------------------------------------|---------------------------|
//! | KEPT      | the old one, as it makes the memfd                                  | the old one               |
//! | OPEN      | the old one, once it is frozen and has collected all that it gives  | neither yet               |
//! | TAKEN     | the new one by compare-and-swap from OPEN, right before it serves   | the new one, for good     |
//! | WITHDRAWN | the old one by swap, whatever was there but TAKEN                   | the old one, for good     |
//! | another   | neither; a defect or a third process                                | the old one               |
//!
//! The swap to WITHDRAWN and the compare-and-swap to TAKEN are single atomic operations on one word, so one of them comes
//! first. If it is TAKEN, the old one's swap returns TAKEN, and it never serves again. If it is WITHDRAWN, the new one's
//! compare-and-swap fails, and it never serves. Neither needs the other to be alive to find out. So the old one decides at any
//! time: when its limit has passed, when the socket ends, when the new process is gone. The new one goes on when the old process
//! dies after END, as it has all that it needs then.
//!
//! There is no state between TAKEN and serving. A second one, *committed but not serving yet*, from which the old one would
//! take back once the new process is proved dead, would need a second swap right before the first effect, and a process
//! that is killed between that swap and the effect leaves the same gap. So the only swap is placed there: a [`Taker`](crate::Taker)
//! does all that can fail or takes time before it, and only opens a gate after it. A new process that is killed later is
//! a server that was killed as it served.
//!
//! `tests` enumerates all interleavings of both sides, with deaths and limits that pass at each step.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, ftruncate};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// The old server serves, or has not collected all yet.
pub(crate) const KEPT: u32 = 0x4b45_5054;
/// The new server may take over.
pub(crate) const OPEN: u32 = 0x4f50_454e;
/// The new server serves.
pub(crate) const TAKEN: u32 = 0x5441_4b45;
/// The old server serves again.
pub(crate) const WITHDRAWN: u32 = 0x5749_5448;

/// Which of the two serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Serves {
    Old,
    New,
}

/// What the old server's swap to WITHDRAWN decided, by the value that it replaced.
pub(crate) fn after_swap(previous: u32) -> Serves {
    if previous == TAKEN { Serves::New } else { Serves::Old }
}

/// Bytes of the memfd: a page of every size that Linux has would do; a mapping needs one at least.
const BYTES: u64 = 4096;
const TMPFS_MAGIC: u64 = 0x0102_1994;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// The word, mapped.
#[derive(Debug)]
pub(crate) struct Word {
    address: NonNull<AtomicU32>,
    memfd: OwnedFd,
}

// SAFETY: the mapping lives as long as the value, and all that is done with it are atomic operations.
unsafe impl Send for Word {}
// SAFETY: as above.
unsafe impl Sync for Word {}

/// A memfd that is sealed against more seals, or is about to be.
pub(crate) fn memfd(name: &str) -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3.
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        made => made,
    }
}

impl Word {
    /// The old server's: KEPT, in a memfd of its own.
    pub(crate) fn new() -> Result<Word, Errno> {
        let memfd = memfd("limosa: commit word")?;
        ftruncate(&memfd, BYTES)?;
        fcntl_add_seals(&memfd, SEALS)?;
        let word = Word::map(memfd)?;
        word.get().store(KEPT, SeqCst);
        Ok(word)
    }

    /// The new server's. EINVAL for a file that is not such a memfd.
    pub(crate) fn adopt(memfd: OwnedFd) -> Result<Word, Errno> {
        // The file system of memory is asked about its files only once it is known to be one.
        let seals = fcntl_get_seals(&memfd)?;
        let is_tmpfs = fstatfs(&memfd)?.f_type as u64 == TMPFS_MAGIC;
        if !seals.contains(SEALS) || !is_tmpfs || fstat(&memfd)?.st_size as u64 != BYTES {
            return Err(Errno::INVAL);
        }
        Word::map(memfd)
    }

    fn map(memfd: OwnedFd) -> Result<Word, Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses where, so no memory that is in use changes.
        let address = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), BYTES as usize, protection, MapFlags::SHARED, &memfd, 0)
        }?;
        let address = NonNull::new(address.cast()).ok_or(Errno::NOMEM)?;
        Ok(Word { address, memfd })
    }

    /// The file, for the new server.
    pub(crate) fn memfd(&self) -> impl AsFd {
        &self.memfd
    }

    fn get(&self) -> &AtomicU32 {
        // SAFETY: the address is that of a page that `map` mapped for reading and writing and that stays mapped as long as
        // `self`. Its file has this page and cannot be made shorter (F_SEAL_SHRINK, checked or set before it was mapped), so an
        // access raises no SIGBUS. A page is aligned for the word. Other processes may write any value at any time: each is
        // a valid u32, and no reference but to the atomic is made.
        unsafe { self.address.as_ref() }
    }

    /// The old server's, once it has collected all. `false` if the word was not KEPT.
    pub(crate) fn open(&self) -> bool {
        self.get().compare_exchange(KEPT, OPEN, SeqCst, SeqCst).is_ok()
    }

    /// The new server's, right before it serves. `false` if the old one serves.
    pub(crate) fn take(&self) -> bool {
        self.get().compare_exchange(OPEN, TAKEN, SeqCst, SeqCst).is_ok()
    }

    /// The old server's, before it serves again.
    pub(crate) fn withdraw(&self) -> Serves {
        let serves = after_swap(self.get().swap(WITHDRAWN, SeqCst));
        // The new one does not look again. Whoever asks once more is told the same.
        if serves == Serves::New {
            self.get().store(TAKEN, SeqCst);
        }
        serves
    }
}

impl Drop for Word {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` and by nobody else; references to it borrow `self`.
        if let Err(error) = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), BYTES as usize) } {
            tracing::error!(%error, "the commit word cannot be unmapped");
        }
    }
}

/// A sealed memfd with these bytes.
pub(crate) fn sealed(bytes: &[u8]) -> std::io::Result<OwnedFd> {
    let mut file = File::from(memfd("limosa: item")?);
    std::io::Write::write_all(&mut file, bytes)?;
    fcntl_add_seals(&file, SEALS | SealFlags::WRITE)?;
    Ok(file.into())
}

/// The bytes of a sealed memfd, which must be so many.
pub(crate) fn unsealed(memfd: impl AsFd, bytes: usize) -> std::io::Result<Vec<u8>> {
    let seals = fcntl_get_seals(&memfd)?;
    let is_sealed = seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE);
    if !is_sealed || fstat(&memfd)?.st_size as u64 != bytes as u64 {
        return Err(Errno::INVAL.into());
    }
    let mut into = vec![0; bytes];
    let file = File::from(memfd.as_fd().try_clone_to_owned()?);
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut into, 0)?;
    Ok(into)
}

#[cfg(test)]
#[path = "word_tests.rs"]
mod tests;
