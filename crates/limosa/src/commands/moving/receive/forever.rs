//! `limosa receive --forever`: one move after the other, each with its report. The devices are opened for each move, and closed
//! after it. A guest that was received is never overwritten: the next move is taken when the guest has moved on from here, or
//! when another server listens at the device's socket. What was received is noted beside the record of moves, so that this holds
//! for a receiver that is started anew, and for another one of the same device.

use std::fmt;
use std::time::Duration;

use anyhow::Context;
use limosa_client::DeviceExt;
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{Incoming, NoMove};
use limosa_protocol::State;
use serde::{Deserialize, Serialize};

use super::{Receiving, record_and_options};
use crate::args;
use crate::commands::moving::ended::{Ending, Work};
use crate::endpoint::Endpoint;
use crate::exit::{self, Code};
use crate::found;
use crate::links::Links;
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
    let moves = Moves::new(args.link.moves.folder.as_deref());
    let guests = Guests { moves: &moves };
    // What is wrong before anybody connects is said at once. A guest that is here already may move on.
    let endpoint = guests.endpoint(args, opening)?;
    if let Err(error) = guests.check_free(&endpoint) {
        tracing::warn!("{}", exit::message(&error));
    }
    drop(endpoint);
    drop(Reports::open(&args.reporting, out)?);
    let (ledger, options) = record_and_options(args)?;
    let receiving = Receiving { args, ledger: &ledger, options: &options, cancel: &cancel };
    let listener = links.bind(&address)?;
    out.listening(listener.address());
    let acceptor = links.acceptor(listener, &ledger, &options)?;
    while !end.is_cancelled() {
        let offered = match acceptor.accept(Wait::within(LONG, Some(&end))) {
            Ok(Incoming::Offer(offered)) => offered,
            // A source of an earlier move. And a wait that nothing ended.
            Ok(Incoming::Answered { .. }) | Err(LinkError::TimedOut) => continue,
            Err(LinkError::Cancelled) => break,
            Err(error) => return Err(error.into()),
        };
        let ready = guests.endpoint(args, opening).and_then(|endpoint| {
            guests.check_free(&endpoint)?;
            let pages = endpoint.destination_pages()?;
            let before = guests.hold(endpoint.devices())?;
            Ok((endpoint, pages, before))
        });
        let (endpoint, pages, before) = match ready {
            Ok(ready) => ready,
            Err(error) => {
                tracing::warn!("move {} is refused: {}", offered.id(), exit::message(&error));
                offered.refuse(NoMove::InUse);
                continue;
            }
        };
        let out = out.one_of_many();
        let done = Ending::new(Work::Move, &args.reporting.of_move(offered.id()), &out).map(|ending| {
            // A source that has to ask is answered meanwhile.
            let taken =
                receiving.take(offered, (&endpoint, &pages), Progress::new(&out, || None), &ending, || ());
            if taken.committed {
                acceptor.take_further();
            } else if let Err(error) = guests.note(&before) {
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

/// The file in the folder of moves.
const FILE: &str = "received.json";

/// A device that has got a guest from here, or is about to.
#[derive(Clone, Serialize, Deserialize)]
struct Held {
    /// A name that means the same in every folder.
    name: String,
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

    /// All that are noted.
    fn held(&self) -> anyhow::Result<Vec<Held>> {
        let folder = self.moves.open()?;
        let failed = |error: &dyn fmt::Display| {
            exit::error(Code::Failed, format!("{}: {error}", folder.path().join(FILE).display()))
        };
        let Some(file) = folder.file(FILE).map_err(|error| failed(&error))? else { return Ok(Vec::new()) };
        let bytes = folder.read(FILE, &file).map_err(|error| failed(&error))?;
        serde_json::from_slice(&bytes).map_err(|error| failed(&error))
    }

    fn note(&self, held: &[Held]) -> anyhow::Result<()> {
        let folder = self.moves.open()?;
        let bytes = serde_json::to_vec(held).context("a list of devices cannot be written")?;
        let written = folder.write(FILE, &bytes).map(drop);
        written.with_context(|| format!("what is received cannot be noted in {}", folder.path().display()))
    }

    /// These devices have a guest from now on. What was noted before.
    fn hold(&self, devices: &[Opened]) -> anyhow::Result<Vec<Held>> {
        let before = self.held()?;
        let mut held = before.clone();
        for device in devices {
            let given = device.given();
            let name = open::lasting_name(given).with_context(|| format!("{given} has no lasting name"))?;
            // Sockets that are gone had guests that are of no concern any more.
            held.retain(|held| held.name != name && open::identity(&held.name) == held.identity);
            held.push(Held { name, identity: open::identity(given), last: self.last(given) });
        }
        self.note(&held)?;
        Ok(before)
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
        let lasting = open::lasting_name(name).with_context(|| format!("{name} has no lasting name"))?;
        let held = self.held()?;
        let Some(held) = held.iter().find(|held| held.name == lasting) else { return Ok(false) };
        if held.identity != open::identity(name) {
            return Ok(false);
        }
        Ok(device.state()? != State::Stop || self.last(name) == held.last)
    }
}
