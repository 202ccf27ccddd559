//! The side that devices come to, as a script: from the offer to RUNNING, or back to where it was, with everything
//! discarded that was loaded.

mod answer;
mod commit;
mod device_loader;
mod device_queue;
mod discard;
mod handshake;
mod receive;
mod snapshot;

use limosa_clockwork::Scope;
use limosa_stream::{MigrationId, Offer};

pub use snapshot::AfterLoad;

use crate::context::Context;
use crate::devices::MovedDevice;
use crate::error::guard;
use crate::ledger::{Decision, Ledger};
use crate::link::{FurtherLinks, Link};
use crate::memory::MemoryRegion;
use crate::protocol::limits::Limits;
use crate::report::{End, Phase, Report, Side};
use crate::transfer::team::OnDrop;
use crate::wire::{Connection, MeteredLink};
use crate::{Cancel, Error, Nobody, Observer, Options, Result, Vmm};
use commit::NotStarted;
use handshake::Greeting;
use receive::Receiving;

/// The side that devices come to.
#[derive(Clone)]
pub struct Destination<'a> {
    devices: &'a [MovedDevice<'a>],
    memory: &'a [MemoryRegion<'a>],
    vmm: &'a dyn Vmm,
    observer: &'a dyn Observer,
    options: &'a Options,
    cancel: Option<&'a Cancel>,
    ledger: &'a Ledger,
}

impl std::fmt::Debug for Destination<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Destination")
            .field("devices", &self.devices)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
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
    /// [`Report::unrecovered`] has the devices that could not be reset. They will never run this guest.
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

/// How the work of a move ended.
enum Ending {
    /// The devices are loaded, and in RUNNING or, from a snapshot, in STOP.
    Done,
    Discarded(Error),
    Broken(Error),
}

/// What comes after everything is loaded.
#[derive(Clone, Copy)]
enum Then {
    /// The commit of this move.
    Commit(MigrationId),
    /// The end of a snapshot.
    Loaded(AfterLoad),
}

impl<'a> Destination<'a> {
    /// Idle devices in RUNNING or STOP that are to become those of a source, in its order. The ledger remembers
    /// outcomes for sources in doubt: one for all that a process receives.
    pub fn new(devices: &'a [MovedDevice<'a>], ledger: &'a Ledger, options: &'a Options) -> Destination<'a> {
        let (vmm, observer) = (&Nobody, &Nobody);
        Destination { devices, memory: &[], vmm, observer, options, cancel: None, ledger }
    }

    /// With the guest's memory, region by region like the source's.
    #[must_use]
    pub fn with_memory(self, memory: &'a [MemoryRegion<'a>]) -> Destination<'a> {
        Destination { memory, ..self }
    }

    /// With the machine around the devices.
    #[must_use]
    pub fn with_vmm(self, vmm: &'a dyn Vmm) -> Destination<'a> {
        Destination { vmm, ..self }
    }

    /// With an observer.
    #[must_use]
    pub fn with_observer(self, observer: &'a dyn Observer) -> Destination<'a> {
        Destination { observer, ..self }
    }

    /// With a handle to call it off.
    #[must_use]
    pub fn with_cancel(self, cancel: Option<&'a Cancel>) -> Destination<'a> {
        Destination { cancel, ..self }
    }

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
        let context = self.context();
        let link = MeteredLink::new(link, &context.recorder);
        let connection = Connection::new(&link, Limits::new(self.options));
        context.recorder.phase(Phase::Handshake);
        let greeting = guard("the handshake", || self.greet(&context, &connection));
        let ending = match greeting {
            Ok(Greeting::Query(id)) => return self.answer_query(id, &connection, context),
            Ok(Greeting::Offer(id, offer)) => {
                self.run(&context, &connection, further, &offer, Then::Commit(id))
            }
            Err(why) => {
                connection.abort(&why);
                Ending::Discarded(why)
            }
        };
        let ending = match ending {
            Ending::Discarded(why) => Ending::Discarded(connection.part(why)),
            ending => ending,
        };
        ended(ending, context, End::Runs)
    }

    pub(crate) fn ledger(&self) -> &'a Ledger {
        self.ledger
    }

    pub(crate) fn context(&self) -> Context<'a> {
        Context::new(Side::Destination, self.devices, self.options, self.observer, self.cancel)
    }

    /// From the offer to the end: devices that run, or that are as they were. All threads that this takes are started
    /// before a device is touched.
    fn run(
        &self,
        context: &Context<'a>,
        connection: &Connection<'_>,
        further: Option<&dyn FurtherLinks>,
        offer: &Offer,
        then: Then,
    ) -> Ending {
        let receiving = guard("the destination", || {
            Receiving::new(context, connection, self.devices, self.memory, offer)
        });
        let receiving = match receiving {
            Ok(receiving) => receiving,
            Err(why) => {
                connection.abort(&why);
                return Ending::Discarded(why);
            }
        };
        limosa_clockwork::scope(|scope| {
            let receiving = &receiving;
            let _end = OnDrop(|| receiving.end());
            let accepted = guard("the destination", || {
                receiving.start(scope)?;
                self.accept(connection, receiving, offer, further)
            });
            let loaded = accepted.and_then(|links| {
                guard("the destination", || {
                    if let Some(further) = further.filter(|_| links > 1) {
                        receiving.expect_links(links);
                        self.start_further_links(scope, receiving, further, offer, then)?;
                    }
                    context.recorder.phase(Phase::PreCopy);
                    receiving.read_first(links)
                })
            });
            if let Err(error) = loaded {
                receiving.team.fail(error);
                let why = receiving.team.first_failure(Error::Cancelled);
                return self.discard(receiving, why);
            }
            match guard("the destination", || Ok(self.end_of(context, receiving, then))) {
                Ok(Ok(())) => Ending::Done,
                Ok(Err(NotStarted::GivenBack(why))) => self.discard(receiving, why),
                Ok(Err(NotStarted::Stuck(why))) | Err(why) => Ending::Broken(why),
            }
        })
    }

    /// What follows when all is loaded.
    fn end_of(
        &self,
        context: &Context<'a>,
        receiving: &Receiving<'_, 'a>,
        then: Then,
    ) -> Result<(), NotStarted> {
        context.recorder.phase(Phase::Commit);
        match then {
            Then::Commit(id) => self.commit(id, context, receiving),
            Then::Loaded(after) => self.end_load(after, context, receiving),
        }
    }

    /// Starts the thread that takes further links, and with them the threads that read them.
    fn start_further_links<'scope>(
        &self,
        scope: Scope<'scope, '_>,
        receiving: &'scope Receiving<'_, 'a>,
        further: &'scope dyn FurtherLinks,
        offer: &'scope Offer,
        then: Then,
    ) -> Result<()> {
        let Then::Commit(id) = then else { return Ok(()) };
        receiving.team.spawn(scope, "further links".into(), move || receiving.join(scope, id, further, offer))
    }
}

/// The report of a move that has ended.
fn ended(ending: Ending, context: Context<'_>, done: End) -> Received {
    let recorder = context.recorder;
    match ending {
        Ending::Done if done == End::Stopped => Received::Stopped(recorder.finish(End::Stopped, None)),
        Ending::Done => Received::Runs(recorder.finish(End::Runs, None)),
        Ending::Discarded(why) => {
            tracing::info!("the move was discarded: {why}");
            let report = recorder.finish(End::Discarded, Some(&why));
            Received::Discarded { why, report }
        }
        Ending::Broken(why) => {
            let report = recorder.finish(End::Broken, Some(&why));
            Received::Broken { why, report }
        }
    }
}
