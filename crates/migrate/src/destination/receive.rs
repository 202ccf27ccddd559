//! What the threads of a destination share while devices and memory come in: a reader for each link puts memory where
//! it belongs, and hands devices' data to a loader for each device, so that a device that is slow to load holds up no
//! other.

use std::sync::Arc;
use std::time::Duration;

use limosa_client::{DataStream, DeviceExt};
use limosa_clockwork::{Guard, Monitor, now};
use limosa_protocol::MigrationFlags;

use super::device_queue::{DeviceQueue, data_bytes};
use crate::cancel::Watch;
use crate::devices::{MovedDevice, failed};
use crate::link::Wait;
use crate::memory::MemoryRegion;
use crate::report::{Phase, Recorder};
use crate::transfer::device_stream::READ_BYTES_MAX;
use crate::transfer::device_workers::DeviceWorkers;
use crate::wire::{FrameReader, FrameWriter, pulse};
use crate::{Cancel, Error, Options, Result, Round};
use limosa_stream::body::{NEEDS_CREDIT, decode_device_end};
use limosa_stream::buffer::{Buffer, Spares};
use limosa_stream::{Damage, Header, Kind, Offer, Order, Step, WINDOW_BYTES_MIN};

/// The most bytes of a device that may be on their way.
pub(crate) const WINDOW_BYTES_MAX: u64 = 4 << 20;
/// The most bytes of emptied buffers that are kept for later; never more than the windows.
const SPARE_BYTES: u64 = 8 << 20;

const DOING: &str = "waiting for the source's data";

/// How much of each device may be on its way.
pub(crate) fn window(devices: usize, options: &Options) -> u64 {
    (options.windows_bytes / devices.max(1) as u64).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX)
}

/// The work between the answer and READY.
pub(crate) struct Receiving<'w, 'a> {
    /// The first link's: here is answered.
    pub(crate) writer: Arc<FrameWriter<'a>>,
    pub(crate) devices: &'a [MovedDevice<'a>],
    /// The regions, by their place in the offer.
    pub(crate) regions: Vec<Option<&'w MemoryRegion<'a>>>,
    pub(crate) recorder: &'w Recorder<'a>,
    pub(crate) options: &'w Options,
    /// Whether the source keeps to the window.
    pub(super) credit: bool,
    window: u64,
    pub(super) flags: Vec<MigrationFlags>,
    links: usize,
    order: Monitor<Order>,
    pub(super) queues: Vec<Monitor<DeviceQueue>>,
    /// The devices' sessions, until their data has ended.
    pub(super) streams: Vec<Monitor<Option<Box<dyn DataStream>>>>,
    /// The threads that devices are loaded and driven in.
    pub(crate) workers: DeviceWorkers,
    /// The devices' ids, as the offer has them.
    ids: Vec<u32>,
    pub(super) spare: Monitor<Spares>,
    pub(super) state: Arc<Monitor<Progress>>,
    ended: Cancel,
    /// Wakes whoever waits for the state.
    _watch: Watch,
}

#[derive(Default)]
pub(super) struct Progress {
    failure: Option<Error>,
    links_ended: usize,
    pub(super) loaded: usize,
    over: bool,
}

impl<'w, 'a> Receiving<'w, 'a> {
    #[expect(clippy::too_many_arguments, reason = "it is called once, and keeps them all")]
    pub(crate) fn new(
        writer: Arc<FrameWriter<'a>>,
        offer: &Offer,
        links: usize,
        devices: &'a [MovedDevice<'a>],
        streams: Vec<Box<dyn DataStream>>,
        memory: &'a [MemoryRegion<'a>],
        recorder: &'w Recorder<'a>,
        options: &'w Options,
        cancel: Option<&Cancel>,
    ) -> Result<Receiving<'w, 'a>> {
        let ended = match cancel {
            Some(cancel) => cancel.child(),
            None => Cancel::new(),
        };
        let ended = ended.map_err(|error| Error::Os { doing: "making an event", error })?;
        let state = Arc::<Monitor<Progress>>::default();
        let flags = devices.iter().map(|moved| {
            let flags = moved.device.migration_flags();
            flags.map_err(|error| failed(moved.device, "reading its flags", error))
        });
        let flags = flags.collect::<Result<_>>()?;
        let window = window(devices.len(), options);
        let windows = window * devices.len() as u64;
        let mut spare = Spares::new(SPARE_BYTES.min(windows) as usize);
        // Touched before anything stops for it.
        spare.fill(SPARE_BYTES.min(windows / 4) as usize, READ_BYTES_MAX, recorder.buffers());
        // Regions are matched by id, and lie in the same order nowhere but in the offer.
        let region = |id| memory.iter().find(|region| region.id == id);
        Ok(Receiving {
            writer,
            devices,
            regions: offer.memory.iter().map(|facts| region(facts.id)).collect(),
            recorder,
            options,
            credit: offer.needs.iter().any(|need| need == NEEDS_CREDIT),
            window,
            flags,
            links,
            order: Monitor::new(Order::new(offer)),
            queues: devices.iter().map(|_| Monitor::default()).collect(),
            streams: streams.into_iter().map(|stream| Monitor::new(Some(stream))).collect(),
            workers: DeviceWorkers::new(devices.len(), usize::MAX),
            ids: offer.devices.iter().map(|facts| facts.id).collect(),
            spare: Monitor::new(spare),
            _watch: {
                let state = Arc::clone(&state);
                ended.watch(move || state.notify_all())
            },
            state,
            ended,
        })
    }

    /// An error once the work is to end early; which one, [`Receiving::failure`] knows.
    pub(super) fn check(&self) -> Result<()> {
        if self.ended.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Something went wrong: everybody ends. The first such thing counts, and is returned once.
    pub(crate) fn fail(&self, error: Error) -> Error {
        let first = self.state.lock().failure.take();
        self.end();
        first.unwrap_or(error)
    }

    /// Something went wrong in a thread: the first such thing counts, and everybody ends.
    pub(super) fn fail_from_thread(&self, error: Error) {
        self.state.lock().failure.get_or_insert(error);
        self.end();
    }

    /// Nothing more is to be done, by anybody.
    pub(crate) fn end(&self) {
        self.state.lock().over = true;
        self.ended.cancel();
        self.state.notify_all();
        for queue in &self.queues {
            queue.lock().over = true;
            queue.notify_all();
        }
        self.workers.end();
    }

    /// Reads the first link to the SUM, and waits until all devices are loaded and in STOP.
    pub(crate) fn read_first(&self, reader: &mut FrameReader<'_>) -> Result<()> {
        let silence_max = self.options.silence_max;
        let mut heard = now();
        loop {
            self.pulse();
            // A file answers at once, and nobody waits for word from this side.
            let slice = if self.writer.has_peer() { pulse(silence_max) } else { silence_max };
            let Some(header) = reader.next(DOING, Wait::within(slice, Some(&self.ended)))? else {
                if heard + silence_max <= now() {
                    return Err(reader.timed_out(DOING, silence_max));
                }
                continue;
            };
            heard = now();
            if header.kind == Kind::SUM {
                let doing = "waiting for the end of the further links";
                self.wait(reader, doing, |state| state.links_ended == self.links - 1)?;
            }
            if let Step::Sum = self.take(&header, reader)? {
                self.recorder.phase(Phase::Load);
                let doing = "waiting for the devices to load";
                return self.wait(reader, doing, |state| state.loaded == self.devices.len());
            }
        }
    }

    /// Reads a further link to its end.
    pub(crate) fn read_further(&self, reader: &mut FrameReader<'_>) {
        if let Err(error) = self.read_to_end(reader) {
            self.fail_from_thread(error);
        }
    }

    fn read_to_end(&self, reader: &mut FrameReader<'_>) -> Result<()> {
        loop {
            // There may be nothing for this link for long; the first one tells whether the source is alive.
            let wait = Wait::within(Duration::MAX, Some(&self.ended));
            let Some(header) = reader.next(DOING, wait)? else { continue };
            match header.kind {
                Kind::LINK_END => {
                    self.state.lock().links_ended += 1;
                    self.state.notify_all();
                    return Ok(());
                }
                Kind::MEMORY_DATA | Kind::MEMORY_ZERO | Kind::DEVICE_DATA | Kind::FLUSH | Kind::PROGRESS => {
                    self.take(&header, reader)?;
                }
                kind => {
                    let why = "it is for a move's first link".into();
                    return Err(reader.damaged(Damage::Misplaced { kind, why }));
                }
            }
        }
    }

    fn pulse(&self) {
        if self.writer.has_peer() {
            // A link that has failed shows when it is read.
            let _ = self.writer.pulse(Some(&self.ended));
        }
    }

    /// Waits for this side, which tells the source meanwhile that it is alive; not longer than the source does.
    fn wait(
        &self,
        reader: &FrameReader<'_>,
        doing: &'static str,
        is_done: impl Fn(&Progress) -> bool,
    ) -> Result<()> {
        let limit = self.options.load_max;
        let overall = Wait::within(limit, None);
        let mut state = self.state.lock();
        while !is_done(&state) {
            self.check()?;
            let timed_out;
            let slice = pulse(self.options.silence_max);
            (state, timed_out) = self.state.wait(state, Some(overall.deadline.min(now() + slice)));
            if timed_out {
                drop(state);
                if overall.left().is_err() {
                    return Err(reader.timed_out(doing, limit));
                }
                if self.writer.has_peer() {
                    // Nobody reads the link now: that it failed shows here alone.
                    self.writer.pulse(Some(&self.ended))?;
                }
                state = self.state.lock();
            }
        }
        Ok(())
    }

    /// Acts on a frame. What is out of order never reaches a device.
    fn take(&self, header: &Header, reader: &mut FrameReader<'_>) -> Result<Step<'static>> {
        if matches!(header.kind, Kind::DEVICE_DATA | Kind::DEVICE_END) {
            return self.take_device(header, reader).map(|()| Step::Skipped);
        }
        let next = self.order.lock().next(header, reader.payload(header));
        let step = next.map_err(|damage| reader.damaged(damage))?;
        match step {
            Step::MemoryData(at, offset, pages) => {
                if let Some(region) = self.regions[at] {
                    region.pages.write(offset, pages).map_err(|error| region.failed(offset, error))?;
                }
                self.recorder.memory_data(pages.len() as u64);
            }
            Step::MemoryZero(at, offset, bytes) => {
                if let Some(region) = self.regions[at] {
                    region.pages.zero(offset, bytes).map_err(|error| region.failed(offset, error))?;
                }
                self.recorder.memory_zero(bytes);
            }
            Step::Round(round, memory_dirty_bytes) => {
                self.recorder.round(&Round { round, memory_dirty_bytes, ..Round::default() });
            }
            Step::Flush => self.flush(header)?,
            Step::Stopped => {
                self.recorder.phase(Phase::StopCopy);
                self.recorder.stop();
            }
            Step::DeviceBegin(at) => self.deliver_ahead(at, reader)?,
            Step::Sum => return Ok(Step::Sum),
            _ => {}
        }
        Ok(Step::Skipped)
    }

    /// All that came before over this link is handled; devices' data may still be waiting.
    fn flush(&self, header: &Header) -> Result<()> {
        if !self.writer.has_peer() {
            return Ok(());
        }
        // Of each device the source is told when it has taken what came, over whichever link.
        for (at, queue) in self.queues.iter().enumerate() {
            let mut queue = queue.lock();
            while !self.credit && queue.queued > 0 && !queue.over {
                (queue, _) = self.queues[at].wait(queue, None);
            }
            queue.flush = true;
            let told = self.due(&mut queue);
            drop(queue);
            self.tell(at, told)?;
        }
        self.writer.post(Kind::FLUSHED, header.section, header.position, &[], Some(&self.ended))
    }

    /// A device's data or its end: hands it on when it is due, and keeps it while something before it is missing.
    fn take_device(&self, header: &Header, reader: &mut FrameReader<'_>) -> Result<()> {
        let damaged = |damage| reader.damaged(damage);
        let mut order = self.order.lock();
        let at = order.section(header).map_err(damaged)?;
        let place = match header.kind {
            Kind::DEVICE_END => decode_device_end(reader.payload(header)).0,
            _ => header.position,
        };
        let is_due = order.due(at).is_some_and(|due| place <= due);
        let mut queue = self.queues[at].lock();
        let room = queue.taken.saturating_add(self.window);
        let is_data = header.kind == Kind::DEVICE_DATA;
        if self.credit && is_data && place.saturating_add(header.length.into()) > room {
            let why = format!("it is for byte {place}, with the last credit there is room up to byte {room}");
            return Err(damaged(Damage::Misplaced { kind: header.kind, why }));
        }
        if self.links > 1 && !is_due {
            drop(order);
            let payload = reader.take_payload(header, || self.spare());
            queue.keep_ahead(place, *header, payload).map_err(|damage| reader.damaged(damage))?;
            self.recorder.device_waits(at, queue.waiting());
            return Ok(());
        }
        queue.check_ahead(place, header).map_err(damaged)?;
        order.next(header, reader.payload(header)).map_err(damaged)?;
        drop(order);
        // The others send over one link.
        while !self.credit
            && queue.queued > 0
            && queue.queued + u64::from(header.length) > self.window
            && !queue.over
        {
            (queue, _) = self.queues[at].wait(queue, None);
        }
        let payload = reader.take_payload(header, || self.spare());
        self.hand_on(at, queue, header, payload);
        self.deliver_ahead(at, reader)
    }

    /// Hands on what has come before its turn and is due now.
    fn deliver_ahead(&self, at: usize, reader: &FrameReader<'_>) -> Result<()> {
        loop {
            let mut order = self.order.lock();
            let Some(due) = order.due(at) else { return Ok(()) };
            let mut queue = self.queues[at].lock();
            let Some((header, payload)) = queue.ahead.remove(&due) else { return Ok(()) };
            order.next(&header, &payload).map_err(|damage| reader.damaged(damage))?;
            queue.ahead_bytes -= data_bytes(&header, &payload);
            self.hand_on(at, queue, &header, payload);
        }
    }

    /// A buffer for what comes next.
    fn spare(&self) -> Buffer {
        self.spare.lock().take().unwrap_or_else(|| Buffer::new(self.recorder.buffers()))
    }

    fn hand_on(&self, at: usize, mut queue: Guard<'_, DeviceQueue>, header: &Header, payload: Buffer) {
        queue.hand_on(header, payload);
        self.recorder.device_waits(at, queue.waiting());
        self.see_to(at, queue);
    }

    /// Somebody sees to what is to be done for a device.
    pub(super) fn see_to(&self, at: usize, mut queue: Guard<'_, DeviceQueue>) {
        let seen_to = std::mem::replace(&mut queue.seen_to, true);
        drop(queue);
        if !seen_to {
            self.workers.post(at);
        }
    }

    /// What the source is to be told of a device now: how much it has taken.
    pub(super) fn due(&self, queue: &mut DeviceQueue) -> Option<u64> {
        let all = queue.queued == 0 && queue.ahead.is_empty();
        let flushed = all && std::mem::take(&mut queue.flush);
        let new = queue.taken - queue.told;
        let due = self.credit && new > 0 && (flushed || !queue.ended && new > self.window / 2);
        due.then(|| {
            queue.told = queue.taken;
            queue.taken
        })
    }

    pub(super) fn tell(&self, at: usize, told: Option<u64>) -> Result<()> {
        let Some(taken) = told else { return Ok(()) };
        self.writer.post(Kind::CREDIT, self.ids[at], taken, &[], Some(&self.ended))
    }
}
