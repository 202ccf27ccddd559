//! `limosa answer`, on the side of a destination whose process has ended: sources in doubt are answered.

use std::time::Instant;

use limosa_migrate::Incoming;
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{Decision, Options, Received};
use serde::Serialize;

use super::moving;
use crate::args;
use crate::links::{self, Links};
use crate::moves::Moves;
use crate::output::Output;

#[derive(Serialize)]
struct Answered {
    id: String,
    outcome: &'static str,
}

pub fn answer(args: &args::Answer, out: &Output) -> anyhow::Result<()> {
    let (cancel, moves) = (moving::cancel_on_signal()?, Moves::new(args.moves.folder.as_deref()));
    let (ledger, listener) = (moves.record()?, links::listen(&args.listen)?);
    let links = Links::new(&args.tls)?;
    let options = Options::default().with_unauthenticated_peers(args.tls.insecure);
    let acceptor = links.acceptor(listener, options.silence_max)?;
    out.say(&format!("listening on {}", acceptor.address()));
    let began = Instant::now();
    loop {
        let left = args.wait.saturating_sub(began.elapsed());
        let link = match acceptor.accept(Wait::within(left, Some(&cancel))) {
            Ok(Incoming::Peer(link)) => link,
            Ok(Incoming::NotAPeer { why, .. }) => {
                tracing::warn!("{why}");
                continue;
            }
            Err(LinkError::TimedOut | LinkError::Cancelled) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match ledger.answer(&link, &options, Some(&cancel)) {
            Received::Answered { id, decision } => {
                let outcome = match decision {
                    Decision::Unknown => "not known",
                    Decision::NotCommitted => "not committed",
                    Decision::Committed => "committed",
                };
                out.line(&Answered { id: id.to_string(), outcome }, |to| writeln!(to, "{id}: {outcome}"))?;
            }
            // A source that wants to send, or a client that is not a source.
            Received::Discarded { why, .. } => tracing::warn!("{why}"),
            Received::Runs(_) | Received::Stopped(_) | Received::Broken { .. } => {}
        }
    }
}
