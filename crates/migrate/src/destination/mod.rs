//! [`Destination`]: the side that receives devices, as a script from the offer to RUNNING. A failure discards
//! everything that was loaded and leads back to the start.

pub(crate) mod answer;
mod commit;
mod device_loader;
mod device_queue;
mod discard;
mod further_links;
pub(crate) mod handshake;
pub(crate) mod opening;
mod receive;
mod receiving;
mod snapshot;

use limosa_clockwork::Scope;
use limosa_stream::{MigrationId, Offer, Proofs};

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
use answer::Asked;
use commit::NotStarted;
use handshake::{Greeting, proofs};
use receiving::Receiving;

/// The side to which devices come. One move or one load consumes it, so that devices that run a guest are not offered to a
/// second source. After [`Received::Runs`] and [`Received::Broken`] a process only answers ([`Ledger::answer`],
/// [`Acceptor`](crate::Acceptor)).
#[must_use = "it does nothing until it receives or loads"]
pub struct Destination<'a> {
    devices: &'a [MovedDevice<'a>],
    memory: &'a [MemoryRegion<'a>],
    vmm: &'a dyn Vmm,
    observer: &'a dyn Observer,
    options: &'a Options,
    cancel: Option<&'a Cancel>,
    ledger: &'a Ledger,
    after: AfterLoad,
}

impl std::fmt::Debug for Destination<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Destination")
            .field("devices", &self.devices)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

/// How a move, a load or a query ended, on the destination.
#[derive(Debug)]
#[must_use]
pub enum Received {
    /// The devices run here.
    Runs(Report),
    /// Everything was received and committed, and all devices stay in STOP: they were in STOP at the source or when
    /// they were saved, or the caller asked for that ([`AfterLoad`]). The vCPUs were not started.
    Stopped(Report),
    /// The move failed or was cancelled. Everything that was loaded is discarded: every device was reset, and returned to
    /// the state (RUNNING or STOP) in which it was found. Memory stays as it was written. [`Report::unrecovered`] lists the
    /// devices that could not be reset. They will never run this guest.
    Discarded {
        /// Why.
        why: Error,
        /// How far it came.
        report: Report,
    },
    /// After the commit the devices could neither be started nor be reset. The guest may run only here, and needs a person's
    /// attention.
    Broken {
        /// Why.
        why: Error,
        /// How far it came.
        report: Report,
    },
    /// There was no move: a source in doubt asked, proved that it is that move's source, and received an answer. Or any
    /// peer asked about a move that is unknown here.
    Answered {
        /// The move that it asked about.
        id: MigrationId,
        /// The answer.
        decision: Decision,
    },
}

/// How the work of a move ended.
enum Ending {
    /// The devices are loaded, and in RUNNING ([`End::Runs`]) or in STOP ([`End::Stopped`]).
    Done(End),
    Discarded(Error),
    Broken(Error),
}

/// The step after everything is loaded.
#[derive(Clone, Copy)]
enum Then {
    /// The commit of this move.
    Commit(MigrationId),
    /// The end of a snapshot.
    Loaded(AfterLoad),
}

impl<'a> Destination<'a> {
    /// A destination of these devices, which are idle, in RUNNING or STOP, and in the source's order. The ledger remembers
    /// outcomes for sources in doubt. Use one ledger for all moves that a process receives.
    pub fn new(devices: &'a [MovedDevice<'a>], ledger: &'a Ledger, options: &'a Options) -> Destination<'a> {
        let (vmm, observer) = (&Nobody, &Nobody);
        let after = AfterLoad::default();
        Destination { devices, memory: &[], vmm, observer, options, cancel: None, ledger, after }
    }

    /// Sets the guest's memory: the same regions as the source's.
    pub fn with_memory(self, memory: &'a [MemoryRegion<'a>]) -> Destination<'a> {
        Destination { memory, ..self }
    }

    /// Sets the hooks of the machine around the devices.
    pub fn with_vmm(self, vmm: &'a dyn Vmm) -> Destination<'a> {
        Destination { vmm, ..self }
    }

    /// Sets an observer.
    pub fn with_observer(self, observer: &'a dyn Observer) -> Destination<'a> {
        Destination { observer, ..self }
    }

    /// Sets a handle that cancels the move.
    pub fn with_cancel(self, cancel: Option<&'a Cancel>) -> Destination<'a> {
        Destination { cancel, ..self }
    }

    /// Sets what becomes of the devices that are received. By default each returns to the state that it had at the
    /// source.
    pub fn with_after(self, after: AfterLoad) -> Destination<'a> {
        Destination { after, ..self }
    }

    /// Receives one move, or answers one query, over the link. Blocks until that has ended. The source must have sent its
    /// whole OFFER or QUERY within [`Options::silence_max`].
    pub fn receive(self, link: &dyn Link) -> Received {
        self.receive_move(link, None)
    }

    /// Receives one move, or answers one query, over the link and further links. Their number is the smaller of the
    /// source's offer and [`Options::links`]. Blocks until the move has ended.
    ///
    /// A further link belongs to the move if its preface has the id of the move, and its JOIN proves that. Other links are
    /// closed.
    pub fn receive_over(self, link: &dyn Link, further: &dyn FurtherLinks) -> Received {
        self.receive_move(link, Some(further))
    }

    pub(crate) fn receive_move(&self, link: &dyn Link, further: Option<&dyn FurtherLinks>) -> Received {
        let context = self.context();
        let link = MeteredLink::new(link, &context.recorder);
        let connection = Connection::new(&link, Limits::new(self.options));
        context.recorder.phase(Phase::Handshake);
        let greeting = guard("the handshake", || self.greet(&context, &connection));
        let ending = match greeting {
            Ok(Greeting::Query(id, query)) => {
                let asked = Asked { id, query: &query, believes: self.options.unauthenticated_peers };
                return match answer::reply(self.ledger, &asked, &connection, self.cancel) {
                    Ok(decision) => Received::Answered { id, decision },
                    Err(why) => ended(Ending::Discarded(why), context),
                };
            }
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
        ended(ending, context)
    }

    pub(crate) fn ledger(&self) -> &'a Ledger {
        self.ledger
    }

    pub(crate) fn context(&self) -> Context<'a> {
        Context::new(Side::Destination, self.devices, self.options, self.observer, self.cancel)
    }

    /// From the offer to the end. The devices then run, or are as they were. The threads that work on devices are started
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
            let proofs = match then {
                Then::Commit(id) => proofs(id, offer)?,
                Then::Loaded(_) => Proofs::none(),
            };
            Receiving::new(context, connection, self.devices, self.memory, offer, proofs)
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
                Ok(Ok(end)) => Ending::Done(end),
                Ok(Err(NotStarted::GivenBack(why))) => self.discard(receiving, why),
                Ok(Err(NotStarted::Stuck(why))) | Err(why) => Ending::Broken(why),
            }
        })
    }

    /// The commit, or the end of a load.
    fn end_of(
        &self,
        context: &Context<'a>,
        receiving: &Receiving<'_, 'a>,
        then: Then,
    ) -> Result<End, NotStarted> {
        context.recorder.phase(Phase::Commit);
        match then {
            Then::Commit(id) => self.commit(id, context, receiving),
            Then::Loaded(after) => self.end_load(after, context, receiving),
        }
    }

    /// Starts the thread that accepts further links and starts a reader for each.
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
fn ended(ending: Ending, context: Context<'_>) -> Received {
    let recorder = context.recorder;
    match ending {
        Ending::Done(End::Stopped) => Received::Stopped(recorder.finish(End::Stopped, None)),
        Ending::Done(_) => Received::Runs(recorder.finish(End::Runs, None)),
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
