//! A destination's devices, each in a thread of its own: it loads what came, brings the device to STOP, and drives it on
//! when the move is committed.

use limosa_client::{DataStream, Device, DeviceExt};
use limosa_clockwork::now;
use limosa_protocol::{MigrationFlags, State};

use super::Receiving;
use super::inbox::Item;
use crate::Result;
use crate::channel::pulse;
use crate::devices::{enter, failed};
use crate::report::Act;

impl Receiving<'_, '_> {
    /// Loads a device until its data has ended and it is in STOP; then drives it to where it is told.
    pub(crate) fn drive(&self, at: usize, stream: Box<dyn DataStream>) {
        let device = self.devices[at].device;
        match self.load_device(at, device, stream) {
            Ok(true) => {
                self.state.lock().loaded += 1;
                self.state.notify_all();
                self.drive_on(at, device);
            }
            Ok(false) => {}
            Err(error) => self.fail_from_thread(error),
        }
    }

    fn drive_on(&self, at: usize, device: &dyn Device) {
        let mut inbox = self.inboxes[at].lock();
        while !inbox.over {
            match inbox.enter.take() {
                None => (inbox, _) = self.inboxes[at].wait(inbox, None),
                Some(state) => {
                    drop(inbox);
                    let entered = self.run_device(at, device, state);
                    inbox = self.inboxes[at].lock();
                    inbox.entered = Some(entered);
                    self.inboxes[at].notify_all();
                }
            }
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

    /// Drives loaded devices to the states that are wanted, each in its thread; an error when one refuses. All of them
    /// are waited for, whatever happens.
    pub(crate) fn enter(&self, wanted: impl Fn(usize) -> Option<State>) -> Result<()> {
        for (at, device) in self.inboxes.iter().enumerate() {
            let mut inbox = device.lock();
            inbox.enter = wanted(at);
            inbox.entered = inbox.enter.is_none().then_some(Ok(()));
            device.notify_all();
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

    /// Whether it came to the end.
    fn load_device(&self, at: usize, device: &dyn Device, mut stream: Box<dyn DataStream>) -> Result<bool> {
        loop {
            let item = {
                let mut inbox = self.inboxes[at].lock();
                loop {
                    if inbox.over {
                        return Ok(false);
                    }
                    if let Some(item) = inbox.queue.pop_front() {
                        break item;
                    }
                    (inbox, _) = self.inboxes[at].wait(inbox, None);
                }
            };
            let Item::Data(data) = item else { break };
            let (bytes, began) = (data.len() as u64, now());
            stream.write(&data).map_err(|error| failed(device, "loading its data", error))?;
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
        }
        let _span = self.recorder.span(at, Act::Enter { state: State::Stop });
        let entered = enter(device, State::Stop).map(|_| true);
        drop(stream);
        entered
    }
}
