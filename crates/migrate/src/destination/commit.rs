//! The commit on the destination (`docs/stream.md: The commit`): it holds, and then runs.

use limosa_protocol::{MigrationFlags, State};
use limosa_stream::{Damage, Kind, MigrationId};

use super::Destination;
use super::receiving::Receiving;
use crate::context::Context;
use crate::error::{check_cancel, guard};
use crate::report::Phase;
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
    ) -> Result<(), NotStarted> {
        let connection = receiving.connection;
        context.recorder.check().map_err(NotStarted::GivenBack)?;
        match self.ledger.hold(id) {
            Ok(true) => {}
            Ok(false) => {
                let why = connection.damaged(decided_already("an id", id));
                return Err(NotStarted::GivenBack(why));
            }
            Err(error) => return Err(NotStarted::GivenBack(not_recorded(error))),
        }
        if let Err(why) = guard("holding for the commit", || self.hold(id, connection)) {
            self.ledger.not_committed(id);
            return Err(NotStarted::GivenBack(why));
        }
        let started = guard("the start", || Ok(self.start(context, receiving)));
        let started = started.unwrap_or_else(|why| Err(NotStarted::Stuck(why)));
        match &started {
            Ok(()) => {
                self.ledger.committed(id);
                context.recorder.runs();
                if let Err(error) = guard("the end of the commit", || tell(connection)) {
                    context.recorder.peer_not_told();
                    let note = format!("the source may not know that the devices run, and may ask: {error}");
                    context.recorder.note(note);
                }
            }
            Err(NotStarted::GivenBack(_)) => self.ledger.not_committed(id),
            Err(NotStarted::Stuck(_)) => self.ledger.committed(id),
        }
        if let Some(error) = self.ledger.unrecorded(id) {
            let note = format!(
                "what became of move {id} is not on the disk ({error}): only this process can answer a source in doubt"
            );
            context.recorder.note(note);
        }
        started
    }

    /// Sends READY and waits for COMMIT. If this fails, the move must never run here.
    fn hold(&self, id: MigrationId, connection: &Connection<'_>) -> Result<()> {
        check_cancel(self.cancel)?;
        connection.send(&Frame::new(Kind::READY, &[]), self.cancel)?;
        let limit = self.options.commit_max;
        connection.expect(Kind::COMMIT, "holding for the commit", limit, self.cancel)?;
        match self.ledger.start(id) {
            Ok(true) => Ok(()),
            Ok(false) => Err(connection.damaged(decided_already("a COMMIT", id))),
            Err(error) => Err(not_recorded(error)),
        }
    }

    /// Starts the devices: all enter RUNNING_P2P, then all enter RUNNING. Then starts the vCPUs.
    pub(super) fn start(
        &self,
        context: &Context<'a>,
        receiving: &Receiving<'_, 'a>,
    ) -> Result<(), NotStarted> {
        context.recorder.phase(Phase::Start);
        let p2p = |at| receiving.flags(at).contains(MigrationFlags::P2P);
        let started = vmm::ask("Vmm::prepare", "run", || self.vmm.prepare())
            .and_then(|()| receiving.enter(|at| p2p(at).then_some(State::RunningP2p)))
            .and_then(|()| receiving.enter(|_| Some(State::Running)));
        let why = match started {
            Ok(()) => {
                // The devices run: whatever it says, this is where the guest is.
                if let Err(note) = vmm::tell("Vmm::start", || self.vmm.start()) {
                    context.recorder.note(note);
                }
                return Ok(());
            }
            Err(why) => why,
        };
        if matches!(why, Error::DeviceChanged { .. }) {
            // A device that was reset is in RUNNING without its state, and may have acted.
            return Err(NotStarted::Stuck(why));
        }
        // All devices that were asked to run are reset, so that none of them can ever run this guest.
        match receiving.never_run() {
            true => Err(NotStarted::GivenBack(why)),
            false => Err(NotStarted::Stuck(why)),
        }
    }
}

/// Sends RUNNING and waits for DONE.
fn tell(connection: &Connection<'_>) -> Result<()> {
    connection.send(&Frame::new(Kind::RUNNING, &[]), None)?;
    let doing = "waiting for the source to know that the devices run";
    connection.expect(Kind::DONE, doing, connection.limits().commit_max, None).map(drop)
}

fn not_recorded(error: std::io::Error) -> Error {
    let error = Error::NotRecorded { error };
    tracing::error!("{error}");
    error
}

fn decided_already(what: &str, id: MigrationId) -> Damage {
    Damage::Unexpected { what: format!("it sent {what} of move {id}, which is decided already") }
}
