//! `limosa answer`, on the side of a destination whose process has ended: sources in doubt are answered.

use std::sync::Arc;

use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{Decision, Incoming, Options};
use serde::Serialize;

use super::moving;
use crate::args;
use crate::links::Links;
use crate::moves::Moves;
use crate::output::Output;

#[derive(Serialize)]
struct Answered {
    id: String,
    outcome: &'static str,
}

pub fn answer(args: &args::Answer, out: &Output) -> anyhow::Result<()> {
    let (cancel, moves) = (moving::cancel_on_signal()?, Moves::new(args.moves.folder.as_deref()));
    let (links, address) = Links::listening(&args.listen, &args.tls, &args.names)?;
    let (ledger, options) = (Arc::new(moves.record()?), Options::default());
    let options = options.with_unauthenticated_peers(args.tls.insecure);
    let listener = links.bind(&address)?;
    let acceptor = links.answering(listener, &ledger, &options)?;
    out.listening(acceptor.address());
    let wait = Wait::within(args.wait, Some(&cancel));
    loop {
        let (id, decision) = match acceptor.accept(wait) {
            Ok(Incoming::Answered { id, decision }) => (id, decision),
            // None is taken.
            Ok(Incoming::Offer(_)) => continue,
            Err(LinkError::TimedOut | LinkError::Cancelled) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let outcome = match decision {
            Decision::Unknown => "not known",
            Decision::NotCommitted => "not committed",
            Decision::Committed => "committed",
        };
        let answered = Answered { id: id.to_string(), outcome };
        if let Err(error) = out.line(&answered, |to| writeln!(to, "{id}: {outcome}")) {
            // It was answered, and the next source is to be answered as well.
            tracing::warn!("{error:#}; {id}: {outcome}");
        }
    }
}
