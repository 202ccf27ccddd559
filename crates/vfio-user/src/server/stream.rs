//! A session's data over a separate socket instead of messages (`docs/vfio-user-extensions.md: DATA_FD`): a thread
//! moves it between the device and the socket.
//!
//! The thread waits for the client only between calls of the machine, so that a client that does not read its data, or
//! sends none, can still drive the device's states.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use limosa_device::{Machine, Save, SessionId};
use limosa_foreign_fd::{Foreign, receive_bytes};
use limosa_protocol::{Errno, State};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, Shutdown, send, shutdown};

use crate::connection::{errno_of, set_send_buffer};

/// Bytes moved at once: an amount that a socket accepts in one call.
const PIECE_BYTES: usize = 256 << 10;

/// A session's socket and its thread.
pub(super) struct DataSocket {
    session: SessionId,
    loads: bool,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    socket: Foreign<UnixStream>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    /// Counts the requests for progress.
    asked: u64,
    /// The number of requests at the thread's last read of the device.
    looked: u64,
    /// Whether it then found data.
    found: bool,
    /// It waits for space in the socket.
    held_up: bool,
    /// Why it is over: all moved, or the device's errno.
    over: Option<Result<(), Errno>>,
    /// It is to end.
    stop: bool,
}

impl DataSocket {
    /// Begins to move the session's data, and returns the client's end of the socket.
    pub(super) fn open(
        machine: &Arc<Machine>,
        session: SessionId,
    ) -> Result<(DataSocket, UnixStream), Errno> {
        let io = |error: std::io::Error| {
            error.raw_os_error().map_or(Errno::EIO, |number| Errno::from_raw(number.unsigned_abs()))
        };
        let (ours, theirs) = UnixStream::pair().map_err(io)?;
        for end in [&ours, &theirs] {
            set_send_buffer(end).map_err(errno_of)?;
        }
        let loads = machine.state() == State::Resuming;
        let ours = Foreign::new(ours);
        let shared = Arc::new(Shared { socket: ours, progress: Mutex::default(), changed: Condvar::new() });
        let thread = {
            let (machine, shared) = (Arc::clone(machine), Arc::clone(&shared));
            std::thread::Builder::new().name("vfio-user-data".into()).spawn(move || {
                let over =
                    if loads { shared.load(&machine, session) } else { shared.save(&machine, session) };
                tracing::debug!(?over, loads, "the session's socket is done");
                // A client that finds the socket ended may ask at once why.
                shared.lock().over = Some(over);
                shared.changed.notify_all();
                // Data in the socket can still be read.
                let _ = shutdown(&shared.socket, if loads { Shutdown::Both } else { Shutdown::Write });
            })
        }
        .map_err(io)?;
        Ok((DataSocket { session, loads, shared, thread: Some(thread) }, theirs))
    }

    pub(super) fn session(&self) -> SessionId {
        self.session
    }

    pub(super) fn loads(&self) -> bool {
        self.loads
    }

    /// The progress of a saving session: Ok if all data, for now or to the end, is in the socket; EAGAIN if not; or
    /// the error of the device.
    pub(super) fn saved(&self) -> Result<(), Errno> {
        let mut progress = self.shared.lock();
        // Only a read of the device after the request answers it: the client may have read earlier data before its
        // request.
        progress.asked += 1;
        let asked = progress.asked;
        self.shared.changed.notify_all();
        loop {
            match progress.over {
                Some(over) => return over,
                None if progress.looked >= asked => break,
                // A full socket has something for the client.
                None if progress.held_up && !self.shared.has_room() => return Err(Errno::EAGAIN),
                None => progress = self.shared.wait(progress),
            }
        }
        if progress.found { Err(Errno::EAGAIN) } else { Ok(()) }
    }

    /// Whether the device has refused the loaded data.
    pub(super) fn refused(&self) -> Result<(), Errno> {
        self.shared.lock().over.unwrap_or(Ok(()))
    }

    /// Waits until all data of the client is loaded: ETIMEDOUT if the client does not shut down its writing side.
    pub(super) fn loaded(&self, limit: Duration) -> Result<(), Errno> {
        let until = Instant::now() + limit;
        let mut progress = self.shared.lock();
        loop {
            if let Some(over) = progress.over {
                return over;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Errno::ETIMEDOUT);
            }
            progress =
                self.shared.changed.wait_timeout(progress, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The device's state has changed: there may be more to save.
    pub(super) fn look_again(&self) {
        self.shared.lock().asked += 1;
        self.shared.changed.notify_all();
    }
}

impl Drop for DataSocket {
    /// Closes the server's end.
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        let _ = shutdown(&self.shared.socket, Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, progress: MutexGuard<'a, Progress>) -> MutexGuard<'a, Progress> {
        self.changed.wait(progress).unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the device's data into the socket, to the end. ECANCELED if told to stop.
    fn save(&self, machine: &Machine, session: SessionId) -> Result<(), Errno> {
        enum Look {
            Data(Result<(), Errno>),
            Dry,
            End,
        }
        let mut rest = Vec::new();
        loop {
            // With enough space, a piece goes directly from the device's memory to the socket.
            self.wait_for_room()?;
            let asked = self.lock().asked;
            let look = machine.data_read(session, PIECE_BYTES, |save| match save {
                Save::Data(data) => {
                    Look::Data(self.send(data).map(|sent| rest.extend_from_slice(&data[sent..])))
                }
                Save::NothingForNow => Look::Dry,
                Save::End => Look::End,
            })?;
            match look {
                Look::Data(sent) => {
                    sent?;
                    self.looked(asked, true);
                    let mut at = 0;
                    while at < rest.len() {
                        self.wait_for_room()?;
                        at += self.send(&rest[at..])?;
                    }
                    rest.clear();
                }
                Look::Dry => {
                    self.looked(asked, false);
                    let mut progress = self.lock();
                    while progress.asked == asked && !progress.stop {
                        progress = self.wait(progress);
                    }
                }
                Look::End => return Ok(()),
            }
        }
    }

    fn looked(&self, asked: u64, found: bool) {
        let mut progress = self.lock();
        (progress.looked, progress.found) = (asked, found);
        self.changed.notify_all();
    }

    /// Moves data from the socket into the device, until the client shuts down its side.
    fn load(&self, machine: &Machine, session: SessionId) -> Result<(), Errno> {
        let mut spare = Vec::new();
        loop {
            self.poll(PollFlags::IN)?;
            let there = rustix::io::ioctl_fionread(&self.socket).map_err(errno_of)?;
            if there == 0 {
                // The end, or no data yet.
                let mut byte = [0];
                match receive_bytes(&self.socket, &mut byte, RecvFlags::DONTWAIT) {
                    Ok(0) => return if self.lock().stop { Err(Errno::ECANCELED) } else { Ok(()) },
                    Ok(_) => machine.data_write(session, &byte)?,
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                    Err(errno) => return Err(errno_of(errno)),
                }
                continue;
            }
            let bytes = PIECE_BYTES.min(there as usize);
            machine.data_fill(session, bytes, &mut spare, |into| self.receive(into))??;
        }
    }

    /// Receives available data. An out-of-band byte counts as available but is never received: EPROTO.
    fn receive(&self, into: &mut [u8]) -> Result<usize, Errno> {
        loop {
            match receive_bytes(&self.socket, into, RecvFlags::DONTWAIT) {
                Ok(0) => return Err(Errno::ECONNRESET),
                Ok(bytes) => return Ok(bytes),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Err(Errno::EPROTO),
                Err(errno) => return Err(errno_of(errno)),
            }
        }
    }

    /// Sends as much as there is space for.
    fn send(&self, data: &[u8]) -> Result<usize, Errno> {
        match send(&self.socket, data, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(sent) => Ok(sent),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(0),
            Err(errno) => Err(errno_of(errno)),
        }
    }

    fn has_room(&self) -> bool {
        let ready = poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&Timespec::default()));
        ready.is_ok_and(|ready| ready > 0)
    }

    fn wait_for_room(&self) -> Result<(), Errno> {
        if !self.has_room() {
            self.lock().held_up = true;
            self.changed.notify_all();
            self.poll(PollFlags::OUT)?;
            self.lock().held_up = false;
        }
        if self.lock().stop { Err(Errno::ECANCELED) } else { Ok(()) }
    }

    /// Waits for the client. Shutting the socket down ends it.
    fn poll(&self, events: PollFlags) -> Result<(), Errno> {
        loop {
            match poll(&mut [PollFd::new(&self.socket, events)], None) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return if self.lock().stop { Err(Errno::ECANCELED) } else { Ok(()) },
                Err(errno) => return Err(errno_of(errno)),
            }
        }
    }
}
