//! Requests by signals: that the server ends, or that it starts a new process in its place.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use anyhow::Context;
use limosa_vfio_user::server::ShutdownHandle;
use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use rustix::io::Errno;

use crate::signals;

/// The requests that have come so far. [`Requests::replace`] outlasts a switch-over that is under way; several count once.
pub struct Requests {
    pub stop: ShutdownHandle,
    replace: Arc<OwnedFd>,
    /// Readable when one of both is.
    any: OwnedFd,
}

impl Requests {
    /// Of nobody yet. SIGUSR2 asks for a new process if this server `can_be_replaced`.
    pub fn new(can_be_replaced: bool) -> anyhow::Result<Requests> {
        let requests = Requests::without_signals().context("cannot make an eventfd")?;
        let replace = Arc::clone(&requests.replace);
        signals::at_usr2(move || match can_be_replaced {
            // Fails only when the counter is full, that is, signalled.
            true => _ = rustix::io::write(&replace, &1_u64.to_ne_bytes()),
            false => {
                tracing::warn!("SIGUSR2: this server is not replaced, as it was started without --takeover")
            }
        })?;
        Ok(requests)
    }

    fn without_signals() -> io::Result<Requests> {
        let stop = ShutdownHandle::new()?;
        let replace = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let any = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [stop.as_fd(), replace.as_fd()] {
            epoll::add(&any, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Requests { stop, replace, any })
    }

    /// Whether a new process was asked for since the last call.
    pub fn replace(&self) -> bool {
        rustix::io::read(&self.replace, &mut [0; 8]).is_ok()
    }

    /// Waits for a request.
    pub fn wait(&self) {
        while matches!(poll(&mut [PollFd::new(&self.any, PollFlags::IN)], None), Err(Errno::INTR)) {}
    }
}

impl AsFd for Requests {
    /// Readable when there is a request.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.any.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_for_a_new_process_count_once_and_a_stop_stays() {
        let requests = Requests::without_signals().unwrap();
        assert!(!requests.replace());
        for _ in 0..2 {
            rustix::io::write(&requests.replace, &1_u64.to_ne_bytes()).unwrap();
        }
        requests.wait();
        assert!(requests.replace() && !requests.replace());
        requests.stop.shut_down();
        requests.wait();
        assert!(!requests.replace() && requests.stop.is_shut_down());
    }
}
