//! A save: the same script as a move, to a place that keeps it, with the publication in the commit's stead.

use super::rollback::Rollback;
use super::{Ending, InDoubt, Outcome, Source, Stage};
use crate::context::Context;
use crate::protocol::limits::Limits;
use crate::report::{End, Phase};
use crate::snapshot::{self, Published, SnapshotTarget, Writing, of_place};
use crate::transfer::team::Team;
use crate::wire::{Connection, MeteredLink};

/// What becomes of the devices when they have been saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterSave {
    /// They go on.
    Run,
    /// They stay in STOP, so that the snapshot is the only place where the guest goes on.
    Stop,
}

/// Where a save goes, and what becomes of the guest.
pub(super) struct Place<'p> {
    writing: &'p Writing,
    limits: snapshot::Limits<'p>,
    after: AfterSave,
}

impl<'a> Source<'a> {
    /// Saves everything to a place, such as a [`SnapshotFile`](crate::SnapshotFile), where it appears only when it is
    /// whole: [`Outcome::Moved`]. On failure nothing is there that was not there before, and the source runs as
    /// before: [`Outcome::Undone`].
    ///
    /// If it cannot be learned whether the snapshot was published, then with [`AfterSave::Run`] the source runs on, and
    /// the error says so ([`Error::PublicationUnknown`](crate::Error::PublicationUnknown)). With [`AfterSave::Stop`] it
    /// stays stopped: [`Outcome::InDoubt`], until [`published`](crate::published) has found out, for [`Source::decide`].
    pub fn save(mut self, to: &dyn SnapshotTarget, after: AfterSave) -> Outcome {
        let context = self.context();
        context.recorder.phase(Phase::Handshake);
        let limits = snapshot::Limits { silence_max: self.options.silence_max, cancel: self.cancel };
        let writing = match Team::guard("creating the snapshot", || Writing::create(to, limits)) {
            Ok(writing) => writing,
            Err(why) => {
                let report = context.recorder.finish(End::Undone, Some(&why));
                return Outcome::Undone { why, report };
            }
        };
        let mut rollback = Rollback::default();
        let (id, ending) = {
            let link = MeteredLink::new(&writing, &context.recorder);
            let connection = Connection::new(&link, Limits::new(self.options));
            let mut place = Place { writing: &writing, limits, after };
            self.run(&context, &connection, None, &mut rollback, Some(&mut place))
        };
        let recorder = context.recorder;
        match ending {
            Ending::Moved => Outcome::Moved(recorder.finish(End::Moved, None)),
            Ending::Undone(why) => {
                let why = of_place(why, "writing it");
                tracing::info!("the save was undone: {why}");
                let report = recorder.finish(End::Undone, Some(&why));
                Outcome::Undone { why, report }
            }
            Ending::Doubt(why) => {
                tracing::error!(%id, "in doubt whether the snapshot is there: {why}");
                let report = recorder.finish(End::InDoubt, Some(&why));
                Outcome::InDoubt(InDoubt::new(id, why, report, rollback, &self))
            }
        }
    }

    /// All is written but its end: seals and publishes it, and lets the guest go on or ends it.
    pub(super) fn keep(
        &mut self,
        context: &Context<'a>,
        stage: &Stage<'_, '_, '_>,
        rollback: &mut Rollback,
        place: &mut Place<'_>,
    ) -> Ending {
        let Place { writing, limits, after } = *place;
        let sealed = Team::guard("sealing the snapshot", || writing.seal(stage.wires.connection, limits));
        if let Err(why) = sealed {
            context.recorder.phase(Phase::Undo);
            self.roll_back(context, rollback, Some(stage.sending));
            return Ending::Undone(why);
        }
        stage.sending.alive.stands_still_no_more();
        if after == AfterSave::Run {
            // All is read: the guest need not wait for what keeps it.
            context.recorder.phase(Phase::Finish);
            self.roll_back(context, rollback, Some(stage.sending));
        }
        context.recorder.phase(Phase::Commit);
        match (writing.publish(self.options, limits), after) {
            (Published::Yes { note }, after) => {
                note.into_iter().for_each(|note| context.recorder.note(note));
                if after == AfterSave::Stop {
                    self.finish(context, rollback, Some(stage.sending));
                }
                Ending::Moved
            }
            (Published::No(why) | Published::Unknown(why), AfterSave::Run) => Ending::Undone(why),
            (Published::No(why), AfterSave::Stop) => {
                context.recorder.phase(Phase::Undo);
                self.roll_back(context, rollback, Some(stage.sending));
                Ending::Undone(why)
            }
            (Published::Unknown(why), AfterSave::Stop) => Ending::Doubt(why),
        }
    }
}
