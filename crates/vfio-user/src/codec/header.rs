//! The header of every message (`vfio-user.rst: Header`).

use std::fmt;

use limosa_protocol::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::DecodeError;

/// The number of a message. Open: an unknown number survives a round trip.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Command(pub u16);

macro_rules! commands {
    ($($name:ident = $number:literal, $doc:literal;)*) => {
        impl Command {
            $(#[doc = $doc] pub const $name: Command = Command($number);)*

            /// Every message that the specification assigns, by number.
            pub const ALL: &[Command] = &[$(Command::$name),*];

            /// The specification's name without `VFIO_USER_`.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $($number => Some(stringify!($name)),)* _ => None }
            }
        }
    };
}

commands! {
    VERSION = 1, "Proposes a version and capabilities; the first message of a connection.";
    DMA_MAP = 2, "Gives the device access to memory; one fd if it can be mapped.";
    DMA_UNMAP = 3, "Removes access to memory.";
    DEVICE_GET_INFO = 4, "How many regions and interrupt indexes there are.";
    DEVICE_GET_REGION_INFO = 5, "One region; fds come back where it can be mapped.";
    DEVICE_GET_REGION_IO_FDS = 6, "The eventfds that stand for writes to parts of a region.";
    DEVICE_GET_IRQ_INFO = 7, "One interrupt index.";
    DEVICE_SET_IRQS = 8, "Sets up interrupts; the eventfds come as fds.";
    REGION_READ = 9, "Reads a region.";
    REGION_WRITE = 10, "Writes a region.";
    DMA_READ = 11, "Server to client: reads the client's memory.";
    DMA_WRITE = 12, "Server to client: writes the client's memory.";
    DEVICE_RESET = 13, "Resets the device.";
    DIRTY_PAGES = 14, "No longer in the specification.";
    REGION_WRITE_MULTI = 15, "Many small writes to regions in one message.";
    DEVICE_FEATURE = 16, "The FEATURE multiplexer.";
    MIG_DATA_READ = 17, "Reads from a saving session.";
    MIG_DATA_WRITE = 18, "Writes to a RESUMING session.";
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => write!(f, "message {}", self.0),
        }
    }
}

/// The header: 16 bytes in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Chosen by the sender of a command, echoed in its reply.
    pub id: u16,
    /// Which message.
    pub command: Command,
    /// Bytes of the whole message, including this header.
    pub size: u32,
    /// Bits 0 to 3 the type, then [`Header::NO_REPLY`] and [`Header::ERROR`].
    pub flags: u32,
    /// In a reply with [`Header::ERROR`] the errno, which may be 0; otherwise reserved.
    pub error: u32,
}

/// The kind of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A command that needs a reply.
    Command,
    /// A command without a reply, not even for an error.
    Posted,
    /// A reply.
    Reply,
    /// A reply that refuses.
    Refusal(Errno),
}

impl Header {
    /// The header's own size, in bytes.
    pub const BYTES: usize = size_of::<Header>();
    /// The bits of `flags` that hold the type.
    pub const TYPE_MASK: u32 = 0xf;
    /// Type of a command.
    pub const TYPE_COMMAND: u32 = 0;
    /// Type of a reply.
    pub const TYPE_REPLY: u32 = 1;
    /// Flag of a command: no reply is wanted.
    pub const NO_REPLY: u32 = 1 << 4;
    /// Flag of a reply: the command was refused.
    pub const ERROR: u32 = 1 << 5;

    /// The header of a command with this many bytes after it, or `None` if the size field cannot hold the size.
    pub fn command(id: u16, command: Command, body_bytes: usize) -> Option<Header> {
        let size = u32::try_from(body_bytes.checked_add(Header::BYTES)?).ok()?;
        Some(Header { id, command, size, flags: Header::TYPE_COMMAND, error: 0 })
    }

    /// The header of the reply to this command with this many bytes after it, or `None` if the size field cannot
    /// hold the size.
    pub fn reply(&self, body_bytes: usize) -> Option<Header> {
        let size = u32::try_from(body_bytes.checked_add(Header::BYTES)?).ok()?;
        Some(Header { size, flags: Header::TYPE_REPLY, error: 0, ..*self })
    }

    /// The complete reply that refuses this command.
    pub const fn refusal(&self, errno: Errno) -> Header {
        Header {
            id: self.id,
            command: self.command,
            size: Header::BYTES as u32,
            flags: Header::TYPE_REPLY | Header::ERROR,
            error: errno.raw(),
        }
    }

    /// The same command, posted: without a reply.
    #[must_use]
    pub const fn posted(self) -> Header {
        Header { flags: self.flags | Header::NO_REPLY, ..self }
    }

    /// The kind of the message. Unassigned flags are ignored.
    pub const fn kind(&self) -> Result<Kind, DecodeError> {
        match self.flags & Header::TYPE_MASK {
            Header::TYPE_COMMAND if self.flags & Header::NO_REPLY != 0 => Ok(Kind::Posted),
            Header::TYPE_COMMAND => Ok(Kind::Command),
            Header::TYPE_REPLY if self.flags & Header::ERROR != 0 => {
                // The errno is optional: a refusal without one is still a refusal.
                let errno = if self.error == 0 { Errno::EIO } else { Errno::from_raw(self.error) };
                Ok(Kind::Refusal(errno))
            }
            Header::TYPE_REPLY => Ok(Kind::Reply),
            other => Err(DecodeError::Type(other)),
        }
    }

    /// Bytes that follow the header.
    pub const fn body_bytes(&self) -> Result<usize, DecodeError> {
        match (self.size as usize).checked_sub(Header::BYTES) {
            Some(bytes) => Ok(bytes),
            None => Err(DecodeError::Size(self.size)),
        }
    }
}
