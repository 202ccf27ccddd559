//! This implementation's features of `DEVICE_FEATURE` beyond the standard (`docs/vfio-user-extensions.md`). A
//! client probes each with PROBE; a peer without them can still migrate.

use limosa_protocol::FeatureIndex;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// GET: [`PrecopyInfo`](limosa_protocol::feature::PrecopyInfo), which the kernel returns through the data fd. EINVAL
/// outside PRE_COPY and PRE_COPY_P2P.
pub const PRECOPY_INFO: FeatureIndex = FeatureIndex(0xfe00);

/// GET: a socket that carries the bytes of the open session instead of `MIG_DATA_READ` and `MIG_DATA_WRITE`; the
/// reply's only fd. Payload [`DataFd`]. ENODEV without a session, EBUSY if the session already has one or data has
/// moved by messages.
pub const DATA_FD: FeatureIndex = FeatureIndex(0xfe01);

/// GET: [`FeatureResetCount`](limosa_protocol::feature::FeatureResetCount), how many times the device
/// was reset.
pub const RESET_COUNT: FeatureIndex = FeatureIndex::RESET_COUNT;

/// The payload of [`DATA_FD`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DataFd {
    /// 0.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}

/// GET and SET: [`Stay`]. A device that stays does not run until its move is decided.
pub const STAY: FeatureIndex = FeatureIndex(0xfe03);

/// SET: [`Echo`]. Marks the pages in the device's log in the VMM's log too, by a DMA_WRITE for each.
pub const ECHO: FeatureIndex = FeatureIndex(0xfe04);

/// SET, no payload: fires every interrupt vector that is wired, once.
pub const KICK: FeatureIndex = FeatureIndex(0xfe05);

/// GET and SET: [`Next`]. The process whose client is the next VMM.
pub const NEXT: FeatureIndex = FeatureIndex(0xfe06);

/// GET: [`FeatureDmaLoggingReport`](limosa_protocol::feature::FeatureDmaLoggingReport), and a bitmap as in its reply. Where the
/// device's log may have pages; clears nothing.
pub const DIRTY_BLOCKS: FeatureIndex = FeatureIndex::DIRTY_BLOCKS;

/// The payload of [`STAY`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Stay {
    /// Names the move.
    pub id: [u8; 16],
    /// [`StayFlags`].
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}

/// The values of [`Stay::flags`].
pub struct StayFlags;

impl StayFlags {
    /// The device stays.
    pub const STAY: u32 = 1;
    /// The move is decided: the device may run.
    pub const RELEASE: u32 = 2;
}

/// The payload of [`ECHO`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Echo {
    /// The first address.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes of a page in the log, a power of two.
    pub page_size: u64,
    /// Out: how many pages were marked.
    pub pages: u64,
}

/// The payload of [`NEXT`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Next {
    /// The PID in the server's namespace; 0 for none.
    pub pid: i32,
    /// In an answer to GET, [`NextFlags`]; else 0.
    pub flags: u32,
}

/// The bits of [`Next::flags`].
pub struct NextFlags;

impl NextFlags {
    /// The client of that process is connected.
    pub const THERE: u32 = 1;
    /// It is the requesting client.
    pub const THIS: u32 = 2;
}

/// The name of an extension, as `docs/vfio-user-extensions.md` has it; `None` for every other index.
pub const fn name(index: FeatureIndex) -> Option<&'static str> {
    match index {
        PRECOPY_INFO => Some("PRECOPY_INFO"),
        DATA_FD => Some("DATA_FD"),
        RESET_COUNT => Some("RESET_COUNT"),
        STAY => Some("STAY"),
        ECHO => Some("ECHO"),
        KICK => Some("KICK"),
        NEXT => Some("NEXT"),
        DIRTY_BLOCKS => Some("DIRTY_BLOCKS"),
        _ => None,
    }
}
