//! The requests to a faulty device.

use super::*;

/// The device.
pub struct FaultyDevice(pub Arc<Faulty>);

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
