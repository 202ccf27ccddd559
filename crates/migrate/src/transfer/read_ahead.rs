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

/// What the two threads of a device hand to each other.
#[derive(Default)]
struct Desk {
    /// To be sent.
    piece: Option<Piece>,
    /// Whether a piece is being sent.
    is_sending: bool,
    /// The buffer of a piece that was sent.
    spare: Option<Buffer>,
}

impl Desk {
    fn is_free(&self) -> bool {
        self.piece.is_none() && !self.is_sending
    }
}

/// The hand-over of one device's data, one piece at a time.
pub(crate) struct ReadAhead {
    desk: Shared<Desk>,
}

impl ReadAhead {
    pub(crate) fn new(team: &Team) -> ReadAhead {
        ReadAhead { desk: team.share(Desk::default()) }
    }

    /// Whether the next piece is to be handed over, after this many pieces in a row that filled their buffer.
    pub(crate) fn pays(pieces: u32) -> bool {
        pieces >= PIECES_MIN
    }

    /// Waits until everything that was handed over is sent.
    pub(crate) fn settle(&self, team: &Team) -> Result<()> {
        team.wait(&self.desk, self.desk.lock(), None, Desk::is_free).map(drop)
    }

    /// Hands over a piece, once the one before it is sent, and puts another buffer of the same length in its place.
    pub(crate) fn give(
        &self,
        sending: &Sending<'_, '_>,
        position: u64,
        bytes: usize,
        buffer: &mut Buffer,
    ) -> Result<()> {
        let (mut desk, _) = sending.team.wait(&self.desk, self.desk.lock(), None, Desk::is_free)?;
        let mut next = desk.spare.take().unwrap_or_else(|| Buffer::new(sending.recorder().buffers()));
        next.grow(buffer.len());
        next.truncate(buffer.len());
        let buffer = std::mem::replace(buffer, next);
        desk.piece = Some(Piece { position, bytes, buffer });
        drop(desk);
        self.desk.notify_all();
        Ok(())
    }

    /// The body of the thread that sends. Ends with an error once the work of the team has ended.
    pub(crate) fn send(&self, device: usize, sending: &Sending<'_, '_>) -> Result<()> {
        loop {
            let has_piece = |desk: &Desk| desk.piece.is_some();
            let (mut desk, _) = sending.team.wait(&self.desk, self.desk.lock(), None, has_piece)?;
            let Some(piece) = desk.piece.take() else { continue };
            desk.is_sending = true;
            drop(desk);
            sending.send_device(device, piece.position, &piece.buffer[..piece.bytes])?;
            let mut desk = self.desk.lock();
            (desk.is_sending, desk.spare) = (false, Some(piece.buffer));
            drop(desk);
            self.desk.notify_all();
        }
    }
}
