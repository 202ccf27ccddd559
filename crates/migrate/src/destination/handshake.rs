//! The handshake of a destination: it compares devices and memory, and answers the offer.

use limosa_client::DeviceExt;
use limosa_protocol::State;
use limosa_stream::body::NEEDS_CREDIT;
use limosa_stream::{Answer, Damage, DeviceFacts, Kind, MigrationId, Nonce, Offer, PrefaceFlags, Proofs};

use super::Destination;
use super::receiving::Receiving;
use crate::context::Context;
use crate::devices::{compare_devices, compare_memory, facts, failed};
use crate::error::{Mismatch, MismatchKind, Mistrust, check_cancel};
use crate::link::FurtherLinks;
use crate::memory::MemoryRegion;
use crate::protocol::credit::window;
use crate::wire::{Connection, Frame};
use crate::{Error, Result};

/// The request of a source.
pub(super) enum Greeting {
    /// A move.
    Offer(MigrationId, Offer),
    /// How a move ended, and the payload of the QUERY.
    Query(MigrationId, Vec<u8>),
}

/// What the words of this move prove, if the source has a secret, with a challenge that no connection has had before.
pub(super) fn proofs(id: MigrationId, offer: &Offer) -> Result<Proofs> {
    let Some(secret) = &offer.secret else { return Ok(Proofs::none()) };
    let challenge = Nonce::random().map_err(|error| Error::Os { doing: "reading random numbers", error })?;
    Ok(Proofs::new(secret.clone(), id, challenge))
}

impl<'a> Destination<'a> {
    /// Exchanges prefaces, and reads what the source asks for.
    pub(super) fn greet(&self, context: &Context<'a>, connection: &Connection<'_>) -> Result<Greeting> {
        connection.reader().count(context.recorder.buffers());
        let preface = connection.receive_preface(self.cancel)?;
        context.recorder.id(preface.id);
        let has_peer = connection.has_peer();
        let unknown = |what: String| Err(connection.damaged(Damage::Unknown { what }));
        if preface.flags.contains(PrefaceFlags::STORED) == has_peer {
            let what = if has_peer { "a saved stream over a link" } else { "a live stream in a file" };
            return unknown(what.into());
        }
        if preface.flags.contains(PrefaceFlags::FURTHER) {
            return unknown(format!("a further link of move {}, which is not under way here", preface.id));
        }
        if has_peer {
            connection.send_preface(preface.id, PrefaceFlags::empty(), self.cancel)?;
        }
        let received = connection.receive("waiting for the offer", self.options.load_max, self.cancel)?;
        match received.header.kind {
            Kind::QUERY => Ok(Greeting::Query(preface.id, received.payload)),
            Kind::OFFER => match Offer::decode(&received.payload) {
                Ok(offer) => {
                    connection.reader().decompress(offer.compression())?;
                    Ok(Greeting::Offer(preface.id, offer))
                }
                Err(damage) => Err(connection.damaged(damage)),
            },
            kind => Err(connection.damaged(Damage::Misplaced { kind, why: "an OFFER is due".into() })),
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
        let accepted = (self.trust(connection, offer))
            .and_then(|()| self.compare(offer))
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
            let window = Some(window(self.devices.len(), self.options.windows_bytes));
            let challenge = receiving.proofs.nonce();
            let answer = Answer { accepted: accepted.is_ok(), reasons, links, window, challenge };
            let payload = answer.encode().map_err(|damage| connection.damaged(damage))?;
            connection.send(&Frame::new(Kind::ANSWER, &payload), self.cancel)?;
        }
        accepted.map(|()| links)
    }

    /// Refuses a source that proves nothing, unless such peers are allowed.
    fn trust(&self, connection: &Connection<'_>, offer: &Offer) -> Result<()> {
        if !connection.has_peer() || offer.secret.is_some() || self.options.unauthenticated_peers {
            return Ok(());
        }
        let why = Mistrust::OlderVersion { kind: Kind::OFFER, lacks: "secret" };
        Err(Error::Unauthenticated { peer: connection.link().peer().into(), why })
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
                let message = format!(
                    "{name}: it is in {state}, RUNNING or STOP is expected; is it in use? if not, reset it"
                );
                reasons.push(Mismatch::new(MismatchKind::State, message));
            }
            found.push(state);
        }
        if reasons.is_empty() { Ok(found) } else { Err(Error::Incompatible { reasons }) }
    }
}
