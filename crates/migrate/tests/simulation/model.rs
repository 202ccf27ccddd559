//! A device of the simulation: blocks of state that the guest changes by ringing a doorbell, DMA that is under way when
//! it stops, and faults where it is told to have them.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use limosa_clockwork::simulation;
use limosa_device::{Bus, Fault, Save};
use limosa_protocol::Errno;
use limosa_protocol::feature::{PrecopyFlags, PrecopyInfo};

use crate::guest::BUSY_PAGES;
use crate::memory::iova;
use crate::plan::{DevicePlan, End};
use crate::scripted::{Contents, Script, Scripted, Step};
use crate::world::{PAGE, Precopy, World};

const END: u64 = u64::MAX;

/// What is known of a device from outside.
#[derive(Default)]
pub struct Outside {
    /// It holds the guest's state.
    pub holds: Mutex<bool>,
    pub blocks: Mutex<Vec<u64>>,
    /// Where it fails.
    pub script: Script,
    /// Somebody has reset it in a way that the engine need not see.
    pub lost: Mutex<bool>,
    /// The guest resets it, and keeps it.
    pub reset_by_guest: Mutex<bool>,
    /// Loses a block when it loads, for the checker to find.
    pub forgets: Mutex<bool>,
}

pub fn get<T: Clone>(of: &Mutex<T>) -> T {
    of.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

pub fn set<T>(of: &Mutex<T>, to: T) {
    *of.lock().unwrap_or_else(PoisonError::into_inner) = to;
}

pub struct SimModel {
    end: End,
    number: usize,
    world: Arc<World>,
    outside: Arc<Outside>,
    blocks: Vec<u64>,
    plan: DevicePlan,
    record_bytes: usize,
    regions: Vec<u64>,
    /// Blocks that the saving session has not given out as they are now.
    dirty: BTreeSet<u64>,
    ready: Vec<u8>,
    given: usize,
    /// Blocks of initial data that are not made ready, whether those that are ready are some, and what is held back until
    /// when.
    initial: BTreeSet<u64>,
    ready_is_initial: bool,
    late_until: Duration,
    rearmed: bool,
    given_bytes: u64,
    ended: bool,
    /// DMA under way: region, page, and what it writes.
    in_flight: Option<(usize, u64, u64)>,
    bus: Option<Bus>,
}

impl SimModel {
    pub fn new(
        end: End,
        number: usize,
        plan: DevicePlan,
        regions: &[u64],
        world: Arc<World>,
        outside: Arc<Outside>,
    ) -> Scripted<SimModel> {
        let holds = end == End::Source;
        let blocks: Vec<u64> =
            (0..u64::from(plan.blocks)).map(|block| if holds { block * 7 } else { 0 }).collect();
        if holds {
            world.truth().devices[number] = blocks.clone();
        }
        set(&outside.holds, holds);
        set(&outside.blocks, blocks.clone());
        let contents = SimModel {
            end,
            number,
            world,
            outside,
            blocks,
            plan,
            record_bytes: plan.record_bytes,
            regions: regions.to_vec(),
            dirty: BTreeSet::new(),
            ready: Vec::new(),
            given: 0,
            initial: BTreeSet::new(),
            ready_is_initial: false,
            late_until: Duration::ZERO,
            rearmed: false,
            given_bytes: 0,
            ended: false,
            in_flight: None,
            bus: None,
        };
        Scripted::new(plan.flags, contents)
    }

    fn set_block(&mut self, block: usize, value: u64) {
        self.blocks[block] = value;
        self.dirty.insert(block as u64);
        self.tell_left();
        set(&self.outside.blocks, self.blocks.clone());
        self.world.truth().devices[self.number] = self.blocks.clone();
    }

    fn initial_blocks(&self) -> BTreeSet<u64> {
        (0..u64::from(self.plan.initial).min(self.blocks.len() as u64)).collect()
    }

    /// Bytes of initial data, and of all data, that are not given.
    fn left(&self) -> (u64, u64) {
        let ready = (self.ready.len() - self.given) as u64;
        let initial =
            (self.initial.len() * self.record_bytes) as u64 + u64::from(self.ready_is_initial) * ready;
        let others = self.dirty.difference(&self.initial).count();
        let all = ((self.initial.len() + others) * self.record_bytes) as u64 + ready;
        (initial, all)
    }

    /// For the checker, what is left and was loaded.
    fn tell_left(&self) {
        let (initial, left) = self.left();
        let precopy = &mut self.world.truth().precopy[self.number];
        precopy.left = left;
        if initial == 0 {
            precopy.initial_end.get_or_insert(self.given_bytes);
        }
    }

    /// The blocks to be given out next.
    fn next_blocks(&mut self, stopped: bool) -> Vec<u64> {
        let (first, half) = (self.initial.len(), self.plan.initial as usize / 2);
        let is_late = !stopped && simulation::elapsed() < self.late_until;
        let held = if is_late { half.min(first) } else { 0 };
        let initial: Vec<u64> = self.initial.iter().copied().take((first - held).min(10)).collect();
        self.ready_is_initial = !initial.is_empty();
        if first > 0 {
            // Initial data comes before all others.
            return initial;
        }
        self.dirty.iter().copied().take(10).collect()
    }

    /// Makes a record ready to be given out.
    fn record(&mut self, block: u64, value: u64) {
        self.ready.extend_from_slice(&block.to_le_bytes());
        self.ready.extend_from_slice(&value.to_le_bytes());
        // What nobody can compress to nothing.
        let words = (0..(self.record_bytes as u64 - 16) / 8).map(|at| (value ^ at).wrapping_mul(END / 77));
        self.ready.extend(words.flat_map(u64::to_le_bytes));
    }

    /// DMA that was started ends.
    fn land(&mut self) {
        if let (Some((region, page, value)), Some(bus)) = (self.in_flight.take(), &self.bus) {
            // Refused only where nothing is mapped.
            let at = iova(region) + page * PAGE as u64 + value % 500 * 8;
            let _ = bus.memory.write(at, &value.to_le_bytes());
        }
    }
}

impl Contents for SimModel {
    fn step(&mut self, step: Step) -> Result<(), Fault> {
        self.outside.script.step(step).inspect_err(|_| self.world.strikes())
    }

    fn attach(&mut self, bus: Bus) {
        self.bus = Some(bus);
    }

    fn holds_guest(&self) -> bool {
        get(&self.outside.holds)
    }

    fn runs(&mut self, runs: bool) {
        self.world.runs(self.end, runs);
    }

    fn quiesce(&mut self) {
        self.land();
    }

    /// A block becomes another, and DMA is started; what was under way before ends.
    fn doorbell(&mut self, data: &[u8], running: bool) -> Result<(), Errno> {
        let value = u64::from_le_bytes(data.try_into().map_err(|_| Errno::EINVAL)?);
        if !running || !self.holds_guest() {
            return Err(Errno::EBUSY);
        }
        self.land();
        let block = value as usize % self.blocks.len();
        self.set_block(block, value);
        if !self.regions.is_empty() {
            let region = value as usize / 3 % self.regions.len();
            self.in_flight = Some((region, value / 5 % self.regions[region].min(BUSY_PAGES), value));
        }
        Ok(())
    }

    fn is_reset_by_guest(&self) -> bool {
        get(&self.outside.reset_by_guest)
    }

    fn clear(&mut self) {
        self.in_flight = None;
        if self.is_reset_by_guest() {
            return (0..self.blocks.len()).for_each(|block| self.set_block(block, 0));
        }
        set(&self.outside.holds, false);
        self.blocks.fill(0);
        set(&self.outside.blocks, self.blocks.clone());
    }

    fn save_begin(&mut self) {
        self.dirty = (0..self.blocks.len() as u64).collect();
        (self.ready, self.given, self.ended) = (Vec::new(), 0, false);
        (self.initial, self.ready_is_initial, self.rearmed) = (self.initial_blocks(), false, false);
        self.given_bytes = 0;
        self.late_until = simulation::elapsed() + self.plan.late;
        let since = Some(simulation::elapsed());
        self.world.truth().precopy[self.number] = Precopy { since, ..Precopy::default() };
        self.tell_left();
    }

    fn save(&mut self, bytes_max: usize, stopped: bool) -> Save<'_> {
        if self.given == self.ready.len() {
            (self.ready, self.given) = (Vec::new(), 0);
            for block in self.next_blocks(stopped) {
                self.dirty.remove(&block);
                self.initial.remove(&block);
                self.record(block, self.blocks[block as usize]);
            }
            if self.ready.is_empty() && stopped && !self.ended {
                self.ended = true;
                self.record(END, self.blocks.iter().fold(0u64, |sum, block| sum.rotate_left(1) ^ block));
            }
        }
        let bytes = (self.ready.len() - self.given).min(bytes_max);
        self.given += bytes;
        self.given_bytes += bytes as u64;
        self.tell_left();
        match (bytes, stopped) {
            (0, true) => Save::End,
            (0, false) => Save::NothingForNow,
            _ => Save::Data(&self.ready[self.given - bytes..self.given]),
        }
    }

    fn save_end(&mut self) {
        self.world.truth().precopy[self.number].since = None;
    }

    fn has_precopy_reinit(&self) -> bool {
        self.plan.rearms
    }

    fn precopy_info(&mut self, reinit: bool) -> PrecopyInfo {
        let mut flags = PrecopyFlags::empty();
        if reinit
            && self.plan.initial > 0
            && self.left().1 == 0
            && !std::mem::replace(&mut self.rearmed, true)
        {
            self.initial = self.initial_blocks();
            flags |= PrecopyFlags::REINIT;
            self.world.truth().precopy[self.number].initial_end = None;
        }
        let (initial_bytes, left) = self.left();
        self.tell_left();
        let truth = &mut *self.world.truth();
        let precopy = &mut truth.precopy[self.number];
        if precopy.initial_told == 0 {
            precopy.told_at = simulation::elapsed();
        }
        precopy.initial_told = initial_bytes;
        let (dirty_bytes, flags) = (left - initial_bytes, flags.bits());
        PrecopyInfo { initial_bytes, dirty_bytes, flags, ..Default::default() }
    }

    fn data_size(&self) -> u64 {
        ((self.blocks.len() + 1) * self.record_bytes) as u64
    }

    fn staged(&mut self, bytes: usize) {
        self.world.truth().loaded[self.number] = bytes as u64;
    }

    fn load(&mut self, staged: Vec<u8>) -> Result<(), Fault> {
        let refused = Err(Fault::Refused(Errno::EINVAL));
        let mut blocks = vec![0; self.blocks.len()];
        let mut ended = None;
        for record in staged.chunks(self.record_bytes) {
            let word = |at: usize| Some(u64::from_le_bytes(record.get(at..at + 8)?.try_into().ok()?));
            match (word(0), word(8)) {
                (Some(END), Some(sum)) if ended.is_none() => ended = Some(sum),
                (Some(block), Some(value)) if ended.is_none() && (block as usize) < blocks.len() => {
                    blocks[block as usize] = value;
                }
                _ => return refused,
            }
        }
        if ended != Some(blocks.iter().fold(0u64, |sum, block| sum.rotate_left(1) ^ block)) {
            return refused;
        }
        if get(&self.outside.forgets) {
            blocks[0] ^= 1;
        }
        self.blocks = blocks;
        set(&self.outside.blocks, self.blocks.clone());
        set(&self.outside.holds, true);
        Ok(())
    }
}
