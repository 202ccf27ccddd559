//! The reply dispatcher's data, shared by the callers of a connection: the receiver, and the pending requests.

use super::Failure;
use crate::codec::{Command, Header};
use crate::connection::Receiver;

/// The most requests in flight; a further caller waits.
pub(super) const SLOTS: usize = 32;

/// The longest reply that is copied to another thread's slot.
pub(super) const COPIED_BYTES_MAX: usize = 128;

pub(super) struct Dispatcher {
    /// `None` while there is a leader.
    pub(super) receiver: Option<Box<Receiver>>,
    /// The slot and header of a received reply whose owner has to receive its body.
    pub(super) handed: Option<(usize, Header)>,
    pub(super) slots: [Slot; SLOTS],
    /// Number of slots in use.
    pub(super) taken: usize,
    pub(super) abandoned: usize,
    /// Whether the thread of [`Exchange::start_reader`](super::Exchange::start_reader) runs.
    pub(super) has_reader: bool,
    /// Number of threads that wait for space in the socket.
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
    /// The caller has given up, but the reply may still arrive.
    Abandoned,
}

impl Dispatcher {
    /// Without a leader and without pending requests.
    pub(super) fn new(receiver: Receiver) -> Dispatcher {
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
        Dispatcher {
            receiver: Some(Box::new(receiver)),
            handed: None,
            slots,
            taken: 0,
            abandoned: 0,
            has_reader: false,
            blocked: 0,
            lost: None,
        }
    }
}
