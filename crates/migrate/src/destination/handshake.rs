//! The handshake of a destination: it compares devices and memory, and answers the offer.

use limosa_client::DeviceExt;
use limosa_protocol::State;
use limosa_stream::body::NEEDS_CREDIT;
use limosa_stream::{Answer, Damage, DeviceFacts, Kind, MigrationId, Nonce, Offer, PrefaceFlags, Proofs};

use super::Destination;
use super::commit::not_recorded;
use super::opening::{self, Opening, Request, Unopened};
use super::receiving::Receiving;
use crate::context::Context;
use crate::devices::{compare_devices, compare_memory, facts, failed, way_out_of};
use crate::error::{Mismatch, MismatchKind, Mistrust, check_cancel};
use crate::link::{FurtherLinks, Link};
use crate::memory::MemoryRegion;
use crate::wire::{Connection, Frame, within};
use crate::{Error, Result};

/// The request of a source.
pub(super) enum Greeting {
    /// A move.
    Offer(MigrationId, Offer),
    /// How a move ended, and the payload of the QUERY.
    Query(MigrationId, Vec<u8>),
}

/// The proofs of this move's frames, if the source has a secret, with a challenge that no connection has had before.
pub(super) fn proofs(id: MigrationId, offer: &Offer) -> Result<Proofs> {
    let Some(secret) = &offer.secret else { return Ok(Proofs::none()) };
    let challenge = Nonce::random().map_err(|error| Error::Os { doing: "reading random numbers", error })?;
    Ok(Proofs::new(secret.clone(), id, challenge))
}

/// Refuses a source that proves nothing, unless such peers are believed.
pub(crate) fn trust(link: &dyn Link, offer: &Offer, believes: bool) -> Result<()> {
    if !link.has_peer() || offer.secret.is_some() || believes {
        return Ok(());
    }
    let why = Mistrust::OlderVersion { sign: "its OFFER has no secret" };
    Err(Error::Unauthenticated { peer: link.peer().into(), why })
}

/// A further link of a move that this destination does not take, or not now.
pub(crate) fn not_under_way(id: MigrationId) -> Damage {
    Damage::Unexpected { what: format!("it is a further link of move {id}, which is not under way here") }
}

impl<'a> Destination<'a> {
    /// Reads what the source asks for, and answers its preface. A source that is refused is answered as well, since it reads
    /// the reason behind the preface.
    pub(super) fn greet(&self, context: &Context<'a>, connection: &Connection<'_>) -> Result<Greeting> {
        connection.reader().count(context.recorder.buffers());
        let has_peer = connection.has_peer();
        let limit = if has_peer { self.options.silence_max } else { self.options.load_max };
        let opened = opening::read(&mut connection.reader(), connection.link(), within(limit), self.cancel);
        let (id, request) = match opened {
            Ok(Opening { id, request }) => (Some(id), Ok(request)),
            Err(Unopened { id, why }) => (id, Err(*why)),
        };
        if let Some(id) = id {
            context.recorder.id(id);
            if has_peer {
                connection.send_preface(id, PrefaceFlags::empty(), self.cancel)?;
            }
        }
        let id = id.unwrap_or_default();
        match request? {
            Request::Move(offer) => {
                connection.reader().decompress(offer.compression())?;
                Ok(Greeting::Offer(id, offer))
            }
            Request::Answer(query) => Ok(Greeting::Query(id, query)),
            Request::Join(_) => Err(connection.damaged(not_under_way(id))),
        }
    }

    /// Compares both sides, opens a session on every device, and answers the offer. Returns over how many links the source is
    /// to send.
    pub(super) fn accept(
        &self,
        connection: &Connection<'_>,
        receiving: &Receiving<'_, 'a>,
        offer: &Offer,
        further: Option<&dyn FurtherLinks>,
    ) -> Result<u32> {
        tracing::debug!(devices = offer.devices.len(), "offer");
        let accepted = trust(connection.link(), offer, self.options.unauthenticated_peers)
            .and_then(|()| self.compare(offer))
            .and_then(|found| self.ledger.check_room().map(|()| found).map_err(not_recorded))
            .and_then(|found| receiving.open_sessions(self.devices, found));
        let most = if further.is_some() { self.options.links.get() } else { 1 };
        // Without credit nothing would bound the data that arrives over one link before earlier data of another.
        let has_credit = offer.needs.iter().any(|need| need == NEEDS_CREDIT);
        let links = if has_credit { offer.links.min(most) } else { 1 };
        if connection.has_peer() {
            let reasons = match &accepted {
                Ok(()) => Vec::new(),
                Err(Error::Incompatible { reasons }) => reasons.iter().map(ToString::to_string).collect(),
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(error) => vec![error.to_string()],
            };
            let window = Some(receiving.window);
            let challenge = receiving.proofs.nonce();
            let accepted = accepted.is_ok();
            let unchecked = self.options.memory_checksums.are_waived(connection.link());
            connection.reader().take_unchecked(unchecked);
            let (runs, windows_grow) = (true, has_credit);
            let answer =
                Answer { accepted, reasons, links, window, challenge, runs, windows_grow, unchecked };
            let payload = answer.encode().map_err(|damage| connection.damaged(damage))?;
            connection.send(&Frame::new(Kind::ANSWER, &payload), self.cancel)?;
        }
        accepted.map(|()| links)
    }

    /// Compares both sides without touching anything. Returns the states in which the devices were found.
    fn compare(&self, offer: &Offer) -> Result<Vec<State>> {
        let here: Vec<DeviceFacts> = (self.devices.iter().enumerate())
            .map(|(at, moved)| check_cancel(self.cancel).and_then(|()| facts(at as u32, moved)))
            .collect::<Result<_>>()?;
        let memory: Vec<_> = self.memory.iter().map(MemoryRegion::facts).collect();
        let mut reasons = compare_devices(&offer.devices, &here);
        reasons.extend(compare_memory(&offer.memory, &memory));
        if !reasons.is_empty() {
            // The state of a device without migration cannot be read.
            return Err(Error::Incompatible { reasons });
        }
        let mut found = Vec::new();
        for moved in self.devices {
            let device = moved.device;
            let state = device.state().map_err(|error| failed(device, "reading its state", error))?;
            if !matches!(state, State::Running | State::Stop) {
                let name = device.name();
                let message =
                    format!("{name}: it is in {state}, RUNNING or STOP is expected; {}", way_out_of(state));
                reasons.push(Mismatch::new(MismatchKind::State, message));
            }
            found.push(state);
        }
        if reasons.is_empty() { Ok(found) } else { Err(Error::Incompatible { reasons }) }
    }
}
