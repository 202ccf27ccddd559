//! The FEATURE multiplexer (`vfio.h: VFIO_DEVICE_FEATURE`): its header, the rules of GET, SET and
//! PROBE with the errno for each misuse, and the payloads of every index.
//!
//! Payloads are kept in the form in which vfio-user carries them: what the kernel's structures
//! point to (the ranges of a START, the bitmap of a REPORT) follows the fixed part.
//!
//! Which errno a misuse gets; where several apply, the first of them:
//!
//! | what is wrong | errno |
//! |---|---|
//! | `argsz` below 8, the header | EINVAL |
//! | a flag other than GET, SET and PROBE above the index | EINVAL |
//! | GET with SET, without PROBE | EINVAL |
//! | an index that the device does not know, or a feature that it lacks (no migration, no logging) | ENOTTY |
//! | GET or SET, with PROBE too, of a feature that has no such operation | EINVAL |
//! | none of GET, SET and PROBE | EINVAL |
//! | `argsz` too small for the payload, without PROBE | EINVAL |
//! | SET of MIG_DEVICE_STATE: a number above 7, or what [`Refusal`](crate::fsm::Refusal) names | EINVAL |
//! | DMA_LOGGING_START, DMA_LOGGING_REPORT: the ranges | see [`logging`](crate::logging) |
//! | DMA_LOGGING_START while logging is on; STOP or REPORT while it is off | EINVAL |
//! | BUS_MASTER: an operation other than 0 and 1 | EINVAL |
//! | DMA_BUF: no range, or `flags` not zero | EINVAL |
//!
//! A PROBE that names neither GET nor SET asks only whether the feature is there.

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Errno, Records, State, range};

/// The index of a feature. Open: an unknown number survives a round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FeatureIndex(pub u16);

impl FeatureIndex {
    /// A token shared with a VF (SET, [`FeaturePciVfToken`]).
    pub const PCI_VF_TOKEN: FeatureIndex = FeatureIndex(0);
    /// Which parts of migration the device supports (GET, [`FeatureMigration`]).
    pub const MIGRATION: FeatureIndex = FeatureIndex(1);
    /// The state of the migration state machine (GET, SET, [`FeatureMigState`]).
    pub const MIG_DEVICE_STATE: FeatureIndex = FeatureIndex(2);
    /// Let the device enter a low power state (SET, no payload).
    pub const LOW_POWER_ENTRY: FeatureIndex = FeatureIndex(3);
    /// The same, with an eventfd for wake-up (SET, [`FeatureLowPowerEntryWithWakeup`]).
    pub const LOW_POWER_ENTRY_WITH_WAKEUP: FeatureIndex = FeatureIndex(4);
    /// Leave low power (SET, no payload).
    pub const LOW_POWER_EXIT: FeatureIndex = FeatureIndex(5);
    /// Start logging the device's DMA writes (SET, [`FeatureDmaLoggingControl`]).
    pub const DMA_LOGGING_START: FeatureIndex = FeatureIndex(6);
    /// Stop logging (SET, no payload).
    pub const DMA_LOGGING_STOP: FeatureIndex = FeatureIndex(7);
    /// Read and clear the log (GET, [`FeatureDmaLoggingReport`]).
    pub const DMA_LOGGING_REPORT: FeatureIndex = FeatureIndex(8);
    /// Estimate of the bytes that stop-copy will need (GET, [`FeatureMigDataSize`]).
    pub const MIG_DATA_SIZE: FeatureIndex = FeatureIndex(9);
    /// Set or clear bus mastering (SET, [`FeatureBusMaster`]).
    pub const BUS_MASTER: FeatureIndex = FeatureIndex(10);
    /// Make a dma-buf of region ranges (GET, [`FeatureDmaBuf`]).
    pub const DMA_BUF: FeatureIndex = FeatureIndex(11);
    /// Opt in to output flags in pre-copy info, [`PrecopyFlags::REINIT`] (SET, no payload).
    pub const MIG_PRECOPY_INFO_V2: FeatureIndex = FeatureIndex(12);
    /// How often the device was reset (GET, [`FeatureResetCount`]). Not in `vfio.h`: an extension,
    /// `docs/vfio-user-extensions.md: RESET_COUNT`.
    pub const RESET_COUNT: FeatureIndex = FeatureIndex(0xfe02);
    /// Where the log may have pages (GET, [`FeatureDmaLoggingReport`]). Clears nothing. Not in `vfio.h`: an
    /// extension, `docs/vfio-user-extensions.md: DIRTY_BLOCKS`.
    pub const DIRTY_BLOCKS: FeatureIndex = FeatureIndex(0xfe07);

    /// What the standard says of this index, or `None` for one that it does not assign.
    pub const fn rules(self) -> Option<&'static FeatureRules> {
        if (self.0 as usize) < RULES.len() { Some(&RULES[self.0 as usize]) } else { None }
    }

    /// What `docs/vfio-user-extensions.md` says of this index, for an extension that any transport
    /// can carry; `None` for every other index. A kernel device knows none of these.
    pub const fn extension_rules(self) -> Option<&'static FeatureRules> {
        match self {
            FeatureIndex::RESET_COUNT => Some(&RESET_COUNT_RULES),
            FeatureIndex::DIRTY_BLOCKS => Some(&DIRTY_BLOCKS_RULES),
            _ => None,
        }
    }
}

impl fmt::Display for FeatureIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rules().or(self.extension_rules()) {
            Some(rules) => f.pad(rules.name),
            None => write!(f, "feature {}", self.0),
        }
    }
}

/// What may be done with a feature, and how long the fixed part of its payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureRules {
    /// The standard's name without `VFIO_DEVICE_FEATURE_`, or the extension's name.
    pub name: &'static str,
    /// Whether GET is defined.
    pub get: bool,
    /// Whether SET is defined.
    pub set: bool,
    /// Bytes of the payload's fixed part. The pointer that closes the kernel's form of
    /// DMA_LOGGING_START and DMA_LOGGING_REPORT is not counted.
    pub payload_bytes: usize,
}

const fn rules(name: &'static str, get: bool, set: bool, payload_bytes: usize) -> FeatureRules {
    FeatureRules { name, get, set, payload_bytes }
}

const RULES: [FeatureRules; 13] = [
    rules("PCI_VF_TOKEN", false, true, size_of::<FeaturePciVfToken>()),
    rules("MIGRATION", true, false, size_of::<FeatureMigration>()),
    rules("MIG_DEVICE_STATE", true, true, size_of::<FeatureMigState>()),
    rules("LOW_POWER_ENTRY", false, true, 0),
    rules("LOW_POWER_ENTRY_WITH_WAKEUP", false, true, size_of::<FeatureLowPowerEntryWithWakeup>()),
    rules("LOW_POWER_EXIT", false, true, 0),
    rules("DMA_LOGGING_START", false, true, size_of::<FeatureDmaLoggingControl>()),
    rules("DMA_LOGGING_STOP", false, true, 0),
    rules("DMA_LOGGING_REPORT", true, false, size_of::<FeatureDmaLoggingReport>()),
    rules("MIG_DATA_SIZE", true, false, size_of::<FeatureMigDataSize>()),
    rules("BUS_MASTER", false, true, size_of::<FeatureBusMaster>()),
    rules("DMA_BUF", true, false, size_of::<FeatureDmaBuf>()),
    rules("MIG_PRECOPY_INFO_V2", false, true, 0),
];

const RESET_COUNT_RULES: FeatureRules = rules("RESET_COUNT", true, false, size_of::<FeatureResetCount>());
const DIRTY_BLOCKS_RULES: FeatureRules =
    rules("DIRTY_BLOCKS", true, false, size_of::<FeatureDmaLoggingReport>());

bitflags::bitflags! {
    /// The upper half of the header's *flags*: what is asked of the feature.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct FeatureOp: u32 {
        /// Read the feature (`VFIO_DEVICE_FEATURE_GET`).
        const GET = 1 << 16;
        /// Write the feature (`VFIO_DEVICE_FEATURE_SET`).
        const SET = 1 << 17;
        /// Ask whether it is there, and with GET or SET whether these are
        /// (`VFIO_DEVICE_FEATURE_PROBE`).
        const PROBE = 1 << 18;
    }
}

/// The header of every request (`struct vfio_device_feature`): 8 bytes, host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FeatureHeader {
    /// Bytes of header and payload; on a GET the room for the answer.
    pub argsz: u32,
    /// Bits 0 to 15 the index, bits 16 to 18 a [`FeatureOp`].
    pub flags: u32,
}

/// A request that keeps the multiplexer's own rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FeatureCall {
    /// Which feature.
    pub index: FeatureIndex,
    /// What is asked; never GET with SET unless PROBE is there.
    pub op: FeatureOp,
    /// Bytes of payload that the caller has room for: argsz less the header.
    pub payload_bytes: usize,
}

impl FeatureHeader {
    /// The header's own size, in bytes.
    pub const BYTES: usize = size_of::<FeatureHeader>();

    /// The header of a request with that much room for its payload.
    pub const fn new(index: FeatureIndex, op: FeatureOp, payload_bytes: u32) -> FeatureHeader {
        FeatureHeader { argsz: payload_bytes.saturating_add(8), flags: op.bits() | index.0 as u32 }
    }

    /// Applies the multiplexer's rules that hold for every feature
    /// (`vfio_ioctl_device_feature()`): [`Errno::EINVAL`] for argsz below the header, a flag that
    /// is not known, or GET with SET without PROBE.
    pub fn call(self) -> Result<FeatureCall, Errno> {
        let op = FeatureOp::from_bits(self.flags & !0xffff).ok_or(Errno::EINVAL)?;
        let payload_bytes = (self.argsz as usize).checked_sub(FeatureHeader::BYTES).ok_or(Errno::EINVAL)?;
        let both = op.contains(FeatureOp::GET | FeatureOp::SET);
        if both && !op.contains(FeatureOp::PROBE) {
            return Err(Errno::EINVAL);
        }
        Ok(FeatureCall { index: FeatureIndex((self.flags & 0xffff) as u16), op, payload_bytes })
    }
}

impl FeatureCall {
    /// Applies the rules of one feature (`vfio_check_feature()`): [`Errno::EINVAL`] when an
    /// operation is asked for that the feature lacks, or none, or when the payload is too small. For a
    /// PROBE that passes, nothing remains to be done and `Ok(false)` is returned; `Ok(true)` says
    /// to carry the operation out.
    pub fn check(self, rules: &FeatureRules) -> Result<bool, Errno> {
        let lacks_get = self.op.contains(FeatureOp::GET) && !rules.get;
        let lacks_set = self.op.contains(FeatureOp::SET) && !rules.set;
        if lacks_get || lacks_set {
            return Err(Errno::EINVAL);
        }
        if self.op.contains(FeatureOp::PROBE) {
            return Ok(false);
        }
        if self.op.is_empty() || self.payload_bytes < rules.payload_bytes {
            return Err(Errno::EINVAL);
        }
        Ok(true)
    }
}

/// Declares a payload: a plain structure in host byte order.
macro_rules! payload {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }
    };
}
pub(crate) use payload;

payload! {
    /// What `VFIO_DEVICE_FEATURE_PCI_VF_TOKEN` sets.
    FeaturePciVfToken {
        /// A UUID that whoever opens a VF must know.
        uuid: [u8; 16],
    }
}

payload! {
    /// `struct vfio_device_feature_migration`.
    FeatureMigration {
        /// [`MigrationFlags`](crate::MigrationFlags), unknown bits kept.
        flags: u64,
    }
}

payload! {
    /// `struct vfio_device_feature_mig_state`.
    FeatureMigState {
        /// The state's number.
        device_state: u32,
        /// On SET, the data fd of the session that opened; -1 otherwise and on vfio-user.
        data_fd: i32,
    }
}

impl FeatureMigState {
    /// The payload that names a state and carries no fd.
    pub const fn new(state: State) -> FeatureMigState {
        FeatureMigState { device_state: state.raw(), data_fd: -1 }
    }

    /// The state, or [`Errno::EINVAL`] for a number that the standard does not assign.
    pub fn state(self) -> Result<State, Errno> {
        State::try_from(self.device_state)
    }
}

payload! {
    /// `struct vfio_device_low_power_entry_with_wakeup`.
    FeatureLowPowerEntryWithWakeup {
        /// An eventfd.
        wakeup_eventfd: i32,
        /// Zero.
        reserved: u32,
    }
}

payload! {
    /// `struct vfio_device_feature_dma_logging_control` without its pointer; `num_ranges` times
    /// [`DmaLoggingRange`] follow.
    FeatureDmaLoggingControl {
        /// In: the hint, in bytes. Out: the device's choice.
        page_size: u64,
        /// How many ranges follow.
        num_ranges: u32,
        /// Zero.
        reserved: u32,
    }
}

payload! {
    /// `struct vfio_device_feature_dma_logging_range`.
    DmaLoggingRange {
        /// First address.
        iova: u64,
        /// Bytes.
        length: u64,
    }
}

payload! {
    /// `struct vfio_device_feature_dma_logging_report` without its pointer; in the answer the
    /// bitmap follows, little-endian, bit *n* for page *n* from `iova` on.
    FeatureDmaLoggingReport {
        /// First address.
        iova: u64,
        /// Bytes.
        length: u64,
        /// Bytes for each bit; a power of two.
        page_size: u64,
    }
}

payload! {
    /// `struct vfio_device_feature_mig_data_size`.
    FeatureMigDataSize {
        /// Bytes.
        stop_copy_length: u64,
    }
}

payload! {
    /// The payload of [`FeatureIndex::RESET_COUNT`].
    FeatureResetCount {
        /// Resets since the device came into being. Never decreases.
        resets: u64,
    }
}

payload! {
    /// `struct vfio_device_feature_bus_master`.
    FeatureBusMaster {
        /// 0 to clear, 1 to set.
        op: u32,
    }
}

impl FeatureBusMaster {
    /// Whether to set (or to clear), [`Errno::EINVAL`] for any other number.
    pub const fn on(self) -> Result<bool, Errno> {
        match self.op {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Errno::EINVAL),
        }
    }
}

payload! {
    /// `struct vfio_device_feature_dma_buf`; `nr_ranges` times [`RegionDmaRange`] follow.
    FeatureDmaBuf {
        /// The region.
        region_index: u32,
        /// As for open(2): O_RDWR, O_CLOEXEC.
        open_flags: u32,
        /// Zero.
        flags: u32,
        /// How many ranges follow.
        nr_ranges: u32,
    }
}

payload! {
    /// `struct vfio_region_dma_range`.
    RegionDmaRange {
        /// Within the region, in bytes.
        offset: u64,
        /// Bytes.
        length: u64,
    }
}

payload! {
    /// `struct vfio_precopy_info`, of `VFIO_MIG_GET_PRECOPY_INFO`.
    PrecopyInfo {
        /// 24.
        argsz: u32,
        /// [`PrecopyFlags`], an output once MIG_PRECOPY_INFO_V2 was set.
        flags: u32,
        /// Bytes of the initial pre-copy data still to be read.
        initial_bytes: u64,
        /// Bytes that changed after they had been read.
        dirty_bytes: u64,
    }
}

impl FeatureDmaBuf {
    /// Checks the request against a region of so many bytes: [`Errno::EINVAL`] for no range, for
    /// flags, and for a range that is empty or does not lie in the region.
    pub fn check(&self, ranges: &Records<'_, RegionDmaRange>, region_size: u64) -> Result<(), Errno> {
        let inside = |at: RegionDmaRange| range::contains((0, region_size), (at.offset, at.length));
        let ok = self.flags == 0 && !ranges.is_empty() && ranges.iter().all(inside);
        if ok { Ok(()) } else { Err(Errno::EINVAL) }
    }
}

impl PrecopyInfo {
    /// Whether `initial_bytes` is reported anew.
    pub fn reinit(&self) -> bool {
        PrecopyFlags::from_bits_retain(self.flags).contains(PrecopyFlags::REINIT)
    }
}

bitflags::bitflags! {
    /// Output flags of pre-copy info.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PrecopyFlags: u32 {
        /// `VFIO_PRECOPY_INFO_REINIT`: initial_bytes is reported anew and dirty_bytes starts
        /// again at 0.
        const REINIT = 1 << 0;
        const _ = !0;
    }
}
