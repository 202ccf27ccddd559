//! Answers to sources in doubt, from the ledger (`docs/stream.md: The commit`, `Proofs`).

use limosa_stream::{Kind, MigrationId, Nonce, PrefaceFlags, Proofs, Secret};

use super::opening::{self, Opening, Request};
use crate::error::{Mistrust, NoMove, guard};
use crate::ledger::{Decision, Ledger};
use crate::link::Link;
use crate::protocol::limits::Limits;
use crate::wire::{Connection, Frame, within};
use crate::{Cancel, Error, Options, Result};

/// A question.
pub(crate) struct Asked<'q> {
    /// The move that it is about.
    pub(crate) id: MigrationId,
    /// The payload of the QUERY.
    pub(crate) query: &'q [u8],
    /// Whether a question about a move without a secret is answered ([`Options::unauthenticated_peers`]).
    pub(crate) believes: bool,
}

impl Asked<'_> {
    /// The proofs of question and answer.
    fn proofs(&self, secret: Option<&Secret>) -> Proofs {
        secret.map_or_else(Proofs::none, |secret| {
            // A question without a nonce proves nothing.
            let nonce = Nonce::of_query(self.query).unwrap_or_default();
            Proofs::new(secret.clone(), self.id, nonce)
        })
    }

    /// Whether the question may be asked about the move with this secret.
    fn check(&self, secret: Option<&Secret>, connection: &Connection<'_>) -> Result<()> {
        if secret.is_none() {
            let (peer, why) = (connection.link().peer().into(), Mistrust::NoSecret { id: self.id });
            return if self.believes { Ok(()) } else { Err(Error::Unauthenticated { peer, why }) };
        }
        let checked = self.proofs(secret).check(Kind::QUERY, self.query);
        checked.map(drop).map_err(|damage| connection.damaged(damage))
    }
}

/// Answers a question, whose preface has been answered. A question without a proof that it comes from the move's source is
/// refused.
pub(crate) fn reply(
    ledger: &Ledger,
    asked: &Asked<'_>,
    connection: &Connection<'_>,
    cancel: Option<&Cancel>,
) -> Result<Decision> {
    let answered = guard("the answer", || {
        let (decision, secret) = ledger.ask_for_peer(asked.id, |secret| asked.check(secret, connection))?;
        let number: u32 = match decision {
            Decision::Unknown => 0,
            Decision::NotCommitted => 1,
            Decision::Committed => 2,
        };
        let outcome = asked.proofs(secret.as_ref()).prove(Kind::OUTCOME, &number.to_le_bytes());
        connection.send(&Frame::new(Kind::OUTCOME, &outcome), cancel)?;
        Ok(decision)
    });
    answered.map_err(|why| refuse(connection, None, why))
}

/// Tells a peer why it is refused, behind a preface with its id if that is known, and gives it the time to read that.
pub(crate) fn refuse(connection: &Connection<'_>, id: Option<MigrationId>, why: Error) -> Error {
    if let Some(id) = id {
        // A link that fails now fails at the ABORT as well.
        let _ = connection.send_preface(id, PrefaceFlags::empty(), None);
    }
    connection.abort(&why);
    connection.part(why)
}

impl Ledger {
    /// Answers a source in doubt that has connected, and returns the move that it asked about and the answer. Blocks until
    /// then, at most for [`Options::silence_max`]. [`Acceptor::answering`](crate::Acceptor::answering) answers several at once.
    ///
    /// # Errors
    ///
    /// [`Error::NotTaken`] for a source that wants to move: it receives a refusal. Other errors if no complete
    /// question came, if the question does not prove that it comes from the move's source, or if the answer could not be sent.
    pub fn answer(
        &self,
        link: &dyn Link,
        options: &Options,
        cancel: Option<&Cancel>,
    ) -> Result<(MigrationId, Decision)> {
        let connection = Connection::new(link, Limits::new(options));
        let opened = opening::read(&mut connection.reader(), link, within(options.silence_max), cancel);
        let (id, why) = match opened {
            Ok(Opening { id, request: Request::Answer(query) }) => {
                let sent = connection.send_preface(id, PrefaceFlags::empty(), cancel);
                sent.map_err(|why| connection.part(why))?;
                let asked = Asked { id, query: &query, believes: options.unauthenticated_peers };
                return reply(self, &asked, &connection, cancel).map(|decision| (id, decision));
            }
            Ok(Opening { id, .. }) => (Some(id), Error::NotTaken { why: NoMove::Answers }),
            Err(unopened) => (unopened.id, *unopened.why),
        };
        Err(refuse(&connection, id, why))
    }
}
