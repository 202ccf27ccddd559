//! The load of a snapshot: the same script as for a move, from a place that keeps the stream.

use limosa_stream::{Damage, Kind};

use super::commit::NotStarted;
use super::handshake::Greeting;
use super::receiving::Receiving;
use super::{Destination, Ending, Received, Then, ended};
use crate::context::Context;
use crate::error::{check_cancel, guard};
use crate::protocol::limits::Limits;
use crate::report::{End, Phase, Work};
use crate::snapshot::{self, Reading, SnapshotSource, of_place};
use crate::wire::{Connection, MeteredLink};

/// The fate of the devices once everything is loaded, from a source or from a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AfterLoad {
    /// Each device returns to the state in which it was offered or saved: a device that was in STOP stays there, and
    /// the others run. The vCPUs start if any device runs, or if there are no devices. Sources and snapshots of the
    /// first versions do not say it; then all run.
    #[default]
    AsFound,
    /// All run, and the vCPUs start.
    Run,
    /// All stay in STOP, and the vCPUs do not start.
    Stop,
}

impl<'a> Destination<'a> {
    /// Loads a snapshot from a place, such as a [`SnapshotFile`](crate::SnapshotFile). The complete snapshot is verified before
    /// a device is touched, and again while it is read for the devices.
    pub fn load(self, from: &dyn SnapshotSource, after: AfterLoad) -> Received {
        let mut received = self.load_from(from, after);
        match &mut received {
            Received::Runs(report)
            | Received::Stopped(report)
            | Received::Discarded { report, .. }
            | Received::Broken { report, .. } => report.work = Work::Load,
            Received::Answered { .. } => {}
        }
        received
    }

    fn load_from(self, from: &dyn SnapshotSource, after: AfterLoad) -> Received {
        let context = self.context();
        context.recorder.phase(Phase::Handshake);
        let limits = snapshot::Limits { silence_max: self.options.silence_max, cancel: self.cancel };
        let reading = match guard("opening the snapshot", || Reading::open(from, limits)) {
            Ok(reading) => reading,
            Err(why) => return ended(Ending::Discarded(why), context),
        };
        let link = MeteredLink::new(&reading, &context.recorder);
        let connection = Connection::new(&link, Limits::new(self.options));
        let ending = match guard("the handshake", || self.greet(&context, &connection)) {
            Ok(Greeting::Offer(_, offer)) => {
                self.run(&context, &connection, None, &offer, Then::Loaded(after))
            }
            Ok(Greeting::Query(..)) => {
                let why = "a question is not a saved stream".into();
                Ending::Discarded(connection.damaged(Damage::Misplaced { kind: Kind::QUERY, why }))
            }
            Err(why) => Ending::Discarded(why),
        };
        let ending = match ending {
            Ending::Discarded(why) => Ending::Discarded(of_place(why, "reading it")),
            ending => ending,
        };
        ended(ending, context)
    }

    /// Everything is loaded: the devices run, or stay in STOP.
    pub(super) fn end_load(
        &self,
        after: AfterLoad,
        context: &Context<'a>,
        receiving: &Receiving<'_, 'a>,
    ) -> Result<End, NotStarted> {
        check_cancel(self.cancel).map_err(NotStarted::GivenBack)?;
        context.recorder.check().map_err(NotStarted::GivenBack)?;
        match self.start(after, context, receiving) {
            // Nothing is committed: the loaded state is discarded as before.
            Err(NotStarted::Stuck(why)) if receiving.never_run() => Err(NotStarted::GivenBack(why)),
            started => started,
        }
    }
}
