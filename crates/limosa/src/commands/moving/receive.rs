//! `limosa receive`: waits for a source, takes its move, and stays to answer when the source may not know how the move
//! ended. A client that is not a source is named in a warning, and the wait goes on.

use std::time::{Duration, Instant};

use limosa_migrate::link::{Link, LinkError, Wait};
use limosa_migrate::{Acceptor, Incoming};
use limosa_migrate::{Cancel, Destination, Error, Options, Phase, Received, Report};
use limosa_stream::Damage;

use super::ended::{Ending, Notes, broken, started};
use super::{cancel_on_signal, destination, over_link};
use crate::args;
use crate::exit::{self, Code};
use crate::guest::Guest;
use crate::hold::{self, Leaves};
use crate::links::{self, Links};
use crate::moves::Moves;
use crate::open::Opening;
use crate::output::Output;
use crate::progress::Progress;
use crate::side::Side;

pub fn receive(args: &args::Receive, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    let side = Side::destination(opening, &args.devices.names(), &args.memory.memory)?;
    let done = wait_and_take(&side, args, out);
    hold::end(done, side.devices(), args.hold.hold, Leaves::State, out)
}

fn wait_and_take(side: &Side, args: &args::Receive, out: &Output) -> anyhow::Result<()> {
    let (links, listener) = (Links::new(&args.link.tls)?, links::listen(&args.listen)?);
    let (cancel, progress) = (cancel_on_signal()?, Progress::new(out));
    let moves = Moves::new(args.link.moves.folder.as_deref());
    let options = over_link(Options::default(), &args.link).with_links(args.links);
    let ledger = moves.ledger()?;
    let (moved, ending) = (side.moved(), Ending::new(&args.reporting, out)?);
    let (pages, guest) = (side.destination_pages()?, Guest::destination(&args.starting));
    let regions = pages.regions(side.memory());
    let destination = destination(&moved, &regions, &guest, &progress, &options, &cancel, &ledger);
    out.say(&format!("listening on {}", listener.address()));
    let acceptor = links.acceptor(listener, args.link.silence)?;
    let sources = Sources { acceptor, silence: args.link.silence, cancel: &cancel };
    let mut wait = Waiting { began: Instant::now(), limit: args.wait, passed_over: 0 };
    loop {
        let incoming = sources.next(wait.left()).map_err(|error| match error {
            LinkError::TimedOut => wait.over(&args.listen),
            LinkError::Cancelled => Error::Cancelled.into(),
            error => error.into(),
        })?;
        let link = match incoming {
            Incoming::Peer(link) => link,
            Incoming::NotAPeer { peer, why } => {
                wait.passed_over(&peer, &why.to_string());
                continue;
            }
        };
        let peer = link.peer().to_owned();
        return match destination.receive_over(&link, &sources.acceptor) {
            Received::Runs(report) => {
                drop(link);
                if !report.peer_told {
                    sources.answer(&destination);
                }
                drop(progress);
                ending.print(&report).and(started(&guest))
            }
            Received::Stopped(report) => ending.print(&report),
            // A source of an earlier move. The wait for a move goes on.
            Received::Answered { .. } => continue,
            Received::Discarded { why, report } if is_no_source(&why, &report) => {
                wait.passed_over(&peer, &why.to_string());
                continue;
            }
            Received::Discarded { why, report } => {
                drop(link);
                ending.failed(&report);
                if source_may_doubt(&why, &report) {
                    sources.answer(&destination);
                }
                let notes = Notes(&report.notes).to_string();
                Err(anyhow::Error::from(why).context(format!("{} was not loaded{notes}", side.name())))
            }
            Received::Broken { why, report } => {
                ending.failed(&report);
                Err(broken(&side.name(), why))
            }
        };
    }
}

/// Accepts sources, until they are answered or the user cancels.
struct Sources<'a> {
    acceptor: Acceptor,
    silence: Duration,
    cancel: &'a Cancel,
}

impl Sources<'_> {
    fn next(&self, within: Duration) -> Result<Incoming, LinkError> {
        self.acceptor.accept(Wait::within(within, Some(self.cancel)))
    }

    /// The source could not be told how the move ended: stays until it has asked.
    fn answer(&self, destination: &Destination<'_>) {
        let stay = 2 * self.silence;
        tracing::warn!(
            "the source may be in doubt how the move ended; staying {stay:?} to be asked; SIGINT ends that"
        );
        let began = Instant::now();
        while let Some(left) = stay.checked_sub(began.elapsed()) {
            let link = match self.next(left) {
                Ok(Incoming::Peer(link)) => link,
                Ok(Incoming::NotAPeer { why, .. }) => {
                    tracing::warn!("{why}");
                    continue;
                }
                Err(_) => return,
            };
            if let Received::Answered { .. } = destination.receive(&link) {
                return;
            }
        }
    }
}

/// The wait for a source. Other clients that connect meanwhile do not prolong it.
struct Waiting {
    began: Instant,
    limit: Duration,
    /// Clients that were not sources.
    passed_over: u64,
}

impl Waiting {
    fn left(&self) -> Duration {
        self.limit.saturating_sub(self.began.elapsed())
    }

    fn passed_over(&mut self, peer: &str, why: &str) {
        self.passed_over += 1;
        // Most messages name the other side themselves.
        let peer = if why.contains(peer) { String::new() } else { format!("{peer}: ") };
        tracing::warn!("{peer}{why}; it sent no move, still waiting for one");
    }

    fn over(&self, listen: &str) -> anyhow::Error {
        let limit = self.limit;
        let what = match self.passed_over {
            0 => format!("{listen}: nobody connected within {limit:?}"),
            1 => format!("{listen}: nobody sent a move within {limit:?}; one connected that did not"),
            some => format!("{listen}: nobody sent a move within {limit:?}; {some} connected that did not"),
        };
        exit::error(Code::Unreachable, what)
    }
}

/// Whether the client sent no preface: it sent something else, or nothing.
fn is_no_source(why: &Error, report: &Report) -> bool {
    let is_no_preface = matches!(
        why,
        Error::Stream { damage: Damage::NotAStream, .. } | Error::Link { .. } | Error::TimedOut { .. }
    );
    // The move's id is known once the preface has arrived.
    report.id.is_empty() && is_no_preface
}

/// Whether the link was lost when the source may have sent its COMMIT. The source cannot know that it did not arrive.
fn source_may_doubt(why: &Error, report: &Report) -> bool {
    let held = report.phases.iter().any(|phase| phase.phase == Phase::Commit);
    held && matches!(why, Error::Link { .. } | Error::TimedOut { .. })
}
