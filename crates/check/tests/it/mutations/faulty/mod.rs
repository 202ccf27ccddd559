//! A device with one fault, round a device without any.

mod device;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use limosa_client::{
    Chunk, DataStream, Device, DeviceExt, DeviceIdentity, DirtyBits, DmaMap, Error, FeatureReply,
    FeatureRequest, IrqAction, Refers, Region, Result,
};
use limosa_device::Loopback;
use limosa_protocol::feature::{DmaLoggingRange, FeatureMigState, PrecopyInfo};
use limosa_protocol::info::{DeviceInfo, IrqInfo};
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State, fsm};
use zerocopy::{FromBytes, IntoBytes};

use super::faults::Fault;
pub use device::FaultyDevice;
use stream::FaultyStream;

/// What a device and its streams share.
pub struct Faulty {
    pub inner: Loopback,
    pub fault: Fault,
    /// What a fault counts.
    pub count: AtomicU64,
    /// What it remembers.
    pub memory: AtomicU64,
    /// It is in ERROR.
    pub broken: AtomicBool,
}

/// Whether a check's second thread calls. Checks themselves run in threads with a name.
fn is_second_thread() -> bool {
    std::thread::current().name().is_none()
}

impl Faulty {
    pub fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn refuse<T>(&self, errno: Errno) -> Result<T> {
        let request = "a request that meets the fault".into();
        Err(Error::Refused { device: self.inner.name().into(), request, errno, hint: "".into() })
    }

    fn tick(&self) -> u64 {
        self.count.fetch_add(1, Ordering::SeqCst) + 1
    }

    pub fn now(&self) -> State {
        if self.broken.load(Ordering::SeqCst) {
            return State::Error;
        }
        self.inner.machine().state()
    }

    fn set(self: &Arc<Faulty>, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let from = self.now();
        let asked = FeatureMigState::read_from_prefix(request.payload).map(|(asked, _)| asked.device_state);
        let Some(to) = asked.ok().and_then(State::from_raw) else {
            if request.payload.len() >= 8 && self.is(Fault::TakesNumbers) {
                return Ok(FeatureReply::default());
            }
            if request.payload.len() >= 8 && self.is(Fault::NumbersStopIt) {
                self.inner.set_state(State::Stop)?;
                return self.refuse(Errno::EINVAL);
            }
            return self.inner.feature(request);
        };
        let flags = self.inner.migration_flags()?;
        let path = fsm::path(flags, from, to);
        match self.fault {
            Fault::Pair(wrong_from, wrong_to) if (from, to) == (wrong_from, wrong_to) => {
                // Only a check that begins there counts: bringing the device back goes on by a reset.
                return match path {
                    Ok(_) => self.refuse(Errno::EIO),
                    Err(_) if from == to => self.refuse(Errno::EIO),
                    Err(_) => Ok(FeatureReply::default()),
                };
            }
            Fault::WearsOut
                if (from, to) == (State::Running, State::Stop) && self.tick().is_multiple_of(13) =>
            {
                return self.refuse(Errno::EBUSY);
            }
            Fault::TakesUnsupported if matches!(path, Err(fsm::Refusal::Unsupported(_))) => {
                return Ok(FeatureReply::default());
            }
            Fault::NoCancel if from.is_pre_copy() && to == State::Running => {
                return self.refuse(Errno::EBUSY);
            }
            Fault::StopCopyWearsOut if to == State::StopCopy && self.tick().is_multiple_of(7) => {
                return self.refuse(Errno::EBUSY);
            }
            Fault::SetsFromOneThread if is_second_thread() => return self.refuse(Errno::EBUSY),
            Fault::MustBeRead
                if from == State::StopCopy && to != from && self.memory.load(Ordering::SeqCst) == 0 =>
            {
                return self.refuse(Errno::EBUSY);
            }
            Fault::NotAfterHalfLoad
                if from != to && to == State::Resuming && self.memory.swap(0, Ordering::SeqCst) != 0 =>
            {
                return self.refuse(Errno::EIO);
            }
            _ => {}
        }
        if from == State::Error {
            return self.refuse(Errno::EINVAL);
        }
        if to == State::StopCopy && self.is(Fault::MustBeRead) {
            self.memory.store(0, Ordering::SeqCst);
        }
        let done = self.inner.feature(request);
        if path.is_err() && self.is(Fault::RefusedSetEndsSession) && from.is_saving() {
            self.memory.store(1, Ordering::SeqCst);
        } else if self.is(Fault::RefusedSetEndsSession) {
            self.memory.store(0, Ordering::SeqCst);
        }
        let mut reply = match done {
            Ok(reply) => reply,
            Err(error) => {
                if from == State::Resuming && path.is_ok() && self.is(Fault::TakesAnything) {
                    self.inner.reset()?;
                    self.inner.set_state(to)?;
                    return Ok(FeatureReply::default());
                }
                let incomplete = self.is(Fault::TakesIncomplete) && self.memory.load(Ordering::SeqCst) == 0;
                if from == State::Resuming && path.is_ok() && incomplete {
                    self.inner.reset()?;
                    self.inner.set_state(to)?;
                    return Ok(FeatureReply::default());
                }
                if from == State::Resuming && path.is_ok() && self.is(Fault::RefusedLoadGoesAstray) {
                    self.memory.store(1, Ordering::SeqCst);
                }
                if from == State::Resuming && path.is_ok() && self.is(Fault::NoWayBackFromBadLoad) {
                    self.memory.store(1, Ordering::SeqCst);
                }
                return Err(error);
            }
        };
        if self.is(Fault::LoadIsLost) && (from, to) == (State::Resuming, State::Stop) {
            // What it holds then is another state than the one that came.
            self.inner.set_state(State::Running)?;
            self.inner.region_write(0, 0x100, &[0x5a; 8])?;
            self.inner.set_state(State::Stop)?;
        }
        let opened = path.is_ok_and(|path| path.opens_session());
        match (self.fault, opened) {
            (Fault::NoStream, true) => reply.stream = None,
            (Fault::StreamTooMuch, false) => reply.stream = Some(Box::new(FaultyStream::nothing(self))),
            (Fault::NewStreamInStopCopy, false) if from.is_pre_copy() && to == State::StopCopy => {
                reply.stream = Some(Box::new(FaultyStream::nothing(self)));
            }
            (Fault::NewStreamInP2p, false) if from.is_pre_copy() && to.is_pre_copy() && from != to => {
                reply.stream = Some(Box::new(FaultyStream::nothing(self)));
            }
            _ => {}
        }
        if opened && matches!(self.fault, Fault::TakesIncomplete | Fault::SessionOutlivesReset) {
            self.memory.store(0, Ordering::SeqCst);
        }
        if opened {
            self.count.fetch_add(1, Ordering::SeqCst);
        }
        reply.stream = reply.stream.map(|stream| {
            let generation = self.count.load(Ordering::SeqCst);
            let stream = FaultyStream {
                shared: Arc::clone(self),
                stream: Some(stream),
                loads: to == State::Resuming,
                began_in: to,
                generation,
                read: 0,
                ended: 0,
            };
            Box::new(stream) as Box<dyn DataStream>
        });
        Ok(reply)
    }

    fn get(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let reply = self.inner.feature(request)?;
        let now = self.now();
        let lie = match self.fault {
            Fault::SaysRunning => (now == State::Stop).then_some(State::Running),
            Fault::GetMovesOn => {
                let said = if now == State::Stop && self.tick() > 12 { Some(State::Running) } else { None };
                if now != State::Stop {
                    self.count.store(0, Ordering::SeqCst);
                }
                said
            }
            Fault::BeginsInStop => {
                (now == State::Running && self.tick().is_multiple_of(2)).then_some(State::Stop)
            }
            Fault::GetFromOneThread if is_second_thread() => Some(State::PreCopy),
            Fault::RefusedLoadGoesAstray if self.memory.swap(0, Ordering::SeqCst) == 1 => {
                Some(State::PreCopy)
            }
            Fault::ErrorFades if now == State::Error && self.tick().is_multiple_of(3) => Some(State::Stop),
            _ => (now == State::Error).then_some(State::Error),
        };
        if let Some(state) = lie {
            let payload = FeatureMigState::new(state);
            request.payload[..8].copy_from_slice(payload.as_bytes());
        }
        Ok(reply)
    }

    fn logging_start(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let ranges: Vec<DmaLoggingRange> = match &request.refers {
            Refers::In(bytes) => bytes
                .chunks_exact(16)
                .filter_map(|bytes| DmaLoggingRange::read_from_bytes(bytes).ok())
                .collect(),
            _ => Vec::new(),
        };
        let aligned =
            ranges.iter().all(|range| range.iova.is_multiple_of(4096) && range.length.is_multiple_of(4096));
        let empty = ranges.iter().any(|range| range.length == 0);
        let overflows = ranges.iter().any(|range| range.iova.checked_add(range.length).is_none());
        let neighbours = ranges.windows(2).any(|two| two[0].iova + two[0].length == two[1].iova);
        let lies = match self.fault {
            Fault::LogTakesAnyRange => {
                !aligned || empty || (ranges.len() == 2 && overlaps(&ranges)) || ranges.is_empty()
            }
            Fault::LogTakesOverflow => overflows,
            Fault::LogTakesTooMany => ranges.len() > 256,
            Fault::LogStartsTwice => {
                let answer = self.inner.feature(request);
                return answer.or_else(|_| Ok(FeatureReply { payload_bytes: 16, ..FeatureReply::default() }));
            }
            Fault::LogOneRange if ranges.len() > 1 && !overlaps(&ranges) => {
                return self.refuse(Errno::ENOSPC);
            }
            Fault::LogRefusesEmptyOddly if empty => return self.refuse(Errno::EIO),
            Fault::LogNoNeighbours if neighbours => return self.refuse(Errno::EINVAL),
            Fault::LogStartsOnce if self.tick().is_multiple_of(4) => return self.refuse(Errno::EBUSY),
            Fault::LogNotWhileStopped if self.now() != State::Running => return self.refuse(Errno::EBUSY),
            Fault::LogStaysOnAfterRefusal if !aligned => {
                self.memory.store(1, Ordering::SeqCst);
                return self.refuse(Errno::EINVAL);
            }
            Fault::LogStaysOnAfterRefusal if self.memory.swap(0, Ordering::SeqCst) == 1 => {
                return self.refuse(Errno::EINVAL);
            }
            _ => false,
        };
        if lies {
            return Ok(FeatureReply { payload_bytes: 16, ..FeatureReply::default() });
        }
        let reply = self.inner.feature(request)?;
        let hint = request.payload.len() >= 8;
        match self.fault {
            Fault::LogPageSize if hint => request.payload[..8].copy_from_slice(&5000u64.to_ne_bytes()),
            Fault::LogPageSizeSmall if hint => request.payload[..8].copy_from_slice(&512u64.to_ne_bytes()),
            _ => {}
        }
        self.count.store(self.count.load(Ordering::SeqCst).max(1), Ordering::SeqCst);
        Ok(reply)
    }

    fn logging_report(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let page_size =
            u64::from_ne_bytes(std::array::from_fn(|at| request.payload.get(16 + at).copied().unwrap_or(0)));
        let length =
            u64::from_ne_bytes(std::array::from_fn(|at| request.payload.get(8 + at).copied().unwrap_or(0)));
        let whole = request.payload.len() >= 24;
        match self.fault {
            Fault::LogReportsOtherPages(other) if whole && page_size == other => {
                return self.refuse(Errno::ENOTSUP);
            }
            Fault::LogReportsWhole if whole && page_size == 4096 && length < 1 << 20 => {
                return self.refuse(Errno::EINVAL);
            }
            Fault::LogReportsNothing if whole => return self.refuse(Errno::EIO),
            Fault::LogOffInStop if whole && self.now() != State::Running => {
                return self.refuse(Errno::EINVAL);
            }
            _ => {}
        }
        let answer = self.inner.feature(request);
        if whole
            && answer.is_err()
            && matches!(self.fault, Fault::LogTakesAnyReport | Fault::LogReportsWhileOff)
        {
            let off = page_size == 4096 && length == 4096;
            if off == self.is(Fault::LogReportsWhileOff) {
                return Ok(FeatureReply { payload_bytes: 24, ..FeatureReply::default() });
            }
        }
        let reply = answer?;
        if let Refers::Bitmap(words) = &mut request.refers {
            match self.fault {
                Fault::LogKeepsDirty => words[0] |= 2,
                Fault::LogBeyond => {
                    if let Some(last) = words.last_mut() {
                        *last |= 1 << 63;
                    }
                }
                _ => {}
            }
        }
        Ok(reply)
    }
}

fn overlaps(ranges: &[DmaLoggingRange]) -> bool {
    matches!(ranges, [one, two] if one.iova < two.iova + two.length && two.iova < one.iova + one.length)
}
