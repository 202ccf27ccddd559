//! The contents of a call, read from the memory and the fds of its process, before and after the call.

use limosa_protocol::feature::{FeatureDmaLoggingControl, FeatureDmaLoggingReport};
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp};
use zerocopy::FromBytes;

use super::calls::{Buffer, Syscall, fds_of_control, is_ours, path_of_address};
use super::files::{self, File};
use super::os::read_memory;
use super::tracer::{Entered, Tracer, What};
use crate::decode::{FEATURE, GROUP_GET_DEVICE_FD, data_fd};
use crate::framer::{DATA_HEAD_BYTES_MAX, FDS_MAX, HEAD_BYTES_MAX};
use crate::seen::{Action, Call, FileKind, Seen};

/// Limit on the bytes of an ioctl's argument that are read. The structures of `vfio.h` and `iommufd.h` have some dozens of
/// bytes, and what follows them has a few kilobytes.
const ARGUMENT_BYTES_MAX: usize = 4096;
/// Bytes of a transfer that are read at once.
const PIECE_BYTES: usize = 64 << 10;
/// The most bytes that the system transfers at once (read(2)).
const TRANSFER_BYTES_MAX: usize = 0x7fff_f000;
/// The most pieces of one transfer (`limits.h: IOV_MAX`).
const VECTOR_MAX: usize = 1024;
/// The most bytes of control messages that are read.
const CONTROL_BYTES_MAX: usize = 4096;
/// The longest address of a UNIX socket (unix(7)).
const ADDRESS_BYTES_MAX: usize = 110;
/// The most devices whose sessions are counted.
const DEVICES_MAX: usize = 4096;

/// Reads up to this number of bytes.
fn memory(pid: i32, address: u64, bytes: usize) -> Vec<u8> {
    let mut read = vec![0; bytes];
    let got = if address == 0 { 0 } else { read_memory(pid, address, &mut read) };
    read.truncate(got);
    read
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// The argument of an ioctl. Its first word tells its length (`argsz`, `size`), for most.
fn argument(pid: i32, request: u32, address: u64) -> Vec<u8> {
    match request & 0xff {
        // GET_API_VERSION, GROUP_UNSET_CONTAINER and DEVICE_RESET have none.
        100 | 105 | 111 => Vec::new(),
        // CHECK_EXTENSION and SET_IOMMU have a number.
        101 | 102 => address.to_ne_bytes().to_vec(),
        // GROUP_SET_CONTAINER has an fd, GROUP_GET_DEVICE_FD a name.
        104 => memory(pid, address, 4),
        106 => memory(pid, address, 64),
        _ => {
            let first = memory(pid, address, 4);
            let Ok(length) = first.try_into().map(u32::from_ne_bytes) else { return Vec::new() };
            memory(pid, address, usize::try_from(length).unwrap_or(usize::MAX).clamp(8, ARGUMENT_BYTES_MAX))
        }
    }
}

/// What the argument of a FEATURE call points to: the ranges of DMA_LOGGING_START, the bitmap of DMA_LOGGING_REPORT.
fn referred(pid: i32, argument: &[u8], is_before: bool) -> Vec<u8> {
    let Ok((header, payload)) = FeatureHeader::read_from_prefix(argument) else { return Vec::new() };
    if FeatureOp::from_bits_truncate(header.flags).contains(FeatureOp::PROBE) {
        return Vec::new();
    }
    let bytes = match FeatureIndex((header.flags & 0xffff) as u16) {
        FeatureIndex::DMA_LOGGING_START if is_before => {
            let Ok((control, _)) = FeatureDmaLoggingControl::read_from_prefix(payload) else {
                return Vec::new();
            };
            (control.num_ranges as usize).saturating_mul(16)
        }
        FeatureIndex::DMA_LOGGING_REPORT if !is_before => {
            let Ok((report, _)) = FeatureDmaLoggingReport::read_from_prefix(payload) else {
                return Vec::new();
            };
            usize::try_from(report.bitmap_bytes()).unwrap_or(usize::MAX)
        }
        _ => return Vec::new(),
    };
    let fixed = size_of::<FeatureDmaLoggingReport>().min(payload.len());
    let fixed = match FeatureIndex((header.flags & 0xffff) as u16) {
        FeatureIndex::DMA_LOGGING_START => size_of::<FeatureDmaLoggingControl>(),
        _ => fixed,
    };
    memory(pid, word(payload, fixed), bytes.min(HEAD_BYTES_MAX))
}

/// Where the bytes of a transfer are, as addresses and lengths.
fn pieces(pid: i32, buffer: Buffer) -> Vec<(u64, u64)> {
    let (address, count) = match buffer {
        Buffer::Plain { address, bytes } => return vec![(address, bytes)],
        Buffer::Vector { address, count } => (address, count),
        Buffer::Message { address } => {
            // struct msghdr: name, its length, then the pieces and their number.
            let message = memory(pid, address, 56);
            (word(&message, 16), word(&message, 24))
        }
    };
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(VECTOR_MAX);
    let vector = memory(pid, address, count * 16);
    vector.as_chunks::<16>().0.iter().map(|piece| (word(piece, 0), word(piece, 8))).collect()
}

/// The fds in the control messages of a message, with what they lead to.
fn fds(pid: i32, buffer: Buffer) -> Vec<String> {
    let Buffer::Message { address } = buffer else { return Vec::new() };
    // struct msghdr: the control messages and their length are behind the pieces.
    let message = memory(pid, address, 56);
    let bytes = usize::try_from(word(&message, 40)).unwrap_or(usize::MAX).min(CONTROL_BYTES_MAX);
    let control = memory(pid, word(&message, 32), bytes);
    let name = |fd: i32| {
        let link = files::link(pid, fd).unwrap_or_else(|| "?".to_owned());
        format!("{fd} {}", files::shown(&link))
    };
    fds_of_control(&control).into_iter().take(FDS_MAX).map(name).collect()
}

impl Tracer<'_> {
    /// Called before a system call. `None` if the call does not matter.
    pub(super) fn before(&mut self, pid: i32, call: &Syscall) -> Option<What> {
        let process = self.processes.get(&pid)?;
        match *call {
            Syscall::Ioctl { fd, request, argument: address } => {
                if !is_ours(request) {
                    return None;
                }
                let link = files::link(pid, fd).unwrap_or_else(|| format!("fd {fd}"));
                let file = process.files.file(fd, &link);
                let before = argument(pid, request, address);
                let referred = if request == FEATURE { referred(pid, &before, true) } else { Vec::new() };
                Some(What::File(file, before, referred))
            }
            Syscall::Transfer { fd, .. } => {
                let link = files::link(pid, fd)?;
                if let Some(inode) = files::socket_inode(&link) {
                    let matters = !self.sockets.is_other(inode);
                    return matters.then_some(What::Socket { inode, is_done: false });
                }
                let file = process.files.file(fd, &link);
                let matters = matches!(file.kind, FileKind::Device | FileKind::Data);
                matters.then(|| What::File(file, Vec::new(), Vec::new()))
            }
            Syscall::Close { fd } => {
                if !process.files.is_made(fd) {
                    return None;
                }
                let file = process.files.file(fd, &files::link(pid, fd)?);
                Some(What::File(file, Vec::new(), Vec::new()))
            }
            Syscall::Duplicate { .. } => Some(What::Fd),
            Syscall::Connect { fd, address, length } => {
                let inode = files::socket_inode(&files::link(pid, fd)?)?;
                let length = usize::try_from(length).unwrap_or(usize::MAX).min(ADDRESS_BYTES_MAX);
                let address = memory(pid, address, length);
                if let Some(path) = path_of_address(&address) {
                    self.sockets.connected(inode, path);
                }
                None
            }
        }
    }

    /// Called after a system call.
    pub(super) fn after(&mut self, pid: i32, entered: Entered, result: Result<i64, Errno>, time_ns: u64) {
        match (entered.call, &entered.what) {
            (Syscall::Duplicate { fd }, _) => {
                if let (Ok(to), Some(process)) = (result, self.processes.get_mut(&pid)) {
                    process.files.duplicate(fd, i32::try_from(to).unwrap_or(-1));
                }
            }
            (Syscall::Transfer { is_write: true, .. }, What::Socket { inode, is_done }) => {
                if let (Ok(bytes), false) = (result, *is_done) {
                    self.write(pid, *inode, &entered, Some(bytes.unsigned_abs()));
                }
            }
            (Syscall::Transfer { is_write: false, buffer, .. }, What::Socket { inode, .. }) => match result {
                Ok(0) => self.sockets.ended(*inode, self.recorder),
                Ok(bytes) => {
                    let fds = fds(pid, buffer);
                    self.frame(
                        (pid, *inode),
                        false,
                        (time_ns, pieces(pid, buffer)),
                        bytes.unsigned_abs(),
                        fds,
                    );
                }
                Err(_) => {}
            },
            (call, What::File(file, before, referred)) => {
                let (file, before, referred) = (file.clone(), before.clone(), referred.clone());
                self.call(pid, call, file, (before, referred), (entered.time_ns, time_ns), result);
            }
            _ => {}
        }
    }

    /// Bytes were written to a socket: this number, or all of the call's bytes.
    pub(super) fn write(&mut self, pid: i32, inode: u64, entered: &Entered, bytes: Option<u64>) {
        let Syscall::Transfer { buffer, .. } = entered.call else { return };
        let (pieces, fds) = (pieces(pid, buffer), fds(pid, buffer));
        self.frame((pid, inode), true, (entered.time_ns, pieces), bytes.unwrap_or(u64::MAX), fds);
    }

    fn frame(
        &mut self,
        (pid, inode): (i32, u64),
        is_write: bool,
        (time_ns, pieces): (u64, Vec<(u64, u64)>),
        bytes: u64,
        mut fds: Vec<String>,
    ) {
        let existed = self.processes.get(&pid).is_some_and(|process| process.existed);
        let mut left = usize::try_from(bytes).unwrap_or(usize::MAX).min(TRANSFER_BYTES_MAX);
        for (mut address, length) in pieces {
            let mut length = usize::try_from(length).unwrap_or(usize::MAX).min(left);
            left -= length;
            while length > 0 {
                let unread = self.sockets.unread(inode, is_write).min(length);
                if unread > 0 {
                    self.sockets.skip(inode, is_write, unread, self.recorder);
                    address = address.saturating_add(unread as u64);
                    length -= unread;
                    continue;
                }
                let piece = memory(pid, address, length.min(PIECE_BYTES));
                if piece.is_empty() {
                    // It was unmapped meanwhile, or the process is gone.
                    return;
                }
                self.sockets.bytes(
                    (pid, inode),
                    (is_write, existed),
                    (time_ns, &piece),
                    std::mem::take(&mut fds),
                    self.recorder,
                );
                address = address.saturating_add(piece.len() as u64);
                length -= piece.len();
            }
        }
    }

    /// A call on a file of VFIO or iommufd, or on a data fd.
    fn call(
        &mut self,
        pid: i32,
        call: Syscall,
        file: File,
        (before, referred_before): (Vec<u8>, Vec<u8>),
        (began_ns, ended_ns): (u64, u64),
        result: Result<i64, Errno>,
    ) {
        let done = result.ok().map_or(0, |value| usize::try_from(value).unwrap_or(0));
        let (fd, action) = match call {
            Syscall::Ioctl { fd, request, argument: address } => {
                let after = if before.is_empty() { Vec::new() } else { argument(pid, request, address) };
                self.made(pid, request, &file, (&before, &after), result);
                let after_it = if request == FEATURE { referred(pid, &after, false) } else { Vec::new() };
                let referred = if referred_before.is_empty() { after_it } else { referred_before };
                (fd, Action::Ioctl { request, before, after, referred })
            }
            Syscall::Transfer { fd, is_write, buffer, offset } => {
                let pieces = pieces(pid, buffer);
                let bytes = pieces.iter().fold(0, |sum: u64, (_, length)| sum.saturating_add(*length));
                let (address, length) = pieces.first().copied().unwrap_or_default();
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                let head = memory(pid, address, done.min(length).min(DATA_HEAD_BYTES_MAX));
                (
                    fd,
                    match is_write {
                        true => Action::Write { offset, bytes, head },
                        false => Action::Read { offset, bytes, head },
                    },
                )
            }
            Syscall::Close { fd } => {
                if let Some(process) = self.processes.get_mut(&pid) {
                    process.files.close(fd);
                }
                (fd, Action::Close)
            }
            Syscall::Duplicate { .. } | Syscall::Connect { .. } => return,
        };
        self.recorder.record(Seen::Call(Call {
            time_ns: began_ns,
            duration_ns: ended_ns.saturating_sub(began_ns),
            pid: pid.unsigned_abs(),
            fd,
            file: file.kind,
            name: file.name,
            device: file.device,
            action,
            result,
        }));
    }

    /// Notes an fd that an ioctl returned.
    fn made(
        &mut self,
        pid: i32,
        request: u32,
        file: &File,
        (before, after): (&[u8], &[u8]),
        result: Result<i64, Errno>,
    ) {
        let Ok(value) = result else { return };
        let Some(process) = self.processes.get_mut(&pid) else { return };
        if request == GROUP_GET_DEVICE_FD {
            let fd = i32::try_from(value).unwrap_or(-1);
            let name = before.split(|byte| *byte == 0).next().unwrap_or_default();
            if let Some(link) = files::link(pid, fd) {
                process.files.device(fd, name, link);
            }
            return;
        }
        let Ok((header, payload)) = FeatureHeader::read_from_prefix(after) else { return };
        let index = FeatureIndex((header.flags & 0xffff) as u16);
        if request == FEATURE
            && let Some(fd) = data_fd(index, header.flags, payload)
            && let Some(link) = files::link(pid, fd)
        {
            if self.sessions.len() >= DEVICES_MAX {
                self.sessions.clear();
            }
            let session = self.sessions.entry(file.name.clone()).or_default();
            *session += 1;
            process.files.data(fd, &file.name, *session, link);
        }
    }
}
