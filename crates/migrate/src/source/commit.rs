//! The commit, from the source's side (`docs/stream.md: The commit`): after it only the destination may run.

use limosa_clockwork::catch;
use limosa_stream::Kind;

use super::rollback::Rollback;
use super::{Source, Stage};
use crate::context::Context;
use crate::error::check_cancel;
use crate::protocol::commit::{Uncommitted, after_commit};
use crate::report::Phase;
use crate::vmm;
use crate::wire::{Connection, Frame};
use crate::{Error, Result};

impl<'a> Source<'a> {
    /// From the first byte of COMMIT on, only an answer tells which side runs. A panic from then on leaves the move in doubt
    /// as well.
    pub(super) fn commit(
        &mut self,
        context: &Context<'a>,
        stage: &Stage<'_, '_, '_>,
        rollback: &Rollback,
    ) -> Result<(), Uncommitted> {
        context.recorder.phase(Phase::Commit);
        let alive = &stage.sending.alive;
        let may_commit = || -> Result<()> {
            vmm::ask("Vmm::committing", "commit", || self.vmm.committing(stage.wires.id))?;
            alive.check()?;
            context.recorder.check()?;
            check_cancel(self.cancel)
        };
        may_commit().map_err(Uncommitted::Off)?;
        alive.stands_still_no_more();
        let committed = catch(|| ask_to_run(stage.wires.connection));
        committed.map_err(|panic| Error::panicked("the commit", &panic)).flatten().map_err(after_commit)?;
        // A machine that stood still before has no downtime.
        if !rollback.stood_still() {
            context.recorder.runs();
            context.recorder.compare(self.options.convergence.downtime_goal);
        }
        Ok(())
    }
}

/// Sends COMMIT and waits for the answer. A cancel has no effect any more.
fn ask_to_run(connection: &Connection<'_>) -> Result<()> {
    connection.send(&Frame::new(Kind::COMMIT, &[]), None)?;
    let limit = connection.limits().commit_max;
    connection.expect(Kind::RUNNING, "waiting for the destination to run", limit, None)?;
    if let Err(error) = connection.send(&Frame::new(Kind::DONE, &[]), None) {
        tracing::debug!("the destination may wait to be asked: {error}");
    }
    Ok(())
}
