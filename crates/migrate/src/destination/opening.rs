//! The opening of a connection at a destination (`docs/stream.md: Order`): the preface and the first frame, which
//! together say what the peer wants. A peer counts once both are complete. One limit in time and one in bytes cover
//! both, and nothing renews them.

use std::time::{Duration, Instant};

use limosa_clockwork::now;
use limosa_stream::body::decode_u32;
use limosa_stream::{
    Damage, HEADER_BYTES, Header, Kind, LINKS_MAX, MigrationId, OFFER_BYTES_MAX, Offer, PREFACE_BYTES,
    Preface, PrefaceFlags,
};

use crate::link::{Link, LinkError};
use crate::wire::{FrameReader, link_failed};
use crate::{Cancel, Error, Result};

/// The most bytes of frames in an opening: an OFFER, and some that are passed over, such as keep-alives.
const FRAMES_BYTES_MAX: usize = HEADER_BYTES + OFFER_BYTES_MAX + (4 << 10);

/// A complete opening.
pub(crate) struct Opening {
    pub(crate) id: MigrationId,
    pub(crate) request: Request,
}

/// The request of a peer.
pub(crate) enum Request {
    /// A move.
    Move(Offer),
    /// How a move ended; the payload of the QUERY.
    Answer(Vec<u8>),
    /// A further link of a move: the payload of its JOIN, whose number is one of a further link.
    Join(Vec<u8>),
}

/// An opening that is refused.
pub(crate) struct Unopened {
    /// The id with which the peer is answered, once its preface has arrived.
    pub(crate) id: Option<MigrationId>,
    pub(crate) why: Box<Error>,
}

/// Reads an opening, in which the whole of the wait may take no longer than until `within`. The reader is then behind it.
pub(crate) fn read(
    reader: &mut FrameReader,
    link: &dyn Link,
    within: Option<(Instant, Duration)>,
    cancel: Option<&Cancel>,
) -> Result<Opening, Unopened> {
    let bytes =
        reader.preface_bytes(link, within, cancel).map_err(|why| Unopened { id: None, why: why.into() })?;
    let id = Preface::id(&bytes);
    reader.limit_opening(Some(FRAMES_BYTES_MAX));
    let opened = request(reader, link, &bytes, within, cancel);
    reader.limit_opening(None);
    opened.map_err(|why| Unopened { id, why: why.into() })
}

fn request(
    reader: &mut FrameReader,
    link: &dyn Link,
    preface: &[u8; PREFACE_BYTES],
    within: Option<(Instant, Duration)>,
    cancel: Option<&Cancel>,
) -> Result<Opening> {
    let Preface { id, flags, .. } = Preface::decode(preface).map_err(|damage| reader.damaged(damage))?;
    let has_peer = link.has_peer();
    if flags.contains(PrefaceFlags::STORED) == has_peer {
        let what = match has_peer {
            true => "a saved stream came over a link, where a live one was expected",
            false => "it is a live stream in the place of a saved one",
        };
        return Err(reader.damaged(Damage::Unexpected { what: what.into() }));
    }
    let is_further = flags.contains(PrefaceFlags::FURTHER);
    let doing = if is_further { "waiting for a link's number" } else { "waiting for the offer" };
    let header = first(reader, link, doing, within, cancel)?;
    let request = match header.kind {
        Kind::OFFER if !is_further => Offer::decode(reader.payload(&header))
            .and_then(|offer| match has_peer && offer.devices.is_empty() && offer.memory.is_empty() {
                true => {
                    let why = "it offers no device and no memory".into();
                    Err(Damage::Content { kind: Kind::OFFER, why })
                }
                false => Ok(offer),
            })
            .map(Request::Move),
        Kind::QUERY if !is_further => Ok(Request::Answer(reader.payload(&header).to_vec())),
        Kind::JOIN if is_further => match decode_u32(reader.payload(&header)) {
            1..LINKS_MAX => Ok(Request::Join(reader.payload(&header).to_vec())),
            number => {
                let why = format!("link {number}, expected 1 to {}", LINKS_MAX - 1);
                Err(Damage::Content { kind: Kind::JOIN, why })
            }
        },
        kind => {
            let due = if is_further { "JOIN is due" } else { "an OFFER is due" };
            Err(Damage::Misplaced { kind, why: due.into() })
        }
    };
    let request = request.map_err(|damage| reader.damaged(damage))?;
    Ok(Opening { id, request })
}

/// The first frame that is not passed over.
fn first(
    reader: &mut FrameReader,
    link: &dyn Link,
    doing: &'static str,
    within: Option<(Instant, Duration)>,
    cancel: Option<&Cancel>,
) -> Result<Header> {
    loop {
        crate::error::check_cancel(cancel)?;
        let header = reader.next(link, doing, within, cancel)?;
        let is_passed_over = header.kind == Kind::PROGRESS || header.kind.name().is_none();
        if !is_passed_over {
            return Ok(header);
        }
        // Frames may arrive so fast that no read waits: the limit is checked here as well.
        if let Some((until, limit)) = within
            && until <= now()
        {
            return Err(link_failed(link.peer(), LinkError::TimedOut, doing, limit));
        }
    }
}
