//! [`Receiving`]: what the threads of a destination share while data arrives. A reader for each link writes memory, and hands
//! device data to the device workers, so that a device that is slow to load blocks no other.

use std::sync::Arc;

use limosa_client::DeviceExt;
use limosa_clockwork::{Guard, Monitor, Scope, now};
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::body::{NEEDS_CREDIT, decode_device_end, decode_u32};
use limosa_stream::buffer::{Buffer, Spares};
use limosa_stream::{Damage, Header, Kind, LINKS_MAX, MigrationId, Offer, Order, PrefaceFlags, Step};

use super::device_loader::DeviceLoader;
use super::device_queue::{Command, DeviceQueue, data_bytes};
use crate::context::Context;
use crate::devices::{MovedDevice, failed};
use crate::link::{FurtherLinks, Link, LinkError, Wait};
use crate::memory::MemoryRegion;
use crate::protocol::credit::{ReceiveWindow, window};
use crate::report::{Phase, Recorder};
use crate::transfer::device_sender::READ_BYTES_MAX;
use crate::transfer::device_workers::DeviceWorkers;
use crate::transfer::keep_alive::KeepAlive;
use crate::transfer::team::{Shared, Team};
use crate::wire::{Connection, Frame, FrameReader, FrameWriter, MeteredLink};
use crate::{Cancel, Error, Options, Result, Round};

/// Empty buffers of up to this many bytes are kept for reuse.
const SPARE_BYTES: u64 = 8 << 20;
/// How much memory is made zero at once. A cancel is observed between two pieces.
const ZERO_BYTES_MAX: u64 = 64 << 20;

const DOING: &str = "waiting for the source's data";

/// The work between the offer and the end, and the state of its threads.
pub(super) struct Receiving<'w, 'a> {
    context: &'w Context<'a>,
    /// The first link, over which this side answers.
    pub(super) connection: &'w Connection<'w>,
    writers: [&'w FrameWriter<'w>; 1],
    pub(super) team: Team,
    workers: DeviceWorkers,
    alive: KeepAlive,
    pub(super) queues: Vec<Shared<DeviceQueue>>,
    pub(super) loaders: Vec<Monitor<DeviceLoader<'a>>>,
    flags: Vec<MigrationFlags>,
    /// The ids of the devices in the offer.
    ids: Vec<u32>,
    /// The regions, by their index in the offer.
    regions: Vec<Option<&'w MemoryRegion<'a>>>,
    order: Monitor<Order>,
    /// Whether the source sends no more than the window allows.
    has_credit: bool,
    window: u64,
    /// Whether the limit for silence applies to further links as well.
    keeps_links_alive: bool,
    spares: Monitor<Spares>,
    state: Shared<Progress>,
    /// Ends the wait for further links.
    joined: Cancel,
    /// The further links. They stay open to the end, so that the source hears the reason, and not that a link is closed.
    further: Monitor<Vec<Arc<dyn Link>>>,
}

#[derive(Default)]
struct Progress {
    /// How many links the source uses, the first one included.
    links: u32,
    /// Which further links have joined, a bit each.
    joined: u32,
    links_ended: u32,
    loaded: usize,
}

impl<'w, 'a> Receiving<'w, 'a> {
    pub(super) fn new(
        context: &'w Context<'a>,
        connection: &'w Connection<'_>,
        devices: &'a [MovedDevice<'a>],
        memory: &'w [MemoryRegion<'a>],
        offer: &Offer,
    ) -> Result<Receiving<'w, 'a>> {
        let team = Team::new(context.cancel)?;
        let joined = team.ended().child().map_err(|error| Error::Os { doing: "making an event", error })?;
        let window = window(devices.len(), context.options.windows_bytes);
        let windows = window * devices.len() as u64;
        let mut spares = Spares::new(SPARE_BYTES.min(windows) as usize);
        // Touched now, and not in the downtime.
        spares.fill(SPARE_BYTES.min(windows / 4) as usize, READ_BYTES_MAX, context.recorder.buffers());
        // Regions are matched by id: this side may have them in another order than the offer.
        let region = |id| memory.iter().find(|region| region.id == id);
        let queue = || DeviceQueue { window: ReceiveWindow::new(window), ..DeviceQueue::default() };
        Ok(Receiving {
            context,
            connection,
            writers: [&connection.writer],
            workers: DeviceWorkers::new(devices.len(), usize::MAX),
            alive: KeepAlive::default(),
            queues: devices.iter().map(|_| team.share(queue())).collect(),
            loaders: devices.iter().map(|moved| Monitor::new(DeviceLoader::new(moved.device))).collect(),
            flags: vec![MigrationFlags::empty(); devices.len()],
            ids: offer.devices.iter().map(|facts| facts.id).collect(),
            regions: offer.memory.iter().map(|facts| region(facts.id)).collect(),
            order: Monitor::new(Order::new(offer)),
            has_credit: offer.needs.iter().any(|need| need == NEEDS_CREDIT),
            window,
            keeps_links_alive: offer.keeps_links_alive,
            spares: Monitor::new(spares),
            state: team.share(Progress { links: 1, ..Progress::default() }),
            joined,
            further: Monitor::default(),
            team,
        })
        .and_then(|receiving| receiving.with_flags(devices))
    }

    fn with_flags(self, devices: &[MovedDevice<'_>]) -> Result<Receiving<'w, 'a>> {
        let flags = devices.iter().map(|moved| {
            let flags = moved.device.migration_flags();
            flags.map_err(|error| failed(moved.device, "reading its flags", error))
        });
        Ok(Receiving { flags: flags.collect::<Result<_>>()?, ..self })
    }

    pub(super) fn recorder(&self) -> &'w Recorder<'a> {
        &self.context.recorder
    }

    fn options(&self) -> &'a Options {
        self.context.options
    }

    /// A device's migration flags.
    pub(super) fn flags(&self, at: usize) -> MigrationFlags {
        self.flags[at]
    }

    /// Starts the device workers and the keep-alive thread. They serve the commit and the rollback as well.
    pub(super) fn start<'scope>(&'scope self, scope: Scope<'scope, '_>) -> Result<()> {
        let interval = self.connection.limits().keep_alive;
        self.team.spawn(scope, "keep-alive".into(), move || {
            self.alive.run(&self.team, &self.writers, interval);
            Ok(())
        })?;
        for thread in 0..self.queues.len() {
            self.team.spawn(scope, format!("device worker {thread}"), move || {
                self.workers.work(thread, |at| self.attend(at));
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Ends all threads.
    pub(super) fn end(&self) {
        self.team.end();
        self.workers.end();
        self.alive.end();
    }

    /// Opens a session on every device. They were found in these states.
    pub(super) fn open_sessions(&self, found: Vec<State>) -> Result<()> {
        self.command(|at| Some(Command::Open(found[at]))).into_iter().collect()
    }

    /// Which devices have been touched.
    pub(super) fn opened(&self) -> Vec<bool> {
        self.queues.iter().map(|queue| queue.lock().found.is_some()).collect()
    }

    /// Drives loaded devices to these states. Fails if one of them refuses.
    pub(super) fn enter(&self, wanted: impl Fn(usize) -> Option<State>) -> Result<()> {
        // This waits for all devices, also after a failure.
        self.command(|at| wanted(at).map(Command::Enter)).into_iter().collect()
    }

    /// Resets the devices that were asked to run, so that none of them ever runs this guest. Returns whether all resets
    /// succeeded. A device that was not asked stays in STOP, also if it can no longer be reached.
    pub(super) fn never_run(&self) -> bool {
        let asked: Vec<_> = self.queues.iter().map(|queue| queue.lock().asked_to_run).collect();
        self.command(|at| asked[at].then_some(Command::Reset)).iter().all(Result::is_ok)
    }

    /// Gives devices commands, all at once, and waits for all of them, for as long as the devices' own calls take.
    pub(super) fn command(&self, wanted: impl Fn(usize) -> Option<Command>) -> Vec<Result<()>> {
        for (at, queue) in self.queues.iter().enumerate() {
            let mut queue = queue.lock();
            (queue.command, queue.done) = (wanted(at), None);
            match queue.command {
                None => queue.done = Some(Ok(())),
                Some(_) => self.see_to(at, queue),
            }
        }
        let done = self.queues.iter().map(|queue| {
            let mut guard = queue.lock();
            loop {
                if let Some(done) = guard.done.take() {
                    return done;
                }
                (guard, _) = queue.wait(guard, None);
            }
        });
        done.collect()
    }

    /// The source was told to use this many links.
    pub(super) fn expect_links(&self, links: u32) {
        self.state.lock().links = links;
    }

    /// Reads the first link up to the SUM, and waits until all devices are loaded and in STOP. The source was told to use
    /// `links` links.
    pub(super) fn read_first(&self, links: u32) -> Result<()> {
        let mut reader = self.connection.reader();
        loop {
            let header = reader.next(self.connection.link(), DOING, None, Some(self.team.ended()))?;
            match header.kind {
                Kind::LINKS => self.fewer_links(decode_u32(reader.payload(&header)), links, &reader)?,
                Kind::SUM => {
                    let doing = "waiting for the end of the further links";
                    self.wait(doing, |state| state.links_ended == state.links - 1)?;
                }
                _ => {}
            }
            if let Step::Sum = self.take(&header, &mut reader)? {
                self.recorder().phase(Phase::Load);
                let doing = "waiting for the devices to load";
                return self.wait(doing, |state| state.loaded == self.queues.len());
            }
        }
    }

    /// Takes LINKS: the source uses fewer links than it was told to.
    fn fewer_links(&self, had: u32, wanted: u32, reader: &FrameReader) -> Result<()> {
        let mut state = self.state.lock();
        if !(1..wanted).contains(&had) || state.joined >> had != 0 {
            let why = format!(
                "{had} links instead of {wanted}, where {} further ones have joined",
                state.joined.count_ones()
            );
            return Err(reader.damaged(Damage::Content { kind: Kind::LINKS, why }));
        }
        state.links = had;
        let is_complete = state.joined.count_ones() == had - 1;
        drop(state);
        self.state.notify_all();
        if is_complete {
            self.joined.cancel();
        }
        Ok(())
    }

    /// The body of the thread that accepts the further links of the move, in any order, and starts a reader for each. A link
    /// that is not of the move is closed, and the thread waits for another.
    pub(super) fn join<'scope>(
        &'scope self,
        scope: Scope<'scope, '_>,
        id: MigrationId,
        further: &dyn FurtherLinks,
        offer: &'scope Offer,
    ) -> Result<()> {
        let silence_max = self.options().silence_max;
        let wait = Wait::within(silence_max, Some(&self.joined));
        loop {
            let (joined, links) = {
                let state = self.state.lock();
                (state.joined, state.links)
            };
            if joined.count_ones() >= links - 1 {
                return Ok(());
            }
            let link: Arc<dyn Link> = match further.next(wait) {
                Ok(link) => Arc::from(link),
                Err(LinkError::Cancelled) if self.team.check().is_ok() => return Ok(()),
                Err(error) => {
                    return Err(self.connection.failed(error, "waiting for a further link", silence_max));
                }
            };
            let (number, mut reader) = match self.greet_further(&*link, id) {
                Ok(greeted) => greeted,
                Err(error) => {
                    tracing::warn!("a link that is not of the move: {error}");
                    continue;
                }
            };
            if number >= links || joined & 1 << number != 0 {
                tracing::warn!("link {number} of the move joined twice or was not asked for");
                continue;
            }
            reader.decompress(offer.compression())?;
            reader.count(self.recorder().buffers());
            self.further.lock().push(Arc::clone(&link));
            self.state.lock().joined |= 1 << number;
            self.team.spawn(scope, format!("link {number}"), move || {
                let link = MeteredLink::new(&*link, self.recorder());
                self.read_further(&link, reader)
            })?;
        }
    }

    /// Reads preface and JOIN of a further link of this move. Returns its number and its reader.
    fn greet_further(&self, link: &dyn Link, id: MigrationId) -> Result<(u32, FrameReader)> {
        let silence_max = self.options().silence_max;
        let mut reader = FrameReader::new(link, silence_max);
        let preface = reader.preface(link, Some(&self.joined))?;
        if preface.id != id || !preface.flags.contains(PrefaceFlags::FURTHER) {
            let what = format!("the id {} where {id} was expected", preface.id);
            return Err(reader.damaged(Damage::Unknown { what }));
        }
        let within = now().checked_add(silence_max).map(|until| (until, silence_max));
        let header = reader.next(link, "waiting for a link's number", within, Some(&self.joined))?;
        let misplaced = |why: String| Damage::Misplaced { kind: header.kind, why };
        if header.kind != Kind::JOIN {
            return Err(reader.damaged(misplaced("JOIN is due".into())));
        }
        let number = decode_u32(reader.payload(&header));
        if number == 0 || number >= LINKS_MAX {
            let why = format!("link {number}, expected 1 to {}", LINKS_MAX - 1);
            return Err(reader.damaged(Damage::Content { kind: Kind::JOIN, why }));
        }
        Ok((number, reader))
    }

    /// The body of a further link's reader, up to LINK_END.
    fn read_further(&self, link: &dyn Link, mut reader: FrameReader) -> Result<()> {
        if !self.keeps_links_alive {
            reader.allow_silence();
        }
        loop {
            let header = reader.next(link, DOING, None, Some(self.team.ended()))?;
            match header.kind {
                Kind::LINK_END => {
                    self.state.lock().links_ended += 1;
                    self.state.notify_all();
                    return Ok(());
                }
                Kind::MEMORY_DATA | Kind::MEMORY_ZERO | Kind::DEVICE_DATA | Kind::FLUSH | Kind::PROGRESS => {
                    self.take(&header, &mut reader)?;
                }
                kind => {
                    let why = "it is for a move's first link".into();
                    return Err(reader.damaged(Damage::Misplaced { kind, why }));
                }
            }
        }
    }

    /// Waits for this side's own work, for no longer than the source waits.
    fn wait(&self, doing: &'static str, is_done: impl Fn(&Progress) -> bool) -> Result<()> {
        let limit = self.options().load_max;
        let until = now().checked_add(limit);
        match self.team.wait(&self.state, self.state.lock(), until, is_done)?.1 {
            true => Ok(()),
            false => Err(self.connection.failed(LinkError::TimedOut, doing, limit)),
        }
    }

    /// Acts on a frame. A frame that is out of order never reaches a device.
    fn take(&self, header: &Header, reader: &mut FrameReader) -> Result<Step<'static>> {
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
                self.recorder().memory_data(pages.len() as u64);
            }
            Step::MemoryZero(at, offset, bytes) => self.zero(at, offset, bytes)?,
            Step::Round(round, memory_dirty_bytes) => {
                self.recorder().round(&Round { round, memory_dirty_bytes, ..Round::default() });
            }
            Step::Flush => self.flush(header)?,
            Step::Stopped => {
                self.recorder().phase(Phase::StopCopy);
                self.recorder().stop();
            }
            Step::DeviceBegin(at) => self.deliver_ahead(at, reader)?,
            Step::Sum => return Ok(Step::Sum),
            _ => {}
        }
        Ok(Step::Skipped)
    }

    fn zero(&self, at: usize, offset: u64, bytes: u64) -> Result<()> {
        let end = offset + bytes;
        let mut from = offset;
        while from < end {
            self.team.check()?;
            let piece = ZERO_BYTES_MAX.min(end - from);
            if let Some(region) = self.regions[at] {
                region.pages.zero(from, piece).map_err(|error| region.failed(from, error))?;
            }
            self.recorder().memory_zero(piece);
            from += piece;
        }
        Ok(())
    }

    /// Answers a FLUSH: everything before it on this link is handled, except that device data may wait for its device.
    fn flush(&self, header: &Header) -> Result<()> {
        if !self.connection.has_peer() {
            return Ok(());
        }
        // CREDIT tells the source when each device has taken the data that arrived before, over any link.
        for (at, queue) in self.queues.iter().enumerate() {
            let mut guard = queue.lock();
            if !self.has_credit {
                (guard, _) = self.team.wait(queue, guard, None, |queue| queue.queued == 0)?;
            }
            let waiting = guard.waiting();
            guard.window.ask(waiting);
            let credit = self.credit_due(&mut guard);
            drop(guard);
            self.tell(at, credit)?;
        }
        self.post(&Frame::of(header.section, Kind::FLUSHED, &[]).at(header.position))
    }

    /// Takes device data or DEVICE_END: hands it on if it is next, and keeps it while earlier data is missing.
    fn take_device(&self, header: &Header, reader: &mut FrameReader) -> Result<()> {
        let mut order = self.order.lock();
        let at = order.section(header).map_err(|damage| reader.damaged(damage))?;
        let place = match header.kind {
            Kind::DEVICE_END => decode_device_end(reader.payload(header)).0,
            _ => header.position,
        };
        let is_due = order.due(at).is_some_and(|due| place <= due);
        let mut queue = self.queues[at].lock();
        let room = queue.window.end();
        let is_data = header.kind == Kind::DEVICE_DATA;
        if self.has_credit && is_data && place.saturating_add(header.length.into()) > room {
            let why = format!("it is for byte {place}, the last credit allows data up to byte {room}");
            return Err(reader.damaged(Damage::Misplaced { kind: header.kind, why }));
        }
        if !is_due && self.state.lock().joined != 0 {
            drop(order);
            let payload = reader.take_payload(header, || self.spare());
            queue.keep_ahead(place, *header, payload).map_err(|damage| reader.damaged(damage))?;
            self.recorder().device_waits(at, queue.waiting());
            return Ok(());
        }
        queue.check_ahead(place, header).map_err(|damage| reader.damaged(damage))?;
        order.next(header, reader.payload(header)).map_err(|damage| reader.damaged(damage))?;
        drop(order);
        if !self.has_credit {
            // Such a source sends over one link only, which is not read until there is room.
            let has_room = |queue: &DeviceQueue| {
                queue.queued == 0 || queue.queued + u64::from(header.length) <= self.window
            };
            (queue, _) = self.team.wait(&self.queues[at], queue, None, has_room)?;
        }
        let payload = reader.take_payload(header, || self.spare());
        self.hand_on(at, queue, header, payload);
        self.deliver_ahead(at, reader)
    }

    /// Hands on the data that was ahead and is next now.
    fn deliver_ahead(&self, at: usize, reader: &FrameReader) -> Result<()> {
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

    fn hand_on(&self, at: usize, mut queue: Guard<'_, DeviceQueue>, header: &Header, payload: Buffer) {
        queue.hand_on(header, payload);
        self.recorder().device_waits(at, queue.waiting());
        self.see_to(at, queue);
    }

    /// Makes a worker do the work of a device.
    fn see_to(&self, at: usize, mut queue: Guard<'_, DeviceQueue>) {
        let was_busy = std::mem::replace(&mut queue.is_busy, true);
        drop(queue);
        if !was_busy {
            self.workers.post(at);
        }
    }

    /// A device has loaded everything and is in STOP.
    pub(super) fn is_loaded(&self) -> Result<()> {
        self.state.lock().loaded += 1;
        self.state.notify_all();
        Ok(())
    }

    /// A buffer for the next payload.
    fn spare(&self) -> Buffer {
        self.spares.lock().take().unwrap_or_else(|| Buffer::new(self.recorder().buffers()))
    }

    pub(super) fn keep_spare(&self, buffer: Buffer) {
        self.spares.lock().keep(buffer);
    }

    /// The credit to send to the source now.
    pub(super) fn credit_due(&self, queue: &mut DeviceQueue) -> Option<u64> {
        queue.window.due().filter(|_| self.has_credit)
    }

    pub(super) fn tell(&self, at: usize, credit: Option<u64>) -> Result<()> {
        match credit {
            Some(taken) => self.post(&Frame::of(self.ids[at], Kind::CREDIT, &[]).at(taken)),
            None => Ok(()),
        }
    }

    fn post(&self, frame: &Frame<'_>) -> Result<()> {
        self.connection.writer.post(frame, Some(self.team.ended()))
    }
}
