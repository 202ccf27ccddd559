//! The destination's script: from the offer to RUNNING, or back to where it was, with all discarded
//! that was loaded.

mod device_queue;
mod load;
mod receive;

use std::sync::Arc;

use limosa_client::{DataStream, Device, DeviceExt};
use limosa_protocol::{MigrationFlags, State};

use self::receive::Receiving;
use crate::devices::{MovedDevice, compare_devices, compare_memory, each, enter, facts, failed};
use crate::ledger::{Decision, Ledger};
use crate::link::{FurtherLinks, Link, MeteredLink, Wait};
use crate::memory::MemoryRegion;
use crate::report::{Act, End, Phase, Recorder, Report, Side};
use crate::snapshot::{Limits, Reading, SnapshotSource, of_place};
use crate::wire::{Connection, FrameReader, OnDrop};
use crate::{Cancel, Error, Observer, Options, Result, Vmm, cancel};
use limosa_stream::body::{NEEDS_CREDIT, decode_u32};
use limosa_stream::{
    Answer, Damage, DeviceFacts, Kind, LINKS_MAX, MigrationId, Offer, Preface, PrefaceFlags,
};

/// The side that devices come to.
pub struct Destination<'a> {
    /// The devices, idle, in RUNNING or STOP; in the source's order.
    pub devices: &'a [MovedDevice<'a>],
    /// The guest memory, region by region like the source's.
    pub memory: &'a [MemoryRegion<'a>],
    /// The machine around them.
    pub vmm: &'a dyn Vmm,
    /// Who watches.
    pub observer: &'a dyn Observer,
    /// What was chosen.
    pub options: &'a Options,
    /// Calls the move off.
    pub cancel: Option<&'a Cancel>,
    /// Remembers outcomes for sources in doubt. One for all that this process receives.
    pub ledger: &'a Ledger,
}

/// How receiving ended.
#[derive(Debug)]
#[must_use]
pub enum Received {
    /// The devices run here.
    Runs(Report),
    /// A saved stream was loaded, and the devices stay in STOP.
    Stopped(Report),
    /// The move failed or was called off. What was loaded is discarded: every device was reset, and
    /// returned to the state (RUNNING or STOP) in which it was found. Memory that was written stays so.
    /// [`Report::notes`] names a device that could not be reset. It will never run this guest.
    Discarded {
        /// Why.
        why: Error,
        /// How far it came.
        report: Report,
    },
    /// After the commit the devices could neither be started nor be stopped again. Only here may the
    /// guest run, and a person must look after it.
    Broken {
        /// Why.
        why: Error,
        /// How far it came.
        report: Report,
    },
    /// It was not a move: a source in doubt asked, and was answered.
    Answered {
        /// The move it asked for.
        id: MigrationId,
        /// The answer.
        decision: Decision,
    },
}

/// What becomes of devices when a snapshot has been loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterLoad {
    /// They run.
    Run,
    /// They stay in STOP.
    Stop,
}

/// Why devices do not run after COMMIT.
enum NotStarted {
    /// They are stopped and empty; the source may run.
    GivenBack(Error),
    /// Nobody knows.
    Stuck(Error),
}

/// What was done to a device, to go back.
struct Taken {
    found: State,
    stream: Option<Box<dyn DataStream>>,
}

impl<'a> Destination<'a> {
    /// Receives one move, or one question, over the link. Blocks until it is over.
    pub fn receive(&self, link: &dyn Link) -> Received {
        self.receive_move(link, None)
    }

    /// Receives one move, or one question, over the link, and over as many further ones as the source wants, of which
    /// [`Options::links`] are the most. Blocks until it is over.
    ///
    /// Further links belong to the move when they say its id; others are closed.
    pub fn receive_over(&self, link: &dyn Link, further: &dyn FurtherLinks) -> Received {
        self.receive_move(link, Some(further))
    }

    fn receive_move(&self, link: &dyn Link, further: Option<&dyn FurtherLinks>) -> Received {
        let recorder = self.recorder();
        let link = MeteredLink::new(link, &recorder);
        let mut connection = Connection::new(&link, self.cancel, self.options.silence_max);
        connection.reader.count(recorder.buffers());
        let mut taken = Vec::new();
        recorder.phase(Phase::Handshake);
        let (preface, offer) = match self.greet(&mut connection, &recorder) {
            Ok((preface, Some(offer))) => (preface, offer),
            Ok((preface, None)) => return self.answer_query(preface.id, &mut connection, recorder),
            Err(why) => return self.discarded(why, &mut connection, recorder, taken),
        };
        let ended = self.until_loaded(
            preface.id,
            &offer,
            &mut connection,
            further,
            &recorder,
            &mut taken,
            |connection, workers| self.commit(preface.id, connection, workers, &recorder),
        );
        match ended {
            Ok(Ok(())) => Received::Runs(recorder.finish(End::Runs, None)),
            Err(why) | Ok(Err(NotStarted::GivenBack(why))) => {
                self.discarded(why, &mut connection, recorder, taken)
            }
            Ok(Err(NotStarted::Stuck(why))) => {
                let report = recorder.finish(End::Broken, Some(&why));
                Received::Broken { why, report }
            }
        }
    }

    /// From READY to RUNNING.
    fn commit(
        &self,
        id: MigrationId,
        connection: &mut Connection<'_>,
        workers: &Receiving<'_, '_>,
        recorder: &Recorder<'_>,
    ) -> Result<(), NotStarted> {
        recorder.phase(Phase::Commit);
        match self.ledger.hold(id) {
            Ok(true) => {}
            Ok(false) => return Err(NotStarted::GivenBack(connection.damaged(decided_already("an id", id)))),
            Err(error) => return Err(NotStarted::GivenBack(not_recorded(error))),
        }
        if let Err(why) = self.hold(id, connection) {
            self.ledger.not_committed(id);
            return Err(NotStarted::GivenBack(why));
        }
        connection.ignore_cancel();
        recorder.phase(Phase::Start);
        let started = self.start(connection, workers);
        match &started {
            Ok(()) => {
                self.ledger.committed(id);
                recorder.runs();
                if let Err(error) = self.tell(connection) {
                    recorder.peer_not_told();
                    recorder
                        .note(format!("the source may not know that the devices run, and may ask: {error}"));
                }
            }
            Err(NotStarted::GivenBack(_)) => self.ledger.not_committed(id),
            Err(NotStarted::Stuck(_)) => self.ledger.committed(id),
        }
        started
    }

    /// Loads a snapshot from a place, such as a [`SnapshotFile`](crate::SnapshotFile). All of it is checked before a
    /// device is touched, and once more while it is read for the devices.
    pub fn load(&self, from: &dyn SnapshotSource, after: AfterLoad) -> Received {
        let recorder = self.recorder();
        recorder.phase(Phase::Handshake);
        let limits = Limits { silence_max: self.options.silence_max, cancel: self.cancel };
        let reading = match Reading::open(from, limits) {
            Ok(reading) => reading,
            Err(why) => {
                let report = recorder.finish(End::Discarded, Some(&why));
                return Received::Discarded { why, report };
            }
        };
        let link = MeteredLink::new(&reading, &recorder);
        let mut connection = Connection::new(&link, self.cancel, self.options.silence_max);
        connection.reader.count(recorder.buffers());
        let mut taken = Vec::new();
        let ended = match self.greet(&mut connection, &recorder) {
            Ok((preface, Some(offer))) => {
                let then = |connection: &mut Connection<'_>, workers: &Receiving<'_, '_>| {
                    recorder.phase(Phase::Commit);
                    connection.check_cancel().map_err(NotStarted::GivenBack)?;
                    match after {
                        AfterLoad::Stop => Ok(()),
                        AfterLoad::Run => {
                            recorder.phase(Phase::Start);
                            self.start(connection, workers)
                        }
                    }
                };
                self.until_loaded(preface.id, &offer, &mut connection, None, &recorder, &mut taken, then)
            }
            Ok((_, None)) => {
                let why = "a question is not a saved stream".into();
                Err(connection.damaged(Damage::Misplaced { kind: Kind::QUERY, why }))
            }
            Err(why) => Err(why),
        };
        match ended {
            Ok(Ok(())) => match after {
                AfterLoad::Run => Received::Runs(recorder.finish(End::Runs, None)),
                AfterLoad::Stop => Received::Stopped(recorder.finish(End::Stopped, None)),
            },
            Err(why) => self.discarded(of_place(why, "reading it"), &mut connection, recorder, taken),
            Ok(Err(NotStarted::GivenBack(why))) => self.discarded(why, &mut connection, recorder, taken),
            Ok(Err(NotStarted::Stuck(why))) => {
                let report = recorder.finish(End::Broken, Some(&why));
                Received::Broken { why, report }
            }
        }
    }

    fn recorder(&self) -> Recorder<'a> {
        let names = self.devices.iter().map(|moved| moved.device.name().into());
        Recorder::new(Side::Destination, self.options, self.observer, names)
    }

    /// The prefaces, and what the source wants: a move, or with `None` an answer.
    fn greet(
        &self,
        connection: &mut Connection<'_>,
        recorder: &Recorder<'_>,
    ) -> Result<(Preface, Option<Offer>)> {
        let preface = connection.receive_preface()?;
        recorder.id(preface.id);
        if preface.flags.contains(PrefaceFlags::STORED) == connection.has_peer() {
            let what =
                if connection.has_peer() { "a saved stream over a link" } else { "a live stream in a file" };
            return Err(connection.damaged(Damage::Unknown { what: what.into() }));
        }
        if preface.flags.contains(PrefaceFlags::FURTHER) {
            let what = format!("a further link of move {}, which is not under way here", preface.id);
            return Err(connection.damaged(Damage::Unknown { what }));
        }
        if connection.has_peer() {
            connection.send_preface(preface.id, PrefaceFlags::empty())?;
        }
        let (header, payload) = connection.receive("waiting for the offer", self.options.load_max)?;
        match header.kind {
            Kind::QUERY => Ok((preface, None)),
            Kind::OFFER => match Offer::decode(payload) {
                Ok(offer) => {
                    connection.reader.decompress(offer.compression())?;
                    Ok((preface, Some(offer)))
                }
                Err(damage) => Err(connection.damaged(damage)),
            },
            kind => Err(connection.damaged(Damage::Misplaced { kind, why: "an OFFER is due".into() })),
        }
    }

    fn answer_query(
        &self,
        id: MigrationId,
        connection: &mut Connection<'_>,
        recorder: Recorder<'_>,
    ) -> Received {
        let decision = self.ledger.ask(id);
        let number: u32 = match decision {
            Decision::Unknown => 0,
            Decision::NotCommitted => 1,
            Decision::Committed => 2,
        };
        match connection.send(Kind::OUTCOME, 0, 0, &number.to_le_bytes()) {
            Ok(_) => Received::Answered { id, decision },
            Err(why) => {
                let report = recorder.finish(End::Discarded, Some(&why));
                Received::Discarded { why, report }
            }
        }
    }

    /// From the offer to devices that are loaded and in STOP, and then on, while the devices' threads are still there
    /// to drive them.
    #[expect(clippy::too_many_arguments, reason = "what a move consists of")]
    fn until_loaded<T>(
        &self,
        id: MigrationId,
        offer: &Offer,
        connection: &mut Connection<'_>,
        further: Option<&dyn FurtherLinks>,
        recorder: &Recorder<'_>,
        taken: &mut Vec<Taken>,
        then: impl FnOnce(&mut Connection<'_>, &Receiving<'_, '_>) -> T,
    ) -> Result<T> {
        tracing::debug!(%id, devices = offer.devices.len(), "offer");
        let accepted = connection.attend(|| self.accept(offer, recorder, taken));
        let most = if further.is_some() { self.options.links.get() } else { 1 };
        // Without credit nothing would bound what comes over one link ahead of what another brings.
        let links =
            if offer.needs.iter().any(|need| need == NEEDS_CREDIT) { offer.links.min(most) } else { 1 };
        if connection.has_peer() {
            let reasons = match &accepted {
                Ok(()) => Vec::new(),
                Err(Error::Incompatible { reasons }) => reasons.clone(),
                Err(error) => vec![error.to_string()],
            };
            let window = Some(receive::window(self.devices.len(), self.options));
            let answer = Answer { accepted: accepted.is_ok(), reasons, links, window };
            let payload = answer.encode().map_err(|damage| connection.damaged(damage))?;
            connection.send(Kind::ANSWER, 0, 0, &payload)?;
        }
        accepted?;
        let links = self.join(id, links, connection, further)?;
        recorder.phase(Phase::PreCopy);
        let streams: Vec<_> = taken.iter_mut().filter_map(|device| device.stream.take()).collect();
        let receiving = Receiving::new(
            Arc::clone(&connection.writer),
            offer,
            links.len() + 1,
            self.devices,
            streams,
            self.memory,
            recorder,
            self.options,
            self.cancel,
        )?;
        let links: Vec<_> = links.iter().map(|link| MeteredLink::new(&**link, recorder)).collect();
        let mut readers: Vec<_> =
            links.iter().map(|link| FrameReader::after_join(link, self.options.silence_max)).collect();
        for reader in &mut readers {
            reader.decompress(offer.compression())?;
            reader.count(recorder.buffers());
        }
        limosa_clockwork::scope(|scope| {
            let receiving = &receiving;
            let _end = OnDrop(|| receiving.end());
            for thread in 0..self.devices.len() {
                let name = format!("limosa: device work {thread}");
                scope.spawn(name, move || receiving.workers.work(thread, |at| receiving.attend(at)));
            }
            for (at, reader) in readers.iter_mut().enumerate() {
                let name = format!("limosa: link {}", at + 1);
                scope.spawn(name, move || receiving.read_further(reader));
            }
            match receiving.read_first(&mut connection.reader) {
                Ok(()) => Ok(then(connection, receiving)),
                Err(why) => Err(receiving.fail(why)),
            }
        })
    }

    /// Takes the further links of the move, in any order. One that is not of the move is closed, and another is
    /// waited for.
    fn join(
        &self,
        id: MigrationId,
        links: u32,
        connection: &Connection<'_>,
        further: Option<&dyn FurtherLinks>,
    ) -> Result<Vec<Box<dyn Link>>> {
        let Some(further) = further else { return Ok(Vec::new()) };
        let wait = Wait::within(self.options.silence_max, self.cancel);
        let mut joined: Vec<Option<Box<dyn Link>>> = (1..links).map(|_| None).collect();
        connection.attend(|| {
            while let Some(missing) = joined.iter().position(Option::is_none) {
                let link = further.next(wait).map_err(|error| {
                    tracing::debug!(link = missing + 1, "a further link does not come");
                    connection.link_failed(error, "waiting for a further link")
                })?;
                match self.greet_further(&*link, id) {
                    Ok(number) => match joined.get_mut(number as usize - 1) {
                        Some(place) if place.is_none() => *place = Some(link),
                        _ => tracing::warn!("link {number} of the move came twice or was not asked for"),
                    },
                    Err(error) => tracing::warn!("a link that is not of the move: {error}"),
                }
            }
            Ok(joined.into_iter().flatten().collect())
        })
    }

    /// The number of a further link, if it is of this move.
    fn greet_further(&self, link: &dyn Link, id: MigrationId) -> Result<u32> {
        let silence_max = self.options.silence_max;
        let mut connection = Connection::new(link, self.cancel, silence_max);
        let preface = connection.receive_preface()?;
        if preface.id != id || !preface.flags.contains(PrefaceFlags::FURTHER) {
            let what = format!("the id {} where {id} was expected", preface.id);
            return Err(connection.damaged(Damage::Unknown { what }));
        }
        let number = decode_u32(connection.expect(Kind::JOIN, "waiting for a link's number", silence_max)?);
        if number == 0 || number >= LINKS_MAX {
            let why = format!("link {number}, expected 1 to {}", LINKS_MAX - 1);
            return Err(connection.damaged(Damage::Content { kind: Kind::JOIN, why }));
        }
        Ok(number)
    }

    /// Compares, and opens a session on every device.
    fn accept(&self, offer: &Offer, recorder: &Recorder<'_>, taken: &mut Vec<Taken>) -> Result<()> {
        let here: Vec<DeviceFacts> = self
            .devices
            .iter()
            .enumerate()
            .map(|(at, moved)| cancel::check(self.cancel).and_then(|()| facts(at as u32, moved)))
            .collect::<Result<_>>()?;
        let memory: Vec<_> = self.memory.iter().map(MemoryRegion::facts).collect();
        let mut reasons = compare_devices(&offer.devices, &here);
        reasons.extend(compare_memory(&offer.memory, &memory));
        if !reasons.is_empty() {
            // A device without migration has no state that could be read.
            return Err(Error::Incompatible { reasons });
        }
        let mut found = Vec::new();
        for moved in self.devices {
            let device = moved.device;
            let state = device.state().map_err(|error| failed(device, "reading its state", error))?;
            if !matches!(state, State::Running | State::Stop) {
                let name = device.name();
                reasons.push(format!(
                    "{name}: it is in {state}, RUNNING or STOP is expected; is it in use? if not, reset it"
                ));
            }
            found.push(state);
        }
        if !reasons.is_empty() {
            return Err(Error::Incompatible { reasons });
        }
        taken.extend(found.into_iter().map(|found| Taken { found, stream: None }));
        let opened = each(self.devices, |at, device| {
            let _span = recorder.span(at, Act::Enter { state: State::Resuming });
            enter(device, State::Resuming)
        });
        for ((moved, taken), stream) in self.devices.iter().zip(taken).zip(opened) {
            taken.stream = Some(stream?.ok_or_else(|| Error::DeviceMisbehaved {
                device: moved.device.name().into(),
                what: "it entered RESUMING and gave no data stream".into(),
            })?);
        }
        Ok(())
    }

    /// READY, and the wait for COMMIT. When this fails the move must never run here.
    fn hold(&self, id: MigrationId, connection: &mut Connection<'_>) -> Result<()> {
        connection.check_cancel()?;
        connection.send(Kind::READY, 0, 0, &[])?;
        connection.expect(Kind::COMMIT, "holding for the commit", self.options.commit_max)?;
        match self.ledger.start(id) {
            Ok(true) => Ok(()),
            Ok(false) => Err(connection.damaged(decided_already("a COMMIT", id))),
            Err(error) => Err(not_recorded(error)),
        }
    }

    /// RUNNING, and the source's word that it has come.
    fn tell(&self, connection: &mut Connection<'_>) -> Result<()> {
        connection.send(Kind::RUNNING, 0, 0, &[])?;
        connection.expect(
            Kind::DONE,
            "waiting for the source to know that the devices run",
            self.options.commit_max,
        )?;
        Ok(())
    }

    /// Runs the devices: all to RUNNING_P2P, then all to RUNNING.
    fn start(&self, connection: &mut Connection<'_>, workers: &Receiving<'_, '_>) -> Result<(), NotStarted> {
        let p2p = |at| workers.flags(at).contains(MigrationFlags::P2P);
        let started = connection
            .attend(|| self.vmm.prepare())
            .map_err(|reason| Error::Vmm { doing: "run", reason })
            .and_then(|()| workers.enter(|at| p2p(at).then_some(State::RunningP2p)))
            .and_then(|()| workers.enter(|_| Some(State::Running)));
        let Err(why) = started else {
            self.vmm.start();
            return Ok(());
        };
        // The others are reset, so that none of them can ever run this guest.
        let never_runs = |at: usize, device: &dyn Device| !workers.was_asked(at) || device.reset().is_ok();
        match each(self.devices, never_runs).into_iter().all(|never| never) {
            true => Err(NotStarted::GivenBack(why)),
            false => Err(NotStarted::Stuck(why)),
        }
    }

    /// Discards what was loaded, and tells the source why.
    fn discarded(
        &self,
        why: Error,
        connection: &mut Connection<'_>,
        recorder: Recorder<'_>,
        taken: Vec<Taken>,
    ) -> Received {
        connection.ignore_cancel();
        if !taken.is_empty() {
            recorder.phase(Phase::Undo);
            let found: Vec<_> = taken.iter().map(|device| device.found).collect();
            drop(taken);
            for note in each(self.devices, |at, device| {
                let _span = recorder.span(at, Act::Reset);
                discard(device, found[at])
            })
            .into_iter()
            .flatten()
            {
                recorder.note(note);
            }
        }
        connection.abort(&why);
        tracing::info!("the move was discarded: {why}");
        let report = recorder.finish(End::Discarded, Some(&why));
        Received::Discarded { why, report }
    }
}

fn not_recorded(error: std::io::Error) -> Error {
    Error::Os { doing: "recording the move", error }
}

fn decided_already(what: &str, id: MigrationId) -> Damage {
    Damage::Unknown { what: format!("{what} of move {id}, which is decided already") }
}

/// Resets a device and returns it to the state where it was found; a note when it cannot.
fn discard(device: &dyn Device, found: State) -> Option<String> {
    let name = device.name();
    if let Err(error) = device.reset() {
        return Some(format!("{name} could not be reset and may still hold the source's state: {error}"));
    }
    match found {
        State::Stop => {
            device.set_state(State::Stop).err().map(|error| format!("{name} stays in RUNNING: {error}"))
        }
        _ => None,
    }
}
