//! What the threads of a source share while devices and memory are on their way: the links, how much of each device
//! the destination has taken, and the first thing that went wrong.

use std::time::{Duration, Instant};

use limosa_clockwork::{Monitor, now};

use crate::link::Wait;
use crate::protocol::link_count::LinkCount;
use crate::report::Recorder;
use crate::transfer::device_stream::Flow;
use crate::transfer::device_workers::DeviceWorkers;
use crate::wire::{FrameReader, FrameWriter, LINGER, pulse};
use crate::{Cancel, Error, Options, Result};
use limosa_stream::{Damage, Kind};

/// Of less than this at once all that a device gives goes over one link, so that not many pieces of it are ahead of
/// others (`docs/stream.md: Several links`).
pub(crate) const SMALL_BYTES: usize = 4 << 10;

/// The work between the handshake and READY.
pub(crate) struct Sending<'w, 'a> {
    /// The links, by number; on the first the other side answers.
    pub(crate) writers: Vec<&'w FrameWriter<'a>>,
    /// The devices, by their place in the offer.
    pub(crate) flows: Vec<Monitor<Flow>>,
    /// The threads that the devices' jobs are done in.
    pub(crate) workers: DeviceWorkers,
    /// How much of a device may be on its way; `None` where nobody answers.
    pub(crate) window: Option<u64>,
    pub(crate) options: &'w Options,
    /// How many links memory goes over.
    pub(crate) link_count: Monitor<LinkCount>,
    state: Monitor<State>,
    /// Ends what waits on links once something has gone wrong.
    ended: Cancel,
    /// Ends the listening. Used later: a link that fails may still bring the reason.
    deaf: Cancel,
}

#[derive(Default)]
struct State {
    failure: Option<Error>,
    failed_at: Option<Instant>,
    /// The flush that is under way, and how many links have answered it.
    flush: u64,
    flushed: usize,
    stopped: bool,
    summed: bool,
    ready: bool,
    over: bool,
}

impl<'w, 'a> Sending<'w, 'a> {
    pub(crate) fn new(
        writers: Vec<&'w FrameWriter<'a>>,
        devices: usize,
        window: Option<u64>,
        options: &'w Options,
        cancel: Option<&Cancel>,
    ) -> Result<Sending<'w, 'a>> {
        let child = || match cancel {
            Some(cancel) => cancel.child(),
            None => Cancel::new(),
        };
        let os = |error| Error::Os { doing: "making an event", error };
        let link_count = Monitor::new(LinkCount::new(writers.len(), options.links_measured));
        Ok(Sending {
            flows: (0..devices).map(|_| Monitor::default()).collect(),
            workers: DeviceWorkers::new(devices, writers.len() + 1),
            writers,
            window,
            options,
            link_count,
            state: Monitor::default(),
            ended: child().map_err(os)?,
            deaf: child().map_err(os)?,
        })
    }

    /// Whether somebody answers.
    pub(crate) fn has_peer(&self) -> bool {
        self.writers[0].has_peer()
    }

    /// An error once the work is to end early; which one, [`Sending::failure`] knows.
    pub(crate) fn check(&self) -> Result<()> {
        if self.ended.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Something went wrong: the first such thing counts, and everybody ends.
    pub(crate) fn fail(&self, error: Error) {
        let mut state = self.state.lock();
        let (link_failed, words) =
            (matches!(error, Error::Link { .. }), matches!(error, Error::Aborted { .. }));
        match &state.failure {
            // The other side has said why it is gone.
            Some(Error::Link { .. }) if words => state.failure = Some(error),
            Some(_) => {}
            None => (state.failure, state.failed_at) = (Some(error), Some(now())),
        }
        drop(state);
        self.ended.cancel();
        if !link_failed || !self.has_peer() {
            self.deaf.cancel();
        }
        self.wake();
    }

    /// Nothing more is to be done, by anybody.
    pub(crate) fn end(&self) {
        self.state.lock().over = true;
        self.ended.cancel();
        self.wake();
    }

    /// What went wrong first.
    pub(crate) fn failure(self) -> Option<Error> {
        self.state.into_inner().failure
    }

    fn wake(&self) {
        self.state.notify_all();
        for flow in &self.flows {
            flow.lock().over |= self.ended.is_cancelled();
            flow.notify_all();
        }
        if self.ended.is_cancelled() {
            self.workers.end();
        }
    }

    /// Sends a frame over a link.
    pub(crate) fn send(&self, link: usize, kind: Kind, section: u32, at: u64, payload: &[u8]) -> Result<()> {
        self.writers[link].post(kind, section, at, payload, Some(&self.ended))
    }

    /// Sends a device's data over the link that has the least to do, once the destination has room for it.
    pub(crate) fn send_device(
        &self,
        device: usize,
        position: u64,
        data: &[u8],
        recorder: &Recorder<'_>,
    ) -> Result<()> {
        if let Some(window) = self.window {
            let end = position + data.len() as u64;
            let mut flow = self.flows[device].lock();
            let mut until = now() + self.options.load_max;
            let mut taken = flow.taken;
            while end > flow.taken.saturating_add(window) {
                self.check()?;
                let timed_out;
                (flow, timed_out) = self.flows[device].wait(flow, Some(until));
                if std::mem::replace(&mut taken, flow.taken) != flow.taken {
                    until = now() + self.options.load_max;
                } else if timed_out {
                    return Err(self.timed_out("waiting for it to take a device's data"));
                }
            }
            recorder.device_waits(device, end - flow.taken);
        }
        // Devices begin at different links, so that one with little to do is found at once.
        let links = self.writers.len();
        let among = if data.len() < SMALL_BYTES { 1 } else { links };
        let link = (0..among).map(|at| (at + device) % links).min_by_key(|at| self.writers[*at].busy());
        self.workers.send(|| self.send(link.unwrap_or(0), Kind::DEVICE_DATA, device as u32, position, data))
    }

    fn timed_out(&self, doing: &'static str) -> Error {
        Error::TimedOut { peer: self.writers[0].peer().into(), doing, limit: self.options.load_max }
    }

    /// Waits until the destination has handled all that was sent, devices' data and memory.
    pub(crate) fn flush(&self) -> Result<Duration> {
        let began = now();
        if !self.has_peer() {
            return self.check().map(|()| Duration::ZERO);
        }
        let number = {
            let mut state = self.state.lock();
            state.flush += 1;
            state.flushed = 0;
            state.flush
        };
        for link in 0..self.writers.len() {
            self.send(link, Kind::FLUSH, link as u32, number, &[])?;
        }
        let doing = "waiting for it to handle what was sent";
        self.wait(doing, |state| state.flushed == self.writers.len())?;
        for device in &self.flows {
            let until = now() + self.options.load_max;
            let mut flow = device.lock();
            while flow.taken < flow.sent {
                self.check()?;
                let timed_out;
                (flow, timed_out) = device.wait(flow, Some(until));
                if timed_out {
                    return Err(self.timed_out(doing));
                }
            }
        }
        Ok(now() - began)
    }

    /// Waits that long, or until something goes wrong.
    pub(crate) fn pause(&self, time: Duration) -> Result<()> {
        let until = now() + time;
        let mut state = self.state.lock();
        loop {
            if state.failure.is_some() {
                return Err(Error::Cancelled);
            }
            self.check()?;
            let timed_out;
            (state, timed_out) = self.state.wait(state, Some(until));
            if timed_out {
                return Ok(());
            }
        }
    }

    /// All source devices are stopped: those that have given all may say so.
    pub(crate) fn stopped(&self) -> Result<()> {
        self.send(0, Kind::STOPPED, 0, 0, &[])?;
        self.state.lock().stopped = true;
        self.state.notify_all();
        Ok(())
    }

    /// Waits until the devices are stopped, all of them.
    pub(crate) fn until_stopped(&self) -> Result<()> {
        let mut state = self.state.lock();
        while !state.stopped {
            self.check()?;
            (state, _) = self.state.wait(state, None);
        }
        Ok(())
    }

    /// Everything is sent: says so over each link, and waits until the destination has loaded.
    pub(crate) fn finish(&self, sum: &[u8]) -> Result<()> {
        for link in 1..self.writers.len() {
            self.send(link, Kind::LINK_END, 0, 0, &[])?;
        }
        self.state.lock().summed = true;
        self.send(0, Kind::SUM, 0, 0, sum)?;
        match self.has_peer() {
            true => self.wait("waiting for it to load", |state| state.ready),
            false => Ok(()),
        }
    }

    fn wait(&self, doing: &'static str, is_done: impl Fn(&State) -> bool) -> Result<()> {
        let until = now() + self.options.load_max;
        let mut state = self.state.lock();
        while !is_done(&state) {
            self.check()?;
            let timed_out;
            (state, timed_out) = self.state.wait(state, Some(until));
            if timed_out && !is_done(&state) {
                return Err(self.timed_out(doing));
            }
        }
        Ok(())
    }

    /// Listens to the destination until it is ready, and lets it know that this side is alive.
    pub(crate) fn listen(&self, reader: &mut FrameReader<'_>) {
        if let Err(error) = self.hear(reader) {
            self.fail(error);
        }
    }

    fn hear(&self, reader: &mut FrameReader<'_>) -> Result<()> {
        const DOING: &str = "listening to it";
        let silence_max = self.options.silence_max;
        let mut heard = now();
        loop {
            {
                let state = self.state.lock();
                if state.over || state.failed_at.is_some_and(|at| at + LINGER <= now()) {
                    return Ok(());
                }
            }
            // A link that has failed shows when it is used for more than this.
            let _ = self.writers[0].pulse(Some(&self.ended));
            let slice = pulse(silence_max).min(LINGER);
            let Some(header) = reader.next(DOING, Wait::within(slice, Some(&self.deaf)))? else {
                if heard + silence_max <= now() {
                    return Err(reader.timed_out(DOING, silence_max));
                }
                continue;
            };
            heard = now();
            let misplaced = |why: &str| Damage::Misplaced { kind: header.kind, why: why.into() };
            let heard = match header.kind {
                Kind::PROGRESS => Ok(()),
                Kind::FLUSHED => {
                    let mut state = self.state.lock();
                    state.flushed += usize::from(header.position == state.flush);
                    self.state.notify_all();
                    Ok(())
                }
                Kind::CREDIT => match self.flows.get(header.section as usize) {
                    None => Err(misplaced("no such device was offered")),
                    Some(device) => {
                        let mut flow = device.lock();
                        if header.position <= flow.sent {
                            flow.taken = flow.taken.max(header.position);
                            device.notify_all();
                            Ok(())
                        } else {
                            Err(misplaced("it has taken more than was sent"))
                        }
                    }
                },
                Kind::READY => {
                    let mut state = self.state.lock();
                    if state.summed {
                        state.ready = true;
                        self.state.notify_all();
                        return Ok(());
                    }
                    Err(misplaced("not all is sent"))
                }
                _ => Err(misplaced("nothing was asked")),
            };
            heard.map_err(|damage| reader.damaged(damage))?;
        }
    }
}
