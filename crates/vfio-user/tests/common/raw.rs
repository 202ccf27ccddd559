//! A vfio-user peer that knows nothing but bytes: it builds each message by hand from the tables of
//! the specification, so that a mistake in the crate's codec cannot hide behind itself.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const GET_REGION_INFO: u16 = 5;
pub const GET_REGION_IO_FDS: u16 = 6;
pub const GET_IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const REGION_READ: u16 = 9;
pub const REGION_WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const DMA_WRITE: u16 = 12;
pub const RESET: u16 = 13;
pub const REGION_WRITE_MULTI: u16 = 15;
pub const FEATURE: u16 = 16;
pub const MIG_DATA_READ: u16 = 17;
pub const MIG_DATA_WRITE: u16 = 18;

pub const NO_REPLY: u32 = 1 << 4;
pub const ERROR: u32 = 1 << 5;
pub const REPLY: u32 = 1;

pub const GET: u32 = 1 << 16;
pub const SET: u32 = 1 << 17;
pub const PROBE: u32 = 1 << 18;

pub const STOP: u32 = 1;
pub const RUNNING: u32 = 2;
pub const STOP_COPY: u32 = 3;
pub const RESUMING: u32 = 4;
pub const PRE_COPY: u32 = 6;

/// Errno numbers, spelled out for the same reason.
pub const EPERM: u32 = 1;
pub const ENOENT: u32 = 2;
pub const EIO: u32 = 5;
pub const EACCES: u32 = 13;
pub const EBUSY: u32 = 16;
pub const EBADF: u32 = 9;
pub const EEXIST: u32 = 17;
pub const ENODEV: u32 = 19;
pub const EINVAL: u32 = 22;
pub const ENOTTY: u32 = 25;
pub const ENOSYS: u32 = 38;
pub const EMSGSIZE: u32 = 90;

/// How long a reply may take before the test fails: far more than it needs.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Joins the native bytes of its arguments.
#[macro_export]
macro_rules! bytes {
    ($($field:expr),* $(,)?) => {{
        let mut out: Vec<u8> = Vec::new();
        $(out.extend_from_slice(&($field).to_ne_bytes());)*
        out
    }};
}

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub error: u32,
    pub body: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.body[at..at + 4].try_into().unwrap())
    }
    pub fn u64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.body[at..at + 8].try_into().unwrap())
    }
    /// Asserts that the reply is a success.
    #[track_caller]
    pub fn ok(self) -> Message {
        assert_eq!(self.flags & ERROR, 0, "command {} was refused with errno {}", self.command, self.error);
        assert_eq!(self.flags, REPLY);
        self
    }
    /// Asserts that the reply is an error with a header only, and returns its errno.
    #[track_caller]
    pub fn refused(&self) -> u32 {
        assert_eq!(self.flags, REPLY | ERROR, "command {} was not refused", self.command);
        assert!(self.body.is_empty(), "an error reply is a header only");
        assert!(self.fds.is_empty());
        self.error
    }
}

/// A message's header.
pub fn header(id: u16, command: u16, size: u32, flags: u32) -> Vec<u8> {
    bytes![id, command, size, flags, 0u32]
}

/// A whole message.
pub fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut out = header(id, command, 16 + body.len() as u32, flags);
    out.extend_from_slice(body);
    out
}

/// The peer's end of a connection.
pub struct Raw {
    pub socket: UnixStream,
    next_id: u16,
}

impl Raw {
    pub fn connect(path: &Path) -> Raw {
        Raw::new(UnixStream::connect(path).expect("connect"))
    }

    pub fn new(socket: UnixStream) -> Raw {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Raw { socket, next_id: 0x7f00 }
    }

    /// Connects and negotiates.
    pub fn negotiated(path: &Path) -> Raw {
        let mut raw = Raw::connect(path);
        raw.negotiate();
        raw
    }

    /// Connects and negotiates the role of a control client.
    pub fn control(path: &Path) -> Raw {
        let mut raw = Raw::connect(path);
        raw.ask_role("control").ok();
        raw
    }

    /// Negotiates with the capability of a role.
    pub fn ask_role(&mut self, role: &str) -> Message {
        let json = format!(r#"{{"capabilities":{{"max_msg_fds":16,"role":"{role}"}}}}"#);
        self.version(&format!("{json}{}", " ".repeat(200)))
    }

    pub fn negotiate(&mut self) -> Message {
        let json =
            r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"write_multiple":true}}"#;
        // Padding, so that the reply may be as long as it likes (a reply longer than the request is refused by QEMU).
        self.version(&format!("{json}{}", " ".repeat(200))).ok()
    }

    pub fn version(&mut self, json: &str) -> Message {
        let mut body = bytes![0u16, 0u16];
        body.extend_from_slice(json.as_bytes());
        body.push(0);
        self.call(VERSION, &body)
    }

    /// Sends bytes as they are, with fds.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        self.try_send(bytes, fds).expect("send");
    }

    pub fn try_send(&self, mut bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut first = true;
        while first || !bytes.is_empty() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if first && !fds.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
            }
            first = false;
            let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    pub fn next_id(&mut self) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    /// Sends a command and waits for its reply.
    #[track_caller]
    pub fn call(&mut self, command: u16, body: &[u8]) -> Message {
        self.call_fds(command, body, &[])
    }

    #[track_caller]
    pub fn call_fds(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Message {
        let id = self.next_id();
        self.send(&message(id, command, 0, body), fds);
        let reply = self.receive();
        assert_eq!((reply.id, reply.command), (id, command), "the reply is another message's");
        reply
    }

    /// Sends a command that wants no reply.
    pub fn post(&mut self, command: u16, body: &[u8]) {
        let id = self.next_id();
        self.send(&message(id, command, NO_REPLY, body), &[]);
    }

    /// Sends a command and does not wait for its reply; its id.
    pub fn ask(&mut self, command: u16, body: &[u8]) -> u16 {
        let id = self.next_id();
        self.send(&message(id, command, 0, body), &[]);
        id
    }

    /// Whether something has come that was not received yet, or the connection's end.
    pub fn has_something(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&Timespec::default())) == Ok(1)
    }

    /// Receives a message.
    #[track_caller]
    pub fn receive(&self) -> Message {
        self.try_receive().expect("the connection was closed")
    }

    /// Receives a message; `None` at the connection's end.
    #[track_caller]
    pub fn try_receive(&self) -> Option<Message> {
        let mut fds = Vec::new();
        let mut head = [0; 16];
        if !self.fill(&mut head, &mut fds) {
            return None;
        }
        let field16 = |at: usize| u16::from_ne_bytes(head[at..at + 2].try_into().unwrap());
        let field32 = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
        let size = field32(4) as usize;
        assert!((16..=256 << 20).contains(&size), "a message of {size} bytes");
        let mut body = vec![0; size - 16];
        assert!(self.fill(&mut body, &mut fds), "the connection was closed within a message");
        Some(Message {
            id: field16(0),
            command: field16(2),
            flags: field32(8),
            error: field32(12),
            body,
            fds,
        })
    }

    /// Fills a buffer; `false` when the connection ends before its first byte.
    fn fill(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> bool {
        let mut at = 0;
        while at < buffer.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut buffer[at..])];
            match recvmsg(self.socket.as_fd(), &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) if message.bytes == 0 => {
                    assert_eq!(at, 0, "the connection was closed within a message");
                    return false;
                }
                Ok(message) => {
                    at += message.bytes;
                    for part in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(received) = part {
                            fds.extend(received);
                        }
                    }
                }
                Err(rustix::io::Errno::CONNRESET) => return false,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => panic!("no message within {PATIENCE:?}: {errno}"),
            }
        }
        true
    }

    /// Waits for the connection's end, whatever still comes.
    pub fn expect_end(&self) {
        while self.try_receive().is_some() {}
    }

    // The requests that tests use most.

    #[track_caller]
    pub fn feature(&mut self, flags: u32, data: &[u8], argsz: u32) -> Message {
        let mut body = bytes![argsz, flags];
        body.extend_from_slice(data);
        self.call(FEATURE, &body)
    }

    #[track_caller]
    pub fn state(&mut self) -> u32 {
        self.feature(GET | 2, &[], 16).ok().u32(8)
    }

    #[track_caller]
    pub fn set_state(&mut self, state: u32) -> Message {
        self.feature(SET | 2, &bytes![state, -1i32], 16)
    }

    #[track_caller]
    pub fn region_read(&mut self, region: u32, offset: u64, count: u32) -> Message {
        self.call(REGION_READ, &bytes![offset, region, count])
    }

    /// Sends a read, and returns its id and the next message.
    #[track_caller]
    pub fn region_read_later(&mut self, region: u32, offset: u64, count: u32) -> (u16, Message) {
        let id = self.next_id();
        self.send(&message(id, REGION_READ, 0, &bytes![offset, region, count]), &[]);
        (id, self.receive())
    }

    #[track_caller]
    pub fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Message {
        let mut body = bytes![offset, region, data.len() as u32];
        body.extend_from_slice(data);
        self.call(REGION_WRITE, &body)
    }

    #[track_caller]
    pub fn mig_read(&mut self, size: u32) -> Message {
        self.call(MIG_DATA_READ, &bytes![size.wrapping_add(8), size])
    }

    #[track_caller]
    pub fn mig_write(&mut self, data: &[u8]) -> Message {
        let mut body = bytes![8 + data.len() as u32, data.len() as u32];
        body.extend_from_slice(data);
        self.call(MIG_DATA_WRITE, &body)
    }

    #[track_caller]
    pub fn dma_map(&mut self, iova: u64, size: u64, offset: u64, fd: Option<BorrowedFd<'_>>) -> Message {
        let fds: Vec<_> = fd.into_iter().collect();
        self.call_fds(DMA_MAP, &bytes![32u32, 3u32, offset, iova, size], &fds)
    }

    /// That the connection is in step and the device answers.
    #[track_caller]
    pub fn assert_usable(&mut self) {
        let info = self.call(GET_INFO, &bytes![16u32, 0u32, 0u32, 0u32]).ok();
        assert_eq!(info.body.len(), 16);
        assert_eq!(info.u32(0), 16);
        let id = self.region_read(7, 0, 2).ok();
        assert_eq!(id.body.len(), 18);
    }
}
