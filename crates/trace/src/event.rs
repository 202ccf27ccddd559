//! The elements of a trace: requests with their answers ([`Event`]).

use limosa_protocol::{Errno, FeatureIndex, FeatureOp, State};
use limosa_vfio_user::extension;

/// A request and its answer, or another fact that a reader of the trace has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When the request began, in nanoseconds since 1970 (UTC).
    pub time_ns: u64,
    /// How long the answer took, in nanoseconds. `None` where none came, or none was due.
    pub duration_ns: Option<u64>,
    /// The process that made the request, or that is at the client's end of the connection.
    pub pid: Option<u32>,
    /// The device or file that the request went to, for people.
    pub name: String,
    /// The direction of the request.
    pub direction: Direction,
    /// The request.
    pub request: Request,
    /// Its arguments, for people. Characters of a peer that are not printable are escaped.
    pub arguments: String,
    /// Its outcome.
    pub outcome: Outcome,
    /// Bytes of session data, region contents or guest memory that were transferred.
    pub bytes: u64,
    /// The device to whose migration session these bytes belong.
    pub session_of: Option<String>,
    /// The fds that went with the request, then those that came with the answer.
    pub fds: Vec<String>,
}

/// The direction of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// A VMM asked a device: every system call, and every vfio-user message of a client.
    ToDevice,
    /// A vfio-user server asked its client.
    FromDevice,
}

/// The request of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// The FEATURE multiplexer.
    Feature {
        /// Which feature.
        index: FeatureIndex,
        /// GET, SET, PROBE, as they were asked for.
        op: FeatureOp,
        /// Of a SET of MIG_DEVICE_STATE.
        transition: Option<Transition>,
    },
    /// Any other request with a name: a message, an ioctl, a read, a write.
    Named(&'static str),
    /// A message or an ioctl that has no name, with its number.
    Numbered(&'static str, u32),
    /// Bytes that are not a request.
    Malformed,
    /// A remark about the trace itself.
    Note,
}

/// A requested change of the migration state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Transition {
    /// The state before, where the trace has seen it.
    pub from: Option<State>,
    /// The requested state.
    pub to: State,
}

/// The outcome of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done. The text has the contents of the answer, and is empty if there are none.
    Done(String),
    /// It was refused.
    Refused(Errno),
    /// No answer was wanted.
    Posted,
    /// No answer came, for this reason.
    Unanswered(&'static str),
    /// The reason why bytes are malformed; or the text of a remark.
    Said(String),
}

/// The name of a feature: the standard's, or this project's for its extensions; else `feature N`.
pub fn feature_name(index: FeatureIndex) -> String {
    extension::name(index).map_or_else(|| index.to_string(), str::to_owned)
}

/// `GET`, `SET`, `PROBE`, `PROBE+GET`, or `-` for none of them.
pub fn op_name(op: FeatureOp) -> String {
    let names = [(FeatureOp::PROBE, "PROBE"), (FeatureOp::GET, "GET"), (FeatureOp::SET, "SET")];
    let names: Vec<_> = names.iter().filter(|(flag, _)| op.contains(*flag)).map(|(_, name)| *name).collect();
    if names.is_empty() { "-".to_owned() } else { names.join("+") }
}

impl Request {
    /// The request without its arguments, as statistics group them: `FEATURE SET MIG_DEVICE_STATE`.
    pub fn key(&self) -> String {
        match self {
            Request::Feature { index, op, .. } => {
                format!("FEATURE {} {}", op_name(*op), feature_name(*index))
            }
            Request::Named(name) => (*name).to_owned(),
            Request::Numbered(kind, number) => format!("{kind} {number:#x}"),
            Request::Malformed => "MALFORMED".to_owned(),
            Request::Note => "NOTE".to_owned(),
        }
    }
}

impl Transition {
    /// `STOP > STOP_COPY`, or `STOP_COPY` where the state before is not known.
    pub fn shown(&self) -> String {
        match self.from {
            Some(from) => format!("{from} > {}", self.to),
            None => self.to.to_string(),
        }
    }
}

/// A text of another process, with everything escaped that could control a terminal.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\'' | '"' | '\\' => shown.push(letter),
            letter => shown.extend(letter.escape_debug()),
        }
    }
    shown
}
