//! The threads of an acceptor: one accepts, and each connection has one until its opening is complete or refused.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use limosa_stream::{MigrationId, PrefaceFlags};
use rustix::event::{PollFd, PollFlags, poll};

use super::heard::HeardLink;
use super::shared::{Shared, log_others};
use crate::cancel::{after, timespec};
use crate::destination::answer::{Asked, refuse, reply};
use crate::destination::handshake::{not_under_way, trust};
use crate::destination::opening::{self, Opening, Request, Unopened};
use crate::link::{Link, LinkError, Listener, SocketLink, Tls, TlsLink, Wait};
use crate::protocol::limits::Limits;
use crate::transfer::team::OnDrop;
use crate::wire::{Connection, link_failed};
use crate::{Error, Options, Result};

/// The pause after the system refused to accept a connection.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);
/// A wait without a limit.
const LONG: Duration = Duration::from_secs(3600);

/// The thread that accepts.
pub(super) struct Listening {
    pub(super) listener: Listener,
    pub(super) tls: Option<Tls>,
    pub(super) shared: Arc<Shared>,
}

impl Listening {
    pub(super) fn run(self) {
        let mut pause = None;
        loop {
            self.poll(pause.take());
            let mut state = self.shared.state();
            if state.is_over {
                return;
            }
            let others = state.passed_over.rest(Instant::now());
            drop(state);
            log_others(others.unwrap_or(0));
            match self.listener.accept(Wait { deadline: Instant::now(), cancel: None }) {
                Ok(link) => self.start(link, thread::Builder::new()),
                Err(LinkError::TimedOut) => {}
                Err(error) => {
                    let peer = self.listener.address().to_string();
                    let doing = "accepting a connection";
                    self.shared.passed_over(&peer, &Error::Link { peer: peer.clone(), doing, error });
                    pause = Some(REFUSED_PAUSE);
                }
            }
        }
    }

    /// Waits until a client connects or there is other work. During a pause no connection is accepted.
    fn poll(&self, pause: Option<Duration>) {
        let due = self.shared.state().passed_over.due();
        let until_due = due.map_or(LONG, |due| due.saturating_duration_since(Instant::now()));
        let limit = timespec(pause.unwrap_or(LONG).min(until_due));
        let mut fds = vec![PollFd::new(&self.shared.control, PollFlags::IN)];
        if pause.is_none() {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        // Whatever ends it, the caller looks at everything.
        let _ = poll(&mut fds, Some(&limit));
        self.shared.control.clear();
    }

    /// Starts the thread of a new connection.
    fn start(&self, link: SocketLink, thread: thread::Builder) {
        let (link, since) = (Arc::new(link), Instant::now());
        let opener = Opener {
            number: self.shared.begin(&link, since),
            shared: Arc::clone(&self.shared),
            tls: self.tls.clone(),
            until: after(since, self.shared.silence_max),
        };
        let (number, peer) = (opener.number, link.peer().to_owned());
        if let Err(error) = thread.name("limosa: accepted".into()).spawn(move || opener.run(link)) {
            self.shared.forget(number);
            self.shared.passed_over(&peer, &Error::Os { doing: "starting a thread for a connection", error });
        }
    }
}

/// The thread of one connection.
struct Opener {
    shared: Arc<Shared>,
    number: u64,
    tls: Option<Tls>,
    /// The end of the limit for the opening.
    until: Instant,
}

impl Opener {
    fn run(self, socket: Arc<SocketLink>) {
        // Also after a panic.
        let _forget = OnDrop(|| {
            self.shared.forget(self.number);
        });
        let peer = socket.peer().to_owned();
        match self.open(socket) {
            Ok(()) => {}
            // It was closed to make room for another one, which has been said.
            Err(_) if !self.shared.forget(self.number) => {}
            Err(why) => self.shared.passed_over(&peer, &why),
        }
    }

    /// Reads the opening, and does what the peer asks for. An error is the reason for which the connection was closed;
    /// the peer has received it.
    fn open(&self, socket: Arc<SocketLink>) -> Result<()> {
        let silence_max = self.shared.silence_max;
        let link = HeardLink::new(self.secured(socket)?);
        let connection = self.connection(&link);
        let within = Some((self.until, silence_max));
        let opened = opening::read(&mut connection.reader(), &link, within, None);
        match opened {
            Ok(Opening { id, request: Request::Move(offer) }) => {
                drop(connection);
                if let Err(why) = trust(&link, &offer, self.shared.believes) {
                    return Err(self.refuse(&link, id, why));
                }
                match self.shared.offer(self.number, link, id) {
                    Ok(()) => Ok(()),
                    Err((link, why)) => Err(self.refuse(&link, id, Error::NotTaken { why })),
                }
            }
            Ok(Opening { id, request: Request::Join(_) }) => {
                drop(connection);
                match self.shared.join(self.number, link, id) {
                    Ok(()) => Ok(()),
                    Err(link) => {
                        let from = link.peer().to_owned();
                        Err(self.refuse(&link, id, Error::Stream { from, damage: not_under_way(id) }))
                    }
                }
            }
            Ok(Opening { id, request: Request::Answer(query) }) => {
                link.forget();
                connection.send_preface(id, PrefaceFlags::empty(), None)?;
                let asked = Asked { id, query: &query, believes: self.shared.believes };
                let decision = reply(&self.shared.ledger, &asked, &connection, None)?;
                link.finish();
                self.shared.answered(link.peer(), id, decision);
                Ok(())
            }
            Err(Unopened { id, why }) => {
                link.forget();
                Err(refuse(&connection, id, *why))
            }
        }
    }

    /// The link, under TLS if there are certificates.
    fn secured(&self, socket: Arc<SocketLink>) -> Result<Box<dyn Link>> {
        let Some(tls) = &self.tls else { return Ok(Box::new(socket)) };
        let peer = socket.peer().to_owned();
        match TlsLink::accept(socket, tls, Wait { deadline: self.until, cancel: None }) {
            Ok(link) => Ok(Box::new(link)),
            Err(error) => Err(link_failed(&peer, error, "in the TLS handshake", self.shared.silence_max)),
        }
    }

    fn connection<'l>(&self, link: &'l HeardLink) -> Connection<'l> {
        let options = Options::default().with_silence_max(self.shared.silence_max);
        Connection::new(link, Limits::new(&options))
    }

    fn refuse(&self, link: &HeardLink, id: MigrationId, why: Error) -> Error {
        link.forget();
        refuse(&self.connection(link), Some(id), why)
    }
}
