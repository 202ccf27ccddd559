//! What moves a device: `limosa migrate`, `send`, `receive`, `save`, `load`.

use std::fmt;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::Context;
use limosa_client::Device;
use limosa_migrate::link::{self, Address, Link, LinkError, Listener, SocketLink, Wait};
use limosa_migrate::stream::Damage;
use limosa_migrate::{
    AfterLoad, AfterSave, Cancel, Destination, Error, InDoubt, Ledger, Memory, MovedDevice, Nobody, Options,
    Outcome, Phase, Received, Report, Source, WhenStalled, move_local,
};
use serde::Serialize;

use crate::args;
use crate::exit::{self, Code};
use crate::links::{self, Links};
use crate::moves::{Moves, Sending};
use crate::output::Output;
use crate::progress::Progress;
use crate::signals;

/// How long a source in doubt waits before it asks again.
const ASK_EVERY: Duration = Duration::from_millis(500);

#[derive(Serialize)]
struct Moved<'a> {
    outcome: &'a str,
    #[serde(flatten)]
    report: &'a Report,
}

fn print(out: &Output, outcome: &str, report: &Report) -> anyhow::Result<()> {
    out.result(&Moved { outcome, report }, |to| write!(to, "{report}"))
}

/// Ctrl-C calls a move off instead of tearing it apart.
pub fn cancel_on_signal() -> anyhow::Result<Cancel> {
    let cancel = Cancel::new().context("cannot make an eventfd")?;
    let on_signal = cancel.clone();
    signals::on_end(move || on_signal.cancel())?;
    Ok(cancel)
}

fn options(moving: &args::Moving) -> Options {
    let mut options = Options { precopy: !moving.no_precopy, ..Options::default() };
    let convergence = &mut options.convergence;
    if let Some(limit) = moving.downtime_limit {
        (convergence.downtime_max, convergence.when_stalled) = (limit, WhenStalled::Abort);
    }
    convergence.when_stalled = match moving.when_stalled {
        Some(args::WhenStalled::KeepTrying) => WhenStalled::KeepTrying,
        Some(args::WhenStalled::SwitchOver) => WhenStalled::SwitchOver,
        Some(args::WhenStalled::Abort) => WhenStalled::Abort,
        None => convergence.when_stalled,
    };
    options
}

/// With the time limits of a link that may be lost.
fn over_link(options: Options, link: &args::Link) -> Options {
    Options { silence_max: link.silence, commit_max: link.silence, ..options }
}

/// An address of a socket.
pub fn address(text: &str) -> anyhow::Result<Address> {
    match text.parse() {
        Ok(Address::File(_)) => Err(exit::error(
            Code::Usage,
            format!(
                "`{text}`: expected unix:PATH or tcp:HOST:PORT; a file is written by `limosa save` and read by \
                 `limosa load`"
            ),
        )),
        Ok(address) => Ok(address),
        Err(error) => Err(exit::error(Code::Usage, link::AddressError::to_string(&error))),
    }
}

pub fn migrate(from: &dyn Device, to: &dyn Device, args: &args::Migrate, out: &Output) -> anyhow::Result<()> {
    let (cancel, progress, options) = (cancel_on_signal()?, Progress::new(out), options(&args.moving));
    let (from, to) = ([MovedDevice::new(from)], [MovedDevice::new(to)]);
    let mut source = source(&from, &progress, &options, &cancel);
    let ledger = Ledger::new();
    let destination = destination(&to, &Nobody, &options, &cancel, &ledger);
    let (outcome, received) = move_local(&mut source, &destination);
    drop(progress);
    match (outcome, received) {
        (_, Received::Broken { why, .. }) => Err(broken(&args.destination, why)),
        (Outcome::Undone { why, mut report }, Received::Discarded { why: why_there, report: there }) => {
            report.notes.extend(there.notes);
            // What was called off there is known here at first hand.
            let why = if matches!(why, Error::Aborted { .. }) { why_there } else { why };
            settled(Outcome::Undone { why, report }, out)
        }
        (outcome, _) => settled(outcome, out),
    }
}

pub fn send(device: &dyn Device, args: &args::Send, out: &Output) -> anyhow::Result<()> {
    let address = address(&args.to)?;
    let (cancel, progress) = (cancel_on_signal()?, Progress::new(out));
    let options = over_link(options(&args.moving), &args.link);
    let links = Links::to(&address, &args.link.tls)?.limited(args.bandwidth, args.link.silence)?;
    let hint = "is `limosa receive` listening there?";
    let link = connect(&links, &address, options.silence_max, Some(&cancel), hint)?;
    let moved = [MovedDevice::new(device)];
    let moves = Moves::new(args.link.moves.folder.as_deref());
    let sending = Sending { moves: &moves, device: &args.device, to: address.to_string() };
    let mut source = Source { vmm: &sending, ..source(&moved, &progress, &options, &cancel) };
    let mut outcome = source.send(&link);
    drop(link);
    let began = Instant::now();
    while let Outcome::InDoubt(doubt) = outcome {
        tracing::warn!("in doubt: {}; asking {address} what became of move {}", doubt.why, doubt.id);
        let Some(left) = args.link.silence.checked_sub(began.elapsed()) else {
            return Err(in_doubt(&args.device, &doubt));
        };
        outcome = match links.connect(&address, left, Some(&cancel)) {
            Ok(link) => source.resolve(doubt, &link),
            // Nobody is there to be asked, now or later.
            Err(error) if nobody_listens(&error) => return Err(in_doubt(&args.device, &doubt)),
            Err(_) => Outcome::InDoubt(doubt),
        };
        if let Outcome::InDoubt(doubt) = &outcome
            && cancel.wait(ASK_EVERY)
        {
            return Err(in_doubt(&args.device, doubt));
        }
    }
    drop(progress);
    if let Outcome::Moved(report) | Outcome::Undone { report, .. } = &outcome {
        moves.forget(&report.id);
    }
    settled(outcome, out)
}

/// Listens where the user said.
pub fn listen(text: &str) -> anyhow::Result<Listener> {
    let address = address(text)?;
    Listener::bind(&address).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound if matches!(address, Address::Unix(_)) => "make its folder first",
            _ => "choose another address",
        };
        exit::error(Code::Unreachable, format!("cannot listen on {address}: {error}; {hint}"))
    })
}

pub fn receive(device: &dyn Device, args: &args::Receive, out: &Output) -> anyhow::Result<()> {
    let links = Links::new(&args.link.tls)?;
    let listener = listen(&args.listen)?;
    let (cancel, progress) = (cancel_on_signal()?, Progress::new(out));
    let moves = Moves::new(args.link.moves.folder.as_deref());
    let (options, ledger) = (over_link(Options::default(), &args.link), moves.ledger()?);
    let moved = [MovedDevice::new(device)];
    let destination = destination(&moved, &progress, &options, &cancel, &ledger);
    say_where(listener.address(), out);
    let accept = |within| listener.accept(Wait::within(within, Some(&cancel)));
    let take = |link| links.take(link, args.link.silence, &cancel);
    let stay = 2 * args.link.silence;
    loop {
        let link = accept(args.wait).map_err(|error| match error {
            LinkError::TimedOut => exit::error(
                Code::Unreachable,
                format!("{}: nobody connected within {:?}", args.listen, args.wait),
            ),
            LinkError::Cancelled => Error::Cancelled.into(),
            error => error.into(),
        })?;
        let link = take(link)?;
        return match destination.receive(&link) {
            Received::Runs(report) => {
                drop(link);
                if !report.peer_told {
                    answer(&destination, accept, take, stay);
                }
                drop(progress);
                print(out, "runs", &report)
            }
            Received::Stopped(report) => print(out, "stopped", &report),
            // A source of an earlier move; the one that is waited for is still to come.
            Received::Answered { .. } => continue,
            Received::Discarded { why, report } => {
                drop(link);
                if source_may_doubt(&why, &report) {
                    answer(&destination, accept, take, stay);
                }
                let notes = Notes(&report.notes).to_string();
                Err(anyhow::Error::from(why).context(format!("{} was not loaded{notes}", args.device)))
            }
            Received::Broken { why, .. } => Err(broken(&args.device, why)),
        };
    }
}

/// Tells whoever waits for it where the sender is to connect. In JSON mode the document is all that goes
/// to standard output.
pub fn say_where(address: &Address, out: &Output) {
    let line = format!("listening on {address}");
    let said = match out.json {
        false => writeln!(io::stdout(), "{line}"),
        true => writeln!(io::stderr(), "{line}"),
    };
    // Whoever does not listen need not be told.
    let _ = said;
}

/// Whether the link was lost when the source may have sent its COMMIT: it cannot know that this did not
/// come.
fn source_may_doubt(why: &Error, report: &Report) -> bool {
    let held = report.phases.iter().any(|phase| phase.phase == Phase::Commit);
    held && matches!(why, Error::Link { .. } | Error::TimedOut { .. })
}

/// The source could not be told how the move ended: stays until it has asked.
fn answer(
    destination: &Destination<'_>,
    accept: impl Fn(Duration) -> Result<SocketLink, LinkError>,
    take: impl Fn(SocketLink) -> anyhow::Result<Box<dyn Link>>,
    stay: Duration,
) {
    tracing::warn!(
        "the source may be in doubt how the move ended; staying {stay:?} to be asked; SIGINT ends that"
    );
    let began = Instant::now();
    while let Some(left) = stay.checked_sub(began.elapsed()) {
        let Ok(link) = accept(left) else { return };
        let link = match take(link) {
            Ok(link) => link,
            Err(error) => {
                tracing::warn!("{error}");
                continue;
            }
        };
        if let Received::Answered { .. } = destination.receive(&link) {
            return;
        }
    }
}

pub fn save(device: &dyn Device, args: &args::Save, out: &Output) -> anyhow::Result<()> {
    let (cancel, progress, options) = (cancel_on_signal()?, Progress::new(out), Options::default());
    let moved = [MovedDevice::new(device)];
    let after = if args.stop { AfterSave::Stop } else { AfterSave::Run };
    let outcome = source(&moved, &progress, &options, &cancel).save(&args.file, after);
    drop(progress);
    settled(outcome, out)
}

pub fn load(device: &dyn Device, args: &args::Load, out: &Output) -> anyhow::Result<()> {
    let (cancel, progress, options, ledger) =
        (cancel_on_signal()?, Progress::new(out), Options::default(), Ledger::new());
    let moved = [MovedDevice::new(device)];
    let after = if args.stop { AfterLoad::Stop } else { AfterLoad::Run };
    let received = destination(&moved, &progress, &options, &cancel, &ledger).load(&args.file, after);
    drop(progress);
    match received {
        Received::Runs(report) => print(out, "runs", &report),
        Received::Stopped(report) => print(out, "stopped", &report),
        Received::Discarded { why, report } => {
            let (hint, notes) = (what_to_do_with(&why), Notes(&report.notes).to_string());
            Err(anyhow::Error::from(why)
                .context(format!("{} was not loaded{hint}{notes}", args.file.display())))
        }
        Received::Broken { why, .. } => Err(broken(&args.device, why)),
        Received::Answered { .. } => {
            Err(anyhow::anyhow!("{}: it is not a saved stream", args.file.display()))
        }
    }
}

/// What a person can do with a file that cannot be loaded.
fn what_to_do_with(why: &Error) -> &'static str {
    match why {
        Error::Stream { damage: Damage::NotAStream, .. } => "; expected a file that `limosa save` wrote",
        Error::Stream { damage: Damage::Newer { .. }, .. } => "; load it with a newer limosa",
        Error::Stream { .. } => " (`limosa inspect` tells more); save it anew",
        Error::Incompatible { .. } => "; load it into a device like the one that was saved",
        _ => "",
    }
}

fn source<'a>(
    devices: &'a [MovedDevice<'a>],
    progress: &'a Progress,
    options: &'a Options,
    cancel: &'a Cancel,
) -> Source<'a> {
    Source {
        devices,
        memory: Memory::default(),
        vmm: &Nobody,
        observer: progress,
        options,
        cancel: Some(cancel),
    }
}

fn destination<'a>(
    devices: &'a [MovedDevice<'a>],
    observer: &'a dyn limosa_migrate::Observer,
    options: &'a Options,
    cancel: &'a Cancel,
    ledger: &'a Ledger,
) -> Destination<'a> {
    Destination { devices, memory: &[], vmm: &Nobody, observer, options, cancel: Some(cancel), ledger }
}

fn nobody_listens(error: &LinkError) -> bool {
    let kinds = [io::ErrorKind::ConnectionRefused, io::ErrorKind::NotFound];
    matches!(error, LinkError::Io(error) if kinds.contains(&error.kind()))
}

/// Connects to who is there; `hint` says who that should be.
pub fn connect(
    links: &Links,
    address: &Address,
    limit: Duration,
    cancel: Option<&Cancel>,
    hint: &str,
) -> anyhow::Result<Box<dyn Link>> {
    links.connect(address, limit, cancel).map_err(|error| match error {
        LinkError::Io(error) => {
            exit::error(Code::Unreachable, format!("cannot connect to {address}: {error}; {hint}"))
        }
        error => links::failed(&address.to_string(), error),
    })
}

/// What an ended move gives.
fn settled(outcome: Outcome, out: &Output) -> anyhow::Result<()> {
    match outcome {
        Outcome::Moved(report) => print(out, "moved", &report),
        Outcome::Undone { why, report } => {
            let notes = Notes(&report.notes).to_string();
            let source = match notes.as_str() {
                "" => "the source is as it was before",
                _ => "the move was undone, but not all is as it was before",
            };
            Err(anyhow::Error::from(why).context(format!("{source}{notes}")))
        }
        Outcome::InDoubt(doubt) => Err(in_doubt("the source", &doubt)),
    }
}

/// What a person should know of a move that failed.
struct Notes<'a>(&'a [String]);

impl fmt::Display for Notes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|note| write!(f, "; {note}"))
    }
}

fn in_doubt(device: &str, doubt: &InDoubt) -> anyhow::Error {
    exit::error(
        Code::InDoubt,
        format!(
            "{device} is stopped and in doubt: {}. The destination may run move {}; `limosa resolve` asks it again. \
             Look there if nobody can answer: if it runs, leave this device stopped; only if it does not, \
             and never will, set this one to RUNNING (`limosa resolve --decide` does either)",
            doubt.why, doubt.id
        ),
    )
}

fn broken(device: &str, why: Error) -> anyhow::Error {
    anyhow::Error::from(why).context(format!(
        "{device}: the move was committed, but the device could neither be started nor stopped; reset it, or restart \
         its server, and start the guest anew"
    ))
}
