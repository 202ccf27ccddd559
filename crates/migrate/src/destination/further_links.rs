//! The further links of a move: they join in any order, and each has a reader.

use std::sync::Arc;

use limosa_clockwork::Scope;
use limosa_stream::body::decode_u32;
use limosa_stream::{Damage, Kind, MigrationId, Offer};

use super::handshake::not_under_way;
use super::opening::{self, Request};
use super::receive::DOING;
use super::receiving::Receiving;
use crate::Result;
use crate::link::{FurtherLinks, Link, LinkError, Wait};
use crate::wire::{FrameReader, MeteredLink, within};

impl Receiving<'_, '_> {
    /// Takes LINKS: the source uses fewer links than it was told to.
    pub(super) fn fewer_links(&self, had: u32, wanted: u32, reader: &FrameReader) -> Result<()> {
        let mut state = self.state.lock();
        if !(1..wanted).contains(&had) || state.joined >> had != 0 {
            let why = format!(
                "it announces {had} links instead of {wanted}, and {} further links have joined",
                state.joined.count_ones()
            );
            return Err(reader.damaged(Damage::Content { kind: Kind::LINKS, why }));
        }
        state.links = had;
        let is_complete = state.joined.count_ones() == had - 1;
        drop(state);
        if is_complete {
            self.joined.cancel();
        }
        Ok(())
    }

    /// The body of the thread that accepts the further links of the move, in any order, and starts a reader for each. A link
    /// that is not of the move is closed, and the thread waits for another.
    pub(super) fn join<'scope>(
        &'scope self,
        scope: Scope<'scope, '_>,
        id: MigrationId,
        further: &dyn FurtherLinks,
        offer: &'scope Offer,
    ) -> Result<()> {
        let silence_max = self.options().silence_max;
        let wait = Wait::within(silence_max, Some(&self.joined));
        loop {
            let (joined, links) = {
                let state = self.state.lock();
                (state.joined, state.links)
            };
            if joined.count_ones() >= links - 1 {
                return Ok(());
            }
            let link: Arc<dyn Link> = match further.next(wait) {
                Ok(link) => Arc::from(link),
                Err(LinkError::Cancelled) if self.team.check().is_ok() => return Ok(()),
                Err(error) => {
                    return Err(self.connection.failed(error, "waiting for a further link", silence_max));
                }
            };
            let (number, mut reader) = match self.greet_further(&*link, id) {
                Ok(greeted) => greeted,
                Err(error) => {
                    tracing::warn!("a further link is closed: {error}");
                    continue;
                }
            };
            if number >= links || joined & 1 << number != 0 {
                tracing::warn!("link {number} of the move joined twice or was not asked for");
                continue;
            }
            reader.decompress(offer.compression())?;
            reader.take_unchecked(self.options().memory_checksums.are_waived(&*link));
            reader.count(self.recorder().buffers());
            self.further.lock().push(Arc::clone(&link));
            self.state.lock().joined |= 1 << number;
            self.team.spawn(scope, format!("link {number}"), move || {
                let link = MeteredLink::new(&*link, self.recorder());
                self.read_further(&link, reader)
            })?;
        }
    }

    /// Reads the opening of a further link, which proves that it is of this move. Returns its number and its reader.
    fn greet_further(&self, link: &dyn Link, id: MigrationId) -> Result<(u32, FrameReader)> {
        let silence_max = self.options().silence_max;
        let mut reader = FrameReader::new(link, silence_max);
        let opened = opening::read(&mut reader, link, within(silence_max), Some(&self.joined));
        let opened = opened.map_err(|unopened| *unopened.why)?;
        match opened.request {
            Request::Join(join) if opened.id == id => {
                let number = self.proofs.check(Kind::JOIN, &join).map(decode_u32);
                Ok((number.map_err(|damage| reader.damaged(damage))?, reader))
            }
            Request::Join(_) => Err(reader.damaged(not_under_way(opened.id))),
            Request::Move(_) | Request::Answer(_) => {
                let what = format!("it is of move {}, while move {id} is under way", opened.id);
                Err(reader.damaged(Damage::Unexpected { what }))
            }
        }
    }

    /// The body of a further link's reader, up to LINK_END.
    fn read_further(&self, link: &dyn Link, mut reader: FrameReader) -> Result<()> {
        if !self.keeps_links_alive {
            reader.allow_silence();
        }
        loop {
            let cancel = Some(self.team.ended());
            let header = reader
                .next_in_place(link, DOING, None, cancel, &|header| self.memory_target(header, link))?;
            match header.kind {
                Kind::LINK_END => {
                    self.state.lock().links_ended += 1;
                    self.state.notify_all();
                    return Ok(());
                }
                Kind::MEMORY_DATA
                | Kind::MEMORY_ZERO
                | Kind::MEMORY_RUNS
                | Kind::DEVICE_DATA
                | Kind::FLUSH
                | Kind::PROGRESS => {
                    self.take(&header, &mut reader)?;
                }
                kind => {
                    let why = "it is for a move's first link".into();
                    return Err(reader.damaged(Damage::Misplaced { kind, why }));
                }
            }
        }
    }
}
