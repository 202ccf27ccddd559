//! A line for each request, like strace's.

use std::fmt::Write as _;
use std::io::{self, BufWriter, Write};

use crate::event::{Direction, Event, Outcome, Request, feature_name, op_name};
use crate::recorder::Sink;

/// Lines.
pub struct Lines<W: Write + Send> {
    name: String,
    to: BufWriter<W>,
}

impl<W: Write + Send> Lines<W> {
    /// Writes to this, which has this name in messages.
    pub fn new(name: impl Into<String>, to: W) -> Lines<W> {
        Lines { name: name.into(), to: BufWriter::new(to) }
    }
}

impl<W: Write + Send> Sink for Lines<W> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn event(&mut self, event: &Event) -> io::Result<()> {
        writeln!(self.to, "{}", line(event))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The line of a request: `12:01:02.123456 [pid 4711] a.sock FEATURE SET MIG_DEVICE_STATE STOP > STOP_COPY -> ok <1.2 ms>`. The
/// time is UTC.
pub fn line(event: &Event) -> String {
    let seconds = event.time_ns / 1_000_000_000;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let micros = event.time_ns / 1000 % 1_000_000;
    let mut line = format!("{hour:02}:{minute:02}:{second:02}.{micros:06}");
    // Writing to a string does not fail.
    if let Some(pid) = event.pid {
        let _ = write!(line, " [pid {pid}]");
    }
    let mut add = |part: &str| {
        if !part.is_empty() {
            line.push(' ');
            line.push_str(part);
        }
    };
    add(&event.name);
    if event.direction == Direction::FromDevice {
        add("<-");
    }
    match &event.request {
        Request::Feature { index, op, .. } => {
            add("FEATURE");
            add(&op_name(*op));
            add(&feature_name(*index));
        }
        Request::Note => add("***"),
        other => add(&other.key()),
    }
    add(&event.arguments);
    if !event.fds.is_empty() && !matches!(&event.outcome, Outcome::Done(text) if text.contains("fd ")) {
        add(&format!("fds [{}]", event.fds.join(", ")));
    }
    match &event.outcome {
        Outcome::Done(text) => {
            add("->");
            add(if text.is_empty() { "ok" } else { text });
        }
        Outcome::Refused(errno) => add(&format!("-> {errno}")),
        Outcome::Posted => add("-> no answer wanted"),
        Outcome::Unanswered(why) => add(&format!("-> no answer: {why}")),
        Outcome::Said(text) if event.request == Request::Note => add(text),
        Outcome::Said(text) => add(&format!("-> {text}")),
    }
    if let Some(duration) = event.duration_ns {
        add(&format!("<{}>", duration_text(duration)));
    }
    line
}

/// A duration with its unit and two or three significant digits.
pub fn duration_text(ns: u64) -> String {
    let (value, unit) = match ns {
        0..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (ns as f64 / 1e3, "us"),
        1_000_000..1_000_000_000 => (ns as f64 / 1e6, "ms"),
        _ => (ns as f64 / 1e9, "s"),
    };
    if value < 10.0 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}
