//! [`ForeignEventFd`]: an eventfd that a peer has too, signalled without ever waiting for that peer.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Release};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{ReadWriteFlags, preadv2};

use crate::ForeignFd;
use crate::aio::Aio;

/// An eventfd of a peer. The peer may fill its counter and make it blocking at any time; [`ForeignEventFd::signal`]
/// still never waits.
///
/// Signalled through the kernel's asynchronous I/O, it costs about 0.8 us where a plain write costs 0.3, and less than
/// the wake-up of a thread. On a system without it, one thread of the process writes all signals in order. There a peer
/// can delay the signals of others, but not the signalling threads.
///
/// Clones refer to the same eventfd.
#[derive(Clone, Debug)]
pub struct ForeignEventFd(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    fd: OwnedFd,
    /// It waits for the writing thread.
    queued: AtomicBool,
}

/// The process's way to signal.
static AIO: LazyLock<Option<Aio>> = LazyLock::new(|| {
    let aio = Aio::new();
    if aio.is_none() {
        tracing::info!("no asynchronous I/O in this system: eventfds of peers are signalled by a thread");
    }
    aio
});

impl ForeignEventFd {
    /// `Err` with the fd for any file that is no eventfd.
    pub fn new(fd: ForeignFd) -> Result<ForeignEventFd, ForeignFd> {
        let fd = fd.into_eventfd()?;
        Ok(ForeignEventFd(Arc::new(Shared { fd, queued: AtomicBool::new(false) })))
    }

    /// Tells it from others that exist at the same time.
    pub fn id(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    /// Adds 1 to the counter. A counter without room is signalled already, and left as it is.
    pub fn signal(&self) {
        match &*AIO {
            Some(aio) => {
                if let Err(error) = aio.signal(self.0.fd.as_fd()) {
                    tracing::debug!(%error, "eventfd not signalled");
                }
            }
            None => self.signal_by_thread(&WRITER),
        }
    }

    fn signal_by_thread(&self, writer: &Writer) {
        writer.make_room();
        if !self.0.queued.swap(true, AcqRel) {
            writer.send(Arc::clone(&self.0));
        }
    }
}

impl AsFd for ForeignEventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

/// The thread that writes where the kernel cannot signal. Its queue has each eventfd once at the most.
static WRITER: LazyLock<Writer> = LazyLock::new(Writer::start);

struct Writer {
    queue: Mutex<Sender<Arc<Shared>>>,
    /// What it is writing to.
    writes_to: Arc<Mutex<Option<Arc<Shared>>>>,
}

impl Writer {
    fn start() -> Writer {
        let (queue, next) = channel::<Arc<Shared>>();
        let writes_to = Arc::new(Mutex::new(None));
        let now = Arc::clone(&writes_to);
        let run = move || {
            for event in next {
                event.queued.store(false, Release);
                *lock(&now) = Some(Arc::clone(&event));
                let _ = rustix::io::write(&event.fd, &1_u64.to_ne_bytes());
                *lock(&now) = None;
            }
        };
        if let Err(error) = std::thread::Builder::new().name("limosa: signals".into()).spawn(run) {
            tracing::error!(%error, "cannot start a thread to signal eventfds: interrupts are lost");
        }
        Writer { queue: Mutex::new(queue), writes_to }
    }

    fn send(&self, event: Arc<Shared>) {
        // Fails when there is no thread, which was reported.
        let _ = lock(&self.queue).send(event);
    }

    /// Frees the thread from a peer's full counter.
    fn make_room(&self) {
        let held_up = lock(&self.writes_to).clone();
        if let Some(event) = held_up.filter(|event| event.take_if_full()) {
            // The peer was signalled, and is again.
            self.send(event);
        }
    }
}

impl Shared {
    /// Makes room in a full counter, whatever the descriptor's flag is. Whether there was something to take.
    fn take_if_full(&self) -> bool {
        let at_once = Timespec::default();
        let has_room = poll(&mut [PollFd::new(&self.fd, PollFlags::OUT)], Some(&at_once));
        let mut count = [0; 8];
        let into = &mut [IoSliceMut::new(&mut count)];
        // It has no position, for which all ones stand.
        matches!(has_room, Ok(0)) && preadv2(&self.fd, into, u64::MAX, ReadWriteFlags::NOWAIT).is_ok()
    }
}

fn lock<T>(guarded: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    guarded.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{OFlags, fcntl_setfl};

    use super::*;

    /// An eventfd that became blocking, with a counter that became full, after it was looked at.
    fn hostile() -> (OwnedFd, ForeignEventFd) {
        let theirs = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let ours = ForeignEventFd::new(theirs.try_clone().unwrap().into()).unwrap();
        fcntl_setfl(&theirs, OFlags::empty()).unwrap();
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        (theirs, ours)
    }

    fn count(fd: &OwnedFd) -> Option<u64> {
        let mut count = [0; 8];
        let into = &mut [IoSliceMut::new(&mut count)];
        preadv2(fd, into, u64::MAX, ReadWriteFlags::NOWAIT).ok().map(|_| u64::from_ne_bytes(count))
    }

    fn in_time(act: impl FnOnce() + Send + 'static) {
        let (done, waits) = channel();
        std::thread::spawn(move || {
            act();
            done.send(())
        });
        waits.recv_timeout(Duration::from_secs(60)).expect("the signal hangs");
    }

    #[test]
    fn a_peer_that_makes_a_full_eventfd_blocking_holds_up_nobody() {
        let (theirs, ours) = hostile();
        in_time(move || (0..1000).for_each(|_| ours.signal()));
        assert!(count(&theirs).is_some(), "it is signalled");
    }

    #[test]
    fn signals_of_many_threads_are_all_counted() {
        let theirs = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let ours = ForeignEventFd::new(theirs.try_clone().unwrap().into()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..2000).for_each(|_| ours.signal()));
            }
        });
        match &*AIO {
            Some(_) => assert_eq!(count(&theirs), Some(8000)),
            None => assert!(count(&theirs).is_some()),
        }
    }

    #[test]
    fn without_the_kernels_help_a_peer_does_not_keep_the_thread() {
        let writer = Writer::start();
        let (hostile_fd, hostile) = hostile();
        let (good_fd, good) = {
            let theirs = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            let ours = ForeignEventFd::new(theirs.try_clone().unwrap().into()).unwrap();
            (theirs, ours)
        };
        hostile.signal_by_thread(&writer);
        let began = Instant::now();
        // The thread may not wait yet when the next signal makes room: a device signals again.
        while count(&good_fd).is_none() {
            assert!(began.elapsed() < Duration::from_secs(60), "the thread waits for a peer");
            good.signal_by_thread(&writer);
            std::thread::yield_now();
        }
        drop(hostile_fd);
    }

    #[test]
    fn only_eventfds_are_signalled() {
        let (_reader, pipe) = rustix::pipe::pipe().unwrap();
        assert!(ForeignEventFd::new(pipe.into()).is_err());
    }
}
