//! The payload of a FEATURE request as one value, whatever the index (`vfio.h:
//! VFIO_DEVICE_FEATURE`), read with bounds from the bytes that vfio-user carries after the header.

use zerocopy::{FromBytes, IntoBytes};

use crate::feature::{
    DmaLoggingRange, FeatureBusMaster, FeatureDmaBuf, FeatureDmaLoggingControl, FeatureDmaLoggingReport,
    FeatureLowPowerEntryWithWakeup, FeatureMigDataSize, FeatureMigState, FeatureMigration, FeaturePciVfToken,
    RegionDmaRange,
};
use crate::{Errno, FeatureIndex, Records};

/// The payload of a request or of its answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum FeaturePayload<'a> {
    /// [`FeatureIndex::PCI_VF_TOKEN`].
    PciVfToken(FeaturePciVfToken),
    /// [`FeatureIndex::MIGRATION`].
    Migration(FeatureMigration),
    /// [`FeatureIndex::MIG_DEVICE_STATE`].
    MigDeviceState(FeatureMigState),
    /// [`FeatureIndex::LOW_POWER_ENTRY`].
    LowPowerEntry,
    /// [`FeatureIndex::LOW_POWER_ENTRY_WITH_WAKEUP`].
    LowPowerEntryWithWakeup(FeatureLowPowerEntryWithWakeup),
    /// [`FeatureIndex::LOW_POWER_EXIT`].
    LowPowerExit,
    /// [`FeatureIndex::DMA_LOGGING_START`]; the ranges are yet to be checked,
    /// [`check_start`](crate::logging::check_start).
    DmaLoggingStart(FeatureDmaLoggingControl, Records<'a, DmaLoggingRange>),
    /// [`FeatureIndex::DMA_LOGGING_STOP`].
    DmaLoggingStop,
    /// [`FeatureIndex::DMA_LOGGING_REPORT`] with what follows: nothing in a request, the bitmap in
    /// an answer.
    DmaLoggingReport(FeatureDmaLoggingReport, &'a [u8]),
    /// [`FeatureIndex::MIG_DATA_SIZE`].
    MigDataSize(FeatureMigDataSize),
    /// [`FeatureIndex::BUS_MASTER`].
    BusMaster(FeatureBusMaster),
    /// [`FeatureIndex::DMA_BUF`].
    DmaBuf(FeatureDmaBuf, Records<'a, RegionDmaRange>),
    /// [`FeatureIndex::MIG_PRECOPY_INFO_V2`].
    MigPrecopyInfoV2,
    /// An index that the standard does not assign, and its bytes.
    Unknown(FeatureIndex, &'a [u8]),
}

impl<'a> FeaturePayload<'a> {
    /// Reads the payload of a feature. [`Errno::EINVAL`] when `bytes` ends before the fixed part or before the last
    /// entry that this counts. Bytes beyond that are ignored, except for a report and an unknown feature, which keep
    /// them.
    pub fn read(index: FeatureIndex, bytes: &'a [u8]) -> Result<FeaturePayload<'a>, Errno> {
        Ok(match index {
            FeatureIndex::PCI_VF_TOKEN => FeaturePayload::PciVfToken(fixed(bytes)?.0),
            FeatureIndex::MIGRATION => FeaturePayload::Migration(fixed(bytes)?.0),
            FeatureIndex::MIG_DEVICE_STATE => FeaturePayload::MigDeviceState(fixed(bytes)?.0),
            FeatureIndex::LOW_POWER_ENTRY => FeaturePayload::LowPowerEntry,
            FeatureIndex::LOW_POWER_ENTRY_WITH_WAKEUP => {
                FeaturePayload::LowPowerEntryWithWakeup(fixed(bytes)?.0)
            }
            FeatureIndex::LOW_POWER_EXIT => FeaturePayload::LowPowerExit,
            FeatureIndex::DMA_LOGGING_START => {
                let (control, rest) = fixed::<FeatureDmaLoggingControl>(bytes)?;
                let ranges = Records::read(rest, control.num_ranges).ok_or(Errno::EINVAL)?;
                FeaturePayload::DmaLoggingStart(control, ranges)
            }
            FeatureIndex::DMA_LOGGING_STOP => FeaturePayload::DmaLoggingStop,
            FeatureIndex::DMA_LOGGING_REPORT => {
                let (report, bitmap) = fixed(bytes)?;
                FeaturePayload::DmaLoggingReport(report, bitmap)
            }
            FeatureIndex::MIG_DATA_SIZE => FeaturePayload::MigDataSize(fixed(bytes)?.0),
            FeatureIndex::BUS_MASTER => FeaturePayload::BusMaster(fixed(bytes)?.0),
            FeatureIndex::DMA_BUF => {
                let (buf, rest) = fixed::<FeatureDmaBuf>(bytes)?;
                let ranges = Records::read(rest, buf.nr_ranges).ok_or(Errno::EINVAL)?;
                FeaturePayload::DmaBuf(buf, ranges)
            }
            FeatureIndex::MIG_PRECOPY_INFO_V2 => FeaturePayload::MigPrecopyInfoV2,
            _ => FeaturePayload::Unknown(index, bytes),
        })
    }

    /// The feature that this is a payload of.
    pub fn index(&self) -> FeatureIndex {
        match self {
            FeaturePayload::PciVfToken(_) => FeatureIndex::PCI_VF_TOKEN,
            FeaturePayload::Migration(_) => FeatureIndex::MIGRATION,
            FeaturePayload::MigDeviceState(_) => FeatureIndex::MIG_DEVICE_STATE,
            FeaturePayload::LowPowerEntry => FeatureIndex::LOW_POWER_ENTRY,
            FeaturePayload::LowPowerEntryWithWakeup(_) => FeatureIndex::LOW_POWER_ENTRY_WITH_WAKEUP,
            FeaturePayload::LowPowerExit => FeatureIndex::LOW_POWER_EXIT,
            FeaturePayload::DmaLoggingStart(..) => FeatureIndex::DMA_LOGGING_START,
            FeaturePayload::DmaLoggingStop => FeatureIndex::DMA_LOGGING_STOP,
            FeaturePayload::DmaLoggingReport(..) => FeatureIndex::DMA_LOGGING_REPORT,
            FeaturePayload::MigDataSize(_) => FeatureIndex::MIG_DATA_SIZE,
            FeaturePayload::BusMaster(_) => FeatureIndex::BUS_MASTER,
            FeaturePayload::DmaBuf(..) => FeatureIndex::DMA_BUF,
            FeaturePayload::MigPrecopyInfoV2 => FeatureIndex::MIG_PRECOPY_INFO_V2,
            FeaturePayload::Unknown(index, _) => *index,
        }
    }

    /// Appends the payload's bytes, those that [`FeaturePayload::read`] reads.
    pub fn write(&self, out: &mut alloc::vec::Vec<u8>) {
        match self {
            FeaturePayload::PciVfToken(fixed) => out.extend_from_slice(fixed.as_bytes()),
            FeaturePayload::Migration(fixed) => out.extend_from_slice(fixed.as_bytes()),
            FeaturePayload::MigDeviceState(fixed) => out.extend_from_slice(fixed.as_bytes()),
            FeaturePayload::LowPowerEntryWithWakeup(fixed) => out.extend_from_slice(fixed.as_bytes()),
            FeaturePayload::DmaLoggingStart(fixed, ranges) => {
                out.extend_from_slice(fixed.as_bytes());
                ranges.iter().for_each(|range| out.extend_from_slice(range.as_bytes()));
            }
            FeaturePayload::DmaLoggingReport(fixed, bitmap) => {
                out.extend_from_slice(fixed.as_bytes());
                out.extend_from_slice(bitmap);
            }
            FeaturePayload::MigDataSize(fixed) => out.extend_from_slice(fixed.as_bytes()),
            FeaturePayload::BusMaster(fixed) => out.extend_from_slice(fixed.as_bytes()),
            FeaturePayload::DmaBuf(fixed, ranges) => {
                out.extend_from_slice(fixed.as_bytes());
                ranges.iter().for_each(|range| out.extend_from_slice(range.as_bytes()));
            }
            FeaturePayload::Unknown(_, bytes) => out.extend_from_slice(bytes),
            FeaturePayload::LowPowerEntry
            | FeaturePayload::LowPowerExit
            | FeaturePayload::DmaLoggingStop
            | FeaturePayload::MigPrecopyInfoV2 => {}
        }
    }
}

fn fixed<T: FromBytes>(bytes: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(bytes).map_err(|_| Errno::EINVAL)
}
