//! A move within one process: both scripts, joined by a link to itself.

use crate::link::SocketLink;
use crate::report::End;
use crate::transfer::team::STARTING;
use crate::{Destination, Error, Outcome, Received, Source};

/// Moves from the source to the destination, each in a thread of its own. Both are in this process, so a move in doubt is
/// decided at once.
pub fn move_local(mut source: Source<'_>, destination: Destination<'_>) -> (Outcome, Received) {
    let (near, far) = match SocketLink::pair() {
        Ok(pair) => pair,
        Err(error) => return nothing(&source, &destination, "making a socket pair", error),
    };
    let destination = &destination;
    limosa_clockwork::scope(|scope| {
        let started = scope.try_spawn("limosa: destination", move || {
            let received = destination.receive_move(&far, None);
            // The source may wait for the close.
            drop(far);
            received
        });
        let receiving = match started {
            Ok(receiving) => receiving,
            Err(error) => return nothing(&source, destination, STARTING, error),
        };
        let outcome = source.move_over(&near, None);
        drop(near);
        let received = receiving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let outcome = match outcome {
            Outcome::InDoubt(doubt) => source.settle(destination.ledger().ask(doubt.id), doubt),
            outcome => outcome,
        };
        (outcome, received)
    })
}

/// Both outcomes of a move that did not begin.
fn nothing(
    source: &Source<'_>,
    destination: &Destination<'_>,
    doing: &'static str,
    error: std::io::Error,
) -> (Outcome, Received) {
    let here = Error::Os { doing, error };
    let there = here.again();
    let report = source.context().recorder.finish(End::Undone, Some(&here));
    let outcome = Outcome::Undone { why: here, report };
    let report = destination.context().recorder.finish(End::Discarded, Some(&there));
    (outcome, Received::Discarded { why: there, report })
}
