//! A device with one register that counts its writes, and that migrates live.
use limosa_device::saved::Section;
use limosa_device::{Bus, Description, Fault, Machine, Region, SimpleModel, Whole, WholeState};
use limosa_protocol::{Errno, info::RegionFlags};
use limosa_vfio_user::server::{Options, Server};

#[derive(Default)]
pub(crate) struct Counter(u64);

impl SimpleModel for Counter {
    fn description(&self) -> Description {
        let register = Region { flags: RegionFlags::READ | RegionFlags::WRITE, size: 8, ..Region::default() };
        Description { regions: vec![register], ..Description::default() }
    }

    fn attach(&mut self, _bus: Bus) {} // This device uses neither guest memory nor interrupts.

    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.0.to_le_bytes()[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, _offset: u64, _data: &[u8]) -> Result<(), Errno> {
        self.0 += 1;
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.0 = 0;
        Ok(())
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Saved {
    #[prost(uint64, tag = "1")]
    count: u64,
}

impl WholeState for Counter {
    type Saved = Saved;
    const KIND: &'static str = "example.counter";
    const SECTION: Section = Section::message("counter", 1);

    fn stop(&mut self) -> Result<(), Fault> {
        Ok(()) // This device does nothing on its own.
    }

    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn to_saved(&self) -> Saved {
        Saved { count: self.0 }
    }

    fn restore(&mut self, saved: Saved) -> Result<(), Errno> {
        self.0 = saved.count;
        Ok(())
    }
}

fn main() -> std::io::Result<()> {
    let path = std::env::args().nth(1).expect("the path of a socket to make");
    let machine = Machine::simple(Whole::new(Counter::default()));
    Server::bind(path, machine, Options::default())?.serve()
}
