//! The faults, each with the clause that it breaks.

use limosa_protocol::{FeatureIndex, State};

macro_rules! faults {
    ($($name:ident $(($type:ty))? : $clause:literal, [$($value:expr),*];)*) => {
        /// What is wrong with a device.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Fault {
            $($name $(($type))?,)*
            /// A SET between two states is refused where the standard allows it, and succeeds without effect where not.
            Pair(State, State),
        }

        /// Every fault with the clause that it breaks, pairs of states aside.
        pub fn all() -> Vec<(Fault, &'static str)> {
            [$(&[$(({ #[allow(unused_imports)] use Fault::$name; $value }, $clause)),*] as &[(Fault, &'static str)]),*].concat()
        }
    };
}

faults! {
    RegionsWithoutEnd: "info.indexes", [RegionsWithoutEnd];
    OddRegionIndex: "info.indexes", [OddRegionIndex];
    IrqsWithoutEnd: "info.indexes", [IrqsWithoutEnd];
    OddIrqIndex: "info.indexes", [OddIrqIndex];
    RegionsAreOpen: "info.region-bounds", [RegionsAreOpen];
    VectorsWithoutEnd: "info.irqs", [VectorsWithoutEnd];
    FewerRegionsInStop: "info.stable", [FewerRegionsInStop];
    InfoFromOneThread: "info.stable", [InfoFromOneThread];

    GetWithSet: "feature.one-op", [GetWithSet];
    NoOperation: "feature.one-op", [NoOperation];
    IgnoresFlags: "feature.flags", [IgnoresFlags];
    KnowsEveryIndex: "feature.unknown", [KnowsEveryIndex];
    ShortPayloads: "feature.argsz", [ShortPayloads];
    ShortAnswer: "feature.argsz", [ShortAnswer];
    ShortStateAnswer: "feature.argsz", [ShortStateAnswer];
    WrongWithMoreRoom: "feature.argsz", [WrongWithMoreRoom];
    WrongOperations: "feature.operation", [WrongOperations];
    ProbesWrongOperations: "feature.operation", [ProbesWrongOperations];
    NoProbe: "feature.probe", [NoProbe];
    NoProbeOfBoth: "feature.probe", [NoProbeOfBoth];
    NoProbeOf(FeatureIndex): "feature.probe", [
        NoProbeOf(FeatureIndex::MIGRATION), NoProbeOf(FeatureIndex::MIG_DATA_SIZE),
        NoProbeOf(FeatureIndex::DMA_LOGGING_START), NoProbeOf(FeatureIndex::DMA_LOGGING_STOP),
        NoProbeOf(FeatureIndex::DMA_LOGGING_REPORT), NoProbeOf(FeatureIndex::MIG_PRECOPY_INFO_V2)
    ];
    ProbeActs: "feature.probe", [ProbeActs];
    ProbeEndsSession: "stream.independent", [ProbeEndsSession];

    WithoutStopCopy: "mig.mandatory", [WithoutStopCopy];
    UnknownFlag: "mig.flags", [UnknownFlag];
    AbsentOddly: "mig.absent", [AbsentOddly];
    TakesNumbers: "state.unknown", [TakesNumbers];
    NumbersStopIt: "state.unknown", [NumbersStopIt];
    SaysRunning: "state.get", [SaysRunning];
    GetMovesOn: "state.get", [GetMovesOn];
    GetFromOneThread: "state.get", [GetFromOneThread];
    NoStream: "state.fd", [NoStream];
    StreamTooMuch: "state.fd", [StreamTooMuch];
    RefusedLoadGoesAstray: "state.failed-arc", [RefusedLoadGoesAstray];
    BeginsInStop: "fsm.initial", [BeginsInStop];
    WearsOut: "fsm.repeat", [WearsOut];
    StopCopyWearsOut: "fsm.repeat", [StopCopyWearsOut];
    SetsFromOneThread: "fsm.repeat", [SetsFromOneThread];
    ErrorFades: "fsm.from-error", [ErrorFades];
    ErrorKeepsSession: "fsm.error-session", [ErrorKeepsSession];
    TakesUnsupported: "fsm.unsupported", [TakesUnsupported];
    StateGrows: "fsm.stop-quiet", [StateGrows];

    EndlessData: "stream.end", [EndlessData];
    NothingInStopCopy: "stream.end", [NothingInStopCopy];
    NoDataAtAll: "stream.end", [NoDataAtAll];
    EndIsNotTheEnd: "stream.end", [EndIsNotTheEnd];
    StopsAtTheEnd: "stream.end", [StopsAtTheEnd];
    SmallReadsLose: "stream.pieces", [SmallReadsLose];
    ReadsLose(usize): "stream.pieces", [ReadsLose(4096), ReadsLose(1 << 20)];
    NewStreamInStopCopy: "stream.one-session", [NewStreamInStopCopy];
    NewStreamInP2p: "stream.one-session", [NewStreamInP2p];
    PrecopyDiesInStopCopy: "stream.one-session", [PrecopyDiesInStopCopy];
    ReadsFromOneThread: "stream.one-session", [ReadsFromOneThread];
    StaleReads: "stream.stale", [StaleReads];
    StaleErrno: "stream.stale", [StaleErrno];
    StaleWrites: "stream.stale", [StaleWrites];
    WritesWhileSaving: "stream.direction", [WritesWhileSaving];
    ReadsWhileLoading: "stream.direction", [ReadsWhileLoading];
    RefusedSetEndsSession: "stream.independent", [RefusedSetEndsSession];
    MustBeRead: "stream.unread", [MustBeRead];
    GoesOnFromBefore: "stream.unread", [GoesOnFromBefore];
    SecondSessionEmpty: "stream.unread", [SecondSessionEmpty];
    DropStops: "stream.dropped", [DropStops];
    NoDataIn(State): "stream.end", [NoDataIn(State::StopCopy)];
    EndsInPrecopy: "precopy.no-end", [EndsInPrecopy];
    EndsInPrecopyLate: "precopy.no-end", [EndsInPrecopyLate];
    NoCancel: "precopy.cancel", [NoCancel];
    NoDataAfterPrecopy: "precopy.then-stop", [NoDataAfterPrecopy];
    PrecopyDataIsLost: "precopy.then-stop", [PrecopyDataIsLost];
    PrecopyAgainInStopCopy: "precopy.then-stop", [PrecopyAgainInStopCopy];

    NoPiecesBelow(usize): "resuming.pieces", [NoPiecesBelow(2), NoPiecesBelow(64)];
    NoPiecesAbove(usize): "resuming.pieces", [NoPiecesAbove(4095), NoPiecesAbove(65535), NoPiecesAbove(65536)];
    LoadIsLost: "resuming.round-trip", [LoadIsLost];
    RefusesItsOwn: "resuming.round-trip", [RefusesItsOwn];
    RefusesTheFirstByte: "resuming.pieces", [RefusesTheFirstByte];
    TakesIncomplete: "resuming.incomplete", [TakesIncomplete];
    TakesAnything: "resuming.validate", [TakesAnything];
    NoWayBackFromBadLoad: "resuming.survive", [NoWayBackFromBadLoad];
    NotAfterHalfLoad: "resuming.abort", [NotAfterHalfLoad];

    InfoNotIn(State): "info.precopy-states", [InfoNotIn(State::PreCopy), InfoNotIn(State::PreCopyP2p)];
    InfoEverywhere: "info.precopy-states", [InfoEverywhere];
    InfoGrows: "info.initial", [InfoGrows];
    InfoIsStuck: "info.initial", [InfoIsStuck];
    StaleInfo: "info.stale", [StaleInfo];
    InfoHasFlags: "info.flags", [InfoHasFlags];
    InfoTakesData: "stream.independent", [InfoTakesData];
    V2Refused: "info.v2", [V2Refused];

    SizeNotIn(State): "size.any-state", [
        SizeNotIn(State::Stop), SizeNotIn(State::Running), SizeNotIn(State::StopCopy), SizeNotIn(State::Resuming),
        SizeNotIn(State::RunningP2p), SizeNotIn(State::PreCopy), SizeNotIn(State::PreCopyP2p)
    ];
    SizeIsZero: "size.estimate", [SizeIsZero];
    SizeIsHuge: "size.estimate", [SizeIsHuge];

    NoResetIn(State): "reset.running", [
        NoResetIn(State::Stop), NoResetIn(State::Running), NoResetIn(State::StopCopy), NoResetIn(State::Resuming),
        NoResetIn(State::RunningP2p), NoResetIn(State::PreCopy), NoResetIn(State::PreCopyP2p),
        NoResetIn(State::Error)
    ];
    NoResetWhileLogging: "reset.running", [NoResetWhileLogging];
    ResetsOnce: "reset.running", [ResetsOnce];
    ResetRefused: "reset.running", [ResetRefused];
    SessionOutlivesReset: "reset.session", [SessionOutlivesReset];
    ResetStops: "fsm.initial", [ResetStops];
    ResetLosesData: "reset.usable", [ResetLosesData];
    ResetForbidsLoads: "reset.usable", [ResetForbidsLoads];

    LogPageSize: "log.page-size", [LogPageSize];
    LogPageSizeSmall: "log.page-size", [LogPageSizeSmall];
    LogStartsTwice: "log.twice", [LogStartsTwice];
    LogStartsOnce: "log.start-stop", [LogStartsOnce];
    LogNeverStops: "log.start-stop", [LogNeverStops];
    LogOneRange: "log.start-stop", [LogOneRange];
    LogNoNeighbours: "log.start-stop", [LogNoNeighbours];
    LogStaysOnAfterRefusal: "log.start-stop", [LogStaysOnAfterRefusal];
    LogTakesAnyRange: "log.ranges", [LogTakesAnyRange];
    LogRefusesEmptyOddly: "log.empty", [LogRefusesEmptyOddly];
    LogTakesOverflow: "log.overflow", [LogTakesOverflow];
    LogTakesTooMany: "log.too-many", [LogTakesTooMany];
    LogNotWhileStopped: "log.states", [LogNotWhileStopped];
    LogOffInStop: "log.states", [LogOffInStop];
    LogAbsentOddly: "log.absent", [LogAbsentOddly];
    LogReportsNothing: "log.report", [LogReportsNothing];
    LogReportsWhole: "log.report", [LogReportsWhole];
    LogReportsOtherPages(u64): "log.report-pages", [LogReportsOtherPages(4096), LogReportsOtherPages(8192), LogReportsOtherPages(65536), LogReportsOtherPages(2 << 20)];
    LogTakesAnyReport: "log.report-args", [LogTakesAnyReport];
    LogReportsWhileOff: "log.report-off", [LogReportsWhileOff];
    LogKeepsDirty: "log.read-clear", [LogKeepsDirty];
    LogBeyond: "log.report-bounds", [LogBeyond];

    Nothing: "", [];
    ViewIsStuck(State): "debugfs.state", [ViewIsStuck(State::Stop), ViewIsStuck(State::Running)];
    PeerLoadIsLost: "resuming.round-trip", [PeerLoadIsLost];
    PeerRefuses: "resuming.round-trip", [PeerRefuses];
}
