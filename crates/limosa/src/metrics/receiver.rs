//! The metrics of `limosa receive`: the moves so far, and the one under way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_migrate::{Estimate, Observer, Phase, Received, Report, Round};
use limosa_stream::Totals;

use super::{Exposition, Family, In, Kind, Listener, Sample, Source, Value, number, sample, since_1970, yes};

const fn family(name: &'static str, kind: Kind, unit: In, help: &'static str) -> Family {
    Family { name, kind, unit, help, labels: &[] }
}

const MOVES: Family = Family {
    labels: &["outcome"],
    ..family("receiver_moves", Kind::Counter, In::Number, "Finished moves, by their outcome here")
};
const QUESTIONS: Family = family(
    "receiver_questions",
    Kind::Counter,
    In::Number,
    "Answers to sources in doubt about an earlier move, given between moves",
);
const MOVED_BYTES: Family = Family {
    labels: &["kind"],
    ..family(
        "receiver_received",
        Kind::Counter,
        In::Bytes,
        "Bytes received by all moves, including the current one",
    )
};
const DOWNTIME: Family = family(
    "receiver_downtime",
    Kind::Histogram,
    In::Seconds,
    "Downtime of successful moves, as this side saw it",
);
const ACTIVE: Family = family("receiver_move_active", Kind::Gauge, In::Number, "1 during a move");
const STARTED: Family = family(
    "receiver_move_start_time",
    Kind::Gauge,
    In::Seconds,
    "Start time of the current move, since 1970; 0 if there is none",
);
const PHASE: Family = Family {
    labels: &["phase"],
    ..family(
        "receiver_move_phase",
        Kind::Gauge,
        In::Number,
        "1 for the phase of the current move, 0 for the others",
    )
};
const MOVE_BYTES: Family = Family {
    labels: &["kind"],
    ..family("receiver_move_received", Kind::Gauge, In::Bytes, "Bytes received by the current move")
};
const ROUND: Family =
    family("receiver_move_round", Kind::Gauge, In::Number, "Pre-copy rounds of the current move");
const DIRTY: Family = family(
    "receiver_move_dirty",
    Kind::Gauge,
    In::Bytes,
    "Memory left dirty after the last round of the current move",
);

pub(super) const FAMILIES: &[&Family] =
    &[&MOVES, &QUESTIONS, &MOVED_BYTES, &DOWNTIME, &ACTIVE, &STARTED, &PHASE, &MOVE_BYTES, &ROUND, &DIRTY];

/// How a move may end here.
const OUTCOMES: [&str; 5] = ["runs", "stopped", "discarded", "broken", "refused"];
const PHASES: [Phase; 9] = [
    Phase::Handshake,
    Phase::PreCopy,
    Phase::Stop,
    Phase::StopCopy,
    Phase::Load,
    Phase::Commit,
    Phase::Start,
    Phase::Finish,
    Phase::Undo,
];
/// The buckets of downtimes, in seconds.
const BUCKETS: [f64; 9] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, f64::INFINITY];

/// Counts of a receiver's moves.
#[derive(Clone, Debug, Default)]
pub struct Receiver(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    moves: [u64; OUTCOMES.len()],
    questions: u64,
    /// Of moves that are over.
    bytes: Totals,
    downtimes: [u64; BUCKETS.len()],
    downtime_s: f64,
    under_way: Option<UnderWay>,
}

#[derive(Debug, Default)]
struct UnderWay {
    began: f64,
    phase: Option<Phase>,
    bytes: Totals,
    round: u64,
    dirty_bytes: u64,
}

impl Receiver {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers scrapes here.
    pub fn answer_at(&self, listener: Listener) -> anyhow::Result<Exposition> {
        listener.answer("receive", self.clone())
    }

    /// A source in doubt was answered.
    pub fn answered(&self) {
        self.lock().questions += 1;
    }

    /// A sender was refused.
    pub fn refused(&self) {
        self.lock().moves[4] += 1;
    }

    /// Watches a move, and forwards its events.
    pub fn watch<'a>(&'a self, on: &'a dyn Observer) -> Watched<'a> {
        self.lock().under_way = Some(UnderWay { began: since_1970(), ..UnderWay::default() });
        Watched { receiver: self, on }
    }
}

/// Watches the current move, which has ended when this is dropped.
pub struct Watched<'a> {
    receiver: &'a Receiver,
    on: &'a dyn Observer,
}

impl Watched<'_> {
    /// Counts how the move ended.
    pub fn ended(self, received: &Received) {
        let (outcome, report) = match received {
            Received::Runs(report) => (0, Some(report)),
            Received::Stopped(report) => (1, Some(report)),
            Received::Discarded { .. } => (2, None),
            Received::Broken { .. } => (3, None),
            Received::Answered { .. } => return,
        };
        let mut inner = self.receiver.lock();
        inner.moves[outcome] += 1;
        if let Some(Report { downtime_ns: Some(ns), .. }) = report {
            let seconds = *ns as f64 / 1e9;
            inner.downtime_s += seconds;
            let bucket = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len() - 1);
            inner.downtimes[bucket] += 1;
        }
    }

    fn see(&self, see: impl FnOnce(&mut UnderWay)) {
        if let Some(under_way) = &mut self.receiver.lock().under_way {
            see(under_way);
        }
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        let mut inner = self.receiver.lock();
        if let Some(under_way) = inner.under_way.take() {
            inner.bytes = sum(inner.bytes, under_way.bytes);
        }
    }
}

impl Observer for Watched<'_> {
    fn phase(&self, phase: Phase) {
        self.see(|move_| move_.phase = Some(phase));
        self.on.phase(phase);
    }

    fn moved(&self, totals: Totals) {
        self.see(|move_| {
            // A later call may report slightly less.
            let bytes = &mut move_.bytes;
            bytes.device_bytes = bytes.device_bytes.max(totals.device_bytes);
            bytes.memory_bytes = bytes.memory_bytes.max(totals.memory_bytes);
            bytes.zero_bytes = bytes.zero_bytes.max(totals.zero_bytes);
        });
        self.on.moved(totals);
    }

    fn round(&self, round: &Round) {
        self.see(|move_| {
            move_.round = u64::from(round.round);
            move_.dirty_bytes = round.memory_dirty_bytes;
        });
        self.on.round(round);
    }

    fn estimate(&self, estimate: &Estimate) {
        self.on.estimate(estimate);
    }
}

fn sum(a: Totals, b: Totals) -> Totals {
    Totals {
        device_bytes: a.device_bytes.saturating_add(b.device_bytes),
        memory_bytes: a.memory_bytes.saturating_add(b.memory_bytes),
        zero_bytes: a.zero_bytes.saturating_add(b.zero_bytes),
    }
}

fn kinds(bytes: Totals) -> [(&'static str, u64); 3] {
    [("device", bytes.device_bytes), ("memory", bytes.memory_bytes), ("zero", bytes.zero_bytes)]
}

impl Source for Receiver {
    fn families(&self) -> &'static [&'static Family] {
        FAMILIES
    }

    fn samples(&self, family: &'static Family) -> Vec<Sample> {
        let inner = self.lock();
        let nothing = UnderWay::default();
        let under_way = inner.under_way.as_ref();
        let is_active = under_way.is_some();
        let under_way = under_way.unwrap_or(&nothing);
        match family.name {
            "receiver_moves" => {
                let moves = OUTCOMES.iter().zip(inner.moves);
                moves.map(|(outcome, count)| sample([outcome], Value::Count(count))).collect()
            }
            "receiver_questions" => vec![sample([], Value::Count(inner.questions))],
            "receiver_received" => {
                let of = |(kind, bytes): (&str, u64)| sample([kind], Value::Count(bytes));
                kinds(sum(inner.bytes, under_way.bytes)).map(of).into()
            }
            "receiver_downtime" => {
                let buckets = BUCKETS.into_iter().zip(inner.downtimes).collect();
                let count = inner.downtimes.iter().sum();
                vec![sample([], Value::Histogram(inner.downtime_s, count, buckets))]
            }
            "receiver_move_active" => vec![sample([], yes(is_active))],
            "receiver_move_start_time" => vec![sample([], number(under_way.began))],
            "receiver_move_phase" => {
                let of = |phase: Phase| sample([phase.name()], yes(under_way.phase == Some(phase)));
                PHASES.map(of).into()
            }
            "receiver_move_received" => {
                let of = |(kind, bytes): (&str, u64)| sample([kind], number(bytes as f64));
                kinds(under_way.bytes).map(of).into()
            }
            "receiver_move_round" => vec![sample([], number(under_way.round as f64))],
            "receiver_move_dirty" => vec![sample([], number(under_way.dirty_bytes as f64))],
            _ => Vec::new(),
        }
    }
}
