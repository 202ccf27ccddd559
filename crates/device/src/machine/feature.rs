//! The FEATURE multiplexer on the device's side (`vfio.h: VFIO_DEVICE_FEATURE`).

use std::sync::atomic::Ordering::Acquire;

use limosa_client::Refers;
use limosa_protocol::feature::{
    DmaLoggingRange, FeatureDmaLoggingControl, FeatureDmaLoggingReport, FeatureMigDataSize, FeatureMigState,
    FeatureMigration, FeatureResetCount,
};
use limosa_protocol::{Errno, FeatureCall, FeatureIndex, FeatureOp, MigrationFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::session::SessionId;
use super::{ClientId, Machine};

/// The result of a FEATURE request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureDone {
    /// Bytes of payload filled in.
    pub payload_bytes: usize,
    /// The session that a SET of MIG_DEVICE_STATE opened.
    pub opened: Option<SessionId>,
}

/// Limit on the ranges of one DMA_LOGGING_START: a page of them, as in the kernel.
const LOGGING_RANGES_MAX: usize = 4096 / size_of::<DmaLoggingRange>();

impl Machine {
    /// Performs a FEATURE request that passed [`limosa_protocol::FeatureHeader::call`].
    ///
    /// `payload` is the fixed part, in and out, and at least as long as the call says. A DMA_LOGGING_START needs
    /// [`Refers::In`] with exactly its ranges, a DMA_LOGGING_REPORT or DIRTY_BLOCKS needs [`Refers::Bitmap`] with
    /// a bit for each page; bits are set there, never cleared.
    ///
    /// ENOTTY for a feature that the device lacks; EINVAL for an operation that the feature lacks, a payload that is
    /// too short, or missing referenced data; E2BIG for too many ranges; otherwise the feature's errno.
    pub fn feature(
        &self,
        call: FeatureCall,
        payload: &mut [u8],
        refers: Refers<'_>,
    ) -> Result<FeatureDone, Errno> {
        self.feature_for(ClientId::VMM, call, payload, refers)
    }

    /// The same for any client. EBUSY for a SET of the state while another client drives the device, and for a dirty log that
    /// another client has started.
    pub fn feature_for(
        &self,
        client: ClientId,
        call: FeatureCall,
        payload: &mut [u8],
        refers: Refers<'_>,
    ) -> Result<FeatureDone, Errno> {
        let rules = call.index.rules().or(call.index.extension_rules());
        let rules = rules.filter(|_| self.has_feature(call.index)).ok_or(Errno::ENOTTY)?;
        if !call.check(rules)? {
            return Ok(FeatureDone::default());
        }
        let payload = payload.get_mut(..rules.payload_bytes).ok_or(Errno::EINVAL)?;
        let mut done = FeatureDone { payload_bytes: payload.len(), opened: None };
        match call.index {
            FeatureIndex::MIGRATION => {
                let flags = self.flags.ok_or(Errno::ENOTTY)?;
                answer(payload, FeatureMigration { flags: flags.bits() })?;
            }
            FeatureIndex::MIG_DEVICE_STATE if call.op == FeatureOp::GET => {
                answer(payload, FeatureMigState::new(self.state()))?;
            }
            FeatureIndex::MIG_DEVICE_STATE => {
                let to = read::<FeatureMigState>(payload)?.state()?;
                done.opened = self.set_state(client, to)?;
                answer(payload, FeatureMigState::new(to))?;
            }
            FeatureIndex::MIG_DATA_SIZE => {
                let stop_copy_length = self.migrate(|migration| Ok(migration.data_size()))?;
                answer(payload, FeatureMigDataSize { stop_copy_length })?;
            }
            FeatureIndex::MIG_PRECOPY_INFO_V2 => {
                if self.panicked.load(Acquire) {
                    return Err(Errno::EIO);
                }
                self.lock().precopy_reinit = true;
            }
            FeatureIndex::DMA_LOGGING_START => {
                let mut control: FeatureDmaLoggingControl = read(payload)?;
                let ranges = logging_ranges(&control, refers)?;
                control.page_size = self.mappings.logging_start(control.page_size, &ranges)?;
                self.lock().logs = Some(client);
                answer(payload, control)?;
            }
            FeatureIndex::DMA_LOGGING_STOP => {
                self.may_read_log(client)?;
                self.mappings.logging_stop()?;
                self.lock().logs = None;
            }
            FeatureIndex::DMA_LOGGING_REPORT | FeatureIndex::DIRTY_BLOCKS => {
                self.may_read_log(client)?;
                let report: FeatureDmaLoggingReport = read(payload)?;
                let Refers::Bitmap(words) = refers else { return Err(Errno::EINVAL) };
                if !report.page_size.is_power_of_two() {
                    return Err(Errno::EINVAL);
                }
                let pages = report.length.div_ceil(report.page_size);
                if (words.len() as u64) < pages.div_ceil(64) {
                    return Err(Errno::EINVAL);
                }
                let FeatureDmaLoggingReport { iova, length, page_size } = report;
                match call.index {
                    FeatureIndex::DIRTY_BLOCKS => {
                        self.mappings.logging_look(iova, length, page_size, words)?;
                    }
                    _ => self.mappings.logging_report(iova, length, page_size, words)?,
                }
            }
            FeatureIndex::RESET_COUNT => answer(payload, FeatureResetCount { resets: self.reset_count() })?,
            _ => return Err(Errno::ENOTTY),
        }
        Ok(done)
    }

    /// EBUSY for a dirty log that another client has started: a report clears it.
    pub fn may_read_log(&self, client: ClientId) -> Result<(), Errno> {
        match self.lock().logs {
            Some(logs) if logs != client => Err(Errno::EBUSY),
            _ => Ok(()),
        }
    }

    /// Whether the device has the feature at all.
    fn has_feature(&self, index: FeatureIndex) -> bool {
        match index {
            FeatureIndex::MIGRATION | FeatureIndex::MIG_DEVICE_STATE | FeatureIndex::MIG_DATA_SIZE => {
                self.flags.is_some()
            }
            FeatureIndex::MIG_PRECOPY_INFO_V2 => self.has_precopy_reinit,
            FeatureIndex::DMA_LOGGING_START
            | FeatureIndex::DMA_LOGGING_STOP
            | FeatureIndex::DMA_LOGGING_REPORT
            | FeatureIndex::DIRTY_BLOCKS
            | FeatureIndex::RESET_COUNT => true,
            _ => false,
        }
    }
}

/// Whether a model's migration has MIG_PRECOPY_INFO_V2.
pub(super) fn precopy_reinit(migration: &dyn crate::Migration) -> bool {
    migration.flags().contains(MigrationFlags::PRE_COPY) && migration.has_precopy_reinit()
}

fn read<T: FromBytes + KnownLayout + Immutable>(payload: &[u8]) -> Result<T, Errno> {
    T::read_from_bytes(payload).map_err(|_| Errno::EINVAL)
}

fn answer<T: IntoBytes + Immutable>(payload: &mut [u8], value: T) -> Result<(), Errno> {
    value.write_to(payload).map_err(|_| Errno::EINVAL)
}

fn logging_ranges(
    control: &FeatureDmaLoggingControl,
    refers: Refers<'_>,
) -> Result<Vec<DmaLoggingRange>, Errno> {
    let count = control.num_ranges as usize;
    if count > LOGGING_RANGES_MAX {
        return Err(Errno::E2BIG);
    }
    let bytes: &[u8] = match refers {
        Refers::In(bytes) => bytes,
        Refers::Nothing => &[],
        Refers::Bitmap(_) => return Err(Errno::EINVAL),
    };
    if bytes.len() != count * size_of::<DmaLoggingRange>() {
        return Err(Errno::EINVAL);
    }
    bytes.chunks_exact(size_of::<DmaLoggingRange>()).map(read).collect()
}
