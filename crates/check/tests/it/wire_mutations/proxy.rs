//! A server with one fault: a proxy in front of a server of this project. It passes messages on one by one, and does to
//! some of them what its fault says.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use limosa_check::{SocketWire, Wire};
use limosa_client::{Device, DeviceExt};
use limosa_device::{Loopback, Machine};
use limosa_foreign_fd::ForeignFd;
use limosa_protocol::{Errno, State};
use limosa_vfio_user::codec::{Command, Header, Kind};
use limosa_vfio_user::server::{self, Server, ShutdownHandle};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zerocopy::{FromBytes, IntoBytes};

/// A message on its way, or a reply.
pub struct Passing {
    pub header: Header,
    pub body: Vec<u8>,
    pub fds: Vec<ForeignFd>,
}

impl Passing {
    pub fn bytes(&self) -> Vec<u8> {
        [self.header.as_bytes(), &self.body].concat()
    }

    pub fn is(&self, command: Command) -> bool {
        self.header.command == command
    }

    /// 32 bits of the body; 0 where there are none.
    pub fn u32(&self, at: usize) -> u32 {
        let bytes = self.body.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_ne_bytes(bytes.unwrap_or_default())
    }

    /// 64 bits of the body; 0 where there are none.
    pub fn u64(&self, at: usize) -> u64 {
        let bytes = self.body.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        u64::from_ne_bytes(bytes.unwrap_or_default())
    }

    /// Gives the message another body.
    pub fn set_body(&mut self, body: Vec<u8>) {
        self.header.size = (Header::BYTES + body.len()) as u32;
        self.body = body;
    }
}

/// What a fault does to a message of a client's.
pub enum Do {
    /// Passes it on.
    Pass,
    /// Replies with this body.
    Reply(Vec<u8>),
    /// Refuses it.
    Refuse(Errno),
    /// Says nothing.
    Ignore,
    /// Closes the connection.
    Close,
    /// The server dies: no client is served any more.
    Die,
}

/// What is wrong with a server.
#[derive(Clone, Copy)]
pub enum Fault {
    Nothing,
    /// What becomes of a message.
    Ask(fn(&mut Passing, &Connection) -> Do),
    /// What becomes of a reply, given the message.
    Answer(fn(&Passing, &mut Passing)),
    /// A receive that brings part of a message ends the connection.
    WholeMessages,
    /// One that brings more than a message does.
    SingleMessages,
    /// A connection that ends within a message takes the server along.
    DiesOfHalves,
    /// One that ends after so many messages does.
    DiesAfter(u32),
    /// A second connection ends the first.
    SecondEndsFirst,
    /// The device is reset when a client is gone.
    ResetsWhenGone,
    /// It is stopped.
    StopsWhenGone,
    /// After so many connections there is no other.
    Connections(u64),
}

/// A faulty server.
pub struct Faulty {
    fault: Fault,
    pub upstream: PathBuf,
    device: Loopback,
    /// Until the suite opens the device anew.
    pub dead: AtomicBool,
    /// What a fault remembers.
    pub memory: AtomicU64,
    /// Fds that it should not have kept.
    pub kept: Mutex<Vec<OwnedFd>>,
    connections: AtomicU64,
    /// The server's ends of the connections that are served.
    served: Mutex<Vec<(u64, UnixStream)>>,
    changed: Condvar,
    shutdown: ShutdownHandle,
    _folder: tempfile::TempDir,
}

/// A connection as a fault sees it.
pub struct Connection {
    pub server: Arc<Faulty>,
    pub number: u64,
    /// Messages before this one.
    pub messages: u32,
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.shutdown.shut_down();
    }
}

/// How long anything is waited for that has to come.
const LIMIT: Duration = Duration::from_secs(30);
/// Bodies above this are not received as one.
const BODY_MAX: usize = 64 << 20;

fn soon() -> Instant {
    Instant::now() + LIMIT
}

impl Faulty {
    /// Starts a server of this project, and a proxy in front of it.
    pub fn start(machine: Arc<Machine>, fault: Fault) -> Arc<Faulty> {
        let folder = tempfile::tempdir().unwrap();
        let upstream = folder.path().join("device");
        let server = Server::bind(&upstream, Arc::clone(&machine), server::Options::default()).unwrap();
        let shutdown = server.shutdown_handle();
        std::thread::spawn(move || server.serve());
        Arc::new(Faulty {
            fault,
            upstream,
            device: Loopback::new("behind the proxy", machine),
            dead: AtomicBool::new(false),
            memory: AtomicU64::new(0),
            kept: Mutex::default(),
            connections: AtomicU64::new(0),
            served: Mutex::default(),
            changed: Condvar::new(),
            shutdown,
            _folder: folder,
        })
    }

    fn served(&self) -> MutexGuard<'_, Vec<(u64, UnixStream)>> {
        self.served.lock().unwrap()
    }

    /// Connects through the proxy, once it has seen the end of the connections that have ended.
    pub fn dial(self: &Arc<Faulty>) -> io::Result<Box<dyn Wire>> {
        let gone = |served: &Vec<(u64, UnixStream)>| {
            served.iter().any(|(_, stream)| {
                let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
                poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
            })
        };
        let served = self.served();
        let (served, _) = self.changed.wait_timeout_while(served, LIMIT, |served| gone(served)).unwrap();
        let number = self.connections.fetch_add(1, SeqCst) + 1;
        if self.dead.load(SeqCst) || matches!(self.fault, Fault::Connections(last) if number > last) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if let (Fault::SecondEndsFirst, Some((_, first))) = (self.fault, served.first()) {
            first.shutdown(std::net::Shutdown::Both)?;
        }
        drop(served);
        let (ours, theirs) = UnixStream::pair()?;
        self.served().push((number, ours.try_clone()?));
        let connection = Connection { server: Arc::clone(self), number, messages: 0 };
        std::thread::spawn(move || connection.serve(ours));
        Ok(Box::new(SocketWire::new(theirs)?))
    }
}

/// Receives, and appends what came; `false` at the end.
fn receive(from: &mut SocketWire, into: &mut Vec<u8>, fds: &mut Vec<ForeignFd>) -> bool {
    let mut piece = vec![0; 64 << 10];
    match from.receive(&mut piece, fds, soon()) {
        Ok(got @ 1..) => into.extend_from_slice(&piece[..got]),
        _ => return false,
    }
    true
}

fn send(to: &mut SocketWire, message: &Passing) -> bool {
    let fds: Vec<BorrowedFd<'_>> = message.fds.iter().map(|fd| fd.as_fd()).collect();
    to.send(&message.bytes(), &fds, soon()).is_ok()
}

/// The next whole message. `None` at the end, and what was left is in the buffer.
fn next(from: &mut SocketWire, buffer: &mut Vec<u8>, fds: &mut Vec<ForeignFd>) -> Option<Passing> {
    loop {
        if let Ok((header, _)) = Header::read_from_prefix(buffer) {
            let body = (header.size as usize).saturating_sub(Header::BYTES);
            let body = if body > BODY_MAX { 0 } else { body };
            if buffer.len() >= Header::BYTES + body {
                let rest = buffer.split_off(Header::BYTES + body);
                let body = std::mem::replace(buffer, rest).split_off(Header::BYTES);
                return Some(Passing { header, body, fds: std::mem::take(fds) });
            }
        }
        if !receive(from, buffer, fds) {
            return None;
        }
    }
}

impl Connection {
    fn serve(mut self, client: UnixStream) {
        let mut client = SocketWire::new(client).unwrap();
        let upstream = UnixStream::connect(&self.server.upstream).unwrap();
        let mut upstream = SocketWire::new(upstream).unwrap();
        let mut rest = Vec::new();
        self.pass_on(&mut client, &mut upstream, &mut rest);
        let server = Arc::clone(&self.server);
        let dies = match server.fault {
            Fault::DiesOfHalves => !rest.is_empty(),
            Fault::DiesAfter(messages) => self.messages == messages,
            _ => false,
        };
        if !rest.is_empty() {
            let _ = upstream.send(&rest, &[], soon());
        }
        drop(upstream);
        match server.fault {
            Fault::ResetsWhenGone => server.device.reset().unwrap(),
            Fault::StopsWhenGone => {
                let _ = server.device.set_state(State::Stop);
            }
            _ => {}
        }
        server.dead.fetch_or(dies, SeqCst);
        server.served().retain(|(number, _)| *number != self.number);
        server.changed.notify_all();
    }

    fn pass_on(&mut self, client: &mut SocketWire, upstream: &mut SocketWire, rest: &mut Vec<u8>) {
        let fault = self.server.fault;
        let (mut fds, mut replies, mut reply_fds) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            let Some(mut message) = next(client, rest, &mut fds) else { return };
            let is_whole = match Header::read_from_prefix(rest) {
                Ok((header, _)) => rest.len() >= header.size as usize,
                Err(_) => rest.is_empty(),
            };
            if matches!(fault, Fault::WholeMessages) && !is_whole {
                return;
            }
            if matches!(fault, Fault::SingleMessages) && !rest.is_empty() {
                return;
            }
            if matches!(fault, Fault::DiesOfHalves) && message.header.size as usize > BODY_MAX {
                // What follows is no half of anything.
                rest.clear();
                return;
            }
            let todo = match fault {
                Fault::Ask(fault) => fault(&mut message, &*self),
                _ => Do::Pass,
            };
            self.messages += 1;
            let header = message.header;
            let sent = match todo {
                Do::Close => return,
                Do::Die => {
                    self.server.dead.store(true, SeqCst);
                    return;
                }
                Do::Ignore => true,
                Do::Refuse(errno) => client.send(header.refusal(errno).as_bytes(), &[], soon()).is_ok(),
                Do::Reply(body) => {
                    let header = header.reply(body.len()).unwrap();
                    send(client, &Passing { header, body, fds: Vec::new() })
                }
                Do::Pass => {
                    send(upstream, &message);
                    // Nothing is replied to a reply, and to what wants none.
                    if matches!(header.kind(), Ok(Kind::Posted | Kind::Reply | Kind::Refusal(_))) {
                        continue;
                    }
                    let Some(mut reply) = next(upstream, &mut replies, &mut reply_fds) else { return };
                    if let Fault::Answer(fault) = fault {
                        fault(&message, &mut reply);
                    }
                    send(client, &reply)
                }
            };
            if !sent {
                return;
            }
        }
    }
}
