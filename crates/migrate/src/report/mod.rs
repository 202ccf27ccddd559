//! The timeline of a move: phases, rounds, devices, links, bytes, downtime; for programs (serde), for people
//! ([`Report`]'s `Display`), and as a picture ([`Report::html`]).

mod estimate;
mod html;
mod observer;
mod record;
mod spans;
mod text;
mod throughput;

use limosa_protocol::State;
use serde::{Serialize, Serializer};

pub use estimate::Estimate;
pub use observer::Observer;
pub(crate) use record::{LinkMeter, Recorder};

use limosa_stream::Totals;

/// A side of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The one that devices leave.
    Source,
    /// The one that they come to.
    Destination,
}

impl Side {
    /// The name, for people.
    pub const fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

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
    /// From READY over COMMIT to RUNNING. Of a snapshot: it is published, or loaded for good.
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

/// How a move ended, for one side: as [`Outcome`](crate::Outcome) or [`Received`](crate::Received) says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum End {
    /// On the source: the destination runs; or the snapshot is there.
    #[serde(rename = "moved")]
    Moved,
    /// On the source: it is as it was before.
    #[serde(rename = "undone")]
    Undone,
    /// On the source: it stands still until it is known whether the destination runs.
    #[serde(rename = "in doubt")]
    InDoubt,
    /// On the destination: the devices run here.
    #[serde(rename = "runs")]
    Runs,
    /// On the destination: a snapshot was loaded, and the devices are in STOP.
    #[serde(rename = "stopped")]
    Stopped,
    /// On the destination: what was loaded is gone again.
    #[serde(rename = "discarded")]
    Discarded,
    /// On the destination: devices could neither be started nor stopped.
    #[serde(rename = "broken")]
    Broken,
}

impl End {
    /// The name, for people and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            End::Moved => "moved",
            End::Undone => "undone",
            End::InDoubt => "in doubt",
            End::Runs => "runs",
            End::Stopped => "stopped",
            End::Discarded => "discarded",
            End::Broken => "broken",
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
    /// On the source: how often the VMM had been asked to slow its vCPUs down, 0 for not at all.
    pub throttle_step: u32,
}

/// What a device, or the engine with it, was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Act {
    /// The device is driven to a state, over the arcs of the shortest path.
    Enter {
        /// Where to; in JSON by the standard's name (`vfio.h: enum vfio_device_mig_state`).
        #[serde(serialize_with = "state_name")]
        state: State,
    },
    /// The source reads what the device has to say before the stop.
    PrecopyData,
    /// The source reads what is left when the device is stopped.
    FinalData,
    /// The destination writes to the device what came from the source.
    Load,
    /// The device is reset.
    Reset,
}

impl Act {
    /// The name, for people.
    pub const fn name(self) -> &'static str {
        match self {
            Act::Enter { state } => state.name(),
            Act::PrecopyData => "pre-copy data",
            Act::FinalData => "final data",
            Act::Load => "loading",
            Act::Reset => "reset",
        }
    }
}

fn state_name<S: Serializer>(state: &State, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}

/// A time in which a device did one thing. Data that comes without long pauses is one span; of a very long move
/// neighbouring spans of data become one, so that their number is bounded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SpanReport {
    /// What it did.
    #[serde(flatten)]
    pub act: Act,
    /// When it began, in ns from the move's start.
    pub start_ns: u64,
    /// How long it took, in ns.
    pub duration_ns: u64,
    /// How much of that the device was busy, in ns: the rest is pauses between its pieces of data.
    pub busy_ns: u64,
    /// Bytes of the device's data stream.
    pub bytes: u64,
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
    /// The most bytes of its data that were under way at once: on the source, sent and not known to be loaded; on the
    /// destination, come and not loaded. Never more than its window there, or than one frame where it is of a snapshot; 0 on
    /// a source that saves, whom nobody answers.
    pub waiting_bytes_max: u64,
    /// What it did when, by time.
    pub spans: Vec<SpanReport>,
}

/// Bytes over a link by time, in equal steps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Throughput {
    /// How long a step is, in ns. The first one begins at the move's start.
    pub step_ns: u64,
    /// Bytes that went over the link in each step, both ways.
    pub bytes: Vec<u64>,
}

/// One link.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LinkReport {
    /// The other end, as the link names it.
    pub peer: String,
    /// Bytes that this side wrote, with all headers.
    pub sent_bytes: u64,
    /// Bytes that this side read, with all headers.
    pub received_bytes: u64,
    /// When it carried its first byte, in ns from the move's start.
    pub start_ns: u64,
    /// From its first byte to its last, in ns.
    pub duration_ns: u64,
    /// How long this side was within reads and writes, in ns: on the source mostly waiting for a link that was full,
    /// on the destination for what comes next.
    pub waited_ns: u64,
    /// How much it carried when.
    pub throughput: Throughput,
}

/// The limits that were in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LimitsReport {
    /// On the source: how long nothing was to run, in ns.
    pub downtime_goal_ns: Option<u64>,
    /// On the source: the most rounds of pre-copy.
    pub rounds_max: Option<u32>,
    /// How long the other side could be silent, in ns.
    pub silence_max_ns: u64,
    /// How long the destination could take to answer or to load, in ns.
    pub load_max_ns: u64,
    /// How long the destination was to hold for the commit, in ns.
    pub commit_max_ns: u64,
    /// On the source: how long the guest could stand still, in ns.
    pub standstill_max_ns: Option<u64>,
}

/// What happened in a move, as one side saw it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The move.
    pub id: String,
    /// Whose report it is.
    pub side: Side,
    /// How it ended.
    pub outcome: End,
    /// Why, unless it went well.
    pub why: Option<String>,
    /// The limits that were in force.
    pub limits: LimitsReport,
    /// The phases, in order.
    pub phases: Vec<PhaseReport>,
    /// The rounds of pre-copy, in order. Of very many some are left out, which shows in their numbers.
    pub rounds: Vec<RoundReport>,
    /// The devices.
    pub devices: Vec<DeviceReport>,
    /// The links.
    pub links: Vec<LinkReport>,
    /// What was moved in all.
    #[serde(flatten)]
    pub bytes: Totals,
    /// How long nothing ran, in ns: on the source from the beginning of the stop to the word that the
    /// destination runs, or until the source runs again. `None` when nothing was stopped.
    pub downtime_ns: Option<u64>,
    /// When nothing ran any more, in ns from the move's start. `None` when nothing was stopped.
    pub stopped_ns: Option<u64>,
    /// On the source: what the downtime was predicted to be when it was decided to stop, in ns. `None` without
    /// pre-copy, of which it is learned how fast things go.
    pub predicted_downtime_ns: Option<u64>,
    /// The most bytes that this side's buffers took at once: what the move needed beside the guest, its bitmaps and what
    /// a compression keeps for itself.
    pub buffer_bytes_max: u64,
    /// All of it, in ns.
    pub total_ns: u64,
    /// Whether the other side was told how the move ended, as far as this one knows. A destination that
    /// could not tell will be asked by its source ([`crate::Source::resolve`]).
    pub peer_told: bool,
    /// Devices that are not what they were before a move that did not succeed.
    pub unrecovered: Vec<Unrecovered>,
    /// What a person should know: a device that could not be tracked, one that had to be reset.
    pub notes: Vec<String>,
}

/// A device that could not be brought back to what it was before the move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unrecovered {
    /// Its name.
    pub device: String,
    /// What became of it.
    #[serde(flatten)]
    pub loss: Loss,
    /// What it answered.
    pub why: String,
}

/// What became of a device that could not be brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "loss", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Loss {
    /// On the source: it was in ERROR and had to be reset. It runs, and the guest's state in it is lost.
    StateLost,
    /// It stays in another state than it should be in.
    StaysIn {
        /// Where it is.
        #[serde(serialize_with = "state_name")]
        found: State,
        /// Where it should be.
        #[serde(serialize_with = "state_name")]
        wanted: State,
    },
    /// On the destination: it could not be reset, and may still hold the source's state. It does not run.
    NotReset,
    /// It does not answer.
    Unknown,
}

impl std::fmt::Display for Unrecovered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Unrecovered { device, loss, why } = self;
        match loss {
            Loss::StateLost => {
                write!(f, "{device} was in ERROR and had to be reset: its state is lost ({why})")
            }
            Loss::StaysIn { found: State::Error, .. } => {
                write!(f, "{device} is in ERROR and cannot be reset: {why}")
            }
            Loss::StaysIn { found, wanted } => {
                write!(f, "{device} stays in {found}, it should be in {wanted}: {why}")
            }
            Loss::NotReset => {
                write!(f, "{device} could not be reset and may still hold the source's state: {why}")
            }
            Loss::Unknown => write!(f, "{device}: its state is not known: {why}"),
        }
    }
}

impl Report {
    /// Of a move in which nothing happened.
    pub(crate) fn nothing(side: Side, limits: LimitsReport) -> Report {
        Report {
            id: String::new(),
            side,
            outcome: match side {
                Side::Source => End::Undone,
                Side::Destination => End::Discarded,
            },
            why: None,
            limits,
            phases: Vec::new(),
            rounds: Vec::new(),
            devices: Vec::new(),
            links: Vec::new(),
            bytes: Totals::default(),
            downtime_ns: None,
            stopped_ns: None,
            predicted_downtime_ns: None,
            buffer_bytes_max: 0,
            total_ns: 0,
            peer_told: true,
            unrecovered: Vec::new(),
            notes: Vec::new(),
        }
    }
}
