//! Receiving from a socket without leaving the kernel an fd to close.

use std::io::IoSliceMut;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::process::{Resource, getrlimit};

use crate::ForeignFd;

/// The most fds that the kernel passes with one send (`net/scm.h: SCM_MAX_FD`).
pub const FDS_MAX: usize = 253;

/// What [`receive`] received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes; 0 at the end of the stream.
    pub bytes: usize,
    /// More fds arrived than this process may have. All fds with these bytes were given to the closer.
    pub lost_fds: bool,
}

/// Receives from a socket, with all the fds that come, which are appended to `fds` with close-on-exec set. Errors are those
/// of recvmsg(2).
///
/// Fds are dropped if they nearly fill this process's table of open files ([`Received::lost_fds`]): once it is full,
/// the kernel closes excess fds in this thread.
pub fn receive(
    socket: impl AsFd,
    into: &mut [u8],
    flags: RecvFlags,
    fds: &mut Vec<ForeignFd>,
) -> Result<Received, Errno> {
    receive_into(socket, &mut [IoSliceMut::new(into)], flags, fds)
}

fn receive_into(
    socket: impl AsFd,
    into: &mut [IoSliceMut<'_>],
    flags: RecvFlags,
    fds: &mut Vec<ForeignFd>,
) -> Result<Received, Errno> {
    // An `IoSliceMut` is a `struct iovec` by its documentation.
    let (parts, count) = (into.as_mut_ptr().cast(), into.len());
    // SAFETY: the parts are those of `into`, which nobody else uses until the call has returned.
    unsafe { receive_to(socket, parts, count, flags, fds) }
}

/// # Safety
///
/// `parts` points to `count` parts, and each is valid for writes of its length until the call has returned.
unsafe fn receive_to(
    socket: impl AsFd,
    parts: *mut libc::iovec,
    count: usize,
    flags: RecvFlags,
    fds: &mut Vec<ForeignFd>,
) -> Result<Received, Errno> {
    let mut control = Control([MaybeUninit::uninit(); CONTROL_BYTES]);
    // SAFETY: all zeros is a value of this plain structure.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = parts;
    message.msg_iovlen = count as _;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES as _;
    let flags = flags.bits().cast_signed() | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the message names the parts, by the contract valid for writes, and the control buffer, all with their lengths; they
    // live until the call has returned.
    let got = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, flags) };
    let Ok(bytes) = usize::try_from(got) else {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        return Err(Errno::from_raw_os_error(errno));
    };
    let mut lost_fds = message.msg_flags & libc::MSG_CTRUNC != 0;
    if message.msg_controllen > 0 {
        let before = fds.len();
        // SAFETY: recvmsg has just filled the message in.
        unsafe { take(&message, fds) };
        if fds[before..].iter().any(is_too_high) {
            fds.truncate(before);
            lost_fds = true;
        }
    }
    Ok(Received { bytes, lost_fds })
}

/// Receives from a socket on which no fds are due. [`Errno::PROTO`] when some come all the same; the closer closes them.
pub fn receive_bytes(socket: impl AsFd, into: &mut [u8], flags: RecvFlags) -> Result<usize, Errno> {
    receive_parts(socket, &mut [IoSliceMut::new(into)], flags)
}

/// The same into several buffers, one after the other.
pub fn receive_parts(
    socket: impl AsFd,
    into: &mut [IoSliceMut<'_>],
    flags: RecvFlags,
) -> Result<usize, Errno> {
    let mut fds = Vec::new();
    let received = receive_into(socket, into, flags, &mut fds)?;
    if fds.is_empty() && !received.lost_fds { Ok(received.bytes) } else { Err(Errno::PROTO) }
}

/// The same into memory given by its address, such as memory that is shared with other processes.
///
/// # Safety
///
/// Each part is valid for writes of its length until the call has returned, and there is no reference to it during the
/// call.
pub unsafe fn receive_at(
    socket: impl AsFd,
    parts: &mut [libc::iovec],
    flags: RecvFlags,
) -> Result<usize, Errno> {
    let mut fds = Vec::new();
    // SAFETY: by the contract.
    let received = unsafe { receive_to(socket, parts.as_mut_ptr(), parts.len(), flags, &mut fds) }?;
    if fds.is_empty() && !received.lost_fds { Ok(received.bytes) } else { Err(Errno::PROTO) }
}

/// Room for the most fds, and before them for what a peer can switch on for a socket that it made: credentials, a pidfd
/// and a security label.
const CONTROL_BYTES: usize = space(FDS_MAX * size_of::<i32>()) + space(12) + space(4) + space(256);

const fn space(bytes: usize) -> usize {
    // SAFETY: it only computes.
    unsafe { libc::CMSG_SPACE(bytes as u32) as usize }
}

/// Aligned for the headers of control messages.
#[repr(C, align(16))]
struct Control([MaybeUninit<u8>; CONTROL_BYTES]);

const _: () = assert!(align_of::<libc::cmsghdr>() <= align_of::<Control>());

/// Takes every fd in the control messages.
///
/// # Safety
///
/// The message is as recvmsg has filled it in, and its fds were not taken before.
unsafe fn take(message: &libc::msghdr, fds: &mut Vec<ForeignFd>) {
    /// `SCM_PIDFD`: an fd of the sender's process, for a socket with SO_PASSPIDFD.
    const SCM_PIDFD: i32 = 4;
    // SAFETY: the kernel has filled in so many bytes of the control buffer as the message says.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    while let Some(header) = ptr::NonNull::new(next) {
        // SAFETY: the header lies wholly in what was filled in, or there would be none; it is aligned as the buffer is.
        let libc::cmsghdr { cmsg_len, cmsg_level, cmsg_type, .. } = unsafe { header.read() };
        if cmsg_level == libc::SOL_SOCKET && matches!(cmsg_type, libc::SCM_RIGHTS | SCM_PIDFD) {
            // SAFETY: only computes where the data begins.
            let data = unsafe { libc::CMSG_DATA(header.as_ptr()) }.cast::<[u8; 4]>();
            // SAFETY: only computes.
            let data_bytes = (cmsg_len as u64).saturating_sub(unsafe { libc::CMSG_LEN(0) }.into());
            // SAFETY: the kernel fills in whole messages, also when it leaves some out, so so many bytes are there; they are
            // bytes, and nobody writes them as long as the message is borrowed.
            let numbers = unsafe { std::slice::from_raw_parts(data, data_bytes as usize / 4) };
            for number in numbers {
                let fd = i32::from_ne_bytes(*number);
                // In the place of a pidfd there can be an errno.
                if fd < 0 {
                    continue;
                }
                // SAFETY: the kernel has just installed it for this call, and nobody else knows it.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                // A pidfd was not sent, and closing one never blocks.
                if cmsg_type == libc::SCM_RIGHTS {
                    fds.push(ForeignFd::from(fd));
                }
            }
        }
        // SAFETY: as for the first header.
        next = unsafe { libc::CMSG_NXTHDR(message, header.as_ptr()) };
    }
}

/// Whether the fd shows that the table of open files is nearly full: the kernel gives the lowest number that is free.
fn is_too_high(fd: &ForeignFd) -> bool {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return false };
    // Room for the next message's fds, and for those that this process opens itself.
    let reserve = (FDS_MAX as u64 + 64).min(limit / 2);
    fd.as_raw_fd() as u64 >= limit - reserve
}
