//! `limosa receive`: waits for a sender, takes what it sends, and stays to be asked when the sender may not know how
//! that ended. Whoever connects and is no sender is named, and waited on past.

use std::time::{Duration, Instant};

use limosa_migrate::link::{Acceptor, Incoming, Link, LinkError, Wait};
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

pub fn receive(args: &args::Receive, opening: Opening, out: &Output) -> anyhow::Result<()> {
    let side = Side::destination(opening, &args.devices.names(), &args.memory.memory)?;
    let done = wait_and_take(&side, args, out);
    hold::end(done, side.devices(), args.hold.hold, Leaves::State, out)
}

fn wait_and_take(side: &Side, args: &args::Receive, out: &Output) -> anyhow::Result<()> {
    let (links, listener) = (Links::new(&args.link.tls)?, links::listen(&args.listen)?);
    let (cancel, progress) = (cancel_on_signal()?, Progress::new(out));
    let moves = Moves::new(args.link.moves.folder.as_deref());
    let options = Options { links: args.links, ..over_link(Options::default(), &args.link) };
    let ledger = moves.ledger()?;
    let (moved, ending) = (side.moved(), Ending::new(&args.reporting, out)?);
    let (pages, guest) = (side.destination_pages()?, Guest::destination(&args.starting));
    let regions = pages.regions(side.memory());
    let destination = destination(&moved, &regions, &guest, &progress, &options, &cancel, &ledger);
    out.say(&format!("listening on {}", listener.address()));
    let arrivals = links.arrivals(listener, args.link.silence)?;
    let door = Door { arrivals, silence: args.link.silence, cancel: &cancel };
    let mut wait = Waiting { began: Instant::now(), limit: args.wait, strangers: 0 };
    loop {
        let arrival = door.next(wait.left()).map_err(|error| match error {
            LinkError::TimedOut => wait.over(&args.listen),
            LinkError::Cancelled => Error::Cancelled.into(),
            error => error.into(),
        })?;
        let link = match arrival {
            Incoming::Peer(link) => link,
            Incoming::NotAPeer { peer, why } => {
                wait.passed_over(&peer, &why.to_string());
                continue;
            }
        };
        let peer = link.peer().to_owned();
        let further = |wait: Wait<'_>| door.further(wait);
        return match destination.receive_over(&link, &further) {
            Received::Runs(report) => {
                drop(link);
                if !report.peer_told {
                    door.answer(&destination);
                }
                drop(progress);
                ending.print(&report).and(started(&guest))
            }
            Received::Stopped(report) => ending.print(&report),
            // A source of an earlier move; the one that is waited for is still to come.
            Received::Answered { .. } => continue,
            Received::Discarded { why, report } if is_stranger(&why, &report) => {
                wait.passed_over(&peer, &why.to_string());
                continue;
            }
            Received::Discarded { why, report } => {
                drop(link);
                ending.failed(&report);
                if source_may_doubt(&why, &report) {
                    door.answer(&destination);
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

/// Where senders come in.
struct Door<'a> {
    arrivals: Acceptor,
    silence: Duration,
    cancel: &'a Cancel,
}

impl Door<'_> {
    fn next(&self, within: Duration) -> Result<Incoming, LinkError> {
        self.arrivals.next(Wait::within(within, Some(self.cancel)))
    }

    /// A further link of a move that has come: whoever cannot make one is passed over.
    fn further(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError> {
        loop {
            match self.arrivals.next(wait)? {
                Incoming::Peer(link) => return Ok(link),
                Incoming::NotAPeer { why, .. } => {
                    tracing::warn!("{why}; the further links of the move are still waited for");
                }
            }
        }
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

/// The wait for a sender. Whoever connects meanwhile and is none does not prolong it.
struct Waiting {
    began: Instant,
    limit: Duration,
    strangers: u64,
}

impl Waiting {
    fn left(&self) -> Duration {
        self.limit.saturating_sub(self.began.elapsed())
    }

    fn passed_over(&mut self, peer: &str, why: &str) {
        self.strangers += 1;
        // Every message names the other side by itself.
        let peer = if why.contains(peer) { String::new() } else { format!("{peer}: ") };
        tracing::warn!("{peer}{why}; it sent no move, still waiting for one");
    }

    fn over(&self, listen: &str) -> anyhow::Error {
        let limit = self.limit;
        let what = match self.strangers {
            0 => format!("{listen}: nobody connected within {limit:?}"),
            1 => format!("{listen}: nobody sent a move within {limit:?}; one connected that did not"),
            some => format!("{listen}: nobody sent a move within {limit:?}; {some} connected that did not"),
        };
        exit::error(Code::Unreachable, what)
    }
}

/// Whether whoever connected never said that it is a source: it said something else, or nothing.
fn is_stranger(why: &Error, report: &Report) -> bool {
    let is_no_preface = matches!(
        why,
        Error::Stream { damage: Damage::NotAStream, .. } | Error::Link { .. } | Error::TimedOut { .. }
    );
    // With a preface comes the move's id.
    report.id.is_empty() && is_no_preface
}

/// Whether the link was lost when the source may have sent its COMMIT: it cannot know that this did not
/// come.
fn source_may_doubt(why: &Error, report: &Report) -> bool {
    let held = report.phases.iter().any(|phase| phase.phase == Phase::Commit);
    held && matches!(why, Error::Link { .. } | Error::TimedOut { .. })
}
