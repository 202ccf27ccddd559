//! `limosa receive --forever`: one move after the other, each with its report. The devices are opened for each move, and closed
//! after it. A guest that was received is never overwritten: the next move is taken when the guest has moved on from here, or
//! when another server listens at the device's socket.

use std::time::Duration;

use limosa_client::DeviceExt;
use limosa_migrate::link::{LinkError, Wait};
use limosa_migrate::{Incoming, NoMove};
use limosa_protocol::State;

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
    let mut guests = Guests { held: Vec::new(), moves: &moves };
    // What is wrong before anybody connects is said at once.
    drop(guests.free_endpoint(args, opening)?);
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
        let ready = guests.free_endpoint(args, opening).and_then(|endpoint| {
            let pages = endpoint.destination_pages()?;
            Ok((endpoint, pages))
        });
        let (endpoint, pages) = match ready {
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
                guests.hold(endpoint.devices());
                acceptor.take_further();
            }
            taken.done
        });
        if let Err(error) = done.and_then(|done| done) {
            exit::tell(&error, &out);
        }
    }
    Ok(())
}

/// A device that has got a guest from here.
struct Held {
    name: String,
    identity: Option<Identity>,
    /// The last move away from here that was known then.
    last: Option<String>,
}

/// The guests that were received, and are not known to have moved on.
struct Guests<'a> {
    held: Vec<Held>,
    moves: &'a Moves,
}

impl Guests<'_> {
    fn last(&self, name: &str) -> Option<String> {
        self.moves.last(name).map(|moved| moved.id)
    }

    /// These devices have a guest now.
    fn hold(&mut self, devices: &[Opened]) {
        let held = devices.iter().map(|device| {
            let name = device.given();
            Held { name: name.into(), identity: open::identity(name), last: self.last(name) }
        });
        self.held = held.collect();
    }

    /// Opens the devices, if nothing would be lost by a move to them.
    fn free_endpoint(&self, args: &args::Receive, opening: Opening<'_>) -> anyhow::Result<Endpoint> {
        let endpoint = Endpoint::destination(opening, &args.devices.names(), &args.memory.memory)?;
        found::check_destination(endpoint.devices(), self.moves)?;
        let refused = |what: String| Err(exit::error(Code::Refused, what));
        for device in endpoint.devices() {
            let name = device.given();
            if device.closes_with_us() {
                return refused(format!(
                    "{name}: --forever is for devices behind sockets; the kernel resets this one when it is closed between moves"
                ));
            }
            if self.has_guest(device)? {
                return refused(format!(
                    "{name}: the guest that was received last is in it, and has not moved on; a move takes its place only \
                     after `limosa send`, `migrate` or `save --stop` with the same --moves, or with another server"
                ));
            }
        }
        Ok(endpoint)
    }

    fn has_guest(&self, device: &Opened) -> anyhow::Result<bool> {
        let name = device.given();
        let Some(held) = self.held.iter().find(|held| held.name == name) else { return Ok(false) };
        if held.identity != open::identity(name) {
            return Ok(false);
        }
        Ok(device.state()? != State::Stop || self.last(name) == held.last)
    }
}
