//! How a connection begins: the version, the twin socket, and which features there are
//! (`vfio-user.rst: VFIO_USER_VERSION`, `docs/vfio-user-extensions.md: Probing a peer`).

use std::io::IoSlice;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use limosa_client::{DeviceIdentity, Error, Result};
use limosa_foreign_fd::Foreign;
use limosa_protocol::info::DeviceInfo;
use limosa_protocol::{FeatureHeader, FeatureIndex, FeatureOp};
use zerocopy::{FromBytes, IntoBytes};

use super::dma::{DmaTargets, serve_twin};
use super::exchange::{Exchange, Failure};
use super::feature::{Features, Migration};
use super::session::Session;
use super::{Client, Options, Shared, error};
use crate::codec::{Command, Header, Kind, VersionMessage};
use crate::connection::{self, ConnectionError, Fds, Receiver, Sender};
use crate::version::{Capabilities, JSON_BYTES_MAX, Limits, Role, VERSION};

/// A new connection before it is shared: one request at a time.
struct Fresh<'a> {
    name: &'a str,
    options: &'a Options,
    receiver: Receiver,
    sender: Sender,
    id: u16,
    /// When the step must be done that is being done.
    deadline: Instant,
}

/// The agreed limits, the server's socket for DMA messages, and the role of this client.
type Agreed = (Limits, Option<Foreign<UnixStream>>, Role);

/// The result of probing the server's handling of DEVICE_FEATURE.
enum Probed {
    /// The server stays in sync.
    InStep,
    /// It does not know the message, and lost its step but found it again.
    Unknown,
    /// The connection is no longer usable.
    Lost,
}

pub(super) fn connect(
    name: String,
    options: Options,
    stream: Foreign<UnixStream>,
    again: Option<&dyn Fn() -> Result<Foreign<UnixStream>>>,
) -> Result<Client> {
    let server = rustix::net::sockopt::socket_peercred(&stream).ok();
    let server = server.map(|server| server.pid.as_raw_nonzero().get());
    let (mut fresh, mut agreed) = Fresh::negotiate(&name, &options, stream)?;
    let mut features = Features::default();
    if options.features {
        match fresh.probe() {
            Probed::InStep => features = fresh.features()?,
            Probed::Unknown => {}
            Probed::Lost => {
                let Some(again) = again else {
                    return Err(Error::Misbehaved {
                        device: name,
                        what: "it loses its step on DEVICE_FEATURE; connect without asking for features"
                            .into(),
                    });
                };
                tracing::info!(device = name, "lost its step on DEVICE_FEATURE; connecting without it");
                // The server may serve one client at a time.
                drop(fresh);
                (fresh, agreed) = Fresh::negotiate(&name, &options, again()?)?;
            }
        }
    }
    let (limits, twin, role) = agreed;
    let Fresh { receiver, sender, .. } = fresh;
    let failed = |failure: Failure| error(&name, "connecting", failure);
    let targets = DmaTargets::new(limits.data_xfer_bytes_max);
    let exchange = Exchange::new(receiver, sender, targets).map_err(|error| failed(error.into()))?;
    let twin = match twin {
        None => None,
        Some(socket) => {
            let (receiver, sender) =
                connection::split(socket, options.waits()).map_err(|error| failed(error.into()))?;
            let sender = Arc::new(sender);
            let (exchange, replies) = (Arc::clone(&exchange), Arc::clone(&sender));
            let thread = std::thread::Builder::new().name("vfio-user-twin".into());
            thread
                .spawn(move || serve_twin(&exchange.dma, receiver, &replies))
                .map_err(|error| failed(ConnectionError::Os(super::dma::os_errno(&error)).into()))?;
            Some(sender)
        }
    };
    let shared = Shared {
        name,
        identity: DeviceIdentity::unique(),
        options,
        limits,
        exchange,
        twin,
        server,
        role,
        features,
        migration: std::sync::Mutex::new(Migration::default()),
        session: Session::default(),
        plain_unmap: AtomicBool::new(false),
    };
    Ok(Client { shared: Arc::new(shared) })
}

impl<'a> Fresh<'a> {
    /// Proposes a version and capabilities, and checks the answer.
    fn negotiate(
        name: &'a str,
        options: &'a Options,
        stream: Foreign<UnixStream>,
    ) -> Result<(Fresh<'a>, Agreed)> {
        let (receiver, sender) = connection::split(stream, options.waits())
            .map_err(|failure| error(name, "VERSION", failure.into()))?;
        let deadline = Instant::now() + options.request_limit;
        let mut fresh = Fresh { name, options, receiver, sender, id: 0, deadline };
        let role = Some(options.role).filter(|role| *role != Role::Vmm);
        let ours = Capabilities {
            role,
            ..Capabilities::of_client(options.data_bytes_max.max(1), options.twin_socket)
        };
        let version = VersionMessage { major: VERSION.0, minor: VERSION.1 };
        let id = fresh.send(Command::VERSION, &[version.as_bytes(), &ours.encode(JSON_BYTES_MAX)])?;
        let header = fresh.receive("VERSION")?;
        let (body, fds) = fresh.body("VERSION", JSON_BYTES_MAX + VersionMessage::BYTES)?;
        match header.kind() {
            Ok(Kind::Reply) if header.id == id && header.command == Command::VERSION => {}
            Ok(Kind::Refusal(errno)) => return Err(fresh.error("VERSION", Failure::Refused(errno))),
            _ => return Err(fresh.misbehaved("the answer to VERSION is invalid")),
        }
        let (theirs, json) = VersionMessage::read_from_prefix(&body)
            .map_err(|_| fresh.misbehaved("the answer to VERSION is too short"))?;
        if theirs.major != version.major || theirs.minor > version.minor {
            let what =
                format!("it answers VERSION 0.{} with {}.{}", version.minor, theirs.major, theirs.minor);
            return Err(fresh.misbehaved(what));
        }
        let theirs_caps = Capabilities::decode(json).map_err(|error| fresh.misbehaved(error.to_string()))?;
        let limits = Limits::agree(theirs.minor, &ours, &theirs_caps, &theirs_caps);
        let twin = match theirs_caps.twin_socket.filter(|twin| twin.supported) {
            None => None,
            Some(_) if !options.twin_socket => {
                return Err(fresh.misbehaved("it has a twin socket that was not requested"));
            }
            Some(twin) => {
                let index = twin.fd_index.and_then(|index| usize::try_from(index).ok());
                let fd = index.and_then(|index| fds.fds.into_iter().nth(index));
                let fd = fd.ok_or_else(|| fresh.misbehaved("the twin socket that it names did not come"))?;
                let no_socket =
                    |_| fresh.misbehaved("the fd for the twin socket is not a UNIX stream socket");
                Some(fd.into_unix_stream().map_err(no_socket)?)
            }
        };
        let role = match theirs_caps.role {
            Some(Role::Control) => Role::Control,
            _ => Role::Vmm,
        };
        if options.role == Role::Control && role != Role::Control {
            return Err(fresh.misbehaved("it does not support control clients"));
        }
        Ok((fresh, (limits, twin, role)))
    }

    /// Finds out whether the server stays in sync after DEVICE_FEATURE. A server that does not parses the probe's
    /// body as the header of a message 0.
    fn probe(&mut self) -> Probed {
        self.deadline = Instant::now() + self.options.request_limit;
        let header = FeatureHeader::new(FeatureIndex::MIGRATION, FeatureOp::GET | FeatureOp::PROBE, 8);
        let info = DeviceInfo { argsz: size_of::<DeviceInfo>() as u32, ..DeviceInfo::default() };
        let probe = self.send(Command::DEVICE_FEATURE, &[header.as_bytes(), &[0; 8]]);
        let after = self.send(Command::DEVICE_GET_INFO, &[info.as_bytes()]);
        let (Ok(probe), Ok(after)) = (probe, after) else { return Probed::Lost };
        let mut lost_step = false;
        let mut answered = false;
        loop {
            let Ok(reply) = self.receive("DEVICE_FEATURE") else { return Probed::Lost };
            let refused = matches!(reply.kind(), Ok(Kind::Refusal(_)));
            match reply.kind() {
                Ok(Kind::Reply | Kind::Refusal(_)) => {}
                _ => return Probed::Lost,
            }
            match (reply.id, reply.command) {
                (id, Command::DEVICE_FEATURE) if id == probe && !answered => answered = true,
                (id, Command(0)) if id == header.argsz as u16 && refused && answered && !lost_step => {
                    lost_step = true;
                }
                (id, Command::DEVICE_GET_INFO) if id == after && answered => break,
                _ => return Probed::Lost,
            }
        }
        if lost_step { Probed::Unknown } else { Probed::InStep }
    }

    /// Probes every feature that some servers lack.
    fn features(&mut self) -> Result<Features> {
        self.deadline = Instant::now() + self.options.request_limit;
        let mut found = Features::default().spoken();
        let mut asked = Vec::new();
        for (index, op) in Features::ASKED {
            let header = FeatureHeader::new(index, op | FeatureOp::PROBE, 0);
            asked.push((index, self.send(Command::DEVICE_FEATURE, &[header.as_bytes()])?));
        }
        for (index, id) in asked {
            let reply = self.receive("PROBE")?;
            if (reply.id, reply.command) != (id, Command::DEVICE_FEATURE) {
                return Err(self.misbehaved("its replies are out of order"));
            }
            match reply.kind() {
                Ok(Kind::Reply) => found.add(index),
                // Servers use different errnos for "no".
                Ok(Kind::Refusal(_)) => {}
                _ => return Err(self.misbehaved("the answer to a PROBE is invalid")),
            }
        }
        Ok(found)
    }

    fn send(&mut self, command: Command, body: &[&[u8]]) -> Result<u16> {
        self.id += 1;
        let bytes = body.iter().map(|part| part.len()).sum();
        let header = Header::command(self.id, command, bytes).expect("a short message");
        let body = [header.as_bytes(), &body.concat()].concat();
        let full = || self.sender.wait_writable(self.deadline);
        match self.sender.send_with(&mut [IoSlice::new(&body)], &[], full) {
            Ok(()) => Ok(self.id),
            Err(failure) => Err(self.error("VERSION", failure.into())),
        }
    }

    fn receive(&mut self, request: &str) -> Result<Header> {
        let header =
            self.receiver.next(Some(self.deadline)).map_err(|failure| self.error(request, failure.into()))?;
        header.body_bytes().map_err(|error| self.misbehaved(error.to_string()))?;
        Ok(header)
    }

    fn body(&mut self, request: &str, bytes_max: usize) -> Result<(Vec<u8>, Fds)> {
        let bytes = self.receiver.body_left();
        if bytes > bytes_max {
            return Err(self.misbehaved(format!("{bytes} bytes in answer to {request}")));
        }
        let mut body = vec![0; bytes];
        match self.receiver.read(&mut body, Some(self.deadline)) {
            Ok(_) => match self.receiver.fds() {
                Fds { lost: true, .. } => Err(self.error(request, Failure::NoRoom)),
                fds => Ok((body, fds)),
            },
            Err(failure) => Err(self.error(request, failure.into())),
        }
    }

    fn error(&self, request: &str, failure: Failure) -> Error {
        match failure {
            Failure::Connection(ConnectionError::TimedOut) => {
                error(self.name, request, Failure::TimedOut(self.options.request_limit))
            }
            other => error(self.name, request, other),
        }
    }

    fn misbehaved(&self, what: impl Into<String>) -> Error {
        Error::Misbehaved { device: self.name.into(), what: what.into() }
    }
}
