//! [`Request`]: an element of a sequence, readable and one a line, and [`Script`], a sequence.

use std::fmt;
use std::str::FromStr;

use limosa_protocol::State;

/// One request of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// SET of a state, or of a number that is not a state.
    SetState(u32),
    GetState,
    Reset,
    /// A read of at most this many bytes from the newest data stream.
    Read(usize),
    /// A read from the stream before it.
    OldRead(usize),
    /// The next bytes of the device's own state.
    WriteState(usize),
    /// Bytes that are not a valid state.
    WriteJunk(usize),
    /// The newest data stream is closed.
    Drop,
    PrecopyInfo,
    DataSize,
    /// Operation bits, feature, bytes of payload.
    Feature(u32, u16, usize),
    /// Page size, IOVA, length.
    LogStart(u64, u64, u64),
    LogStop,
    /// Page size, IOVA, length.
    LogReport(u64, u64, u64),
}

impl Request {
    /// Its name, for a signature: the request without sizes.
    pub fn kind(&self) -> String {
        match self {
            Request::SetState(_) => self.to_string(),
            other => other.to_string().split(' ').next().unwrap_or_default().to_owned(),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Request::SetState(raw) => match State::from_raw(*raw) {
                Some(state) => write!(f, "set-state {state}"),
                None => write!(f, "set-state {raw}"),
            },
            Request::GetState => f.write_str("get-state"),
            Request::Reset => f.write_str("reset"),
            Request::Read(bytes) => write!(f, "read {bytes}"),
            Request::OldRead(bytes) => write!(f, "old-read {bytes}"),
            Request::WriteState(bytes) => write!(f, "write-state {bytes}"),
            Request::WriteJunk(bytes) => write!(f, "write-junk {bytes}"),
            Request::Drop => f.write_str("drop"),
            Request::PrecopyInfo => f.write_str("precopy-info"),
            Request::DataSize => f.write_str("data-size"),
            Request::Feature(op, index, bytes) => write!(f, "feature {op:#x} {index} {bytes}"),
            Request::LogStart(page, iova, length) => write!(f, "log-start {page} {iova:#x} {length:#x}"),
            Request::LogStop => f.write_str("log-stop"),
            Request::LogReport(page, iova, length) => write!(f, "log-report {page} {iova:#x} {length:#x}"),
        }
    }
}

/// The most bytes that one request of a script may move.
const BYTES_MAX: u64 = 1 << 20;

impl FromStr for Request {
    type Err = String;

    fn from_str(text: &str) -> Result<Request, String> {
        let mut words = text.split_whitespace();
        let name = words.next().unwrap_or_default();
        let mut number = || -> Result<u64, String> {
            let word = words.next().ok_or_else(|| format!("`{text}`: a number is missing"))?;
            let parsed = match word.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None => word.parse(),
            };
            parsed.map_err(|_| format!("`{text}`: `{word}` is no number"))
        };
        let small = |value: u64| -> Result<usize, String> {
            match value <= BYTES_MAX {
                true => Ok(value as usize),
                false => Err(format!("`{text}`: expected at most {BYTES_MAX} bytes")),
            }
        };
        let narrow =
            |value: u64| u32::try_from(value).map_err(|_| format!("`{text}`: {value} has no 32 bits"));
        let request = match name {
            "set-state" => {
                let word = words.next().ok_or_else(|| format!("`{text}`: a state is missing"))?;
                match (word.parse::<State>(), word.parse()) {
                    (Ok(state), _) => Request::SetState(state.raw()),
                    (Err(_), Ok(raw)) => Request::SetState(raw),
                    (Err(_), Err(_)) => return Err(format!("`{text}`: `{word}` is no state and no number")),
                }
            }
            "get-state" => Request::GetState,
            "reset" => Request::Reset,
            "read" => Request::Read(small(number()?)?),
            "old-read" => Request::OldRead(small(number()?)?),
            "write-state" => Request::WriteState(small(number()?)?),
            "write-junk" => Request::WriteJunk(small(number()?)?),
            "drop" => Request::Drop,
            "precopy-info" => Request::PrecopyInfo,
            "data-size" => Request::DataSize,
            "feature" => {
                let (op, index) = (narrow(number()?)?, narrow(number()?)?);
                let index = u16::try_from(index).map_err(|_| format!("`{text}`: {index} is no feature"))?;
                Request::Feature(op, index, small(number()?)?)
            }
            "log-start" => Request::LogStart(number()?, number()?, number()?),
            "log-stop" => Request::LogStop,
            "log-report" => {
                let (page, iova, length) = (number()?, number()?, number()?);
                if page == 0 || length / page > BYTES_MAX {
                    return Err(format!("`{text}`: expected at most {BYTES_MAX} pages"));
                }
                Request::LogReport(page, iova, length)
            }
            _ => return Err(format!("`{text}` is no request")),
        };
        match words.next() {
            None => Ok(request),
            Some(more) => Err(format!("`{text}`: `{more}` is too much")),
        }
    }
}

/// A sequence of requests, each of one thread. Thread 0 drives the device; the others only query it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Script(pub(super) Vec<(usize, Request)>);

/// The most requests of a script, and the most threads.
const REQUESTS_MAX: usize = 100_000;
pub(super) const THREADS_MAX: usize = 16;

impl Script {
    /// How many requests it has.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn threads(&self) -> usize {
        self.0.iter().map(|(thread, _)| thread + 1).max().unwrap_or(1)
    }

    pub(super) fn of(&self, thread: usize) -> Vec<Request> {
        self.0.iter().filter(|(of, _)| *of == thread).map(|(_, request)| request.clone()).collect()
    }
}

impl fmt::Display for Script {
    /// One request a line; `N:` before one of another thread than the first.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (thread, request) in &self.0 {
            match thread {
                0 => writeln!(f, "{request}")?,
                thread => writeln!(f, "{thread}: {request}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Script {
    type Err = String;

    /// Lines that are empty or begin with `#` are left out, and so is what follows ` = `.
    fn from_str(text: &str) -> Result<Script, String> {
        let mut script = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.split(" = ").next().unwrap_or_default().trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let (thread, request) = match text.split_once(':') {
                Some((thread, request)) => {
                    let thread = thread.parse().ok().filter(|thread| *thread < THREADS_MAX);
                    (thread.ok_or_else(|| format!("line {line}: `{text}` names no thread"))?, request)
                }
                None => (0, text),
            };
            script.push((thread, request.parse().map_err(|error| format!("line {line}: {error}"))?));
            if script.len() > REQUESTS_MAX {
                return Err(format!("line {line}: more than {REQUESTS_MAX} requests"));
            }
        }
        Ok(Script(script))
    }
}
