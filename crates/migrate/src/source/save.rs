//! A save: the script of a move, to a place that keeps the stream. The publication replaces the commit.

use limosa_stream::Kind;

use super::rollback::Rollback;
use super::{Ending, InDoubt, Outcome, Source, Stage};
use crate::context::Context;
use crate::error::guard;
use crate::protocol::limits::Limits;
use crate::report::{End, Phase, Work};
use crate::snapshot::{self, Published, SnapshotTarget, Writing, of_place};
use crate::vmm;
use crate::wire::{Connection, Frame, MeteredLink};

/// The fate of the guest after a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterSave {
    /// It continues to run.
    Run,
    /// Its devices stay in STOP, so that it goes on only where the snapshot is loaded.
    Stop,
}

/// The place of a save, and what happens to the guest.
pub(super) struct Saving<'p> {
    writing: &'p Writing,
    limits: snapshot::Limits<'p>,
    after: AfterSave,
}

impl<'a> Source<'a> {
    /// Saves everything to a place, such as a [`SnapshotFile`](crate::SnapshotFile). The snapshot appears there only when it
    /// is complete: [`Outcome::Moved`]. On failure the place is as before, and so is the source: [`Outcome::Undone`].
    ///
    /// If the answer to the publication is lost, the snapshot may exist. With [`AfterSave::Run`] the source runs on,
    /// and the error says so ([`Error::PublicationUnknown`](crate::Error::PublicationUnknown)). With
    /// [`AfterSave::Stop`] the source stays stopped: [`Outcome::InDoubt`]. Then [`published`](crate::published) finds
    /// out, and [`Source::decide`] acts on that.
    pub fn save(self, to: &dyn SnapshotTarget, after: AfterSave) -> Outcome {
        let mut outcome = self.save_to(to, after);
        match &mut outcome {
            Outcome::Moved(report) | Outcome::Undone { report, .. } => report.work = Work::Save,
            Outcome::InDoubt(doubt) => doubt.report.work = Work::Save,
        }
        outcome
    }

    fn save_to(mut self, to: &dyn SnapshotTarget, after: AfterSave) -> Outcome {
        let context = self.context();
        context.recorder.phase(Phase::Handshake);
        let limits = snapshot::Limits { silence_max: self.options.silence_max, cancel: self.cancel };
        let writing = match guard("creating the snapshot", || Writing::create(to, limits)) {
            Ok(writing) => writing,
            Err(why) => {
                let report = context.recorder.finish(End::Undone, Some(&why));
                return Outcome::Undone { why, report };
            }
        };
        let mut rollback = Rollback::default();
        let (note, ending) = {
            let link = MeteredLink::new(&writing, &context.recorder);
            let connection = Connection::new(&link, Limits::new(self.options));
            let mut saving = Saving { writing: &writing, limits, after };
            self.run(&context, &connection, None, &mut rollback, Some(&mut saving))
        };
        let recorder = context.recorder;
        match ending {
            Ending::Moved => Outcome::Moved(recorder.finish(End::Saved, None)),
            Ending::Undone(why) => {
                let why = of_place(why, "writing it");
                tracing::info!("the save was undone: {why}");
                let report = recorder.finish(End::Undone, Some(&why));
                Outcome::Undone { why, report }
            }
            Ending::Doubt(why) => {
                tracing::error!(id = %note.id, "in doubt whether the snapshot is there: {why}");
                let report = recorder.finish(End::InDoubt, Some(&why));
                Outcome::InDoubt(InDoubt::new(note, why, report, rollback, &self).of_save())
            }
        }
    }

    /// Everything but the SEAL is written: seals and publishes the snapshot, and lets the guest go on or ends it.
    pub(super) fn keep(
        &mut self,
        context: &Context<'a>,
        stage: &Stage<'_, '_, '_>,
        rollback: &mut Rollback,
        saving: &mut Saving<'_>,
    ) -> Ending {
        let Saving { writing, limits, after } = *saving;
        let sealed = guard("sealing the snapshot", || {
            let payload = writing.seal(limits)?.encode();
            stage.wires.connection.send(&Frame::new(Kind::SEAL, &payload), limits.cancel)
        });
        if let Err(why) = sealed {
            context.recorder.phase(Phase::Undo);
            self.roll_back(context, rollback, Some(stage.sending));
            return Ending::Undone(why);
        }
        stage.sending.alive.stands_still_no_more();
        match after {
            AfterSave::Run => {
                // All is read: the guest need not wait for what keeps it.
                context.recorder.phase(Phase::Finish);
                self.roll_back(context, rollback, Some(stage.sending));
                context.recorder.phase(Phase::Commit);
            }
            // Here the publication is what the commit is in a move.
            AfterSave::Stop => {
                context.recorder.phase(Phase::Commit);
                let note = stage.wires.note;
                if let Err(why) = vmm::ask("Vmm::committing", "commit", || self.vmm.committing(note)) {
                    context.recorder.phase(Phase::Undo);
                    self.roll_back(context, rollback, Some(stage.sending));
                    return Ending::Undone(why);
                }
            }
        }
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
