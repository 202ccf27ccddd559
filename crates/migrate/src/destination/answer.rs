//! Answers to sources in doubt, from the ledger.

use limosa_stream::{Kind, MigrationId};

use super::{Destination, Received};
use crate::context::Context;
use crate::error::guard;
use crate::ledger::{Decision, Ledger};
use crate::link::Link;
use crate::report::End;
use crate::wire::{Connection, Frame};
use crate::{Cancel, Options};

impl Destination<'_> {
    pub(super) fn answer_query(
        &self,
        id: MigrationId,
        connection: &Connection<'_>,
        context: Context<'_>,
    ) -> Received {
        let decision = self.ledger.ask(id);
        let number: u32 = match decision {
            Decision::Unknown => 0,
            Decision::NotCommitted => 1,
            Decision::Committed => 2,
        };
        let outcome = number.to_le_bytes();
        let answered =
            guard("the answer", || connection.send(&Frame::new(Kind::OUTCOME, &outcome), self.cancel));
        match answered {
            Ok(()) => Received::Answered { id, decision },
            Err(why) => {
                let report = context.recorder.finish(End::Discarded, Some(&why));
                Received::Discarded { why, report }
            }
        }
    }
}

impl Ledger {
    /// Answers a source in doubt that has connected: [`Received::Answered`]. A source that wants to move is refused:
    /// [`Received::Discarded`].
    pub fn answer(&self, link: &dyn Link, options: &Options, cancel: Option<&Cancel>) -> Received {
        Destination::new(&[], self, options).with_cancel(cancel).receive(link)
    }
}
