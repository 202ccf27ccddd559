//! The destination's script: from the offer to RUNNING, or back to where it was, with all discarded
//! that was loaded.

use std::sync::atomic::{AtomicBool, Ordering};

use limosa_client::{DataStream, Device, DeviceExt};
use limosa_protocol::{MigrationFlags, State};

use crate::channel::Channel;
use crate::devices::{MovedDevice, compare_devices, compare_memory, each, enter, facts, failed};
use crate::ledger::{Decision, Ledger};
use crate::link::{Link, MeteredLink};
use crate::memory::MemoryRegion;
use crate::report::{Act, Phase, Recorder, Report, Side};
use crate::snapshot::{Limits, Reading, SnapshotSource, of_place};
use crate::stream::{
    Answer, Damage, DeviceFacts, Kind, MigrationId, Offer, Order, Preface, PrefaceFlags, Step,
};
use crate::{Cancel, Error, Observer, Options, Result, Round, Vmm};

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
        let recorder = self.recorder();
        let link = MeteredLink::new(link, &recorder);
        let mut channel = Channel::new(&link, self.cancel, self.options.silence_max);
        let mut taken = Vec::new();
        recorder.phase(Phase::Handshake);
        let (preface, offer) = match self.greet(&mut channel, &recorder) {
            Ok((preface, Some(offer))) => (preface, offer),
            Ok((preface, None)) => return self.answer_query(preface.id, &mut channel, recorder),
            Err(why) => return self.discarded(why, &mut channel, recorder, taken),
        };
        let loaded = self.until_ready(preface.id, &offer, &mut channel, &recorder, &mut taken);
        if let Err(why) = loaded {
            return self.discarded(why, &mut channel, recorder, taken);
        }
        recorder.phase(Phase::Commit);
        let why = match self.ledger.hold(preface.id) {
            Ok(true) => None,
            Ok(false) => Some(channel.damaged(decided_already("an id", preface.id))),
            Err(error) => Some(not_recorded(error)),
        };
        if let Some(why) = why {
            return self.discarded(why, &mut channel, recorder, taken);
        }
        if let Err(why) = self.hold(preface.id, &mut channel) {
            self.ledger.not_committed(preface.id);
            return self.discarded(why, &mut channel, recorder, taken);
        }
        channel.ignore_cancel();
        recorder.phase(Phase::Start);
        match self.start(&mut channel, &recorder) {
            Ok(()) => {
                self.ledger.committed(preface.id);
                recorder.runs();
                if let Err(error) = self.tell(&mut channel) {
                    recorder.peer_not_told();
                    recorder
                        .note(format!("the source may not know that the devices run, and may ask: {error}"));
                }
                Received::Runs(recorder.finish())
            }
            Err(NotStarted::GivenBack(why)) => {
                self.ledger.not_committed(preface.id);
                self.discarded(why, &mut channel, recorder, taken)
            }
            Err(NotStarted::Stuck(why)) => {
                self.ledger.committed(preface.id);
                Received::Broken { why, report: recorder.finish() }
            }
        }
    }

    /// Loads a snapshot from a place, such as a [`SnapshotFile`](crate::SnapshotFile). All of it is checked before a
    /// device is touched, and once more while it is read for the devices.
    pub fn load(&self, from: &dyn SnapshotSource, after: AfterLoad) -> Received {
        let recorder = self.recorder();
        recorder.phase(Phase::Handshake);
        let limits = Limits { silence_max: self.options.silence_max, cancel: self.cancel };
        let reading = match Reading::open(from, limits) {
            Ok(reading) => reading,
            Err(why) => return Received::Discarded { why, report: recorder.finish() },
        };
        let link = MeteredLink::new(&reading, &recorder);
        let mut channel = Channel::new(&link, self.cancel, self.options.silence_max);
        let mut taken = Vec::new();
        let loaded = match self.greet(&mut channel, &recorder) {
            Ok((preface, Some(offer))) => {
                self.until_ready(preface.id, &offer, &mut channel, &recorder, &mut taken)
            }
            Ok((_, None)) => {
                let why = "a question is not a saved stream".into();
                Err(channel.damaged(Damage::Misplaced { kind: Kind::QUERY, why }))
            }
            Err(why) => Err(why),
        };
        if let Err(why) = loaded {
            return self.discarded(of_place(why, "reading it"), &mut channel, recorder, taken);
        }
        if after == AfterLoad::Stop {
            return Received::Stopped(recorder.finish());
        }
        recorder.phase(Phase::Start);
        match self.start(&mut channel, &recorder) {
            Ok(()) => Received::Runs(recorder.finish()),
            Err(NotStarted::GivenBack(why)) => self.discarded(why, &mut channel, recorder, taken),
            Err(NotStarted::Stuck(why)) => Received::Broken { why, report: recorder.finish() },
        }
    }

    fn recorder(&self) -> Recorder<'a> {
        let names = self.devices.iter().map(|moved| moved.device.name().into());
        Recorder::new(Side::Destination, self.options, self.observer, names)
    }

    /// The prefaces, and what the source wants: a move, or with `None` an answer.
    fn greet(&self, channel: &mut Channel<'_>, recorder: &Recorder<'_>) -> Result<(Preface, Option<Offer>)> {
        let preface = channel.receive_preface()?;
        recorder.id(preface.id);
        if preface.flags.contains(PrefaceFlags::STORED) == channel.has_peer() {
            let what =
                if channel.has_peer() { "a saved stream over a link" } else { "a live stream in a file" };
            return Err(channel.damaged(Damage::Unknown { what: what.into() }));
        }
        if channel.has_peer() {
            channel.send_preface(preface.id, PrefaceFlags::empty())?;
        }
        let (header, payload) = channel.receive("waiting for the offer", Some(self.options.load_max))?;
        match header.kind {
            Kind::QUERY => Ok((preface, None)),
            Kind::OFFER => match Offer::decode(payload) {
                Ok(offer) => Ok((preface, Some(offer))),
                Err(damage) => Err(channel.damaged(damage)),
            },
            kind => Err(channel.damaged(Damage::Misplaced { kind, why: "an OFFER is due".into() })),
        }
    }

    fn answer_query(&self, id: MigrationId, channel: &mut Channel<'_>, recorder: Recorder<'_>) -> Received {
        let decision = self.ledger.ask(id);
        let number: u32 = match decision {
            Decision::Unknown => 0,
            Decision::NotCommitted => 1,
            Decision::Committed => 2,
        };
        match channel.send(Kind::OUTCOME, 0, 0, &number.to_le_bytes()) {
            Ok(_) => Received::Answered { id, decision },
            Err(why) => Received::Discarded { why, report: recorder.finish() },
        }
    }

    /// From the offer to devices that are loaded and in STOP.
    fn until_ready(
        &self,
        id: MigrationId,
        offer: &Offer,
        channel: &mut Channel<'_>,
        recorder: &Recorder<'_>,
        taken: &mut Vec<Taken>,
    ) -> Result<()> {
        tracing::debug!(%id, devices = offer.devices.len(), "offer");
        let accepted = channel.attend(|| self.accept(offer, recorder, taken));
        if channel.has_peer() {
            let answer = match &accepted {
                Ok(()) => Answer { accepted: true, reasons: Vec::new() },
                Err(Error::Incompatible { reasons }) => Answer { accepted: false, reasons: reasons.clone() },
                Err(error) => Answer { accepted: false, reasons: vec![error.to_string()] },
            };
            let payload = answer.encode().map_err(|damage| channel.damaged(damage))?;
            channel.send(Kind::ANSWER, 0, 0, &payload)?;
        }
        accepted?;
        recorder.phase(Phase::PreCopy);
        self.take_frames(offer, channel, recorder, taken)?;
        recorder.phase(Phase::Load);
        let stopped = channel.attend(|| {
            each(self.devices, |at, device| {
                let _span = recorder.span(at, Act::Enter { state: State::Stop });
                enter(device, State::Stop)
            })
        });
        stopped.into_iter().collect::<Result<Vec<_>>>()?;
        taken.iter_mut().for_each(|device| device.stream = None);
        Ok(())
    }

    /// Compares, and opens a session on every device.
    fn accept(&self, offer: &Offer, recorder: &Recorder<'_>, taken: &mut Vec<Taken>) -> Result<()> {
        let here: Vec<DeviceFacts> = self
            .devices
            .iter()
            .enumerate()
            .map(|(at, moved)| facts(at as u32, moved))
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

    /// Everything from the first frame to SUM. What is out of order never reaches a device.
    fn take_frames(
        &self,
        offer: &Offer,
        channel: &mut Channel<'_>,
        recorder: &Recorder<'_>,
        taken: &mut [Taken],
    ) -> Result<()> {
        let mut order = Order::new(offer);
        // Regions are matched by id, and lie in the same order nowhere but in the offer.
        let region = |at: usize| self.memory.iter().find(|region| region.id == offer.memory[at].id);
        let has_peer = channel.has_peer();
        while !order.is_whole() {
            let (header, payload) = channel.receive("waiting for the source's data", None)?;
            let step = match order.next(&header, payload) {
                Ok(step) => step,
                Err(damage) => return Err(channel.damaged(damage)),
            };
            match step {
                Step::DeviceData(at, data) => {
                    let device = self.devices[at].device;
                    let Some(stream) = &mut taken[at].stream else { continue };
                    let mut span = recorder.span(at, Act::Load);
                    stream.write(data).map_err(|error| failed(device, "loading its data", error))?;
                    span.bytes(data.len() as u64);
                    drop(span);
                    recorder.device_data(at, data.len() as u64);
                }
                Step::MemoryData(at, offset, pages) => {
                    if let Some(region) = region(at) {
                        region.pages.write(offset, pages).map_err(|error| region.failed(offset, error))?;
                    }
                    recorder.memory_data(pages.len() as u64);
                }
                Step::MemoryZero(at, offset, bytes) => {
                    if let Some(region) = region(at) {
                        region.pages.zero(offset, bytes).map_err(|error| region.failed(offset, error))?;
                    }
                    recorder.memory_zero(bytes);
                }
                Step::Round(round, dirty_bytes) => {
                    recorder.round(&Round { round, memory_dirty_bytes: dirty_bytes, ..Round::default() });
                }
                Step::Flush if has_peer => channel.send(Kind::FLUSHED, 0, 0, &[]).map(drop)?,
                Step::Flush => {}
                Step::Stopped => {
                    recorder.phase(Phase::StopCopy);
                    recorder.stop();
                }
                Step::DeviceBegin(_) | Step::DeviceHint(..) | Step::DeviceEnd(_) => {}
                Step::Sum | Step::Sealed(_) | Step::Commit | Step::Skipped => {}
            }
        }
        Ok(())
    }

    /// READY, and the wait for COMMIT. When this fails the move must never run here.
    fn hold(&self, id: MigrationId, channel: &mut Channel<'_>) -> Result<()> {
        channel.check_cancel()?;
        channel.send(Kind::READY, 0, 0, &[])?;
        channel.expect(Kind::COMMIT, "holding for the commit", self.options.commit_max)?;
        match self.ledger.start(id) {
            Ok(true) => Ok(()),
            Ok(false) => Err(channel.damaged(decided_already("a COMMIT", id))),
            Err(error) => Err(not_recorded(error)),
        }
    }

    /// RUNNING, and the source's word that it has come.
    fn tell(&self, channel: &mut Channel<'_>) -> Result<()> {
        channel.send(Kind::RUNNING, 0, 0, &[])?;
        channel.expect(
            Kind::DONE,
            "waiting for the source to know that the devices run",
            self.options.commit_max,
        )?;
        Ok(())
    }

    /// Runs the devices: all to RUNNING_P2P, then all to RUNNING.
    fn start(&self, channel: &mut Channel<'_>, recorder: &Recorder<'_>) -> Result<(), NotStarted> {
        // A device that was never asked to run stays in STOP, also when it can no longer be reached.
        let asked: Vec<_> = self.devices.iter().map(|_| AtomicBool::new(false)).collect();
        let run = |at: usize, device: &dyn Device, state: State| {
            asked[at].store(true, Ordering::Relaxed);
            let _span = recorder.span(at, Act::Enter { state });
            enter(device, state).map(drop)
        };
        let started: Result<()> =
            self.vmm.prepare().map_err(|reason| Error::Vmm { doing: "run", reason }).and_then(|()| {
                channel.attend(|| {
                    let flags = each(self.devices, |_, device| {
                        device.migration_flags().map_err(|error| failed(device, "reading its flags", error))
                    });
                    let flags = flags.into_iter().collect::<Result<Vec<_>>>()?;
                    let quiesced =
                        each(self.devices, |at, device| match flags[at].contains(MigrationFlags::P2P) {
                            true => run(at, device, State::RunningP2p),
                            false => Ok(()),
                        });
                    quiesced.into_iter().collect::<Result<()>>()?;
                    each(self.devices, |at, device| run(at, device, State::Running)).into_iter().collect()
                })
            });
        let Err(why) = started else {
            self.vmm.start();
            return Ok(());
        };
        // The others are reset, so that none of them can ever run this guest.
        let never_runs =
            |at: usize, device: &dyn Device| !asked[at].load(Ordering::Relaxed) || device.reset().is_ok();
        match each(self.devices, never_runs).into_iter().all(|never| never) {
            true => Err(NotStarted::GivenBack(why)),
            false => Err(NotStarted::Stuck(why)),
        }
    }

    /// Discards what was loaded, and tells the source why.
    fn discarded(
        &self,
        why: Error,
        channel: &mut Channel<'_>,
        recorder: Recorder<'_>,
        taken: Vec<Taken>,
    ) -> Received {
        channel.ignore_cancel();
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
        channel.abort(&why);
        tracing::info!("the move was discarded: {why}");
        Received::Discarded { why, report: recorder.finish() }
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
