//! Answers to sources in doubt, from the ledger.

use limosa_stream::{Kind, MigrationId, PrefaceFlags};

use super::opening::{self, Opening, Request};
use crate::error::{NoMove, guard};
use crate::ledger::{Decision, Ledger};
use crate::link::Link;
use crate::protocol::limits::Limits;
use crate::wire::{Connection, Frame, within};
use crate::{Cancel, Error, Options, Result};

/// Answers a question, whose preface has been answered.
pub(crate) fn reply(
    ledger: &Ledger,
    id: MigrationId,
    connection: &Connection<'_>,
    cancel: Option<&Cancel>,
) -> Result<Decision> {
    let decision = ledger.ask(id);
    let number: u32 = match decision {
        Decision::Unknown => 0,
        Decision::NotCommitted => 1,
        Decision::Committed => 2,
    };
    let outcome = number.to_le_bytes();
    guard("the answer", || connection.send(&Frame::new(Kind::OUTCOME, &outcome), cancel))?;
    Ok(decision)
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
    /// [`Error::NotTaken`] for a source that wants to move: it is told so. Other errors when no whole question came, or the
    /// answer could not be sent.
    pub fn answer(
        &self,
        link: &dyn Link,
        options: &Options,
        cancel: Option<&Cancel>,
    ) -> Result<(MigrationId, Decision)> {
        let connection = Connection::new(link, Limits::new(options));
        let opened = opening::read(&mut connection.reader(), link, within(options.silence_max), cancel);
        let (id, why) = match opened {
            Ok(Opening { id, request: Request::Answer }) => {
                let answered = connection
                    .send_preface(id, PrefaceFlags::empty(), cancel)
                    .and_then(|()| reply(self, id, &connection, cancel));
                return answered.map(|decision| (id, decision)).map_err(|why| connection.part(why));
            }
            Ok(Opening { id, .. }) => (Some(id), Error::NotTaken { why: NoMove::Answers }),
            Err(unopened) => (unopened.id, unopened.why),
        };
        Err(refuse(&connection, id, why))
    }
}
