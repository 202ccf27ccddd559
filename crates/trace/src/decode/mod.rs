//! Turns records into requests with their answers: pure, with a bound on all stored data.

mod call;
mod conversation;
mod feature;
mod message;
mod text;

use std::collections::BTreeMap;

use limosa_protocol::State;

use crate::event::{Direction, Event, Outcome, Request};
use crate::seen::Seen;
use call::Calls;
pub(crate) use call::{FEATURE, GROUP_GET_DEVICE_FD, data_fd};
use conversation::Conversation;

/// Limit on connections that are decoded at once. Messages on further ones count as unexpected.
pub const CONVERSATIONS_MAX: usize = 4096;

/// The state of a trace between requests: the pending requests, and the state of each device.
#[derive(Debug, Default)]
pub struct Decoder {
    conversations: BTreeMap<u32, Conversation>,
    calls: Calls,
}

impl Decoder {
    /// Decodes the next record. Every request becomes one event, when its answer has arrived or can no longer arrive.
    pub fn decode(&mut self, seen: &Seen, event: &mut dyn FnMut(Event)) {
        match seen {
            Seen::Opened { conversation, name, pid, is_whole, .. } => {
                if self.conversations.len() < CONVERSATIONS_MAX {
                    self.conversations
                        .insert(*conversation, Conversation::new(name.clone(), *pid, *is_whole));
                }
            }
            Seen::Message { conversation, direction, message } => {
                if let Some(conversation) = self.conversations.get_mut(conversation) {
                    conversation.message(*direction, message, event);
                }
            }
            Seen::Malformed { time_ns, conversation, direction, malformed } => {
                let known = self.conversations.get(conversation);
                event(Event {
                    time_ns: *time_ns,
                    duration_ns: None,
                    pid: known.and_then(Conversation::pid),
                    name: known.map_or("?", Conversation::name).to_owned(),
                    direction: *direction,
                    request: Request::Malformed,
                    arguments: text::hex(&malformed.head),
                    outcome: Outcome::Said(malformed.reason.clone()),
                    bytes: malformed.bytes,
                    session_of: None,
                    fds: Vec::new(),
                });
            }
            Seen::Closed { time_ns, conversation } => {
                if let Some(mut conversation) = self.conversations.remove(conversation) {
                    conversation.close(*time_ns, event);
                }
            }
            Seen::Call(call) => event(self.calls.decode(call)),
            Seen::Note { time_ns, pid, text } => event(Event {
                time_ns: *time_ns,
                duration_ns: None,
                pid: *pid,
                name: String::new(),
                direction: Direction::ToDevice,
                request: Request::Note,
                arguments: String::new(),
                outcome: Outcome::Said(crate::event::printable(text)),
                bytes: 0,
                session_of: None,
                fds: Vec::new(),
            }),
        }
    }

    /// Requests that still wait for an answer get none.
    pub fn finish(&mut self, time_ns: u64, event: &mut dyn FnMut(Event)) {
        for (_, mut conversation) in std::mem::take(&mut self.conversations) {
            conversation.close(time_ns, event);
        }
    }
}

/// The state of a device as far as a trace has seen it.
#[derive(Clone, Copy, Debug, Default)]
struct Known(Option<State>);

impl Known {
    /// A reset leads to RUNNING from every state (`vfio.h: enum vfio_device_mig_state`).
    fn reset(&mut self) {
        self.0 = Some(State::Running);
    }

    /// A refused SET leaves the device in a state on the path, which only a GET returns.
    fn refused(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests;
