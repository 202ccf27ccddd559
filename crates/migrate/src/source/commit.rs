//! The commit, from the source's side (`docs/stream.md: The commit`, `Proofs`): after it only the destination may run.

use limosa_clockwork::catch;
use limosa_stream::body::decode_abort;
use limosa_stream::{Damage, Kind, Proofs};

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
            vmm::ask("Vmm::committing", "commit", || self.vmm.committing(stage.wires.note))?;
            alive.check()?;
            context.recorder.check()?;
            check_cancel(self.cancel)
        };
        may_commit().map_err(Uncommitted::Off)?;
        alive.stands_still_no_more();
        let proofs = stage.wires.proofs;
        let asked = catch(|| ask_to_run(stage.wires.connection, proofs));
        let answer = asked.map_err(|panic| Error::panicked("the commit", &panic)).flatten();
        if let Answer::Refused(why) = answer.map_err(|error| after_commit(error, proofs))? {
            return Err(Uncommitted::Off(why));
        }
        // A machine that stood still before has no downtime.
        if !rollback.stood_still() {
            context.recorder.runs();
            context.recorder.compare(self.options.convergence.downtime_goal);
        }
        Ok(())
    }
}

/// A destination's answer to COMMIT, which proves that it is of this move.
enum Answer {
    Running,
    /// It will never run this move.
    Refused(Error),
}

/// Sends COMMIT and waits for the answer. A cancel no longer has any effect.
fn ask_to_run(connection: &Connection<'_>, proofs: &Proofs) -> Result<Answer> {
    connection.send(&Frame::new(Kind::COMMIT, &proofs.prove(Kind::COMMIT, &[])), None)?;
    let limit = connection.limits().commit_max;
    let received = connection.receive("waiting for the destination to run", limit, None)?;
    let kind = received.header.kind;
    if !matches!(kind, Kind::RUNNING | Kind::REFUSED) {
        let why = "RUNNING or REFUSED is due".into();
        return Err(connection.damaged(Damage::Misplaced { kind, why }));
    }
    let body = proofs.check(kind, &received.payload).map_err(|damage| connection.damaged(damage))?;
    if kind == Kind::REFUSED {
        let (code, reason) = decode_abort(body);
        let peer = connection.link().peer().into();
        return Ok(Answer::Refused(Error::Aborted { peer, code, reason }));
    }
    if let Err(error) = connection.send(&Frame::new(Kind::DONE, &proofs.prove(Kind::DONE, &[])), None) {
        tracing::debug!("the destination may wait to be asked: {error}");
    }
    Ok(Answer::Running)
}
