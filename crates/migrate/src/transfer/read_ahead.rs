//! [`ReadAhead`]: while a piece of a device's data is on its way to a link, the next one is read. A device with much data has a thread
//! that sends, so that it does not stand still while a link takes its data, nor the link while the device is read.

use limosa_stream::buffer::Buffer;

use super::sending::Sending;
use super::team::{Shared, Team};
use crate::Result;

/// How many pieces a device gives in a row before the next ones are sent by the other thread. To wake it does not pay for fewer.
const PIECES_MIN: u32 = 4;

/// A piece of a device's data.
struct Piece {
    position: u64,
    bytes: usize,
    buffer: Buffer,
}

/// The hand-over between the two threads of a device.
#[derive(Default)]
struct Handover {
    /// To be sent.
    piece: Option<Piece>,
    /// Whether a piece is being sent.
    is_sending: bool,
    /// The buffer of a piece that was sent.
    spare: Option<Buffer>,
}

impl Handover {
    fn is_free(&self) -> bool {
        self.piece.is_none() && !self.is_sending
    }
}

/// Hands over one device's data to the thread that sends it, one piece at a time.
pub(crate) struct ReadAhead {
    handover: Shared<Handover>,
}

impl ReadAhead {
    pub(crate) fn new(team: &Team) -> ReadAhead {
        ReadAhead { handover: team.share(Handover::default()) }
    }

    /// Whether the next piece is to be handed over, after this many pieces in a row that filled their buffer.
    pub(crate) fn pays(pieces: u32) -> bool {
        pieces >= PIECES_MIN
    }

    /// Waits until everything that was handed over is sent.
    pub(crate) fn settle(&self, team: &Team) -> Result<()> {
        team.wait(&self.handover, self.handover.lock(), None, Handover::is_free).map(drop)
    }

    /// Hands over a piece, once the one before it is sent, and puts another buffer of the same length in its place.
    pub(crate) fn give(
        &self,
        sending: &Sending<'_, '_>,
        position: u64,
        bytes: usize,
        buffer: &mut Buffer,
    ) -> Result<()> {
        let (mut handover, _) =
            sending.team.wait(&self.handover, self.handover.lock(), None, Handover::is_free)?;
        let mut next = handover.spare.take().unwrap_or_else(|| Buffer::new(sending.recorder().buffers()));
        next.grow(buffer.len());
        next.truncate(buffer.len());
        let buffer = std::mem::replace(buffer, next);
        handover.piece = Some(Piece { position, bytes, buffer });
        drop(handover);
        self.handover.notify_all();
        Ok(())
    }

    /// The body of the thread that sends. Ends with an error once the work of the team has ended.
    pub(crate) fn send(&self, device: usize, sending: &Sending<'_, '_>) -> Result<()> {
        loop {
            let has_piece = |handover: &Handover| handover.piece.is_some();
            let (mut handover, _) =
                sending.team.wait(&self.handover, self.handover.lock(), None, has_piece)?;
            let Some(piece) = handover.piece.take() else { continue };
            handover.is_sending = true;
            drop(handover);
            sending.send_device(device, piece.position, &piece.buffer[..piece.bytes], &[], &[])?;
            let mut handover = self.handover.lock();
            (handover.is_sending, handover.spare) = (false, Some(piece.buffer));
            drop(handover);
            self.handover.notify_all();
        }
    }
}
