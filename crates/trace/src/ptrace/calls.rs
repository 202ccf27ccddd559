//! The system calls that matter to a trace, and where their buffers are. This is derived from the number and the arguments
//! alone.

/// `AUDIT_ARCH_*` of the programs whose calls are decoded: those of this program's architecture.
#[cfg(target_arch = "x86_64")]
pub const ARCH: u32 = 0xc000_003e;
/// `AUDIT_ARCH_*` of the programs whose calls are decoded: those of this program's architecture.
#[cfg(target_arch = "aarch64")]
pub const ARCH: u32 = 0xc000_00b7;

/// A system call that may matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syscall {
    /// ioctl(2): its number and argument.
    Ioctl { fd: i32, request: u32, argument: u64 },
    /// Bytes to or from a file.
    Transfer { fd: i32, is_write: bool, buffer: Buffer, offset: Option<u64> },
    /// close(2).
    Close { fd: i32 },
    /// A second fd for a file.
    Duplicate { fd: i32 },
    /// connect(2): where the address is, and its length.
    Connect { fd: i32, address: u64, length: u64 },
}

/// Where the bytes of a transfer are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// In one piece.
    Plain { address: u64, bytes: u64 },
    /// In pieces: this number of `struct iovec`.
    Vector { address: u64, count: u64 },
    /// Where a `struct msghdr` says.
    Message { address: u64 },
}

/// The call, if it may matter.
pub fn syscall(number: u64, args: [u64; 6]) -> Option<Syscall> {
    let fd = args[0] as i32;
    let plain = Buffer::Plain { address: args[1], bytes: args[2] };
    let vector = Buffer::Vector { address: args[1], count: args[2] };
    let transfer = |is_write, buffer, offset| Some(Syscall::Transfer { fd, is_write, buffer, offset });
    // Bytes that are only peeked at will be received again.
    let peeks = |flags: u64| flags & libc::MSG_PEEK as u64 != 0;
    #[cfg(target_arch = "x86_64")]
    if i64::try_from(number) == Ok(libc::SYS_dup2) {
        return Some(Syscall::Duplicate { fd });
    }
    match i64::try_from(number).ok()? {
        libc::SYS_ioctl => Some(Syscall::Ioctl { fd, request: args[1] as u32, argument: args[2] }),
        libc::SYS_recvfrom if peeks(args[3]) => None,
        libc::SYS_recvmsg if peeks(args[2]) => None,
        libc::SYS_read | libc::SYS_recvfrom => transfer(false, plain, None),
        libc::SYS_write | libc::SYS_sendto => transfer(true, plain, None),
        libc::SYS_readv => transfer(false, vector, None),
        libc::SYS_writev => transfer(true, vector, None),
        libc::SYS_pread64 => transfer(false, plain, Some(args[3])),
        libc::SYS_pwrite64 => transfer(true, plain, Some(args[3])),
        // The position is in the lower half on 64-bit systems; -1 is that of the file.
        libc::SYS_preadv | libc::SYS_preadv2 => {
            transfer(false, vector, Some(args[3]).filter(|at| *at != u64::MAX))
        }
        libc::SYS_pwritev | libc::SYS_pwritev2 => {
            transfer(true, vector, Some(args[3]).filter(|at| *at != u64::MAX))
        }
        libc::SYS_recvmsg => transfer(false, Buffer::Message { address: args[1] }, None),
        libc::SYS_sendmsg => transfer(true, Buffer::Message { address: args[1] }, None),
        libc::SYS_close => Some(Syscall::Close { fd }),
        libc::SYS_dup | libc::SYS_dup3 => Some(Syscall::Duplicate { fd }),
        libc::SYS_fcntl if matches!(args[1] as i32, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) => {
            Some(Syscall::Duplicate { fd })
        }
        libc::SYS_connect => Some(Syscall::Connect { fd, address: args[1], length: args[2] }),
        _ => None,
    }
}

/// Whether an ioctl has a number of VFIO or iommufd (`vfio.h: VFIO_TYPE`, `iommufd.h: IOMMUFD_TYPE`).
pub fn is_ours(request: u32) -> bool {
    let number = request & 0xff;
    request >> 8 == u32::from(b';') && (100..0xa0).contains(&number)
}

/// The fds in the control messages of a sendmsg(2) or recvmsg(2) (cmsg(3): SCM_RIGHTS), on a 64-bit system.
pub fn fds_of_control(mut control: &[u8]) -> Vec<i32> {
    const HEADER: usize = 16;
    let mut fds = Vec::new();
    while let Some((header, _)) = control.split_at_checked(HEADER) {
        let number = |at: usize| u64::from_ne_bytes(header[at..at + 8].try_into().unwrap_or_default());
        let length = usize::try_from(number(0)).unwrap_or(usize::MAX);
        let Some(message) = control.get(HEADER..length) else { break };
        let kind = [libc::SOL_SOCKET.to_ne_bytes(), libc::SCM_RIGHTS.to_ne_bytes()].concat();
        if header[8..] == kind[..] {
            fds.extend(message.as_chunks::<4>().0.iter().map(|fd| i32::from_ne_bytes(*fd)));
        }
        let next = length.next_multiple_of(8);
        if next > control.len() {
            break;
        }
        control = &control[next..];
    }
    fds
}

/// The bytes of the path of a UNIX socket's address (unix(7)); nothing for another address or one without a path.
pub fn path_of_address(address: &[u8]) -> Option<&[u8]> {
    let (family, path) = address.split_at_checked(2)?;
    if family != (libc::AF_UNIX as u16).to_ne_bytes() || path.first() == Some(&0) {
        return None;
    }
    path.split(|byte| *byte == 0).next().filter(|path| !path.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fds_are_found_among_control_messages() {
        let message = |kind: i32, data: &[u8]| {
            let mut bytes = (16 + data.len()).to_ne_bytes().to_vec();
            bytes.extend(libc::SOL_SOCKET.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes
        };
        let fds: Vec<u8> = [5i32, 6, 7].iter().flat_map(|fd| fd.to_ne_bytes()).collect();
        let control = [message(libc::SCM_CREDENTIALS, &[0; 12]), message(libc::SCM_RIGHTS, &fds)].concat();
        assert_eq!(fds_of_control(&control), [5, 6, 7]);
        assert!(fds_of_control(&control[..control.len() - 9]).is_empty(), "cut off");
    }

    #[test]
    fn paths_are_those_of_unix_sockets() {
        let address = [&(libc::AF_UNIX as u16).to_ne_bytes()[..], b"/run/a.sock\0\0"].concat();
        assert_eq!(path_of_address(&address), Some(&b"/run/a.sock"[..]));
        assert_eq!(path_of_address(&address[..2]), None);
        assert_eq!(path_of_address(&[2, 0, 1, 1]), None);
        assert_eq!(path_of_address(&[1, 0, 0, b'a']), None, "abstract");
    }

    proptest! {
        #[test]
        fn any_control_is_read(bytes in prop::collection::vec(any::<u8>(), 0..300), length in 0usize..400) {
            prop_assert!(fds_of_control(&bytes).len() <= bytes.len());
            let mut headed = length.to_ne_bytes().to_vec();
            headed.extend(libc::SOL_SOCKET.to_ne_bytes());
            headed.extend(libc::SCM_RIGHTS.to_ne_bytes());
            headed.extend(&bytes);
            prop_assert!(fds_of_control(&headed).len() <= bytes.len() / 4);
        }
    }
}
