//! A toy server and its client. The server counts requests: each answer carries the request's number and the next count, so
//! that an answer that is lost, doubled or given from an old state shows. The client sends its requests in pieces, so that
//! the server is often frozen with a part of one.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use limosa_foreign_fd::ForeignFd;
use limosa_host::SocketPath;
use limosa_switch_over::{Commit, Committed, Giver, Item, Refusal, Taker, Withdrawn};
use rustix::event::{PollFd, PollFlags};

const REQUEST_BYTES: usize = 8;

/// Kinds of items.
const DESCRIPTION: u16 = 1;
const CONNECTION: u16 = 2;
const LISTENER: u16 = 3;
const STATE: u16 = 4;

const VERSION: &[u8] = b"toy 1";

#[derive(Debug, Default)]
struct State {
    count: u64,
    partial: Vec<u8>,
    is_frozen: bool,
    has_ended: bool,
}

/// The socket that clients connect to.
#[derive(Debug)]
pub struct Place {
    pub path: SocketPath,
    pub listener: UnixListener,
}

/// Serves one client.
#[derive(Debug)]
pub struct Server {
    connection: UnixStream,
    place: Mutex<Option<Place>>,
    state: Mutex<State>,
    thawed: Condvar,
}

/// Calls this at named moments, for a process to be killed there.
pub type At = fn(&str);

impl Server {
    pub fn start(connection: UnixStream, place: Place) -> Arc<Server> {
        let server = Server::stopped(connection, State::default());
        *server.place.lock().unwrap() = Some(place);
        server.serve();
        server
    }

    fn stopped(connection: UnixStream, state: State) -> Arc<Server> {
        let place = Mutex::new(None);
        Arc::new(Server { connection, place, state: Mutex::new(state), thawed: Condvar::new() })
    }

    fn serve(self: &Arc<Server>) {
        let server = Arc::clone(self);
        thread::spawn(move || {
            while server.serve_some().is_ok() {}
            server.state.lock().unwrap().has_ended = true;
            server.thawed.notify_all();
        });
    }

    /// Waits until the client has gone.
    pub fn until_ended(&self) {
        drop(self.thawed.wait_while(self.state.lock().unwrap(), |state| !state.has_ended));
    }

    /// Waits for bytes without a lock, and reads and answers with it. So whoever has the lock has all that was read.
    fn serve_some(&self) -> io::Result<()> {
        rustix::event::poll(&mut [PollFd::new(&self.connection, PollFlags::IN)], None)?;
        let is_frozen = |state: &mut State| state.is_frozen && !state.has_ended;
        let mut state = self.thawed.wait_while(self.state.lock().unwrap(), is_frozen).unwrap();
        if state.has_ended {
            return Err(ErrorKind::Interrupted.into());
        }
        let mut bytes = [0; 5];
        let mut socket = &self.connection;
        let read = socket.read(&mut bytes)?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        state.partial.extend(&bytes[..read]);
        while let Some(request) = state.partial.first_chunk::<REQUEST_BYTES>() {
            let answer = [*request, state.count.to_le_bytes()].concat();
            state.partial.drain(..REQUEST_BYTES);
            state.count += 1;
            socket.write_all(&answer)?;
        }
        Ok(())
    }
}

/// Hands a server over.
pub struct ToyGiver {
    pub server: Arc<Server>,
    pub at: At,
}

impl Giver for ToyGiver {
    fn offer(&self) -> Result<Vec<Item>, Refusal> {
        (self.at)("in offer");
        Ok(vec![Item::new(DESCRIPTION, 0, VERSION.to_vec())])
    }

    fn prepare(&self) -> Result<Vec<Item>, Refusal> {
        (self.at)("in prepare");
        // The connection goes over while this server reads it: the new one does not read before it serves.
        let connection = OwnedFd::from(self.server.connection.try_clone().unwrap());
        let place = self.server.place.lock().unwrap();
        let place = place.as_ref().unwrap();
        let (device, inode) = place.path.identity();
        let identity = [device.to_le_bytes(), inode.to_le_bytes()].concat();
        let bytes = [&identity, place.path.path().as_os_str().as_encoded_bytes()].concat();
        let listener = OwnedFd::from(place.listener.try_clone().unwrap());
        Ok(vec![
            Item::new(CONNECTION, 0, Vec::new()).with_fds([connection]),
            Item::new(LISTENER, 0, bytes).with_fds([listener]),
        ])
    }

    fn freeze(&self, _until: Instant) -> Result<(), Refusal> {
        self.server.state.lock().unwrap().is_frozen = true;
        (self.at)("in freeze");
        Ok(())
    }

    fn rest(&self) -> Result<Vec<Item>, Refusal> {
        (self.at)("in rest");
        let state = self.server.state.lock().unwrap();
        Ok(vec![Item::new(STATE, 0, [&state.count.to_le_bytes()[..], &state.partial].concat())])
    }

    fn thaw(&self) {
        self.server.state.lock().unwrap().is_frozen = false;
        self.server.thawed.notify_all();
    }

    fn given(&self) {
        (self.at)("in given");
        self.server.place.lock().unwrap().take().unwrap().path.leave();
        self.server.state.lock().unwrap().has_ended = true;
        self.server.thawed.notify_all();
    }
}

/// Takes a server over.
pub struct ToyTaker {
    connection: Option<ForeignFd>,
    listener: Option<Item>,
    server: Option<Arc<Server>>,
    at: At,
}

impl ToyTaker {
    pub fn new(at: At) -> ToyTaker {
        ToyTaker { connection: None, listener: None, server: None, at }
    }
}

/// The item of this kind, which must be the only one.
fn only(items: Vec<Item>, kind: u16) -> Result<Item, Refusal> {
    let found = items.into_iter().next().filter(|item| item.kind == kind);
    found.ok_or_else(|| Refusal::of_device(0, format!("expected an item of kind {kind}")))
}

impl Taker for ToyTaker {
    type Server = Arc<Server>;

    fn check(&mut self, offer: Vec<Item>) -> Result<(), Refusal> {
        (self.at)("in check");
        match only(offer, DESCRIPTION)?.bytes == VERSION {
            true => Ok(()),
            false => Err(Refusal::of_device(0, "another version")),
        }
    }

    fn prepare(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        (self.at)("in prepare");
        let mut items = items.into_iter();
        self.connection = only(items.next().into_iter().collect(), CONNECTION)?.fds.pop();
        self.listener = Some(only(items.collect(), LISTENER)?);
        Ok(())
    }

    fn load(&mut self, items: Vec<Item>) -> Result<(), Refusal> {
        (self.at)("in load");
        let state = only(items, STATE)?.bytes;
        let (count, partial) =
            state.split_first_chunk().ok_or_else(|| Refusal::of_device(0, "the state is too short"))?;
        let connection = self.connection.take().map(ForeignFd::into_unix_stream);
        let Some(Ok(connection)) = connection else {
            return Err(Refusal::of_device(0, "expected a socket"));
        };
        let state =
            State { count: u64::from_le_bytes(*count), partial: partial.to_vec(), ..State::default() };
        self.server = Some(Server::stopped(connection.into_inner(), state));
        Ok(())
    }

    fn run(self, commit: Commit<'_>) -> Result<(Committed, Arc<Server>), Withdrawn> {
        (self.at)("before commit");
        let committed = commit.commit()?;
        let server = self.server.expect("loaded");
        *server.place.lock().unwrap() = Some(adopted(self.listener.expect("prepared")));
        server.serve();
        Ok((committed, server))
    }
}

/// The place that clients connect to, in its new process.
fn adopted(mut item: Item) -> Place {
    let (device, rest) = item.bytes.split_first_chunk().unwrap();
    let (inode, path) = rest.split_first_chunk().unwrap();
    let identity = (u64::from_le_bytes(*device), u64::from_le_bytes(*inode));
    let path = Path::new(std::str::from_utf8(path).unwrap());
    let listener = UnixListener::from(item.fds.pop().unwrap().into_inner());
    Place { path: SocketPath::adopt(path, identity, &listener).unwrap(), listener }
}

/// Asks, and checks each answer.
#[derive(Debug)]
pub struct Client {
    connection: UnixStream,
    next: u64,
}

impl Client {
    pub fn new(connection: UnixStream) -> Client {
        // Nobody serves, although somebody has the connection: an error rather than a test that hangs.
        connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Client { connection, next: 0 }
    }

    /// Asks some questions at once. `false` when the connection has ended.
    pub fn ask(&mut self, count: u64) -> bool {
        let id = |n: u64| n ^ 0x5555_aaaa_1234_5678;
        let questions: Vec<_> = (self.next..self.next + count).flat_map(|n| id(n).to_le_bytes()).collect();
        for piece in questions.chunks(11) {
            if self.connection.write_all(piece).is_err() {
                return false;
            }
        }
        for n in self.next..self.next + count {
            let mut answer = [0; 16];
            match self.connection.read_exact(&mut answer) {
                Ok(()) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) =>
                {
                    return false;
                }
                Err(error) => panic!("nobody answers: {error}"),
            }
            let (question, counted) = answer.split_first_chunk().unwrap();
            assert_eq!(u64::from_le_bytes(*question), id(n), "an answer was lost or doubled");
            assert_eq!(counted, n.to_le_bytes(), "another state answers");
        }
        self.next += count;
        true
    }

    /// Asks until told to stop, or the connection ends.
    pub fn ask_until(mut self, stop: &AtomicBool) -> Client {
        while !stop.load(SeqCst) && self.ask(8) {}
        self
    }
}
