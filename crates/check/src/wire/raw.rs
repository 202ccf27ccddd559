//! [`Raw`]: the client of a check on a [`Wire`] (`vfio-user.rst: Header, Commands`). It sends the messages that it is given,
//! and checks replies against the rules for replies.

use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use limosa_foreign_fd::ForeignFd;
use limosa_protocol::Errno;
use limosa_protocol::info::DeviceInfo;
use limosa_vfio_user::codec::{Command, Header, Kind, VersionMessage};
use limosa_vfio_user::version::{Capabilities, VERSION};
use zerocopy::{FromBytes, IntoBytes};

use super::Wire;
use crate::check::{Stop, Verdict, ensure, fail, skip};
use crate::recorder::Record;
use crate::run::{RESTART, RETRY};
use crate::trial::Trial;

/// The longest accepted reply, in bytes.
const REPLY_BYTES_MAX: usize = 64 << 20;
/// Limit on the server's commands that are answered while waiting for a reply.
const COMMANDS_MAX: usize = 1024;

/// A message that is to be sent.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub header: Header,
    pub body: Vec<u8>,
}

impl Message {
    /// A command with the header that belongs to it.
    pub fn command(id: u16, command: Command, body: &[u8]) -> Message {
        let size = (Header::BYTES + body.len()) as u32;
        Message { header: Header { id, command, size, flags: 0, error: 0 }, body: body.to_vec() }
    }

    pub fn bytes(&self) -> Vec<u8> {
        [self.header.as_bytes(), &self.body].concat()
    }
}

/// The outcome of a command.
#[derive(Debug)]
pub(crate) enum Answer {
    Reply(Body),
    Refused(Errno),
    /// The server closed the connection.
    Closed,
}

/// The body of a reply, and its fds.
#[derive(Debug)]
pub(crate) struct Body {
    pub bytes: Vec<u8>,
    pub fds: Vec<ForeignFd>,
}

impl Body {
    /// The fixed part of the reply.
    pub fn fixed<T: FromBytes>(&self) -> Result<T, Stop> {
        match T::read_from_prefix(&self.bytes) {
            Ok((fixed, _)) => Ok(fixed),
            Err(_) => {
                fail(format!("a reply of {} bytes, expected at least {}", self.bytes.len(), size_of::<T>()))
            }
        }
    }
}

impl Answer {
    fn words(&self) -> String {
        match self {
            Answer::Reply(body) if body.fds.is_empty() => format!("reply {}", body.bytes.len()),
            Answer::Reply(body) => format!("reply {} fds {}", body.bytes.len(), body.fds.len()),
            Answer::Refused(errno) => errno.to_string(),
            Answer::Closed => "closed".into(),
        }
    }

    /// The reply, or a failure.
    pub fn done(self, what: &str) -> Result<Body, Stop> {
        match self {
            Answer::Reply(body) => Ok(body),
            other => fail(format!("{what}: {}, expected a reply", other.words())),
        }
    }

    /// Refused by a reply.
    pub fn refused(self, what: &str) -> Verdict {
        match self {
            Answer::Refused(_) => Ok(()),
            other => fail(format!("{what}: {}, expected a refusal", other.words())),
        }
    }

    /// Refused by a reply with this errno.
    pub fn refused_with(self, what: &str, errno: Errno) -> Verdict {
        match self {
            Answer::Refused(found) if found == errno => Ok(()),
            other => fail(format!("{what}: {}, expected {errno}", other.words())),
        }
    }

    /// Replied to or refused, and the connection stays open.
    pub fn answered(self, what: &str) -> Verdict {
        match self {
            Answer::Closed => {
                fail(format!("{what}: the connection was closed, expected a reply or a refusal"))
            }
            _ => Ok(()),
        }
    }

    /// Not obeyed: refused, or the connection was closed.
    pub fn not_done(self, what: &str) -> Result<Answer, Stop> {
        match self {
            Answer::Reply(_) => fail(format!("{what} succeeded, expected a refusal or the connection's end")),
            other => Ok(other),
        }
    }
}

/// One raw connection.
pub(crate) struct Raw {
    wire: Box<dyn Wire>,
    record: Arc<Record>,
    prefix: &'static str,
    until: Instant,
    next_id: u16,
    received: Vec<u8>,
    fds: Vec<ForeignFd>,
    /// The server's VERSION.
    pub server: Capabilities,
}

/// Whether the connection is over.
fn gone(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof)
}

impl Raw {
    /// A connection on which nothing was sent.
    pub fn dial(t: &Trial, prefix: &'static str) -> Result<Raw, Stop> {
        let Some(dial) = &t.target.dial else { return skip("the device is not behind a socket") };
        // The client before this check is gone, and a server may end with its client. Within a check it may not.
        let patience = if prefix.is_empty() { RESTART } else { Duration::ZERO };
        let until = t.until.min(Instant::now() + patience);
        let wire = loop {
            match dial() {
                Ok(wire) => break wire,
                Err(error) => {
                    let gone = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
                    if !gone || Instant::now() >= until {
                        return fail(format!("the server cannot be connected to: {error}"));
                    }
                    std::thread::sleep(RETRY);
                }
            }
        };
        t.record.note(&format!("{prefix}connect"), "ok");
        Ok(Raw {
            wire,
            record: Arc::clone(&t.record),
            prefix,
            until: t.until,
            next_id: 0,
            received: Vec::new(),
            fds: Vec::new(),
            server: Capabilities::default(),
        })
    }

    /// A check's first connection, with a version.
    pub fn open(t: &Trial) -> Result<Raw, Stop> {
        let (raw, answer) = Raw::first(t, &proposal())?;
        raw.agreed(answer)
    }

    /// A check's first connection, and the answer to this VERSION over it. A server that ends with its client may have accepted the
    /// connection right before its end, so a connection that is closed is made again.
    pub fn first(t: &Trial, version: &[u8]) -> Result<(Raw, Answer), Stop> {
        let until = t.until.min(Instant::now() + RESTART);
        loop {
            let mut raw = Raw::dial(t, "")?;
            match raw.ask(Command::VERSION, version)? {
                Answer::Closed if Instant::now() < until => std::thread::sleep(RETRY),
                answer => return Ok((raw, answer)),
            }
        }
    }

    /// A further connection, with a version.
    pub fn open_as(t: &Trial, prefix: &'static str) -> Result<Raw, Stop> {
        let mut raw = Raw::dial(t, prefix)?;
        let answer = raw.ask(Command::VERSION, &proposal())?;
        raw.agreed(answer)
    }

    fn agreed(mut self, answer: Answer) -> Result<Raw, Stop> {
        let reply = answer.done("VERSION")?;
        self.server = Capabilities::decode(reply.bytes.get(VersionMessage::BYTES..).unwrap_or_default())
            .map_err(|error| Stop::Fail(format!("the reply to VERSION: {error}")))?;
        Ok(self)
    }

    pub fn id(&mut self) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    /// Sends a command and waits for its answer.
    pub fn ask(&mut self, command: Command, body: &[u8]) -> Result<Answer, Stop> {
        self.ask_with(command, body, &[])
    }

    /// The same, with fds.
    pub fn ask_with(
        &mut self,
        command: Command,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, Stop> {
        let message = Message::command(self.id(), command, body);
        self.exchange(&message, fds)
    }

    /// Sends a message and waits for the answer to it.
    pub fn exchange(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<Answer, Stop> {
        if !self.send(message, fds)? {
            return Ok(Answer::Closed);
        }
        self.answer(message.header.id, message.header.command)
    }

    /// Sends a message; whether the connection still takes any.
    pub fn send(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<bool, Stop> {
        let Header { command, size, flags, .. } = message.header;
        let mut words = format!("{command} {}", message.body.len());
        if size as usize != Header::BYTES + message.body.len() {
            words += &format!(" size {size}");
        }
        if flags != 0 {
            words += &format!(" flags {flags:#x}");
        }
        if !fds.is_empty() {
            words += &format!(" fds {}", fds.len());
        }
        self.send_bytes(&message.bytes(), fds, &words)
    }

    /// Sends bytes as they are; whether the connection still takes any.
    pub fn send_bytes(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>], words: &str) -> Result<bool, Stop> {
        let sent = self.wire.send(bytes, fds, self.until);
        let (answer, open) = match &sent {
            Ok(()) => ("sent".into(), true),
            Err(error) if gone(error) => ("closed".into(), false),
            Err(error) => (format!("# {error}"), false),
        };
        self.record.note(&format!("{}{words}", self.prefix), answer);
        match sent {
            Err(error) if !gone(&error) => fail(format!("{words}: not taken by the server: {error}")),
            _ => Ok(open),
        }
    }

    /// The answer to this command, which has to be the next reply.
    pub fn answer(&mut self, id: u16, command: Command) -> Result<Answer, Stop> {
        let Some((header, answer)) = self.next_reply(&command.to_string())? else {
            return Ok(Answer::Closed);
        };
        ensure((header.id, header.command) == (id, command), || {
            format!("a reply to {} with id {}, expected {command} with id {id}", header.command, header.id)
        })?;
        Ok(answer)
    }

    /// The next reply; `None` when the server closed the connection. Commands of the server are refused.
    pub fn next_reply(&mut self, to: &str) -> Result<Option<(Header, Answer)>, Stop> {
        for _ in 0..COMMANDS_MAX {
            let Some(header) = self.next_header(to)? else {
                self.record.note(&format!("{}reply to {to}", self.prefix), "closed");
                return Ok(None);
            };
            let bytes = (header.size as usize).saturating_sub(Header::BYTES);
            ensure(header.size as usize >= Header::BYTES && bytes <= REPLY_BYTES_MAX, || {
                format!("the reply to {to} has a size of {} bytes", header.size)
            })?;
            if !self.fill(Header::BYTES + bytes, to)? {
                return fail(format!("the server closed the connection within the reply to {to}"));
            }
            let bytes = self.received.drain(..Header::BYTES + bytes).skip(Header::BYTES).collect();
            // Nothing is pipelined with fds in replies: what has come belongs to this one.
            let body = Body { bytes, fds: std::mem::take(&mut self.fds) };
            let answer = match header.kind() {
                Ok(Kind::Command) => {
                    let refusal = header.refusal(Errno::EINVAL);
                    self.send_bytes(refusal.as_bytes(), &[], &format!("refuse {}", header.command))?;
                    continue;
                }
                Ok(Kind::Posted) => continue,
                Ok(Kind::Reply) => Answer::Reply(body),
                Ok(Kind::Refusal(errno)) => {
                    ensure(body.bytes.is_empty(), || {
                        format!(
                            "the refusal of {to} has {} bytes behind its header, expected none",
                            body.bytes.len()
                        )
                    })?;
                    Answer::Refused(errno)
                }
                Err(error) => return fail(format!("the reply to {to}: {error}")),
            };
            self.record.note(&format!("{}reply to {to}", self.prefix), answer.words());
            return Ok(Some((header, answer)));
        }
        fail(format!("more than {COMMANDS_MAX} commands of the server instead of the reply to {to}"))
    }

    fn next_header(&mut self, to: &str) -> Result<Option<Header>, Stop> {
        if !self.fill(Header::BYTES, to)? {
            ensure(self.received.is_empty(), || {
                format!("the server closed the connection within the reply to {to}")
            })?;
            return Ok(None);
        }
        match Header::read_from_prefix(&self.received) {
            Ok((header, _)) => Ok(Some(header)),
            Err(_) => fail("a header that is not whole"),
        }
    }

    /// Receives until `bytes` bytes are there; `false` when the server closed the connection first.
    fn fill(&mut self, bytes: usize, to: &str) -> Result<bool, Stop> {
        let mut piece = vec![0; 64 << 10];
        while self.received.len() < bytes {
            match self.wire.receive(&mut piece, &mut self.fds, self.until) {
                Ok(0) => return Ok(false),
                Ok(got) => self.received.extend_from_slice(&piece[..got]),
                Err(error) if gone(&error) => return Ok(false),
                Err(error) if error.kind() == ErrorKind::TimedOut => {
                    self.record.note(&format!("{}reply to {to}", self.prefix), "# no answer");
                    return fail(format!("no answer to {to} in time"));
                }
                Err(error) => return fail(format!("the answer to {to} cannot be received: {error}")),
            }
        }
        Ok(true)
    }

    /// Checks that the connection is in step: a GET_INFO gets its usual reply.
    pub fn in_step(&mut self) -> Verdict {
        let reply = self.ask(Command::DEVICE_GET_INFO, info_request().as_bytes())?;
        let body = reply.done("GET_INFO afterwards")?;
        ensure(body.bytes.len() == size_of::<DeviceInfo>(), || {
            format!("GET_INFO afterwards is answered by {} bytes, expected 16: out of step", body.bytes.len())
        })
    }

    /// Checks that the connection stays in step; or that it was closed, and the next client is served.
    pub fn goes_on(mut self, t: &Trial, answer: &Answer) -> Verdict {
        if !matches!(answer, Answer::Closed) {
            return self.in_step();
        }
        drop(self);
        next_client(t)
    }
}

/// Checks that another client is served.
pub(crate) fn next_client(t: &Trial) -> Verdict {
    Raw::open_as(t, "next ")?.in_step()
}

/// A VERSION's body with this data.
pub(crate) fn version(data: &[u8]) -> Vec<u8> {
    let fixed = VersionMessage { major: VERSION.0, minor: VERSION.1 };
    [fixed.as_bytes(), data].concat()
}

/// The newest version and what every client has, without the twin socket.
fn proposal() -> Vec<u8> {
    version(&Capabilities::of_client(1 << 20, false).encode(4096))
}

/// GET_INFO's body.
pub(crate) fn info_request() -> DeviceInfo {
    DeviceInfo { argsz: size_of::<DeviceInfo>() as u32, ..DeviceInfo::default() }
}
