//! Frames over links. [`FrameWriter`] numbers and sends them, [`FrameReader`] receives and checks them. A [`Connection`] is
//! both, for the first link of a move, with the exchanges that begin and end a move.

mod connection;
mod frame_reader;
mod frame_writer;
mod in_place;
mod metered;

use std::time::Duration;

pub(crate) use connection::Connection;
pub(crate) use frame_reader::{FrameReader, within};
pub(crate) use frame_writer::FrameWriter;
pub(crate) use in_place::MemoryTarget;
use limosa_stream::Kind;
pub(crate) use metered::MeteredLink;

use crate::Error;
use crate::link::LinkError;

const COMPRESSING: &str = "making room to compress in";

/// A frame to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame<'p> {
    pub(crate) kind: Kind,
    /// The id of its device or memory region, or the number of its link; otherwise 0.
    pub(crate) section: u32,
    /// The position in the section, in bytes; for some kinds another number (`docs/stream.md: Frame`).
    pub(crate) position: u64,
    pub(crate) payload: &'p [u8],
    /// The crc32c of the payload, if it is known.
    pub(crate) crc: Option<u32>,
}

impl<'p> Frame<'p> {
    /// A frame of the move as a whole.
    pub(crate) fn new(kind: Kind, payload: &'p [u8]) -> Frame<'p> {
        Frame { kind, section: 0, position: 0, payload, crc: None }
    }

    /// A frame of a device, a region or a numbered link.
    pub(crate) fn of(section: u32, kind: Kind, payload: &'p [u8]) -> Frame<'p> {
        Frame { kind, section, position: 0, payload, crc: None }
    }

    /// The same frame at this position.
    pub(crate) fn at(self, position: u64) -> Frame<'p> {
        Frame { position, ..self }
    }

    /// The same frame with the crc32c of its payload.
    pub(crate) fn with_crc(self, crc: Option<u32>) -> Frame<'p> {
        Frame { crc, ..self }
    }
}

/// A link's error, as an error that names the peer.
pub(crate) fn link_failed(peer: &str, error: LinkError, doing: &'static str, limit: Duration) -> Error {
    let peer = peer.into();
    match error {
        LinkError::Cancelled => Error::Cancelled,
        LinkError::TimedOut => Error::TimedOut { peer, doing, limit },
        error => Error::Link { peer, doing, error },
    }
}
