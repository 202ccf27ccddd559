//! `limosa receive`: waits for a source, takes its move, and stays to answer when the source may not know how the move
//! ended. With `--forever` it takes one move after the other.

mod forever;

use std::sync::Arc;
use std::time::Duration;

use limosa_migrate::link::{Address, LinkError, Wait};
use limosa_migrate::{
    Acceptor, Cancel, Decision, Error, Incoming, Ledger, MigrationId, OfferedMove, Options, Phase, Received,
    Report,
};

use super::ended::{Ending, Notes, STAYS_STOPPED, Work, note_ways_back};
use super::{cancel_on_signal, destination, over_link};
use crate::args;
use crate::endpoint::Endpoint;
use crate::exit::{self, Code};
use crate::found;
use crate::guest::Guest;
use crate::keep_open::{self, Leaves};
use crate::links::Links;
use crate::memory::DestinationPages;
use crate::metrics::{Exposition, Listener as MetricsListener, Receiver};
use crate::moves::{Moves, hint};
use crate::named_once::place;
use crate::open::Opening;
use crate::output::Output;
use crate::progress::Progress;

pub fn receive(args: &args::Receive, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    if args.forever {
        return forever::receive(args, opening, out);
    }
    let cancel = cancel_on_signal()?;
    let (links, address) = Links::listening(&args.listen, &args.link.tls, &args.names)?;
    check_metrics(args, &address)?;
    let endpoint = Endpoint::destination(opening, &args.devices.names(), &args.memory.memory)?;
    found::check_destination(endpoint.devices(), &Moves::new(args.link.moves.folder.as_deref()))?;
    let done = wait_and_take(&endpoint, args, (&links, &address), &cancel, out);
    keep_open::end(done, endpoint.devices(), args.keep_open.keep_open, Leaves::State, out)
}

fn wait_and_take(
    endpoint: &Endpoint,
    args: &args::Receive,
    (links, address): (&Links, &Address),
    cancel: &Cancel,
    out: &Output,
) -> anyhow::Result<()> {
    let (listener, progress) = (links.bind(address)?, Progress::new(out, || None));
    let (ledger, options) = record_and_options(args)?;
    let ending = Ending::new(Work::Move, &args.reporting, out)?;
    let pages = endpoint.destination_pages()?;
    let metrics = Receiver::default();
    let _exposition = expose(args, &metrics, out)?;
    out.listening(listener.address());
    let receiving = Receiving { args, ledger: &ledger, options: &options, cancel, metrics: &metrics };
    let acceptor = links.acceptor(listener, &ledger, &options)?;
    let offered = offer(&acceptor, args, cancel)?;
    let stay = Stay { acceptor: &acceptor, id: offered.id(), silence: args.link.silence, cancel };
    receiving.take(offered, (endpoint, &pages), progress, &ending, || stay.until_asked()).done
}

/// The ledger of received moves, and the options of a receiver.
fn record_and_options(args: &args::Receive) -> anyhow::Result<(Arc<Ledger>, Options)> {
    let options = over_link(Options::default(), &args.link)
        .with_links(args.links)
        .with_idle_max(args.idle.unwrap_or(4 * args.link.silence))
        .with_move_max(args.move_limit);
    let ledger = Moves::new(args.link.moves.folder.as_deref()).ledger()?;
    Ok((Arc::new(ledger), args.state.limit(options)))
}

/// Refuses metrics at the path where senders are waited for.
fn check_metrics(args: &args::Receive, address: &Address) -> anyhow::Result<()> {
    let metrics = args.metrics.as_ref().and_then(crate::metrics::Address::path);
    match (metrics, address) {
        (Some(metrics), Address::Unix(path)) if place(metrics) == place(path) => {
            let what = format!(
                "--metrics unix:{} is that of --listen; expected a path of its own",
                metrics.display()
            );
            Err(exit::error(Code::Usage, what))
        }
        _ => Ok(()),
    }
}

/// Answers with metrics, if that is wanted, and says where.
fn expose(args: &args::Receive, metrics: &Receiver, out: &Output) -> anyhow::Result<Option<Exposition>> {
    let Some(address) = &args.metrics else { return Ok(None) };
    let exposition = metrics.answer_at(MetricsListener::bind(address)?)?;
    out.say(&format!("metrics on {}", exposition.address()));
    Ok(Some(exposition))
}

/// What all moves of a receiver have in common.
struct Receiving<'a> {
    args: &'a args::Receive,
    ledger: &'a Ledger,
    options: &'a Options,
    cancel: &'a Cancel,
    metrics: &'a Receiver,
}

/// How a move ended here.
struct Taken {
    done: anyhow::Result<()>,
    /// Whether the devices have the guest now.
    committed: bool,
}

impl Receiving<'_> {
    /// Takes the move that was offered, and says how it ended. `stay` is called where the source may have to ask.
    fn take(
        &self,
        offered: OfferedMove,
        (endpoint, pages): (&Endpoint, &DestinationPages),
        progress: Progress,
        ending: &Ending<'_>,
        stay: impl FnOnce(),
    ) -> Taken {
        let (moved, guest) = (endpoint.moved(), Guest::destination(&self.args.starting));
        let regions = pages.regions(endpoint.memory());
        let (options, ledger) = (self.options, self.ledger);
        let watched = self.metrics.watch(&progress);
        let moves = Moves::new(self.args.link.moves.folder.as_deref());
        let (id, peer) = (offered.id().to_string(), offered.peer().to_owned());
        // Memory alone has no device to tell of it.
        let loading = (!endpoint.devices().is_empty()).then(|| moves.loading(&id, endpoint, &peer)).flatten();
        let destination = destination(&moved, &regions, &guest, &watched, options, self.cancel, ledger)
            .with_after(self.args.starting.after());
        let received = destination.receive_offered(offered);
        watched.ended(&received);
        if let Some(loading) = loading.filter(|_| touched_nothing(&received)) {
            loading.touched_nothing();
        }
        let stays_stopped = matches!(received, Received::Stopped(_));
        let committed = !matches!(received, Received::Discarded { .. } | Received::Answered { .. });
        let done = match received {
            Received::Runs(mut report) | Received::Stopped(mut report) => {
                if !report.peer_told {
                    stay();
                }
                drop(progress);
                report.notes.extend(stays_stopped.then(|| STAYS_STOPPED.into()));
                ending.done(&report, guest.failures())
            }
            Received::Answered { id, .. } => {
                Err(anyhow::anyhow!("move {id} was asked about instead of offered"))
            }
            Received::Discarded { why, mut report } => {
                note_ways_back(&mut report);
                let may_doubt = source_may_doubt(&why, &report);
                let mut what = format!("{} was not loaded{}", endpoint.name(), Notes(&report.notes));
                if let Error::NotRecorded { error } = &why {
                    what = format!("{what}; {}", hint(error));
                }
                let error = ending.failed(&report, anyhow::Error::from(why).context(what));
                if may_doubt {
                    stay();
                }
                Err(error)
            }
            Received::Broken { why, report } => Err(ending.broken(&endpoint.name(), why, &report)),
        };
        Taken { done, committed }
    }
}

/// Waits until a source offers a move. Other clients do not prolong the wait.
fn offer(acceptor: &Acceptor, args: &args::Receive, cancel: &Cancel) -> anyhow::Result<OfferedMove> {
    let (wait, listen, limit) = (Wait::within(args.wait, Some(cancel)), &args.listen, args.wait);
    loop {
        let what = match acceptor.accept(wait) {
            Ok(Incoming::Offer(offered)) => return Ok(offered),
            // A source of an earlier move.
            Ok(Incoming::Answered { .. }) => continue,
            Err(LinkError::Cancelled) => return Err(Error::Cancelled.into()),
            Err(LinkError::TimedOut) => match acceptor.passed_over() {
                0 => format!("{listen}: nobody connected within {limit:?}"),
                1 => format!("{listen}: nobody sent a move within {limit:?}; one connected that did not"),
                some => {
                    format!("{listen}: nobody sent a move within {limit:?}; {some} connected that did not")
                }
            },
            Err(error) => return Err(error.into()),
        };
        return Err(exit::error(Code::Unreachable, what));
    }
}

/// The stay after a move whose source could not be told how it ended. Nothing is received any more.
struct Stay<'a> {
    acceptor: &'a Acceptor,
    id: MigrationId,
    silence: Duration,
    cancel: &'a Cancel,
}

impl Stay<'_> {
    /// Stays until the source has asked. Questions about other moves are answered, and do not end the stay.
    fn until_asked(&self) {
        self.acceptor.answer_only();
        let stay = 2 * self.silence;
        tracing::warn!(
            "the source may be in doubt how the move ended; staying {stay:?} to be asked; SIGINT ends that"
        );
        let wait = Wait::within(stay, Some(self.cancel));
        while let Ok(incoming) = self.acceptor.accept(wait) {
            match incoming {
                Incoming::Answered { id, decision } if id == self.id && decision != Decision::Unknown => {
                    return;
                }
                Incoming::Answered { .. } | Incoming::Offer(_) => {}
            }
        }
    }
}

/// Whether the move was refused before its devices were loaded.
fn touched_nothing(received: &Received) -> bool {
    match received {
        Received::Discarded { report, .. } => {
            !report.phases.iter().any(|phase| phase.phase == Phase::PreCopy)
        }
        Received::Answered { .. } => true,
        _ => false,
    }
}

/// Whether the link was lost when the source may have sent its COMMIT. The source cannot know that it did not arrive.
fn source_may_doubt(why: &Error, report: &Report) -> bool {
    let held = report.phases.iter().any(|phase| phase.phase == Phase::Commit);
    held && matches!(why, Error::Link { .. } | Error::Suspended { .. } | Error::TimedOut { .. })
}
