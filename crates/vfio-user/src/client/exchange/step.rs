//! How a leader handles one message: its own reply, another thread's, or a command of the server.

use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};

use super::dispatcher::{COPIED_BYTES_MAX, SLOTS, SlotState};
use super::{Exchange, Failure, POSTED_ID};
use crate::client::dma::os_errno;
use crate::codec::{Header, Kind};
use crate::connection::{ConnectionError, Receiver, wait_ready};

/// The result of a message for the leader.
pub(super) enum Step {
    /// It is the leader's own reply; its header has been received.
    OwnReply(Header),
    /// It is another thread's reply, whose body that thread has to receive.
    OtherReply(usize, Header),
    /// On to the next message.
    Done,
}

impl Exchange {
    /// Receives and handles one message. `me` is the leader's own slot.
    pub(super) fn step(
        &self,
        receiver: &mut Receiver,
        me: Option<usize>,
        deadline: Instant,
    ) -> Result<Step, Failure> {
        while self.sender.keeps() && !receiver.has_more() && !self.sender.flush()? {
            let mut fds =
                [PollFd::from_borrowed_fd(receiver.socket().as_fd(), PollFlags::IN | PollFlags::OUT)];
            wait_ready(&mut fds, deadline)?;
            if fds[0].revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                break;
            }
        }
        let header = receiver.next(Some(deadline))?;
        let sound = header.body_bytes().and_then(|_| header.kind());
        let kind = sound.map_err(|error| Failure::Misbehaved(error.to_string()))?;
        if matches!(kind, Kind::Command | Kind::Posted) {
            // A server that accesses memory over this socket may do so at any time, and replies that it does not
            // read at once must be sent later: from now on a thread always receives.
            if let Some(exchange) = self.this.upgrade() {
                exchange.start_reader().map_err(|error| ConnectionError::Os(os_errno(&error)))?;
            }
            self.dma.serve(receiver, &self.sender, &header, deadline)?;
            return Ok(Step::Done);
        }
        if header.id == POSTED_ID {
            return Ok(Step::Done);
        }
        let mut dispatcher = self.dispatcher();
        let index = usize::from(header.id) % SLOTS;
        let slot = dispatcher.slots[index];
        let expected = matches!(slot.state, SlotState::Waiting | SlotState::Abandoned);
        if !expected || slot.id != header.id || slot.command != header.command {
            let what = format!("an unexpected reply to {} with id {}", header.command, header.id);
            return Err(Failure::Misbehaved(what));
        }
        if slot.state == SlotState::Abandoned {
            dispatcher.abandoned -= 1;
            self.free(&mut dispatcher, index);
            return Ok(Step::Done);
        }
        if me == Some(index) {
            return Ok(Step::OwnReply(header));
        }
        drop(dispatcher);
        let bytes = receiver.body_left();
        if bytes > COPIED_BYTES_MAX {
            return Ok(Step::OtherReply(index, header));
        }
        let mut copy = [0; COPIED_BYTES_MAX];
        let body = receiver.head(bytes, Some(deadline))?;
        copy[..bytes].copy_from_slice(&body[..bytes]);
        if receiver.has_fds() {
            return Ok(Step::OtherReply(index, header));
        }
        receiver.consume(bytes);
        let mut dispatcher = self.dispatcher();
        let slot = &mut dispatcher.slots[index];
        match slot.state {
            _ if slot.id != header.id => {}
            // Its owner has given up.
            SlotState::Abandoned => {
                dispatcher.abandoned -= 1;
                self.free(&mut dispatcher, index);
            }
            SlotState::Waiting => {
                slot.reply = header;
                slot.copy = copy;
                slot.state = SlotState::Answered;
                self.wakes[index].notify_all();
            }
            _ => {}
        }
        Ok(Step::Done)
    }
}
