//! The recorder's notes so far, of the move and of each device.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use limosa_stream::Totals;
use limosa_stream::buffer::Gauge;

use super::{nanoseconds, ns};
use crate::Options;
use crate::report::spans::Spans;
use crate::report::{DeviceReport, LimitsReport, LinkReport, Phase, PhaseReport, Report, Side};

/// The activities of one device.
pub(super) struct DeviceLog {
    pub(super) name: String,
    pub(super) bytes: AtomicU64,
    pub(super) precopy_bytes: AtomicU64,
    pub(super) waiting: Gauge,
    pub(super) spans: Mutex<Spans>,
}

/// The part of the timeline that changes rarely.
pub(super) struct Log {
    pub(super) phase: Option<(Phase, Instant, Totals)>,
    /// The totals at the end of the last round.
    pub(super) round: Totals,
    pub(super) round_began: Option<Instant>,
    pub(super) stopped: Option<Instant>,
    pub(super) throttle_step: u32,
    pub(super) links: Vec<Arc<Mutex<LinkReport>>>,
    pub(super) report: Report,
}

impl DeviceLog {
    pub(super) fn new(name: String) -> DeviceLog {
        DeviceLog {
            name,
            bytes: AtomicU64::new(0),
            precopy_bytes: AtomicU64::new(0),
            waiting: Gauge::default(),
            spans: Mutex::new(Spans::default()),
        }
    }

    pub(super) fn report(self) -> DeviceReport {
        DeviceReport {
            name: self.name,
            bytes: self.bytes.into_inner(),
            precopy_bytes: self.precopy_bytes.into_inner(),
            waiting_bytes_max: self.waiting.most(),
            spans: self.spans.into_inner().unwrap_or_else(PoisonError::into_inner).report(),
        }
    }
}

impl Log {
    pub(super) fn end_phase(&mut self, began: Instant, now: Instant, totals: Totals) {
        if let Some((phase, start, before)) = self.phase.take() {
            let (start_ns, duration_ns) = (ns(began, start), ns(start, now));
            let bytes = since(totals, before);
            self.report.phases.push(PhaseReport { phase, start_ns, duration_ns, bytes });
        }
    }
}

pub(super) fn limits(side: Side, options: &Options) -> LimitsReport {
    let is_source = side == Side::Source;
    LimitsReport {
        downtime_goal_ns: is_source.then(|| nanoseconds(options.convergence.downtime_goal)),
        rounds_max: is_source.then_some(options.convergence.rounds_max),
        silence_max_ns: nanoseconds(options.silence_max),
        load_max_ns: nanoseconds(options.load_max),
        commit_max_ns: nanoseconds(options.commit_max),
        standstill_max_ns: is_source.then(|| nanoseconds(options.standstill_max)),
        idle_max_ns: (!is_source).then(|| nanoseconds(options.idle_max)),
        move_max_ns: (!is_source).then(|| nanoseconds(options.move_max)),
    }
}

pub(super) fn since(now: Totals, before: Totals) -> Totals {
    Totals {
        device_bytes: now.device_bytes - before.device_bytes,
        memory_bytes: now.memory_bytes - before.memory_bytes,
        zero_bytes: now.zero_bytes - before.zero_bytes,
    }
}
