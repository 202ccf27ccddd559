//! The FEATURE multiplexer (`vfio-user.rst: VFIO_USER_DEVICE_FEATURE`), and the dirty bitmap in
//! pieces of bounded size straight to the socket.

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use limosa_client::Refers;
use limosa_device::FeatureDone;
use limosa_protocol::feature::{
    DmaLoggingRange, FeatureDmaLoggingControl, FeatureDmaLoggingReport, FeatureMigState, FeatureRules,
    PrecopyInfo,
};
use limosa_protocol::{Errno, FeatureCall, FeatureHeader, FeatureIndex, FeatureOp, MigrationFlags};
use zerocopy::{FromBytes, IntoBytes};

use super::buffer::Buffer;
use super::control;
use super::data::SessionData;
use super::job::{Handled, Job, Outcome, reply_header};
use super::next;
use super::peer::Peer;
use crate::codec::Header;
use crate::extension;

/// The longest bitmap of a report: 8 TiB of 4 KiB pages, as QEMU announces it.
pub(super) const BITMAP_BYTES_MAX: u64 = 256 << 20;

/// The bitmap is harvested and sent in pieces of this many words.
const PIECE_WORDS: usize = 16 << 10;

/// The longest fixed part of a feature's data.
const PAYLOAD_BYTES_MAX: usize = 64;

/// The context of FEATURE requests.
pub(super) struct Features<'c, 'a> {
    pub(super) peer: &'c Peer<'a>,
    pub(super) data: &'c mut SessionData,
    /// Buffer for the words of a bitmap.
    pub(super) room: &'c mut Buffer,
}

impl Features<'_, '_> {
    /// A FEATURE request, with the data behind its header.
    pub(super) fn answer(&mut self, job: &Job, header: FeatureHeader, data: &[u8]) -> Handled {
        let call = match header.call() {
            Ok(call) => call,
            Err(errno) => return Ok(Outcome::Refused(errno)),
        };
        let is_report = matches!(call.index, FeatureIndex::DMA_LOGGING_REPORT | extension::DIRTY_BLOCKS);
        if is_report && call.op == FeatureOp::GET {
            return self.report(job, header, call, data);
        }
        if call.index == extension::DATA_FD && call.op == FeatureOp::GET {
            return self.data_fd(job, call);
        }
        let mut payload = [0; PAYLOAD_BYTES_MAX];
        let at_hand = data.len().min(PAYLOAD_BYTES_MAX);
        payload[..at_hand].copy_from_slice(&data[..at_hand]);
        // A SET whose data was not sent.
        let sent = match call.op {
            FeatureOp::SET => FeatureCall { payload_bytes: call.payload_bytes.min(at_hand), ..call },
            _ => call,
        };
        let done = match (call.index, call.op) {
            (FeatureIndex::DMA_LOGGING_START, FeatureOp::SET) => self.start(call, &mut payload, data),
            (index, FeatureOp::SET) if index.rules().is_some_and(|rules| rules.payload_bytes > at_hand) => {
                self.peer.machine.feature_for(self.peer.client, sent, &mut payload, Refers::Nothing)
            }
            (FeatureIndex::MIG_DEVICE_STATE, FeatureOp::SET) => self.set_state(call, &mut payload),
            (extension::PRECOPY_INFO | extension::DATA_FD, _) => self.extension(call, &mut payload),
            (extension::NEXT, _) => next::feature(self.peer, sent, &mut payload),
            (extension::STAY | extension::ECHO | extension::KICK, _) => {
                control::feature(self.peer, sent, &mut payload)
            }
            _ => self.peer.machine.feature_for(self.peer.client, call, &mut payload, Refers::Nothing),
        };
        let payload_bytes = match done {
            Ok(done) => done.payload_bytes,
            Err(errno) => return Ok(Outcome::Refused(errno)),
        };
        if call.op == FeatureOp::GET {
            let header = FeatureHeader::new(call.index, call.op, payload_bytes as u32);
            return job.reply_pieces(&self.peer.link, &[header.as_bytes(), &payload[..payload_bytes]], &[]);
        }
        // The request's payload with the device's values: a page size, and no data fd.
        let chosen = match call.index {
            extension::ECHO => size_of::<extension::Echo>(),
            FeatureIndex::DMA_LOGGING_START => size_of::<u64>(),
            FeatureIndex::MIG_DEVICE_STATE => size_of::<FeatureMigState>(),
            _ => 0,
        };
        let chosen = chosen.min(payload_bytes);
        job.reply_pieces(&self.peer.link, &[header.as_bytes(), &payload[..chosen], &data[chosen..]], &[])
    }

    fn set_state(&mut self, call: FeatureCall, payload: &mut [u8]) -> Result<FeatureDone, Errno> {
        let peer = self.peer;
        let wanted =
            FeatureMigState::read_from_prefix(payload).ok().and_then(|(state, _)| state.state().ok());
        self.data.finish_load(peer, wanted)?;
        let done = peer.machine.feature_for(peer.client, call, payload, Refers::Nothing);
        self.data.follow_session(peer);
        done
    }

    /// PROBE of the features beyond the standard's, and GET of PRECOPY_INFO.
    fn extension(&self, call: FeatureCall, payload: &mut [u8]) -> Result<FeatureDone, Errno> {
        let flags = self.peer.machine.migration_flags().ok_or(Errno::ENOTTY)?;
        let fds = self.peer.limits.is_some_and(|limits| limits.msg_fds_max > 0);
        let (there, payload_bytes) = if call.index == extension::DATA_FD {
            (fds, size_of::<extension::DataFd>())
        } else {
            (flags.contains(MigrationFlags::PRE_COPY), size_of::<PrecopyInfo>())
        };
        if !there {
            return Err(Errno::ENOTTY);
        }
        let rules = FeatureRules { name: "beyond the standard", get: true, set: false, payload_bytes };
        if !call.check(&rules)? {
            return Ok(FeatureDone::default());
        }
        // Without a session the state is not a pre-copy state.
        let info = self
            .peer
            .machine
            .precopy_info(self.peer.machine.session_for(self.peer.client).ok_or(Errno::EINVAL)?)?;
        info.write_to_prefix(payload).map_err(|_| Errno::EINVAL)?;
        Ok(FeatureDone { payload_bytes, opened: None })
    }

    /// GET of DATA_FD: the session's data goes over a socket from now on.
    fn data_fd(&mut self, job: &Job, call: FeatureCall) -> Handled {
        let opened = self.open_data_socket(job, call);
        match opened {
            Ok(None) => Ok(Outcome::Replied),
            Ok(Some(theirs)) => {
                let header = FeatureHeader::new(call.index, call.op, size_of::<extension::DataFd>() as u32);
                let payload = extension::DataFd::default();
                job.reply_pieces(&self.peer.link, &[header.as_bytes(), payload.as_bytes()], &[theirs.as_fd()])
            }
            Err(errno) => Ok(Outcome::Refused(errno)),
        }
    }

    fn open_data_socket(&mut self, job: &Job, call: FeatureCall) -> Result<Option<UnixStream>, Errno> {
        self.extension(FeatureCall { op: FeatureOp::GET | FeatureOp::PROBE, ..call }, &mut [])?;
        if call.payload_bytes < size_of::<extension::DataFd>() {
            return Err(Errno::EINVAL);
        }
        let session = self.data.untouched_session(self.peer)?;
        if !job.wants_reply() {
            return Ok(None);
        }
        self.data.open_socket(self.peer, session).map(Some)
    }

    fn start(&self, call: FeatureCall, payload: &mut [u8], data: &[u8]) -> Result<FeatureDone, Errno> {
        let (control, rest) = FeatureDmaLoggingControl::read_from_prefix(data).map_err(|_| Errno::EINVAL)?;
        let bytes = (control.num_ranges as usize).saturating_mul(size_of::<DmaLoggingRange>());
        // None at all means everything. Too many to be there are too many for the device.
        self.peer.machine.feature_for(
            self.peer.client,
            call,
            payload,
            Refers::In(&rest[..bytes.min(rest.len())]),
        )
    }

    /// A report of the log, or a look at where it has pages.
    fn report(&mut self, job: &Job, header: FeatureHeader, call: FeatureCall, data: &[u8]) -> Handled {
        let Ok((report, _)) = FeatureDmaLoggingReport::read_from_prefix(data) else {
            return Ok(Outcome::Refused(Errno::EINVAL));
        };
        let bitmap_bytes = match self.check_report(&report, call) {
            Ok(bytes) => bytes,
            Err(errno) => return Ok(Outcome::Refused(errno)),
        };
        if !job.wants_reply() {
            // A posted report would lose the bits.
            return Ok(Outcome::Replied);
        }
        let fixed_bytes = FeatureHeader::BYTES + size_of::<FeatureDmaLoggingReport>();
        let header = FeatureHeader { argsz: (fixed_bytes as u64 + bitmap_bytes) as u32, ..header };
        let head = reply_header(&job.header, fixed_bytes + bitmap_bytes as usize)?;
        let mut fixed = [0; Header::BYTES + 8 + 24];
        fixed[..16].copy_from_slice(head.as_bytes());
        fixed[16..24].copy_from_slice(header.as_bytes());
        fixed[24..].copy_from_slice(report.as_bytes());

        let mappings = self.peer.machine.mappings();
        let words_room = &mut *self.room;
        self.peer.link.send_in_pieces(|sending| {
            let mut fixed = &fixed[..];
            let FeatureDmaLoggingReport { mut iova, mut length, page_size } = report;
            while length > 0 {
                let pages = length.div_ceil(page_size).min(PIECE_WORDS as u64 * 64);
                let bytes = length.min(pages.saturating_mul(page_size));
                let words = words_room.zeroed(pages.div_ceil(64) as usize);
                let told = match call.index {
                    extension::DIRTY_BLOCKS => mappings.logging_look(iova, bytes, page_size, words),
                    _ => mappings.logging_report(iova, bytes, page_size, words),
                };
                if let Err(errno) = told {
                    // The reply has begun: pages that cannot be reported count as dirty.
                    tracing::error!(%errno, iova, bytes, "report failed half-way");
                    set_all(words, pages);
                }
                sending.send(&mut [IoSlice::new(fixed), IoSlice::new(words.as_bytes())], &[])?;
                fixed = &[];
                iova = iova.wrapping_add(bytes);
                length -= bytes;
            }
            Ok(())
        })?;
        Ok(Outcome::Replied)
    }

    /// The bytes of the bitmap, if the report can be answered completely.
    fn check_report(&self, report: &FeatureDmaLoggingReport, call: FeatureCall) -> Result<u64, Errno> {
        self.peer.machine.may_read_log(self.peer.client)?;
        self.peer.machine.mappings().logging_check(report.iova, report.length, report.page_size)?;
        report.check()?;
        let bytes = report.bitmap_bytes();
        if bytes > BITMAP_BYTES_MAX {
            return Err(Errno::E2BIG);
        }
        let needed = size_of::<FeatureDmaLoggingReport>() + bytes as usize;
        if call.payload_bytes < needed { Err(Errno::EINVAL) } else { Ok(bytes) }
    }
}

/// Sets the first `bits` bits.
fn set_all(words: &mut [u64], bits: u64) {
    words.fill(u64::MAX);
    if let (Some(last), used @ 1..) = (words.last_mut(), bits % 64) {
        *last = (1 << used) - 1;
    }
}
