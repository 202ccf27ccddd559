//! The fixed parts of the messages, as they lie on the wire after the [`Header`](super::Header), in
//! host byte order (`vfio-user.rst`, one section a message). Those that `vfio.h` has too are in
//! [`limosa_protocol::info`] and [`limosa_protocol::feature`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Declares a fixed part: a plain structure in host byte order.
macro_rules! message {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl $name {
            /// The structure's size, in bytes.
            pub const BYTES: usize = size_of::<$name>();
        }
    };
}

message! {
    /// VERSION, both ways; the capabilities follow as JSON, NUL included.
    VersionMessage {
        /// 0.
        major: u16,
        /// In the reply at most the proposed one.
        minor: u16,
    }
}

message! {
    /// DMA_MAP.
    DmaMapMessage {
        /// 32.
        argsz: u32,
        /// [`DmaMapFlags`](limosa_protocol::info::DmaMapFlags).
        flags: u32,
        /// Where the mapping starts in the fd, in bytes; 0 without an fd.
        offset: u64,
        /// First address, an IOVA.
        address: u64,
        /// Bytes.
        size: u64,
    }
}

message! {
    /// DMA_UNMAP and its reply. With GET_DIRTY_BITMAP (libvfio-user's addition) [`DirtyBitmap`]
    /// follows, and in the reply the bitmap after that.
    DmaUnmapMessage {
        /// The most bytes of body that the reply may have.
        argsz: u32,
        /// [`DmaUnmapFlags`](limosa_protocol::info::DmaUnmapFlags).
        flags: u32,
        /// First address; 0 with ALL.
        address: u64,
        /// Bytes; 0 with ALL.
        size: u64,
    }
}

message! {
    /// Which bitmap a DMA_UNMAP wants.
    DirtyBitmap {
        /// Bytes for each bit.
        page_size: u64,
        /// Bytes of the bitmap.
        size: u64,
    }
}

message! {
    /// DEVICE_GET_REGION_IO_FDS and its reply, in which `count` entries follow.
    IoFdsMessage {
        /// In a request the most bytes of body that the reply may have; in a reply those of all of it.
        argsz: u32,
        /// 0.
        flags: u32,
        /// The region.
        index: u32,
        /// How many entries follow; 0 in a request.
        count: u32,
    }
}

message! {
    /// One entry of DEVICE_GET_REGION_IO_FDS, for an ioeventfd.
    IoFd {
        /// Within the region, in bytes.
        offset: u64,
        /// Bytes of the write that is signalled; 0 for any.
        size: u64,
        /// Which of the message's fds.
        fd_index: u32,
        /// [`IoFd::IOEVENTFD`] or [`IoFd::IOREGIONFD`].
        kind: u32,
        /// KVM's flags for it: [`IoFd::DATAMATCH`].
        flags: u32,
        /// 0.
        padding: u32,
        /// The value to match, or an ioregionfd's user data.
        datamatch: u64,
    }
}

impl IoFd {
    /// The fd is an ioeventfd.
    pub const IOEVENTFD: u32 = 0;
    /// The fd is an ioregionfd.
    pub const IOREGIONFD: u32 = 1;
    /// Flag: signal only when `datamatch` is written.
    pub const DATAMATCH: u32 = 1 << 0;
}

message! {
    /// One entry as libvfio-user sends it: 48 bytes, with a place for a shadow.
    ShadowIoFd {
        /// Within the region, in bytes.
        offset: u64,
        /// Bytes of the write that is signalled; 0 for any.
        size: u64,
        /// Which of the message's fds.
        fd_index: u32,
        /// As in [`IoFd`], or 2 for an ioeventfd with a shadow.
        kind: u32,
        /// KVM's flags for it.
        flags: u32,
        /// Which of the message's fds holds the shadow.
        shadow_fd_index: u32,
        /// Where in that.
        shadow_offset: u64,
        /// The value to match.
        datamatch: u64,
    }
}

message! {
    /// REGION_READ and REGION_WRITE and their replies; the data follows a write and the reply to
    /// a read.
    RegionAccess {
        /// Within the region, in bytes.
        offset: u64,
        /// The region.
        region: u32,
        /// Bytes.
        count: u32,
    }
}

message! {
    /// DMA_READ and DMA_WRITE, and the reply to DMA_READ; the data follows a write and the reply to
    /// a read.
    DmaAccess {
        /// An IOVA.
        address: u64,
        /// Bytes.
        count: u64,
    }
}

/// The reply to DMA_WRITE as the specification has it: 12 bytes. libvfio-user sends and wants 16
/// ([`DmaAccess`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct DmaWriteReply {
    /// An IOVA.
    pub address: u64,
    /// Bytes.
    pub count: u32,
}

impl DmaWriteReply {
    /// The structure's size, in bytes.
    pub const BYTES: usize = size_of::<DmaWriteReply>();

    /// Reads the reply to a DMA_WRITE in either form.
    pub fn decode(body: &[u8]) -> Result<DmaAccess, super::DecodeError> {
        if let Ok((access, _)) = super::fixed::<DmaAccess>(body) {
            return Ok(access);
        }
        let (reply, _) = super::fixed::<DmaWriteReply>(body)?;
        Ok(DmaAccess { address: reply.address, count: reply.count.into() })
    }
}

message! {
    /// REGION_WRITE_MULTI, followed by [`SingleWrite`]s, and its reply, which stands alone.
    RegionWriteMulti {
        /// How many writes follow; in the reply how many were done.
        count: u64,
    }
}

/// One write of REGION_WRITE_MULTI. Packed, because it may lie anywhere in a receive buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct SingleWrite {
    /// Within the region, in bytes.
    pub offset: u64,
    /// The region.
    pub region: u32,
    /// Bytes, at most 8.
    pub count: u32,
    /// The first `count` of these bytes.
    pub data: [u8; 8],
}

impl SingleWrite {
    /// The structure's size, in bytes.
    pub const BYTES: usize = size_of::<SingleWrite>();
}

message! {
    /// MIG_DATA_READ and MIG_DATA_WRITE and the reply to the former; the data follows a write and
    /// the reply to a read.
    MigData {
        /// In a request the most bytes of body that the reply may have; in a reply those of all of it.
        argsz: u32,
        /// Bytes of data.
        size: u32,
    }
}
