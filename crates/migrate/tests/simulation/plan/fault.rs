//! Faults and their moments, and the mutations that the checks have to find.

use super::*;

/// When something goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum When {
    /// After this number of steps of this end's process.
    Point(End, u64),
    /// This number of steps of this end's process after it began this phase.
    Phase(End, Phase, u64),
}

pub(super) const PHASES: [Phase; 9] = [
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

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// One of the links is gone, and both ends see it.
    Cut(usize),
    /// No further link can be had.
    NoMoreLinks,
    /// Nothing of what this end sends on one of its links arrives any more, and nobody is told.
    Silence(End, usize),
    /// Nothing of what this end sends arrives for this long.
    Stall(End, usize, Duration),
    /// A bit of what this end sends next flips.
    Flip(End, usize, u8),
    /// The engine's process at this end dies; with it the machine's network when `silent`.
    Crash { end: End, silent: bool },
    /// Somebody calls the move off at this end.
    Cancel(End),
    /// Where snapshots lie is full.
    DiskFull,
    /// It fails once.
    DiskFails,
    /// The code that writes to the disk panics, the next time.
    DiskPanics,
    /// Its next publication is refused, is not durable, or has no answer.
    PublicationFails,
    /// It alters a bit of what it keeps.
    DiskFlips(u8),
    /// From now on the destination's ledger cannot write.
    LedgerFull,
    /// The source cannot note that it commits.
    NoteFull,
    /// The destination's VMM refuses to run the guest.
    PrepareRefused,
    /// The source's VMM refuses to stop its vCPUs.
    StopRefused,
    /// The source's log of dirty pages is lost at the next look.
    LogLost,
    /// Guest memory cannot be read or written any more.
    MemoryFails(End),
    /// A device cannot be reached any more.
    DeviceGone(End, usize),
    /// A device fails where it says, the next time.
    Device(End, usize, Step, Arc),
    /// A device is reset: by its guest where that runs, which then has a device at power-on; otherwise by somebody else.
    Reset(End, usize),
    /// What the engine calls panics, the next time.
    Panic(End, Place),
    /// The system starts only this number of further threads.
    RefuseThreads(End, u64),
    /// An adversary puts a frame among those that this end sends over one of its links.
    Forge { from: End, link: usize, forgery: Forgery },
    /// An adversary connects, as if it were a further link of the move.
    ForgedLink(Proof),
}

/// Something that is broken in what the engine relies on, or in what is done with it: the checks have to find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// The destination's devices run as soon as they are loaded.
    RunsBeforeCommit,
    /// The VMM says that its vCPU has stopped, and it has not.
    NeverStops,
    /// A source in doubt runs again without asking.
    RunsInDoubt,
    /// The log loses one page in four.
    LogForgets,
    /// The log's other user is not told of some pages after an undo.
    UndoForgets,
    /// The destination's ledger is empty after a crash.
    LedgerForgets,
    /// The destination loses pages that came.
    MemoryForgets,
    /// A link says that pages are where they belong, and has lost some of them.
    InPlaceForgets,
    /// A device of the destination loads something else.
    DeviceForgets,
    /// A cancel is not heard.
    CancelIgnored,
    /// The destination lets the source send more than it is to have.
    GivesTooMuch,
    /// A snapshot that was given up gets its name all the same.
    PublishesPartial,
    /// A transport says that a device is where it was driven, though the device was reset.
    ResetHidden,
    /// Devices have given enough after their first piece.
    DrainsNothing,
    /// Initial data is taken for ordinary data.
    InitialIgnored,
    /// A link may be silent for ten times as long.
    SilenceIgnored,
    /// The guest may stand still for as long as it takes.
    StandsForever,
    /// The destination runs a machine that stood still.
    RunsWhatStood,
    /// Nobody checks the proof of COMMIT: the adversary's is right.
    CommitUnchecked,
    /// Nobody checks the proof of OUTCOME.
    OutcomeUnchecked,
    /// Nobody checks the proof of JOIN.
    JoinUnchecked,
    /// The notifications in one line of the engine have no effect.
    ForgetsNotification { file: &'static str, line: u32 },
    /// A panic is caught nowhere.
    LetsPanicsEscape,
}

/// A fault and its moment.
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    pub when: When,
    pub fault: Fault,
}
