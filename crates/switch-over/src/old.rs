//! The old server's script over a channel to a new server, and how it withdraws.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::body::{Hello, Part, Refusal, Token};
use crate::channel::{At, Channel, FdTransport};
use crate::error::{Cause, Error, Step};
use crate::frame::{Kind, Malformed};
use crate::item::Totals;
use crate::parts::{Clock, Report, Waiting, add_up, send_items, until};
use crate::peer::Peer;
use crate::word::{Serves, Word};

/// Rounds of a preparation, the first included.
pub const ROUNDS_MAX: usize = 32;

/// The old server's side. Methods are called in their order, from one thread.
pub trait Giver {
    /// The offer, so that the new server can refuse it: devices, their kinds and versions.
    fn offer(&self) -> Result<Vec<crate::Item>, Refusal>;

    /// Everything that can be transferred while devices run: memory, files, listeners, state.
    fn prepare(&self) -> Result<Vec<crate::Item>, Refusal>;

    /// The changes since the last call, and data that did not fit into it, while devices still run. `None` once the
    /// rest is small enough, or no longer shrinks. Called again after each round that the new server has accepted,
    /// until it returns `None` or after [`ROUNDS_MAX`] rounds.
    fn prepare_more(&self) -> Result<Option<Vec<crate::Item>>, Refusal> {
        Ok(None)
    }

    /// Stops everything by then: nothing is read from a socket, written, signalled or accessed by DMA once this
    /// returns. After an error [`Giver::thaw`] is called.
    fn freeze(&self, until: Instant) -> Result<(), Refusal>;

    /// Everything else, changes since [`Giver::prepare`] included.
    fn rest(&self) -> Result<Vec<crate::Item>, Refusal>;

    /// Serves again as before [`Giver::prepare`]. Called for each attempt that fails after [`Giver::prepare`] was called, at
    /// whatever step; the last call may have failed or panicked.
    fn thaw(&self);

    /// The new server serves. This one never serves again: it drops everything, without sending anything to peers, and
    /// its process ends soon.
    fn given(&self);
}

/// How long the steps of the old server may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GiveLimits {
    /// From a connection until the new server has said hello. By default 5 s.
    pub hello: Duration,
    /// Limit for the new server to check the offer. Default 30 s.
    pub offer: Duration,
    /// Limit for all rounds of the transfer while devices run, in which the new server maps memory and loads state.
    /// Default 120 s.
    pub prepare: Duration,
    /// For everything from the freeze until the new server serves; then the old one takes back. By default 2 s, less
    /// than the patience of VMMs (5 s).
    pub freeze: Duration,
}

impl Default for GiveLimits {
    fn default() -> GiveLimits {
        GiveLimits {
            hello: Duration::from_secs(5),
            offer: Duration::from_secs(30),
            prepare: Duration::from_secs(120),
            freeze: Duration::from_secs(2),
        }
    }
}

/// How the old server gives.
#[derive(Clone, Copy, Default)]
pub struct GiveOptions<'a> {
    /// The program and its version, for the other side's messages.
    pub name: &'a str,
    /// Limits.
    pub limits: GiveLimits,
    /// Called after each completed step, on the same thread.
    pub observer: Option<&'a dyn Fn(Step)>,
}

/// A switch-over that took place: the new server serves, and [`Giver::given`] has returned.
#[derive(Debug)]
#[non_exhaustive]
pub struct Given {
    /// How it went.
    pub report: Report,
}

/// Hands over to a child that this process started and gave the other end of `channel`, a socket pair
/// ([`start_child`](crate::start_child)). Fds are sent. `stop` ends the wait for the child's hello when it becomes readable; a
/// switch-over that has begun is finished first. The report has 0 for the child's number, which the caller knows.
///
/// # Errors
///
/// See [`TakeOver::serve_one`](crate::TakeOver::serve_one).
pub fn give_to_child(
    channel: UnixStream,
    giver: &dyn Giver,
    options: &GiveOptions,
    stop: Option<BorrowedFd<'_>>,
) -> Result<Given, Error> {
    let limit = until(options.limits.hello);
    let mut channel =
        Channel::new(OwnedFd::from(channel), FdTransport::Sent, None).map_err(Cause::Io).at(Step::Hello)?;
    let token = new_token().map_err(Cause::Io).at(Step::Hello)?;
    say_hello(&mut channel, token, options.name, limit).at(Step::Hello)?;
    channel.wait_unless(stop, limit).at(Step::Hello)?;
    let hello = hear_hello(&mut channel, token, limit).at(Step::Hello)?;
    // The socket pair's maker is this process, so that nothing says who has the other end.
    let child = Other { name: hello.name, pid: 0 };
    give(channel, child, giver, options)
}

/// A token that no other connection has.
pub(crate) fn new_token() -> std::io::Result<Token> {
    let mut token = Token::default();
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut token)?;
    Ok(token)
}

/// The old server's first frame.
pub(crate) fn say_hello(
    channel: &mut Channel,
    token: Token,
    name: &str,
    until: Instant,
) -> Result<(), Cause> {
    let sends_fds = channel.transport() == FdTransport::Sent;
    let hello = Hello { token, sends_fds, name: name.into() };
    channel.send(Kind::Hello, &hello.encode(), until)
}

/// The new server's first frame.
pub(crate) fn hear_hello(channel: &mut Channel, token: Token, until: Instant) -> Result<Hello, Cause> {
    let hello = Hello::decode(&channel.expect(Kind::Hello, "2 (HELLO)", until)?)?;
    match hello.token == token {
        true => Ok(hello),
        false => Err(Cause::OtherProcess),
    }
}

/// Whom the old server hands over to.
pub(crate) struct Other {
    pub(crate) name: String,
    pub(crate) pid: i32,
}

impl Other {
    pub(crate) fn new(hello: Hello, peer: &Peer) -> Other {
        Other { name: hello.name, pid: peer.pid() }
    }
}

/// Hands over to whoever said hello.
pub(crate) fn give(
    mut channel: Channel,
    other: Other,
    giver: &dyn Giver,
    options: &GiveOptions,
) -> Result<Given, Error> {
    let mut clock = Clock::new(options.observer);
    clock.done(Step::Hello);
    let mut totals = Totals::default();
    let word = match offer(&mut channel, giver, &options.limits, &mut totals, &mut clock) {
        Ok(word) => word,
        Err(error) => {
            tell(&mut channel, &error.cause);
            return Err(error);
        }
    };
    let mut attempt = Attempt { giver, word: &word, is_settled: false };
    let prepared = attempt.prepare(&mut channel, until(options.limits.prepare), &mut totals, &mut clock);
    let began = Instant::now();
    let handed = prepared.and_then(|()| {
        attempt.hand_over(&mut channel, until(options.limits.freeze), &mut totals, &mut clock)
    });
    match attempt.settle() {
        Serves::New => {
            let standstill = began.elapsed();
            if let Err(error) = handed {
                tracing::info!(%error, "the new server serves, although it did not say so");
            }
            drop(channel);
            giver.given();
            clock.done(Step::Running);
            let report =
                Report { other: other.name, other_pid: other.pid, totals, steps: clock.steps, standstill };
            Ok(Given { report })
        }
        Serves::Old => {
            // A peer that says that it serves, and did not take, is wrong.
            let error = handed.err().unwrap_or(Error { step: Step::Running, cause: Cause::Withdrawn });
            tell(&mut channel, &error.cause);
            Err(error)
        }
    }
}

/// The word, and what there is to be handed over.
fn offer(
    channel: &mut Channel,
    giver: &dyn Giver,
    limits: &GiveLimits,
    totals: &mut Totals,
    clock: &mut Clock,
) -> Result<Word, Error> {
    let limit = until(limits.offer);
    let word = Word::new().map_err(|errno| Cause::Io(errno.into())).at(Step::Offer)?;
    channel.queue(Kind::Word, &[], &[word.memfd().as_fd()], limit).at(Step::Offer)?;
    let items = giver.offer().map_err(Cause::Refused).at(Step::Offer)?;
    hand_part(channel, Part::Offer, items, totals, limit).at(Step::Offer)?;
    clock.done(Step::Offer);
    Ok(word)
}

/// Hands over a part, and waits until the new server accepts it.
fn hand_part(
    channel: &mut Channel,
    part: Part,
    items: Vec<crate::Item>,
    totals: &mut Totals,
    until: Instant,
) -> Result<(), Cause> {
    add_up(totals, &items)?;
    let waiting = send_items(channel, part, items, totals, until)?;
    let ready = Part::decode(&channel.expect(Kind::Ready, "8 (READY)", until)?)?;
    drop(waiting);
    match ready == part {
        true => Ok(()),
        false => Err(Malformed::new("READY's step", ready as u16, "the step that was handed over").into()),
    }
}

/// The old server from its preparation to the decision. However this ends, the giver serves as before or has given.
struct Attempt<'a> {
    giver: &'a dyn Giver,
    word: &'a Word,
    is_settled: bool,
}

impl Attempt<'_> {
    /// Hands over what can be handed over while devices run, in rounds.
    fn prepare(
        &self,
        channel: &mut Channel,
        until: Instant,
        totals: &mut Totals,
        clock: &mut Clock,
    ) -> Result<(), Error> {
        let refused = |refusal| Error { step: Step::Prepare, cause: Cause::Refused(refusal) };
        let mut items = self.giver.prepare().map_err(refused)?;
        for round in 1.. {
            hand_part(channel, Part::Prepare, items, totals, until).at(Step::Prepare)?;
            clock.done(Step::Prepare);
            if round == ROUNDS_MAX {
                break;
            }
            match self.giver.prepare_more().map_err(refused)? {
                Some(more) => items = more,
                None => break,
            }
        }
        Ok(())
    }

    /// Freezes, opens the word, hands over the rest, and waits until the new server says something.
    fn hand_over(
        &self,
        channel: &mut Channel,
        until: Instant,
        totals: &mut Totals,
        clock: &mut Clock,
    ) -> Result<(), Error> {
        let giver = self.giver;
        giver.freeze(until).map_err(Cause::Refused).at(Step::Freeze)?;
        in_time(until).at(Step::Freeze)?;
        clock.done(Step::Freeze);
        let items = giver.rest().map_err(Cause::Refused).at(Step::Rest)?;
        add_up(totals, &items).at(Step::Rest)?;
        in_time(until).at(Step::Rest)?;
        if !self.word.open() {
            return Err(Error { step: Step::Rest, cause: Cause::Withdrawn });
        }
        clock.done(Step::Rest);
        let waiting: (Waiting, _) = send_items(channel, Part::Rest, items, totals, until).at(Step::Load)?;
        clock.done(Step::Load);
        channel.expect(Kind::Running, "10 (RUNNING)", until).at(Step::Running)?;
        drop(waiting);
        Ok(())
    }

    /// Decides, and thaws if this server serves.
    fn settle(&mut self) -> Serves {
        self.is_settled = true;
        let serves = self.word.withdraw();
        if serves == Serves::Old {
            self.giver.thaw();
        }
        serves
    }
}

impl Drop for Attempt<'_> {
    /// Only when the giver panicked.
    fn drop(&mut self) {
        if !self.is_settled && self.settle() == Serves::New {
            self.giver.given();
        }
    }
}

fn in_time(until: Instant) -> Result<(), Cause> {
    if Instant::now() < until { Ok(()) } else { Err(Cause::Late) }
}

/// Tells the other side why this one has refused, unless the other side has.
fn tell(channel: &mut Channel, cause: &Cause) {
    let refusal = match cause {
        Cause::Ended | Cause::RefusedByOther(_) => return,
        Cause::Refused(refusal) => refusal.clone(),
        cause => Refusal::new(cause.to_string()),
    };
    channel.notify(Kind::Refused, &refusal.encode());
}
