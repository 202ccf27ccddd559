//! [`Source`]: the side that sends devices, as a script of handshake, pre-copy, switchover and commit. A failure before
//! the commit leads back to the start.

mod commit;
mod doubt;
mod handshake;
mod note;
mod precopy;
mod rollback;
mod save;
mod switchover;

use std::sync::Arc;

use limosa_clockwork::{Monitor, Scope};
use limosa_stream::{Kind, PrefaceFlags, Proofs};

pub use doubt::InDoubt;
pub use note::CommitNote;
pub use save::AfterSave;

use crate::context::Context;
use crate::devices::MovedDevice;
use crate::error::guard;
use crate::link::{FurtherLinks, Link};
use crate::memory::Memory;
use crate::protocol::commit::Uncommitted;
use crate::protocol::limits::Limits;
use crate::report::{End, Phase, Report, Side};
use crate::transfer::device_sender::{DeviceSender, StopHarvest};
use crate::transfer::ram::Ram;
use crate::transfer::sending::{Sending, Terms};
use crate::transfer::team::OnDrop;
use crate::wire::{Connection, Frame, FrameWriter, MeteredLink};
use crate::{Cancel, Error, Nobody, Observer, Options, Result, Vmm};
use handshake::Agreed;
use rollback::Rollback;
use save::Saving;

/// The side that devices leave. One move or one save consumes it, so that a guest that was moved is not sent a second time.
#[must_use = "it does nothing until it is sent or saved"]
pub struct Source<'a> {
    devices: &'a [MovedDevice<'a>],
    memory: Memory<'a>,
    vmm: &'a dyn Vmm,
    observer: &'a dyn Observer,
    options: &'a Options,
    cancel: Option<&'a Cancel>,
}

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source")
            .field("devices", &self.devices)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

/// How a move ended, on the source.
#[derive(Debug)]
#[must_use]
pub enum Outcome {
    /// The destination runs, or has everything and stays stopped as the source was ([`Received::Stopped`]), or the snapshot
    /// was published. After a move the source's devices are in STOP and must not run this guest again.
    ///
    /// [`Received::Stopped`]: crate::Received::Stopped
    Moved(Report),
    /// The move failed or was cancelled, and the source is as before: its devices run, with their dirty log complete.
    /// [`Report::unrecovered`] lists the devices that could not be brought back.
    Undone {
        /// The reason.
        why: Error,
        /// How far the move came.
        report: Report,
    },
    /// The link failed at the commit, and the destination may run. The source stays stopped until [`Source::resolve`] has
    /// asked the destination. Of a save: see [`Source::save`].
    InDoubt(InDoubt),
}

/// How the work of a move ended.
enum Ending {
    Moved,
    Undone(Error),
    Doubt(Error),
}

impl<'a> Source<'a> {
    /// A source of these devices, which are in RUNNING or STOP, without memory.
    ///
    /// The destination learns which devices are in STOP, and by default leaves them so
    /// ([`AfterLoad::AsFound`](crate::AfterLoad::AsFound)). An earlier move also leaves its source's devices in STOP,
    /// while the guest runs elsewhere; only the caller can tell the two cases apart.
    pub fn new(devices: &'a [MovedDevice<'a>], options: &'a Options) -> Source<'a> {
        let memory = Memory::default();
        Source { devices, memory, vmm: &Nobody, observer: &Nobody, options, cancel: None }
    }

    /// Adds the guest's memory.
    pub fn with_memory(self, memory: Memory<'a>) -> Source<'a> {
        Source { memory, ..self }
    }

    /// Sets the hooks of the machine around the devices.
    pub fn with_vmm(self, vmm: &'a dyn Vmm) -> Source<'a> {
        Source { vmm, ..self }
    }

    /// Sets an observer.
    pub fn with_observer(self, observer: &'a dyn Observer) -> Source<'a> {
        Source { observer, ..self }
    }

    /// Sets a handle that cancels the move.
    pub fn with_cancel(self, cancel: Option<&'a Cancel>) -> Source<'a> {
        Source { cancel, ..self }
    }

    /// Moves everything over the link. Blocks until the move has ended.
    pub fn send(mut self, link: &dyn Link) -> Outcome {
        self.move_over(link, None)
    }

    /// Moves everything over the link and further links: as many as [`Options::links`] allows, the destination accepts,
    /// and `further` can make. Blocks until the move has ended.
    pub fn send_over(mut self, link: &dyn Link, further: &dyn FurtherLinks) -> Outcome {
        self.move_over(link, Some(further))
    }

    pub(crate) fn move_over(&mut self, link: &dyn Link, further: Option<&dyn FurtherLinks>) -> Outcome {
        let context = self.context();
        let link = MeteredLink::new(link, &context.recorder);
        let connection = Connection::new(&link, Limits::new(self.options));
        let mut rollback = Rollback::default();
        let (note, ending) = self.run(&context, &connection, further, &mut rollback, None);
        match ending {
            Ending::Moved => Outcome::Moved(context.recorder.finish(End::Moved, None)),
            Ending::Undone(why) => {
                tracing::info!("the move was undone: {why}");
                let report = context.recorder.finish(End::Undone, Some(&why));
                Outcome::Undone { why, report }
            }
            Ending::Doubt(why) => {
                tracing::error!(id = %note.id, "in doubt whether the destination runs: {why}");
                let report = context.recorder.finish(End::InDoubt, Some(&why));
                Outcome::InDoubt(InDoubt::new(note, why, report, rollback, self))
            }
        }
    }

    pub(crate) fn context(&self) -> Context<'a> {
        Context::new(Side::Source, self.devices, self.options, self.observer, self.cancel)
    }

    /// A move, or a save to a place: from the handshake to the end, or back. When this returns [`Ending::Undone`], the guest
    /// runs as before.
    fn run(
        &mut self,
        context: &Context<'a>,
        connection: &Connection<'_>,
        further: Option<&dyn FurtherLinks>,
        rollback: &mut Rollback,
        saving: Option<&mut Saving<'_>>,
    ) -> (CommitNote, Ending) {
        let recorder = &context.recorder;
        connection.reader().count(recorder.buffers());
        connection.writer.compress(self.options.compress, recorder.buffers());
        recorder.phase(Phase::Handshake);
        let agreed = guard("the handshake", || self.handshake(context, connection, further, rollback));
        let Agreed { note, terms, links, proofs } = match agreed {
            Ok(agreed) => agreed,
            Err(why) => return (CommitNote::default(), Ending::Undone(tell(why, connection))),
        };
        let links: Vec<_> = links.iter().map(|link| MeteredLink::new(&**link, recorder)).collect();
        let silence_max = self.options.silence_max;
        let writers: Vec<_> = links.iter().map(|link| FrameWriter::new(link, silence_max)).collect();
        writers.iter().for_each(|writer| writer.compress(self.options.compress, recorder.buffers()));
        let wires = Wires { note: &note, connection, writers: &writers, terms, proofs: &proofs };
        let ending = match self.work(context, &wires, rollback, saving) {
            // While all links are open: the destination hears the reason, and not that a link is closed.
            Ending::Undone(why) => Ending::Undone(tell(why, connection)),
            ending => ending,
        };
        (note, ending)
    }

    /// The part after the handshake: starts the logs and all threads, and continues in [`Source::script`].
    fn work(
        &mut self,
        context: &Context<'a>,
        wires: &Wires<'_, '_>,
        rollback: &mut Rollback,
        saving: Option<&mut Saving<'_>>,
    ) -> Ending {
        rollback.touched = true;
        if let Err(why) = wires.join(self.cancel).and_then(|()| self.start_logs(context, rollback)) {
            context.recorder.phase(Phase::Undo);
            self.roll_back(context, rollback, None);
            return Ending::Undone(why);
        }
        let (regions, pages) = (self.memory.regions.clone(), Arc::clone(&rollback.logs.pages));
        let proofs = wires.proofs.clone();
        let sending = match Sending::new(context, wires.all(), self.devices.len(), wires.terms, proofs) {
            Ok(sending) => sending,
            Err(why) => {
                context.recorder.phase(Phase::Undo);
                self.roll_back(context, rollback, None);
                return Ending::Undone(why);
            }
        };
        let ram = Ram::new(&regions, &pages.pending, &sending);
        let devices = self.devices.iter().enumerate().zip(&rollback.found);
        let log = |at| rollback.logs.of_device(at).map(|log| StopHarvest { pages: Arc::clone(&pages), log });
        let senders: Vec<_> = devices
            .map(|((at, moved), found)| Monitor::new(DeviceSender::new(at, moved, *found, &sending, log(at))))
            .collect();
        limosa_clockwork::scope(|scope| {
            let _end = OnDrop(|| {
                sending.team.end();
                sending.workers.end();
                sending.alive.end();
            });
            if let Err(why) = start(scope, &sending, &senders, &ram, wires.connection) {
                context.recorder.phase(Phase::Undo);
                self.roll_back(context, rollback, None);
                return Ending::Undone(why);
            }
            sending.workers.assemble();
            self.script(context, &Stage { sending: &sending, ram: &ram, wires }, rollback, saving)
        })
    }

    /// The move itself, once all its threads have started. They serve the stop, the rollback and the end as well.
    fn script(
        &mut self,
        context: &Context<'a>,
        stage: &Stage<'_, '_, '_>,
        rollback: &mut Rollback,
        saving: Option<&mut Saving<'_>>,
    ) -> Ending {
        let ready = guard("the source", || self.until_ready(context, stage, rollback));
        if let Err(error) = ready {
            stage.sending.team.fail(error);
            let why = stage.sending.team.first_failure(Error::Cancelled);
            context.recorder.phase(Phase::Undo);
            self.roll_back(context, rollback, Some(stage.sending));
            return Ending::Undone(why);
        }
        if let Some(saving) = saving {
            return self.keep(context, stage, rollback, saving);
        }
        match self.commit(context, stage, rollback) {
            Ok(()) => {
                self.finish(context, rollback, Some(stage.sending));
                Ending::Moved
            }
            Err(Uncommitted::Off(why)) => {
                context.recorder.phase(Phase::Undo);
                self.roll_back(context, rollback, Some(stage.sending));
                Ending::Undone(why)
            }
            Err(Uncommitted::Doubt(why)) => Ending::Doubt(why),
        }
    }

    /// Everything between the handshake and READY.
    fn until_ready(
        &mut self,
        context: &Context<'a>,
        stage: &Stage<'_, '_, '_>,
        rollback: &mut Rollback,
    ) -> Result<()> {
        let recorder = &context.recorder;
        recorder.phase(Phase::PreCopy);
        let pace = self.precopy(context, stage, rollback)?;
        let quiesces = self.quiesces(rollback)?;
        recorder.phase(Phase::Stop);
        self.stop(stage, &quiesces, rollback)?;
        recorder.phase(Phase::StopCopy);
        self.last_pages(context, stage, rollback, &pace)?;
        stage.ram.send_round(stage.sending)?;
        stage.sending.wait_all()?;
        recorder.phase(Phase::Load);
        stage.sending.finish(&recorder.totals().encode())?;
        recorder.check()
    }

    fn start_logs(&mut self, context: &Context<'a>, rollback: &mut Rollback) -> Result<()> {
        let mut notes = Vec::new();
        let started = guard("starting the dirty log", || {
            rollback.logs.start(self.devices, &mut self.memory, &mut notes, self.cancel)
        });
        notes.into_iter().for_each(|note| context.recorder.note(note));
        started
    }
}

/// The links of a move on which both sides have agreed.
struct Wires<'w, 'a> {
    note: &'w CommitNote,
    connection: &'w Connection<'a>,
    /// The writers of the further links, which are numbered from 1.
    writers: &'w [FrameWriter<'a>],
    /// `None` if no peer answers.
    terms: Option<Terms>,
    proofs: &'w Proofs,
}

impl<'w, 'a> Wires<'w, 'a> {
    /// The writers of all links, by number.
    fn all(&self) -> Vec<&'w FrameWriter<'a>> {
        std::iter::once(&self.connection.writer).chain(self.writers).collect()
    }

    /// Sends the preface and JOIN over each further link.
    fn join(&self, cancel: Option<&Cancel>) -> Result<()> {
        for (writer, number) in self.writers.iter().zip(1_u32..) {
            writer.preface(self.note.id, PrefaceFlags::FURTHER, cancel)?;
            let join = self.proofs.prove(Kind::JOIN, &number.to_le_bytes());
            writer.send(&Frame::new(Kind::JOIN, &join), cancel)?;
        }
        Ok(())
    }
}

/// The objects that every stage of a move uses.
struct Stage<'s, 'w, 'a> {
    sending: &'s Sending<'w, 'a>,
    ram: &'s Ram<'s>,
    wires: &'s Wires<'w, 'a>,
}

/// Starts all threads of a source.
fn start<'scope, 'w, 'a>(
    scope: Scope<'scope, '_>,
    sending: &'scope Sending<'w, 'a>,
    senders: &'scope [Monitor<DeviceSender<'w, 'a>>],
    ram: &'scope Ram<'_>,
    connection: &'scope Connection<'_>,
) -> Result<()> {
    let team = &sending.team;
    let interval = connection.limits().keep_alive;
    team.spawn(scope, "keep-alive".into(), move || {
        sending.alive.run(team, &sending.writers, interval, || sending.most_left(ram.left()));
        Ok(())
    })?;
    if sending.has_peer() {
        team.spawn(scope, "listener".into(), move || sending.listen(connection))?;
    }
    for thread in 0..senders.len() {
        team.spawn(scope, format!("device worker {thread}"), move || {
            sending.workers.work(thread, |at| senders[at].lock().run());
            Ok(())
        })?;
    }
    for (at, ahead) in sending.ahead.iter().enumerate() {
        team.spawn(scope, format!("device link {at}"), move || ahead.send(at, sending))?;
    }
    for link in 1..sending.writers.len() {
        team.spawn(scope, format!("link {link}"), move || ram.work(link, sending))?;
    }
    Ok(())
}

/// Tells the destination why the move is off; where a link has failed, the destination's own reason is the better one.
fn tell(why: Error, connection: &Connection<'_>) -> Error {
    connection.abort(&why);
    connection.part(why)
}
