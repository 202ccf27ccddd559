//! `limosa receive --forever`: one move after the other, each with its report. The devices are opened for each move, and closed
//! after it. A guest that was received is never overwritten: the next move is taken when the guest has moved on from here, or
//! when another server listens at the device's socket. What was received is noted beside the record of moves, so that this holds
//! for a receiver that is started anew, and for another one of the same device.

use std::time::Duration;

use anyhow::Context;
use limosa_client::DeviceExt;
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{Incoming, NoMove};
use limosa_protocol::State;
use serde::{Deserialize, Serialize};

use super::{Receiving, check_metrics, expose, record_and_options};
use crate::args;
use crate::commands::moving::ended::{Ending, Work};
use crate::endpoint::Endpoint;
use crate::exit::{self, Code};
use crate::found;
use crate::links::Links;
use crate::metrics::Receiver;
use crate::moves::Moves;
use crate::open::{self, Identity, Opened, Opening};
use crate::output::Output;
use crate::progress::Progress;
use crate::reports::Reports;
use crate::signals;

/// A wait that only a signal or a source ends, which is begun again.
const LONG: Duration = Duration::from_secs(3600);

pub fn receive(args: &args::Receive, opening: Opening<'_>, out: &Output) -> anyhow::Result<()> {
    let (end, cancel) = signals::end_or_cancel()?;
    let (links, address) = Links::listening(&args.listen, &args.link.tls, &args.names)?;
    check_metrics(args, &address)?;
    let moves = Moves::new(args.link.moves.folder.as_deref());
    let guests = Guests { moves: &moves };
    // Errors are reported at once, before a source connects. A guest that is here already may still move away.
    let endpoint = guests.endpoint(args, opening)?;
    if let Err(error) = guests.check_free(&endpoint) {
        tracing::warn!("{}", exit::message(&error));
    }
    drop(endpoint);
    drop(Reports::open(&args.reporting, out)?);
    let (ledger, options) = record_and_options(args)?;
    let metrics = Receiver::default();
    let receiving =
        Receiving { args, ledger: &ledger, options: &options, cancel: &cancel, metrics: &metrics };
    let listener = links.bind(&address)?;
    let _exposition = expose(args, &metrics, out)?;
    out.listening(listener.address());
    let acceptor = links.acceptor(listener, &ledger, &options)?;
    acceptor.take_further();
    while !end.is_cancelled() {
        let offered = match acceptor.accept(Wait::within(LONG, Some(&end))) {
            Ok(Incoming::Offer(offered)) => offered,
            // A source of an earlier move.
            Ok(Incoming::Answered { .. }) => {
                metrics.answered();
                continue;
            }
            // A wait that nothing ended.
            Err(LinkError::TimedOut) => continue,
            Err(LinkError::Cancelled) => break,
            Err(error) => return Err(error.into()),
        };
        let ready = || {
            let unusable = |error| (NoMove::InUse, error);
            let endpoint = guests.endpoint(args, opening).map_err(unusable)?;
            guests.check_free(&endpoint).map_err(|error| (NoMove::HasGuest, error))?;
            let pages = endpoint.destination_pages().map_err(unusable)?;
            let before = guests.hold(endpoint.devices()).map_err(unusable)?;
            Ok((endpoint, pages, before))
        };
        let (endpoint, pages, before) = match ready() {
            Ok(ready) => ready,
            Err((why, error)) => {
                metrics.refused();
                let id = offered.id();
                offered.refuse(why);
                exit::tell(&error.context(format!("move {id} is refused")), &out.one_of_many());
                continue;
            }
        };
        let out = out.one_of_many();
        let done = Ending::new(Work::Move, &args.reporting.of_move(offered.id()), &out).map(|ending| {
            // A source that has to ask is answered meanwhile.
            let taken =
                receiving.take(offered, (&endpoint, &pages), Progress::new(&out, || None), &ending, || ());
            if !taken.committed
                && let Err(error) = guests.take_back(&before)
            {
                tracing::warn!(
                    "a guest that did not come is taken for one that did: {}",
                    exit::message(&error)
                );
            }
            taken.done
        });
        if let Err(error) = done.and_then(|done| done) {
            exit::tell(&error, &out);
        }
    }
    Ok(())
}

/// The end of the notes' names in the folder of moves. Each device has a note of its own, as receivers share the folder.
const NOTE: &str = ".received";

/// A device that has got a guest from here, or is about to.
#[derive(Serialize, Deserialize)]
struct Held {
    identity: Option<Identity>,
    /// The last move away from here that was known then.
    last: Option<String>,
}

/// The guests that were received, and are not known to have moved on.
struct Guests<'a> {
    moves: &'a Moves,
}

impl Guests<'_> {
    fn last(&self, name: &str) -> Option<String> {
        self.moves.last(name).map(|moved| moved.id)
    }

    /// The name of a device's note: that of the device, in which no byte means anything to a file system.
    fn note_of(device: &str) -> anyhow::Result<String> {
        let name = open::lasting_name(device).with_context(|| format!("{device} has no name that lasts"))?;
        Ok(format!("{}{NOTE}", ::blake3::hash(name.as_bytes()).to_hex()))
    }

    fn held(&self, note: &str) -> anyhow::Result<Option<Held>> {
        let folder = self.moves.open()?;
        let read = || -> anyhow::Result<Option<Held>> {
            let Some(file) = folder.file(note)? else { return Ok(None) };
            Ok(Some(serde_json::from_slice(&folder.read(note, &file)?)?))
        };
        read().with_context(|| {
            format!("what was received cannot be read: {}", folder.path().join(note).display())
        })
    }

    fn write(&self, note: &str, held: Option<&Held>) -> anyhow::Result<()> {
        let folder = self.moves.open()?;
        let written = match held {
            Some(held) => folder.write(note, &serde_json::to_vec(held).context("no JSON")?).map(drop),
            None => folder.remove(note).map(drop),
        };
        written.with_context(|| format!("what is received cannot be noted in {}", folder.path().display()))
    }

    /// Notes that these devices have a guest from now on. Returns the earlier note.
    fn hold(&self, devices: &[Opened]) -> anyhow::Result<Vec<(String, Option<Held>)>> {
        let mut before = Vec::new();
        for device in devices {
            let given = device.given();
            let note = Self::note_of(given)?;
            let held = Held { identity: open::identity(given), last: self.last(given) };
            let was = self.held(&note)?;
            self.write(&note, Some(&held))?;
            before.push((note, was));
        }
        Ok(before)
    }

    /// No guest has come: the notes are as they were.
    fn take_back(&self, before: &[(String, Option<Held>)]) -> anyhow::Result<()> {
        before.iter().try_for_each(|(note, held)| self.write(note, held.as_ref()))
    }

    /// Opens the devices.
    fn endpoint(&self, args: &args::Receive, opening: Opening<'_>) -> anyhow::Result<Endpoint> {
        let endpoint = Endpoint::destination(opening, &args.devices.names(), &args.memory.memory)?;
        found::check_destination(endpoint.devices(), self.moves)?;
        match endpoint.devices().iter().find(|device| device.closes_with_us()) {
            None => Ok(endpoint),
            Some(device) => {
                let what = format!(
                    "{}: --forever is for devices behind sockets; the kernel resets this one when it is closed between moves",
                    device.given()
                );
                Err(exit::error(Code::Refused, what))
            }
        }
    }

    /// Whether nothing would be lost by a move to these devices.
    fn check_free(&self, endpoint: &Endpoint) -> anyhow::Result<()> {
        for device in endpoint.devices() {
            if self.has_guest(device)? {
                let what = format!(
                    "{}: the guest that was received last is in it, and has not moved on; a move takes its place only \
                     after `limosa send`, `migrate` or `save --stop` with the same --moves, or with another server",
                    device.given()
                );
                return Err(exit::error(Code::Refused, what));
            }
        }
        Ok(())
    }

    fn has_guest(&self, device: &Opened) -> anyhow::Result<bool> {
        let name = device.given();
        let Some(held) = self.held(&Self::note_of(name)?)? else { return Ok(false) };
        if held.identity != open::identity(name) {
            return Ok(false);
        }
        Ok(device.state()? != State::Stop || self.last(name) == held.last)
    }
}
