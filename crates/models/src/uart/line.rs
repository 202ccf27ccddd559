//! The serial line: the other end of a port, and the thread that transfers bytes in both directions.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use limosa_foreign_fd::{ForeignFd, receive_bytes};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::Shared;
use super::port::FIFO_BYTES;

/// The other end of a port.
#[derive(Debug, Default)]
pub enum Line {
    /// Sends everything back. A full receiver delays it; nothing is lost.
    #[default]
    Echo,
    /// Two file descriptors, which may be the same file: a UNIX socket, a terminal, pipes. They are made non-blocking.
    /// A full receiver leaves bytes in `input`; the transmitter waits for `output`, and drops its bytes once `output`
    /// is closed.
    Fds {
        /// Where received bytes come from.
        input: OwnedFd,
        /// Where sent bytes go.
        output: OwnedFd,
    },
}

/// A line that has a thread. Closing its ends may block: a terminal has output to drain, a socket may hold fds that its
/// other end sent.
pub(super) struct Wire {
    input: ForeignFd,
    output: ForeignFd,
    wake: OwnedFd,
}

impl Wire {
    pub(super) fn new(input: OwnedFd, output: OwnedFd) -> std::io::Result<Wire> {
        for fd in [&input, &output] {
            fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
        }
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Wire { input: input.into(), output: output.into(), wake })
    }

    /// Tells the thread that there may be something to do.
    pub(super) fn wake(&self) {
        // It cannot be full: the thread empties it.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Carries bytes for a port until the device goes away.
    pub(super) fn run(&self, shared: &Arc<Shared>, port: usize) {
        let mut open = Open { input: true, output: true };
        loop {
            let (receives, sends) = {
                let chip = shared.chip();
                if chip.quit {
                    return;
                }
                let port = &chip.ports[port];
                (chip.running && port.room() > 0 && open.input, chip.running && !port.to_send.is_empty())
            };
            let ready = if sends && !open.output { Ready::default() } else { self.wait(receives, sends) };
            let mut chip = shared.chip();
            if chip.running {
                // Under the lock, and never waiting: once the device is stopped nothing is under way.
                let moved = open.receive(self.input.as_fd(), &mut chip.ports[port], ready.input)
                    | open.send(self.output.as_fd(), &mut chip.ports[port], ready.output);
                if moved {
                    shared.settle(&mut chip);
                }
            }
        }
    }

    fn wait(&self, receives: bool, sends: bool) -> Ready {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        if receives {
            fds.push(PollFd::new(&self.input, PollFlags::IN));
        }
        if sends {
            fds.push(PollFd::new(&self.output, PollFlags::OUT));
        }
        if poll(&mut fds, None).is_err() {
            return Ready::default();
        }
        let is_ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
        if is_ready(0) {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        Ready { input: receives && is_ready(1), output: sends && is_ready(1 + usize::from(receives)) }
    }
}

#[derive(Default)]
struct Ready {
    input: bool,
    output: bool,
}

/// Which ends are still there.
struct Open {
    input: bool,
    output: bool,
}

impl Open {
    fn receive(&mut self, fd: BorrowedFd<'_>, port: &mut super::port::Port, ready: bool) -> bool {
        let mut bytes = [0; FIFO_BYTES];
        let room = port.room().min(FIFO_BYTES);
        if !ready || room == 0 {
            return false;
        }
        // Fds that come over a socket must not be closed here, under the lock.
        let received = match receive_bytes(fd, &mut bytes[..room], RecvFlags::DONTWAIT) {
            Err(Errno::NOTSOCK) => rustix::io::read(fd, &mut bytes[..room]),
            received => received,
        };
        match received {
            Ok(0) => self.input = false,
            Ok(count) => {
                bytes[..count].iter().for_each(|byte| port.receive(*byte));
                return true;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => {
                tracing::warn!(%error, "the serial line's input is gone");
                self.input = false;
            }
        }
        false
    }

    fn send(&mut self, fd: BorrowedFd<'_>, port: &mut super::port::Port, ready: bool) -> bool {
        if port.to_send.is_empty() {
            return false;
        }
        let mut count = port.to_send.len();
        if self.output {
            if !ready {
                return false;
            }
            match rustix::io::write(fd, port.to_send.make_contiguous()) {
                Ok(written) => count = written,
                Err(Errno::AGAIN | Errno::INTR) => return false,
                Err(error) => {
                    tracing::warn!(%error, "the serial line's output is gone");
                    self.output = false;
                }
            }
        }
        for _ in 0..count {
            port.send();
        }
        count > 0
    }
}
