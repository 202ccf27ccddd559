//! [`Recorder`]: records the timeline of a move, and calls the observer. All threads of one side share it.

mod log;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use limosa_clockwork::{Panic, catch};

use super::estimate::Estimate;
use super::link_meter::LinkMeter;
use super::text::Time;
use super::{Act, End, LinkReport, Phase, Report, RoundReport, Side, SpanReport, Unrecovered};
use crate::lock::lock;
use crate::{Error, Observer, Options, Result, Round};
use limosa_stream::buffer::Gauge;
use limosa_stream::{MigrationId, Totals};
use log::{DeviceLog, Log, limits, since};

/// How many bytes are moved between two calls of [`Observer::moved`].
const TELL_EVERY_BYTES: u64 = 1 << 20;
/// The maximum number of rounds that are kept. When there are more, every second one is dropped.
const ROUNDS_MAX: usize = 1000;

/// Records the timeline of one side, from any thread.
pub(crate) struct Recorder<'a> {
    observer: &'a dyn Observer,
    /// The observer's panic. It is not called any more after that.
    observer_panic: OnceLock<Panic>,
    began: Instant,
    device_bytes: AtomicU64,
    memory_bytes: AtomicU64,
    zero_bytes: AtomicU64,
    /// The observer is called when this many bytes have been moved.
    tell_at: AtomicU64,
    is_stopped: AtomicBool,
    side: Side,
    id: OnceLock<String>,
    downtime_goal: Duration,
    devices: Vec<DeviceLog>,
    buffers: Arc<Gauge>,
    log: Mutex<Log>,
}

impl<'a> Recorder<'a> {
    pub(crate) fn new(
        side: Side,
        options: &Options,
        observer: &'a dyn Observer,
        names: impl Iterator<Item = String>,
    ) -> Recorder<'a> {
        let devices = names.map(DeviceLog::new).collect();
        let log = Log {
            phase: None,
            round: Totals::default(),
            round_began: None,
            stopped: None,
            throttle_step: 0,
            links: Vec::new(),
            report: Report::nothing(side, limits(side, options)),
        };
        Recorder {
            observer,
            observer_panic: OnceLock::new(),
            began: limosa_clockwork::now(),
            device_bytes: AtomicU64::new(0),
            memory_bytes: AtomicU64::new(0),
            zero_bytes: AtomicU64::new(0),
            tell_at: AtomicU64::new(TELL_EVERY_BYTES),
            is_stopped: AtomicBool::new(false),
            side,
            id: OnceLock::new(),
            downtime_goal: options.convergence.downtime_goal,
            devices,
            buffers: Arc::default(),
            log: Mutex::new(log),
        }
    }

    pub(crate) fn id(&self, id: MigrationId) {
        self.log().report.id = id.to_string();
        // The id is set once.
        let _ = self.id.set(id.to_string());
    }

    /// A phase begins, which ends the one before.
    pub(crate) fn phase(&self, phase: Phase) {
        let totals = self.totals();
        let now = limosa_clockwork::now();
        let mut log = self.log();
        // A save is in its handshake from when its place is made.
        if log.phase.as_ref().is_some_and(|(under_way, ..)| *under_way == phase) {
            return;
        }
        log.end_phase(self.began, now, totals);
        log.phase = Some((phase, now, totals));
        if phase == Phase::Stop {
            self.stopped(&mut log, now);
        }
        drop(log);
        self.observe(|observer| {
            observer.moved(totals);
            observer.phase(phase);
        });
        let (move_id, side) = self.names();
        tracing::info!(target: "limosa::phase", move_id, side, phase = phase.name(), "phase");
    }

    /// Nothing runs from now on.
    pub(crate) fn stop(&self) {
        let now = limosa_clockwork::now();
        self.stopped(&mut self.log(), now);
    }

    fn stopped(&self, log: &mut Log, now: Instant) {
        log.stopped = Some(now);
        log.report.stopped_ns = Some(ns(self.began, now));
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// Something runs again.
    pub(crate) fn runs(&self) {
        let now = limosa_clockwork::now();
        let mut log = self.log();
        if let Some(stopped) = log.stopped.take() {
            log.report.downtime_ns = Some(ns(stopped, now));
        }
    }

    /// Bytes of a device's data stream were moved.
    pub(crate) fn device_data(&self, device: usize, bytes: u64) {
        let log = &self.devices[device];
        log.bytes.fetch_add(bytes, Ordering::Relaxed);
        if !self.is_stopped.load(Ordering::Relaxed) {
            log.precopy_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        self.device_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.tell();
    }

    /// This many bytes of a device's data are on their way now.
    pub(crate) fn device_waits(&self, device: usize, bytes: u64) {
        self.devices[device].waiting.set(bytes);
    }

    /// The gauge that counts this side's buffers.
    pub(crate) fn buffers(&self) -> &Arc<Gauge> {
        &self.buffers
    }

    pub(crate) fn memory_data(&self, bytes: u64) {
        self.memory_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.tell();
    }

    pub(crate) fn memory_zero(&self, bytes: u64) {
        self.zero_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.tell();
    }

    /// A device does this until the returned span is dropped.
    pub(crate) fn span(&self, device: usize, act: Act) -> Span<'_, 'a> {
        Span { recorder: self, device, act, began: limosa_clockwork::now() }
    }

    /// A device has done this since `began`.
    pub(crate) fn device_span(&self, device: usize, act: Act, began: Instant, bytes: u64) {
        let duration_ns = ns(began, limosa_clockwork::now());
        let start_ns = ns(self.began, began);
        let span = SpanReport { act, start_ns, duration_ns, busy_ns: duration_ns, bytes };
        let ((move_id, side), name) = (self.names(), self.devices[device].name.as_str());
        let took_us = duration_ns / 1000;
        // Arcs are few; pieces of data are many.
        match act {
            Act::Enter { .. } | Act::Reset => {
                tracing::debug!(target: "limosa::device", move_id, side, device = name, act = act.name(), took_us, "device");
            }
            _ => {
                tracing::trace!(target: "limosa::device", move_id, side, device = name, act = act.name(), bytes, took_us, "device");
            }
        }
        lock(&self.devices[device].spans).add(span);
    }

    /// Adds a link. Its meter counts what the link carries.
    pub(crate) fn link(&self, peer: &str) -> LinkMeter {
        let link = Arc::new(Mutex::new(LinkReport { peer: peer.into(), ..LinkReport::default() }));
        self.log().links.push(link.clone());
        LinkMeter::new(self.began, link)
    }

    /// A round of memory, or a look at the devices, is over.
    pub(crate) fn round(&self, round: &Round) {
        let (totals, now) = (self.totals(), limosa_clockwork::now());
        let mut log = self.log();
        let bytes = since(totals, log.round);
        let began = log.round_began.replace(now).or(log.phase.map(|phase| phase.1)).unwrap_or(self.began);
        log.round = totals;
        let report = RoundReport {
            round: round.round,
            end_ns: ns(self.began, now),
            bytes,
            dirty_bytes: round.memory_dirty_bytes,
            left_bytes: round.memory_dirty_bytes.saturating_add(round.device_bytes),
            bytes_per_second: round.bytes_per_second,
            predicted_downtime_ns: nanoseconds(round.predicted_downtime),
            throttle_step: log.throttle_step,
        };
        // A peer may send any number of rounds.
        if log.report.rounds.len() >= ROUNDS_MAX {
            let mut at = 0;
            log.report.rounds.retain(|_| {
                at += 1;
                at % 2 == 1
            });
        }
        log.report.rounds.push(report);
        drop(log);
        let (move_id, side) = self.names();
        let predicted_downtime_us = round.predicted_downtime.as_micros() as u64;
        tracing::info!(
            target: "limosa::round",
            move_id,
            side,
            round = round.round,
            bytes = bytes.memory_bytes + bytes.device_bytes,
            dirty_bytes = round.memory_dirty_bytes,
            bytes_per_second = round.bytes_per_second,
            predicted_downtime_us,
            "round"
        );
        self.observe(|observer| {
            observer.round(round);
            if self.side == Side::Source {
                let took = now.saturating_duration_since(began);
                observer.estimate(&Estimate::new(round, took, self.downtime_goal));
            }
        });
    }

    /// The VMM has slowed its vCPUs down.
    pub(crate) fn throttled(&self, step: u32) {
        self.log().throttle_step = step;
    }

    /// Adds a note if the downtime exceeds the goal.
    pub(crate) fn compare(&self, allowed: Duration) {
        let downtime_ns = self.log().report.downtime_ns;
        if let Some(downtime_ns) = downtime_ns.filter(|ns| *ns > nanoseconds(allowed)) {
            let (downtime, allowed) = (Time(downtime_ns), Time(nanoseconds(allowed)));
            self.note(format!("nothing ran for {downtime}, the goal was {allowed}"));
        }
    }

    /// The source has decided to stop, with this predicted downtime; `None` if a device does not say how much it would give.
    pub(crate) fn predicted(&self, downtime: Option<Duration>) {
        self.log().report.predicted_downtime_ns = downtime.map(nanoseconds);
    }

    pub(crate) fn note(&self, note: String) {
        let (move_id, side) = self.names();
        tracing::warn!(target: "limosa::note", move_id, side, "{note}");
        self.log().report.notes.push(note);
    }

    pub(crate) fn peer_not_told(&self) {
        self.log().report.peer_told = false;
    }

    /// The bytes that were moved so far.
    pub(crate) fn totals(&self) -> Totals {
        Totals {
            device_bytes: self.device_bytes.load(Ordering::Relaxed),
            memory_bytes: self.memory_bytes.load(Ordering::Relaxed),
            zero_bytes: self.zero_bytes.load(Ordering::Relaxed),
        }
    }

    /// The move has ended on this side: how, and why if it did not succeed.
    pub(crate) fn finish(self, end: End, why: Option<&Error>) -> Report {
        let (totals, now) = (self.totals(), limosa_clockwork::now());
        self.observe(|observer| observer.moved(totals));
        if let Some(panic) =
            self.observer_panic.get().filter(|_| !matches!(why, Some(Error::Panicked { .. })))
        {
            self.note(Error::panicked("Observer", panic).to_string());
        }
        let mut log = self.log.into_inner().unwrap_or_else(PoisonError::into_inner);
        log.end_phase(self.began, now, totals);
        let mut report = log.report;
        report.bytes = totals;
        report.total_ns = ns(self.began, now);
        report.outcome = end;
        report.why = why.map(Error::to_string);
        report.buffer_bytes_max = self.buffers.most();
        report.devices = self.devices.into_iter().map(DeviceLog::report).collect();
        report.links = log.links.iter().map(|link| lock(link).clone()).collect();
        tracing::info!(
            target: "limosa::end",
            move_id = self.id.get().map_or("", String::as_str),
            side = self.side.name(),
            device_bytes = totals.device_bytes,
            memory_bytes = totals.memory_bytes,
            total_us = report.total_ns / 1000,
            downtime_us = report.downtime_ns.map(|ns| ns / 1000),
            outcome = end.name(),
            why = report.why,
            "end"
        );
        report
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        lock(&self.log)
    }

    /// The move's id (empty until it is known) and the side, which every event has.
    fn names(&self) -> (&str, &'static str) {
        (self.id.get().map_or("", String::as_str), self.side.name())
    }

    /// Calls the observer, if enough was moved since the last call. Of several threads one does.
    fn tell(&self) {
        let totals = self.totals();
        let moved = totals.device_bytes + totals.memory_bytes + totals.zero_bytes;
        let due = self.tell_at.load(Ordering::Relaxed);
        let is_mine = || {
            let next = moved + TELL_EVERY_BYTES;
            self.tell_at.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        };
        if moved >= due && is_mine() {
            self.observe(|observer| observer.moved(totals));
        }
    }

    /// Calls the observer, unless it has panicked before. A panic does not unwind the thread that moves data.
    fn observe(&self, call: impl FnOnce(&dyn Observer)) {
        if self.observer_panic.get().is_none()
            && let Err(panic) = catch(|| call(self.observer))
        {
            let _ = self.observer_panic.set(panic);
        }
    }

    /// Fails if the observer has panicked ([`Error::Panicked`]). Before the commit that ends a move.
    pub(crate) fn check(&self) -> Result<()> {
        match self.observer_panic.get() {
            Some(panic) => Err(Error::panicked("Observer", panic)),
            None => Ok(()),
        }
    }

    /// A device that could not be brought back.
    pub(crate) fn unrecovered(&self, unrecovered: Unrecovered) {
        self.note(unrecovered.to_string());
        self.log().report.unrecovered.push(unrecovered);
    }
}

/// Something that a device is doing. It ends when this is dropped.
pub(crate) struct Span<'r, 'a> {
    recorder: &'r Recorder<'a>,
    device: usize,
    act: Act,
    began: Instant,
}

impl Drop for Span<'_, '_> {
    fn drop(&mut self) {
        self.recorder.device_span(self.device, self.act, self.began, 0);
    }
}

pub(super) fn ns(from: Instant, to: Instant) -> u64 {
    nanoseconds(to.saturating_duration_since(from))
}

pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
