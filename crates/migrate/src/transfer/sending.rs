//! [`Sending`]: the state that the threads of a source share while devices and memory are on their way.

mod answers;
mod device_data;

use std::time::{Duration, Instant};

use limosa_clockwork::now;
use limosa_guest_memory::SendPart;
use limosa_stream::{Kind, Proofs};

use super::device_flow::{DeviceFlow, Job};
use super::device_workers::DeviceWorkers;
use super::jobs::JobCount;
use super::keep_alive::KeepAlive;
use super::read_ahead::ReadAhead;
use super::team::{Shared, Team};
use crate::context::Context;
use crate::error::Remaining;
use crate::protocol::credit::{SMALL_BYTES, SendWindow};
use crate::protocol::flush::Flushes;
use crate::protocol::limits::Limits;
use crate::protocol::share::{LinkShare, PAUSE_MAX};
use crate::protocol::stop_policy::DeviceLook;
use crate::report::Recorder;
use crate::wire::{Frame, FrameWriter};
use crate::{Error, Options, Result};

/// What the destination's ANSWER says about this stream.
#[derive(Clone, Copy)]
pub(crate) struct Terms {
    /// How many bytes of a device may be on their way.
    pub(crate) window_bytes: u64,
    /// Whether it reads WINDOW_FULL.
    pub(crate) windows_grow: bool,
    /// Whether it reads MEMORY_RUNS.
    pub(crate) runs: bool,
    /// Whether it reads memory without checksums, over the links that this side trusts as well.
    pub(crate) unchecked: bool,
}

/// The work between the handshake and READY, and the state of its threads.
pub(crate) struct Sending<'w, 'a> {
    context: &'w Context<'a>,
    pub(crate) team: Team,
    /// The links, by number. The destination answers on the first.
    pub(crate) writers: Vec<&'w FrameWriter<'a>>,
    /// The devices, by their index in the offer.
    pub(crate) flows: Vec<Shared<DeviceFlow>>,
    /// What the devices' threads hand over to be sent, by device.
    pub(crate) ahead: Vec<ReadAhead>,
    /// The threads for the devices' jobs.
    pub(crate) workers: DeviceWorkers,
    pub(crate) alive: KeepAlive,
    /// `None` if no peer answers.
    terms: Option<Terms>,
    proofs: Proofs,
    limits: Limits,
    share: Shared<LinkShare>,
    flushes: Shared<Flushes>,
    state: Shared<State>,
    pub(super) jobs: JobCount,
    /// How many times a device had news.
    news: Shared<u64>,
}

#[derive(Default)]
struct State {
    stopped: bool,
    summed: bool,
    ready: bool,
}

impl<'w, 'a> Sending<'w, 'a> {
    pub(crate) fn new(
        context: &'w Context<'a>,
        writers: Vec<&'w FrameWriter<'a>>,
        devices: usize,
        terms: Option<Terms>,
        proofs: Proofs,
    ) -> Result<Sending<'w, 'a>> {
        let team = Team::new(context.cancel)?;
        let window = terms.map(|terms| terms.window_bytes);
        let grows = terms.is_some_and(|terms| terms.windows_grow);
        if terms.is_some_and(|terms| terms.unchecked) {
            // The answer is about the first link. Of others the destination may want checksums, unless they are authenticated too.
            let first = writers[0].link().is_authenticated();
            let waived = |writer: &&&FrameWriter<'_>| {
                let link = writer.link();
                context.options.memory_checksums.are_waived(link) && (link.is_authenticated() || !first)
            };
            writers.iter().filter(waived).for_each(|writer| writer.waive_checksums());
        }
        Ok(Sending {
            context,
            flows: (0..devices)
                .map(|_| team.share(DeviceFlow::new(SendWindow::new(window, grows))))
                .collect(),
            ahead: (0..devices).map(|_| ReadAhead::new(&team)).collect(),
            workers: DeviceWorkers::new(devices, writers.len() + 1),
            alive: KeepAlive::default(),
            writers,
            terms,
            proofs,
            limits: Limits::new(context.options),
            share: team.share(LinkShare::default()),
            flushes: team.share(Flushes::default()),
            state: team.share(State::default()),
            jobs: JobCount::new(&team, devices),
            news: team.share(0),
            team,
        })
    }

    pub(crate) fn recorder(&self) -> &'w Recorder<'a> {
        &self.context.recorder
    }

    pub(crate) fn options(&self) -> &'a Options {
        self.context.options
    }

    /// How many bytes of a device may be on their way; `None` if no peer answers.
    pub(crate) fn window_bytes(&self) -> Option<u64> {
        self.terms.map(|terms| terms.window_bytes)
    }

    /// Whether the destination reads MEMORY_RUNS.
    pub(crate) fn takes_runs(&self) -> bool {
        self.terms.is_some_and(|terms| terms.runs)
    }

    /// Whether a peer answers.
    pub(crate) fn has_peer(&self) -> bool {
        self.writers[0].has_peer()
    }

    /// Gives a device a job, after those that it has.
    pub(crate) fn give(&self, at: usize, job: Job) {
        self.give_all(|device| (device == at).then_some(job));
    }

    /// Gives each device this job, after those that it has.
    pub(crate) fn give_all(&self, job: impl Fn(usize) -> Option<Job>) {
        let jobs: Vec<_> = (0..self.flows.len()).filter_map(|at| Some((at, job(at)?))).collect();
        self.jobs.add(jobs.len());
        jobs.iter().for_each(|(at, job)| self.flows[*at].lock().jobs.push_back(*job));
        self.workers.post_all(jobs.iter().map(|(at, _)| *at));
    }

    /// Waits until all devices have done their jobs.
    pub(crate) fn wait_all(&self) -> Result<()> {
        self.jobs.wait(&self.team)
    }

    /// Gives all devices [`Job::Stop`], and waits until all of them are in STOP_COPY and STOPPED is sent. They go on with
    /// [`Job::Drain`].
    pub(crate) fn stop_all(&self) -> Result<()> {
        if self.flows.is_empty() {
            return self.all_stopped();
        }
        self.give_all(|_| Some(Job::Stop));
        self.until_stopped()
    }

    /// A device is in STOP_COPY. The last one waits for no other thread to send its end.
    pub(super) fn device_stopped(&self) -> Result<()> {
        if self.jobs.device_stopped() { self.all_stopped() } else { Ok(()) }
    }

    /// Waits until all devices have been asked how much they have to give.
    pub(crate) fn wait_all_looked(&self) -> Result<()> {
        let looked =
            |flow: &Shared<DeviceFlow>| self.team.wait(flow, flow.lock(), None, |flow| flow.looked).map(drop);
        self.flows.iter().try_for_each(looked)
    }

    /// Gives all devices a job of the rollback or of the end, and waits until they have done it: also after a failure or a
    /// cancel, and for as long as the devices' own calls take.
    pub(crate) fn all_to_the_end(&self, job: Job) {
        self.give_all(|_| Some(job));
        self.jobs.wait_to_the_end();
    }

    /// Sends a frame over a link, or queues it there if it is small and the link is busy.
    pub(crate) fn post(&self, link: usize, frame: &Frame<'_>) -> Result<()> {
        self.writers[link].post(frame, Some(self.team.ended()))
    }

    /// Sends a frame of memory over a link.
    pub(crate) fn send_memory(&self, link: usize, frame: &Frame<'_>) -> Result<()> {
        self.share_memory(frame.payload.len(), || self.post(link, frame))
    }

    /// The same for pages that are sent from where they lie ([`FrameWriter::send_memory`]).
    pub(crate) fn send_pinned(
        &self,
        link: usize,
        frame: &Frame<'_>,
        address: u64,
        parts: &[SendPart<'_>],
    ) -> Result<()> {
        let (writer, cancel) = (self.writers[link], Some(self.team.ended()));
        let bytes = parts.iter().map(SendPart::len).sum();
        self.share_memory(bytes, || writer.send_memory(frame, address, parts, cancel))
    }

    /// Calls a function that sends memory. Meanwhile devices may send the same number of bytes.
    fn share_memory(&self, bytes: usize, send: impl FnOnce() -> Result<()>) -> Result<()> {
        self.share.lock().begin_memory();
        let sent = send();
        if self.share.lock().end_memory(bytes, now()) {
            self.share.notify_all();
        }
        sent
    }

    /// A round of memory has ended.
    pub(crate) fn end_round(&self) {
        self.share.lock().end_round();
        self.share.notify_all();
    }

    /// Asks on every link whether everything that was sent over it is handled, and waits for the answers. Returns how long
    /// they took.
    pub(crate) fn flush(&self) -> Result<Duration> {
        let began = now();
        if !self.has_peer() {
            return self.team.check().map(|()| Duration::ZERO);
        }
        let number = self.flushes.lock().begin(self.writers.len());
        for link in 0..self.writers.len() {
            self.post(link, &Frame::of(link as u32, Kind::FLUSH, &[]).at(number))?;
        }
        let flushes = &*self.flushes;
        let (_, done) = self.team.wait(flushes, flushes.lock(), self.until_loaded(), Flushes::is_done)?;
        match done {
            true => Ok(now() - began),
            false => Err(self.timed_out("waiting for it to handle what was sent")),
        }
    }

    /// A device has news.
    pub(crate) fn device_has_news(&self) {
        *self.news.lock() += 1;
        self.news.notify_all();
    }

    /// Waits until a device has had news since the last call, but no longer than this time.
    pub(crate) fn wait_for_news(&self, seen: &mut u64, time: Duration) -> Result<()> {
        let until = now().checked_add(time);
        let (news, _) = self.team.wait(&self.news, self.news.lock(), until, |news| *news != *seen)?;
        *seen = *news;
        Ok(())
    }

    /// Waits for this time, or until the work ends.
    pub(crate) fn pause(&self, time: Duration) -> Result<()> {
        let until = now().checked_add(time);
        self.team.wait(&self.state, self.state.lock(), until, |_| time.is_zero()).map(drop)
    }

    /// Ends the devices' streaming: they give no more data before the stop.
    pub(crate) fn end_streams(&self) {
        for flow in &self.flows {
            flow.lock().streaming = false;
            flow.notify_all();
        }
    }

    /// The device or memory with the most bytes left, where memory has this number.
    pub(crate) fn most_left(&self, memory: u64) -> Option<Remaining> {
        let left: Vec<_> = self.flows.iter().map(|flow| flow.lock().remaining()).collect();
        Remaining::most(memory, self.context.names.iter().map(String::as_str).zip(left))
    }

    /// The current facts about the devices.
    pub(crate) fn look(&self, names: &[String]) -> Vec<DeviceLook> {
        let look = |(flow, name): (&Shared<DeviceFlow>, &String)| {
            let flow = flow.lock();
            DeviceLook {
                name: name.clone(),
                streams: flow.streaming,
                sent: flow.window.sent(),
                on_the_way: flow.window.on_the_way(),
                initial: flow.initial,
                initial_loaded: flow.initial_is_loaded(),
                left: flow.left,
                drained: flow.drained,
                stop_bytes: flow.stop_bytes,
            }
        };
        self.flows.iter().zip(names).map(look).collect()
    }

    /// All devices are stopped. From now on a device that has given everything may send DEVICE_END.
    fn all_stopped(&self) -> Result<()> {
        self.post(0, &Frame::new(Kind::STOPPED, &[]))?;
        self.state.lock().stopped = true;
        self.state.notify_all();
        Ok(())
    }

    /// Whether all devices are stopped.
    pub(crate) fn are_stopped(&self) -> bool {
        self.state.lock().stopped
    }

    /// Waits until all devices are stopped.
    pub(crate) fn until_stopped(&self) -> Result<()> {
        self.team.wait(&self.state, self.state.lock(), None, |state| state.stopped).map(drop)
    }

    /// Everything is sent: sends LINK_END and SUM, and waits until the destination has loaded everything.
    pub(crate) fn finish(&self, sum: &[u8]) -> Result<()> {
        for link in 1..self.writers.len() {
            self.post(link, &Frame::new(Kind::LINK_END, &[]))?;
        }
        self.state.lock().summed = true;
        self.post(0, &Frame::new(Kind::SUM, &self.proofs.prove(Kind::SUM, sum)))?;
        if !self.has_peer() {
            return Ok(());
        }
        // The limit for a guest that stands still applies as well.
        let state = &*self.state;
        match self.team.wait(state, state.lock(), self.until_loaded(), |state| state.ready)?.1 {
            true => Ok(()),
            false => Err(self.timed_out("waiting for it to load")),
        }
    }

    fn until_loaded(&self) -> Option<Instant> {
        now().checked_add(self.limits.load_max)
    }

    fn timed_out(&self, doing: &'static str) -> Error {
        Error::TimedOut { peer: self.writers[0].peer().into(), doing, limit: self.limits.load_max }
    }
}
