//! [`DeviceLoader`]: one device of a destination. It loads the device's data, brings the device to STOP, and later drives it
//! to RUNNING or resets it.

use limosa_client::{DataStream, Device, DeviceExt};
use limosa_clockwork::now;
use limosa_protocol::State;

use super::device_queue::{Command, Item};
use super::receiving::Receiving;
use crate::Result;
use crate::devices::failed;
use crate::error::guard;
use crate::report::Act;
use crate::transfer::driven::DrivenDevice;

/// A device and its session.
pub(super) struct DeviceLoader<'a> {
    device: &'a dyn Device,
    driven: DrivenDevice<'a>,
    stream: Option<Box<dyn DataStream>>,
}

impl<'a> DeviceLoader<'a> {
    pub(super) fn new(device: &'a dyn Device) -> DeviceLoader<'a> {
        DeviceLoader { device, driven: DrivenDevice::new(device, State::Running), stream: None }
    }
}

impl Receiving<'_, '_> {
    /// Does the work of a device as long as there is any. A panic of the device is a failure of the device.
    pub(super) fn work_on(&self, at: usize) {
        let mut loader = self.loaders[at].lock();
        let name = loader.device.name();
        loop {
            let mut queue = self.queues[at].lock();
            if self.team.check().is_err() {
                queue.items.clear();
            }
            if let Some(item) = queue.items.pop_front() {
                drop(queue);
                if let Err(error) = guard(name, || self.load(at, &mut loader, item)) {
                    self.team.fail(error);
                }
                continue;
            }
            let Some(command) = queue.command.take() else {
                queue.is_busy = false;
                return;
            };
            drop(queue);
            let done = guard(name, || self.obey(at, &mut loader, command));
            self.queues[at].lock().done = Some(done);
            self.command_is_done();
        }
    }

    fn obey(&self, at: usize, loader: &mut DeviceLoader<'_>, command: Command) -> Result<()> {
        let device = loader.device;
        match command {
            Command::Open(found) => {
                let state = State::Resuming;
                let _span = self.recorder().span(at, Act::Enter { state });
                loader.driven = DrivenDevice::new(device, found);
                self.queues[at].lock().found = Some(found);
                loader.stream = loader.driven.enter(state)?;
                Ok(())
            }
            Command::Enter(state) => {
                let _span = self.recorder().span(at, Act::Enter { state });
                // A device that is gone or was reset is not asked to run.
                loader.driven.enter_with(state, || self.queues[at].lock().asked_to_run = true).map(drop)
            }
            Command::Check => loader.driven.check(),
            Command::Reset => {
                let _span = self.recorder().span(at, Act::Reset);
                loader.stream = None;
                device.reset().map_err(|error| failed(device, "resetting it", error))
            }
            Command::ReturnToStop => {
                let _span = self.recorder().span(at, Act::Enter { state: State::Stop });
                let stopped = device.set_state(State::Stop).map(drop);
                stopped.map_err(|error| failed(device, "returning it to STOP", error))
            }
        }
    }

    /// Loads a piece of the device's data, or at its end brings the device to STOP.
    fn load(&self, at: usize, loader: &mut DeviceLoader<'_>, item: Item) -> Result<()> {
        let Item::Data(data) = item else {
            {
                let _span = self.recorder().span(at, Act::Enter { state: State::Stop });
                loader.driven.enter(State::Stop)?;
            }
            loader.stream = None;
            return self.is_loaded();
        };
        let (bytes, began) = (data.len() as u64, now());
        if let Some(stream) = &mut loader.stream {
            stream.write(&data).map_err(|error| loader.driven.why("loading its data", error))?;
        }
        self.recorder().device_span(at, Act::Load, began, bytes);
        self.recorder().device_data(at, bytes);
        let mut queue = self.queues[at].lock();
        queue.queued -= bytes;
        queue.window.take(bytes);
        self.recorder().device_waits(at, queue.waiting());
        let credit = self.credit_due(&mut queue);
        drop(queue);
        self.queues[at].notify_all();
        self.tell(at, credit)?;
        self.keep_spare(data);
        Ok(())
    }
}
