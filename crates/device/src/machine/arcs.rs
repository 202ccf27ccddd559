//! The arcs: the calls of the model for a step between two states
//! (`vfio.h: "The FSM takes actions on the arcs between FSM states"`). A step that skips a missing state is the sum of
//! the arcs that it replaces.

use std::time::Instant;

use limosa_protocol::fsm::{self, Session};
use limosa_protocol::{Errno, State};

use super::session::SessionId;
use super::{ClientId, Machine, arc_deadline};
use crate::{Fault, Migration};

impl Machine {
    /// Walks to a state for a client. Returns the session that the client has to be told about, if one opened.
    ///
    /// EINVAL where [`fsm::path`] refuses, EBUSY when another client drives the device, ETIMEDOUT when other calls do
    /// not return. After a step that the model refuses, the device is in the step's first state; after one that breaks
    /// it, in ERROR.
    pub(super) fn set_state(&self, client: ClientId, to: State) -> Result<Option<SessionId>, Errno> {
        self.set_state_by(client, to, arc_deadline(client))
    }

    /// The same with the caller's limit.
    pub(super) fn set_state_by(
        &self,
        client: ClientId,
        to: State,
        until: Instant,
    ) -> Result<Option<SessionId>, Errno> {
        self.flags.ok_or(Errno::ENOTTY)?;
        let _alone = self.alone(until)?;
        self.set_state_alone(client, to, until)
    }

    /// The same with the gate taken exclusively.
    pub(super) fn set_state_alone(
        &self,
        client: ClientId,
        to: State,
        until: Instant,
    ) -> Result<Option<SessionId>, Errno> {
        let flags = self.flags.ok_or(Errno::ENOTTY)?;
        if self.lock().copier.is_some_and(|copier| copier != client) {
            self.stop_copying(until)?;
        }
        let from = self.lock().state;
        let path = fsm::path(flags, from, to).inspect_err(|refusal| {
            tracing::debug!(%from, %to, %refusal, "transition refused");
        })?;
        self.may_drive(client, to)?;
        let walked = path.arcs().try_for_each(|arc| self.step(arc, until));
        self.settle(client);
        walked?;
        Ok(if path.opens_session() { self.session() } else { None })
    }

    /// Takes one step, with the gate taken exclusively.
    pub(super) fn step(&self, arc: fsm::Arc, until: Instant) -> Result<(), Errno> {
        let began = Instant::now();
        let damaged = self.lock().session.as_ref().is_some_and(|open| open.damaged);
        // A session that lost some of its data cannot be completed, so the model is not called.
        let taken = if arc.from == State::Resuming && damaged {
            Ok(Err(Fault::Refused(Errno::EIO)))
        } else {
            self.migrate(|migration| Ok(act(migration, arc, until)))
        };
        // A panic, or the model no longer has a migration.
        let taken = taken.unwrap_or_else(|errno| Err(Fault::Broken(errno)));
        self.counters.arc(arc, began, taken.is_ok());
        match taken {
            Ok(()) => {
                let mut inner = self.lock();
                match arc.session {
                    Session::Opens => inner.session = Some(inner.ids.open()),
                    Session::Ends => inner.session = None,
                    Session::None | Session::Keeps => {}
                }
                inner.enter(arc.to);
                Ok(())
            }
            Err(fault) => {
                tracing::warn!(%arc, %fault, "arc failed");
                if let Fault::Broken(_) = fault {
                    // The device is already broken.
                    let _ = self.end_session();
                    self.lock().enter(State::Error);
                }
                Err(fault.errno())
            }
        }
    }

    /// Ends the session without finishing it: for a reset, or a broken device. With the gate taken exclusively. EIO
    /// if the model panics.
    pub(super) fn end_session(&self) -> Result<(), Errno> {
        let loading = {
            let mut inner = self.lock();
            if inner.session.take().is_none() {
                return Ok(());
            }
            inner.state == State::Resuming
        };
        self.migrate(|migration| {
            if loading {
                migration.load_abort();
            } else {
                migration.save_end();
            }
            Ok(())
        })
    }
}

/// Whether the device starts peer-to-peer DMA in this state.
fn starts_p2p(state: State) -> bool {
    matches!(state, State::Running | State::PreCopy)
}

/// Takes one step on the model: ends its session, stops or starts the device, opens a new session.
fn act(model: &dyn Migration, arc: fsm::Arc, until: Instant) -> Result<(), Fault> {
    let (from, to) = (arc.from, arc.to);
    match (from.is_running(), to.is_running()) {
        (true, true) => {
            match (starts_p2p(from), starts_p2p(to)) {
                (true, false) => model.quiesce_p2p()?,
                (false, true) => model.resume_p2p()?,
                _ => {}
            }
            match arc.session {
                Session::Opens => model.save_begin()?,
                Session::Ends => model.save_end(),
                Session::None | Session::Keeps => {}
            }
        }
        (true, false) => {
            model.stop(until)?;
            if arc.session == Session::Keeps {
                model.save_final().map_err(|fault| take_back_stop(model, fault))?;
            }
        }
        (false, true) => model.start()?,
        (false, false) => match (arc.session, from == State::Resuming || to == State::Resuming) {
            (Session::Opens, false) => model.save_begin()?,
            (Session::Opens, true) => model.load_begin()?,
            (Session::Ends, false) => model.save_end(),
            (Session::Ends, true) => model.load_finish()?,
            (Session::None | Session::Keeps, _) => {}
        },
    }
    Ok(())
}

/// Undoes a step that stopped the device and was then refused: the device runs again, or is broken.
fn take_back_stop(model: &dyn Migration, fault: Fault) -> Fault {
    match fault {
        Fault::Refused(errno) if model.start().is_err() => Fault::Broken(errno),
        fault => fault,
    }
}

#[cfg(test)]
mod tests {
    use limosa_protocol::MigrationFlags;

    use super::*;

    /// `act` does one kind of thing in each step where the device goes on running, and none with
    /// the session where it starts; no step of any device may need more.
    #[test]
    fn no_step_of_any_device_needs_more_than_act_does() {
        for flags in MigrationFlags::SETS {
            for from in State::ALL {
                for to in State::ALL {
                    let Ok(path) = fsm::path(flags, from, to) else { continue };
                    for arc in path.arcs() {
                        let session = matches!(arc.session, Session::Opens | Session::Ends);
                        let p2p = starts_p2p(arc.from) != starts_p2p(arc.to);
                        match (arc.from.is_running(), arc.to.is_running()) {
                            (true, true) => assert!(!(p2p && session), "{flags}: {arc}"),
                            (true, false) => assert!(!session, "{flags}: {arc}"),
                            (false, true) => assert_eq!(arc.session, Session::None, "{flags}: {arc}"),
                            (false, false) => assert!(session, "{flags}: {arc}"),
                        }
                    }
                }
            }
        }
    }
}
