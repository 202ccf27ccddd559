//! Frames as they come: a reader for each link writes memory, and hands device data to the device workers, so that a device
//! that is slow to load blocks no other.

use std::ops::Range;
use std::sync::atomic::Ordering;

use limosa_clockwork::{Guard, now};
use limosa_stream::body::{decode_device_end, decode_u32};
use limosa_stream::buffer::Buffer;
use limosa_stream::{Damage, Header, Kind, Runs, Step};

use super::device_queue::{DeviceQueue, data_bytes};
use super::receiving::{Progress, Receiving};
use crate::error::Misbehaviour;
use crate::link::{Link, LinkError};
use crate::memory::{MemoryRegion, is_zero};
use crate::protocol::idle::Idle;
use crate::report::Phase;
use crate::transfer::device_sender::READ_BYTES_MAX;
use crate::wire::{Frame, FrameReader, MemoryTarget};
use crate::{Error, Result, Round};

/// Runs of zeroes with no more than this between them are looked at together.
const CLOSE_BYTES: u64 = 16 << 10;

/// How much memory is made zero at once. A cancel is observed between two pieces.
const ZERO_BYTES_MAX: u64 = 64 << 20;

/// The limits are checked after this number of frames, and at each keep-alive.
const CHECK_EVERY: u32 = 64;

pub(super) const DOING: &str = "waiting for the source's data";

impl Receiving<'_, '_> {
    /// Reads the first link up to the SUM, and waits until all devices are loaded and in STOP. The source was told to use
    /// `links` links.
    pub(super) fn read_first(&self, links: u32) -> Result<()> {
        let mut reader = self.connection.reader();
        let (mut idle, mut is_stopped) = (Idle::new(now(), self.options().silence_max), false);
        loop {
            let (link, cancel) = (self.connection.link(), Some(self.team.ended()));
            let read = reader
                .next_in_place(link, DOING, self.until, cancel, &|header| self.memory_target(header, link));
            let header = match read {
                Err(Error::TimedOut { .. }) if self.is_over() => return Err(self.took_too_long()),
                read => read?,
            };
            if header.kind == Kind::PROGRESS || header.sequence.is_multiple_of(CHECK_EVERY) {
                self.check_limits(&mut idle, is_stopped)?;
            }
            is_stopped |= header.kind == Kind::STOPPED;
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

    /// Whether the move has taken as long as it may.
    fn is_over(&self) -> bool {
        self.until.is_some_and(|(until, _)| until <= now())
    }

    fn took_too_long(&self) -> Error {
        let (peer, limit) = (self.connection.link().peer().into(), self.connection.limits().move_max);
        Error::TookTooLong { peer, limit }
    }

    /// Fails if the move has taken as long as it may, or the source was idle for as long as it may be.
    fn check_limits(&self, idle: &mut Idle, is_stopped: bool) -> Result<()> {
        if self.until.is_none() {
            return Ok(());
        }
        if self.is_over() {
            return Err(self.took_too_long());
        }
        let limits = self.connection.limits();
        let limit = match is_stopped {
            // The source has a limit for a guest that stands still. It may need that time for a device.
            true => limits.idle_max.max(limits.standstill_max),
            false => limits.idle_max,
        };
        if idle.time(self.frames.load(Ordering::Relaxed), now()) < limit {
            return Ok(());
        }
        // A source has nothing to send while it waits for a device here to load the received data.
        if self.queues.iter().any(|queue| queue.lock().queued > 0) {
            idle.excuse();
            return Ok(());
        }
        Err(Error::Idle { peer: self.connection.link().peer().into(), limit })
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

    /// Where the pages of a MEMORY_DATA without a checksum belong, if they can be received there. Those with a checksum would have to be
    /// copied out of the guest's memory, which may change at any time, to be checked: that takes longer than a copy into it.
    pub(super) fn memory_target(&self, header: &Header, link: &dyn Link) -> Result<Option<MemoryTarget>> {
        let at = self.order.lock().memory_region(header);
        let at = at.map_err(|damage| Error::Stream { from: link.peer().into(), damage })?;
        let Some(region) = self.regions[at] else { return Ok(None) };
        let range = header.position..header.position + u64::from(header.length);
        let address = region.iova.saturating_add(range.start);
        Ok(region.pin(range, true)?.map(|memory| MemoryTarget { memory, address }))
    }

    /// Acts on a frame. A frame that is out of order never reaches a device.
    pub(super) fn take(&self, header: &Header, reader: &mut FrameReader) -> Result<Step<'static>> {
        if header.kind != Kind::PROGRESS {
            self.frames.fetch_add(1, Ordering::Relaxed);
        }
        if matches!(header.kind, Kind::DEVICE_DATA | Kind::DEVICE_END) {
            return self.take_device(header, reader).map(|()| Step::Skipped);
        }
        if reader.was_in_place() {
            self.order.lock().received(header).map_err(|damage| reader.damaged(damage))?;
            self.recorder().memory_data(header.length.into());
            return Ok(Step::Skipped);
        }
        let next = self.order.lock().next(header, reader.payload(header));
        let step = next.map_err(|damage| reader.damaged(damage))?;
        match step {
            Step::MemoryData(at, offset, pages) => {
                if let Some(region) = self.regions[at] {
                    region.write(offset, pages)?;
                }
                self.recorder().memory_data(pages.len() as u64);
            }
            Step::MemoryZero(at, offset, bytes) => self.zero(at, offset, bytes)?,
            Step::MemoryRuns(at, runs) => self.write_runs(at, &runs)?,
            Step::Round(round, memory_dirty_bytes) => {
                self.recorder().round(&Round { round, memory_dirty_bytes, ..Round::default() });
            }
            Step::Flush => self.flush(header)?,
            Step::Stopped => {
                self.recorder().phase(Phase::StopCopy);
                self.recorder().stop();
                self.queues.iter().for_each(|queue| queue.lock().limit.stopped());
            }
            Step::DeviceHint(at, info) => {
                let said = info.initial_bytes.saturating_add(info.dirty_bytes);
                self.queues[at].lock().limit.said(said);
            }
            Step::WindowFull(at) => self.grow_window(at)?,
            Step::DeviceBegin(at) => self.deliver_ahead(at, reader)?,
            Step::Sum => return Ok(Step::Sum),
            _ => {}
        }
        Ok(Step::Skipped)
    }

    /// Writes pages that are not adjacent. Zeroes are not written where the memory is untouched or zero; zero pages
    /// close to each other are checked together.
    fn write_runs(&self, at: usize, runs: &Runs<'_>) -> Result<()> {
        let Some(region) = self.regions[at] else {
            self.recorder().memory_zero(runs.zero_bytes());
            self.recorder().memory_data(runs.data_bytes());
            return Ok(());
        };
        let zeroes: Vec<_> = runs
            .iter()
            .filter(|run| run.data.is_none())
            .map(|run| run.offset..run.offset + run.bytes)
            .collect();
        let mut found = self.spare();
        for close in zeroes.chunk_by(|one, next| next.start - one.end <= CLOSE_BYTES) {
            self.zero_all(at, region, close, &mut found)?;
        }
        self.keep_spare(found);
        for run in runs.iter() {
            run.data.map_or(Ok(()), |pages| region.write(run.offset, pages))?;
        }
        self.recorder().memory_data(runs.data_bytes());
        Ok(())
    }

    /// Makes runs zero that are close to each other and in ascending order.
    fn zero_all(
        &self,
        at: usize,
        region: &MemoryRegion<'_>,
        mut runs: &[Range<u64>],
        found: &mut Buffer,
    ) -> Result<()> {
        let mut data = Vec::new();
        while let Some(first) = runs.first() {
            let window = first.start..first.start + READ_BYTES_MAX as u64;
            let inside = runs.iter().take_while(|run| run.end <= window.end).count();
            let (these, rest) = runs.split_at(inside.max(1));
            runs = rest;
            let span = first.start..these.last().map_or(first.end, |last| last.end);
            if inside < 2 {
                self.zero(at, span.start, span.end - span.start)?;
                continue;
            }
            region.data_runs(span.clone(), &mut data)?;
            // One read for all of them, where holes and data cannot be told apart.
            let has_holes = data.iter().any(|data| data.has_holes);
            found.grow((span.end - span.start) as usize);
            if has_holes {
                region.read(span.start, &mut found[..(span.end - span.start) as usize])?;
            }
            let (mut data, mut zero_bytes) = (&data[..], 0);
            for run in these {
                let place = (run.start - span.start) as usize..(run.end - span.start) as usize;
                let before = data.iter().take_while(|data| data.range.end <= run.start).count();
                data = &data[before..];
                let is_untouched = data.first().is_none_or(|data| data.range.start >= run.end);
                if let Some(data) = data.first().filter(|_| !is_untouched && !has_holes) {
                    let is_within = data.range.start <= run.start && run.end <= data.range.end;
                    let into = &mut found[place.clone()];
                    match is_within {
                        true => region.read_run(data, run.start, into)?,
                        false => region.read(run.start, into)?,
                    }
                }
                match is_untouched || is_zero(&found[place]) {
                    true => zero_bytes += run.end - run.start,
                    false => self.zero(at, run.start, run.end - run.start)?,
                }
            }
            self.recorder().memory_zero(zero_bytes);
        }
        Ok(())
    }

    fn zero(&self, at: usize, offset: u64, bytes: u64) -> Result<()> {
        let end = offset + bytes;
        let mut from = offset;
        while from < end {
            self.team.check()?;
            let piece = ZERO_BYTES_MAX.min(end - from);
            if let Some(region) = self.regions[at] {
                region.zero(from, piece)?;
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

    /// Makes a device's window larger, if that makes its data arrive faster and there is room for it.
    fn grow_window(&self, at: usize) -> Result<()> {
        let mut queue = self.queues[at].lock();
        let wanted = queue.window.wants(queue.waiting());
        let take = |left: u64| Some(left - wanted.min(left));
        let more = self.windows_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        let more = more.unwrap_or_default().min(wanted);
        if more == 0 || !self.has_credit {
            return Ok(());
        }
        queue.window.grow(more);
        let window = queue.window.bytes();
        drop(queue);
        self.post(&Frame::of(self.ids[at], Kind::WINDOW, &[]).at(window))
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
        self.hand_on(at, queue, header, payload)?;
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
            self.hand_on(at, queue, &header, payload)?;
        }
    }

    fn hand_on(
        &self,
        at: usize,
        mut queue: Guard<'_, DeviceQueue>,
        header: &Header,
        payload: Buffer,
    ) -> Result<()> {
        if let Err(limit) = queue.limit.give(data_bytes(header, &payload)) {
            let device = self.devices[at].device.name().into();
            return Err(Error::DeviceMisbehaved { device, how: Misbehaviour::Endless(limit) });
        }
        queue.hand_on(header, payload);
        self.recorder().device_waits(at, queue.waiting());
        self.see_to(at, queue);
        Ok(())
    }

    /// A device has loaded everything and is in STOP.
    pub(super) fn is_loaded(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.loaded += 1;
        if state.loaded == self.queues.len() {
            drop(state);
            self.state.notify_all();
        }
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
