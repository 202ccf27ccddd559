//! A move within one process: both scripts, joined by a link to itself.

use crate::link::SocketLink;
use crate::report::{End, Recorder, Side};
use crate::source::Outcome;
use crate::{Destination, Error, Received, Source};

/// Moves from the source to the destination, each in a thread of its own. Since both are here, a move
/// in doubt is decided on the spot.
pub fn move_local(source: &mut Source<'_>, destination: &Destination<'_>) -> (Outcome, Received) {
    let (near, far) = match SocketLink::pair() {
        Ok(pair) => pair,
        Err(error) => {
            let again = std::io::Error::from(error.kind());
            let failed = |error| Error::Os { doing: "making a socket pair", error };
            let (here, there) = (failed(error), failed(again));
            let nothing = |side, end, why: &Error| {
                let recorder = Recorder::new(side, source.options, &crate::Nobody, std::iter::empty());
                recorder.finish(end, Some(why))
            };
            let report = nothing(Side::Source, End::Undone, &here);
            let outcome = Outcome::Undone { why: here, report };
            let report = nothing(Side::Destination, End::Discarded, &there);
            return (outcome, Received::Discarded { why: there, report });
        }
    };
    limosa_clockwork::scope(|scope| {
        let receiving = scope.spawn("limosa: destination", move || {
            let received = destination.receive(&far);
            // The source may wait for the close.
            drop(far);
            received
        });
        let outcome = source.send(&near);
        drop(near);
        let received = receiving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (source.settle(outcome, destination.ledger), received)
    })
}

impl Source<'_> {
    /// Decides a move in doubt whose destination is in this process and done.
    fn settle(&mut self, outcome: Outcome, ledger: &crate::Ledger) -> Outcome {
        match outcome {
            Outcome::InDoubt(doubt) => self.decide(ledger.ask(doubt.id), doubt),
            outcome => outcome,
        }
    }
}
