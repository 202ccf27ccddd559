//! The new server's script: it connects to the old one, receives the items, and commits.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use limosa_foreign_fd::ForeignFd;
use limosa_host::User;

use crate::body::{Hello, Part, Refusal, decode_door};
use crate::channel::{At, Channel, FdTransport};
use crate::error::{Cause, Error, Step};
use crate::frame::{Kind, Malformed};
use crate::item::{Item, Totals};
use crate::old::ROUNDS_MAX;
use crate::parts::{Clock, Report, receive_items, transport, until};
use crate::peer::Peer;
use crate::word::Word;

/// The new server's handling of the items. Methods are called in their order, from one thread. If the switch-over
/// fails, it is dropped without [`Taker::run`]; the old server then keeps everything, so it must not have changed
/// anything.
pub trait Taker {
    /// What serves once this has run.
    type Server;

    /// Whether everything that is offered fits: descriptions, kinds, versions of state. A refusal names what does not.
    fn check(&mut self, offer: Vec<Item>) -> Result<(), Refusal>;

    /// Takes the items that are transferred while devices run: maps memory, loads state. Called again with the
    /// changes, for each further round of the old server.
    fn prepare(&mut self, items: Vec<Item>) -> Result<(), Refusal>;

    /// Takes the rest. Everything that can fail or takes time, and nothing that the VMM or the guest can see.
    fn load(&mut self, items: Vec<Item>) -> Result<(), Refusal>;

    /// Serves. Calls [`Commit::commit`] right before the first effect that the VMM or the guest can see; nothing
    /// may fail after it. [`Withdrawn`] means that the old server serves: then everything is dropped unchanged.
    fn run(self, commit: Commit<'_>) -> Result<(Committed, Self::Server), Withdrawn>;
}

/// The right to commit, once.
#[derive(Debug)]
pub struct Commit<'a> {
    word: &'a Word,
}

/// The new server serves, and the old one never again.
#[derive(Debug)]
pub struct Committed(());

/// The old server serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the old server took back: it serves")]
pub struct Withdrawn;

impl Commit<'_> {
    /// Commits. From its success on this server serves, whatever happens to the old one.
    pub fn commit(self) -> Result<Committed, Withdrawn> {
        tracing::trace!("about to commit");
        if !self.word.take() {
            return Err(Withdrawn);
        }
        tracing::trace!("committed");
        Ok(Committed(()))
    }
}

/// How long the steps of the new server may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakeLimits {
    /// To connect and say hello. By default 30 s: the old server may be busy with another one.
    pub hello: Duration,
    /// For the old server to make its offer. By default 30 s.
    pub offer: Duration,
    /// Limit for the transfer while devices run. Default 120 s.
    pub prepare: Duration,
    /// For the old server to make another round, or to freeze and hand over the rest. By default 10 s: it is the old server
    /// that watches the time here, and takes back.
    pub rest: Duration,
}

impl Default for TakeLimits {
    fn default() -> TakeLimits {
        TakeLimits {
            hello: Duration::from_secs(30),
            offer: Duration::from_secs(30),
            prepare: Duration::from_secs(120),
            rest: Duration::from_secs(10),
        }
    }
}

/// How the new server takes.
#[derive(Clone, Copy, Default)]
pub struct TakeOptions<'a> {
    /// The program and its version, for the other side's messages.
    pub name: &'a str,
    /// Limits.
    pub limits: TakeLimits,
    /// Called after each completed step, on the same thread.
    pub observer: Option<&'a dyn Fn(Step)>,
}

/// Where the new server reaches the old one.
#[derive(Debug)]
pub enum OldServer<'a> {
    /// The socket of the old server's [`TakeOver`](crate::TakeOver). Fds are pulled.
    Path(&'a Path),
    /// The other end of the socket pair of [`give_to_child`](crate::give_to_child). Fds are sent.
    Parent(UnixStream),
}

/// A switch-over that took place: the new server serves.
#[derive(Debug)]
#[non_exhaustive]
pub struct Taken<S> {
    /// What serves.
    pub server: S,
    /// The old server's process. It ends on its own; [`Peer::see_off`] waits for that.
    pub old: Peer,
    /// How it went.
    pub report: Report,
}

/// Takes over from the old server.
///
/// # Errors
///
/// The new server does not serve, and `taker` has been dropped. The old one serves, if it lives.
pub fn take<T: Taker>(
    from: OldServer<'_>,
    mut taker: T,
    options: &TakeOptions,
) -> Result<Taken<T::Server>, Error> {
    let mut clock = Clock::new(options.observer);
    let (mut channel, other) = reach(from, options).at(Step::Hello)?;
    clock.done(Step::Hello);
    let mut totals = Totals::default();
    let taken = take_parts(&mut channel, &mut taker, options, &mut totals, &mut clock);
    let (word, prepared) = match taken {
        Ok(taken) => taken,
        Err(error) => {
            // The taker lets go of everything before the old server hears of it.
            drop(taker);
            tell(&mut channel, &error.cause);
            return Err(error);
        }
    };
    let run = taker.run(Commit { word: &word });
    let (Committed(()), server) = run.map_err(|Withdrawn| Cause::Withdrawn).at(Step::Running)?;
    let standstill = prepared.elapsed();
    channel.notify(Kind::Running, &[]);
    clock.done(Step::Running);
    let old = channel.into_peer().expect("the new server's channel has it");
    let report = Report { other, other_pid: old.pid(), totals, steps: clock.steps, standstill };
    Ok(Taken { server, old, report })
}

/// Everything before the commit.
fn take_parts(
    channel: &mut Channel,
    taker: &mut impl Taker,
    options: &TakeOptions,
    totals: &mut Totals,
    clock: &mut Clock,
) -> Result<(Word, Instant), Error> {
    let limits = &options.limits;
    let limit = until(limits.offer);
    let word = take_word(channel, limit).at(Step::Offer)?;
    let (_, items) = receive_items(channel, &[Part::Offer], totals, limit).at(Step::Offer)?;
    taker.check(items).map_err(Cause::Refused).at(Step::Offer)?;
    channel.send(Kind::Ready, &Part::Offer.encode(), until(limits.offer)).at(Step::Offer)?;
    clock.done(Step::Offer);
    let mut prepared = Instant::now();
    let (mut parts, mut step, mut limit) = (&[Part::Prepare][..], Step::Prepare, until(limits.prepare));
    let mut rounds = 0;
    let items = loop {
        let (part, items) = receive_items(channel, parts, totals, limit).at(step)?;
        if part == Part::Rest {
            break items;
        }
        rounds += 1;
        taker.prepare(items).map_err(Cause::Refused).at(Step::Prepare)?;
        channel.send(Kind::Ready, &Part::Prepare.encode(), until(limits.prepare)).at(Step::Prepare)?;
        clock.done(Step::Prepare);
        prepared = Instant::now();
        parts = if rounds < ROUNDS_MAX { &[Part::Prepare, Part::Rest] } else { &[Part::Rest] };
        (step, limit) = (Step::Rest, until(limits.rest));
    };
    clock.done(Step::Rest);
    taker.load(items).map_err(Cause::Refused).at(Step::Load)?;
    clock.done(Step::Load);
    Ok((word, prepared))
}

fn take_word(channel: &mut Channel, until: Instant) -> Result<Word, Cause> {
    let mut frame = channel.receive(until)?;
    let memfd = frame.fds.pop().map(ForeignFd::into_memory);
    match (frame.kind, frame.fds.len(), memfd) {
        (Kind::Word, 0, Some(Ok(memfd))) => Word::adopt(memfd).map_err(|errno| Cause::Io(errno.into())),
        (kind, ..) => {
            Err(Malformed::new("a frame's kind", kind as u16, "3 (WORD), with a sealed memfd").into())
        }
    }
}

/// Connects to the old server and gets the channel.
fn reach(from: OldServer<'_>, options: &TakeOptions) -> Result<(Channel, String), Cause> {
    let limit = until(options.limits.hello);
    let (socket, named) = match from {
        OldServer::Path(path) => {
            let door = limosa_host::connect(path, options.limits.hello)
                .map_err(|errno| connect_failed(path, errno.into()))?;
            let (socket, token) = open_channel(&door, limit)?;
            (socket, Some((token, door)))
        }
        OldServer::Parent(channel) => (OwnedFd::from(channel), None),
    };
    let old = trusted(Peer::of(&socket)?)?;
    let mut channel = Channel::new(socket, transport(named.is_none()), Some(old))?;
    let hello = Hello::decode(&channel.expect(Kind::Hello, "2 (HELLO)", limit)?)?;
    if named.as_ref().is_some_and(|(token, _)| *token != hello.token) {
        return Err(Cause::OtherProcess);
    }
    if transport(hello.sends_fds) != channel.transport() {
        return Err(
            Malformed::new("HELLO's flags", u8::from(hello.sends_fds), "as the channel was reached").into()
        );
    }
    let answer = Hello { name: options.name.into(), ..hello.clone() };
    channel.send(Kind::Hello, &answer.encode(), limit)?;
    Ok((channel, hello.name))
}

/// Pulls the channel from the process that listens.
fn open_channel(door: &UnixStream, until: Instant) -> Result<(OwnedFd, [u8; 16]), Cause> {
    let old = trusted(Peer::of(door)?)?;
    let mut door = Channel::new(door.try_clone()?.into(), FdTransport::Pulled, Some(old))?;
    let mut frame = door.receive(until).map_err(|cause| match cause {
        Cause::Late => Cause::Unanswered,
        Cause::Ended => Cause::NoDoor,
        cause => cause,
    })?;
    let token = match frame.kind {
        Kind::Door => decode_door(&frame.body)?,
        kind => return Err(Malformed::new("a frame's kind", kind as u16, "1 (DOOR)").into()),
    };
    let channel = frame.fds.pop().map(ForeignFd::into_unix_stream);
    match (channel, frame.fds.len()) {
        (Some(Ok(channel)), 0) => Ok((channel.into_inner().into(), token)),
        _ => Err(Malformed::new("DOOR's fds", 0_u8, "a UNIX stream socket").into()),
    }
}

fn connect_failed(path: &Path, error: std::io::Error) -> std::io::Error {
    let what = format!(
        "{}: {error}; expected the socket of a server that was started with --takeover and this path",
        path.display()
    );
    std::io::Error::new(error.kind(), what)
}

/// Checks that the old server runs as this process' user or as root, since this process uses everything that it hands
/// over.
fn trusted(old: Peer) -> Result<Peer, Cause> {
    match [User::current(), User::ROOT].contains(&old.user()) {
        true => Ok(old),
        false => Err(Cause::Untrusted(old.user())),
    }
}

/// Tells the old server why this one has refused.
fn tell(channel: &mut Channel, cause: &Cause) {
    let refusal = match cause {
        Cause::Ended | Cause::RefusedByOther(_) => return,
        Cause::Refused(refusal) => refusal.clone(),
        cause => Refusal::new(cause.to_string()),
    };
    channel.notify(Kind::Refused, &refusal.encode());
}
