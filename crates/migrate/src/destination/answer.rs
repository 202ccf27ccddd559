//! Answers to sources in doubt, from the ledger (`docs/stream.md: The commit`, `Proofs`).

use limosa_stream::{Kind, MigrationId, Nonce, Proofs, Secret};

use super::{Destination, Received};
use crate::context::Context;
use crate::error::{Mistrust, guard};
use crate::ledger::{Decision, Ledger};
use crate::link::Link;
use crate::report::End;
use crate::wire::{Connection, Frame};
use crate::{Cancel, Error, Options, Result};

impl Destination<'_> {
    /// Answers a QUERY with this payload. Nothing becomes of a QUERY that does not prove that it is of the move's source.
    pub(super) fn answer_query(
        &self,
        id: MigrationId,
        query: &[u8],
        connection: &Connection<'_>,
        context: Context<'_>,
    ) -> Received {
        let answered = guard("the answer", || {
            let (decision, proofs) = self.ask_ledger(id, query, connection)?;
            let number: u32 = match decision {
                Decision::Unknown => 0,
                Decision::NotCommitted => 1,
                Decision::Committed => 2,
            };
            let outcome = proofs.prove(Kind::OUTCOME, &number.to_le_bytes());
            connection.send(&Frame::new(Kind::OUTCOME, &outcome), self.cancel)?;
            Ok(decision)
        });
        match answered {
            Ok(decision) => Received::Answered { id, decision },
            Err(why) => {
                connection.abort(&why);
                let why = connection.part(why);
                let report = context.recorder.finish(End::Discarded, Some(&why));
                Received::Discarded { why, report }
            }
        }
    }

    /// What became of a move, and the proofs of the answer.
    fn ask_ledger(
        &self,
        id: MigrationId,
        query: &[u8],
        connection: &Connection<'_>,
    ) -> Result<(Decision, Proofs)> {
        let proofs = |secret: Option<&Secret>| match (secret, Nonce::of_query(query)) {
            (Some(secret), nonce) => Proofs::new(secret.clone(), id, nonce.unwrap_or_default()),
            (None, _) => Proofs::none(),
        };
        let may_ask = |secret: Option<&Secret>| {
            if secret.is_none() {
                let why = Mistrust::NoSecret { id };
                let peer = connection.link().peer().into();
                let allowed = self.options.unauthenticated_peers;
                return if allowed { Ok(()) } else { Err(Error::Unauthenticated { peer, why }) };
            }
            let checked = proofs(secret).check(Kind::QUERY, query).map(drop);
            checked.map_err(|damage| connection.damaged(damage))
        };
        let (decision, secret) = self.ledger.ask_for_peer(id, may_ask)?;
        Ok((decision, proofs(secret.as_ref())))
    }
}

impl Ledger {
    /// Answers a source in doubt that has connected: [`Received::Answered`]. A source that wants to move is refused, and so is
    /// a client that does not prove that it is the move's source: [`Received::Discarded`].
    pub fn answer(&self, link: &dyn Link, options: &Options, cancel: Option<&Cancel>) -> Received {
        Destination::new(&[], self, options).with_cancel(cancel).receive(link)
    }
}
