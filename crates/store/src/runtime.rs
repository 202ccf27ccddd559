//! The thread that runs the store's asynchronous client, and how other threads wait for its results.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use limosa_migrate::link::{LinkError, Wait};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use crate::connector::Traffic;

/// A thread with a runtime. Dropping it ends the thread and every task that runs there.
#[derive(Debug)]
pub(crate) struct Runtime {
    handle: Handle,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Runtime {
    pub(crate) fn start() -> std::io::Result<Runtime> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel();
        let thread = std::thread::Builder::new().name("object-store".into()).spawn(move || {
            // An error means that the sender was dropped, which ends the thread as well.
            let _ = runtime.block_on(ended);
        })?;
        Ok(Runtime { handle, end: Some(end), thread: Some(thread) })
    }

    /// Runs a task, and notifies when it is done.
    pub(crate) fn spawn(
        &self,
        wakeup: &Wakeup,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> AbortHandle {
        let wakeup = wakeup.clone();
        let task = async move {
            work.await;
            wakeup.notify();
        };
        self.handle.spawn(task).abort_handle()
    }

    /// Runs a task and waits for its result.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        traffic: &Traffic,
        wait: Wait<'_>,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, LinkError> {
        let wakeup = Wakeup::new()?;
        let (sender, receiver) = channel();
        let task = self.spawn(&wakeup, async move {
            // It fails if the caller no longer waits.
            let _ = sender.send(work.await);
        });
        let done = wakeup.wait_for(&receiver, traffic, wait);
        if done.is_err() {
            task.abort();
        }
        done
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An eventfd that wakes a thread which waits for the runtime.
#[derive(Clone, Debug)]
pub(crate) struct Wakeup(Arc<OwnedFd>);

impl Wakeup {
    pub(crate) fn new() -> Result<Wakeup, LinkError> {
        Ok(Wakeup(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub(crate) fn notify(&self) {
        // A write fails only if the counter is at its maximum, and then the fd is readable already.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Waits for the next value, and fails when no byte has moved for as long as the wait allows.
    pub(crate) fn wait_for<T>(
        &self,
        receiver: &Receiver<T>,
        traffic: &Traffic,
        wait: Wait<'_>,
    ) -> Result<T, LinkError> {
        self.wait_until(traffic, wait, || match receiver.try_recv() {
            Ok(value) => Some(Ok(value)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(LinkError::Closed)),
        })?
    }

    /// Waits until `look` returns something.
    pub(crate) fn wait_until<T>(
        &self,
        traffic: &Traffic,
        wait: Wait<'_>,
        mut look: impl FnMut() -> Option<T>,
    ) -> Result<T, LinkError> {
        let patience = wait.deadline.saturating_duration_since(Instant::now());
        let (mut deadline, mut seen) = (wait.deadline, traffic.bytes());
        loop {
            if let Some(found) = look() {
                return Ok(found);
            }
            if wait.cancel.is_some_and(limosa_migrate::Cancel::is_cancelled) {
                return Err(LinkError::Cancelled);
            }
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                let moved = traffic.bytes();
                if moved == seen || patience.is_zero() {
                    return Err(LinkError::TimedOut);
                }
                (seen, deadline) = (moved, now + patience);
                continue;
            }
            let mut fds = vec![PollFd::new(&*self.0, PollFlags::IN)];
            let cancel = wait.cancel.map(AsFd::as_fd);
            fds.extend(cancel.as_ref().map(|cancel| PollFd::new(cancel, PollFlags::IN)));
            let seconds = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
            let time = Timespec { tv_sec: seconds, tv_nsec: left.subsec_nanos().into() };
            // The loop looks again, whatever has ended the wait.
            let _ = poll(&mut fds, Some(&time));
            let _ = rustix::io::read(&*self.0, &mut [0; 8]);
        }
    }
}
