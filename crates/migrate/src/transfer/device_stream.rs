//! One device's saving session on its way to the links, job by job.

use limosa_client::{Chunk, DataStream, Device, DeviceExt};
use limosa_clockwork::{Monitor, now};
use limosa_protocol::State;
use limosa_protocol::feature::PrecopyInfo;

use crate::devices::{enter, failed};
use crate::report::{Act, Recorder};
use crate::transfer::sending::Sending;
use crate::{Error, Result};
use limosa_stream::body::{encode_device_end, encode_hint};
use limosa_stream::buffer::Buffer;
use limosa_stream::{DEVICE_BYTES_MAX, Kind, RunningCrc};

/// The most that is read from a device at once: it stays in a core's cache on the way.
pub(crate) const READ_BYTES_MAX: usize = 512 << 10;

/// What a device is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Nothing: what a job takes beside what is done in it.
    Nothing,
    /// Enter a state; a session that this opens is kept.
    Enter(State),
    /// Move what it has to say before the stop, about so many bytes at most, and ask what is left.
    PreCopy(u64),
    /// Enter STOP_COPY; moving everything that is left is its next job.
    Stop,
    /// Move everything that is left.
    Drain,
}

/// Between whoever does a device's job and the others.
#[derive(Default)]
pub(crate) struct Flow {
    /// Bytes of its data that were sent.
    pub(crate) sent: u64,
    /// Bytes of them that the destination's device has taken.
    pub(crate) taken: u64,
    /// What is left of pre-copy, as it said last.
    pub(crate) info: Option<PrecopyInfo>,
    /// What it would have to give if it were stopped now, as far as it says.
    pub(crate) bytes_if_stopped: u64,
    /// Whether it has a session.
    pub(crate) open: bool,
    /// Whether it is in STOP_COPY.
    pub(crate) stopped: bool,
    /// Jobs given, jobs done.
    given: u64,
    done: u64,
    job: Option<Job>,
    pub(crate) over: bool,
}

/// Gives a device a job, which has done those before.
pub(crate) fn give(sending: &Sending<'_, '_>, at: usize, job: Job) {
    let mut flow = sending.flows[at].lock();
    flow.job = Some(job);
    flow.given += 1;
    drop(flow);
    sending.workers.post(at);
}

/// Waits until all devices have done what they were given, or that holds.
pub(crate) fn wait_all(sending: &Sending<'_, '_>, enough: impl Fn(&Flow) -> bool) -> Result<()> {
    sending.flows.iter().try_for_each(|device| wait(sending, device, &enough))
}

fn wait(sending: &Sending<'_, '_>, device: &Monitor<Flow>, enough: impl Fn(&Flow) -> bool) -> Result<()> {
    let mut flow = device.lock();
    loop {
        if flow.over {
            return Err(Error::Cancelled);
        }
        if flow.done == flow.given || enough(&flow) {
            return Ok(());
        }
        sending.check()?;
        (flow, _) = device.wait(flow, None);
    }
}

/// A device's data, from its session to DEVICE_DATA frames.
pub(crate) struct Saving<'w, 'a> {
    device: &'a dyn Device,
    /// The device's place in the offer, which is its section.
    at: usize,
    sending: &'w Sending<'w, 'a>,
    recorder: &'w Recorder<'a>,
    stream: Option<Box<dyn DataStream>>,
    begun: bool,
    bytes: u64,
    crc: RunningCrc,
    buffer: Buffer,
}

impl<'w, 'a> Saving<'w, 'a> {
    pub(crate) fn new(
        at: usize,
        device: &'a dyn Device,
        sending: &'w Sending<'w, 'a>,
        recorder: &'w Recorder<'a>,
    ) -> Saving<'w, 'a> {
        // Two of them fit into the window.
        let room =
            sending.window.map_or(READ_BYTES_MAX, |window| READ_BYTES_MAX.min(window as usize / 2).max(1));
        let mut buffer = Buffer::new(recorder.buffers());
        // Now, and not when nothing runs: memory that is touched first takes its time.
        buffer.grow(room);
        Saving {
            device,
            at,
            sending,
            recorder,
            stream: None,
            begun: false,
            bytes: 0,
            crc: RunningCrc::new(),
            buffer,
        }
    }

    fn flow(&self) -> &'w Monitor<Flow> {
        &self.sending.flows[self.at]
    }

    /// Does the job that the device was given.
    pub(crate) fn run(&mut self) {
        let Some(job) = self.flow().lock().job.take() else { return };
        match self.perform(job) {
            Ok(()) => {
                self.flow().lock().done += 1;
                self.flow().notify_all();
            }
            Err(error) => self.sending.fail(error),
        }
    }

    fn perform(&mut self, job: Job) -> Result<()> {
        match job {
            Job::Nothing => Ok(()),
            Job::Enter(state) => self.enter(state),
            Job::PreCopy(bytes_max) => {
                self.precopy(bytes_max)?;
                self.look()
            }
            Job::Stop => {
                self.enter(State::StopCopy)?;
                self.flow().lock().stopped = true;
                // Behind those that are not stopped yet.
                give(self.sending, self.at, Job::Drain);
                Ok(())
            }
            Job::Drain => self.drain(),
        }
    }

    fn enter(&mut self, state: State) -> Result<()> {
        let stream = {
            let _span = self.recorder.span(self.at, Act::Enter { state });
            enter(self.device, state)?
        };
        if let Some(stream) = stream {
            let bytes = stream.transfer_bytes_max().clamp(1, self.buffer.len());
            self.buffer.truncate(bytes);
            self.stream = Some(stream);
            self.flow().lock().open = true;
        }
        let saves = matches!(state, State::PreCopy | State::PreCopyP2p | State::StopCopy);
        match saves && self.stream.is_none() {
            true => Err(self.misbehaved("it opened a session and gave no data stream")),
            false => Ok(()),
        }
    }

    fn precopy(&mut self, bytes_max: u64) -> Result<()> {
        let (began, before) = (now(), self.bytes);
        // An end before STOP_COPY is not the end; some devices say so for "nothing for now".
        while self.bytes - before < bytes_max && matches!(self.chunk()?, Chunk::Data(_)) {}
        self.recorder.device_span(self.at, Act::PrecopyData, began, self.bytes - before);
        Ok(())
    }

    /// Moves everything that is left, in STOP_COPY.
    fn drain(&mut self) -> Result<()> {
        let (began, before) = (now(), self.bytes);
        loop {
            self.sending.check()?;
            match self.chunk()? {
                Chunk::Data(_) => {}
                Chunk::NothingForNow => {
                    return Err(self
                        .misbehaved("in STOP_COPY it said \"nothing for now\" instead of data or the end"));
                }
                Chunk::End => break,
            }
        }
        self.begin()?;
        self.sending.until_stopped()?;
        let end = encode_device_end(self.bytes, self.crc.value());
        self.sending.send(0, Kind::DEVICE_END, self.at as u32, 0, &end)?;
        self.recorder.device_span(self.at, Act::FinalData, began, self.bytes - before);
        Ok(())
    }

    /// Asks what is left of pre-copy, and tells it to the other side. What the device refuses to tell is not known.
    fn look(&mut self) -> Result<()> {
        let info = match &mut self.stream {
            Some(stream) => match stream.precopy_info() {
                Ok(info) => Some(info),
                Err(error) if error.is_connection_lost() => {
                    return Err(failed(self.device, "asking for pre-copy info", error));
                }
                Err(_) => None,
            },
            None => None,
        };
        if let Some(info) = &info {
            self.begin()?;
            self.sending.send(0, Kind::DEVICE_HINT, self.at as u32, 0, &encode_hint(info))?;
        }
        let size = match self.device.mig_data_size() {
            Ok(size) => size.unwrap_or(0),
            Err(error) if error.is_connection_lost() => {
                return Err(failed(self.device, "asking for the size of its data", error));
            }
            Err(_) => 0,
        };
        let left = info.map_or(0, |info| info.initial_bytes.saturating_add(info.dirty_bytes));
        let mut flow = self.flow().lock();
        flow.info = info;
        flow.bytes_if_stopped = size.max(left);
        Ok(())
    }

    fn chunk(&mut self) -> Result<Chunk> {
        let Some(stream) = &mut self.stream else { return Ok(Chunk::End) };
        let chunk = stream.read(&mut self.buffer);
        let chunk = chunk.map_err(|error| failed(self.device, "reading its data", error))?;
        if let Chunk::Data(bytes) = chunk {
            if bytes == 0 || bytes > self.buffer.len() {
                let room = self.buffer.len();
                return Err(self.misbehaved(&format!("a read of up to {room} bytes gave {bytes}")));
            }
            if self.bytes + bytes as u64 > DEVICE_BYTES_MAX {
                return Err(self.misbehaved(&format!("its data has no end within {DEVICE_BYTES_MAX} bytes")));
            }
            self.begin()?;
            // Credit for it may come before the sending returns.
            self.flow().lock().sent = self.bytes + bytes as u64;
            self.sending.send_device(self.at, self.bytes, &self.buffer[..bytes], self.recorder)?;
            self.crc.add(&self.buffer[..bytes]);
            self.bytes += bytes as u64;
            self.recorder.device_data(self.at, bytes as u64);
        }
        Ok(chunk)
    }

    fn begin(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.begun, true) {
            self.sending.send(0, Kind::DEVICE_BEGIN, self.at as u32, 0, &[])?;
        }
        Ok(())
    }

    fn misbehaved(&self, what: &str) -> Error {
        Error::DeviceMisbehaved { device: self.device.name().into(), what: what.into() }
    }
}
