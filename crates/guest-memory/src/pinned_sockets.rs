//! [`PinnedBytes`] and stream sockets: guest memory that is received and sent where it lies, without a copy of it.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use limosa_foreign_fd::receive_at;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::PinnedBytes;
use crate::mapping::{copy_from_shared, copy_to_shared};

/// A part of the data that is sent in one call.
#[derive(Clone, Debug)]
pub enum SendPart<'a> {
    /// Bytes of this process.
    Bytes(&'a [u8]),
    /// Guest memory: bytes of a pinned range.
    Memory(&'a PinnedBytes, Range<usize>),
}

impl SendPart<'_> {
    /// How many bytes.
    pub fn len(&self) -> usize {
        match self {
            SendPart::Bytes(bytes) => bytes.len(),
            SendPart::Memory(_, range) => range.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// At most `most` bytes of the part, from byte `from` on.
    #[must_use]
    pub fn within(&self, from: usize, most: usize) -> Self {
        let from = from.min(self.len());
        let end = from + most.min(self.len() - from);
        match self {
            SendPart::Bytes(bytes) => SendPart::Bytes(&bytes[from..end]),
            SendPart::Memory(memory, range) => {
                SendPart::Memory(memory, range.start + from..range.start + end)
            }
        }
    }

    /// Appends the bytes to others. EFAULT if a page is missing; zeroes are then appended instead.
    pub fn append_to(&self, bytes: &mut Vec<u8>) -> Result<(), Errno> {
        match self {
            SendPart::Bytes(more) => bytes.extend_from_slice(more),
            SendPart::Memory(memory, range) => {
                let before = bytes.len();
                bytes.resize(before + range.len(), 0);
                memory.read(range.start, &mut bytes[before..]).inspect_err(|_| bytes[before..].fill(0))?;
            }
        }
        Ok(())
    }
}

/// As the system's calls have it.
fn system(errno: limosa_protocol::Errno) -> Errno {
    Errno::from_raw_os_error(errno.raw().cast_signed())
}

impl PinnedBytes {
    /// A part of the range. EFAULT beyond it.
    fn part(&self, range: Range<usize>) -> Result<NonNull<u8>, Errno> {
        if range.start > range.end || range.end > self.bytes {
            return Err(Errno::FAULT);
        }
        // SAFETY: no more than is pinned.
        Ok(unsafe { self.start.add(range.start) })
    }

    /// Receives from a stream socket, without waiting, into the range from `from` on, and then into `behind`, like
    /// recvmsg(2): possibly fewer bytes. EAGAIN if there is no data, EFAULT if a page is missing or the range was not
    /// pinned for writing, EPROTO if fds arrive. [`PinnedBytes::check`] tells whether all data reached the memory.
    pub fn receive(&self, socket: impl AsFd, from: usize, behind: &mut [u8]) -> Result<usize, Errno> {
        if !self.is_writable {
            return Err(Errno::FAULT);
        }
        let memory = self.part(from..self.bytes)?;
        let mut parts = [
            libc::iovec { iov_base: memory.as_ptr().cast(), iov_len: self.bytes - from },
            libc::iovec { iov_base: behind.as_mut_ptr().cast(), iov_len: behind.len() },
        ];
        // SAFETY: the first part is mapped and writable as long as `self` lives, and nobody has a reference to guest memory; the
        // second is the caller's alone.
        unsafe { receive_at(socket, &mut parts, RecvFlags::DONTWAIT) }
    }

    /// Sends parts over a stream socket, in order, without waiting, like sendmsg(2): possibly fewer bytes. EAGAIN if
    /// the socket accepts nothing, EFAULT if a page is missing or was not pinned for reading. Memory is sent with its
    /// contents at that moment.
    pub fn send(socket: impl AsFd, parts: &[SendPart<'_>]) -> Result<usize, Errno> {
        let parts: Vec<_> = parts
            .iter()
            .filter(|part| !part.is_empty())
            .take(PARTS_MAX)
            .map(|part| match part {
                SendPart::Bytes(bytes) => {
                    Ok(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() })
                }
                SendPart::Memory(memory, range) if memory.is_readable => {
                    let start = memory.part(range.clone())?;
                    Ok(libc::iovec { iov_base: start.as_ptr().cast(), iov_len: range.len() })
                }
                SendPart::Memory(..) => Err(Errno::FAULT),
            })
            .collect::<Result<_, _>>()?;
        // SAFETY: all zeroes is a value of this plain structure.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = parts.as_ptr().cast_mut();
        message.msg_iovlen = parts.len() as _;
        let flags = (SendFlags::DONTWAIT | SendFlags::NOSIGNAL).bits().cast_signed();
        // SAFETY: the message names the parts with their lengths; each is valid for reads as long as the caller lends it, which is
        // until the call has returned, and the kernel reads them only.
        let sent = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const message, flags) };
        usize::try_from(sent).map_err(|_| {
            let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            Errno::from_raw_os_error(errno)
        })
    }

    /// Copies bytes of the range. EFAULT beyond it, if a page is missing, and if it was not pinned for reading.
    pub fn read(&self, from: usize, into: &mut [u8]) -> Result<(), Errno> {
        if !self.is_readable {
            return Err(Errno::FAULT);
        }
        let memory = self.part(from..from.saturating_add(into.len()))?;
        // SAFETY: all of it is mapped as long as `self` lives; `into` is this thread's own.
        unsafe { copy_from_shared(memory.as_ptr(), into.as_mut_ptr(), into.len()) };
        self.check().map_err(system)
    }

    /// Copies bytes into the range. EFAULT beyond it, if a page is missing, and if it was not pinned for writing.
    pub fn write(&self, from: usize, bytes: &[u8]) -> Result<(), Errno> {
        if !self.is_writable {
            return Err(Errno::FAULT);
        }
        let memory = self.part(from..from.saturating_add(bytes.len()))?;
        // SAFETY: as for `read`, the other way round.
        unsafe { copy_to_shared(bytes.as_ptr(), memory.as_ptr(), bytes.len()) };
        self.check().map_err(system)
    }

    /// Whether a part of the range contains only zeroes at the moment of the call. A missing page counts as zeroes:
    /// see [`PinnedBytes::check`].
    pub fn is_zero(&self, range: Range<usize>) -> Result<bool, Errno> {
        if !self.is_readable {
            return Err(Errno::FAULT);
        }
        static ZEROES: [u8; 4096] = [0; 4096];
        let (mut at, mut left) = (self.part(range.clone())?, range.len());
        while left > 0 {
            let bytes = left.min(ZEROES.len());
            // SAFETY: within the range, which is mapped as long as `self` lives, and the zeroes. Whatever others write meanwhile, the
            // result is a number.
            let differs = unsafe { libc::memcmp(at.as_ptr().cast(), ZEROES.as_ptr().cast(), bytes) };
            if differs != 0 {
                return Ok(false);
            }
            // SAFETY: at most the end of the range.
            at = unsafe { at.add(bytes) };
            left -= bytes;
        }
        Ok(true)
    }
}

/// Parts that one system call takes (`limits.h: IOV_MAX`).
const PARTS_MAX: usize = 1024;
