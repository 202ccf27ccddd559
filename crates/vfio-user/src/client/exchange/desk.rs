//! What the callers of one connection share: who receives, and which requests are under way.

use super::Failure;
use crate::codec::{Command, Header};
use crate::connection::Receiver;

/// The most requests in flight; a further caller waits.
pub(super) const SLOTS: usize = 32;

/// The longest reply that is copied to another thread's slot.
pub(super) const COPIED_BYTES_MAX: usize = 128;

pub(super) struct Desk {
    /// `None` while somebody leads.
    pub(super) receiver: Option<Box<Receiver>>,
    /// The reply at which the receiver stands, and whose it is.
    pub(super) handed: Option<(usize, Header)>,
    pub(super) slots: [Slot; SLOTS],
    /// Slots that are not free.
    pub(super) taken: usize,
    pub(super) abandoned: usize,
    pub(super) attended: bool,
    /// How many wait for room in the socket.
    pub(super) blocked: usize,
    pub(super) lost: Option<Failure>,
}

#[derive(Clone, Copy)]
pub(super) struct Slot {
    pub(super) state: SlotState,
    pub(super) id: u16,
    pub(super) command: Command,
    pub(super) reply: Header,
    pub(super) copy: [u8; COPIED_BYTES_MAX],
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum SlotState {
    Free,
    Waiting,
    Answered,
    /// Nobody waits any more, but the reply may still come.
    Abandoned,
}

impl Desk {
    /// Nobody leads, and no request is under way.
    pub(super) fn new(receiver: Receiver) -> Desk {
        let free = Slot {
            state: SlotState::Free,
            id: 0,
            command: Command(0),
            reply: Header::default(),
            copy: [0; COPIED_BYTES_MAX],
        };
        let mut slots = [free; SLOTS];
        for (index, slot) in slots.iter_mut().enumerate() {
            slot.id = index as u16;
        }
        Desk {
            receiver: Some(Box::new(receiver)),
            handed: None,
            slots,
            taken: 0,
            abandoned: 0,
            attended: false,
            blocked: 0,
            lost: None,
        }
    }
}
