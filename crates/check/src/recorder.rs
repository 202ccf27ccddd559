//! [`Recorded`]: a device that records its requests and answers, so that a failure is reported with the requests that
//! led to it.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_client::{
    Chunk, DataStream, Device, DeviceIdentity, DirtyBits, DmaMap, Error, FeatureReply, FeatureRequest,
    IrqAction, Region, Result,
};
use limosa_protocol::feature::{FeatureMigState, PrecopyInfo};
use limosa_protocol::info::{DeviceInfo, IrqInfo};
use limosa_protocol::{FeatureIndex, FeatureOp, State};
use zerocopy::FromBytes;

/// Limit on the requests that are kept of one check.
const LINES_MAX: usize = 40;

/// The requests of one check.
#[derive(Debug, Default)]
pub(crate) struct Record(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    lines: VecDeque<String>,
    left_out: usize,
    pending: Vec<String>,
}

impl Record {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets everything.
    pub fn clear(&self) {
        *self.lines() = Lines::default();
    }

    /// Notes one request with its answer.
    pub fn note(&self, request: &str, answer: impl Display) {
        let lines = &mut *self.lines();
        if lines.lines.len() == LINES_MAX {
            lines.lines.pop_front();
            lines.left_out += 1;
        }
        lines.lines.push_back(format!("{request} = {answer}"));
    }

    /// The requests so far, one a line, and those that were not answered.
    pub fn text(&self) -> Vec<String> {
        let lines = self.lines();
        let left_out = (lines.left_out > 0).then(|| format!("# {} requests before these", lines.left_out));
        let pending = lines.pending.iter().map(|request| format!("{request} = # no answer"));
        left_out.into_iter().chain(lines.lines.iter().cloned()).chain(pending).collect()
    }

    /// The requests that have no answer yet.
    pub fn pending(&self) -> Option<String> {
        self.lines().pending.last().cloned()
    }

    /// Runs a request, and notes it.
    pub fn request<T>(
        &self,
        request: String,
        call: impl FnOnce() -> Result<T>,
        answer: impl FnOnce(&T) -> String,
    ) -> Result<T> {
        self.lines().pending.push(request.clone());
        let done = call();
        let mut lines = self.lines();
        if let Some(at) = lines.pending.iter().rposition(|pending| *pending == request) {
            lines.pending.remove(at);
        }
        drop(lines);
        match &done {
            Ok(value) => self.note(&request, answer(value)),
            Err(Error::Refused { errno, .. }) => self.note(&request, errno),
            Err(error) => self.note(&request, format_args!("# {error}")),
        }
        done
    }
}

fn ok<T>(_: &T) -> String {
    "ok".into()
}

/// A device whose requests are recorded.
pub(crate) struct Recorded {
    pub device: Box<dyn Device>,
    pub record: Arc<Record>,
    /// Set before the name of each request; empty for the device under test.
    pub prefix: &'static str,
}

impl Recorded {
    fn request<T>(
        &self,
        request: impl Display,
        call: impl FnOnce() -> Result<T>,
        answer: impl FnOnce(&T) -> String,
    ) -> Result<T> {
        self.record.request(format!("{}{request}", self.prefix), call, answer)
    }
}

fn words(op: FeatureOp, index: FeatureIndex, payload: &[u8]) -> String {
    let state = FeatureMigState::read_from_prefix(payload).map(|(state, _)| state.device_state);
    match (op, index, state) {
        (FeatureOp::SET, FeatureIndex::MIG_DEVICE_STATE, Ok(number)) => match State::from_raw(number) {
            Some(state) => format!("set-state {state}"),
            None => format!("set-state {number}"),
        },
        (FeatureOp::GET, FeatureIndex::MIG_DEVICE_STATE, Ok(_)) => "get-state".into(),
        _ => {
            let mut ops: Vec<String> = op.iter_names().map(|(name, _)| name.to_lowercase()).collect();
            let unknown = op.bits() & !FeatureOp::all().bits();
            if unknown != 0 {
                ops.push(format!("{unknown:#x}"));
            }
            format!("feature {} {index} {}", ops.join("|"), payload.len())
        }
    }
}

impl Device for Recorded {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn identity(&self) -> Option<DeviceIdentity> {
        self.device.identity()
    }

    fn feature(&self, request: &mut FeatureRequest<'_>) -> Result<FeatureReply> {
        let (index, op) = (request.index, request.op);
        let name = words(op, index, request.payload);
        let payload = std::cell::RefCell::new(None);
        let mut reply = self.request(
            name,
            || {
                let reply = self.device.feature(request)?;
                *payload.borrow_mut() = FeatureMigState::read_from_prefix(request.payload).ok();
                Ok(reply)
            },
            |reply| match (op, index, *payload.borrow()) {
                (FeatureOp::GET, FeatureIndex::MIG_DEVICE_STATE, Some((state, _))) => {
                    State::from_raw(state.device_state)
                        .map_or(state.device_state.to_string(), |state| state.to_string())
                }
                _ if reply.stream.is_some() => "stream".into(),
                _ => "ok".into(),
            },
        )?;
        reply.stream = reply.stream.map(|stream| {
            let record = Arc::clone(&self.record);
            Box::new(RecordedStream { stream, record, prefix: self.prefix }) as Box<dyn DataStream>
        });
        Ok(reply)
    }

    fn reset(&self) -> Result<()> {
        self.request("reset", || self.device.reset(), ok)
    }

    fn info(&self) -> Result<DeviceInfo> {
        self.request("info", || self.device.info(), ok)
    }

    fn region(&self, index: u32) -> Result<Region> {
        self.request(format_args!("region-info {index}"), || self.device.region(index), ok)
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        self.request(format_args!("irq-info {index}"), || self.device.irq(index), ok)
    }

    fn region_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let name = format!("region-read {region} {offset:#x} {}", data.len());
        self.request(name, || self.device.region_read(region, offset, data), ok)
    }

    fn region_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let name = format!("region-write {region} {offset:#x} {}", data.len());
        self.request(name, || self.device.region_write(region, offset, data), ok)
    }

    fn set_irqs(&self, index: u32, start: u32, action: IrqAction<'_>) -> Result<()> {
        let what = match &action {
            IrqAction::Wire(fds) => format!("wire {}", fds.len()),
            IrqAction::Disable => "disable".into(),
            IrqAction::Trigger(count) => format!("trigger {count}"),
            IrqAction::Mask(count) => format!("mask {count}"),
            IrqAction::Unmask(count) => format!("unmask {count}"),
        };
        self.request(
            format_args!("irqs {index} {start} {what}"),
            || self.device.set_irqs(index, start, action),
            ok,
        )
    }

    fn dma_map(&self, map: &DmaMap<'_>) -> Result<()> {
        self.request(format_args!("dma-map {:#x} {:#x}", map.iova, map.size), || self.device.dma_map(map), ok)
    }

    fn dma_unmap(&self, iova: u64, size: u64, dirty: Option<DirtyBits<'_>>) -> Result<()> {
        let with = if dirty.is_some() { " dirty" } else { "" };
        let name = format!("dma-unmap {iova:#x} {size:#x}{with}");
        self.request(name, || self.device.dma_unmap(iova, size, dirty), ok)
    }
}

/// A data stream whose transfers are recorded.
struct RecordedStream {
    stream: Box<dyn DataStream>,
    record: Arc<Record>,
    prefix: &'static str,
}

impl DataStream for RecordedStream {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        let name = format!("{}read {}", self.prefix, data.len());
        self.record.request(
            name,
            || self.stream.read(data),
            |chunk| match chunk {
                Chunk::Data(bytes) => bytes.to_string(),
                Chunk::NothingForNow => "nothing-for-now".into(),
                Chunk::End => "end".into(),
            },
        )
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        let name = format!("{}write {}", self.prefix, data.len());
        self.record.request(name, || self.stream.write(data), ok)
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        let name = format!("{}precopy-info", self.prefix);
        self.record.request(
            name,
            || self.stream.precopy_info(),
            |info| {
                format!("initial {} dirty {} flags {:#x}", info.initial_bytes, info.dirty_bytes, info.flags)
            },
        )
    }

    fn transfer_bytes_max(&self) -> usize {
        self.stream.transfer_bytes_max()
    }
}
