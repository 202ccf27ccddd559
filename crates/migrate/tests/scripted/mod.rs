//! The model of a device that the engine's tests and the simulation share. It walks the arcs, fails where it is told to, and
//! counts as running while it holds a guest's state. What that state is, and how it is given and taken, is up to its
//! [`Contents`].

mod steps;

use limosa_device::{Bus, Description, Fault, Region, Save, SimpleMigration, SimpleModel};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::info::{DeviceFlags, RegionFlags};
use limosa_protocol::{Errno, MigrationFlags};

pub use steps::{Script, Step};

/// What a device holds. Each method has a default that does nothing, where a device can do without it.
pub trait Contents: Send + 'static {
    /// The device comes to this step. An error fails it.
    fn step(&mut self, _: Step) -> Result<(), Fault> {
        Ok(())
    }

    fn attach(&mut self, _: Bus) {}

    /// A write to the device's register while it runs or does not.
    fn doorbell(&mut self, _: &[u8], _running: bool) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    /// Whether this is the state of a guest.
    fn holds_guest(&self) -> bool {
        false
    }

    /// A device that holds a guest's state begins to run, or no longer does.
    fn runs(&mut self, _: bool) {}

    /// DMA that is under way ends.
    fn quiesce(&mut self) {}

    /// All becomes zero, and is no guest's unless the guest itself resets the device.
    fn clear(&mut self);

    /// Whether the guest itself resets the device now.
    fn is_reset_by_guest(&self) -> bool {
        false
    }

    fn save_begin(&mut self);

    fn save(&mut self, bytes_max: usize, stopped: bool) -> Save<'_>;

    fn save_end(&mut self) {}

    fn has_precopy_reinit(&self) -> bool {
        false
    }

    fn precopy_info(&mut self, reinit: bool) -> PrecopyInfo;

    fn data_size(&self) -> u64;

    /// The number of bytes that are there to be loaded.
    fn staged(&mut self, _: usize) {}

    /// Takes all that was given, or refuses it.
    fn load(&mut self, staged: Vec<u8>) -> Result<(), Fault>;
}

/// A device with these contents.
pub struct Scripted<C> {
    flags: MigrationFlags,
    running: bool,
    staging: Vec<u8>,
    contents: C,
}

impl<C: Contents> Scripted<C> {
    /// A device in RUNNING.
    pub fn new(flags: MigrationFlags, mut contents: C) -> Scripted<C> {
        if contents.holds_guest() {
            contents.runs(true);
        }
        Scripted { flags, running: true, staging: Vec::new(), contents }
    }

    fn step(&mut self, step: Step) -> Result<(), Fault> {
        self.contents.step(step).inspect_err(|how| {
            if matches!(how, Fault::Broken(_)) {
                self.set_running(false);
            }
        })
    }

    fn set_running(&mut self, running: bool) {
        if self.running != running && self.contents.holds_guest() {
            self.contents.runs(running);
        }
        self.running = running;
    }
}

impl<C: Contents> SimpleModel for Scripted<C> {
    fn description(&self) -> Description {
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        let region = Region { flags, size: 4096, ..Region::default() };
        Description { flags: Some(DeviceFlags::RESET), regions: vec![region], irqs: vec![] }
    }

    fn attach(&mut self, bus: Bus) {
        self.contents.attach(bus);
    }

    fn region_read(&mut self, _: u32, _: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.fill(0);
        Ok(())
    }

    fn region_write(&mut self, _: u32, _: u64, data: &[u8]) -> Result<(), Errno> {
        self.contents.doorbell(data, self.running)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        if self.contents.is_reset_by_guest() {
            self.set_running(true);
            self.contents.clear();
            return Ok(());
        }
        self.step(Step::Reset).map_err(Fault::errno)?;
        self.set_running(false);
        self.contents.clear();
        self.running = true;
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        if self.flags.is_empty() { None } else { Some(self) }
    }
}

impl<C: Contents> SimpleMigration for Scripted<C> {
    fn flags(&self) -> MigrationFlags {
        self.flags
    }

    fn quiesce_p2p(&mut self) -> Result<(), Fault> {
        self.step(Step::Quiesce)?;
        self.contents.quiesce();
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Fault> {
        self.step(Step::Stop)?;
        self.contents.quiesce();
        self.set_running(false);
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.step(Step::Start)?;
        self.set_running(true);
        Ok(())
    }

    fn save_begin(&mut self) -> Result<(), Fault> {
        self.step(Step::SaveBegin)?;
        self.contents.save_begin();
        Ok(())
    }

    fn save(&mut self, bytes_max: usize, stopped: bool) -> Result<Save<'_>, Errno> {
        self.step(Step::Save).map_err(Fault::errno)?;
        Ok(self.contents.save(bytes_max, stopped))
    }

    fn save_final(&mut self) -> Result<(), Fault> {
        self.step(Step::SaveFinal)
    }

    fn save_end(&mut self) {
        self.contents.save_end();
    }

    fn has_precopy_reinit(&self) -> bool {
        self.contents.has_precopy_reinit()
    }

    fn precopy_info(&mut self, reinit: bool) -> PrecopyInfo {
        self.contents.precopy_info(reinit)
    }

    fn data_size(&self) -> u64 {
        self.contents.data_size()
    }

    fn load_begin(&mut self) -> Result<(), Fault> {
        self.staging.clear();
        self.contents.staged(0);
        self.step(Step::LoadBegin)
    }

    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno> {
        self.step(Step::Load).map_err(Fault::errno)?;
        self.staging.extend_from_slice(chunk);
        self.contents.staged(self.staging.len());
        Ok(())
    }

    fn load_finish(&mut self) -> Result<(), Fault> {
        self.step(Step::LoadFinish)?;
        self.contents.load(std::mem::take(&mut self.staging))
    }

    fn load_abort(&mut self) {
        self.staging.clear();
    }
}
