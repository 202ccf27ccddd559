//! The commit on the destination (`docs/stream.md: The commit`): it holds, and then runs.

use limosa_protocol::{MigrationFlags, State};
use limosa_stream::{Damage, Kind, MigrationId, Proofs, Step};

use super::receiving::Receiving;
use super::{AfterLoad, Destination};
use crate::context::Context;
use crate::error::{check_cancel, guard};
use crate::report::{End, Phase};
use crate::vmm;
use crate::wire::{Connection, Frame};
use crate::{Error, Result};

/// Why devices do not run after COMMIT.
pub(super) enum NotStarted {
    /// They never will: they are reset, or are going to be. The source may run.
    GivenBack(Error),
    /// It is not known whether any of them runs.
    Stuck(Error),
}

impl<'a> Destination<'a> {
    /// From READY to RUNNING.
    pub(super) fn commit(
        &self,
        id: MigrationId,
        context: &Context<'a>,
        receiving: &Receiving<'_, 'a>,
    ) -> Result<End, NotStarted> {
        let connection = receiving.connection;
        context.recorder.check().map_err(NotStarted::GivenBack)?;
        match self.ledger.begin_holding(id, receiving.proofs.secret()) {
            Ok(true) => {}
            Ok(false) => {
                let why = connection.damaged(decided_already("an id", id));
                return Err(NotStarted::GivenBack(why));
            }
            Err(error) => return Err(NotStarted::GivenBack(not_recorded(error))),
        }
        if let Err(why) = guard("holding for the commit", || self.await_commit(id, receiving)) {
            self.ledger.not_committed(id);
            connection.refuse(&why, &receiving.proofs);
            let _ = self.ledger.sync(id);
            return Err(NotStarted::GivenBack(why));
        }
        let started = guard("the start", || Ok(self.start(self.after, context, receiving)));
        let started = started.unwrap_or_else(|why| Err(NotStarted::Stuck(why)));
        match &started {
            Ok(_) => {
                self.ledger.committed(id);
                context.recorder.runs();
                if let Err(error) = guard("the end of the commit", || tell(connection, &receiving.proofs)) {
                    context.recorder.peer_not_told();
                    let note = format!("the source may not know that the devices run, and may ask: {error}");
                    context.recorder.note(note);
                }
            }
            Err(NotStarted::GivenBack(why)) => {
                self.ledger.not_committed(id);
                connection.refuse(why, &receiving.proofs);
            }
            Err(NotStarted::Stuck(_)) => self.ledger.committed(id),
        }
        // A guest may have been waiting until here.
        if let Some(error) = self.ledger.sync(id) {
            let note = format!(
                "the outcome of move {id} is not on the disk ({error}): only this process can answer a source in doubt"
            );
            context.recorder.note(note);
        }
        started
    }

    /// Sends READY and waits for COMMIT. If this fails, the move must never run here.
    fn await_commit(&self, id: MigrationId, receiving: &Receiving<'_, 'a>) -> Result<()> {
        let (connection, proofs) = (receiving.connection, &receiving.proofs);
        check_cancel(self.cancel)?;
        connection.send(&Frame::new(Kind::READY, &proofs.prove(Kind::READY, &[])), self.cancel)?;
        let limit = self.options.commit_max;
        let received = connection.receive("holding for the commit", limit, self.cancel)?;
        let step = receiving
            .order
            .lock()
            .next(&received.header, &received.payload)
            .map_err(|damage| connection.damaged(damage))?;
        if step != Step::Commit {
            let why = "COMMIT is due".into();
            return Err(connection.damaged(Damage::Misplaced { kind: received.header.kind, why }));
        }
        // A device that was reset while this side was holding has lost its loaded state. Until *starting* is recorded, a refusal
        // returns the guest to the source.
        receiving.check(|_| true)?;
        match self.ledger.start(id) {
            Ok(true) => Ok(()),
            Ok(false) => Err(connection.damaged(decided_already("a COMMIT", id))),
            Err(error) => Err(not_recorded(error)),
        }
    }

    /// Starts the devices that are to run: all of these enter RUNNING_P2P, then all enter RUNNING. Then starts the vCPUs.
    /// Where nothing is to run, the devices stay in STOP, and the VMM is not asked.
    pub(super) fn start(
        &self,
        after: AfterLoad,
        context: &Context<'a>,
        receiving: &Receiving<'_, 'a>,
    ) -> Result<End, NotStarted> {
        let runs = |at: usize| match after {
            AfterLoad::AsFound => !receiving.was_stopped(at),
            AfterLoad::Run => true,
            AfterLoad::Stop => false,
        };
        let stays = match self.devices.len() {
            0 => after == AfterLoad::Stop,
            devices => !(0..devices).any(runs),
        };
        context.recorder.phase(Phase::Start);
        let p2p = |at: usize| runs(at) && receiving.flags(at).contains(MigrationFlags::P2P);
        // Of the others the next arc tells.
        let checked = receiving.check(|at| !runs(at));
        if stays {
            return checked.map(|()| End::Stopped).map_err(|why| not_started(why, receiving));
        }
        let started = checked
            .and_then(|()| vmm::ask("Vmm::prepare", "run", || self.vmm.prepare()))
            .and_then(|()| receiving.enter(|at| p2p(at).then_some(State::RunningP2p)))
            .and_then(|()| receiving.enter(|at| runs(at).then_some(State::Running)));
        started.map_err(|why| not_started(why, receiving))?;
        // The devices run: whatever it says, this is where the guest is.
        if let Err(note) = vmm::tell("Vmm::start", || self.vmm.start()) {
            context.recorder.note(note);
        }
        Ok(End::Runs)
    }
}

fn not_started(why: Error, receiving: &Receiving<'_, '_>) -> NotStarted {
    if matches!(why, Error::DeviceChanged { .. }) {
        // A device that was reset is in RUNNING without its state, and may have acted.
        return NotStarted::Stuck(why);
    }
    // All devices that were asked to run are reset, so that none of them can ever run this guest.
    match receiving.never_run() {
        true => NotStarted::GivenBack(why),
        false => NotStarted::Stuck(why),
    }
}

/// Sends RUNNING and waits for DONE.
fn tell(connection: &Connection<'_>, proofs: &Proofs) -> Result<()> {
    connection.send(&Frame::new(Kind::RUNNING, &proofs.prove(Kind::RUNNING, &[])), None)?;
    let doing = "waiting for the source to know that the devices run";
    let payload = connection.expect(Kind::DONE, doing, connection.limits().commit_max, None)?;
    proofs.check(Kind::DONE, &payload).map(drop).map_err(|damage| connection.damaged(damage))
}

pub(super) fn not_recorded(error: std::io::Error) -> Error {
    let error = Error::NotRecorded { error };
    tracing::error!("{error}");
    error
}

fn decided_already(what: &str, id: MigrationId) -> Damage {
    Damage::Unexpected { what: format!("it sent {what} of move {id}, which is decided already") }
}
