//! [`Report`]: the timeline of a move, with phases, rounds, devices, links, bytes and downtime. For programs (serde), for
//! people (`Display`), and as a picture ([`Report::html`]).

mod estimate;
pub mod html;
mod link_meter;
mod loss;
mod observer;
mod record;
mod spans;
mod text;
mod throughput;
mod timeline;

use limosa_stream::Totals;
use serde::Serialize;

pub use estimate::Estimate;
pub(crate) use link_meter::LinkMeter;
pub use loss::{Loss, Unrecovered};
pub use observer::Observer;
pub(crate) use record::Recorder;
pub use timeline::{Act, Phase, PhaseReport, RoundReport, SpanReport};

/// A side of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The side that devices leave.
    Source,
    /// The side to which devices come.
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

/// How a move ended, for one side: like [`Outcome`](crate::Outcome) or [`Received`](crate::Received).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum End {
    /// On the source: the destination has the guest.
    #[serde(rename = "moved")]
    Moved,
    /// On the source: the snapshot was published.
    #[serde(rename = "saved")]
    Saved,
    /// On the source: it is as it was before.
    #[serde(rename = "undone")]
    Undone,
    /// On the source: it stays stopped until it is known whether the destination runs.
    #[serde(rename = "in doubt")]
    InDoubt,
    /// On the destination: the devices run here.
    #[serde(rename = "runs")]
    Runs,
    /// On the destination: everything is here, and the devices stay in STOP.
    #[serde(rename = "stopped")]
    Stopped,
    /// On the destination: everything that was loaded was discarded.
    #[serde(rename = "discarded")]
    Discarded,
    /// On the destination: devices could neither be started nor be reset.
    #[serde(rename = "broken")]
    Broken,
}

impl End {
    /// The name, for people and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            End::Moved => "moved",
            End::Saved => "saved",
            End::Undone => "undone",
            End::InDoubt => "in doubt",
            End::Runs => "runs",
            End::Stopped => "stopped",
            End::Discarded => "discarded",
            End::Broken => "broken",
        }
    }
}

/// The operation that a report describes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// A move from one side to another.
    #[default]
    Move,
    /// A save to a snapshot.
    Save,
    /// A load of a snapshot.
    Load,
}

impl Work {
    /// The name, for people.
    pub const fn name(self) -> &'static str {
        match self {
            Work::Move => "move",
            Work::Save => "save",
            Work::Load => "load",
        }
    }
}

/// Where, when and by which program a report was made. The engine does not know it; its caller may.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Made {
    /// When, by RFC 3339.
    pub at: String,
    /// The name of this host.
    pub host: String,
    /// The program and its version.
    pub version: String,
    /// The command line.
    pub command: String,
}

/// One device.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// The length of its data stream in bytes.
    pub bytes: u64,
    /// How many of these bytes were moved before the stop.
    pub precopy_bytes: u64,
    /// The most bytes of its data that were on their way at once. On the source, bytes that were sent and not acknowledged;
    /// 0 in a save, which no peer acknowledges. On the destination, bytes that had arrived and were not loaded: at most its
    /// window, or one frame in a load.
    pub waiting_bytes_max: u64,
    /// The activities of the device, by time.
    pub spans: Vec<SpanReport>,
}

/// The bytes that a link carried over time, in equal steps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Throughput {
    /// The length of a step in ns. The first step begins at the move's start.
    pub step_ns: u64,
    /// The bytes that the link carried in each step, in both directions.
    pub bytes: Vec<u64>,
}

/// One link.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct LinkReport {
    /// The name of the other end.
    pub peer: String,
    /// The bytes that this side wrote, headers included.
    pub sent_bytes: u64,
    /// The bytes that this side read, headers included.
    pub received_bytes: u64,
    /// When it carried its first byte, in ns from the move's start.
    pub start_ns: u64,
    /// The time from its first byte to its last, in ns.
    pub duration_ns: u64,
    /// How long this side's reads and writes took, in ns. On the source this is mostly time in which the link was full, on the
    /// destination time in which nothing had arrived.
    pub waited_ns: u64,
    /// The bytes that it carried over time.
    pub throughput: Throughput,
}

/// The limits that were in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LimitsReport {
    /// On the source: the downtime goal, in ns.
    pub downtime_goal_ns: Option<u64>,
    /// On the source: the maximum number of rounds of memory.
    pub rounds_max: Option<u32>,
    /// How long the other side may be silent, in ns.
    pub silence_max_ns: u64,
    /// How long the destination may take to answer or to load, in ns.
    pub load_max_ns: u64,
    /// How long the destination holds for the commit, in ns.
    pub commit_max_ns: u64,
    /// On the source: how long the guest may stand still, in ns.
    pub standstill_max_ns: Option<u64>,
    /// On the destination: for how long the source may send nothing but keep-alives, in ns.
    pub idle_max_ns: Option<u64>,
    /// On the destination: how long the move may take from the offer until everything has arrived, in ns.
    pub move_max_ns: Option<u64>,
}

/// The timeline of a move, as one side saw it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The id of the move.
    pub id: String,
    /// The operation.
    pub work: Work,
    /// The side that made the report.
    pub side: Side,
    /// Where, when and by which program it was made, if the caller added that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub made: Option<Made>,
    /// How it ended.
    pub outcome: End,
    /// The reason, if it did not succeed.
    pub why: Option<String>,
    /// The limits that were in force.
    pub limits: LimitsReport,
    /// The phases, in order.
    pub phases: Vec<PhaseReport>,
    /// The rounds of pre-copy, in order. If there were very many, some are left out, which their numbers show.
    pub rounds: Vec<RoundReport>,
    /// The devices.
    pub devices: Vec<DeviceReport>,
    /// The links.
    pub links: Vec<LinkReport>,
    /// The bytes that were moved in all.
    #[serde(flatten)]
    pub bytes: Totals,
    /// The downtime in ns: on the source from the beginning of the stop to the answer that the destination runs, or until the
    /// source runs again. `None` if nothing was stopped.
    pub downtime_ns: Option<u64>,
    /// When the downtime began, in ns from the move's start. `None` if nothing was stopped.
    pub stopped_ns: Option<u64>,
    /// On the source: the downtime that was predicted at the decision to stop, in ns. `None` if a device does not say how
    /// much it gives in the stop, or if pre-copy did not end.
    pub predicted_downtime_ns: Option<u64>,
    /// The most bytes that this side's buffers took at once: the memory that the move needed, without the guest's, its
    /// bitmaps and the state of a compression.
    pub buffer_bytes_max: u64,
    /// The duration of the move in ns.
    pub total_ns: u64,
    /// Whether the other side has learned how the move ended, as far as this side knows. If the destination could not
    /// tell its source, the source will ask ([`crate::Source::resolve`]).
    pub peer_told: bool,
    /// After a move that did not succeed: the devices that could not be brought back to what they were.
    pub unrecovered: Vec<Unrecovered>,
    /// Notes for people: for example that a device's writes were not logged, or that a device had to be reset.
    pub notes: Vec<String>,
}

impl Report {
    /// The report of a move in which nothing happened.
    pub(crate) fn nothing(side: Side, limits: LimitsReport) -> Report {
        Report {
            id: String::new(),
            work: Work::default(),
            side,
            made: None,
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
