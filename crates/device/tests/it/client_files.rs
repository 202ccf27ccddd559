//! The file of a region that a client has mapped is no later client's, whatever the model fails on.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use limosa_device::{Bus, ClientId, Description, Machine, Region, RegionMapping, SimpleModel};
use limosa_protocol::Errno;
use limosa_protocol::info::RegionFlags;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const BYTES: u64 = 4096;

fn file() -> Arc<OwnedFd> {
    let file = memfd_create("region", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, BYTES).unwrap();
    Arc::new(file)
}

/// Panics in the next accesses, and the next times that its client goes.
struct Fragile {
    file: Arc<OwnedFd>,
    writes_panic: bool,
    ends_panic: u32,
}

impl SimpleModel for Fragile {
    fn description(&self) -> Description {
        let mapping = RegionMapping { fd: Arc::clone(&self.file), offset: 0, areas: vec![(0, BYTES)] };
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        let region = Region { flags, size: BYTES, mapping: Some(mapping), ..Region::default() };
        Description { regions: vec![region], ..Description::default() }
    }

    fn attach(&mut self, _: Bus) {}

    fn region_read(&mut self, _: u32, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Ok(())
    }

    fn region_write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
        assert!(!self.writes_panic, "a write that the model panics in");
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    fn client_gone(&mut self) {
        let panics = self.ends_panic > 0;
        self.ends_panic = self.ends_panic.saturating_sub(1);
        assert!(!panics, "an end that the model panics in");
        self.file = file();
    }

    fn region_file(&self, _: u32) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.file))
    }
}

#[test]
fn a_client_that_had_the_model_panic_kept_the_region_file_of_the_client_after_it() {
    for (writes_panic, ends_panic) in [(true, 0), (false, 1), (true, 1), (false, 2)] {
        let machine = Machine::simple(Fragile { file: file(), writes_panic, ends_panic });
        let mapped = machine.region_file(0).unwrap();
        assert_eq!(machine.region_write(0, 0, &[1; 4]).is_err(), writes_panic);
        machine.client_gone(ClientId::VMM);
        assert!(machine.region_file(0).is_none(), "of a model that panicked");
        // Each reset tells the model of the client's end, until it does not fail on that.
        while machine.reset().is_err() {
            assert!(machine.region_file(0).is_none());
        }
        let next = machine.region_file(0).unwrap();
        assert!(!Arc::ptr_eq(&mapped, &next), "{writes_panic} {ends_panic}");
        // Told once, and not at each reset.
        machine.reset().unwrap();
        assert!(Arc::ptr_eq(&next, &machine.region_file(0).unwrap()));
    }
}
