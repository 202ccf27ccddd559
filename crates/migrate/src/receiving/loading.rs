//! What is done for a destination's device: what came is loaded, the device is brought to STOP, and driven on when the
//! move is committed.

use limosa_client::{Device, DeviceExt};
use limosa_clockwork::now;
use limosa_protocol::{MigrationFlags, State};

use super::Receiving;
use super::inbox::Item;
use crate::Result;
use crate::channel::pulse;
use crate::devices::{enter, failed};
use crate::report::Act;

impl Receiving<'_, '_> {
    /// Does what is to be done for a device, as long as there is something.
    pub(crate) fn attend(&self, at: usize) {
        let device = self.devices[at].device;
        loop {
            let mut inbox = self.inboxes[at].lock();
            if inbox.over {
                return;
            }
            if let Some(item) = inbox.queue.pop_front() {
                drop(inbox);
                match self.load(at, device, item) {
                    Ok(()) => continue,
                    Err(error) => return self.fail_from_thread(error),
                }
            }
            let Some(state) = inbox.enter.take() else {
                inbox.seen_to = false;
                return;
            };
            drop(inbox);
            let entered = self.run_device(at, device, state);
            self.inboxes[at].lock().entered = Some(entered);
            self.inboxes[at].notify_all();
        }
    }

    fn run_device(&self, at: usize, device: &dyn Device, state: State) -> Result<()> {
        // One that is gone already never runs.
        device.state().map_err(|error| failed(device, "reading its state", error))?;
        self.inboxes[at].lock().asked = true;
        let _span = self.recorder.span(at, Act::Enter { state });
        enter(device, state).map(drop)
    }

    /// Whether a device was asked to run. One that was not stays in STOP, also when it can no longer be reached.
    pub(crate) fn was_asked(&self, at: usize) -> bool {
        self.inboxes[at].lock().asked
    }

    /// Drives loaded devices to the states that are wanted; an error when one refuses. All of them
    /// are waited for, whatever happens.
    pub(crate) fn enter(&self, wanted: impl Fn(usize) -> Option<State>) -> Result<()> {
        for (at, device) in self.inboxes.iter().enumerate() {
            let mut inbox = device.lock();
            inbox.enter = wanted(at);
            match inbox.enter {
                None => inbox.entered = Some(Ok(())),
                Some(_) => self.see_to(at, inbox),
            }
        }
        let slice = pulse(self.options.silence_max);
        let mut entered = Ok(());
        for device in &self.inboxes {
            let mut inbox = device.lock();
            entered = loop {
                if let Some(done) = inbox.entered.take() {
                    break entered.and(done);
                }
                let timed_out;
                (inbox, timed_out) = device.wait(inbox, Some(now() + slice));
                if timed_out {
                    drop(inbox);
                    // Nobody can call the move off any more.
                    let _ = self.outlet.pulse(None);
                    inbox = device.lock();
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
        let mut inbox = self.inboxes[at].lock();
        inbox.queued -= bytes;
        inbox.taken += bytes;
        self.recorder.device_waits(at, inbox.waiting());
        let told = self.due(&mut inbox);
        self.inboxes[at].notify_all();
        drop(inbox);
        self.tell(at, told)?;
        self.spare.lock().keep(data);
        Ok(())
    }
}
