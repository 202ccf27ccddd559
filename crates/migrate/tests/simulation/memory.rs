//! Guest memory of one end, and the VMM's log of what is written there.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use limosa_client::DmaTarget;
use limosa_clockwork::{simulation, sleep};
use limosa_guest_memory::{FileMapping, PinnedBytes};
use limosa_migrate::{DirtyLog, GuestPages};
use limosa_protocol::bitmap::DirtyBitmap;
use limosa_testing::memfd;

use crate::adversary::STRANGE_PAGE;
use crate::panics::{Panics, Place};
use crate::plan::{End, Mutation, Plan};
use crate::world::{PAGE, World};

/// The first address of a region, as devices see it.
pub fn iova(region: usize) -> u64 {
    (region as u64 + 1) << 24
}

/// Memory of one end.
pub struct SimMemory {
    end: End,
    world: Arc<World>,
    regions: Vec<FileMapping>,
    /// Its pages are sent and received where they lie, if the engine wants that.
    pins: bool,
    pub fails: AtomicBool,
    /// What devices write is in the VMM's log as well.
    pub log_covers_devices: bool,
    pub mutation: Option<Mutation>,
    pub panics: Arc<Panics>,
}

impl SimMemory {
    pub fn new(end: End, world: Arc<World>, plan: &Plan, panics: Arc<Panics>) -> SimMemory {
        let region = |pages: &u64| {
            // The previous contents must be gone after a move.
            let fill = if end == End::Source { plan.fill(*pages) } else { 0xaa };
            let bytes = *pages as usize * PAGE;
            let file = memfd(bytes as u64);
            let mapping = FileMapping::new(&file, 0, bytes as u64, true, true).expect("room");
            if fill != 0 {
                mapping.write(0, &vec![fill; bytes]).expect("it is mapped");
            }
            mapping
        };
        SimMemory {
            end,
            world,
            regions: plan.regions.iter().map(region).collect(),
            pins: plan.pins[end as usize],
            fails: AtomicBool::new(false),
            log_covers_devices: plan.log_covers_devices,
            mutation: plan.mutation,
            panics,
        }
    }

    /// The bytes of a region.
    pub fn len(&self, region: usize) -> u64 {
        self.regions[region].len()
    }

    /// The contents of a region from an offset on.
    pub fn read(&self, region: usize, offset: usize, into: &mut [u8]) {
        self.regions[region].read(offset as u64, into).expect("it is mapped");
    }

    fn write(&self, region: usize, offset: usize, bytes: &[u8]) {
        self.regions[region].write(offset as u64, bytes).expect("it is mapped");
    }

    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// A write of the guest's: of a vCPU, or of this device.
    pub fn guest_writes(&self, device: Option<usize>, region: usize, offset: usize, bytes: &[u8]) {
        self.write(region, offset, bytes);
        let mut truth = self.world.truth();
        truth.memory[region][offset..][..bytes.len()].copy_from_slice(bytes);
        if self.end == End::Source && truth.logs {
            let page = (offset / PAGE) as u64;
            if let Some(device) = device {
                truth.device_marks[device].insert((region, page));
            }
            if device.is_none() || self.log_covers_devices {
                truth.marks[region].insert(page);
            }
        }
    }

    /// What differs from the truth, if anything does.
    pub fn difference(&self) -> Option<String> {
        let truth = self.world.truth();
        (0..self.regions.len()).find_map(|region| {
            let want = &truth.memory[region];
            let mut have = vec![0; want.len()];
            self.read(region, 0, &mut have);
            let page = have.chunks(PAGE).zip(want.chunks(PAGE)).position(|(have, want)| have != want)?;
            Some(format!("page {page} of region {region} of the {:?} is not what the guest wrote", self.end))
        })
    }

    fn check(&self) -> io::Result<()> {
        self.panics.call(Place::Memory, &self.world);
        if self.fails.load(Ordering::SeqCst) {
            self.world.strikes();
            return Err(io::ErrorKind::HostUnreachable.into());
        }
        Ok(())
    }
}

/// A region, for the engine.
pub struct RegionPages {
    pub memory: Arc<SimMemory>,
    pub region: usize,
}

impl GuestPages for RegionPages {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        // Page by page: the guest writes in between.
        for (at, page) in into.chunks_mut(PAGE).enumerate() {
            if at % 16 == 0 && simulation::random(4) == 0 {
                sleep(Duration::from_nanos(1_000));
            }
            self.memory.check()?;
            self.memory.read(self.region, offset as usize + at * PAGE, page);
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        for (at, page) in from.chunks(PAGE).enumerate() {
            if at % 16 == 0 && simulation::random(4) == 0 {
                sleep(Duration::from_nanos(1_000));
            }
            self.memory.check()?;
            if simulation::crashing() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if page == STRANGE_PAGE {
                self.memory.world.wrong("a link that is not of the move wrote guest memory");
            }
            if self.memory.mutation == Some(Mutation::MemoryForgets) && simulation::random(16) == 0 {
                continue;
            }
            self.memory.write(self.region, offset as usize + at * PAGE, page);
        }
        Ok(())
    }

    fn pin(&self, range: Range<u64>, to_write: bool) -> Option<PinnedBytes> {
        if !self.memory.pins || self.memory.check().is_err() {
            return None;
        }
        let bytes = (range.end - range.start) as usize;
        let pinned = self.memory.regions[self.region].pin(range.start, bytes, true, to_write).ok()?;
        if to_write {
            self.memory.world.received_in_place.store(true, Ordering::SeqCst);
        }
        Some(pinned)
    }
}

/// Where a device's DMA goes.
pub struct DeviceMemory {
    pub memory: Arc<SimMemory>,
    pub region: usize,
    pub device: usize,
}

impl DmaTarget for DeviceMemory {
    fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.memory.read(self.region, offset as usize, data);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory.guest_writes(Some(self.device), self.region, offset as usize, data);
        Ok(())
    }
}

/// The VMM's log at the source.
pub struct SimLog {
    pub world: Arc<World>,
    pub covers_devices: bool,
    /// The next look fails.
    pub lost: Arc<AtomicBool>,
    pub mutation: Option<Mutation>,
    pub panics: Arc<Panics>,
}

impl DirtyLog for SimLog {
    fn start(&mut self) -> io::Result<()> {
        self.panics.call(Place::Log, &self.world);
        let mut truth = self.world.truth();
        truth.marks.iter_mut().for_each(|marks| marks.clear());
        truth.device_marks.iter_mut().for_each(|marks| marks.clear());
        truth.taken.clear();
        truth.given_back.clear();
        truth.logs = true;
        Ok(())
    }

    fn harvest(&mut self, region: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        self.panics.call(Place::Log, &self.world);
        let mut truth = self.world.truth();
        let marks = std::mem::take(&mut truth.marks[region]);
        truth.taken.extend(marks.iter().map(|page| (region, *page)));
        if self.lost.swap(false, Ordering::SeqCst) {
            self.world.strikes();
            let pages = dirty.pages();
            truth.taken.extend((0..pages).map(|page| (region, page)));
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for page in marks {
            if self.mutation != Some(Mutation::LogForgets) || simulation::random(4) != 0 {
                dirty.set_range(page, 1);
            }
        }
        Ok(())
    }

    fn give_back(&mut self, region: usize, dirty: &DirtyBitmap) {
        let mut truth = self.world.truth();
        for (first, pages) in dirty.runs() {
            if self.mutation == Some(Mutation::UndoForgets) && first % 2 == 0 {
                continue;
            }
            truth.given_back.extend((first..first + pages).map(|page| (region, page)));
        }
    }

    fn stop(&mut self) {
        self.world.truth().logs = false;
    }

    fn covers_devices(&self) -> bool {
        self.covers_devices
    }
}
