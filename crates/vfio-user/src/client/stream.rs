//! The data of a session (`vfio-user.rst: VFIO_USER_MIG_DATA_READ, VFIO_USER_MIG_DATA_WRITE`).
//!
//! The wire does not distinguish "nothing for now" from the end. The state does: an empty read that was sent in
//! STOP_COPY is the end; one that was sent in pre-copy is not, even if the device is stopped before the reply arrives.

use std::sync::Arc;

use limosa_client::{Chunk, DataStream, Error, Result};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, State};
use zerocopy::IntoBytes;

use super::Shared;
use crate::codec::{Command, MigData};

/// The stream of one session, by messages.
pub(super) struct Stream {
    pub(super) shared: Arc<Shared>,
    /// Which session, by the client's count.
    session: u64,
}

impl Stream {
    /// The stream of the session that is open now.
    pub fn new(shared: Arc<Shared>) -> Stream {
        let session = shared.session.number();
        Stream { shared, session }
    }

    /// The state, of which the session is one.
    pub(super) fn state(&self, request: &str) -> Result<State> {
        let state = match self.shared.session.state() {
            Some(state) => state,
            None => self.shared.get_state()?,
        };
        if self.session != self.shared.session.number() || !state.has_session() {
            return Err(self.shared.refused(request, Errno::ENODEV));
        }
        Ok(state)
    }

    /// A refusal because the session has ended is ENODEV, whatever errno the server used.
    pub(super) fn or_ended(&self, request: &str, error: Error) -> Error {
        match error {
            Error::Refused { .. } if self.session != self.shared.session.number() => {
                self.shared.refused(request, Errno::ENODEV)
            }
            other => other,
        }
    }
}

impl DataStream for Stream {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        let request = "MIG_DATA_READ";
        let state = self.state(request)?;
        if !state.is_saving() {
            return Err(self.shared.refused(request, Errno::EBADF));
        }
        if data.is_empty() {
            return Err(self.shared.usage(format!("{request} into an empty buffer")));
        }
        let want = data.len().min(self.transfer_bytes_max());
        let size = want as u32;
        let ask = MigData { argsz: size.saturating_add(MigData::BYTES as u32), size };
        let mut reply = MigData::default();
        let into: &mut [&mut [u8]] = &mut [reply.as_mut_bytes(), &mut data[..want]];
        let answer = self
            .shared
            .call(request, Command::MIG_DATA_READ, &[ask.as_bytes()], into)
            .map_err(|error| self.or_ended(request, error))?;
        let got = reply.size as usize;
        if answer.body_bytes < MigData::BYTES || got > want || answer.body_bytes - MigData::BYTES < got {
            return Err(self.shared.misbehaved(format!(
                "{request} of {want} bytes answered with {} bytes that say they are {got}",
                answer.body_bytes
            )));
        }
        Ok(match got {
            0 if state == State::StopCopy => Chunk::End,
            0 => Chunk::NothingForNow,
            bytes => Chunk::Data(bytes),
        })
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        let request = "MIG_DATA_WRITE";
        let bytes_max =
            self.transfer_bytes_max().min(self.shared.options.data_write_bytes_max.max(1) as usize);
        let mut pieces = self.shared.pieces();
        for chunk in data.chunks(bytes_max) {
            if self.state(request)? != State::Resuming {
                return Err(self.shared.refused(request, Errno::EBADF));
            }
            let ask = MigData { argsz: (MigData::BYTES + chunk.len()) as u32, size: chunk.len() as u32 };
            let (limit, body): (_, &[&[u8]]) = (pieces.next(chunk.len()), &[ask.as_bytes(), chunk]);
            self.shared
                .call_within(limit, request, Command::MIG_DATA_WRITE, body, &mut [])
                .map_err(|error| self.or_ended(request, error))?;
        }
        Ok(())
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        let request = "PRECOPY_INFO";
        if !self.state(request)?.is_pre_copy() {
            return Err(self.shared.refused(request, Errno::EINVAL));
        }
        let mut info = PrecopyInfo::default();
        let payload = info.as_mut_bytes();
        let want = payload.len();
        let got = self.shared.precopy_info(payload).map_err(|error| self.or_ended(request, error))?;
        if got < want {
            return Err(self.shared.short(request, got, want));
        }
        Ok(info)
    }

    fn transfer_bytes_max(&self) -> usize {
        self.shared.limits.data_xfer_bytes_max as usize
    }
}
