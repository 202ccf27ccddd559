//! A JSON document in a line for each request.

use std::io::{self, BufWriter, Write};

use serde::Serialize;

use crate::event::{Direction, Event, Outcome, Request, feature_name, op_name};
use crate::recorder::Sink;

/// JSON lines.
pub struct Json<W: Write + Send> {
    name: String,
    to: BufWriter<W>,
}

impl<W: Write + Send> Json<W> {
    /// Writes to this, which has this name in messages.
    pub fn new(name: impl Into<String>, to: W) -> Json<W> {
        Json { name: name.into(), to: BufWriter::new(to) }
    }
}

/// The version of the documents (`docs/output.schema.json`).
pub const SCHEMA: u32 = 1;

#[derive(Serialize)]
struct Document<'a> {
    schema: u32,
    command: &'static str,
    time_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    name: &'a str,
    direction: &'static str,
    request: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    feature: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    op: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<&'static str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    arguments: &'a str,
    outcome: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    answer: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno: Option<String>,
    #[serde(skip_serializing_if = "is_zero")]
    bytes: u64,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    fds: &'a [String],
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl<W: Write + Send> Sink for Json<W> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn event(&mut self, event: &Event) -> io::Result<()> {
        serde_json::to_writer(&mut self.to, &document(event))?;
        self.to.write_all(b"\n")
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

fn document(event: &Event) -> Document<'_> {
    let (request, feature, op, transition) = match &event.request {
        Request::Feature { index, op, transition } => {
            ("FEATURE".to_owned(), Some(feature_name(*index)), Some(op_name(*op)), *transition)
        }
        other => (other.key(), None, None, None),
    };
    let (outcome, answer, errno) = match &event.outcome {
        Outcome::Done(text) => ("done", text.as_str(), None),
        Outcome::Refused(errno) => ("refused", "", Some(format!("{errno:?}"))),
        Outcome::Posted => ("posted", "", None),
        Outcome::Unanswered(why) => ("unanswered", *why, None),
        Outcome::Said(text) if event.request == Request::Malformed => ("malformed", text.as_str(), None),
        Outcome::Said(text) => ("note", text.as_str(), None),
    };
    Document {
        schema: SCHEMA,
        command: "trace",
        time_ns: event.time_ns,
        duration_ns: event.duration_ns,
        pid: event.pid,
        name: &event.name,
        direction: match event.direction {
            Direction::ToDevice => "to_device",
            Direction::FromDevice => "from_device",
        },
        request,
        feature,
        op,
        from: transition.and_then(|transition| transition.from).map(limosa_protocol::State::name),
        to: transition.map(|transition| transition.to.name()),
        arguments: &event.arguments,
        outcome,
        answer,
        errno,
        bytes: event.bytes,
        fds: &event.fds,
    }
}
