//! The handshake of a source: both sides compare devices and memory before anything is touched.

use limosa_client::DeviceExt;
use limosa_protocol::{MigrationFlags, State};
use limosa_stream::body::{NEEDS_CREDIT, NEEDS_FLUSH, NEEDS_PROOFS};
use limosa_stream::{
    AbortCode, Answer, Damage, DeviceFacts, Kind, MigrationId, Offer, PrefaceFlags, Proofs, Secret,
    WINDOW_BYTES_MIN, printable,
};

use super::rollback::Rollback;
use super::{CommitNote, Source};
use crate::context::Context;
use crate::devices::{check_movable, facts, failed, way_out_of};
use crate::error::{Mismatch, MismatchKind, Mistrust, check_cancel};
use crate::link::{FurtherLinks, Link, Wait};
use crate::transfer::sending::Terms;
use crate::wire::{Connection, Frame};
use crate::{Error, Result};

/// The terms on which both sides have agreed.
pub(super) struct Agreed {
    pub(super) note: CommitNote,
    /// `None` if no peer answers.
    pub(super) terms: Option<Terms>,
    pub(super) links: Vec<Box<dyn Link>>,
    pub(super) proofs: Proofs,
}

impl<'a> Source<'a> {
    pub(super) fn handshake(
        &mut self,
        context: &Context<'a>,
        connection: &Connection<'_>,
        further: Option<&dyn FurtherLinks>,
        rollback: &mut Rollback,
    ) -> Result<Agreed> {
        let has_peer = connection.has_peer();
        let no_numbers = |error| Error::Os { doing: "reading random numbers", error };
        let id = MigrationId::random().map_err(no_numbers)?;
        context.recorder.id(id);
        let mut offer = self.offer(context)?;
        if has_peer {
            offer.needs.extend([NEEDS_FLUSH.into(), NEEDS_CREDIT.into()]);
            offer.links = if further.is_some() { self.options.links.get() } else { 1 };
            offer.keeps_links_alive = true;
            offer.secret = Some(Secret::random().map_err(no_numbers)?);
            if !self.options.unauthenticated_peers {
                offer.needs.push(NEEDS_PROOFS.into());
            }
        }
        offer.needs.extend(self.options.compress.map(|compression| compression.name().into()));
        rollback.found = self.states()?;
        for (facts, found) in offer.devices.iter_mut().zip(&rollback.found) {
            facts.stopped = *found == State::Stop;
        }
        let stored = PrefaceFlags::STORED | PrefaceFlags::SEALED;
        let flags = if has_peer { PrefaceFlags::empty() } else { stored };
        let payload =
            offer.encode().map_err(|damage| incompatible(MismatchKind::Format, damage.to_string()))?;
        connection.send_preface(id, flags, self.cancel)?;
        connection.send(&Frame::new(Kind::OFFER, &payload), self.cancel)?;
        if !has_peer {
            let (links, proofs) = (Vec::new(), Proofs::none());
            return Ok(Agreed { note: id.into(), terms: None, links, proofs });
        }
        check_preface(connection, id, self.cancel)?;
        let answer = self.answer(connection, &offer)?;
        // A destination that has sent no challenge does not know the secret either.
        let secret = offer.secret.filter(|_| answer.challenge.is_some());
        let proofs = match (&secret, answer.challenge) {
            (Some(secret), Some(challenge)) => Proofs::new(secret.clone(), id, challenge),
            _ => Proofs::none(),
        };
        let note = CommitNote { id, secret, peer: connection.link().peer_fingerprint() };
        let links = self.further_links(context, connection, further, answer.links)?;
        let terms = Terms {
            window_bytes: answer.window.unwrap_or(0),
            windows_grow: answer.windows_grow,
            runs: answer.runs,
            unchecked: answer.unchecked,
        };
        Ok(Agreed { note, terms: Some(terms), links, proofs })
    }

    fn offer(&self, context: &Context<'a>) -> Result<Offer> {
        let mut offer = Offer::default();
        let mut reasons = Vec::new();
        for (at, moved) in self.devices.iter().enumerate() {
            check_cancel(self.cancel)?;
            let facts = facts(at as u32, moved)?;
            reasons.extend(check_movable(&facts).err());
            offer.devices.push(facts);
        }
        offer.memory = self.memory.regions.iter().map(|region| region.facts()).collect();
        if let Some(note) = unquiesced(&offer.devices) {
            context.recorder.note(note);
        }
        if reasons.is_empty() { Ok(offer) } else { Err(Error::Incompatible { reasons }) }
    }

    /// The states in which the devices are found.
    fn states(&self) -> Result<Vec<State>> {
        let state = |moved: &crate::MovedDevice<'_>| {
            let state = moved.device.state();
            let state = state.map_err(|error| failed(moved.device, "reading its state", error))?;
            if matches!(state, State::Running | State::Stop) {
                return Ok(state);
            }
            let name = moved.device.name();
            let reason =
                format!("{name}: it is in {state}, RUNNING or STOP is expected; {}", way_out_of(state));
            Err(incompatible(MismatchKind::State, reason))
        };
        self.devices.iter().map(state).collect()
    }

    fn answer(&self, connection: &Connection<'_>, offer: &Offer) -> Result<Answer> {
        let doing = "waiting for an answer to the offer";
        let payload = match connection.expect(Kind::ANSWER, doing, self.options.load_max, self.cancel) {
            // It refuses the entry of `needs`, as all that it does not know, by its name.
            Err(Error::Aborted { code: AbortCode::Stream, reason, .. }) if reason.contains(NEEDS_PROOFS) => {
                return Err(older(connection, "it does not know the proofs of this stream"));
            }
            answered => answered?,
        };
        let answer = Answer::decode(&payload).map_err(|damage| connection.damaged(damage))?;
        if !answer.accepted {
            let told = |reason| Mismatch::new(MismatchKind::Told, reason);
            return Err(Error::Incompatible { reasons: answer.reasons.into_iter().map(told).collect() });
        }
        if answer.challenge.is_none() && !self.options.unauthenticated_peers {
            return Err(older(connection, "its ANSWER has no challenge"));
        }
        let (links, window) = (answer.links, answer.window.unwrap_or(0));
        if !(1..=offer.links).contains(&links) || window < WINDOW_BYTES_MIN {
            let why = format!(
                "it accepts {links} links and a window of {window} bytes; expected 1 to {} links and at least \
                 {WINDOW_BYTES_MIN} bytes",
                offer.links
            );
            return Err(connection.damaged(Damage::Content { kind: Kind::ANSWER, why }));
        }
        Ok(answer)
    }

    /// Makes the further links on which both sides agreed, or as many of them as it can.
    fn further_links(
        &self,
        context: &Context<'a>,
        connection: &Connection<'_>,
        further: Option<&dyn FurtherLinks>,
        wanted: u32,
    ) -> Result<Vec<Box<dyn Link>>> {
        let mut links = Vec::new();
        let Some(further) = further else { return Ok(links) };
        // One limit for all of them, since this side sends nothing meanwhile.
        let wait = Wait::within(self.options.silence_max / 2, self.cancel);
        while (links.len() as u32) < wanted - 1 {
            match further.next(wait) {
                Ok(link) => links.push(link),
                Err(crate::link::LinkError::Cancelled) => return Err(Error::Cancelled),
                Err(error) => {
                    let had = links.len() as u32 + 1;
                    let note = format!("a further link cannot be made ({error}): {had} of {wanted} are used");
                    context.recorder.note(note);
                    connection.send(&Frame::new(Kind::LINKS, &had.to_le_bytes()), self.cancel)?;
                    break;
                }
            }
        }
        Ok(links)
    }
}

/// The note for a move in which not all devices can be quiesced before the first of them is stopped.
fn unquiesced(devices: &[DeviceFacts]) -> Option<String> {
    let has_p2p =
        |facts: &&DeviceFacts| MigrationFlags::from_bits_retain(facts.flags).contains(MigrationFlags::P2P);
    let names: Vec<_> =
        devices.iter().filter(|facts| !has_p2p(facts)).map(|facts| printable(&facts.name)).collect();
    if devices.len() < 2 || names.is_empty() {
        return None;
    }
    Some(format!(
        "without P2P states: {}; their DMA to other devices may come when those are stopped already, or do not run yet; it is \
         lost if the guest lets devices access each other",
        names.join(", ")
    ))
}

/// Reads the other side's preface, which must be of the same move.
pub(super) fn check_preface(
    connection: &Connection<'_>,
    id: MigrationId,
    cancel: Option<&crate::Cancel>,
) -> Result<()> {
    let preface = connection.receive_preface(cancel)?;
    if preface.id != id || preface.flags.contains(PrefaceFlags::STORED) {
        let what = format!("it answers for move {}, and was asked about move {id}", preface.id);
        return Err(connection.damaged(Damage::Unexpected { what }));
    }
    Ok(())
}

/// The destination is of a version whose words carry no proofs.
fn older(connection: &Connection<'_>, sign: &'static str) -> Error {
    let (peer, why) = (connection.link().peer().into(), Mistrust::OlderVersion { sign });
    Error::Unauthenticated { peer, why }
}

fn incompatible(kind: MismatchKind, message: String) -> Error {
    Error::Incompatible { reasons: vec![Mismatch::new(kind, message)] }
}
