//! One vfio-user connection: commands wait for their replies by their id (`vfio-user.rst: Header`, *Message ID*).

use std::collections::BTreeMap;

use limosa_vfio_user::codec::{Command, Kind, VersionMessage};
use limosa_vfio_user::version::Capabilities;

use super::message::{self, Asked};
use super::{Known, text};
use crate::event::{Direction, Event, Outcome, Request};
use crate::seen::Message;

/// Limit on the commands of one connection that wait for their replies. Beyond it, the oldest is given up.
const PENDING_MAX: usize = 1024;

/// A connection.
#[derive(Debug)]
pub struct Conversation {
    name: String,
    pid: Option<u32>,
    /// Its beginning was seen.
    is_whole: bool,
    /// By the direction of the command, and its id.
    pending: BTreeMap<(bool, u16), Pending>,
    number: u64,
    known: Known,
    is_qemus: bool,
}

#[derive(Debug)]
struct Pending {
    number: u64,
    command: Command,
    event: Event,
}

impl Conversation {
    pub fn new(name: String, pid: Option<u32>, is_whole: bool) -> Conversation {
        Conversation {
            name,
            pid,
            is_whole,
            pending: BTreeMap::new(),
            number: 0,
            known: Known::default(),
            is_qemus: false,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// The next message.
    pub fn message(&mut self, direction: Direction, message: &Message, event: &mut dyn FnMut(Event)) {
        match message.header.kind() {
            Ok(Kind::Command) => self.command(direction, message, true, event),
            Ok(Kind::Posted) => self.command(direction, message, false, event),
            Ok(Kind::Reply) => self.reply(direction, message, Outcome::Done(String::new()), event),
            Ok(Kind::Refusal(errno)) => self.reply(direction, message, Outcome::Refused(errno), event),
            Err(error) => event(self.malformed(direction, message, error.to_string())),
        }
    }

    /// The connection has ended: pending commands get no answer.
    pub fn close(&mut self, time_ns: u64, event: &mut dyn FnMut(Event)) {
        let mut left: Vec<_> = std::mem::take(&mut self.pending).into_values().collect();
        left.sort_by_key(|pending| pending.number);
        for mut pending in left {
            pending.event.duration_ns = Some(time_ns.saturating_sub(pending.event.time_ns));
            pending.event.outcome = Outcome::Unanswered("the trace or the connection ended");
            event(pending.event);
        }
    }

    fn command(
        &mut self,
        direction: Direction,
        message: &Message,
        is_answered: bool,
        event: &mut dyn FnMut(Event),
    ) {
        let (header, head) = (&message.header, &message.head);
        if header.command == Command::VERSION && direction == Direction::ToDevice {
            let json = head.get(VersionMessage::BYTES..).unwrap_or_default();
            self.is_qemus = Capabilities::decode(json).is_ok_and(|theirs| theirs.are_qemus());
        }
        let asked = message::asked(header.command, head, message.body_bytes, self.is_qemus, self.known);
        // A server also answers malformed commands.
        let Asked { request, arguments, bytes } = match asked {
            Ok(asked) => asked,
            Err(reason) => Asked {
                request: message::named(header.command),
                arguments: format!("malformed, {reason}: {}", text::hex(head)),
                bytes: 0,
            },
        };
        let is_session = matches!(header.command, Command::MIG_DATA_READ | Command::MIG_DATA_WRITE);
        let one = Event {
            time_ns: message.began_ns,
            duration_ns: None,
            pid: self.pid,
            name: self.name.clone(),
            direction,
            request,
            arguments,
            outcome: Outcome::Posted,
            bytes,
            session_of: is_session.then(|| self.name.clone()),
            fds: message.fds.clone(),
        };
        if !is_answered {
            event(one);
            return;
        }
        let key = (direction == Direction::ToDevice, header.id);
        self.number += 1;
        let pending = Pending { number: self.number, command: header.command, event: one };
        if let Some(before) = self.pending.insert(key, pending) {
            event(unanswered(before, "its id was used again"));
        }
        if self.pending.len() > PENDING_MAX
            && let Some((key, _)) = self.pending.iter().min_by_key(|(_, pending)| pending.number)
            && let Some(oldest) = self.pending.remove(&key.clone())
        {
            event(unanswered(oldest, "too many later ones wait"));
        }
    }

    fn reply(
        &mut self,
        direction: Direction,
        message: &Message,
        outcome: Outcome,
        event: &mut dyn FnMut(Event),
    ) {
        let header = &message.header;
        let key = (direction == Direction::FromDevice, header.id);
        let is_its = |pending: &Pending| pending.command == header.command;
        let is_known = self.pending.get(&key).is_some_and(is_its);
        if !is_known && self.is_whole {
            let reason =
                format!("a reply to {} with id {}, which nobody asked for", header.command, header.id);
            event(self.malformed(direction, message, reason));
            return;
        }
        if !is_known {
            event(self.reply_alone(direction, message, outcome));
            return;
        }
        let Some(Pending { event: mut one, .. }) = self.pending.remove(&key) else { return };
        one.duration_ns = Some(message.ended_ns.saturating_sub(one.time_ns));
        one.fds.extend(message.fds.iter().cloned());
        one.outcome = match outcome {
            Outcome::Done(_) => {
                let answered = message::answered(
                    &one.request,
                    header.command,
                    &message.head,
                    message.body_bytes,
                    self.is_qemus,
                    &mut self.known,
                );
                match answered {
                    Ok((text, bytes)) => {
                        one.bytes += bytes;
                        Outcome::Done(text)
                    }
                    Err(reason) => {
                        Outcome::Done(format!("malformed, {reason}: {}", text::hex(&message.head)))
                    }
                }
            }
            refused => {
                if matches!(one.request, Request::Feature { transition: Some(_), .. }) {
                    self.known.refused();
                }
                // Nothing was transferred.
                one.bytes = 0;
                refused
            }
        };
        event(one);
    }

    /// A reply to a command that was sent before the trace began.
    fn reply_alone(&self, direction: Direction, message: &Message, outcome: Outcome) -> Event {
        let direction = match direction {
            Direction::ToDevice => Direction::FromDevice,
            Direction::FromDevice => Direction::ToDevice,
        };
        let request = message::named(message.header.command);
        let arguments = "(asked before the trace began)".to_owned();
        Event { request, arguments, outcome, bytes: 0, ..self.malformed(direction, message, String::new()) }
    }

    fn malformed(&self, direction: Direction, message: &Message, reason: String) -> Event {
        Event {
            time_ns: message.began_ns,
            duration_ns: None,
            pid: self.pid,
            name: self.name.clone(),
            direction,
            request: Request::Malformed,
            arguments: text::hex(zerocopy::IntoBytes::as_bytes(&message.header)),
            outcome: Outcome::Said(reason),
            bytes: message.header.size.into(),
            session_of: None,
            fds: message.fds.clone(),
        }
    }
}

fn unanswered(pending: Pending, why: &'static str) -> Event {
    let mut event = pending.event;
    event.outcome = Outcome::Unanswered(why);
    event
}
