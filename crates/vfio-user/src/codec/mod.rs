//! Messages as bytes (`vfio-user.rst: Commands`): the header, the fixed part of every message, and bounded decoders for
//! the variable parts. Nothing here does I/O, allocates an unchecked length, or panics, whatever the bytes are.

mod header;
mod messages;
mod request;

pub use header::{Command, Header, Kind};
pub use messages::{
    DirtyBitmap, DmaAccess, DmaMapMessage, DmaUnmapMessage, DmaWriteReply, IoFd, IoFdsMessage, MigData,
    RegionAccess, RegionWriteMulti, ShadowIoFd, SingleWrite, VersionMessage,
};
pub use request::{IrqData, Request, SetIrqs};

use limosa_protocol::Errno;
use zerocopy::FromBytes;

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The header's size field is below the header's own size.
    #[error("a message size of {0}, below the header's")]
    Size(u32),
    /// The header's type is neither command nor reply.
    #[error("message type {0} is neither command nor reply")]
    Type(u32),
    /// The body is shorter than its fixed part.
    #[error("a body of {got} bytes where at least {want} are needed")]
    Short {
        /// Bytes needed.
        want: usize,
        /// Bytes there.
        got: usize,
    },
    /// The body does not have the length that its own fields name.
    #[error("a body of {got} bytes where its fields make {want}")]
    Length {
        /// Bytes that the fields make.
        want: u64,
        /// Bytes there.
        got: usize,
    },
    /// A field has a value that it must not have.
    #[error("{0}")]
    Field(&'static str),
    /// The specification assigns no such message to this direction.
    #[error("{0} is not a message to a server")]
    Unknown(Command),
}

impl DecodeError {
    /// The errno with which to refuse the command.
    pub const fn errno(&self) -> Errno {
        match self {
            DecodeError::Unknown(_) => Errno::ENOSYS,
            _ => Errno::EINVAL,
        }
    }
}

/// Splits the fixed part off a body.
pub(crate) fn fixed<T: FromBytes>(body: &[u8]) -> Result<(T, &[u8]), DecodeError> {
    T::read_from_prefix(body).map_err(|_| DecodeError::Short { want: size_of::<T>(), got: body.len() })
}

#[cfg(test)]
mod tests;
