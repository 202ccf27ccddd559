//! [`Acceptor`]: takes connections from a listener, several at a time, so that a client that stays silent, or is not
//! migrating, does not block others, and answers sources in doubt.

mod connection;
mod heard;
mod passed_over;
mod shared;

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use limosa_stream::MigrationId;
use rustix::event::{PollFd, PollFlags, poll};

use crate::cancel::timespec;
use crate::destination::answer::refuse;
use crate::error::NoMove;
use crate::ledger::{Decision, Ledger};
use crate::link::{Address, FurtherLinks, Link, LinkError, Listener, Tls, Wait};
use crate::protocol::limits::Limits;
use crate::wire::Connection;
use crate::{Destination, Error, Options, Received};
use connection::Listening;
use heard::HeardLink;
use shared::{Shared, Slot};

/// The largest number of connections whose opening is incomplete. A further connection closes one of those that have
/// waited longest, so that a source never waits for silent clients.
pub const PENDING_MAX: usize = 16;

/// An event of an [`Acceptor`].
#[derive(Debug)]
pub enum Incoming {
    /// A source offers a move.
    Offer(OfferedMove),
    /// A source in doubt asked, and was answered.
    Answered {
        /// The move that it asked about.
        id: MigrationId,
        /// The answer.
        decision: Decision,
    },
}

/// A move whose complete OFFER has arrived. While there is one, the acceptor takes no other.
pub struct OfferedMove {
    link: HeardLink,
    id: MigrationId,
    place: Place,
}

impl OfferedMove {
    /// The source's name, for messages.
    pub fn peer(&self) -> &str {
        self.link.peer()
    }

    /// The id of the move.
    pub fn id(&self) -> MigrationId {
        self.id
    }

    /// Refuses the move: its source receives the reason and goes on as before. The acceptor takes the next move.
    pub fn refuse(self, why: NoMove) {
        let OfferedMove { link, id, place } = self;
        link.forget();
        let options = Options::default().with_silence_max(place.shared.silence_max);
        let peer = link.peer().to_owned();
        let why = refuse(&Connection::new(&link, Limits::new(&options)), Some(id), Error::NotTaken { why });
        place.shared.passed_over(&peer, &why);
    }
}

impl fmt::Debug for OfferedMove {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OfferedMove").field("peer", &self.peer()).field("id", &self.id).finish()
    }
}

/// Accepts connections in a thread of its own, and reads the opening of each in another one: the TLS handshake, the preface
/// and the first frame, which together have one time limit. A client counts once all of these have arrived:
///
/// - A question of a source in doubt is answered from the ledger, also while a move is under way.
/// - An OFFER comes out of [`Acceptor::accept`]. While a move is under way, others are refused. After a move was committed all
///   of them are, for every caller: from then on the acceptor only answers, unless it was told to [`Acceptor::take_further`].
/// - A further link of the move under way goes to that move ([`Destination::receive_offered`]).
/// - All other clients are passed over. They are told why, and named in a warning of the log, but not more than ten at once
///   and then one a second, which counts the others.
///
/// At most [`PENDING_MAX`] openings are read at once, each of at most 260 KiB. Of more than that the oldest one is closed, of
/// those that come from the host that has most of them.
///
/// ```no_run
/// use limosa_migrate::link::Wait;
/// use limosa_migrate::{Acceptor, Destination, Incoming, Received};
///
/// fn receive(destination: Destination<'_>, acceptor: &Acceptor, wait: Wait<'_>) -> std::io::Result<Received> {
///     loop {
///         if let Incoming::Offer(offered) = acceptor.accept(wait).map_err(std::io::Error::other)? {
///             return Ok(destination.receive_offered(offered));
///         }
///     }
/// }
/// ```
#[derive(Debug)]
pub struct Acceptor {
    address: Address,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    /// Accepts from this listener, under TLS if certificates are given, and answers from this ledger. Of the
    /// options, [`Options::silence_max`] bounds the opening of each connection, and [`Options::unauthenticated_peers`] tells
    /// whether questions about moves without a secret are answered.
    ///
    /// # Errors
    ///
    /// When the process has no file descriptors left, or the system starts no thread.
    pub fn new(
        listener: Listener,
        tls: Option<Tls>,
        ledger: Arc<Ledger>,
        options: &Options,
    ) -> std::io::Result<Acceptor> {
        Acceptor::start(listener, tls, Shared::new(ledger, options, Slot::Free)?)
    }

    /// The same for a process that only answers. Every OFFER is refused.
    ///
    /// # Errors
    ///
    /// As for [`Acceptor::new`].
    pub fn answering(
        listener: Listener,
        tls: Option<Tls>,
        ledger: Arc<Ledger>,
        options: &Options,
    ) -> std::io::Result<Acceptor> {
        Acceptor::start(listener, tls, Shared::new(ledger, options, Slot::Closed(NoMove::Answers))?)
    }

    fn start(listener: Listener, tls: Option<Tls>, shared: Shared) -> std::io::Result<Acceptor> {
        let (address, shared) = (listener.address().clone(), Arc::new(shared));
        let listening = Listening { listener, tls, shared: Arc::clone(&shared) };
        let thread = std::thread::Builder::new().name("limosa: accepts".into());
        let thread = Some(thread.spawn(move || listening.run())?);
        Ok(Acceptor { address, shared, thread })
    }

    /// The address that it listens on.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The next offer or answer. Fails at the end of the wait.
    pub fn accept(&self, wait: Wait<'_>) -> Result<Incoming, LinkError> {
        loop {
            // Cleared before the state is looked at: what comes later wakes the poll.
            self.shared.news.clear();
            if let Some(incoming) = self.take() {
                // Another thread may be waiting for what is left.
                self.shared.news.wake();
                return Ok(incoming);
            }
            poll_for(&self.shared.news, wait)?;
        }
    }

    fn take(&self) -> Option<Incoming> {
        let mut state = self.shared.state();
        if let Some((id, decision)) = state.answered.pop_front() {
            return Some(Incoming::Answered { id, decision });
        }
        let (link, id) = state.slot.take_offer()?;
        let place = Place { shared: Arc::clone(&self.shared), was_committed: false };
        Some(Incoming::Offer(OfferedMove { link, id, place }))
    }

    /// From now on refuses every OFFER and only answers questions. A committed move has the same effect.
    pub fn answer_only(&self) {
        self.shared.close(NoMove::Answers);
    }

    /// From now on takes further moves after a committed one. An OFFER that comes before [`Destination::receive_offered`] has
    /// returned from that one waits for it. It is for the caller to refuse ([`OfferedMove::refuse`]) those that come while a guest
    /// runs on the devices.
    pub fn take_further(&self) {
        self.shared.take_further();
    }

    /// How many clients were passed over so far.
    pub fn passed_over(&self) -> u64 {
        self.shared.state().passed_over.all()
    }
}

impl Drop for Acceptor {
    /// Closes the listener, and the connections whose opening is not complete.
    fn drop(&mut self) {
        self.shared.end();
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been printed.
            let _ = thread.join();
        }
    }
}

impl<'a> Destination<'a> {
    /// Receives the move that an [`Acceptor`] gave, over as many links as the source offers and
    /// [`Options::links`](crate::Options::links) allows. Blocks until the move has ended.
    ///
    /// Meanwhile the acceptor refuses other offers. After [`Received::Runs`] and [`Received::Broken`] it takes no
    /// further move, unless it was told to [`Acceptor::take_further`].
    pub fn receive_offered(self, offered: OfferedMove) -> Received {
        let OfferedMove { link, mut place, .. } = offered;
        // Until the opposite is known, also after a panic.
        place.was_committed = true;
        let received = self.receive_move(&link, Some(&place));
        place.was_committed = !matches!(received, Received::Discarded { .. } | Received::Answered { .. });
        received
    }
}

/// The place of the move that is under way. While there is one, no other is taken.
struct Place {
    shared: Arc<Shared>,
    /// Another move is taken afterwards only if the acceptor takes further ones.
    was_committed: bool,
}

impl FurtherLinks for Place {
    fn next(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError> {
        loop {
            self.shared.joined.clear();
            if let Slot::Taken { further, .. } = &mut self.shared.state().slot
                && let Some(link) = further.pop()
            {
                return Ok(Box::new(link));
            }
            poll_for(&self.shared.joined, wait)?;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.ended(self.was_committed);
    }
}

/// Waits until this is readable.
fn poll_for(event: &impl AsFd, wait: Wait<'_>) -> Result<(), LinkError> {
    let left = timespec(wait.left()?);
    let mut fds = vec![PollFd::new(event, PollFlags::IN)];
    fds.extend(wait.cancel.map(|cancel| PollFd::new(cancel, PollFlags::IN)));
    match poll(&mut fds, Some(&left)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
