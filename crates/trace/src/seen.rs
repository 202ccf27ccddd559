//! The records of a source before they are decoded ([`Seen`]): messages, each with the part of its body that is kept, and system
//! calls.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use limosa_protocol::Errno;
use limosa_vfio_user::codec::Header;

use crate::event::Direction;

/// A record of a source. A conversation whose number it has was opened before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A vfio-user connection that was not seen before.
    Opened {
        /// When, in nanoseconds since 1970.
        time_ns: u64,
        /// Its number in this trace.
        conversation: u32,
        /// The device's name, for people.
        name: String,
        /// The process at its client's end, or the one that is traced.
        pid: Option<u32>,
        /// Whether the trace has its first message. If not, answers may come to requests that the trace does not have.
        is_whole: bool,
    },
    /// A whole message on a connection.
    Message {
        /// The connection.
        conversation: u32,
        /// Its direction.
        direction: Direction,
        /// The message.
        message: Message,
    },
    /// Bytes on a connection that are not a message.
    Malformed {
        /// When, in nanoseconds since 1970.
        time_ns: u64,
        /// The connection.
        conversation: u32,
        /// Their direction.
        direction: Direction,
        /// The bytes.
        malformed: Malformed,
    },
    /// A connection is over.
    Closed {
        /// When, in nanoseconds since 1970.
        time_ns: u64,
        /// The connection.
        conversation: u32,
    },
    /// A system call of a traced process.
    Call(Call),
    /// Something about the trace itself.
    Note {
        /// When, in nanoseconds since 1970.
        time_ns: u64,
        /// The process that it is about.
        pid: Option<u32>,
        /// What.
        text: String,
    },
}

/// A vfio-user message (`vfio-user.rst: Header`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// When its first byte came, in nanoseconds since 1970.
    pub began_ns: u64,
    /// When its last byte came.
    pub ended_ns: u64,
    /// Its header.
    pub header: Header,
    /// The beginning of its body, no more than [`HEAD_BYTES_MAX`](crate::framer::HEAD_BYTES_MAX).
    pub head: Vec<u8>,
    /// Bytes of its body.
    pub body_bytes: usize,
    /// The fds that came with it.
    pub fds: Vec<String>,
}

/// Bytes that are not a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// What is wrong with them.
    pub reason: String,
    /// Their beginning.
    pub head: Vec<u8>,
    /// How many there are.
    pub bytes: u64,
}

/// A system call on a file of VFIO or iommufd, or on the data fd of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// When it began, in nanoseconds since 1970.
    pub time_ns: u64,
    /// How long it took, in nanoseconds.
    pub duration_ns: u64,
    /// The process.
    pub pid: u32,
    /// The fd.
    pub fd: i32,
    /// What kind of file that is.
    pub file: FileKind,
    /// Its name, for people.
    pub name: String,
    /// Of a data fd, the name of the device whose session it is.
    pub device: Option<String>,
    /// Which call.
    pub action: Action,
    /// Its value, or its errno.
    pub result: Result<i64, Errno>,
}

/// What kind of file an fd leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A VFIO device: its cdev, or the fd that a group gave.
    Device,
    /// A VFIO group.
    Group,
    /// A VFIO container.
    Container,
    /// iommufd.
    Iommufd,
    /// The data fd of a migration session.
    Data,
    /// Something else that got an ioctl with VFIO's numbers.
    Other,
}

/// Which system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// ioctl(2).
    Ioctl {
        /// Its number.
        request: u32,
        /// The argument before the call; where it is a number, its 8 bytes.
        before: Vec<u8>,
        /// The argument after it.
        after: Vec<u8>,
        /// What the argument of a FEATURE call points to: the ranges of DMA_LOGGING_START before the call, the bitmap of
        /// DMA_LOGGING_REPORT after it, as far as it is kept.
        referred: Vec<u8>,
    },
    /// read(2) or a call like it.
    Read {
        /// Where, if the call says so.
        offset: Option<u64>,
        /// Bytes that were asked for.
        bytes: u64,
        /// The beginning of the data.
        head: Vec<u8>,
    },
    /// write(2) or a call like it.
    Write {
        /// Where, if the call says so.
        offset: Option<u64>,
        /// Bytes that were offered.
        bytes: u64,
        /// The beginning of them.
        head: Vec<u8>,
    },
    /// close(2).
    Close,
}

/// The clock of a trace: it begins with the system's time, and never goes back.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    began: Instant,
    began_ns: u64,
}

impl Clock {
    /// Begins now.
    pub fn start() -> Clock {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Clock { began: Instant::now(), began_ns: u64::try_from(since.as_nanos()).unwrap_or(0) }
    }

    /// Nanoseconds since 1970.
    pub fn now_ns(&self) -> u64 {
        self.began_ns.saturating_add(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}
