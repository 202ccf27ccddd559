//! The data of a session over a separate socket (`docs/vfio-user-extensions.md: DATA_FD`).
//!
//! The socket carries only the data. A MIG_DATA_READ on the connection tells the meaning of an empty socket or its end:
//! nothing for now, the end, or that the server is still writing.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use limosa_client::{Chunk, DataStream, Error, Result};
use limosa_foreign_fd::{Foreign, receive_bytes};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::{Errno, State};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, SendFlags};
use zerocopy::IntoBytes;

use super::exchange::Failure;
use super::stream::Stream;
use crate::codec::{Command, MigData};
use crate::connection::{ConnectionError, wait_ready};

/// The stream of one session, over its own socket.
pub(super) struct SocketStream {
    /// The same session's messages.
    messages: Stream,
    socket: Arc<Foreign<UnixStream>>,
}

/// What is in the socket.
enum Found {
    Bytes(usize),
    Nothing,
    End,
}

impl SocketStream {
    pub fn new(messages: Stream, socket: Arc<Foreign<UnixStream>>) -> SocketStream {
        SocketStream { messages, socket }
    }

    fn receive(&self, request: &str, data: &mut [u8]) -> Result<Found> {
        loop {
            return match receive_bytes(&*self.socket, data, RecvFlags::DONTWAIT) {
                Ok(0) | Err(rustix::io::Errno::CONNRESET) => Ok(Found::End),
                Ok(bytes) => Ok(Found::Bytes(bytes)),
                Err(rustix::io::Errno::AGAIN) => Ok(Found::Nothing),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => Err(self.messages.shared.error(request, ConnectionError::from(error).into())),
            };
        }
    }

    /// Sleeps until the socket is ready.
    fn wait(&self, request: &str, flags: PollFlags) -> Result<()> {
        let shared = &self.messages.shared;
        let limit = shared.options.request_limit;
        let mut fds = [PollFd::new(&*self.socket, flags)];
        wait_ready(&mut fds, Instant::now() + limit).map_err(|error| match error {
            ConnectionError::TimedOut => shared.error(request, Failure::TimedOut(limit)),
            other => shared.error(request, other.into()),
        })
    }

    /// Asks the server whether all of its data, for now or to the end, is in the socket.
    fn all_is_written(&self, request: &str) -> Result<bool> {
        let shared = &self.messages.shared;
        let ask = MigData { argsz: MigData::BYTES as u32 + 1, size: 1 };
        let mut reply = MigData::default();
        let body: &[&[u8]] = &[ask.as_bytes()];
        match shared.call(request, Command::MIG_DATA_READ, body, &mut [reply.as_mut_bytes()]) {
            Ok(answer) if answer.body_bytes < MigData::BYTES || reply.size != 0 => {
                Err(shared.misbehaved(format!("{request} brought data that its session's socket should")))
            }
            Ok(_) => Ok(true),
            Err(error) if error.is_refused(Errno::EAGAIN) => Ok(false),
            Err(error) => Err(self.messages.or_ended(request, error)),
        }
    }
}

impl DataStream for SocketStream {
    fn read(&mut self, data: &mut [u8]) -> Result<Chunk> {
        let request = "MIG_DATA_READ";
        if data.is_empty() {
            return Err(self.messages.shared.usage(format!("{request} into an empty buffer")));
        }
        loop {
            let state = self.messages.state(request)?;
            if !state.is_saving() {
                return Err(self.messages.shared.refused(request, Errno::EBADF));
            }
            match self.receive(request, data)? {
                Found::Bytes(bytes) => return Ok(Chunk::Data(bytes)),
                // The server does not wait longer for the client than the client for the server.
                Found::Nothing if state == State::StopCopy => self.wait(request, PollFlags::IN)?,
                Found::Nothing => match self.all_is_written(request)? {
                    false => self.wait(request, PollFlags::IN)?,
                    true => {
                        return match self.receive(request, data)? {
                            Found::Bytes(bytes) => Ok(Chunk::Data(bytes)),
                            Found::Nothing => Ok(Chunk::NothingForNow),
                            Found::End => continue,
                        };
                    }
                },
                // The end counts only when the server, which may have died, confirms it.
                Found::End if state == State::StopCopy && self.all_is_written(request)? => {
                    return Ok(Chunk::End);
                }
                Found::End => {
                    // The device may have been stopped since the state was read.
                    if self.messages.state(request)? == state {
                        let shared = &self.messages.shared;
                        return Err(shared.misbehaved("it closed the session's socket before the end".into()));
                    }
                }
            }
        }
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        let request = "MIG_DATA_WRITE";
        let mut left = data;
        while !left.is_empty() {
            if self.messages.state(request)? != State::Resuming {
                return Err(self.messages.shared.refused(request, Errno::EBADF));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&*self.socket, left, flags) {
                Ok(bytes) => left = &left[bytes..],
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => self.wait(request, PollFlags::OUT)?,
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(self.why_closed(request));
                }
                Err(error) => {
                    return Err(self.messages.shared.error(request, ConnectionError::from(error).into()));
                }
            }
        }
        Ok(())
    }

    /// The device's estimate, plus the data that has left the device but not arrived here.
    fn precopy_info(&mut self) -> Result<PrecopyInfo> {
        let mut info = self.messages.precopy_info()?;
        let here = rustix::io::ioctl_fionread(&*self.socket).unwrap_or(0);
        match info.initial_bytes {
            0 => info.dirty_bytes = info.dirty_bytes.saturating_add(here),
            initial => info.initial_bytes = initial.saturating_add(here),
        }
        Ok(info)
    }

    fn transfer_bytes_max(&self) -> usize {
        self.messages.transfer_bytes_max()
    }
}

impl SocketStream {
    /// The server closed its end of a load: asks why.
    fn why_closed(&self, request: &str) -> Error {
        let shared = &self.messages.shared;
        let ask = MigData { argsz: MigData::BYTES as u32, size: 0 };
        match shared.call(request, Command::MIG_DATA_WRITE, &[ask.as_bytes()], &mut []) {
            Err(error) => self.messages.or_ended(request, error),
            Ok(_) => self.messages.or_ended(request, shared.refused(request, Errno::EPIPE)),
        }
    }
}
