//! Typed calls over [`Device::feature`], written once for all transports.

use limosa_protocol::feature::{
    DmaLoggingRange, FeatureBusMaster, FeatureDmaLoggingControl, FeatureDmaLoggingReport, FeatureMigDataSize,
    FeatureMigState, FeatureMigration, FeatureResetCount,
};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, MigrationFlags, State};
use zerocopy::{FromBytes, IntoBytes};

use crate::{DataStream, Device, Error, FeatureReply, FeatureRequest, Refers, Result};

/// The typed calls. Implemented for every [`Device`].
pub trait DeviceExt: Device {
    /// Whether the device has the feature and these operations on it (PROBE).
    ///
    /// A refusal with ENOTTY or EINVAL is an answer, `false`; other failures are errors.
    fn probe(&self, index: FeatureIndex, op: FeatureOp) -> Result<bool> {
        let mut none = [];
        let op = op | FeatureOp::PROBE;
        match self.feature(&mut FeatureRequest { index, op, payload: &mut none, refers: Refers::Nothing }) {
            Ok(_) => Ok(true),
            Err(Error::Refused { errno: Errno::ENOTTY | Errno::EINVAL, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The flags of the device's migration; empty for a device without migration (`VFIO_DEVICE_FEATURE_MIGRATION`).
    fn migration_flags(&self) -> Result<MigrationFlags> {
        match get::<FeatureMigration, _>(self, FeatureIndex::MIGRATION) {
            Ok(answer) => Ok(MigrationFlags::from_bits_retain(answer.flags)),
            Err(error) if error.is_refused(Errno::ENOTTY) => Ok(MigrationFlags::empty()),
            Err(error) => Err(error),
        }
    }

    /// The device's state (`VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, GET).
    fn state(&self) -> Result<State> {
        let answer: FeatureMigState = get(self, FeatureIndex::MIG_DEVICE_STATE)?;
        answer.state().map_err(|_| Error::Misbehaved {
            device: self.name().into(),
            what: format!("its state is {}, expected 0 to 7", answer.device_state),
        })
    }

    /// Drives the device to a state and returns the data stream when a session opens
    /// (`VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, SET). After a failure, [`DeviceExt::state`] returns the state of the
    /// path in which the device stayed.
    fn set_state(&self, to: State) -> Result<Option<Box<dyn DataStream>>> {
        let mut payload = FeatureMigState::new(to);
        Ok(set(self, FeatureIndex::MIG_DEVICE_STATE, payload.as_mut_bytes(), Refers::Nothing)?.stream)
    }

    /// The device's estimate of the bytes of stop-copy, in any state (`VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`); `None`
    /// if it has no such feature.
    fn mig_data_size(&self) -> Result<Option<u64>> {
        match get::<FeatureMigDataSize, _>(self, FeatureIndex::MIG_DATA_SIZE) {
            Ok(answer) => Ok(Some(answer.stop_copy_length)),
            Err(error) if error.is_refused(Errno::ENOTTY) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The number of resets of the device since it was created; `None` if it has no such feature
    /// (`docs/vfio-user-extensions.md: RESET_COUNT`).
    ///
    /// If two reads through the same device object are equal, there was no reset between them. A caller that drives a
    /// device over several arcs can thus detect a reset that no SET reveals. The feature is an extension: kernel
    /// devices and foreign vfio-user servers lack it. A refusal with ENOTTY or EINVAL is an answer, `None`; other
    /// failures are errors.
    fn reset_count(&self) -> Result<Option<u64>> {
        match get::<FeatureResetCount, _>(self, FeatureIndex::RESET_COUNT) {
            Ok(answer) => Ok(Some(answer.resets)),
            // Linux answers EINVAL for a driver that has no features at all.
            Err(Error::Refused { errno: Errno::ENOTTY | Errno::EINVAL, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Starts logging the device's DMA writes to these ranges and returns the page size, in
    /// bytes, that the device chose (`VFIO_DEVICE_FEATURE_DMA_LOGGING_START`).
    fn dma_logging_start(&self, page_size_hint: u64, ranges: &[DmaLoggingRange]) -> Result<u64> {
        let num_ranges = u32::try_from(ranges.len()).map_err(|_| Error::Usage {
            device: self.name().into(),
            what: "too many ranges to log".into(),
        })?;
        let mut payload = FeatureDmaLoggingControl { page_size: page_size_hint, num_ranges, reserved: 0 };
        set(self, FeatureIndex::DMA_LOGGING_START, payload.as_mut_bytes(), Refers::In(ranges.as_bytes()))?;
        Ok(payload.page_size)
    }

    /// Stops logging (`VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`).
    fn dma_logging_stop(&self) -> Result<()> {
        set(self, FeatureIndex::DMA_LOGGING_STOP, &mut [], Refers::Nothing).map(drop)
    }

    /// Reads and clears the log of a range (`VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`): bit *n* of `words` for page *n*
    /// from `iova` on. The previous contents of `words` may be lost. On any error treat the whole range as dirty.
    fn dma_logging_report(&self, iova: u64, length: u64, page_size: u64, words: &mut [u64]) -> Result<()> {
        log_bitmap(self, FeatureIndex::DMA_LOGGING_REPORT, iova, length, page_size, words)
    }

    /// Reads where the log of a range may have pages, and clears nothing (`docs/vfio-user-extensions.md: DIRTY_BLOCKS`): bit *n*
    /// of `words` for the `block_size` bytes from `iova + n * block_size` on, a power of two. A block without a bit has no page that
    /// was written since the last report, up to the call. What `words` held may be lost. A device without the feature refuses it
    /// with ENOTTY.
    fn dirty_blocks(&self, iova: u64, length: u64, block_size: u64, words: &mut [u64]) -> Result<()> {
        log_bitmap(self, FeatureIndex::DIRTY_BLOCKS, iova, length, block_size, words)
    }

    /// Opts in to output flags in pre-copy info (`VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`); `false` if the device does
    /// not know it.
    fn precopy_info_v2(&self) -> Result<bool> {
        match set(self, FeatureIndex::MIG_PRECOPY_INFO_V2, &mut [], Refers::Nothing) {
            Ok(_) => Ok(true),
            Err(error) if error.is_refused(Errno::ENOTTY) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Allows or forbids the device to master the bus (`VFIO_DEVICE_FEATURE_BUS_MASTER`).
    fn bus_master(&self, on: bool) -> Result<()> {
        let mut payload = FeatureBusMaster { op: on.into() };
        set(self, FeatureIndex::BUS_MASTER, payload.as_mut_bytes(), Refers::Nothing).map(drop)
    }
}

impl<D: Device + ?Sized> DeviceExt for D {}

/// A GET that a bitmap answers.
fn log_bitmap<D: Device + ?Sized>(
    device: &D,
    index: FeatureIndex,
    iova: u64,
    length: u64,
    page_size: u64,
    words: &mut [u64],
) -> Result<()> {
    let pages = length.div_ceil(page_size.max(1));
    if (words.len() as u64) < pages.div_ceil(64) {
        return Err(Error::Usage {
            device: device.name().into(),
            what: format!("a bitmap of {} words is too short for {pages} pages", words.len()),
        });
    }
    let mut payload = FeatureDmaLoggingReport { iova, length, page_size };
    device
        .feature(&mut FeatureRequest {
            index,
            op: FeatureOp::GET,
            payload: payload.as_mut_bytes(),
            refers: Refers::Bitmap(words),
        })
        .map(drop)
}

fn get<T: FromBytes + IntoBytes, D: Device + ?Sized>(device: &D, index: FeatureIndex) -> Result<T> {
    let mut answer = T::new_zeroed();
    let payload = answer.as_mut_bytes();
    let want = payload.len();
    let reply = device.feature(&mut FeatureRequest {
        index,
        op: FeatureOp::GET,
        payload,
        refers: Refers::Nothing,
    })?;
    if reply.payload_bytes < want {
        return Err(Error::Misbehaved {
            device: device.name().into(),
            what: format!("GET {index} answered with {} bytes, expected {want}", reply.payload_bytes),
        });
    }
    Ok(answer)
}

fn set<D: Device + ?Sized>(
    device: &D,
    index: FeatureIndex,
    payload: &mut [u8],
    refers: Refers<'_>,
) -> Result<FeatureReply> {
    device.feature(&mut FeatureRequest { index, op: FeatureOp::SET, payload, refers })
}
