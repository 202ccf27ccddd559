//! [`Driver`]: plays requests on a device, and compares its answers with a model of the standard (`vfio.h: enum
//! vfio_device_mig_state`, `limosa_protocol::fsm`).

use std::sync::Arc;

use limosa_client::{Chunk, Device, DeviceExt, FeatureRequest, Refers};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State, fsm};

use super::judge::{Differs, Expected};
use super::request::Request;
use crate::check::Needs;
use crate::recorder::Recorded;
use crate::survey::Facts;
use crate::trial::Stream;

/// A session as the model knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Session {
    number: u64,
    loads: bool,
}

/// A data stream, and its session.
struct Held {
    stream: Stream,
    session: Session,
    /// Its end was read.
    ended: bool,
    /// A write was refused. Clients differ in how they handle further writes: the client of kernel devices sends none.
    refused: bool,
}

/// Plays the requests of one thread.
pub(super) struct Driver {
    device: Arc<Recorded>,
    facts: Arc<Facts>,
    /// Whether this thread drives the device. Only then does the model track the state.
    pub(super) drives: bool,
    pub(super) state: State,
    session: Option<Session>,
    sessions: u64,
    newest: Option<Held>,
    older: Option<Held>,
    /// Bytes of the sample that were written, in order.
    written: usize,
    /// Other data was written, or a write was refused.
    junk: bool,
    /// Whether the log is on, where that is known.
    pub(super) logging: Option<bool>,
}

impl Driver {
    /// For a device in RUNNING without a log.
    pub fn new(device: Arc<Recorded>, facts: Arc<Facts>, drives: bool) -> Driver {
        Driver {
            device,
            facts,
            drives,
            state: State::Running,
            session: None,
            sessions: 0,
            newest: None,
            older: None,
            written: 0,
            junk: false,
            logging: Some(false),
        }
    }

    fn has(&self, needs: Needs) -> bool {
        self.facts.has.contains(needs)
    }

    /// Plays one request.
    pub fn play(&mut self, request: &Request) -> std::result::Result<(), Differs> {
        if !self.has(Needs::MIGRATION) && !matches!(request, Request::Reset | Request::Feature(..)) {
            return Ok(());
        }
        match *request {
            Request::SetState(raw) => self.set_state(request, raw),
            Request::GetState => self.get_state(request),
            Request::Reset if !self.has(Needs::RESET) => Ok(()),
            Request::Reset => {
                self.judge(request, self.device.reset(), Expected::Done)?;
                (self.state, self.session, self.logging) = (State::Running, None, None);
                self.get_state(request)
            }
            Request::Read(bytes) => {
                let Some(mut held) = self.newest.take() else { return Ok(()) };
                let read = self.read(request, &mut held, bytes);
                self.newest = Some(held);
                read
            }
            Request::OldRead(bytes) => {
                let Some(mut held) = self.older.take() else { return Ok(()) };
                let read = self.read(request, &mut held, bytes);
                self.older = Some(held);
                read
            }
            Request::WriteState(bytes) => self.write(request, bytes, false),
            Request::WriteJunk(bytes) => self.write(request, bytes, true),
            Request::Drop => {
                self.newest = None;
                Ok(())
            }
            Request::PrecopyInfo => self.precopy_info(request),
            Request::DataSize => {
                let has = self.has(Needs::DATA_SIZE);
                let size = self.judge(request, self.device.mig_data_size(), Expected::Done)?;
                match size.flatten() {
                    None if has => Err(self.differs(request, "no size", "a size")),
                    _ => Ok(()),
                }
            }
            Request::Feature(op, index, bytes) => self.feature(request, op, index, bytes),
            _ if !self.has(Needs::LOGGING) => Ok(()),
            Request::LogStart(page_size, iova, length) => {
                let answer = self.device.dma_logging_start(page_size, &[DmaLoggingRange { iova, length }]);
                let expected = match self.logging {
                    Some(true) => Expected::Refused,
                    Some(false) => Expected::Done,
                    None => Expected::Anything,
                };
                self.judge(request, answer, expected)?;
                self.logging = Some(true);
                Ok(())
            }
            Request::LogStop => {
                let expected = if self.logging == Some(true) { Expected::Done } else { Expected::Anything };
                self.judge(request, self.device.dma_logging_stop(), expected)?;
                self.logging = Some(false);
                Ok(())
            }
            Request::LogReport(page_size, iova, length) => {
                let mut words = vec![0; length.div_ceil(page_size).div_ceil(64) as usize];
                let answer = self.device.dma_logging_report(iova, length, page_size, &mut words);
                let expected = match self.logging {
                    Some(true) => Expected::Done,
                    Some(false) => Expected::Refused,
                    None => Expected::Anything,
                };
                self.judge(request, answer, expected).map(drop)
            }
        }
    }

    fn get_state(&self, request: &Request) -> std::result::Result<(), Differs> {
        match self.judge(request, self.device.state(), Expected::Done)? {
            Some(found) if self.drives && found != self.state => {
                Err(self.differs(request, &format!("in {found}"), &self.state.to_string()))
            }
            Some(State::Error) if !self.drives => Err(self.differs(request, "in ERROR", "another state")),
            _ => Ok(()),
        }
    }

    fn set_state(&mut self, request: &Request, raw: u32) -> std::result::Result<(), Differs> {
        let mut payload = [raw.to_ne_bytes(), (-1i32).to_ne_bytes()].concat();
        let answer = self.device.feature(&mut FeatureRequest {
            index: FeatureIndex::MIG_DEVICE_STATE,
            op: FeatureOp::SET,
            payload: &mut payload,
            refers: Refers::Nothing,
        });
        let from = self.state;
        let path = State::from_raw(raw).map(|to| fsm::path(self.facts.flags, from, to));
        let Some(Ok(path)) = path else {
            let is_same_error = from == State::Error && raw == State::Error.raw();
            let expected = if is_same_error { Expected::Anything } else { Expected::Refused };
            self.judge(request, answer, expected)?;
            return self.get_state(request);
        };
        let to = State::from_raw(raw).unwrap_or(from);
        let is_whole = !self.junk && self.facts.sample.as_ref().is_some_and(|all| all.len() == self.written);
        let may_fail = from == State::Resuming && to != from && !is_whole;
        let expected = if may_fail { Expected::Anything } else { Expected::Done };
        let Some(reply) = self.judge(request, answer, expected)? else {
            return self.failed(request, path.states());
        };
        self.state = to;
        if to == from {
            return match reply.stream {
                Some(_) => Err(self.differs(request, "a data stream", "none")),
                None => Ok(()),
            };
        }
        if reply.stream.is_some() != path.opens_session() {
            let words = |is: bool| if is { "a data stream" } else { "no data stream" };
            return Err(self.differs(request, words(reply.stream.is_some()), words(path.opens_session())));
        }
        match reply.stream {
            Some(stream) => {
                self.sessions += 1;
                let session = Session { number: self.sessions, loads: to == State::Resuming };
                self.session = Some(session);
                self.older = self.newest.take();
                self.newest = Some(Held { stream, session, ended: false, refused: false });
                (self.written, self.junk) = (0, false);
            }
            None if !(to.is_saving() && from.is_saving()) => self.session = None,
            None => {}
        }
        Ok(())
    }

    /// A load that was refused: the device is in a state on the path or in ERROR, and GET returns which.
    fn failed(&mut self, request: &Request, path: &[State]) -> std::result::Result<(), Differs> {
        match self.judge(request, self.device.state(), Expected::Done)? {
            Some(found) if found == self.state || found == State::Error || path.contains(&found) => {
                self.session = self.session.filter(|_| found == self.state);
                self.state = found;
                Ok(())
            }
            Some(found) => {
                Err(self.differs(request, &format!("left in {found}"), "a state on the path or ERROR"))
            }
            None => Ok(()),
        }
    }

    fn read(&self, request: &Request, held: &mut Held, bytes: usize) -> std::result::Result<(), Differs> {
        let is_live = self.session == Some(held.session);
        let answer = held.stream.read(&mut vec![0; bytes]);
        let expected = match (is_live, held.session.loads) {
            (false, is_wrong_way) => Expected::Ended { is_wrong_way },
            (true, true) => Expected::With(Errno::EBADF),
            (true, false) => Expected::Done,
        };
        match self.judge(request, answer, expected)? {
            Some(Chunk::Data(0)) => Err(self.differs(request, "data of no bytes", "data")),
            Some(Chunk::Data(got)) if got > bytes => {
                Err(self.differs(request, "more than was asked for", "data"))
            }
            Some(Chunk::Data(_)) if held.ended => Err(self.differs(request, "data after the end", "the end")),
            Some(Chunk::NothingForNow) if !self.state.is_pre_copy() => {
                Err(self.differs(request, "nothing for now", "data or the end"))
            }
            Some(Chunk::End) if self.state.is_pre_copy() => {
                Err(self.differs(request, "the end", "data or nothing for now"))
            }
            Some(Chunk::End) => {
                held.ended = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn write(&mut self, request: &Request, bytes: usize, junk: bool) -> std::result::Result<(), Differs> {
        let Some(mut held) = self.newest.take() else { return Ok(()) };
        let rest = self.facts.sample.as_ref().map_or(&[][..], |all| &all[self.written.min(all.len())..]);
        let data = match junk || rest.is_empty() {
            true => vec![0x5a; bytes],
            false => rest[..bytes.min(rest.len())].to_vec(),
        };
        let is_own = !junk && !rest.is_empty() && !self.junk;
        let was_refused = held.refused;
        let answer = held.stream.write(&data);
        held.refused |= answer.is_err();
        let is_live = self.session == Some(held.session);
        let expected = match (is_live, held.session.loads) {
            (false, _) if was_refused => Expected::Refused,
            (false, loads) => Expected::Ended { is_wrong_way: !loads },
            (true, false) => Expected::With(Errno::EBADF),
            (true, true) if is_own => Expected::Done,
            (true, true) => Expected::Anything,
        };
        let loads = is_live && held.session.loads;
        let judged = self.judge(request, answer, expected);
        self.newest = Some(held);
        let taken = judged?.is_some();
        if loads {
            self.junk |= !is_own || !taken;
            self.written += data.len();
        }
        Ok(())
    }

    fn precopy_info(&mut self, request: &Request) -> std::result::Result<(), Differs> {
        let Some(mut held) = self.newest.take() else { return Ok(()) };
        let answer = held.stream.precopy_info();
        let is_live = self.session == Some(held.session);
        self.newest = Some(held);
        let expected = match (self.has(Needs::PRECOPY_INFO), is_live) {
            (true, true) if self.state.is_pre_copy() => Expected::Done,
            _ => Expected::Refused,
        };
        self.judge(request, answer, expected).map(drop)
    }

    fn feature(
        &self,
        request: &Request,
        op: u32,
        index: u16,
        bytes: usize,
    ) -> std::result::Result<(), Differs> {
        let (op, index) = (FeatureOp::from_bits_retain(op), FeatureIndex(index));
        let mut payload = vec![0; bytes];
        let answer = self.device.feature(&mut FeatureRequest {
            index,
            op,
            payload: &mut payload,
            refers: Refers::Nothing,
        });
        let known = self.facts.features.contains(&index.to_string());
        let rules = index.rules().filter(|_| known);
        let assigned = FeatureOp::all().contains(op);
        let one = op.contains(FeatureOp::PROBE) || op.contains(FeatureOp::GET) != op.contains(FeatureOp::SET);
        let allowed = |rules: &limosa_protocol::feature::FeatureRules| {
            (!op.contains(FeatureOp::GET) || rules.get) && (!op.contains(FeatureOp::SET) || rules.set)
        };
        let expected = match rules {
            Some(rules) if assigned && one && allowed(rules) => Expected::Done,
            _ => Expected::Refused,
        };
        self.judge(request, answer, expected).map(drop)
    }
}
