//! A source in doubt, and how it learns how its move ended (`docs/failure.md: In doubt`).

use limosa_protocol::State;
use limosa_stream::body::decode_u32;
use limosa_stream::{Kind, MigrationId, Nonce, PrefaceFlags, Proofs};

use super::handshake::check_preface;
use super::rollback::Rollback;
use super::{CommitNote, Outcome, Source};
use crate::error::{Difference, Mistrust, guard};
use crate::ledger::Decision;
use crate::link::Link;
use crate::protocol::limits::Limits;
use crate::report::{End, Phase, Recorder, Report, Side};
use crate::wire::{Connection, Frame};
use crate::{Error, Options, Result};

/// A move in doubt: the source may not run, because the destination may.
pub struct InDoubt {
    /// The id of the move.
    pub id: MigrationId,
    /// Why it is in doubt.
    pub why: Error,
    /// How far it came.
    pub report: Report,
    note: Box<CommitNote>,
    rollback: Rollback,
    /// The machine that was sent; `None` in a process that was restarted.
    machine: Option<Machine>,
    is_save: bool,
}

/// The facts by which one machine is told from another.
#[derive(Debug)]
struct Machine {
    devices: Vec<String>,
    regions: Vec<u64>,
}

impl Machine {
    fn of(source: &Source<'_>) -> Machine {
        Machine {
            devices: source.devices.iter().map(|moved| moved.device.name().into()).collect(),
            regions: source.memory.regions.iter().map(|region| region.size).collect(),
        }
    }

    fn compare(&self, found: Machine) -> Result<()> {
        if self.devices != found.devices {
            let (expected, found) = (self.devices.clone(), found.devices);
            return Err(Error::AnotherMachine(Difference::Devices { expected, found }));
        }
        if self.regions != found.regions {
            let (expected, found) = (self.regions.clone(), found.regions);
            return Err(Error::AnotherMachine(Difference::Memory { expected, found }));
        }
        Ok(())
    }
}

impl InDoubt {
    pub(super) fn new(
        note: CommitNote,
        why: Error,
        report: Report,
        rollback: Rollback,
        source: &Source<'_>,
    ) -> InDoubt {
        InDoubt {
            id: note.id,
            why,
            report,
            note: Box::new(note),
            rollback,
            machine: Some(Machine::of(source)),
            is_save: false,
        }
    }

    /// The move in doubt of a source that was restarted and knows only what it noted before the commit. Its devices are
    /// assumed to have been in RUNNING before the move; [`InDoubt::with_found`] says otherwise. An id alone is a note
    /// as well, but no answer to it can carry a proof.
    pub fn recover(note: impl Into<CommitNote>) -> InDoubt {
        let note = Box::new(note.into());
        let id = note.id;
        let recorder = Recorder::new(Side::Source, &Options::default(), &crate::Nobody, std::iter::empty());
        recorder.id(id);
        InDoubt {
            id,
            why: Error::StartedAnew,
            report: recorder.finish(End::InDoubt, Some(&Error::StartedAnew)),
            note,
            // A source that reached the commit had stopped the guest.
            rollback: Rollback { touched: true, vmm_stopped: true, ..Rollback::default() },
            machine: None,
            is_save: false,
        }
    }

    /// The note that a restarted process needs: the one that [`Vmm::committing`](crate::Vmm::committing) received.
    pub fn note(&self) -> &CommitNote {
        &self.note
    }

    /// The same, of devices that were found in these states before the move, in their order. Use it for a source that had
    /// not reached its commit as well, with [`Source::decide`] and [`Decision::NotCommitted`].
    pub fn with_found(mut self, found: Vec<State>) -> InDoubt {
        self.rollback.found = found;
        self
    }

    /// Marks the move as a save, so that the report says so when it is settled.
    #[must_use]
    pub fn of_save(self) -> InDoubt {
        InDoubt { is_save: true, ..self }
    }
}

impl std::fmt::Debug for InDoubt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InDoubt").field("id", &self.id).field("why", &self.why).finish_non_exhaustive()
    }
}

impl<'a> Source<'a> {
    /// Asks the destination over a new link how a move in doubt ended, and acts on the answer: [`Outcome::Moved`],
    /// [`Outcome::Undone`], or again [`Outcome::InDoubt`], if the link fails once more, the destination does not know, or the
    /// answer does not prove that it is the destination's ([`Error::Unauthenticated`], or [`Error::Stream`] with
    /// [`Damage::Unproven`](crate::Damage::Unproven)).
    ///
    /// The source must have the devices and memory that were sent. With others the move stays in doubt:
    /// [`Error::AnotherMachine`].
    pub fn resolve(self, doubt: InDoubt, link: &dyn Link) -> Outcome {
        let connection = Connection::new(link, Limits::new(self.options));
        match guard("the question", || self.query(&doubt.note, &connection)) {
            Ok(Decision::Unknown) => {
                let why = Error::NotKnown { peer: link.peer().into() };
                self.decide(Decision::Unknown, InDoubt { why, ..doubt })
            }
            Ok(decision) => self.decide(decision, doubt),
            Err(why) => Outcome::InDoubt(InDoubt { why, ..doubt }),
        }
    }

    /// Acts on a decision about a move in doubt that was made without [`Source::resolve`], for example by a person who has
    /// looked at the destination. A wrong decision here runs the guest twice, or not at all.
    ///
    /// The source must have the devices and memory that were sent. With others the move stays in doubt:
    /// [`Error::AnotherMachine`].
    pub fn decide(mut self, decision: Decision, doubt: InDoubt) -> Outcome {
        self.settle(decision, doubt)
    }

    pub(crate) fn settle(&mut self, decision: Decision, mut doubt: InDoubt) -> Outcome {
        if let Some(Err(why)) = doubt.machine.as_ref().map(|machine| machine.compare(Machine::of(self))) {
            return Outcome::InDoubt(InDoubt { why, ..doubt });
        }
        let context = self.context();
        context.recorder.id(doubt.id);
        match decision {
            Decision::Committed => {
                self.finish(&context, &mut doubt.rollback, None);
                let end = if doubt.is_save { End::Saved } else { End::Moved };
                Outcome::Moved(context.recorder.finish(end, None))
            }
            Decision::NotCommitted => {
                context.recorder.phase(Phase::Undo);
                self.roll_back(&context, &mut doubt.rollback, None);
                let report = context.recorder.finish(End::Undone, Some(&doubt.why));
                Outcome::Undone { why: doubt.why, report }
            }
            Decision::Unknown => Outcome::InDoubt(doubt),
        }
    }

    fn query(&self, note: &CommitNote, connection: &Connection<'_>) -> Result<Decision> {
        let id = note.id;
        let mistrusts = |why| Err(Error::Unauthenticated { peer: connection.link().peer().into(), why });
        let found = connection.link().peer_fingerprint();
        if let Some(expected) = note.peer
            && found != Some(expected)
        {
            return mistrusts(Mistrust::AnotherCertificate { expected, found });
        }
        let (proofs, query) = match &note.secret {
            Some(secret) => {
                let nonce = Nonce::random();
                let nonce = nonce.map_err(|error| Error::Os { doing: "reading random numbers", error })?;
                let proofs = Proofs::new(secret.clone(), id, nonce);
                let query = proofs.prove(Kind::QUERY, nonce.bytes());
                (proofs, query)
            }
            None if self.options.unauthenticated_peers => (Proofs::none(), Vec::new()),
            None => return mistrusts(Mistrust::NoSecret { id }),
        };
        connection.send_preface(id, PrefaceFlags::empty(), None)?;
        connection.send(&Frame::new(Kind::QUERY, &query), None)?;
        check_preface(connection, id, None)?;
        let limit = self.options.commit_max;
        let payload = connection.expect(Kind::OUTCOME, "asking what became of the move", limit, None)?;
        let decision = |body: &[u8]| match decode_u32(body) {
            1 => Decision::NotCommitted,
            2 => Decision::Committed,
            _ => Decision::Unknown,
        };
        if decision(&payload) == Decision::Unknown {
            // A peer that does not know the move cannot prove anything, and its answer decides nothing.
            return Ok(Decision::Unknown);
        }
        proofs.check(Kind::OUTCOME, &payload).map(decision).map_err(|damage| connection.damaged(damage))
    }
}
