//! The data stream of a migration session (`vfio.h`: the data fd of
//! `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`).

use limosa_protocol::feature::PrecopyInfo;

use crate::Result;

/// The result of a read of a saving session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// This many bytes, at least one.
    Data(usize),
    /// Nothing for now (ENOMSG): possible in PRE_COPY and PRE_COPY_P2P only. More may come, at the
    /// latest in STOP_COPY.
    NothingForNow,
    /// The end: possible in STOP_COPY only. The whole state has been read.
    End,
}

/// The data stream of one session. It has one owner, which may be a different thread from the one that drives the
/// device's states.
///
/// Bytes are opaque; their order is kept, their segmentation is not. After the session's end every call is refused with
/// ENODEV. Dropping the stream releases the transport's resources for it and does not change the device's state.
pub trait DataStream: Send {
    /// Reads the next bytes of a saving session; EBADF in RESUMING.
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk>;

    /// Writes the next bytes of a RESUMING session, all of them; EBADF in the saving states.
    fn write(&mut self, data: &[u8]) -> Result<()>;

    /// Estimates of the remaining data in pre-copy (`VFIO_MIG_GET_PRECOPY_INFO`); EINVAL outside PRE_COPY and
    /// PRE_COPY_P2P, ENOTTY if the device or the transport does not support this.
    fn precopy_info(&mut self) -> Result<PrecopyInfo>;

    /// Limit on the bytes that one read or write moves at once; larger buffers are allowed.
    fn transfer_bytes_max(&self) -> usize;
}
