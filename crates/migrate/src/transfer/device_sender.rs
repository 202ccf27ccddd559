//! [`DeviceSender`]: one device of a source, and its jobs, which a worker does in order: from pre-copy to the end of the
//! data, and the rollback.

use std::sync::Arc;
use std::time::Duration;

use limosa_client::dirty::StartedLog;
use limosa_client::{Chunk, DataStream, Device, DeviceExt};
use limosa_clockwork::now;
use limosa_protocol::State;
use limosa_stream::body::{encode_device_end, encode_hint};
use limosa_stream::buffer::Buffer;
use limosa_stream::{Kind, RunningCrc};

use super::device_flow::Job;
use super::driven::DrivenDevice;
use super::read_ahead::ReadAhead;
use super::sending::Sending;
use super::way_back::WayBack;
use crate::devices::{MovedDevice, failed};
use crate::error::{Misbehaviour, guard};
use crate::memory::DirtyPages;
pub(crate) use crate::protocol::credit::READ_BYTES_MAX;
use crate::protocol::credit::read_bytes;
use crate::protocol::state_limit::StateLimit;
use crate::report::{Act, Loss, Unrecovered};
use crate::wire::Frame;
use crate::{Error, Result};

/// A streaming device is asked again how much is left after this many bytes, or after this time.
const LOOK_BYTES: u64 = 16 << 20;
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A device that has nothing for now is read again after a pause, which doubles as long as it has nothing.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// In the stop, pieces that a device gives within this time are sent together, up to this many bytes.
const JOINED_TIME_MAX: Duration = Duration::from_millis(1);
const JOINED_BYTES_MAX: usize = 64 << 10;
/// The room in bytes for data of a device behind a piece that seemed to be its last.
const BEHIND_BYTES: usize = 4 << 10;

/// A device's own log of dirty pages, to be harvested when the device is stopped.
pub(crate) struct StopHarvest {
    pub(crate) pages: Arc<DirtyPages>,
    pub(crate) log: StartedLog,
}

/// A device, its session, and how much of its data was sent.
pub(crate) struct DeviceSender<'w, 'a> {
    driven: DrivenDevice<'a>,
    /// How many bytes it gives in the stop, as its owner says.
    stop_bytes: Option<u64>,
    found: State,
    way_back: Option<WayBack<'a>>,
    /// The device's index in the offer, which is its section.
    at: usize,
    sending: &'w Sending<'w, 'a>,
    log: Option<StopHarvest>,
    stream: Option<Box<dyn DataStream>>,
    begun: bool,
    bytes: u64,
    limit: StateLimit,
    crc: RunningCrc,
    /// Room for a piece of data, and for what comes behind one that seemed to be the last.
    buffer: Buffer,
    /// The most bytes of a piece.
    room: usize,
    /// Where the data ends in the stop, as the device said last.
    end: Option<u64>,
    /// How many reads in a row have filled the buffer.
    full_reads: u32,
}

impl<'w, 'a> DeviceSender<'w, 'a> {
    pub(crate) fn new(
        at: usize,
        moved: &MovedDevice<'a>,
        found: State,
        sending: &'w Sending<'w, 'a>,
        log: Option<StopHarvest>,
    ) -> DeviceSender<'w, 'a> {
        let room = sending.window_bytes().map_or(READ_BYTES_MAX, read_bytes);
        let mut buffer = Buffer::new(sending.recorder().buffers());
        // Touched now, since the first access to memory takes time that would add to the downtime.
        buffer.grow(room + BEHIND_BYTES.min(room));
        DeviceSender {
            driven: DrivenDevice::new(moved.device, found),
            stop_bytes: moved.stop_bytes,
            found,
            way_back: None,
            at,
            sending,
            log,
            stream: None,
            begun: false,
            bytes: 0,
            limit: StateLimit::new(sending.options()),
            crc: RunningCrc::new(),
            buffer,
            room,
            end: None,
            full_reads: 0,
        }
    }

    /// Does the next job that the device was given.
    pub(crate) fn run(&mut self) {
        let flow = &self.sending.flows[self.at];
        let Some(job) = flow.lock().jobs.pop_front() else { return };
        let name = self.driven.device().name();
        match job {
            Job::ReturnP2p | Job::Return => {
                let returned = limosa_clockwork::catch(|| self.go_back(job));
                let loss = returned.unwrap_or_else(|panic| {
                    Some(self.lost(Loss::Unknown, &Error::panicked(name, &panic).to_string()))
                });
                let mut flow = flow.lock();
                flow.loss = loss.or(flow.loss.take());
            }
            Job::Finish => {
                let finished = guard(name, || self.perform(job));
                flow.lock().unfinished = finished.err();
            }
            _ => {
                if let Err(error) = guard(name, || self.perform(job)) {
                    self.sending.team.fail(error);
                }
            }
        }
        self.sending.jobs.is_done();
    }

    fn perform(&mut self, job: Job) -> Result<()> {
        match job {
            Job::NoOp => Ok(()),
            Job::Look => self.look(),
            Job::Enter(state) => self.enter(state),
            Job::Reopen => {
                self.stream = None;
                self.sending.flows[self.at].lock().has_session = false;
                self.driven.end_session(self.found)?;
                self.enter(State::PreCopy)
            }
            Job::Stream => self.stream(),
            Job::Stop => {
                self.enter(State::StopCopy)?;
                // It writes no more. Its log is read on this thread, beside those of other devices.
                if let Some(StopHarvest { pages, log }) = &self.log {
                    pages.harvest_device(self.driven.device(), *log)?;
                }
                self.limit.stopped();
                // After the jobs of devices that are not stopped yet.
                self.sending.give(self.at, Job::Drain);
                self.sending.device_stopped()
            }
            Job::Drain => self.drain(),
            Job::Finish => self.enter(State::Stop),
            Job::ReturnP2p | Job::Return => Ok(()),
        }
    }

    fn enter(&mut self, state: State) -> Result<()> {
        let stream = {
            let _span = self.sending.recorder().span(self.at, Act::Enter { state });
            self.driven.enter(state)?
        };
        if let Some(stream) = stream {
            self.room = stream.transfer_bytes_max().clamp(1, self.room);
            self.buffer.truncate(self.room + BEHIND_BYTES.min(self.room));
            self.stream = Some(stream);
            self.sending.flows[self.at].lock().has_session = true;
        }
        Ok(())
    }

    /// Gives data before the stop, until streaming ends.
    fn stream(&mut self) -> Result<()> {
        let flow = &self.sending.flows[self.at];
        let mut pause = PAUSE_MIN;
        self.look()?;
        let mut looked = (self.bytes, now());
        while flow.lock().streaming {
            self.sending.team.check()?;
            let (began, before) = (now(), self.bytes);
            // Before STOP_COPY some devices report the end when they have nothing for now.
            let chunk = self.read(0)?;
            let has_data = matches!(chunk, Chunk::Data(_));
            if let Chunk::Data(bytes) = chunk {
                self.send(bytes, false)?;
                self.sending.recorder().device_span(self.at, Act::PrecopyData, began, self.bytes - before);
                pause = PAUSE_MIN;
            }
            let drained = !has_data;
            let was_drained = {
                let mut flow = flow.lock();
                if drained {
                    flow.idle_since.get_or_insert_with(now);
                }
                std::mem::replace(&mut flow.drained, drained)
            };
            if drained || was_drained || self.bytes - looked.0 >= LOOK_BYTES || looked.1 + LOOK_EVERY <= now()
            {
                self.look()?;
                looked = (self.bytes, now());
            }
            if drained {
                let until = now() + pause;
                drop(self.sending.team.wait(flow, flow.lock(), Some(until), |flow| !flow.streaming)?);
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
        self.settle()
    }

    /// Waits until all data that was read is sent.
    fn settle(&self) -> Result<()> {
        self.sending.ahead[self.at].settle(&self.sending.team)
    }

    /// Gives all remaining data, in STOP_COPY.
    fn drain(&mut self) -> Result<()> {
        let (began, before) = (now(), self.bytes);
        // Small pieces wait for the next ones, and what seems to be the last for the device's next answer, since the end of the data
        // can go in the same write. Not those of a slow device: the destination could wait for too long.
        let (mut held, mut since) = (0, began);
        loop {
            self.sending.team.check()?;
            match self.read(held)? {
                Chunk::Data(bytes) => held += bytes,
                Chunk::NothingForNow => return Err(self.misbehaved(Misbehaviour::NothingInStopCopy)),
                Chunk::End => break,
            }
            if held > self.room {
                // A frame has no more than half of a window: the destination may give credit only for more.
                let behind = self.buffer[self.room..held].to_vec();
                self.send(self.room, false)?;
                held = behind.len();
                self.buffer[..held].copy_from_slice(&behind);
            }
            let seems_last = self.end == Some(self.bytes + held as u64);
            let is_joined = held < JOINED_BYTES_MAX.min(self.room) && now() - since < JOINED_TIME_MAX;
            if !seems_last && !is_joined {
                self.send(std::mem::take(&mut held), false)?;
                since = now();
            }
        }
        if held > 0 && !self.sending.are_stopped() {
            self.send(std::mem::take(&mut held), false)?;
        }
        self.settle()?;
        // A device that was reset meanwhile has no more data either.
        self.driven.check()?;
        self.sending.flows[self.at].lock().ended = true;
        self.sending.until_stopped()?;
        self.send(held, true)?;
        self.sending.recorder().device_span(self.at, Act::FinalData, began, self.bytes - before);
        Ok(())
    }

    /// Asks the device how much it has to give, and tells the destination. A number that the device refuses to tell is not
    /// known.
    fn look(&mut self) -> Result<()> {
        // What it has to give is behind what was sent, and a FLUSH that follows asks for all of that.
        self.settle()?;
        let device = self.driven.device();
        let info = match &mut self.stream {
            None => None,
            Some(stream) => match stream.precopy_info() {
                Ok(info) => Some(info),
                Err(error) => refused(device, "asking for pre-copy info", error)?,
            },
        };
        let size = match device.mig_data_size() {
            Ok(size) => size,
            Err(error) => refused(device, "asking for the size of its data", error)?,
        };
        let left = info.map(|info| info.initial_bytes.saturating_add(info.dirty_bytes));
        let stop_bytes = size.or(self.stop_bytes).map(|size| size.max(left.unwrap_or(0)));
        self.limit.said(stop_bytes.or(left).unwrap_or(0));
        self.end = stop_bytes.map(|bytes| self.bytes.saturating_add(bytes));
        let mut flow = self.sending.flows[self.at].lock();
        let is_new = (flow.left, flow.stop_bytes) != (left, stop_bytes);
        let initial = info.map_or(0, |info| info.initial_bytes);
        if flow.initial > 0 || initial > 0 {
            flow.initial_end = self.bytes;
        }
        (flow.initial, flow.left, flow.stop_bytes) = (initial, left, stop_bytes);
        (flow.looked, flow.looked_at) = (true, self.bytes);
        drop(flow);
        self.sending.flows[self.at].notify_all();
        if let Some(info) = info.filter(|_| is_new) {
            let hint = encode_hint(&info);
            let frames = [self.frame(Kind::DEVICE_BEGIN, &[]), self.frame(Kind::DEVICE_HINT, &hint)];
            let begun = usize::from(std::mem::replace(&mut self.begun, true));
            self.sending.post_all(&frames[begun..])?;
        }
        self.sending.device_has_news();
        Ok(())
    }

    /// Reads a piece of data into the buffer, behind the first `held` bytes.
    fn read(&mut self, held: usize) -> Result<Chunk> {
        let Some(stream) = &mut self.stream else { return Ok(Chunk::End) };
        let end = if held < self.room { self.room } else { self.buffer.len() };
        let into = &mut self.buffer[held..end];
        let room = into.len();
        let chunk = stream.read(into);
        let chunk = chunk.map_err(|error| self.driven.why("reading its data", error))?;
        if let Chunk::Data(bytes) = chunk {
            if bytes == 0 || bytes > room {
                return Err(self.misbehaved(Misbehaviour::WrongLength { room, bytes }));
            }
            let given = self.limit.give(bytes as u64);
            given.map_err(|limit| self.misbehaved(Misbehaviour::Endless(limit)))?;
        }
        Ok(chunk)
    }

    /// Sends the first bytes of the buffer, and the end of the data if they are the last. DEVICE_BEGIN comes before the first.
    fn send(&mut self, bytes: usize, is_last: bool) -> Result<()> {
        let position = self.bytes;
        self.bytes += bytes as u64;
        self.full_reads = if bytes >= self.room { self.full_reads.saturating_add(1) } else { 0 };
        let ahead = &self.sending.ahead[self.at];
        if ReadAhead::pays(self.full_reads) && !is_last {
            self.crc.add(&self.buffer[..bytes]);
            ahead.give(self.sending, position, bytes, &mut self.buffer)?;
        } else {
            ahead.settle(&self.sending.team)?;
            let begin = [self.frame(Kind::DEVICE_BEGIN, &[])];
            let begun = usize::from(std::mem::replace(&mut self.begun, true));
            if is_last {
                self.crc.add(&self.buffer[..bytes]);
            }
            let end = encode_device_end(self.bytes, self.crc.value());
            let end = [self.frame(Kind::DEVICE_END, &end)];
            let (begin, end) = (&begin[begun..], &end[usize::from(!is_last)..]);
            match bytes {
                0 => self.sending.post_all(&[begin, end].concat())?,
                _ => self.sending.send_device(self.at, position, &self.buffer[..bytes], begin, end)?,
            }
            if !is_last {
                self.crc.add(&self.buffer[..bytes]);
            }
        }
        self.sending.recorder().device_data(self.at, bytes as u64);
        Ok(())
    }

    fn frame<'p>(&self, kind: Kind, payload: &'p [u8]) -> Frame<'p> {
        Frame::of(self.at as u32, kind, payload)
    }

    /// Returns the device to the state in which it was found. The result says what could not be done.
    fn go_back(&mut self, job: Job) -> Option<Unrecovered> {
        let (device, is_stopped) = (self.driven.device(), !self.driven.expected().is_running());
        let resets = self.driven.resets();
        let begin = || WayBack::new(device, self.found, is_stopped).with_resets_before(resets);
        if job == Job::ReturnP2p {
            return self.way_back.insert(begin()).to_p2p();
        }
        self.stream = None;
        self.way_back.take().unwrap_or_else(begin).to_the_end()
    }

    fn lost(&self, loss: Loss, why: &str) -> Unrecovered {
        Unrecovered { device: self.driven.device().name().into(), loss, why: why.into() }
    }

    fn misbehaved(&self, how: Misbehaviour) -> Error {
        Error::DeviceMisbehaved { device: self.driven.device().name().into(), how }
    }
}

/// Turns a refusal into "not known". A lost connection is an error.
fn refused<T>(device: &dyn Device, doing: &str, error: limosa_client::Error) -> Result<Option<T>> {
    if error.is_connection_lost() { Err(failed(device, doing, error)) } else { Ok(None) }
}
