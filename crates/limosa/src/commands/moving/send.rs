//! `limosa send`: to a receiver, and with the move in doubt, asking it.

use std::io;
use std::time::Instant;

use limosa_migrate::link::{Address, LinkError, Wait};
use limosa_migrate::{Cancel, Error, Outcome, Phase};

use super::ended::{Ending, Work};
use super::{ASK_EVERY, cancel_on_signal, memory, options, over_link, source};
use crate::args;
use crate::endpoint::Endpoint;
use crate::found;
use crate::guest::Guest;
use crate::keep_open::{self, Leaves};
use crate::links::{self, Links};
use crate::moves::Moves;
use crate::noting::{Noting, Target};
use crate::open::Opening;
use crate::output::Output;
use crate::progress::Progress;
use crate::wrong_socket;

pub fn send(args: &args::Send, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    let cancel = cancel_on_signal()?;
    let address = links::address(&args.to)?;
    let links =
        Links::to(&address, &args.link.tls, opening.servers)?.limited(args.bandwidth, args.link.silence)?;
    let endpoint = Endpoint::source(opening, &args.devices.names(), &args.memory.memory, &args.stopping)?;
    let moves = Moves::new(args.link.moves.folder.as_deref());
    found::check_source(endpoint.devices(), args.stopping.stopped, &moves)?;
    found::check_stop_with(&args.stopping, endpoint.devices().iter())?;
    let done = over(&endpoint, args, (&links, &address), &cancel, out);
    keep_open::end(done, endpoint.devices(), args.keep_open.keep_open, Leaves::Nothing, out)
}

fn over(
    endpoint: &Endpoint,
    args: &args::Send,
    (links, address): (&Links, &Address),
    cancel: &Cancel,
    out: &Output,
) -> anyhow::Result<()> {
    let progress = Progress::new(out, || endpoint.total_bytes());
    let options = over_link(options(&args.moving), &args.link)
        .with_links(args.links.most)
        .with_links_measured(args.links.measured)
        .with_compress(args.compress);
    let (moved, ending) = (endpoint.moved(), Ending::new(Work::Move, &args.reporting, out)?);
    let moves = Moves::new(args.link.moves.folder.as_deref());
    let target = Target::Address { address: address.lasting()?.to_string(), tls: links.are_tls() };
    let guest =
        Guest::source(&args.stopping, endpoint.devices(), Some(Noting::new(&moves, endpoint, target)?))?;
    let pages = endpoint.source_pages(&args.stopping)?;
    let hint = "is `limosa receive` listening there?";
    let connector = links.connector(address);
    let link = links::connect(&connector, options.silence_max, Some(cancel), hint)?;
    let mut log = pages.log();
    let sent = source(&moved, memory(endpoint, &pages, &mut log), &guest, &progress, &options, cancel);
    let mut outcome = sent.send_over(&link, &connector);
    drop(link);
    let began = Instant::now();
    while let Outcome::InDoubt(doubt) = outcome {
        tracing::warn!("in doubt: {}; asking {address} what became of move {}", doubt.why, doubt.id);
        let Some(left) = args.link.silence.checked_sub(began.elapsed()) else {
            return Err(ending.in_doubt(&endpoint.name(), &doubt, &guest));
        };
        outcome = match connector.connect(Wait::within(left, Some(cancel))) {
            Ok(link) => {
                let mut log = pages.log();
                let asking =
                    source(&moved, memory(endpoint, &pages, &mut log), &guest, &progress, &options, cancel);
                asking.resolve(doubt, &link)
            }
            // There is no destination to ask, now or later.
            Err(error) if nobody_listens(&error) => {
                return Err(ending.in_doubt(&endpoint.name(), &doubt, &guest));
            }
            Err(_) => Outcome::InDoubt(doubt),
        };
        if let Outcome::InDoubt(doubt) = &outcome
            && cancel.wait(ASK_EVERY)
        {
            return Err(ending.in_doubt(&endpoint.name(), doubt, &guest));
        }
    }
    drop(progress);
    // Nothing of the move has begun where no receiver has answered.
    if let Outcome::Undone { why: why @ (Error::Link { .. } | Error::Stream { .. }), report } = &mut outcome
        && !report.phases.iter().any(|phase| phase.phase == Phase::PreCopy)
        && !links.are_tls()
        && let Some(what) = wrong_socket::not_a_receiver(address)
    {
        let (peer, error) = (address.to_string(), LinkError::Io(io::Error::other(what)));
        *why = Error::Link { peer, doing: "waiting for a receiver's first word", error };
        report.why = Some(why.to_string());
    }
    ending.settled(outcome, &guest)
}

fn nobody_listens(error: &LinkError) -> bool {
    let kinds = [io::ErrorKind::ConnectionRefused, io::ErrorKind::NotFound];
    matches!(error, LinkError::Io(error) if kinds.contains(&error.kind()))
}
