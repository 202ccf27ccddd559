//! What is done for a destination's device: what came is loaded, the device is brought to STOP, and driven on when the
//! move is committed.

use limosa_client::{Device, DeviceExt};
use limosa_clockwork::now;
use limosa_protocol::{MigrationFlags, State};

use super::device_queue::Item;
use super::receive::Receiving;
use crate::Result;
use crate::devices::{enter, failed};
use crate::report::Act;
use crate::wire::pulse;

impl Receiving<'_, '_> {
    /// Does what is to be done for a device, as long as there is something.
    pub(crate) fn attend(&self, at: usize) {
        let device = self.devices[at].device;
        loop {
            let mut queue = self.queues[at].lock();
            if queue.over {
                return;
            }
            if let Some(item) = queue.queue.pop_front() {
                drop(queue);
                match self.load(at, device, item) {
                    Ok(()) => continue,
                    Err(error) => return self.fail_from_thread(error),
                }
            }
            let Some(state) = queue.enter.take() else {
                queue.seen_to = false;
                return;
            };
            drop(queue);
            let entered = self.run_device(at, device, state);
            self.queues[at].lock().entered = Some(entered);
            self.queues[at].notify_all();
        }
    }

    fn run_device(&self, at: usize, device: &dyn Device, state: State) -> Result<()> {
        // One that is gone already never runs.
        device.state().map_err(|error| failed(device, "reading its state", error))?;
        self.queues[at].lock().asked = true;
        let _span = self.recorder.span(at, Act::Enter { state });
        enter(device, state).map(drop)
    }

    /// Whether a device was asked to run. One that was not stays in STOP, also when it can no longer be reached.
    pub(crate) fn was_asked(&self, at: usize) -> bool {
        self.queues[at].lock().asked
    }

    /// Drives loaded devices to the states that are wanted; an error when one refuses. All of them
    /// are waited for, whatever happens.
    pub(crate) fn enter(&self, wanted: impl Fn(usize) -> Option<State>) -> Result<()> {
        for (at, device) in self.queues.iter().enumerate() {
            let mut queue = device.lock();
            queue.enter = wanted(at);
            match queue.enter {
                None => queue.entered = Some(Ok(())),
                Some(_) => self.see_to(at, queue),
            }
        }
        let slice = pulse(self.options.silence_max);
        let mut entered = Ok(());
        for device in &self.queues {
            let mut queue = device.lock();
            entered = loop {
                if let Some(done) = queue.entered.take() {
                    break entered.and(done);
                }
                let timed_out;
                (queue, timed_out) = device.wait(queue, Some(now() + slice));
                if timed_out {
                    drop(queue);
                    // Nobody can call the move off any more.
                    let _ = self.writer.pulse(None);
                    queue = device.lock();
                }
            };
        }
        entered
    }

    /// What a device can do in migration.
    pub(crate) fn flags(&self, at: usize) -> MigrationFlags {
        self.flags[at]
    }

    /// Loads a piece of a device's data, or brings it to STOP at the end.
    fn load(&self, at: usize, device: &dyn Device, item: Item) -> Result<()> {
        let mut stream = self.streams[at].lock();
        let Item::Data(data) = item else {
            {
                let _span = self.recorder.span(at, Act::Enter { state: State::Stop });
                enter(device, State::Stop)?;
            }
            *stream = None;
            self.state.lock().loaded += 1;
            self.state.notify_all();
            return Ok(());
        };
        let (bytes, began) = (data.len() as u64, now());
        if let Some(stream) = &mut *stream {
            stream.write(&data).map_err(|error| failed(device, "loading its data", error))?;
        }
        drop(stream);
        self.recorder.device_span(at, Act::Load, began, bytes);
        self.recorder.device_data(at, bytes);
        let mut queue = self.queues[at].lock();
        queue.queued -= bytes;
        queue.taken += bytes;
        self.recorder.device_waits(at, queue.waiting());
        let told = self.due(&mut queue);
        self.queues[at].notify_all();
        drop(queue);
        self.tell(at, told)?;
        self.spare.lock().keep(data);
        Ok(())
    }
}
