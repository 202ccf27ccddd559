//! The data of a session (`vfio-user.rst: VFIO_USER_MIG_DATA_READ, VFIO_USER_MIG_DATA_WRITE`).
//!
//! A read is answered from the model's own memory, a write is received into it. In the specification a short reply
//! means the end of the data; so a reply is short only at the end, or if there is nothing for now in pre-copy: smaller
//! pieces of a model are gathered first.
//!
//! libvfio-user's client cannot receive a reply that is shorter than its request; only `size` tells it the amount of
//! data. Its requests are small, so replies to requests up to [`PADDED_BYTES_MAX`] are padded with zeros to the
//! requested length, and larger ones are not.

use std::io::IoSlice;
use std::os::unix::net::UnixStream;

use limosa_device::{Machine, Save, SessionId};
use limosa_protocol::{Errno, State};
use zerocopy::IntoBytes;

use super::job::{Handled, Job, Outcome, reply_header};
use super::link::Link;
use super::peer::Peer;
use super::stream::DataSocket;
use crate::codec::{Header, MigData};
use crate::connection::{ConnectionError, Receiver};

/// Replies to reads of up to this many bytes are padded.
const PADDED_BYTES_MAX: usize = 64 << 10;

static ZEROS: [u8; PADDED_BYTES_MAX] = [0; PADDED_BYTES_MAX];

/// The result of reading the session's data.
enum Piece {
    /// The reply was sent straight from the model's memory.
    Sent(Result<(), ConnectionError>),
    /// So much was gathered.
    Gathered,
    /// There is nothing more, at least for now.
    Dry,
}

/// How the data of a client's sessions moves.
#[derive(Default)]
pub(super) struct SessionData {
    /// The session's own socket, if the client requested one.
    socket: Option<DataSocket>,
    /// The session whose data has moved by messages.
    moved: Option<SessionId>,
    /// Where data goes that the model has no place for.
    gathered: Vec<u8>,
}

impl SessionData {
    /// MIG_DATA_READ.
    pub(super) fn read(&mut self, peer: &Peer<'_>, job: &Job, read: MigData) -> Handled {
        if let Some(socket) = &self.socket {
            // The data uses the socket; this asks for progress.
            let saved = if socket.loads() { Err(Errno::EBADF) } else { socket.saved() };
            return match saved {
                Ok(()) => job.reply(&peer.link, MigData { argsz: MigData::BYTES as u32, size: 0 }.as_bytes()),
                Err(errno) => Ok(Outcome::Refused(errno)),
            };
        }
        let want = read.size as usize;
        let room = (read.argsz as usize).checked_sub(MigData::BYTES);
        if want == 0 || read.size > peer.data_bytes_max || room.is_none_or(|room| room < want) {
            return Ok(Outcome::Refused(Errno::EINVAL));
        }
        let Some(session) = peer.machine.session_for(peer.client) else {
            return Ok(Outcome::Refused(Errno::ENODEV));
        };
        if !job.wants_reply() {
            // A posted read would lose the data.
            return Ok(Outcome::Replied);
        }
        self.moved = Some(session);
        let link = &*peer.link;
        let gathered = &mut self.gathered;
        gathered.clear();
        let reply = |data: &[u8]| reply(link, &job.header, data, want);
        while gathered.len() < want {
            let piece = peer.machine.data_read(session, want - gathered.len(), |save| match save {
                Save::Data(data) if data.len() == want => Piece::Sent(reply(data)),
                Save::Data(data) => {
                    gathered.extend_from_slice(data);
                    Piece::Gathered
                }
                Save::NothingForNow | Save::End => Piece::Dry,
            });
            match piece {
                Ok(Piece::Sent(sent)) => {
                    sent?;
                    link.flush()?;
                    return Ok(Outcome::Replied);
                }
                Ok(Piece::Gathered) => {}
                Ok(Piece::Dry) => break,
                // The gathered data is lost with the session: a short reply would look like the end.
                Err(errno) => return Ok(Outcome::Refused(errno)),
            }
        }
        reply(gathered)?;
        link.flush()?;
        Ok(Outcome::Replied)
    }

    /// MIG_DATA_WRITE, with the data that came with its header; the rest is in the socket.
    pub(super) fn write(&mut self, peer: &Peer<'_>, job: &mut Job, write: MigData, data: &[u8]) -> Handled {
        if write.size > peer.data_bytes_max {
            return Ok(Outcome::Refused(Errno::EINVAL));
        }
        if let Some(socket) = &self.socket {
            let refused = match (socket.loads(), write.size) {
                (false, _) => Err(Errno::EBADF),
                (true, 0) => socket.refused(),
                (true, _) => Err(Errno::EBUSY),
            };
            return match refused {
                Ok(()) => job.reply(&peer.link, &[]),
                Err(errno) => Ok(Outcome::Refused(errno)),
            };
        }
        let Some(session) = peer.machine.session_for(peer.client) else {
            return Ok(Outcome::Refused(Errno::ENODEV));
        };
        self.moved = Some(session);
        let written = match job.receiver.take() {
            None => peer.machine.data_write(session, data),
            Some(receiver) => {
                let mut rest = Rest { link: &peer.link, receiver: Some(receiver) };
                match receive_data(peer.machine, session, write.size as usize, &mut self.gathered, &mut rest)
                {
                    Ok(written) => written,
                    Err(end) => {
                        // The received part of this message is loaded, the rest is not.
                        peer.machine.data_lost(session);
                        return Err(end);
                    }
                }
            }
        };
        match written {
            Ok(()) => job.reply(&peer.link, &[]),
            Err(errno) => Ok(Outcome::Refused(errno)),
        }
    }

    /// Opens a socket for the data of the client's session, of which nothing has moved yet, and returns the client's end of it.
    pub(super) fn open_socket(&mut self, peer: &Peer<'_>, session: SessionId) -> Result<UnixStream, Errno> {
        let (socket, theirs) = DataSocket::open(peer.machine, session)?;
        self.socket = Some(socket);
        Ok(theirs)
    }

    /// The client's session. ENODEV without one, EBUSY when its data has begun to move.
    pub(super) fn untouched_session(&self, peer: &Peer<'_>) -> Result<SessionId, Errno> {
        let session = peer.machine.session_for(peer.client).ok_or(Errno::ENODEV)?;
        let is_touched = self.socket.is_some() || self.moved == Some(session) || peer.found(session);
        if is_touched { Err(Errno::EBUSY) } else { Ok(session) }
    }

    /// Before the state is set to `wanted`: first loads everything that the client wrote to a load's own socket.
    pub(super) fn finish_load(&self, peer: &Peer<'_>, wanted: Option<State>) -> Result<(), Errno> {
        let leaves = wanted.is_some_and(|state| !matches!(state, State::Resuming | State::Error));
        match &self.socket {
            Some(socket) if socket.loads() && leaves => socket.loaded(peer.options.message_limit),
            _ => Ok(()),
        }
    }

    /// After the state may have changed: ends the session's own socket if the session has ended.
    pub(super) fn follow_session(&mut self, peer: &Peer<'_>) {
        if let Some(socket) = &self.socket {
            if peer.machine.session_for(peer.client) == Some(socket.session()) {
                socket.look_again();
            } else {
                self.socket = None;
            }
        }
    }

    /// Ends the session's own socket.
    pub(super) fn end(&mut self) {
        self.socket = None;
    }
}

/// Receives the data of a write into the device as it arrives: the machine is never called while this waits for the
/// client.
fn receive_data(
    machine: &Machine,
    session: SessionId,
    bytes: usize,
    spare: &mut Vec<u8>,
    rest: &mut Rest<'_>,
) -> Result<Result<(), Errno>, ConnectionError> {
    let mut left = bytes;
    while left > 0 {
        rest.wait()?;
        match machine.data_fill(session, left, spare, |into| rest.receive(into))? {
            Ok(filled) => left -= filled,
            // The rest of the message is skipped.
            Err(errno) => return Ok(Err(errno)),
        }
    }
    Ok(Ok(()))
}

/// The data of a write that is still on the socket.
struct Rest<'a> {
    link: &'a Link,
    receiver: Option<Box<Receiver>>,
}

impl Rest<'_> {
    fn receiver(&mut self) -> Result<&mut Receiver, ConnectionError> {
        let short = ConnectionError::Broken("more data was requested than the message has");
        self.receiver.as_deref_mut().filter(|receiver| receiver.body_left() > 0).ok_or(short)
    }

    fn wait(&mut self) -> Result<(), ConnectionError> {
        self.receiver()?.wait_for_more()
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<usize, ConnectionError> {
        let receiver = self.receiver()?;
        let bytes = receiver.read_now(into)?;
        if receiver.body_left() == 0 {
            // From here on the model may need the socket for memory accesses.
            self.give_back();
        }
        Ok(bytes)
    }

    fn give_back(&mut self) {
        if let Some(receiver) = self.receiver.take() {
            self.link.give_back(receiver);
        }
    }
}

impl Drop for Rest<'_> {
    /// First skips the rest of the message.
    fn drop(&mut self) {
        let skipped = self.receiver.as_mut().map(|receiver| receiver.skip(None));
        self.give_back();
        if let Some(Err(end)) = skipped {
            tracing::debug!(%end, "connection over while a refused message was skipped");
            self.link.end();
        }
    }
}

/// Never waits, since the data is borrowed from the device.
fn reply(link: &Link, to: &Header, data: &[u8], want: usize) -> Result<(), ConnectionError> {
    let padding = if want <= PADDED_BYTES_MAX { want - data.len() } else { 0 };
    let size = data.len() as u32;
    let fixed = MigData { argsz: MigData::BYTES as u32 + size, size };
    let header = reply_header(to, MigData::BYTES + data.len() + padding)?;
    let mut pieces = [
        IoSlice::new(header.as_bytes()),
        IoSlice::new(fixed.as_bytes()),
        IoSlice::new(data),
        IoSlice::new(&ZEROS[..padding]),
    ];
    link.send_now(&mut pieces)
}
