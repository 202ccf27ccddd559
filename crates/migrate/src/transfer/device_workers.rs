//! Threads that devices' work is done in: as many as there are devices, so that one that is slow holds up no other, of
//! which only as many wake as find something to do, so that for quick ones nobody waits for threads to wake.

use std::collections::VecDeque;

use limosa_clockwork::Monitor;

/// Which devices have something to do, and the threads that wait for them.
pub(crate) struct DeviceWorkers {
    state: Monitor<State>,
    /// A bell for each thread; whether it has been rung.
    bells: Vec<Monitor<bool>>,
    /// With so many threads at the links more would only wait there.
    sending_max: usize,
}

#[derive(Default)]
struct State {
    ready: VecDeque<usize>,
    /// The threads that wait. Who came last goes first: what it needs is in a cache.
    idle: Vec<usize>,
    /// A thread has been woken and has not looked yet. It wakes the next one when there is more than it takes itself.
    wakes: bool,
    /// Threads that wait for a link, or send.
    sending: usize,
    over: bool,
}

impl State {
    /// The thread that is to be woken now.
    fn next(&mut self, sending_max: usize) -> Option<usize> {
        let wanted = !self.wakes && !self.ready.is_empty() && self.sending < sending_max;
        let next = if wanted { self.idle.pop() } else { None };
        self.wakes |= next.is_some();
        next
    }
}

impl DeviceWorkers {
    pub(crate) fn new(threads: usize, sending_max: usize) -> DeviceWorkers {
        let bells = (0..threads).map(|_| Monitor::default()).collect();
        DeviceWorkers { state: Monitor::default(), bells, sending_max }
    }

    /// There is something to do for a device. Not to be said again before a thread has begun with it.
    pub(crate) fn post(&self, device: usize) {
        let mut state = self.state.lock();
        state.ready.push_back(device);
        let next = state.next(self.sending_max);
        drop(state);
        self.wake(next);
    }

    /// Sends something in one of the threads.
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

    /// Does what is to be done, in the thread with this number, until the work is over.
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
            if state.idle.len() == self.bells.len() {
                self.state.notify_all();
            }
            drop(state);
            let bell = &self.bells[thread];
            let mut rung = bell.lock();
            while !std::mem::take(&mut *rung) {
                (rung, _) = bell.wait(rung, None);
            }
            drop(rung);
            state = self.state.lock();
            state.wakes = false;
        }
    }

    /// Waits until all threads wait for something to do: from then on none of them has to come up first.
    pub(crate) fn assemble(&self) {
        let mut state = self.state.lock();
        while state.idle.len() < self.bells.len() && !state.over {
            (state, _) = self.state.wait(state, None);
        }
    }

    /// Nothing more is begun.
    pub(crate) fn end(&self) {
        self.state.lock().over = true;
        self.state.notify_all();
        (0..self.bells.len()).for_each(|thread| self.wake(Some(thread)));
    }

    fn wake(&self, thread: Option<usize>) {
        if let Some(thread) = thread {
            *self.bells[thread].lock() = true;
            self.bells[thread].notify_all();
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
