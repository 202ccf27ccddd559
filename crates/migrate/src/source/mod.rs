//! The source's script: from the handshake to the commit, and back to where it was when anything
//! fails before that.

mod precopy;
pub(crate) mod rollback;

use limosa_client::DeviceExt;
use limosa_clockwork::Monitor;
use limosa_protocol::{MigrationFlags, State};

use crate::devices::{MovedDevice, check_movable, each, enter, facts, failed};
use crate::ledger::Decision;
use crate::link::{FurtherLinks, Link, MeteredLink, Wait};
use crate::memory::Memory;
use crate::report::{Act, End, Phase, Recorder, Report, Side};
use crate::snapshot::{Limits, Published, SnapshotTarget, Writing, of_place};
use crate::source::rollback::Rollback;
use crate::transfer::device_stream::{self, Job, Saving};
use crate::transfer::sending::Sending;
use crate::wire::{Connection, FrameWriter, OnDrop};
use crate::{Cancel, Error, Observer, Options, Result, Vmm, cancel};
use limosa_stream::body::{NEEDS_CREDIT, NEEDS_FLUSH, decode_u32};
use limosa_stream::{Answer, Damage, Kind, MigrationId, Offer, PrefaceFlags, WINDOW_BYTES_MIN};

/// The side that devices leave.
pub struct Source<'a> {
    /// The devices, in RUNNING or STOP.
    pub devices: &'a [MovedDevice<'a>],
    /// The guest memory that goes with them.
    pub memory: Memory<'a>,
    /// The machine around them.
    pub vmm: &'a dyn Vmm,
    /// Who watches.
    pub observer: &'a dyn Observer,
    /// What was chosen.
    pub options: &'a Options,
    /// Calls the move off.
    pub cancel: Option<&'a Cancel>,
}

/// How a move ended, on the source.
#[derive(Debug)]
#[must_use]
pub enum Outcome {
    /// The destination runs. The source's devices are in STOP and must not run this guest again.
    Moved(Report),
    /// The move failed or was called off, and the source is as it was before: its devices run, with
    /// their dirty log complete. [`Report::notes`] names a device that could not be brought back.
    Undone {
        /// Why.
        why: Error,
        /// How far it came.
        report: Report,
    },
    /// The link died at the commit: the destination may run. The source stays stopped until
    /// [`Source::resolve`] has asked the destination.
    ///
    /// Of [`Source::save`] with [`AfterSave::Stop`]: the snapshot may have been published. The source stays stopped until
    /// [`published`](crate::published) has found out, and [`Source::decide`] is told.
    InDoubt(InDoubt),
}

/// A source that may not run, because the destination may.
pub struct InDoubt {
    /// The move, to ask for.
    pub id: MigrationId,
    /// What went wrong.
    pub why: Error,
    /// How far it came.
    pub report: Report,
    rollback: Rollback,
}

impl InDoubt {
    /// For a source that was started anew and knows only the id. Its devices are taken to have run.
    pub fn recover(id: MigrationId) -> InDoubt {
        let recorder = Recorder::new(Side::Source, &Options::default(), &crate::Nobody, std::iter::empty());
        recorder.id(id);
        InDoubt {
            id,
            why: Error::StartedAnew,
            report: recorder.finish(End::InDoubt, Some(&Error::StartedAnew)),
            // Whoever came to the commit had stopped the guest.
            rollback: Rollback { touched: true, vmm_stopped: true, ..Rollback::default() },
        }
    }
}

impl std::fmt::Debug for InDoubt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InDoubt").field("id", &self.id).field("why", &self.why).finish_non_exhaustive()
    }
}

/// What becomes of the devices when they have been saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterSave {
    /// They go on.
    Run,
    /// They stay in STOP, so that the snapshot is the only place where the guest goes on.
    Stop,
}

/// How an attempt to commit failed.
enum Uncommitted {
    /// The destination will never run.
    Off(Error),
    /// Nobody here knows.
    Doubt(Error),
}

impl<'a> Source<'a> {
    /// Moves everything over the link. Blocks until it is over.
    pub fn send(&mut self, link: &dyn Link) -> Outcome {
        self.move_over(link, None)
    }

    /// Moves everything over the link, and over as many further ones as [`Options::links`] says and the destination
    /// takes. Blocks until it is over.
    pub fn send_over(&mut self, link: &dyn Link, further: &dyn FurtherLinks) -> Outcome {
        self.move_over(link, Some(further))
    }

    fn move_over(&mut self, link: &dyn Link, further: Option<&dyn FurtherLinks>) -> Outcome {
        let recorder = self.recorder();
        let link = MeteredLink::new(link, &recorder);
        let mut connection = Connection::new(&link, self.cancel, self.options.silence_max);
        connection.reader.count(recorder.buffers());
        let mut rollback = Rollback::default();
        recorder.phase(Phase::Handshake);
        let id = match self.until_ready(&mut connection, further, &recorder, &mut rollback) {
            Ok(id) => id,
            Err(why) => return self.undone(why, &mut connection, recorder, rollback),
        };
        recorder.phase(Phase::Commit);
        if let Err(reason) = self.vmm.committing(id) {
            let why = Error::Vmm { doing: "commit", reason };
            return self.undone(why, &mut connection, recorder, rollback);
        }
        match self.commit(&mut connection) {
            Ok(()) => {
                recorder.runs();
                recorder.compare(self.options.convergence.downtime_max);
                recorder.phase(Phase::Finish);
                self.finish(&recorder, &mut rollback);
                Outcome::Moved(recorder.finish(End::Moved, None))
            }
            Err(Uncommitted::Off(why)) => self.undone(why, &mut connection, recorder, rollback),
            Err(Uncommitted::Doubt(why)) => {
                tracing::error!(%id, "in doubt whether the destination runs: {why}");
                let report = recorder.finish(End::InDoubt, Some(&why));
                Outcome::InDoubt(InDoubt { id, why, report, rollback })
            }
        }
    }

    /// Asks the destination over a new link what became of a move in doubt, and acts on the answer:
    /// [`Outcome::Moved`], [`Outcome::Undone`], or still [`Outcome::InDoubt`], when the link fails again
    /// or the destination does not know.
    pub fn resolve(&mut self, doubt: InDoubt, link: &dyn Link) -> Outcome {
        let mut connection = Connection::new(link, None, self.options.silence_max);
        match self.query(doubt.id, &mut connection) {
            Ok(decision) => self.decide(decision, doubt),
            Err(why) => Outcome::InDoubt(InDoubt { why, ..doubt }),
        }
    }

    /// Acts on what became of a move in doubt, where that is known otherwise than by [`Source::resolve`]: a person
    /// has looked. Who is wrong here makes the guest run twice, or nowhere.
    pub fn decide(&mut self, decision: Decision, mut doubt: InDoubt) -> Outcome {
        let recorder = self.recorder();
        recorder.id(doubt.id);
        match decision {
            Decision::Committed => {
                recorder.phase(Phase::Finish);
                self.finish(&recorder, &mut doubt.rollback);
                Outcome::Moved(recorder.finish(End::Moved, None))
            }
            Decision::NotCommitted => {
                recorder.phase(Phase::Undo);
                self.run_again(&recorder, &mut doubt.rollback);
                let report = recorder.finish(End::Undone, Some(&doubt.why));
                Outcome::Undone { why: doubt.why, report }
            }
            Decision::Unknown => Outcome::InDoubt(doubt),
        }
    }

    /// Saves everything to a place, such as a [`SnapshotFile`](crate::SnapshotFile), where the snapshot appears only when
    /// it is complete: [`Outcome::Moved`]. On failure nothing appears there, and the source runs as before:
    /// [`Outcome::Undone`].
    ///
    /// If it cannot be learned whether the snapshot was published, then with [`AfterSave::Run`] the source runs on, and
    /// the outcome is [`Outcome::Undone`] with [`Error::PublicationUnknown`]; with [`AfterSave::Stop`] the source stays
    /// stopped, as the guest may be loaded elsewhere: [`Outcome::InDoubt`].
    pub fn save(&mut self, to: &dyn SnapshotTarget, after: AfterSave) -> Outcome {
        let recorder = self.recorder();
        let mut rollback = Rollback::default();
        recorder.phase(Phase::Handshake);
        let limits = Limits { silence_max: self.options.silence_max, cancel: self.cancel };
        let writing = match Writing::create(to, limits) {
            Ok(writing) => writing,
            Err(why) => {
                let report = recorder.finish(End::Undone, Some(&why));
                return Outcome::Undone { why, report };
            }
        };
        let link = MeteredLink::new(&writing, &recorder);
        let mut connection = Connection::new(&link, self.cancel, self.options.silence_max);
        let written = self.until_ready(&mut connection, None, &recorder, &mut rollback);
        let sealed = written.and_then(|id| writing.seal(&mut connection, limits).map(|()| id));
        let id = match sealed {
            Ok(id) => id,
            Err(why) => return self.undone(of_place(why, "writing it"), &mut connection, recorder, rollback),
        };
        if after == AfterSave::Run {
            // All is read: the guest need not wait for what keeps it.
            recorder.phase(Phase::Finish);
            self.run_again(&recorder, &mut rollback);
        }
        recorder.phase(Phase::Commit);
        match (writing.publish(self.options, limits), after) {
            (Published::Yes { note }, after) => {
                if let Some(note) = note {
                    recorder.note(note);
                }
                if after == AfterSave::Stop {
                    recorder.phase(Phase::Finish);
                    self.finish(&recorder, &mut rollback);
                }
                Outcome::Moved(recorder.finish(End::Moved, None))
            }
            (Published::No(why) | Published::Unknown(why), AfterSave::Run) => {
                let report = recorder.finish(End::Undone, Some(&why));
                Outcome::Undone { why, report }
            }
            (Published::No(why), AfterSave::Stop) => {
                recorder.phase(Phase::Undo);
                self.run_again(&recorder, &mut rollback);
                let report = recorder.finish(End::Undone, Some(&why));
                Outcome::Undone { why, report }
            }
            (Published::Unknown(why), AfterSave::Stop) => {
                tracing::error!(%id, "in doubt whether the snapshot is there: {why}");
                let report = recorder.finish(End::InDoubt, Some(&why));
                Outcome::InDoubt(InDoubt { id, why, report, rollback })
            }
        }
    }

    fn recorder(&self) -> Recorder<'a> {
        let names = self.devices.iter().map(|moved| moved.device.name().into());
        Recorder::new(Side::Source, self.options, self.observer, names)
    }

    /// From nothing to READY, or to the end of a file: the source may still go back.
    fn until_ready(
        &mut self,
        connection: &mut Connection<'_>,
        further: Option<&dyn FurtherLinks>,
        recorder: &Recorder<'_>,
        rollback: &mut Rollback,
    ) -> Result<MigrationId> {
        let (id, answer) = self.handshake(connection, further.is_some(), recorder, rollback)?;
        let links = self.join(answer.links, connection, further)?;
        let links: Vec<_> = links.iter().map(|link| MeteredLink::new(&**link, recorder)).collect();
        let writers: Vec<_> = (links.iter())
            .map(|link| {
                let writer = FrameWriter::new(link, self.options.silence_max);
                writer.compress(self.options.compress, recorder.buffers());
                writer
            })
            .collect();
        for (writer, number) in writers.iter().zip(1_u32..) {
            writer.send_preface(id, PrefaceFlags::FURTHER, self.cancel)?;
            writer.send(Kind::JOIN, 0, 0, &number.to_le_bytes(), self.cancel)?;
        }
        rollback.touched = true;
        rollback.dirty.start(self.devices, &mut self.memory, recorder, self.cancel)?;
        let Connection { writer, reader, .. } = connection;
        let writers = std::iter::once(&**writer).chain(&writers).collect();
        let sending = Sending::new(writers, self.devices.len(), answer.window, self.options, self.cancel)?;
        let devices = self.devices;
        let saving = |(at, moved): (usize, &MovedDevice<'a>)| {
            Monitor::new(Saving::new(at, moved.device, &sending, recorder))
        };
        let savings: Vec<_> = devices.iter().enumerate().map(saving).collect();
        limosa_clockwork::scope(|scope| {
            let sending = &sending;
            let _end = OnDrop(|| sending.end());
            let listener =
                sending.has_peer().then(|| scope.spawn("limosa: listener", move || sending.listen(reader)));
            for thread in 0..devices.len() {
                let savings = &savings;
                let act = |at: usize| savings[at].lock().run();
                scope.spawn(format!("limosa: device work {thread}"), move || {
                    sending.workers.work(thread, act)
                });
            }
            sending.workers.assemble();
            if let Err(error) = self.work(sending, recorder, rollback) {
                sending.fail(error);
                // It may bring the reason for a link's failing.
                if let Some(listener) = listener {
                    listener.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                }
            }
        });
        drop(savings);
        match sending.failure() {
            Some(why) => Err(why),
            None => Ok(id),
        }
    }

    /// The further links that both sides want.
    fn join(
        &self,
        links: u32,
        connection: &Connection<'_>,
        further: Option<&dyn FurtherLinks>,
    ) -> Result<Vec<Box<dyn Link>>> {
        let Some(further) = further else { return Ok(Vec::new()) };
        let next = || further.next(Wait::within(self.options.silence_max, self.cancel));
        let failed = |error| connection.link_failed(error, "connecting a further link");
        (1..links).map(|_| next().map_err(failed)).collect()
    }

    /// Everything between the handshake and READY.
    fn work(
        &mut self,
        sending: &Sending<'_, '_>,
        recorder: &Recorder<'_>,
        rollback: &mut Rollback,
    ) -> Result<()> {
        recorder.phase(Phase::PreCopy);
        self.precopy(sending, recorder, rollback)?;
        recorder.phase(Phase::Stop);
        self.stop(sending, rollback)?;
        recorder.phase(Phase::StopCopy);
        sending.stopped()?;
        match rollback.dirty.blind {
            true => rollback.dirty.everything(),
            false => rollback.dirty.harvest(self.devices, &mut self.memory)?,
        }
        rollback.dirty.send(&self.memory.regions, sending, recorder)?;
        device_stream::wait_all(sending, |_| false)?;
        recorder.phase(Phase::Load);
        sending.finish(&recorder.totals().encode())
    }

    /// Compares both sides before anything is touched.
    fn handshake(
        &mut self,
        connection: &mut Connection<'_>,
        has_further: bool,
        recorder: &Recorder<'_>,
        rollback: &mut Rollback,
    ) -> Result<(MigrationId, Answer)> {
        let id =
            MigrationId::random().map_err(|error| Error::Os { doing: "reading random numbers", error })?;
        recorder.id(id);
        let mut offer = self.offer()?;
        if connection.has_peer() {
            offer.needs.extend([NEEDS_FLUSH.into(), NEEDS_CREDIT.into()]);
            offer.links = if has_further { self.options.links.get() } else { 1 };
        }
        offer.needs.extend(self.options.compress.map(|compression| compression.name().into()));
        connection.writer.compress(self.options.compress, recorder.buffers());
        for moved in self.devices {
            let state =
                moved.device.state().map_err(|error| failed(moved.device, "reading its state", error))?;
            if !matches!(state, State::Running | State::Stop) {
                let name = moved.device.name();
                let reason = format!(
                    "{name}: it is in {state}, RUNNING or STOP is expected; is it being moved already?"
                );
                return Err(Error::Incompatible { reasons: vec![reason] });
            }
            rollback.found.push(state);
        }
        let flags = if connection.has_peer() {
            PrefaceFlags::empty()
        } else {
            PrefaceFlags::STORED | PrefaceFlags::SEALED
        };
        let payload =
            offer.encode().map_err(|damage| Error::Incompatible { reasons: vec![damage.to_string()] })?;
        connection.send_preface(id, flags)?;
        connection.send(Kind::OFFER, 0, 0, &payload)?;
        if !connection.has_peer() {
            return Ok((id, Answer::default()));
        }
        check_preface(connection, id)?;
        let payload =
            connection.expect(Kind::ANSWER, "waiting for an answer to the offer", self.options.load_max)?;
        let answer = Answer::decode(payload).map_err(|damage| connection.damaged(damage))?;
        if !answer.accepted {
            let reasons = answer.reasons;
            return Err(Error::Incompatible { reasons });
        }
        let (links, window) = (answer.links, answer.window.unwrap_or(0));
        if !(1..=offer.links).contains(&links) || window < WINDOW_BYTES_MIN {
            let why = format!(
                "it takes {links} links and {window} bytes of a device at a time; expected are 1 to {} and at least \
                 {WINDOW_BYTES_MIN}",
                offer.links
            );
            return Err(connection.damaged(Damage::Content { kind: Kind::ANSWER, why }));
        }
        Ok((id, answer))
    }

    fn offer(&self) -> Result<Offer> {
        let mut offer = Offer::default();
        let mut reasons = Vec::new();
        for (at, moved) in self.devices.iter().enumerate() {
            cancel::check(self.cancel)?;
            let facts = facts(at as u32, moved)?;
            reasons.extend(check_movable(&facts).err());
            offer.devices.push(facts);
        }
        offer.memory = self.memory.regions.iter().map(|region| region.facts()).collect();
        if reasons.is_empty() { Ok(offer) } else { Err(Error::Incompatible { reasons }) }
    }

    /// Stops vCPUs, then peer-to-peer DMA of all devices, then the devices, which from then on give what is left.
    fn stop(&mut self, sending: &Sending<'_, '_>, rollback: &mut Rollback) -> Result<()> {
        sending.check()?;
        rollback.vmm_stopped = true;
        self.vmm.stop().map_err(|reason| Error::Vmm { doing: "stop", reason })?;
        for (at, (moved, found)) in self.devices.iter().zip(&rollback.found).enumerate() {
            let flags = moved.device.migration_flags();
            let flags = flags.map_err(|error| failed(moved.device, "reading its flags", error))?;
            if flags.contains(MigrationFlags::P2P) && found.is_running() {
                let is_open = sending.flows[at].lock().open;
                device_stream::give(
                    sending,
                    at,
                    Job::Enter(if is_open { State::PreCopyP2p } else { State::RunningP2p }),
                );
            }
        }
        device_stream::wait_all(sending, |_| false)?;
        (0..self.devices.len()).for_each(|at| device_stream::give(sending, at, Job::Stop));
        device_stream::wait_all(sending, |flow| flow.stopped)
    }

    /// From COMMIT's first byte on only an answer tells who runs.
    fn commit(&mut self, connection: &mut Connection<'_>) -> Result<(), Uncommitted> {
        connection.check_cancel().map_err(Uncommitted::Off)?;
        connection.ignore_cancel();
        connection.send(Kind::COMMIT, 0, 0, &[]).map_err(decide)?;
        let limit = self.options.commit_max.max(self.options.silence_max);
        connection.expect(Kind::RUNNING, "waiting for the destination to run", limit).map_err(decide)?;
        if let Err(error) = connection.send(Kind::DONE, 0, 0, &[]) {
            tracing::debug!("the destination may wait to be asked: {error}");
        }
        Ok(())
    }

    fn query(&mut self, id: MigrationId, connection: &mut Connection<'_>) -> Result<Decision> {
        connection.send_preface(id, PrefaceFlags::empty())?;
        connection.send(Kind::QUERY, 0, 0, &[])?;
        check_preface(connection, id)?;
        let payload =
            connection.expect(Kind::OUTCOME, "asking what became of the move", self.options.commit_max)?;
        Ok(match decode_u32(payload) {
            1 => Decision::NotCommitted,
            2 => Decision::Committed,
            _ => Decision::Unknown,
        })
    }

    /// The guest is elsewhere: ends the sessions and the logs.
    fn finish(&mut self, recorder: &Recorder<'_>, rollback: &mut Rollback) {
        let stopped = each(self.devices, |at, device| {
            let _span = recorder.span(at, Act::Enter { state: State::Stop });
            enter(device, State::Stop)
        });
        for error in stopped.into_iter().filter_map(Result::err) {
            recorder.note(format!(
                "{error}: it has been moved and must not run; reset it before it is used again"
            ));
        }
        if std::mem::take(&mut rollback.throttled) > 0 {
            self.vmm.throttle(0);
        }
        let mut notes = Vec::new();
        rollback.dirty.stop(self.devices, &mut self.memory, false, &mut notes);
        notes.into_iter().for_each(|note| recorder.note(note));
    }

    fn run_again(&mut self, recorder: &Recorder<'_>, rollback: &mut Rollback) {
        let notes = rollback.undo(self.devices, &mut self.memory);
        notes.into_iter().for_each(|note| recorder.note(note));
        if std::mem::take(&mut rollback.throttled) > 0 {
            self.vmm.throttle(0);
        }
        if std::mem::take(&mut rollback.vmm_stopped) {
            self.vmm.resume();
        }
        recorder.runs();
    }

    /// Back to where it was, first; then the other side is told.
    fn undone(
        &mut self,
        why: Error,
        connection: &mut Connection<'_>,
        recorder: Recorder<'_>,
        mut rollback: Rollback,
    ) -> Outcome {
        connection.ignore_cancel();
        if rollback.touched {
            recorder.phase(Phase::Undo);
            self.run_again(&recorder, &mut rollback);
        }
        connection.abort(&why);
        tracing::info!("the move was undone: {why}");
        let report = recorder.finish(End::Undone, Some(&why));
        Outcome::Undone { why, report }
    }
}

/// A destination that answers ABORT never runs the move; anything else leaves it open.
fn decide(error: Error) -> Uncommitted {
    match error {
        Error::Aborted { .. } => Uncommitted::Off(error),
        error => Uncommitted::Doubt(error),
    }
}

/// The other side's preface, which must be about the same move.
fn check_preface(connection: &mut Connection<'_>, id: MigrationId) -> Result<()> {
    let preface = connection.receive_preface()?;
    if preface.id != id || preface.flags.contains(PrefaceFlags::STORED) {
        let what = format!("the id {} in answer to {id}", preface.id);
        return Err(connection.damaged(Damage::Unknown { what }));
    }
    Ok(())
}
