//! FEATURE requests (`vfio-user.rst: VFIO_USER_DEVICE_FEATURE`), and the migration state that the client tracks: the
//! open session, and the meaning of an empty read.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use limosa_client::{DataStream, Error, FeatureReply, FeatureRequest, Refers, Result};
use limosa_foreign_fd::{Foreign, ForeignFd};
use limosa_protocol::feature::{FeatureDmaLoggingReport, FeatureMigState, FeatureMigration};
use limosa_protocol::fsm::{self, Session as Effect};
use limosa_protocol::{Errno, FeatureHeader, FeatureIndex, FeatureOp, MigrationFlags, State};
use zerocopy::{FromBytes, IntoBytes};

use super::Shared;
use super::data_socket::SocketStream;
use super::exchange::{Answer, Ask, Limit};
use super::stream::Stream;
use crate::codec::Command;
use crate::extension;

/// The server's features among those that are probed when connecting. Requests for others go to the server.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Features {
    /// The server has DEVICE_FEATURE at all.
    spoken: bool,
    /// Bit *n* for entry *n* of [`Features::ASKED`].
    found: u32,
}

impl Features {
    pub const ASKED: [(FeatureIndex, FeatureOp); 7] = [
        (FeatureIndex::MIGRATION, FeatureOp::GET),
        (FeatureIndex::MIG_DEVICE_STATE, FeatureOp::GET.union(FeatureOp::SET)),
        (FeatureIndex::MIG_DATA_SIZE, FeatureOp::GET),
        (FeatureIndex::MIG_PRECOPY_INFO_V2, FeatureOp::SET),
        (extension::PRECOPY_INFO, FeatureOp::GET),
        (extension::DATA_FD, FeatureOp::GET),
        (extension::RESET_COUNT, FeatureOp::GET),
    ];

    pub fn add(&mut self, index: FeatureIndex) {
        if let Some(at) = Features::position(index) {
            self.found |= 1 << at;
        }
    }

    /// The server stays in sync after DEVICE_FEATURE.
    pub fn spoken(self) -> Features {
        Features { spoken: true, ..self }
    }

    fn position(index: FeatureIndex) -> Option<usize> {
        Features::ASKED.iter().position(|asked| asked.0 == index)
    }

    /// Whether the server may have it.
    pub fn has(&self, index: FeatureIndex) -> bool {
        self.spoken && Features::position(index).is_none_or(|at| self.found & 1 << at != 0)
    }
}

/// The client's view of the device's migration. Locked during a SET.
#[derive(Default)]
pub(super) struct Migration {
    flags: Option<MigrationFlags>,
}

impl Shared {
    /// Performs a FEATURE request.
    pub fn feature(self: &Arc<Shared>, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        if !self.features.has(request.index) {
            return Err(self.refused(&name(request.index, request.op), Errno::ENOTTY));
        }
        if request.index == FeatureIndex::MIG_DEVICE_STATE && request.op == FeatureOp::SET {
            return self.set_device_state(request);
        }
        let (index, op, limit) = (request.index, request.op, self.options.request_limit);
        let settled = self.session.settled();
        let log = &self.exchange.dma.log;
        // From before the server's log on, so that nothing falls between.
        let begins_log = (index, op) == (FeatureIndex::DMA_LOGGING_START, FeatureOp::SET) && log.start();
        let done = self.feature_call(index, op, request.payload, &mut request.refers, limit);
        if begins_log && matches!(done, Err(Error::Refused { .. })) {
            log.stop();
        }
        let (payload_bytes, fd) = done?;
        match (index, op) {
            (FeatureIndex::MIG_DEVICE_STATE, FeatureOp::GET) => {
                let got = FeatureMigState::read_from_prefix(request.payload);
                self.session.learn(got.ok().and_then(|(got, _)| got.state().ok()), settled);
            }
            (FeatureIndex::DMA_LOGGING_STOP, FeatureOp::SET) => log.stop(),
            (FeatureIndex::DMA_LOGGING_REPORT | extension::DIRTY_BLOCKS, FeatureOp::GET) => {
                self.add_written(index, request.payload, &mut request.refers);
            }
            _ => {}
        }
        Ok(FeatureReply { payload_bytes, stream: None, fd })
    }

    /// Adds this client's own writes for the server to a report, or to a look at where the log has pages.
    fn add_written(&self, index: FeatureIndex, payload: &[u8], refers: &mut Refers<'_>) {
        if let (Refers::Bitmap(words), Ok((report, _))) =
            (refers, FeatureDmaLoggingReport::read_from_prefix(payload))
            && report.page_size > 0
        {
            let (log, FeatureDmaLoggingReport { iova, length, page_size }) = (&self.exchange.dma.log, report);
            match index {
                extension::DIRTY_BLOCKS => log.look(iova, length, page_size, words),
                _ => log.harvest(iova, length, page_size, words),
            }
        }
    }

    /// One request on the wire, with its answer in `payload` and `refers`.
    fn feature_call(
        &self,
        index: FeatureIndex,
        op: FeatureOp,
        payload: &mut [u8],
        refers: &mut Refers<'_>,
        limit: Duration,
    ) -> Result<(usize, Option<ForeignFd>)> {
        let probe = op.contains(FeatureOp::PROBE);
        // A GET sends its input, not the space for its answer.
        let only_output = op == FeatureOp::GET
            && matches!(
                index,
                FeatureIndex::MIGRATION
                    | FeatureIndex::MIG_DEVICE_STATE
                    | FeatureIndex::MIG_DATA_SIZE
                    | extension::PRECOPY_INFO
                    | extension::DATA_FD
                    | extension::RESET_COUNT
                    | extension::NEXT
            );
        let sent = if probe || only_output { 0 } else { payload.len() };
        let mut bitmap_bytes = 0;
        if let Refers::Bitmap(words) = refers {
            bitmap_bytes = self.bitmap_bytes(payload, words.len())?;
        }
        let more = if let Refers::In(more) = refers { *more } else { &[] };
        let room = payload.len() + more.len() + bitmap_bytes;
        let room =
            u32::try_from(room).map_err(|_| self.usage(format!("{room} bytes of payload for {index}")))?;
        let header = FeatureHeader::new(index, op, room);
        let mut reply = FeatureHeader::default();
        // The answer replaces the input.
        let (mut short, long);
        let input = if sent <= INPUT_BYTES {
            short = [0; INPUT_BYTES];
            short[..sent].copy_from_slice(&payload[..sent]);
            &short[..sent]
        } else {
            long = payload[..sent].to_vec();
            &long[..]
        };
        let body = [header.as_bytes(), input, more];
        let ask = Ask { command: Command::DEVICE_FEATURE, body: &body, fds: &[] };
        let answered = |answer: std::result::Result<Answer, _>| {
            answer.map_err(|failure| self.error(&name(index, op), failure))
        };
        let (fixed, limit) = (FeatureHeader::BYTES + payload.len(), Limit::from_now(limit));
        let answer = match refers {
            Refers::Bitmap(words) => {
                let words = &mut words[..];
                let (bitmap, beyond) = words.as_mut_bytes().split_at_mut(bitmap_bytes);
                let into: &mut [&mut [u8]] = &mut [reply.as_mut_bytes(), payload, bitmap];
                let answer = answered(self.exchange.call(&ask, into, limit))?;
                beyond.fill(0);
                if !probe && answer.body_bytes < fixed + bitmap_bytes {
                    return Err(self.short(&name(index, op), answer.body_bytes, fixed + bitmap_bytes));
                }
                answer
            }
            _ => answered(self.exchange.call(&ask, &mut [reply.as_mut_bytes(), payload], limit))?,
        };
        if answer.body_bytes < FeatureHeader::BYTES {
            return Err(self.short(&name(index, op), answer.body_bytes, FeatureHeader::BYTES));
        }
        if reply.flags & 0xffff != u32::from(index.0) {
            return Err(self.misbehaved(format!(
                "it answers {} with feature {}",
                name(index, op),
                reply.flags & 0xffff
            )));
        }
        if let Refers::Bitmap(words) = refers {
            clear_beyond(payload, words);
        }
        let payload_bytes = (answer.body_bytes - FeatureHeader::BYTES).min(payload.len());
        Ok((payload_bytes, answer.fds.fds.into_iter().next()))
    }

    /// Bytes of a report's bitmap.
    fn bitmap_bytes(&self, payload: &[u8], words: usize) -> Result<usize> {
        let Ok((report, _)) = FeatureDmaLoggingReport::read_from_prefix(payload) else {
            return Ok(words * 8);
        };
        if !report.page_size.is_power_of_two() {
            return Err(self.usage(format!("a report with pages of {} bytes", report.page_size)));
        }
        let want = report.length.div_ceil(report.page_size).div_ceil(64);
        match usize::try_from(want) {
            Ok(want) if want <= words => Ok(want * 8),
            _ => Err(self.usage(format!("a report needs {want} words of bitmap, there are {words}"))),
        }
    }

    /// Asks for the state.
    pub fn get_state(&self) -> Result<State> {
        let mut got = FeatureMigState::default();
        let limit = self.options.request_limit;
        let index = FeatureIndex::MIG_DEVICE_STATE;
        let payload = got.as_mut_bytes();
        let want = payload.len();
        let (bytes, _) = self.feature_call(index, FeatureOp::GET, payload, &mut Refers::Nothing, limit)?;
        if bytes < want {
            return Err(self.short("GET MIG_DEVICE_STATE", bytes, want));
        }
        got.state()
            .map_err(|_| self.misbehaved(format!("its state is {}, expected 0 to 7", got.device_state)))
    }

    fn flags(&self, migration: &mut Migration) -> Result<MigrationFlags> {
        if let Some(flags) = migration.flags {
            return Ok(flags);
        }
        let mut got = FeatureMigration::default();
        let limit = self.options.request_limit;
        let payload = got.as_mut_bytes();
        self.feature_call(FeatureIndex::MIGRATION, FeatureOp::GET, payload, &mut Refers::Nothing, limit)?;
        let flags = MigrationFlags::from_bits_retain(got.flags);
        migration.flags = Some(flags);
        Ok(flags)
    }

    /// SET of MIG_DEVICE_STATE: drives the device, and returns a stream if a session opens.
    fn set_device_state(self: &Arc<Shared>, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let mut migration = self.migration.lock().unwrap_or_else(PoisonError::into_inner);
        let _change = self.session.change();
        let flags = self.flags(&mut migration)?;
        let from = match self.session.state() {
            Some(state) => state,
            None => self.get_state()?,
        };
        let to =
            FeatureMigState::read_from_prefix(request.payload).ok().and_then(|(set, _)| set.state().ok());
        // The server decides about refusals; without a path nothing changes here.
        let path = to.and_then(|to| fsm::path(flags, from, to).ok());
        let limit = self.options.state_limit;
        let index = FeatureIndex::MIG_DEVICE_STATE;
        if from == State::Resuming && to.is_some_and(|to| to != from) {
            self.session.finish_load();
        }
        let done = self.feature_call(index, FeatureOp::SET, request.payload, &mut request.refers, limit);
        let reached = match (&done, to) {
            (Ok(_), Some(to)) => Some(to),
            // It stays on some state of the path, or is in ERROR.
            _ => {
                self.session.set_state(None);
                self.get_state().ok()
            }
        };
        let mut opened = false;
        match (&path, reached) {
            (Some(path), Some(reached)) if path.states().contains(&reached) => {
                for arc in path.arcs() {
                    if path.states()[0] == reached {
                        break;
                    }
                    match arc.session {
                        Effect::Opens => {
                            self.session.end();
                            opened = true;
                        }
                        Effect::Ends => {
                            self.session.end();
                            opened = false;
                        }
                        Effect::Keeps | Effect::None => {}
                    }
                    if arc.to == reached {
                        break;
                    }
                }
            }
            // Whatever it did, a session that it is no longer in has ended.
            (_, Some(reached)) if reached == from => {}
            _ => self.session.end(),
        }
        self.session.set_state(reached);
        let (payload_bytes, _) = done?;
        let stream: Option<Box<dyn DataStream>> = match opened {
            true => {
                let stream = Stream::new(Arc::clone(self));
                match self.data_socket()? {
                    Some(socket) => Some(Box::new(SocketStream::new(stream, socket))),
                    None => Some(Box::new(stream)),
                }
            }
            false => None,
        };
        Ok(FeatureReply { payload_bytes, stream, fd: None })
    }

    /// Requests a socket for the data of the session that has just opened; `None` if the server has none.
    fn data_socket(&self) -> Result<Option<Arc<Foreign<UnixStream>>>> {
        if !self.options.data_socket || !self.features.has(extension::DATA_FD) {
            return Ok(None);
        }
        let mut payload = extension::DataFd::default();
        let limit = self.options.request_limit;
        let (payload, nothing) = (payload.as_mut_bytes(), &mut Refers::Nothing);
        match self.feature_call(extension::DATA_FD, FeatureOp::GET, payload, nothing, limit) {
            Ok((_, Some(fd))) => {
                let socket = fd.into_unix_stream().map_err(|_| {
                    self.misbehaved("the fd for the session's socket is not a UNIX stream socket".into())
                })?;
                let socket = Arc::new(socket);
                *self.session.socket.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(Arc::clone(&socket));
                Ok(Some(socket))
            }
            Ok((_, None)) => Err(self.misbehaved("the session's socket did not come".into())),
            Err(Error::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Pre-copy info, where the server has it.
    pub fn precopy_info(&self, payload: &mut [u8]) -> Result<usize> {
        if !self.features.has(extension::PRECOPY_INFO) {
            return Err(self.refused("PRECOPY_INFO", Errno::ENOTTY));
        }
        let limit = self.options.request_limit;
        let nothing = &mut Refers::Nothing;
        Ok(self.feature_call(extension::PRECOPY_INFO, FeatureOp::GET, payload, nothing, limit)?.0)
    }
}

/// Payloads up to this length are sent without an allocation.
const INPUT_BYTES: usize = 64;

/// Clears the bits beyond a report's range, which some servers fill from their own log.
fn clear_beyond(payload: &[u8], words: &mut [u64]) {
    let Ok((report, _)) = FeatureDmaLoggingReport::read_from_prefix(payload) else { return };
    let pages = report.length.div_ceil(report.page_size.max(1));
    if pages % 64 != 0
        && let Ok(last) = usize::try_from(pages / 64)
        && let Some(word) = words.get_mut(last)
    {
        *word &= (1 << (pages % 64)) - 1;
    }
}

/// A request in words.
fn name(index: FeatureIndex, op: FeatureOp) -> String {
    let index = match index {
        extension::PRECOPY_INFO => "PRECOPY_INFO".to_owned(),
        extension::DATA_FD => "DATA_FD".to_owned(),
        extension::STAY => "STAY".to_owned(),
        extension::ECHO => "ECHO".to_owned(),
        extension::KICK => "KICK".to_owned(),
        extension::NEXT => "NEXT".to_owned(),
        other => other.to_string(),
    };
    match op {
        op if op.contains(FeatureOp::PROBE) => format!("PROBE {index}"),
        FeatureOp::SET => format!("SET {index}"),
        _ => format!("GET {index}"),
    }
}
