//! A device that is frozen while its client drives it.

use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::{Bus, Description, Fault, Save, SimpleMigration, SimpleModel};

/// A device whose start lasts until it is told to end.
struct SlowStart {
    begun: mpsc::Sender<()>,
    may_end: mpsc::Receiver<()>,
}

impl SimpleModel for SlowStart {
    fn description(&self) -> Description {
        Description::default()
    }

    fn attach(&mut self, _: Bus) {}

    fn region_read(&mut self, _: u32, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn region_write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        Some(self)
    }
}

impl SimpleMigration for SlowStart {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY
    }

    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.begun.send(()).unwrap();
        self.may_end.recv().unwrap();
        Ok(())
    }

    fn save_begin(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn save(&mut self, _: usize, _: bool) -> Result<Save<'_>, Errno> {
        Ok(Save::End)
    }

    fn save_end(&mut self) {}

    fn data_size(&self) -> u64 {
        0
    }

    fn load_begin(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn load(&mut self, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }

    fn load_finish(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn load_abort(&mut self) {}
}

#[test]
fn a_device_that_its_vmm_was_starting_as_it_was_frozen_counted_as_one_that_stands() {
    let (begun, has_begun) = mpsc::channel();
    let (end, may_end) = mpsc::channel();
    let machine = Machine::simple(SlowStart { begun, may_end });
    let new = machine.begin_replacing().unwrap();
    machine.loaded(new).unwrap();
    machine.replace(new, Kept { stopped: true, ..Kept::default() }).unwrap();
    assert_eq!(machine.state(), State::Stop);
    std::thread::scope(|scope| {
        let starts = scope.spawn(|| machine.set_state(ClientId::VMM, State::Running).map(drop));
        has_begun.recv().unwrap();
        let clients = machine.lock().clients;
        let freezes = scope.spawn(|| machine.freeze(None, Instant::now() + Duration::from_secs(60)));
        while machine.lock().clients == clients {
            std::thread::yield_now();
        }
        end.send(()).unwrap();
        starts.join().unwrap().unwrap();
        let frozen = freezes.join().unwrap().unwrap();
        assert_eq!(frozen.kept, Kept::default(), "it ran as it was frozen");
        end.send(()).unwrap();
        machine.thaw(frozen);
    });
    assert_eq!(machine.state(), State::Running);
}
