//! A device as one end's engine reaches it: over a transport that takes virtual time and may be lost.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use limosa_client::{
    DataStream, Device, DeviceExt, DmaMap, DmaMemory, DmaTarget, Error, FeatureReply, FeatureRequest, Result,
};
use limosa_clockwork::{simulation, sleep};
use limosa_device::{Loopback, Machine};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State};
use limosa_testing::{forward_device, forward_stream};

use crate::memory::{DeviceMemory, SimMemory, iova};
use crate::model::{Outside, SimModel, get, set};
use crate::panics::{Panics, Place};
use crate::plan::{DevicePlan, End, Mutation};
use crate::world::{PAGE, World};

pub struct SimDevice {
    inner: Loopback,
    number: usize,
    plan: DevicePlan,
    world: Arc<World>,
    reach: Arc<Reach>,
    runs_early: bool,
    /// Where it was driven last, by a transport that hides resets.
    driven: Option<Mutex<Option<State>>>,
    pub outside: Arc<Outside>,
}

/// Whether the device can be reached, and how fast.
struct Reach {
    gone: AtomicBool,
    slow: Duration,
    name: String,
    number: usize,
    world: Arc<World>,
    panics: Arc<Panics>,
}

impl Reach {
    /// A call on its way to the device.
    fn call(&self) -> Result<()> {
        self.call_of(Place::Device(self.number))
    }

    fn call_of(&self, place: Place) -> Result<()> {
        self.panics.call(place, &self.world);
        if !self.slow.is_zero() && simulation::random(4) == 0 {
            sleep(Duration::from_nanos(simulation::random(self.slow.as_nanos() as u64)));
        } else if simulation::random(4) == 0 {
            sleep(Duration::from_micros(1));
        }
        // What a process does that has crashed, it never did.
        if self.gone.load(Ordering::SeqCst) || simulation::crashing() {
            self.world.strikes();
            let reason = "the transport is gone".into();
            return Err(Error::Disconnected { device: self.name.clone(), reason });
        }
        Ok(())
    }
}

impl SimDevice {
    pub fn new(
        end: End,
        number: usize,
        plan: DevicePlan,
        regions: &[u64],
        memory: &Arc<SimMemory>,
        world: &Arc<World>,
    ) -> SimDevice {
        let mutation = memory.mutation.filter(|_| end == End::Destination);
        let name = format!("{end:?} {number}");
        let outside = Arc::new(Outside::default());
        let model = SimModel::new(end, number, plan, regions, world.clone(), outside.clone());
        set(&outside.forgets, mutation == Some(Mutation::DeviceForgets));
        let inner = Loopback::new(name.clone(), Machine::simple(model));
        for (region, pages) in regions.iter().enumerate() {
            let target: Arc<dyn DmaTarget> =
                Arc::new(DeviceMemory { memory: memory.clone(), region, device: number });
            let (size, flags) = (pages * PAGE as u64, DmaMapFlags::READ | DmaMapFlags::WRITE);
            let map = DmaMap { iova: iova(region), size, flags, memory: DmaMemory::Messages(&target) };
            inner.dma_map(&map).expect("memory can be mapped");
        }
        let reach = Arc::new(Reach {
            gone: AtomicBool::new(false),
            slow: plan.slow,
            name,
            number,
            world: world.clone(),
            panics: memory.panics.clone(),
        });
        let runs_early = mutation == Some(Mutation::RunsBeforeCommit);
        let driven = (memory.mutation == Some(Mutation::ResetHidden)).then(Mutex::default);
        SimDevice { inner, number, plan, world: world.clone(), reach, runs_early, driven, outside }
    }

    /// The device itself, without an engine in between: for its guest, and for the checks.
    pub fn itself(&self) -> &Loopback {
        &self.inner
    }

    /// Whether its guest leaves it alone.
    pub fn is_quiet(&self) -> bool {
        self.plan.quiet
    }

    /// Whether it counts its resets.
    pub fn counts_resets(&self) -> bool {
        self.plan.counts_resets
    }

    /// It cannot be reached any more.
    pub fn lose(&self) {
        self.reach.gone.store(true, Ordering::SeqCst);
    }

    pub fn find(&self) {
        self.reach.gone.store(false, Ordering::SeqCst);
    }
}

impl SimDevice {
    fn reached(&self) -> Result<&Loopback> {
        self.reach.call()?;
        Ok(&self.inner)
    }
}

impl Device for SimDevice {
    fn name(&self) -> &str {
        &self.reach.name
    }

    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        self.reach.call()?;
        let logging = [
            FeatureIndex::DMA_LOGGING_START,
            FeatureIndex::DMA_LOGGING_STOP,
            FeatureIndex::DMA_LOGGING_REPORT,
            FeatureIndex::DIRTY_BLOCKS,
        ];
        if !self.plan.logs && logging.contains(&request.index) {
            let (device, request) = (self.name().into(), "DMA logging".into());
            return Err(Error::Refused { device, request, errno: Errno::ENOTTY, hint: "".into() });
        }
        if (!self.plan.counts_resets || self.driven.is_some()) && request.index == FeatureIndex::RESET_COUNT {
            let (device, request) = (self.name().into(), "RESET_COUNT".into());
            return Err(Error::Refused { device, request, errno: Errno::ENOTTY, hint: "".into() });
        }
        let word = |at: usize| request.payload.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        // vfio.h: struct vfio_device_feature_dma_logging_report begins with the address and the length.
        let reported = match (word(0), word(8)) {
            (Some(at), Some(length)) if request.index == FeatureIndex::DMA_LOGGING_REPORT => at..at + length,
            _ => 0..0,
        };
        let done = self.inner.feature(request);
        let is_reported =
            |(region, page): &(usize, u64)| reported.contains(&(iova(*region) + page * PAGE as u64));
        let mut truth = self.world.truth();
        if request.index == FeatureIndex::DMA_LOGGING_START && !request.op.contains(FeatureOp::PROBE) {
            // What was written before is not in its log.
            truth.device_marks[self.number].clear();
        }
        let marks = std::mem::take(&mut truth.device_marks[self.number]);
        let (taken, left): (BTreeSet<_>, _) = marks.into_iter().partition(is_reported);
        truth.taken.extend(taken);
        truth.device_marks[self.number] = left;
        drop(truth);
        let mut reply = done?;
        if let (Some(driven), FeatureIndex::MIG_DEVICE_STATE) = (&self.driven, request.index) {
            hide(driven, request);
        }
        if self.runs_early && self.inner.machine().state() == State::Stop {
            let _ = self.inner.set_state(State::Running);
        }
        let opened = reply.stream.take();
        reply.stream = opened
            .map(|inner| Box::new(SimStream { inner, reach: self.reach.clone() }) as Box<dyn DataStream>);
        Ok(reply)
    }

    fn reset(&self) -> Result<()> {
        let inner = self.reached()?;
        if let Some(driven) = &self.driven {
            set(driven, None);
        }
        inner.reset()
    }

    forward_device!(|this| this.reached()?; info, registers);
}

/// Answers a GET of the state with where the device was driven last.
fn hide(driven: &Mutex<Option<State>>, request: &mut FeatureRequest<'_>) {
    // vfio.h: struct vfio_device_feature_mig_state begins with the state.
    let Some(state) = request.payload.first_chunk_mut::<4>() else { return };
    if request.op.contains(FeatureOp::SET) {
        set(driven, State::from_raw(u32::from_le_bytes(*state)));
    } else if let Some(driven) = get(driven) {
        *state = (driven as u32).to_le_bytes();
    }
}

struct SimStream {
    inner: Box<dyn DataStream>,
    reach: Arc<Reach>,
}

impl SimStream {
    fn reached(&mut self) -> Result<&mut dyn DataStream> {
        self.reach.call_of(Place::Stream(self.reach.number))?;
        Ok(&mut *self.inner)
    }
}

impl DataStream for SimStream {
    forward_stream!(|this| this.reached()?; read, write, precopy_info);

    forward_stream!(|this| this.inner; transfer_bytes_max);
}
