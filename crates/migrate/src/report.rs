//! The timeline of a move: phases, devices, rounds, bytes, downtime; for programs (serde) and people
//! ([`Report`]'s `Display`).

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::stream::{MigrationId, Totals};
use crate::{Observer, Round};

/// A part of a move, on either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Facts are compared; the destination enters RESUMING.
    Handshake,
    /// The source runs, and what it has is moved meanwhile.
    PreCopy,
    /// The source's vCPUs and devices stop.
    Stop,
    /// The rest is moved.
    StopCopy,
    /// The destination's devices finish and validate what they loaded.
    Load,
    /// From READY over COMMIT to RUNNING.
    Commit,
    /// The destination's devices begin to run.
    Start,
    /// The source's devices end their sessions.
    Finish,
    /// Back to where it was.
    Undo,
}

impl Phase {
    /// The name, for people.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Handshake => "handshake",
            Phase::PreCopy => "pre-copy",
            Phase::Stop => "stop",
            Phase::StopCopy => "stop-copy",
            Phase::Load => "load",
            Phase::Commit => "commit",
            Phase::Start => "start",
            Phase::Finish => "finish",
            Phase::Undo => "undo",
        }
    }
}

/// One phase of the timeline.
#[derive(Clone, Debug, Serialize)]
pub struct PhaseReport {
    /// Which.
    pub phase: Phase,
    /// When it began, in ns from the move's start.
    pub start_ns: u64,
    /// How long it took, in ns.
    pub duration_ns: u64,
    /// What was moved in it.
    #[serde(flatten)]
    pub bytes: Totals,
}

/// One round of pre-copy.
#[derive(Clone, Debug, Serialize)]
pub struct RoundReport {
    /// Its number, from 1.
    pub round: u32,
    /// When it ended, in ns from the move's start.
    pub end_ns: u64,
    /// What was moved in it.
    #[serde(flatten)]
    pub bytes: Totals,
    /// Bytes of memory that were dirty at its end.
    pub dirty_bytes: u64,
    /// On the source: bytes that the destination handled in a second.
    pub bytes_per_second: u64,
    /// On the source: how long nothing would have run, had the stop come here, in ns.
    pub predicted_downtime_ns: u64,
}

/// One device.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// Bytes of its data stream.
    pub bytes: u64,
    /// How many of them before the stop.
    pub precopy_bytes: u64,
}

/// What happened in a move, as one side saw it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The move.
    pub id: String,
    /// The phases, in order.
    pub phases: Vec<PhaseReport>,
    /// The rounds of pre-copy, in order.
    pub rounds: Vec<RoundReport>,
    /// The devices.
    pub devices: Vec<DeviceReport>,
    /// What was moved in all.
    #[serde(flatten)]
    pub bytes: Totals,
    /// How long nothing ran, in ns: on the source from the beginning of the stop to the word that the
    /// destination runs, or until the source runs again. `None` when nothing was stopped.
    pub downtime_ns: Option<u64>,
    /// On the source: what the downtime was predicted to be when it was decided to stop, in ns. `None` without
    /// pre-copy, of which it is learned how fast things go.
    pub predicted_downtime_ns: Option<u64>,
    /// All of it, in ns.
    pub total_ns: u64,
    /// Whether the other side was told how the move ended, as far as this one knows. A destination that
    /// could not tell will be asked by its source ([`crate::Source::resolve`]).
    pub peer_told: bool,
    /// What a person should know: a device that could not be tracked, one that had to be reset.
    pub notes: Vec<String>,
}

/// Takes the time.
pub(crate) struct Recorder<'a> {
    observer: &'a dyn Observer,
    began: Instant,
    phase: Option<(Phase, Instant, Totals)>,
    round: Totals,
    stopped: Option<Instant>,
    report: Report,
}

impl<'a> Recorder<'a> {
    pub(crate) fn new(observer: &'a dyn Observer, names: impl Iterator<Item = String>) -> Recorder<'a> {
        let report = Report {
            id: String::new(),
            phases: Vec::new(),
            rounds: Vec::new(),
            devices: names.map(|name| DeviceReport { name, ..Default::default() }).collect(),
            bytes: Totals::default(),
            downtime_ns: None,
            predicted_downtime_ns: None,
            total_ns: 0,
            peer_told: true,
            notes: Vec::new(),
        };
        let began = Instant::now();
        Recorder { observer, began, phase: None, round: Totals::default(), stopped: None, report }
    }

    pub(crate) fn id(&mut self, id: MigrationId) {
        self.report.id = id.to_string();
    }

    pub(crate) fn phase(&mut self, phase: Phase) {
        self.end_phase();
        if phase == Phase::Stop {
            self.stop();
        }
        self.phase = Some((phase, Instant::now(), self.report.bytes));
        self.observer.phase(phase);
        tracing::debug!(phase = phase.name(), "phase");
    }

    /// Nothing runs from now on.
    pub(crate) fn stop(&mut self) {
        self.stopped = Some(Instant::now());
    }

    /// Something runs again.
    pub(crate) fn runs(&mut self) {
        if let Some(stopped) = self.stopped.take() {
            self.report.downtime_ns = Some(ns(stopped, Instant::now()));
        }
    }

    pub(crate) fn device_data(&mut self, device: usize, bytes: u64) {
        self.report.devices[device].bytes += bytes;
        if self.stopped.is_none() {
            self.report.devices[device].precopy_bytes += bytes;
        }
        self.report.bytes.device_bytes += bytes;
        self.observer.moved(self.report.bytes);
    }

    pub(crate) fn memory_data(&mut self, bytes: u64) {
        self.report.bytes.memory_bytes += bytes;
        self.observer.moved(self.report.bytes);
    }

    pub(crate) fn memory_zero(&mut self, bytes: u64) {
        self.report.bytes.zero_bytes += bytes;
        self.observer.moved(self.report.bytes);
    }

    pub(crate) fn round(&mut self, round: &Round) {
        let bytes = since(self.report.bytes, self.round);
        self.round = self.report.bytes;
        let end_ns = ns(self.began, Instant::now());
        self.report.rounds.push(RoundReport {
            round: round.round,
            end_ns,
            bytes,
            dirty_bytes: round.memory_dirty_bytes,
            bytes_per_second: round.bytes_per_second,
            predicted_downtime_ns: nanoseconds(round.predicted_downtime),
        });
        self.observer.round(round);
    }

    /// Notes a downtime beyond what was allowed.
    pub(crate) fn compare(&mut self, allowed: Duration) {
        if let Some(downtime_ns) = self.report.downtime_ns.filter(|ns| *ns > nanoseconds(allowed)) {
            let (downtime, allowed) = (Time(downtime_ns), Time(nanoseconds(allowed)));
            self.note(format!("nothing ran for {downtime}, allowed were {allowed}"));
        }
    }

    /// It is decided to stop.
    pub(crate) fn predicted(&mut self, downtime: Duration) {
        self.report.predicted_downtime_ns = Some(nanoseconds(downtime));
    }

    pub(crate) fn note(&mut self, note: String) {
        tracing::warn!("{note}");
        self.report.notes.push(note);
    }

    pub(crate) fn peer_not_told(&mut self) {
        self.report.peer_told = false;
    }

    pub(crate) fn totals(&self) -> Totals {
        self.report.bytes
    }

    pub(crate) fn finish(mut self) -> Report {
        self.end_phase();
        self.report.total_ns = ns(self.began, Instant::now());
        self.report
    }

    fn end_phase(&mut self) {
        if let Some((phase, start, before)) = self.phase.take() {
            let (start_ns, duration_ns) = (ns(self.began, start), ns(start, Instant::now()));
            let bytes = since(self.report.bytes, before);
            self.report.phases.push(PhaseReport { phase, start_ns, duration_ns, bytes });
        }
    }
}

fn ns(from: Instant, to: Instant) -> u64 {
    nanoseconds(to.saturating_duration_since(from))
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn since(now: Totals, before: Totals) -> Totals {
    Totals {
        device_bytes: now.device_bytes - before.device_bytes,
        memory_bytes: now.memory_bytes - before.memory_bytes,
        zero_bytes: now.zero_bytes - before.zero_bytes,
    }
}

/// Columns of the bars.
const BAR_COLUMNS: u64 = 32;

impl fmt::Display for Report {
    /// A table with a bar for each phase, about 80 columns wide.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<10} {:>9} {:>9} {:>9} {:>9}", "phase", "at", "took", "devices", "memory")?;
        let total = self.total_ns.max(1);
        let column = |ns: u64| (u128::from(ns) * u128::from(BAR_COLUMNS) / u128::from(total)) as usize;
        for phase in &self.phases {
            let from = column(phase.start_ns).min(BAR_COLUMNS as usize - 1);
            let to = column(phase.start_ns + phase.duration_ns).clamp(from + 1, BAR_COLUMNS as usize);
            writeln!(
                f,
                "{:<10} {:>9} {:>9} {:>9} {:>9}  {}{}",
                phase.phase.name(),
                Time(phase.start_ns).to_string(),
                Time(phase.duration_ns).to_string(),
                Bytes(phase.bytes.device_bytes).to_string(),
                Bytes(phase.bytes.memory_bytes).to_string(),
                " ".repeat(from),
                "█".repeat(to - from),
            )?;
        }
        for device in &self.devices {
            let before = Bytes(device.precopy_bytes);
            writeln!(f, "{}: {}, {before} of it before the stop", device.name, Bytes(device.bytes))?;
        }
        write!(f, "total {}", Time(self.total_ns))?;
        if let Some(downtime) = self.downtime_ns {
            write!(f, ", downtime {}", Time(downtime))?;
            if let Some(predicted) = self.predicted_downtime_ns {
                write!(f, " (predicted {})", Time(predicted))?;
            }
        }
        let bytes = &self.bytes;
        write!(f, ", devices {}, memory {}", Bytes(bytes.device_bytes), Bytes(bytes.memory_bytes))?;
        if bytes.zero_bytes > 0 {
            write!(f, " and {} of zeroes", Bytes(bytes.zero_bytes))?;
        }
        if !self.rounds.is_empty() {
            write!(f, ", rounds {}", self.rounds.len())?;
        }
        writeln!(f)?;
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

/// A time in ns, printed with three digits or so.
struct Time(u64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0 as f64;
        match self.0 {
            0..10_000 => write!(f, "{:.1} us", value / 1e3),
            10_000..1_000_000 => write!(f, "{:.0} us", value / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} ms", value / 1e6),
            _ => write!(f, "{:.2} s", value / 1e9),
        }
    }
}

/// A number of bytes, printed with three digits or so.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0 as f64;
        match self.0 {
            0..1024 => write!(f, "{} B", self.0),
            1024..1_048_576 => write!(f, "{:.1} KiB", value / 1024.0),
            1_048_576..1_073_741_824 => write!(f, "{:.1} MiB", value / 1_048_576.0),
            _ => write!(f, "{:.2} GiB", value / 1_073_741_824.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timeline_prints() {
        let bytes =
            |device_bytes, memory_bytes, zero_bytes| Totals { device_bytes, memory_bytes, zero_bytes };
        let phase = |phase, start_ns, duration_ns, bytes| PhaseReport { phase, start_ns, duration_ns, bytes };
        let report = Report {
            id: "00".into(),
            phases: vec![
                phase(Phase::Handshake, 0, 400_000, bytes(0, 0, 0)),
                phase(Phase::PreCopy, 400_000, 12_000_000, bytes(1 << 20, 1 << 26, 0)),
                phase(Phase::StopCopy, 12_400_000, 3_600_000, bytes(5000, 4096, 0)),
            ],
            rounds: vec![],
            devices: vec![DeviceReport { name: "uart0".into(), bytes: 1 << 20, precopy_bytes: 999 }],
            bytes: bytes(1 << 20, 1 << 26, 1 << 30),
            downtime_ns: Some(3_600_000),
            predicted_downtime_ns: None,
            total_ns: 16_000_000,
            peer_told: true,
            notes: vec!["all is well".into()],
        };
        let text = report.to_string();
        let expected = "\
phase             at      took   devices    memory
handshake     0.0 us    400 us       0 B       0 B  █
pre-copy      400 us   12.0 ms   1.0 MiB  64.0 MiB  ████████████████████████
stop-copy    12.4 ms    3.6 ms   4.9 KiB   4.0 KiB                          ████████
uart0: 1.0 MiB, 999 B of it before the stop
total 16.0 ms, downtime 3.6 ms, devices 1.0 MiB, memory 64.0 MiB and 1.00 GiB of zeroes
note: all is well
";
        assert_eq!(text, expected);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["phases"][1]["phase"], "pre_copy");
        assert_eq!(json["phases"][1]["memory_bytes"], 1 << 26);
        assert_eq!(json["device_bytes"], 1 << 20);
        assert_eq!(json["downtime_ns"], 3_600_000);
    }
}
