//! [`DeviceWorkers`]: threads for the jobs of devices, as many as there are devices, so that a slow device blocks no other.
//! Only as many wake as find a job, so that fast devices do not wait for threads to wake.

use std::collections::VecDeque;

use limosa_clockwork::Monitor;

/// The devices that have jobs, and the threads that wait for jobs.
pub(crate) struct DeviceWorkers {
    state: Monitor<State>,
    /// For each thread, whether it has been woken.
    wakeups: Vec<Monitor<bool>>,
    /// While this many threads send, another one would only wait for a link.
    sending_max: usize,
}

#[derive(Default)]
struct State {
    ready: VecDeque<usize>,
    /// The threads that wait. The last one is woken first, since its data is still in a cache.
    idle: Vec<usize>,
    /// A thread has been woken and has not looked for a job yet. It wakes the next one if it finds more than one job.
    is_waking: bool,
    /// The number of threads that send or wait for a link.
    sending: usize,
    over: bool,
}

impl State {
    /// The thread to wake now.
    fn next(&mut self, sending_max: usize) -> Option<usize> {
        let wanted = !self.is_waking && !self.ready.is_empty() && self.sending < sending_max;
        let next = if wanted { self.idle.pop() } else { None };
        self.is_waking |= next.is_some();
        next
    }
}

impl DeviceWorkers {
    pub(crate) fn new(threads: usize, sending_max: usize) -> DeviceWorkers {
        let wakeups = (0..threads).map(|_| Monitor::default()).collect();
        DeviceWorkers { state: Monitor::default(), wakeups, sending_max }
    }

    /// Posts a job of a device: one thread calls `act` with the device, once for each post.
    pub(crate) fn post(&self, device: usize) {
        self.post_all(std::iter::once(device));
    }

    /// Posts a job of each of these devices. One thread is woken for all of them, and wakes others while there are jobs.
    pub(crate) fn post_all(&self, devices: impl Iterator<Item = usize>) {
        let mut state = self.state.lock();
        state.ready.extend(devices);
        let next = state.next(self.sending_max);
        drop(state);
        self.wake(next);
    }

    /// Calls a function that sends, from one of the threads.
    pub(crate) fn send<T>(&self, send: impl FnOnce() -> T) -> T {
        self.state.lock().sending += 1;
        let sent = send();
        let mut state = self.state.lock();
        state.sending -= 1;
        let next = state.next(self.sending_max);
        drop(state);
        self.wake(next);
        sent
    }

    /// The body of the thread with this number. Returns after [`DeviceWorkers::end`].
    pub(crate) fn work(&self, thread: usize, act: impl Fn(usize)) {
        let mut state = self.state.lock();
        while !state.over {
            if let Some(device) = state.ready.pop_front() {
                let next = state.next(self.sending_max);
                drop(state);
                self.wake(next);
                act(device);
                state = self.state.lock();
                continue;
            }
            state.idle.push(thread);
            if state.idle.len() == self.wakeups.len() {
                self.state.notify_all();
            }
            drop(state);
            let wakeup = &self.wakeups[thread];
            let mut woken = wakeup.lock();
            while !std::mem::take(&mut *woken) {
                (woken, _) = wakeup.wait(woken, None);
            }
            drop(woken);
            state = self.state.lock();
            state.is_waking = false;
        }
    }

    /// Waits until all threads wait for jobs, so that no job has to wait for a thread to start.
    pub(crate) fn assemble(&self) {
        let mut state = self.state.lock();
        while state.idle.len() < self.wakeups.len() && !state.over {
            (state, _) = self.state.wait(state, None);
        }
    }

    /// Ends the threads. Posted jobs that have not begun are dropped.
    pub(crate) fn end(&self) {
        self.state.lock().over = true;
        self.state.notify_all();
        (0..self.wakeups.len()).for_each(|thread| self.wake(Some(thread)));
    }

    fn wake(&self, thread: Option<usize>) {
        if let Some(thread) = thread {
            *self.wakeups[thread].lock() = true;
            self.wakeups[thread].notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_threads(count: usize, act: impl Fn(usize) + Sync, then: impl FnOnce(&DeviceWorkers)) {
        let workers = DeviceWorkers::new(count, 1);
        limosa_clockwork::scope(|scope| {
            for thread in 0..count {
                let (workers, act) = (&workers, &act);
                scope.spawn(format!("worker {thread}"), move || workers.work(thread, act));
            }
            workers.assemble();
            then(&workers);
            workers.end();
        });
    }

    #[test]
    fn all_that_is_posted_is_done_also_when_each_waits_for_all_others() {
        let begun = Monitor::new(0);
        let done = Monitor::new(0);
        let act = |_| {
            let mut count = begun.lock();
            *count += 1;
            begun.notify_all();
            while *count < 5 {
                (count, _) = begun.wait(count, None);
            }
            *done.lock() += 1;
            done.notify_all();
        };
        with_threads(5, act, |workers| {
            (0..5).for_each(|device| workers.post(device));
            let mut count = done.lock();
            while *count < 5 {
                (count, _) = done.wait(count, None);
            }
        });
    }

    #[test]
    fn what_is_posted_again_and_again_is_done_as_often() {
        let done = Monitor::new([0; 3]);
        let act = |device: usize| {
            done.lock()[device] += 1;
            done.notify_all();
        };
        with_threads(3, act, |workers| {
            for round in 1..200 {
                (0..3).for_each(|device| workers.post(device));
                let mut counts = done.lock();
                while *counts != [round; 3] {
                    (counts, _) = done.wait(counts, None);
                }
            }
        });
    }
}
