//! The errors of a move, grouped by whose fault they are: that of this side's devices, memory or VMM, of the other side, or
//! of the link between them.

use std::time::Duration;

use limosa_clockwork::{Panic, catch};
use limosa_protocol::State;
use limosa_stream::{AbortCode, Damage, MigrationId};

use crate::Cancel;
use crate::link::{Fingerprint, LinkError};

/// The result of the engine's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a move failed, or why a file is not what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device of this side failed or refused.
    #[error("{device}: {doing}: {error}")]
    Device {
        /// The device.
        device: String,
        /// The step of the engine that failed.
        doing: String,
        /// The device's answer.
        #[source]
        error: limosa_client::Error,
    },
    /// A device of this side did something that the standard does not allow.
    #[error("{device}: {how}")]
    DeviceMisbehaved {
        /// The device.
        device: String,
        /// The behaviour.
        how: Misbehaviour,
    },
    /// A device of this side was reset or driven by another client during the move: what was saved or loaded is no longer
    /// its state.
    #[error("{device}: it was reset or driven by another client during the move: {found}")]
    DeviceChanged {
        /// The device.
        device: String,
        /// The change that the engine found.
        found: Changed,
    },
    /// Guest memory of this side could not be read or written.
    #[error("guest memory at {address:#x}: {error}")]
    Memory {
        /// The address, as devices see it.
        address: u64,
        /// The system's answer.
        #[source]
        error: std::io::Error,
    },
    /// The VMM of this side refused.
    #[error("the VMM refused to {doing}: {reason}")]
    Vmm {
        /// The request that it refused.
        doing: &'static str,
        /// Its reason.
        reason: String,
    },
    /// The devices or the memory of the two sides do not match. Nothing was moved.
    #[error("cannot be moved: {}", joined(.reasons))]
    Incompatible {
        /// The reasons. Each names a device or memory region, what was found and what was expected.
        reasons: Vec<Mismatch>,
    },
    /// This destination takes no move, or none now. The source that offered one was told so.
    #[error("no move is taken here: {why}")]
    NotTaken {
        /// Why.
        why: NoMove,
    },
    /// The other side ended the move.
    #[error("{peer} called the move off: {reason}")]
    Aborted {
        /// The other side.
        peer: String,
        /// The kind of its reason.
        code: AbortCode,
        /// The reason in its words.
        reason: String,
    },
    /// The other side violated the format, or bytes were altered on the way; or a file is damaged.
    #[error("{from}: {damage}")]
    Stream {
        /// The other side, or the file.
        from: String,
        /// What is wrong.
        #[source]
        damage: Damage,
    },
    /// The link failed.
    #[error("the link to {peer} failed while {doing}: {error}")]
    Link {
        /// The other side.
        peer: String,
        /// The step of the engine that failed.
        doing: &'static str,
        /// The link's error.
        #[source]
        error: LinkError,
    },
    /// A stop would exceed the downtime goal, which was made a limit ([`WhenStalled::Abort`](crate::WhenStalled::Abort)), or
    /// the limit for a guest that stands still.
    #[error(
        "the move does not converge: a stop would take {}{predicted:?}, the goal is {goal:?}: {obstacle}",
        if *is_minimum { "at least " } else { "" }
    )]
    NotConverging {
        /// The obstacle to a short stop.
        obstacle: Obstacle,
        /// The predicted downtime.
        predicted: Duration,
        /// Whether the downtime is at least that long, since a device does not say how much it gives.
        is_minimum: bool,
        /// The downtime goal.
        goal: Duration,
    },
    /// The guest has stood still for as long as it may, and the destination was not told to run yet.
    #[error(
        "the guest has stood still for {limit:?}, the limit, and the destination was not told to run yet{}",
        and_left(.left)
    )]
    StoodStill {
        /// The limit ([`Options::standstill_max`](crate::Options::standstill_max)).
        limit: Duration,
        /// Where most was left; `None` where everything was loaded.
        left: Option<Remaining>,
    },
    /// Code that the engine called, or the engine itself, panicked.
    #[error("{place} panicked: {message}")]
    Panicked {
        /// The device, hook or thread.
        place: String,
        /// The panic's message.
        message: String,
    },
    /// The other side cannot prove that it is an end of this move.
    #[error("{peer}: {why}")]
    Unauthenticated {
        /// The other side.
        peer: String,
        /// What it lacks.
        why: Mistrust,
    },
    /// A move in doubt was to be settled with another machine than the one that was sent.
    #[error("it is another machine than the one that was moved: {0}")]
    AnotherMachine(Difference),
    /// The other side exceeded a time limit.
    #[error("{peer}: nothing came within {limit:?} while {doing}")]
    TimedOut {
        /// The other side.
        peer: String,
        /// The step of the engine that failed.
        doing: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The link was closed after this process had stood still, and so was silent, for longer than a side may be.
    #[error(
        "{peer} closed the link: this process stood still for {time:?} (stopped by a signal, or without a processor), longer \
         than the {limit:?} for which a side may be silent"
    )]
    Suspended {
        /// The other side.
        peer: String,
        /// How long this process stood still.
        time: Duration,
        /// The limit for silence ([`Options::silence_max`](crate::Options::silence_max)) on this side.
        limit: Duration,
    },
    /// The source sent nothing but keep-alives for as long as it may.
    #[error(
        "{peer}: it sent nothing but keep-alives for {limit:?}, the limit for that (Options::idle_max, `--idle`)"
    )]
    Idle {
        /// The source.
        peer: String,
        /// The limit.
        limit: Duration,
    },
    /// Not everything had arrived when a move had taken as long as it may.
    #[error(
        "{peer}: it has not sent everything {limit:?} after its offer, the limit for that (Options::move_max, \
         `--move-limit`)"
    )]
    TookTooLong {
        /// The source.
        peer: String,
        /// The limit.
        limit: Duration,
    },
    /// A user cancelled the move on this side.
    #[error("cancelled")]
    Cancelled,
    /// This process was restarted and knows only the move's id.
    #[error("restarted after the commit, with only the move's id known")]
    StartedAnew,
    /// A system call on this side failed.
    #[error("{doing}: {error}")]
    Os {
        /// The step of the engine that failed.
        doing: &'static str,
        /// The system's answer.
        #[source]
        error: std::io::Error,
    },
    /// The destination's ledger cannot record the move, so that it is not committed: nobody could answer for it later.
    #[error("the move cannot be recorded, and is not committed: {error}")]
    NotRecorded {
        /// The system's answer, with the record or the folder that it is about.
        #[source]
        error: std::io::Error,
    },
    /// The place of a snapshot, a file or another, could not be read or written.
    #[error("{name}: {doing}: {error}")]
    Snapshot {
        /// The place's name.
        name: String,
        /// The step of the engine that failed.
        doing: &'static str,
        /// The answer of the system or the store.
        #[source]
        error: std::io::Error,
    },
    /// A snapshot may have been published, or may still be: the answer was lost. [`published`](crate::published) finds
    /// out.
    #[error(
        "{name}: it is not known whether the snapshot was published: {error}; look with `limosa verify {name}`"
    )]
    PublicationUnknown {
        /// The place's name.
        name: String,
        /// The error that came instead of an answer.
        #[source]
        error: std::io::Error,
    },
}

/// Why a destination takes no move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoMove {
    /// Another move is under way.
    #[error("another move is under way; try again when that has ended")]
    Busy,
    /// A move was committed, and a guest runs on the devices.
    #[error(
        "a move was committed here, and this process only answers what became of it; send to another receiver"
    )]
    Committed,
    /// The process is only there to answer.
    #[error("this process only answers what became of moves; send to a receiver")]
    Answers,
}

/// Why two sides do not match.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct Mismatch {
    /// The mismatch.
    pub kind: MismatchKind,
    /// The device or memory region, what was found and what was expected.
    pub message: String,
}

/// A difference between two sides that prevents a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MismatchKind {
    /// A device has no migration.
    NoMigration,
    /// A device is not in a state in which it can be moved.
    State,
    /// The sides have different numbers of devices.
    DeviceCount,
    /// A device is of another kind.
    DeviceKind,
    /// A device has another PCI identification.
    Pci,
    /// A device has other regions.
    Regions,
    /// A device has other interrupts.
    Irqs,
    /// The memory is not the same.
    Memory,
    /// The machine exceeds a limit of the stream's format.
    Format,
    /// The other side's reason, in its words.
    Told,
}

impl Mismatch {
    pub(crate) fn new(kind: MismatchKind, message: impl Into<String>) -> Mismatch {
        Mismatch { kind, message: message.into() }
    }
}

fn joined(reasons: &[Mismatch]) -> String {
    let messages: Vec<_> = reasons.iter().map(|reason| reason.message.as_str()).collect();
    messages.join("; ")
}

/// An obstacle that keeps a move from stopping within its goal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Obstacle {
    /// The guest dirties memory as fast as it is moved.
    #[error(
        "the guest dirties its memory about as fast as it is moved ({dirty_bytes} bytes are dirty); slow the guest \
         down, use a faster link or disk, or allow more downtime"
    )]
    DirtyMemory {
        /// Bytes that are dirty.
        dirty_bytes: u64,
    },
    /// A device dirties its state as fast as it is moved, or gives nothing of what it says is left.
    #[error(
        "{device} does not get ahead of its own changes in pre-copy ({left_bytes} bytes are left); make it less busy, \
         use a faster link or disk, or allow more downtime"
    )]
    DirtyDevice {
        /// The device.
        device: String,
        /// Bytes that it says are left.
        left_bytes: u64,
    },
    /// A device has more to give in the stop than fits into the goal, and pre-copy cannot make that less.
    #[error(
        "{device} has {bytes} bytes to give once it is stopped; allow more downtime, or use a faster link or disk"
    )]
    DeviceState {
        /// The device.
        device: String,
        /// Bytes that it would give.
        bytes: u64,
    },
    /// The destination loads a device's data more slowly than the goal allows.
    #[error(
        "the destination has not loaded {bytes} bytes that {device} has given; find out why its device there is slow, or \
         allow more downtime"
    )]
    SlowToLoad {
        /// The device.
        device: String,
        /// Bytes that are not loaded.
        bytes: u64,
    },
    /// A device's initial bytes were not read and loaded in time.
    #[error(
        "{device} still has {left_bytes} bytes of initial data to give or to load after {limit:?}; allow it more time"
    )]
    InitialData {
        /// The device.
        device: String,
        /// Bytes that are left; 0 when all are read and not all are loaded.
        left_bytes: u64,
        /// The limit that has passed ([`Convergence::initial_max`](crate::Convergence::initial_max)).
        limit: Duration,
    },
    /// A device does not say how much it has to give in the stop.
    #[error(
        "{device} does not say how much state it has (no MIG_DATA_SIZE), so that no downtime can be promised; tell \
         its size (MovedDevice::stop_bytes), or allow the stop whatever it takes"
    )]
    SizeUnknown {
        /// The device.
        device: String,
    },
    /// The log of dirty pages was lost after the guest had stopped, so that all memory would have to move in the stop.
    #[error(
        "the log of dirty pages was lost at the stop, and all memory would have to be moved while nothing runs"
    )]
    LogLost,
    /// The move of the data that is left after the stop takes longer than the guest may stand still.
    #[error("it would stand still for longer than {limit:?}, the limit for that{}", and_left(.left))]
    Standstill {
        /// The limit ([`Options::standstill_max`](crate::Options::standstill_max)).
        limit: Duration,
        /// Where most is left, as far as that is known.
        left: Option<Remaining>,
    },
    /// The data that is left would fit into the goal, and the rest of a stop does not.
    #[error(
        "the link's latency, the devices' own arcs and the last harvest of dirty pages make a stop that long, although \
         little data is left; allow more downtime"
    )]
    Latency,
}

/// Bytes of a device or of memory that are not sent yet, or that the destination has not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes of {of}")]
#[non_exhaustive]
pub struct Remaining {
    /// The device, or the guest's memory.
    pub of: String,
    /// Bytes.
    pub bytes: u64,
}

impl Remaining {
    /// The most of what is left of memory and of these devices; `None` where nothing is.
    pub(crate) fn most<'n>(memory: u64, devices: impl Iterator<Item = (&'n str, u64)>) -> Option<Remaining> {
        let all = std::iter::once(("the guest's memory", memory)).chain(devices);
        let (of, bytes) = all.filter(|(_, bytes)| *bytes > 0).max_by_key(|(_, bytes)| *bytes)?;
        Some(Remaining { of: of.into(), bytes })
    }
}

fn and_left(left: &Option<Remaining>) -> String {
    left.as_ref().map_or(String::new(), |left| format!("; {left} are left to send or to load"))
}

/// Behaviour of a device that the standard does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misbehaviour {
    /// It opened a session without a data stream.
    #[error("it entered {0} and gave no data stream")]
    NoDataStream(State),
    /// A read returned no data, or more than the buffer can hold.
    #[error("a read of up to {room} bytes gave {bytes}")]
    WrongLength {
        /// The size of the buffer in bytes.
        room: usize,
        /// The length that the device returned, in bytes.
        bytes: usize,
    },
    /// Its data never ends, or is more than it may have ([`Options::state_max`](crate::Options::state_max)).
    #[error(
        "its data has no end within {0} bytes, the limit; if it has so much state, allow more (--state-max, \
         Options::state_max)"
    )]
    Endless(u64),
    /// It said "nothing for now" in STOP_COPY, where a device has data or is at the end.
    #[error("in STOP_COPY it said \"nothing for now\" instead of data or the end")]
    NothingInStopCopy,
}

/// How the engine noticed that a device was reset or driven by another client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Changed {
    /// It is in another state than the engine has driven it to.
    #[error("it is in {found}, the engine has driven it to {expected}")]
    State {
        /// The state to which the engine has driven it.
        expected: State,
        /// The state in which it is.
        found: State,
    },
    /// A second saving session opened while the first was open.
    #[error("entering {0} opened a second session while the first was open")]
    SecondSession(State),
    /// It counts more resets than before.
    #[error("it has been reset {0} times since its session opened")]
    Reset(u64),
}

/// Why the other side is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mistrust {
    /// It is of a version whose words carry no proofs.
    #[error(
        "{sign}, so it is of an older version, and what it says about the commit would be believed without a proof; update \
         it, or allow peers that are not authenticated (--insecure, Options::unauthenticated_peers)"
    )]
    OlderVersion {
        /// What shows it.
        sign: &'static str,
    },
    /// This side knows no secret of the move, so that the other side can prove nothing.
    #[error(
        "nothing here can tell the other end of move {id} from a stranger, as no secret of it was noted; allow peers that \
         are not authenticated (--insecure, Options::unauthenticated_peers), or look at both ends and decide (--decide)"
    )]
    NoSecret {
        /// The move.
        id: MigrationId,
    },
    /// It has another certificate than the destination to which the COMMIT was sent.
    #[error(
        "it is not the destination to which the COMMIT was sent: the SHA-256 of its certificate is {}, expected {expected}; \
         ask the one with that certificate, or look at the destination and decide (--decide)",
        .found.map_or("not known, as the link is not under TLS".into(), |found| found.to_string())
    )]
    AnotherCertificate {
        /// The certificate to which the COMMIT was sent.
        expected: Fingerprint,
        /// The certificate that was found; `None` without TLS.
        found: Option<Fingerprint>,
    },
}

/// The difference between two machines.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Difference {
    /// Their devices differ.
    #[error("its devices are [{}], those that were moved are [{}]", .found.join(", "), .expected.join(", "))]
    Devices {
        /// The names of the devices that were moved.
        expected: Vec<String>,
        /// The names of the devices of this source.
        found: Vec<String>,
    },
    /// Their memory differs.
    #[error("its regions of memory are of {found:?} bytes, those that were moved are of {expected:?}")]
    Memory {
        /// The sizes of the regions that were moved, in bytes.
        expected: Vec<u64>,
        /// The sizes of the regions of this source, in bytes.
        found: Vec<u64>,
    },
}

impl Error {
    pub(crate) fn panicked(place: &str, panic: &Panic) -> Error {
        Error::Panicked { place: place.into(), message: panic.message.clone() }
    }

    /// A copy of the error for another caller. An error of the system keeps its number or its text.
    pub(crate) fn again(&self) -> Error {
        let io = |error: &std::io::Error| match error.raw_os_error() {
            Some(errno) => std::io::Error::from_raw_os_error(errno),
            None => std::io::Error::new(error.kind(), error.to_string()),
        };
        match self {
            Error::Link { peer, doing, error } => {
                let error = match error {
                    LinkError::TimedOut => LinkError::TimedOut,
                    LinkError::Cancelled => LinkError::Cancelled,
                    LinkError::Closed => LinkError::Closed,
                    LinkError::Io(error) => LinkError::Io(io(error)),
                    error => LinkError::Io(std::io::Error::other(error.to_string())),
                };
                Error::Link { peer: peer.clone(), doing, error }
            }
            Error::TimedOut { peer, doing, limit } => {
                Error::TimedOut { peer: peer.clone(), doing, limit: *limit }
            }
            Error::Os { doing, error } => Error::Os { doing, error: io(error) },
            Error::Panicked { place, message } => {
                Error::Panicked { place: place.clone(), message: message.clone() }
            }
            _ => Error::Cancelled,
        }
    }

    /// The kind of reason that the other side is told.
    pub(crate) fn abort_code(&self) -> AbortCode {
        match self {
            Error::Device { .. } | Error::DeviceMisbehaved { .. } | Error::DeviceChanged { .. } => {
                AbortCode::Device
            }
            Error::Memory { .. } => AbortCode::Memory,
            Error::Vmm { .. } => AbortCode::Vmm,
            Error::Incompatible { .. } | Error::Unauthenticated { .. } => AbortCode::Incompatible,
            Error::NotTaken { .. } => AbortCode::NotTaken,
            Error::Aborted { code, .. } => *code,
            Error::Stream { .. } => AbortCode::Stream,
            Error::TimedOut { .. } | Error::Idle { .. } | Error::TookTooLong { .. } => AbortCode::TimeLimit,
            Error::NotConverging { .. } | Error::StoodStill { .. } => AbortCode::Standstill,
            Error::Cancelled => AbortCode::Cancelled,
            Error::Link { .. } => AbortCode::Link,
            Error::Suspended { .. }
            | Error::NotRecorded { .. }
            | Error::Snapshot { .. }
            | Error::PublicationUnknown { .. }
            | Error::Os { .. }
            | Error::Panicked { .. }
            | Error::AnotherMachine(_)
            | Error::StartedAnew => AbortCode::Other,
        }
    }

    /// Whether the other side knows already that the move has ended.
    pub(crate) fn peer_needs_no_word(&self) -> bool {
        matches!(self, Error::Aborted { .. })
    }
}

/// [`Error::Cancelled`] when the move was called off.
pub(crate) fn check_cancel(cancel: Option<&Cancel>) -> Result<()> {
    if cancel.is_some_and(Cancel::is_cancelled) { Err(Error::Cancelled) } else { Ok(()) }
}

/// Does something that may call the caller's code; a panic of it is an error that names the place.
pub(crate) fn guard<T>(place: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    match catch(work) {
        Ok(done) => done,
        Err(panic) => Err(Error::panicked(place, &panic)),
    }
}
