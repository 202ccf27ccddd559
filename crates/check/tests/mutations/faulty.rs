//! A device with one fault, round a device without any.

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

/// The device.
pub struct FaultyDevice(pub Arc<Faulty>);

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

impl Device for FaultyDevice {
    fn name(&self) -> &str {
        self.0.inner.name()
    }

    fn identity(&self) -> Option<DeviceIdentity> {
        self.0.inner.identity()
    }

    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let shared = &self.0;
        let (index, op) = (request.index, request.op);
        let (get, set) = (FeatureOp::GET, FeatureOp::SET);
        let is_probe = op.contains(FeatureOp::PROBE);
        let done = |bytes: usize| Ok(FeatureReply { payload_bytes: bytes, ..FeatureReply::default() });
        let known = FeatureOp::all();
        let rules = index.rules();
        let wants = rules.map_or(0, |rules| rules.payload_bytes);
        let wrong_op =
            rules.is_some_and(|rules| (op.contains(get) && !rules.get) || (op.contains(set) && !rules.set));
        let migration =
            [FeatureIndex::MIGRATION, FeatureIndex::MIG_DEVICE_STATE, FeatureIndex::MIG_DATA_SIZE];
        let logging = [
            FeatureIndex::DMA_LOGGING_START,
            FeatureIndex::DMA_LOGGING_STOP,
            FeatureIndex::DMA_LOGGING_REPORT,
        ];
        let misuse = match shared.fault {
            Fault::IgnoresFlags => !known.contains(op),
            Fault::GetWithSet => op == get | set,
            Fault::NoOperation => op.is_empty(),
            Fault::KnowsEveryIndex => rules.is_none(),
            Fault::ShortPayloads => {
                !is_probe && [get, set].contains(&op) && !wrong_op && request.payload.len() < wants
            }
            Fault::WrongOperations => !is_probe && wrong_op,
            Fault::ProbesWrongOperations => is_probe && wrong_op && known.contains(op),
            _ => false,
        };
        if misuse {
            return done(0);
        }
        match shared.fault {
            Fault::NoProbe if is_probe && op == FeatureOp::PROBE => return shared.refuse(Errno::EINVAL),
            Fault::NoProbeOfBoth if op == FeatureOp::PROBE | get | set => {
                return shared.refuse(Errno::EINVAL);
            }
            Fault::NoProbeOf(which)
                if index == which
                    && op.bits() & !(get | set).bits() == FeatureOp::PROBE.bits()
                    && !wrong_op
                    && shared.now() == State::Running
                    && shared.tick() > 1 =>
            {
                return shared.refuse(Errno::EINVAL);
            }
            Fault::ProbeActs if is_probe && op.contains(set) && request.payload.len() >= 8 => {
                shared.inner.set_state(State::Stop)?;
                return done(0);
            }
            Fault::ProbeEndsSession if is_probe && shared.now() == State::StopCopy => {
                shared.inner.set_state(State::Stop)?;
                return done(0);
            }
            Fault::ShortAnswer if index == FeatureIndex::MIGRATION && op == get => {
                shared.inner.feature(request)?;
                return done(4);
            }
            Fault::ShortStateAnswer
                if index == FeatureIndex::MIG_DEVICE_STATE
                    && op == get
                    && request.payload.len() == 8
                    && shared.tick().is_multiple_of(2) =>
            {
                shared.inner.feature(request)?;
                return done(4);
            }
            Fault::WrongWithMoreRoom
                if index == FeatureIndex::MIGRATION && op == get && request.payload.len() > 8 =>
            {
                return shared.refuse(Errno::EINVAL);
            }
            Fault::WithoutStopCopy | Fault::UnknownFlag
                if index == FeatureIndex::MIGRATION
                    && op == get
                    && request.payload.len() == 8
                    && known.contains(op) =>
            {
                shared.inner.feature(request)?;
                let flags: u64 = if shared.is(Fault::WithoutStopCopy) { 0b110 } else { 0b1_0111 };
                request.payload[..8].copy_from_slice(&flags.to_ne_bytes());
                return done(8);
            }
            Fault::AbsentOddly if migration.contains(&index) && !is_probe && request.payload.len() == 8 => {
                return shared.refuse(Errno::EIO);
            }
            Fault::LogAbsentOddly if logging.contains(&index) => {
                let oddly = shared.is(Fault::LogAbsentOddly) && !is_probe;
                return shared.refuse(if oddly { Errno::EIO } else { Errno::ENOTTY });
            }
            Fault::SizeNotIn(state)
                if index == FeatureIndex::MIG_DATA_SIZE && op == get && shared.now() == state =>
            {
                return shared.refuse(Errno::EBUSY);
            }
            Fault::SizeIsZero | Fault::SizeIsHuge
                if index == FeatureIndex::MIG_DATA_SIZE && op == get && request.payload.len() == 8 =>
            {
                let size: u64 = if shared.is(Fault::SizeIsZero) { 0 } else { 1 << 50 };
                request.payload.copy_from_slice(&size.to_ne_bytes());
                return done(8);
            }
            Fault::V2Refused if index == FeatureIndex::MIG_PRECOPY_INFO_V2 && op == set => {
                return shared.refuse(Errno::ENOTTY);
            }
            _ => {}
        }
        if !known.contains(op) || is_probe {
            return shared.inner.feature(request);
        }
        match (index, op) {
            (FeatureIndex::MIG_DEVICE_STATE, op) if op == set => shared.set(request),
            (FeatureIndex::MIG_DEVICE_STATE, op) if op == get => shared.get(request),
            (FeatureIndex::DMA_LOGGING_START, op) if op == set => shared.logging_start(request),
            (FeatureIndex::DMA_LOGGING_REPORT, op) if op == get => shared.logging_report(request),
            (FeatureIndex::DMA_LOGGING_STOP, op) if op == set && shared.is(Fault::LogNeverStops) => {
                // It says so, and stays on until the next START.
                if shared.now() == State::Running && shared.memory.load(Ordering::SeqCst) == 0 {
                    return done(0);
                }
                shared.inner.feature(request)
            }
            _ => shared.inner.feature(request),
        }
    }

    fn reset(&self) -> Result<()> {
        let shared = &self.0;
        let now = shared.now();
        match shared.fault {
            Fault::NoResetIn(state) if now == state && shared.memory.fetch_xor(1, Ordering::SeqCst) == 0 => {
                return shared.refuse(Errno::EBUSY);
            }
            Fault::NoResetWhileLogging
                if now == State::Running && shared.inner.dma_logging_start(4096, &[]).is_err() =>
            {
                return shared.refuse(Errno::EBUSY);
            }
            Fault::NoResetWhileLogging => {
                let _ = shared.inner.dma_logging_stop();
            }
            Fault::ResetsOnce if now == State::Running && shared.tick().is_multiple_of(3) => {
                return shared.refuse(Errno::EBUSY);
            }
            Fault::NoWayBackFromBadLoad if shared.memory.swap(0, Ordering::SeqCst) == 1 => {
                return shared.refuse(Errno::EIO);
            }
            Fault::ResetRefused => return shared.refuse(Errno::EIO),
            Fault::NotAfterHalfLoad if now == State::Resuming => shared.memory.store(1, Ordering::SeqCst),
            Fault::NotAfterHalfLoad => shared.memory.store(0, Ordering::SeqCst),
            Fault::SessionOutlivesReset => shared.memory.store(1, Ordering::SeqCst),
            Fault::ResetLosesData => shared.memory.store(7, Ordering::SeqCst),
            Fault::ResetForbidsLoads => shared.memory.store(7, Ordering::SeqCst),
            _ => {}
        }
        shared.inner.reset()?;
        shared.broken.store(false, Ordering::SeqCst);
        if shared.is(Fault::ResetStops) && shared.tick() % 2 == 1 {
            shared.inner.set_state(State::Stop)?;
        }
        Ok(())
    }

    fn info(&self) -> Result<DeviceInfo> {
        let shared = &self.0;
        let mut info = shared.inner.info()?;
        if (shared.is(Fault::FewerRegionsInStop) && shared.now() == State::Stop)
            || (shared.is(Fault::InfoFromOneThread) && is_second_thread())
        {
            info.num_regions -= 1;
        }
        Ok(info)
    }

    fn region(&self, index: u32) -> Result<Region> {
        let shared = &self.0;
        let count = shared.inner.info()?.num_regions;
        match shared.fault {
            Fault::RegionsWithoutEnd if index >= count => shared.inner.region(0),
            Fault::OddRegionIndex => {
                let mut region = shared.inner.region(index)?;
                region.info.index = 0;
                Ok(region)
            }
            _ => shared.inner.region(index),
        }
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        let shared = &self.0;
        match shared.fault {
            Fault::IrqsWithoutEnd if index >= shared.inner.info()?.num_irqs => shared.inner.irq(0),
            Fault::OddIrqIndex => Ok(IrqInfo { index: 0, ..shared.inner.irq(index)? }),
            _ => shared.inner.irq(index),
        }
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let done = self.0.inner.region_read(region, offset, data);
        if self.0.is(Fault::RegionsAreOpen) { Ok(()) } else { done }
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let done = self.0.inner.region_write(region, offset, data);
        if self.0.is(Fault::RegionsAreOpen) { Ok(()) } else { done }
    }

    fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> Result<()> {
        let done = self.0.inner.set_irqs(index, start, action);
        if self.0.is(Fault::VectorsWithoutEnd) { Ok(()) } else { done }
    }

    fn dma_map(&self, map: &DmaMap<'_>) -> Result<()> {
        self.0.inner.dma_map(map)
    }

    fn dma_unmap(&self, iova: u64, size: u64, dirty: Option<DirtyBits<'_>>) -> Result<()> {
        self.0.inner.dma_unmap(iova, size, dirty)
    }
}

/// A data stream with the device's fault.
pub struct FaultyStream {
    shared: Arc<Faulty>,
    /// `None` for one of no session.
    stream: Option<Box<dyn DataStream>>,
    loads: bool,
    began_in: State,
    /// Which session, by the count of those opened.
    generation: u64,
    read: u64,
    /// How often the end was told.
    ended: u64,
}

impl FaultyStream {
    fn nothing(shared: &Arc<Faulty>) -> FaultyStream {
        let began_in = State::Running;
        FaultyStream {
            shared: Arc::clone(shared),
            stream: None,
            loads: false,
            began_in,
            generation: 0,
            read: 0,
            ended: 0,
        }
    }

    fn is_stale(&self) -> bool {
        self.shared.now() != State::Resuming && self.loads
            || !self.loads && !self.shared.now().is_saving()
            || self.generation != self.shared.count.load(Ordering::SeqCst)
    }
}

impl DataStream for FaultyStream {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        let shared = Arc::clone(&self.shared);
        let Some(stream) = self.stream.as_mut() else { return shared.refuse(Errno::ENODEV) };
        let now = shared.now();
        let stopped = now == State::StopCopy;
        if now == State::Error {
            return match shared.fault {
                Fault::ErrorKeepsSession => Ok(Chunk::End),
                _ => shared.refuse(Errno::ENODEV),
            };
        }
        match shared.fault {
            Fault::InfoTakesData if stopped && self.read == 99 => return Ok(Chunk::End),
            Fault::EndlessData if stopped => {
                data.fill(7);
                return Ok(Chunk::Data(data.len()));
            }
            Fault::NothingInStopCopy if stopped => return Ok(Chunk::NothingForNow),
            Fault::NoDataAtAll if stopped => return Ok(Chunk::End),
            Fault::NoDataAfterPrecopy if stopped && self.began_in == State::PreCopy => return Ok(Chunk::End),
            Fault::NoDataIn(state) if stopped && self.began_in == state => return Ok(Chunk::End),
            Fault::ResetLosesData if stopped && shared.memory.load(Ordering::SeqCst) == 7 => {
                return Ok(Chunk::End);
            }
            Fault::SecondSessionEmpty if stopped && self.generation.is_multiple_of(2) => {
                return Ok(Chunk::End);
            }
            Fault::EndsInPrecopy if now.is_pre_copy() => return Ok(Chunk::End),
            Fault::EndsInPrecopyLate if now.is_pre_copy() => {
                let chunk = stream.read(data)?;
                return Ok(if chunk == Chunk::NothingForNow { Chunk::End } else { chunk });
            }
            Fault::PrecopyDiesInStopCopy if stopped && self.began_in.is_pre_copy() => {
                return shared.refuse(Errno::ENODEV);
            }
            Fault::PrecopyDataIsLost if stopped && self.began_in.is_pre_copy() && self.read == 0 => {
                self.read += 1;
                let mut lost = vec![0; 5000];
                stream.read(&mut lost)?;
            }
            Fault::PrecopyAgainInStopCopy if stopped && self.began_in.is_pre_copy() && self.ended == 0 => {
                self.ended = 1;
                data[0] = 1;
                return Ok(Chunk::Data(1));
            }
            Fault::ReadsWhileLoading if self.loads && now == State::Resuming => return Ok(Chunk::End),
            // The state is looked at last: a reset may come between that and the read.
            Fault::StaleReads => {
                return match stream.read(data) {
                    Err(Error::Refused { errno: Errno::ENODEV, .. })
                        if stream_is_stale(&shared, self.loads) =>
                    {
                        Ok(Chunk::End)
                    }
                    other => other,
                };
            }
            Fault::SessionOutlivesReset
                if now == State::Running && shared.memory.load(Ordering::SeqCst) == 1 =>
            {
                return Ok(Chunk::End);
            }
            Fault::StaleErrno => {
                return match stream.read(data) {
                    Err(Error::Refused { errno: Errno::ENODEV, .. }) => shared.refuse(Errno::EIO),
                    other => other,
                };
            }
            Fault::ReadsFromOneThread if is_second_thread() => {
                return if stopped { Ok(Chunk::End) } else { Ok(Chunk::NothingForNow) };
            }
            Fault::RefusedSetEndsSession if shared.memory.load(Ordering::SeqCst) == 1 => {
                return shared.refuse(Errno::ENODEV);
            }
            Fault::SmallReadsLose if data.len() < 16 => {
                let mut more = vec![0; data.len() + 1];
                let chunk = stream.read(&mut more)?;
                return Ok(match chunk {
                    Chunk::Data(bytes) => {
                        let kept = bytes.min(data.len());
                        data[..kept].copy_from_slice(&more[..kept]);
                        Chunk::Data(kept)
                    }
                    other => other,
                });
            }
            Fault::ReadsLose(piece) if data.len() == piece && self.read == 0 => {
                self.read = 1;
                let mut lost = vec![0; 100];
                stream.read(&mut lost)?;
            }
            Fault::GoesOnFromBefore if stopped && self.read == 0 => {
                self.read = 1;
                let skip = shared.memory.load(Ordering::SeqCst);
                if skip > 0 {
                    stream.read(&mut vec![0; skip as usize])?;
                }
            }
            _ => {}
        }
        let chunk = stream.read(data)?;
        match chunk {
            Chunk::Data(bytes) if shared.is(Fault::GoesOnFromBefore) && stopped && data.len() == 16 => {
                shared.memory.store(bytes as u64, Ordering::SeqCst);
            }
            Chunk::End => {
                if shared.is(Fault::MustBeRead) {
                    shared.memory.store(1, Ordering::SeqCst);
                }
                self.ended += 1;
                if shared.is(Fault::GoesOnFromBefore) {
                    shared.memory.store(0, Ordering::SeqCst);
                }
                if shared.is(Fault::EndIsNotTheEnd) && self.ended.is_multiple_of(2) {
                    data[0] = 1;
                    return Ok(Chunk::Data(1));
                }
                if shared.is(Fault::StateGrows) && stopped && self.ended == 1 {
                    // A byte more in every second session.
                    if self.generation.is_multiple_of(2) {
                        data[0] = 1;
                        return Ok(Chunk::Data(1));
                    }
                }
                if shared.is(Fault::StopsAtTheEnd) {
                    shared.inner.set_state(State::Stop)?;
                }
            }
            _ => {}
        }
        Ok(chunk)
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let stale = stream_is_stale(&shared, self.loads);
        let Some(stream) = self.stream.as_mut() else { return shared.refuse(Errno::ENODEV) };
        if shared.now() == State::Error {
            return if shared.is(Fault::ErrorKeepsSession) { Ok(()) } else { shared.refuse(Errno::ENODEV) };
        }
        match shared.fault {
            Fault::WritesWhileSaving if !self.loads => return Ok(()),
            Fault::StaleWrites if stale => return Ok(()),
            Fault::NoPiecesBelow(least) if data.len() < least => return shared.refuse(Errno::EINVAL),
            Fault::NoPiecesAbove(most) if data.len() > most => return shared.refuse(Errno::E2BIG),
            Fault::ResetForbidsLoads if shared.memory.load(Ordering::SeqCst) == 7 && self.loads && !stale => {
                return shared.refuse(Errno::EIO);
            }
            Fault::TakesAnything => {
                let _ = stream.write(data);
                return Ok(());
            }
            Fault::TakesIncomplete => {
                let done = stream.write(data);
                if done.is_err() {
                    shared.memory.store(1, Ordering::SeqCst);
                }
                return done;
            }
            Fault::RefusesItsOwn if self.loads && data.len() > 64 => return shared.refuse(Errno::EINVAL),
            Fault::RefusesTheFirstByte if self.loads && data.len() < 64 => {
                return shared.refuse(Errno::EINVAL);
            }
            _ => {}
        }
        stream.write(data)
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        let shared = Arc::clone(&self.shared);
        let Some(stream) = self.stream.as_mut() else { return shared.refuse(Errno::ENODEV) };
        let now = shared.now();
        let answer = stream.precopy_info();
        match shared.fault {
            Fault::InfoNotIn(state) if now == state => shared.refuse(Errno::EINVAL),
            Fault::InfoEverywhere if answer.is_err() => Ok(PrecopyInfo::default()),
            Fault::InfoGrows => Ok(PrecopyInfo { initial_bytes: (1 << 20) + shared.tick(), ..answer? }),
            Fault::InfoIsStuck => Ok(PrecopyInfo { initial_bytes: 1 << 20, ..answer? }),
            Fault::StaleInfo if !now.has_session() => Ok(PrecopyInfo::default()),
            Fault::InfoHasFlags => Ok(PrecopyInfo { flags: 1, ..answer? }),
            Fault::InfoTakesData => {
                let info = answer?;
                while let Chunk::Data(_) = stream.read(&mut [0; 4096])? {}
                self.read = 99;
                Ok(info)
            }
            _ => answer,
        }
    }

    fn transfer_bytes_max(&self) -> usize {
        self.stream.as_ref().map_or(1, |stream| stream.transfer_bytes_max())
    }
}

fn stream_is_stale(shared: &Faulty, loads: bool) -> bool {
    if loads { shared.now() != State::Resuming } else { !shared.now().is_saving() }
}

impl Drop for FaultyStream {
    fn drop(&mut self) {
        if self.shared.is(Fault::DropStops) && self.shared.now() == State::StopCopy && !self.is_stale() {
            let _ = self.shared.inner.set_state(State::Stop);
        }
    }
}
