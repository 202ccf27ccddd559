//! The parts of a timeline: phases, rounds of pre-copy, and the activities of devices.

use limosa_protocol::State;
use limosa_stream::Totals;
use serde::{Serialize, Serializer};

/// A phase of a move, on either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Phase {
    /// Both sides compare facts; the destination enters RESUMING.
    Handshake,
    /// The source runs while data is moved.
    PreCopy,
    /// The source's vCPUs and devices stop.
    Stop,
    /// The remaining data is moved.
    StopCopy,
    /// The destination's devices finish and validate what they loaded.
    Load,
    /// From READY over COMMIT to RUNNING. Of a snapshot: its publication, or the end of its load.
    Commit,
    /// The destination's devices enter RUNNING; those that stay in STOP are checked once more.
    Start,
    /// The source's devices end their sessions.
    Finish,
    /// This side returns to where it was before.
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
#[non_exhaustive]
pub struct PhaseReport {
    /// The phase.
    pub phase: Phase,
    /// When it began, in ns from the move's start.
    pub start_ns: u64,
    /// How long it took, in ns.
    pub duration_ns: u64,
    /// The bytes that were moved in it.
    #[serde(flatten)]
    pub bytes: Totals,
}

/// One round of memory, or one look at the devices.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct RoundReport {
    /// Its number, from 1.
    pub round: u32,
    /// When it ended, in ns from the move's start.
    pub end_ns: u64,
    /// The bytes that were moved in it.
    #[serde(flatten)]
    pub bytes: Totals,
    /// Dirty memory at its end, in bytes.
    pub dirty_bytes: u64,
    /// How many bytes were left at its end: that memory, and on the source the data that devices would give.
    pub left_bytes: u64,
    /// On the source: the rate at which the destination handled data, in bytes per second.
    pub bytes_per_second: u64,
    /// On the source: the predicted downtime of a stop at its end, in ns.
    pub predicted_downtime_ns: u64,
    /// On the source: the step by which the VMM had slowed its vCPUs down, 0 for none.
    pub throttle_step: u32,
}

/// An activity of a device, or of the engine with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Act {
    /// The device is driven to a state, over the arcs of the shortest path.
    Enter {
        /// The state; in JSON by the standard's name (`vfio.h: enum vfio_device_mig_state`).
        #[serde(serialize_with = "state_name")]
        state: State,
    },
    /// The source reads the device's data before the stop.
    PrecopyData,
    /// The source reads the device's remaining data in STOP_COPY.
    FinalData,
    /// The destination loads data into the device.
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

pub(super) fn state_name<S: Serializer>(state: &State, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(state.name())
}

/// A time in which a device did one thing. Pieces of data without long pauses between them are one span. In a very long move
/// neighbouring spans of data are joined, so that their number is bounded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SpanReport {
    /// The activity.
    #[serde(flatten)]
    pub act: Act,
    /// When it began, in ns from the move's start.
    pub start_ns: u64,
    /// How long it took, in ns.
    pub duration_ns: u64,
    /// How long the device was busy in it, in ns. The rest is pauses between pieces of data.
    pub busy_ns: u64,
    /// Bytes of the device's data stream.
    pub bytes: u64,
}
