//! Threads that work on devices in parallel. They are started before any device stops, so that a failure to start
//! threads interrupts no client.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tracing::Dispatch;

/// The most threads. More devices than these wait for one another.
const THREADS_MAX: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that wait for work, and end with this.
#[derive(Debug, Default)]
pub(super) struct Workers {
    jobs: Option<Sender<Job>>,
}

/// The progress of a piece of work.
struct Work<T> {
    done: Mutex<Done<T>>,
    changed: Condvar,
}

struct Done<T> {
    things: Vec<Option<T>>,
    left: usize,
    /// The caller no longer waits.
    closed: bool,
}

impl<T> Work<T> {
    fn lock(&self) -> MutexGuard<'_, Done<T>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Workers {
    /// For this many devices of the old server. One is worked on by the caller, whom it alone can hold up: the new server gives up
    /// then.
    pub(super) fn of_old(devices: usize) -> Workers {
        if devices < 2 { Workers::default() } else { Workers::start(devices) }
    }

    /// For this many devices. If no thread can be started, the caller works on all of them.
    pub(super) fn start(devices: usize) -> Workers {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        // The subscriber may be one of the caller's thread alone.
        let subscriber = tracing::dispatcher::get_default(Dispatch::clone);
        let started = (0..devices.min(THREADS_MAX)).filter(|_| {
            let (queue, subscriber) = (Arc::clone(&queue), subscriber.clone());
            let run = move || {
                loop {
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { return };
                    job();
                }
            };
            let work = move || tracing::dispatcher::with_default(&subscriber, run);
            std::thread::Builder::new().name("switch-over".into()).spawn(work).is_ok()
        });
        let started = started.count();
        tracing::trace!(started, devices, "threads that work on devices");
        Workers { jobs: (started > 0).then_some(jobs) }
    }

    /// Does `work` on each of these, and returns them in their order. One whose work is not done by `until` goes to `late` when it
    /// is, on its thread, and is missing here. Work that panicked counts as done.
    pub(super) fn work<T: Send + 'static>(
        &self,
        things: Vec<T>,
        until: Instant,
        work: impl Fn(&mut T) + Send + Sync + 'static,
        late: fn(T),
    ) -> Vec<Option<T>> {
        let Some(jobs) = &self.jobs else {
            return things
                .into_iter()
                .map(|mut thing| {
                    work(&mut thing);
                    Some(thing)
                })
                .collect();
        };
        let count = things.len();
        let done = Done { things: (0..count).map(|_| None).collect(), left: count, closed: false };
        let state = Arc::new(Work { done: Mutex::new(done), changed: Condvar::new() });
        let work = Arc::new(work);
        for (at, mut thing) in things.into_iter().enumerate() {
            let (state, work) = (Arc::clone(&state), Arc::clone(&work));
            let job: Job = Box::new(move || {
                if !state.lock().closed && catch_unwind(AssertUnwindSafe(|| work(&mut thing))).is_err() {
                    tracing::error!("a device's thread panicked in a switch-over");
                }
                let mut done = state.lock();
                if done.closed {
                    drop(done);
                    return late(thing);
                }
                done.things[at] = Some(thing);
                done.left -= 1;
                state.changed.notify_all();
            });
            // The threads live as long as this.
            if let Err(job) = jobs.send(job) {
                (job.0)();
            }
        }
        let mut done = state.lock();
        while done.left > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            done = state.changed.wait_timeout(done, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        done.closed = true;
        std::mem::take(&mut done.things)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn work_is_done_side_by_side_and_comes_back_in_its_order() {
        let workers = Workers::start(THREADS_MAX);
        let barrier = Arc::new(Barrier::new(THREADS_MAX));
        for _ in 0..3 {
            let barrier = Arc::clone(&barrier);
            let things = (0..THREADS_MAX).collect();
            let work = move |thing: &mut usize| {
                barrier.wait();
                *thing *= 2;
            };
            let done = workers.work(things, far(), work, |_| panic!("none is late"));
            assert_eq!(done, (0..THREADS_MAX).map(|thing| Some(2 * thing)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn work_that_is_late_or_has_not_begun_is_left_to_its_thread() {
        static LATE: AtomicUsize = AtomicUsize::new(0);
        let workers = Workers::start(2);
        let hangs = Arc::new((Mutex::new(true), Condvar::new()));
        let waits = Arc::clone(&hangs);
        let work = move |thing: &mut u32| {
            // Both threads hang in one, so that the third does not begin.
            if *thing < 2 {
                drop(waits.1.wait_while(waits.0.lock().unwrap(), |hangs| *hangs));
            }
        };
        let until = Instant::now() + Duration::from_millis(10);
        let late = |_| {
            LATE.fetch_add(1, Ordering::SeqCst);
        };
        assert_eq!(workers.work(vec![0, 1, 2], until, work, late), [None, None, None]);
        *hangs.0.lock().unwrap() = false;
        hangs.1.notify_all();
        // The threads have ended what is late once both do something else.
        let barrier = Barrier::new(2);
        workers.work(vec![(), ()], far(), move |()| _ = barrier.wait(), |()| {});
        assert_eq!(LATE.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn work_that_panics_is_done_and_its_thread_goes_on() {
        for workers in [Workers::start(2), Workers::start(5)] {
            for _ in 0..3 {
                let work = |thing: &mut u32| assert_ne!(std::mem::replace(thing, 9), 1, "as expected");
                assert_eq!(workers.work(vec![1, 2], far(), work, |_| {}), [Some(9), Some(9)]);
            }
        }
    }

    #[test]
    fn the_only_device_of_the_old_server_is_worked_on_by_the_caller() {
        let this = std::thread::current().id();
        let work = move |_: &mut u32| assert_eq!(std::thread::current().id(), this);
        assert_eq!(Workers::of_old(1).work(vec![7], Instant::now(), work, |_| {}), [Some(7)]);
    }
}
